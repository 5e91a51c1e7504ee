//! Reward models: a head scores the chosen completion of a pair higher than the rejected one. The
//! loss is in `loss/preference.rs`.

use super::preference::{Objective, Placed, PreferenceTrainer};
use super::run::LossSums;
use super::{Event, Job, Outcome, Recipe, TrainError};
use crate::job::Control;
use crate::job::spec::Reward;
use crate::train::data::{Encoded, PreparedPairs};
use crate::train::model::{Batch, OutputGrads, Outputs, SCORE, Wanted};
use std::sync::Arc;

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

    /// Only the last token of each completion has a weight other than 0.
    fn batch(&self, completions: &[&Encoded]) -> Batch {
        let batch = Batch::of(completions.iter().copied());
        let mut weights = vec![0.0; batch.tokens.len()];
        let ends = batch.documents[1..].iter().copied().chain([weights.len()]).collect::<Vec<_>>();
        ends.into_iter().for_each(|end| weights[end - 1] = 1.0);
        Batch { weights: Arc::new(weights), ..batch }
    }

    fn rows(&self, _: &Encoded) -> usize {
        1
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
