//! Training recipes, one for each kind of job.
//!
//! | file | content |
//! |---|---|
//! | `run.rs` | the training loop shared by all recipes |
//! | `sft.rs` | supervised fine-tuning |
//! | `pretrain.rs` | pretraining |
//! | `preference.rs` | DPO and reward models |
//! | `grpo.rs` | GRPO |
//! | `sample.rs` | sample text during pretraining |

mod grpo;
mod preference;
#[cfg(test)]
mod preference_tests;
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

pub use grpo::GrpoTrainer;
pub use preference::{Objective, PreferenceTrainer};
pub use pretrain::{Pretrain, init_pretrain};
pub use run::{Event, Outcome, TrainError};
pub use sft::Sft;
