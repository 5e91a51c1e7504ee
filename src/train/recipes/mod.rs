//! What jobs do.
//!
//! | file | what |
//! |---|---|
//! | `run.rs` | the loop that they share |
//! | `sft.rs` | supervised fine-tuning |

mod run;
mod sft;
#[cfg(test)]
mod tests;

pub use run::{Evaluated, Event, Outcome, Progress, TrainError};
pub use sft::Sft;
