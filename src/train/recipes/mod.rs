//! What jobs do.
//!
//! | file | what |
//! |---|---|
//! | `run.rs` | the loop that they share |
//! | `sft.rs` | supervised fine-tuning |
//! | `pretrain.rs` | pretraining |
//! | `sample.rs` | text on the way |

mod pretrain;
#[cfg(test)]
mod pretrain_tests;
mod run;
mod sample;
mod sft;
#[cfg(test)]
mod tests;

pub use pretrain::{Pretrain, start};
pub use run::{Evaluated, Event, Outcome, Progress, TrainError};
pub use sft::Sft;
