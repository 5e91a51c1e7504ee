//! What jobs do: a file each.

mod sft;
#[cfg(test)]
mod tests;

pub use sft::{Evaluated, Event, Outcome, Progress, Sft, TrainError};
