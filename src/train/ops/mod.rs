//! Operations of a trainable model with their backward passes by hand: parallel over cores, and in a
//! fixed partition, so that the number of threads changes no bit.
//!
//! candle's own norms, rotations and softmax cut gradients without a word; these do not. Each is
//! compared with finite differences in f64 (`tests.rs`) and with PyTorch (`torch_tests.rs`). On a device
//! other than the CPU the same functions are made of candle's simple operations, which no test has
//! run there.
//!
//! | file | what |
//! |---|---|
//! | `fused.rs` | from slices to candle's operations and back |
//! | `tape.rs` | the way back over them |
//! | `add.rs` | sums |
//! | `lanes.rs` | sums of a row |
//! | `norm.rs` | RMSNorm |
//! | `rope.rs` | rotation |
//! | `gated.rs` | SiLU or GELU of one half times the other |
//! | `attention.rs` | causal attention over packed documents |
//! | `dropout.rs` | numbers left out, by a counter |
//! | `embedding.rs` | rows of a table |
//! | `linear.rs` | frozen weights as the file has them, trainable ones, LoRA |
//! | `cross_entropy.rs` | losses and log-probabilities, without all logits at once |

mod add;
mod attention;
mod cross_entropy;
mod dropout;
mod embedding;
mod fused;
mod gated;
mod lanes;
mod linear;
mod norm;
mod rope;
mod tape;

pub use add::{add, add_bias, reshape, scale, weighed};
pub use attention::{Scope, attention};
pub use cross_entropy::{Head, LogProbs, Losses, Targets, linear_cross_entropy, log_probs};
pub use dropout::{Draw, dropout, mixed};
pub use embedding::embedding;
pub use gated::gated;
pub use linear::{Frozen, frozen_linear, linear, lora_linear};
pub use norm::rms_norm;
pub use rope::{Rotation, rotate};
pub use tape::{Grads, Tape, record, without_gradients};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod torch_tests;
