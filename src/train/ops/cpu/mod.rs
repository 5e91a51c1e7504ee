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
//! | `logits.rs` | losses of rows of logits, without holding those of all rows at once |
//! | `cross_entropy.rs` | cross-entropy |
//! | `log_probs.rs` | log-probabilities of tokens |
//! | `distillation.rs` | divergence from a teacher, and a teacher's most probable tokens |

mod add;
mod attention;
mod cross_entropy;
mod distillation;
mod dropout;
mod embedding;
mod fused;
mod gated;
mod lanes;
mod linear;
mod log_probs;
mod logits;
mod norm;
mod rope;

pub(super) use add::{add, add_bias, reshape, scale, sum, weighed};
pub(super) use attention::attention;
pub(super) use cross_entropy::linear_cross_entropy;
pub(super) use distillation::{distillation, highest, top_log_probs};
pub(super) use dropout::dropout;
pub(super) use embedding::embedding;
pub(super) use gated::gated;
pub(super) use linear::{frozen_linear, linear, lora_linear};
pub(super) use log_probs::log_probs;
pub(super) use norm::rms_norm;
pub(super) use rope::rotate;
