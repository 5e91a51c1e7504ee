//! Reward models: a head scores the chosen completion of a pair higher than the rejected one. The
//! loss is in `loss/preference.rs`.

use super::preference::{Objective, Placed, PreferenceTrainer};
use super::run::LossSums;
use super::{Event, Job, Outcome, Recipe, TrainError};
use crate::job::Control;
use crate::job::spec::Reward;
use crate::train::data::{Encoded, PreparedPairs};
use crate::train::model::{OutputGrads, Outputs, SCORE, Wanted};

impl Recipe for Reward {
    type Data = PreparedPairs;

    fn head(&self) -> Option<&'static str> {
        Some(SCORE)
    }

    fn run(
        &self,
        job: &Job<'_, PreparedPairs>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        PreferenceTrainer::new(self, job).run(control, event)
    }
}

impl Objective for Reward {
    fn outputs(&self) -> Wanted {
        Wanted::VALUES
    }

    fn needs_reference(&self) -> bool {
        false
    }

    fn example(&self, completion: Encoded) -> Encoded {
        completion.scored()
    }

    fn loss(
        &self,
        pair: &Placed,
        outputs: &Outputs,
        gradients: &mut OutputGrads,
        _: &mut LossSums,
    ) -> (f64, [f64; 2]) {
        let scores = pair.rows.clone().map(|rows| outputs.values[rows.start]);
        let found = self.pair(scores, pair.facts.margin, pair.facts.label);
        for which in 0..2 {
            gradients.values[pair.rows[which].start] = found.slopes[which];
        }
        (found.loss, scores)
    }
}
