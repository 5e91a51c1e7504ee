//! What jobs do.
//!
//! | file | what |
//! |---|---|
//! | `run.rs` | the loop that they share |
//! | `sft.rs` | supervised fine-tuning |
//! | `pretrain.rs` | pretraining |
//! | `pairs.rs` | DPO and reward models |
//! | `policy.rs` | GRPO |
//! | `sample.rs` | text on the way |

mod pairs;
#[cfg(test)]
mod pairs_tests;
mod policy;
mod pretrain;
#[cfg(test)]
mod pretrain_tests;
mod run;
mod sample;
mod sft;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trl_tests;

pub use pairs::{Objective, Pairs};
pub use policy::Policy;
pub use pretrain::{Pretrain, start};
pub use run::{Event, Outcome, TrainError};
pub use sft::Sft;
