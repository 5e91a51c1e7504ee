//! Operations on slices: parallel, with a fixed partition of the work.
//!
//! | file | content |
//! |---|---|
//! | `fused.rs` | operations on slices as operations on tensors |
//! | `add.rs` | sums, scaling, reshaping |
//! | `lanes.rs` | reductions of a row |
//! | `norm.rs` | RMSNorm |
//! | `rope.rs` | rotary position embedding |
//! | `gated.rs` | SwiGLU and GeGLU |
//! | `attention.rs` | causal attention over packed documents |
//! | `dropout.rs` | dropout |
//! | `embedding.rs` | rows of a table |
//! | `linear.rs` | frozen weights, trained weights, LoRA |
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

pub(super) use add::{add, add_bias, reshape, scale, sum, weighed};
pub(super) use attention::attention;
pub(super) use cross_entropy::{linear_cross_entropy, log_probs};
pub(super) use dropout::dropout;
pub(super) use embedding::embedding;
pub(super) use gated::gated;
pub(super) use linear::{frozen_linear, linear, lora_linear};
pub(super) use norm::rms_norm;
pub(super) use rope::rotate;
