//! Constitutional AI (Bai et al. 2022, arXiv:2212.08073): the model learns principles from its own
//! revisions, and from the preferences of a judge.
//!
//! | file | content |
//! |---|---|
//! | `pipeline.rs` | the stages, in their order |
//! | `revise.rs` | answers, critiques and revisions |
//! | `compare.rs` | pairs of answers, labelled by the judge |
//! | `evaluate.rs` | the judge against people; answers before and after training |
//! | `table.rs` | files of examples, which a killed job goes on with |
//! | `stats.rs` | intervals and calibration |
//! | `report.rs` | the report, as JSON and HTML |

mod compare;
mod evaluate;
mod pipeline;
mod report;
mod revise;
mod stats;
mod table;
#[cfg(test)]
mod tests;

use super::calls::Calls;
use super::{Event, Job, Outcome, Recipe, TrainError};
use crate::job::Control;
use crate::job::spec::{Constitutional, Resolved};
use crate::train::data::PreparedPrompts;
use pipeline::Pipeline;

impl Recipe for Constitutional {
    type Data = PreparedPrompts;

    fn max_length(&self, settings: &Resolved) -> usize {
        settings.max_length.saturating_sub(self.max_tokens)
    }

    fn run(
        &self,
        job: &Job<'_, PreparedPrompts>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let calls = Calls::new(job.policy, control)?;
        match Pipeline::new(self, job, calls, control)?.run(event) {
            Err(error) if error.stops() => Ok(Outcome::Stopped),
            ended => ended,
        }
    }
}
