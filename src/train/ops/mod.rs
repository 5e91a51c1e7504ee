//! Operations of a trainable model with hand-written backward passes. They run in parallel with a
//! fixed partition of the work, so that results are bit-identical for any number of threads.
//!
//! candle's own norms, rotations and softmax silently cut the gradient; these operations do not.
//! Each one is compared with finite differences in f64 (`tests.rs`) and with PyTorch
//! (`torch_tests.rs`). On devices other than the CPU the same functions are composed of candle's
//! basic operations, which no test has run there.
//!
//! | file | content |
//! |---|---|
//! | `fused.rs` | wraps operations on slices as candle operations |
//! | `tape.rs` | the backward pass |
//! | `add.rs` | sums |
//! | `lanes.rs` | reductions of a row |
//! | `norm.rs` | RMSNorm |
//! | `rope.rs` | rotary position embedding |
//! | `gated.rs` | SwiGLU and GeGLU |
//! | `attention.rs` | causal attention over packed documents |
//! | `dropout.rs` | dropout with a counter-based random generator |
//! | `embedding.rs` | rows of a table |
//! | `linear.rs` | frozen weights in the file's type, trainable weights, LoRA |
//! | `cross_entropy.rs` | losses and log-probabilities, without holding all logits at once |

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
