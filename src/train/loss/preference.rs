//! Losses of preference pairs: a chosen and a rejected completion of one prompt.

use super::{log_sigmoid, sigmoid};
use crate::job::spec::{Dpo, DpoLoss, Reward};

/// The loss of a pair, and its derivatives by two numbers, one of the chosen and one of the
/// rejected completion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    pub loss: f64,
    pub slopes: [f64; 2],
}

impl Dpo {
    /// The loss of two completions, the chosen one first, from their log-probabilities by the
    /// policy and by the reference model, and their numbers of tokens. `label` is the probability
    /// that the chosen completion is better.
    pub fn pair(
        &self,
        policy: [f64; 2],
        reference: [f64; 2],
        tokens: [usize; 2],
        label: f64,
    ) -> PairLoss {
        let per = match self.loss {
            DpoLoss::Ipo => tokens.map(|tokens| tokens.max(1) as f64),
            DpoLoss::Sigmoid | DpoLoss::Hinge => [1.0; 2],
        };
        let ratio = |which: usize| (policy[which] - reference[which]) / per[which];
        let h = ratio(0) - ratio(1);
        // The loss of the pair as labelled, and with chosen and rejected swapped.
        let likely = label * (1.0 - self.label_smoothing) + (1.0 - label) * self.label_smoothing;
        let (straight, turned) = (self.of(h), self.of(-h));
        let loss = likely * straight.0 + (1.0 - likely) * turned.0;
        let slope = likely * straight.1 - (1.0 - likely) * turned.1;
        let length = tokens[0].max(1) as f64;
        PairLoss {
            loss: loss - self.sft * policy[0] / length,
            slopes: [slope / per[0] - self.sft / length, -slope / per[1]],
        }
    }

    /// The loss as a function of the margin, and its derivative.
    fn of(&self, h: f64) -> (f64, f64) {
        let beta = self.beta;
        match self.loss {
            DpoLoss::Sigmoid => (-log_sigmoid(beta * h), -beta * sigmoid(-beta * h)),
            DpoLoss::Ipo => {
                let off = h - 1.0 / (2.0 * beta);
                (off * off, 2.0 * off)
            }
            DpoLoss::Hinge if beta * h < 1.0 => (1.0 - beta * h, -beta),
            DpoLoss::Hinge => (0.0, 0.0),
        }
    }

    /// The implicit reward of a completion: β (ln π − ln π_ref).
    pub fn reward(&self, policy: f64, reference: f64) -> f64 {
        self.beta * (policy - reference)
    }
}

impl Reward {
    /// −ln σ(r₊ − r₋ − margin) + centering (r₊ + r₋)². `label` is the probability that the chosen
    /// completion is better.
    pub fn pair(&self, scores: [f64; 2], margin: Option<f64>, label: f64) -> PairLoss {
        let margin = margin.unwrap_or(self.margin);
        let [better, worse] = scores;
        let (z, turned) = (better - worse - margin, worse - better - margin);
        let loss = -label * log_sigmoid(z) - (1.0 - label) * log_sigmoid(turned);
        let slope = -label * sigmoid(-z) + (1.0 - label) * sigmoid(-turned);
        let sum = better + worse;
        let centre = 2.0 * self.centering * sum;
        PairLoss {
            loss: loss + self.centering * sum * sum,
            slopes: [slope + centre, -slope + centre],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares each derivative with a finite difference of the loss.
    fn check(at: [f64; 2], f: impl Fn([f64; 2]) -> PairLoss) {
        for which in 0..2 {
            let moved = |by: f64| {
                let mut to = at;
                to[which] += by;
                f(to).loss
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let slope = f(at).slopes[which];
            assert!((slope - difference).abs() < 1e-7, "{slope}, {difference}");
        }
    }

    #[test]
    fn slopes_are_those_of_the_losses() {
        for loss in [DpoLoss::Sigmoid, DpoLoss::Ipo, DpoLoss::Hinge] {
            for (label_smoothing, sft, label) in [(0.0, 0.0, 1.0), (0.2, 0.7, 1.0), (0.1, 0.0, 0.6)]
            {
                let dpo = Dpo { beta: 0.3, loss, label_smoothing, sft };
                for policy in [[-12.0, -9.0], [-3.0, -20.0]] {
                    check(policy, |policy| dpo.pair(policy, [-10.0, -11.0], [4, 7], label));
                }
            }
        }
        let reward = Reward { margin: 0.5, centering: 0.01 };
        for (margin, label) in [(None, 1.0), (Some(1.5), 0.7)] {
            check([0.3, -1.2], |scores| reward.pair(scores, margin, label));
        }
    }

    #[test]
    fn the_first_step_is_known() {
        let of = |loss| {
            let dpo = Dpo { loss, ..Dpo::default() };
            dpo.pair([-30.0, -7.0], [-30.0, -7.0], [5, 3], 1.0).loss
        };
        assert!((of(DpoLoss::Sigmoid) - 2f64.ln()).abs() < 1e-12);
        assert!((of(DpoLoss::Hinge) - 1.0).abs() < 1e-12);
        assert!((of(DpoLoss::Ipo) - 25.0).abs() < 1e-12);
    }

    #[test]
    fn smoothing_is_its_closed_form() {
        // −(1−ε) ln σ(β h) − ε ln σ(−β h), with h = 5, β = 0.1, ε = 0.1.
        let dpo = Dpo { label_smoothing: 0.1, ..Dpo::default() };
        let found = dpo.pair([-10.0, -12.0], [-12.0, -9.0], [3, 3], 1.0).loss;
        let (up, down) = ((1.0 + (-0.5f64).exp()).ln(), (1.0 + 0.5f64.exp()).ln());
        assert!((found - (0.9 * up + 0.1 * down)).abs() < 1e-12, "{found}");
        // A `label` of 1 − ε for one pair is equivalent to label smoothing by ε.
        let label = Dpo::default().pair([-10.0, -12.0], [-12.0, -9.0], [3, 3], 0.9);
        assert!((label.loss - found).abs() < 1e-12);
    }

    #[test]
    fn far_apart_is_no_overflow() {
        let dpo = Dpo::default();
        let far = dpo.pair([-9e4, 0.0], [0.0, 0.0], [1, 1], 1.0);
        assert!((far.loss - 9e3).abs() < 1e-6 && (far.slopes[0] + 0.1).abs() < 1e-12, "{far:?}");
        let near = dpo.pair([0.0, -9e4], [0.0, 0.0], [1, 1], 1.0);
        assert!(near.loss == 0.0 && near.slopes[0] == 0.0, "{near:?}");
    }
}
