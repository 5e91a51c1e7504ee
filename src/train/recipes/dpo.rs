//! Direct preference optimization: a policy that prefers the chosen completions. The loss is in
//! `loss/preference.rs`.

use super::preference::{Objective, Placed, PreferenceTrainer, sum};
use super::run::LossSums;
use super::{Event, Job, Outcome, Recipe, TrainError};
use crate::job::Control;
use crate::job::spec::Dpo;
use crate::train::data::{Encoded, PreparedPairs};
use crate::train::model::{OutputGrads, Outputs, Wanted};

impl Recipe for Dpo {
    type Data = PreparedPairs;

    fn run(
        &self,
        job: &Job<'_, PreparedPairs>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        PreferenceTrainer::new(self, job).run(control, event)
    }
}

impl Objective for Dpo {
    fn outputs(&self) -> Wanted {
        Wanted::LOG_PROBS
    }

    fn needs_reference(&self) -> bool {
        true
    }

    fn example(&self, completion: Encoded) -> Encoded {
        completion
    }

    fn loss(
        &self,
        pair: &Placed,
        outputs: &Outputs,
        gradients: &mut OutputGrads,
        sums: &mut LossSums,
    ) -> (f64, [f64; 2]) {
        let policy = pair.rows.clone().map(|rows| sum(outputs, rows));
        let tokens = pair.rows.clone().map(|rows| rows.len());
        let found = self.pair(policy, pair.reference, tokens, pair.facts.label);
        for which in 0..2 {
            gradients.log_probs[pair.rows[which].clone()].fill(found.slopes[which]);
        }
        let [better, worse] = policy;
        sums.measure("logps_chosen", better);
        sums.measure("logps_rejected", worse);
        let [by_better, by_worse] = pair.reference;
        (found.loss, [self.reward(better, by_better), self.reward(worse, by_worse)])
    }
}
