//! Losses that are more than a token's cross-entropy: numbers from log-probabilities and values, with
//! their slopes. No tensors here: `model/outputs.rs` takes the slopes back.
//!
//! | file | what |
//! |---|---|
//! | `policy.rs` | of sampled answers and what they were worth: GRPO, PPO |
//! | `preference.rs` | of pairs of answers: DPO and its kin, Bradley and Terry's |

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
