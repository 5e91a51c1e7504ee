//! Losses other than cross-entropy, as numbers computed from log-probabilities and values, with
//! their gradients. This module uses no tensors: `model/outputs.rs` runs the backward pass from
//! these gradients.
//!
//! | file | content |
//! |---|---|
//! | `policy.rs` | losses of sampled and graded completions: GRPO, PPO |
//! | `preference.rs` | losses of preference pairs: DPO and its variants, Bradley–Terry |

mod policy;
mod preference;

pub use policy::{Completion, Found, PpoCompletion, PpoFound, advantages};
pub use preference::PairLoss;

/// ln σ(x), without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}
