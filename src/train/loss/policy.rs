//! Policy-gradient losses of sampled completions and their rewards.
//!
//! The loss and gradients of a completion are sums over its tokens, or already their mean. Those of
//! a batch are the sums over its completions, divided by the sum of the completions' weights.

use crate::job::spec::{Correction, GrpoLoss, PolicyLoss, PpoLoss};

/// Bound on the difference of two log-probabilities, so that no ratio overflows.
const FARTHEST: f64 = 20.0;

/// A completion and what is known about its tokens from sampling; one number per token.
#[derive(Debug, Clone, Copy)]
pub struct Completion<'a> {
    pub advantage: f64,
    /// ln π by the trainer before the first update; `None` if there was no update since sampling.
    pub old: Option<&'a [f64]>,
    /// ln π by the engine at sampling; NaN where it is not known, which means no correction.
    pub engine: &'a [f64],
    /// ln π by the reference model; required if `beta` is not 0.
    pub reference: Option<&'a [f64]>,
}

/// The contribution of a completion to the loss of a batch, and its metrics as sums over tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    pub loss: f64,
    /// (tokens) gradient with respect to each token's ln π.
    pub slopes: Vec<f64>,
    /// Weight in the batch: loss and gradients are divided by the sum of all completions' weights.
    pub weight: f64,
    pub tokens: usize,
    /// Number of tokens whose ratio was clipped; they have no gradient.
    pub clipped: f64,
    /// KL divergence from the reference in nats (k3 estimator); 0 without a reference.
    pub kl: f64,
    /// |ln π_old − ln π_engine|.
    pub gap: f64,
    /// Importance-sampling weights of the correction.
    pub correction: f64,
}

/// Group-relative advantages: (r − mean) / (std + 1e-4), with n − 1 in std. A completion that could
/// not be graded has the reward NaN: it is excluded from mean and std, and its advantage is 0.
pub fn advantages(rewards: &[f64]) -> Vec<f64> {
    let graded: Vec<f64> = rewards.iter().copied().filter(|reward| !reward.is_nan()).collect();
    // Equal rewards may differ from their rounded mean.
    if graded.iter().all(|reward| *reward == graded[0]) {
        return vec![0.0; rewards.len()];
    }
    let count = graded.len() as f64;
    let mean = graded.iter().sum::<f64>() / count;
    let squares: f64 = graded.iter().map(|reward| (reward - mean).powi(2)).sum();
    let std = (squares / (count - 1.0)).sqrt();
    let of = |reward: &f64| if reward.is_nan() { 0.0 } else { (reward - mean) / (std + 1e-4) };
    rewards.iter().map(of).collect()
}

impl GrpoLoss {
    /// The loss of a completion as a function of its tokens' log-probabilities. A completion
    /// without tokens has a loss of 0, but counts in a mean over completions.
    ///
    /// The KL term is weighted neither by w nor by the ratio. TRL 1.16 weights it by the ratio by
    /// default (`use_bias_correction_kl`).
    pub fn completion(&self, policy: &[f64], completion: &Completion) -> Found {
        let Completion { advantage, old, engine, reference } = *completion;
        let tokens = policy.len();
        // Without an update since sampling, the old policy is the current one, and the ratio is
        // exactly 1.
        let old = old.unwrap_or(policy);
        assert!(old.len() == tokens && engine.len() == tokens, "one number a token");
        assert!(reference.is_none_or(|r| r.len() == tokens), "one number a token");
        assert!(reference.is_some() || self.beta == 0.0, "nothing to be held to");
        let weights = self.weights(old, engine);
        let (weight, per) = match self.loss {
            PolicyLoss::Dapo => (tokens as f64, 1.0),
            PolicyLoss::Grpo => (1.0, tokens.max(1) as f64),
        };
        let mut found = Found {
            loss: 0.0,
            slopes: Vec::with_capacity(tokens),
            weight,
            tokens,
            clipped: 0.0,
            kl: 0.0,
            gap: gaps(old, engine).map(f64::abs).sum(),
            correction: weights.iter().sum(),
        };
        let limits = [self.epsilon, self.epsilon_high.unwrap_or(self.epsilon)];
        for (token, (&policy, w)) in policy.iter().zip(weights).enumerate() {
            let step = surrogate(apart(policy, old[token]), advantage, limits);
            let kl = reference.map_or(Step::default(), |reference| k3(policy, reference[token]));
            found.loss += (w * step.loss + self.beta * kl.loss) / per;
            found.slopes.push((w * step.slope + self.beta * kl.slope) / per);
            found.clipped += f64::from(u8::from(step.clipped));
            found.kl += kl.loss;
        }
        found
    }

    /// The importance-sampling weight of each token.
    fn weights(&self, old: &[f64], engine: &[f64]) -> Vec<f64> {
        let (gaps, cap) = (gaps(old, engine), self.cap);
        let truncated = |log: f64| log.min(FARTHEST).exp().min(cap);
        let masked = |log: f64| {
            let w = log.min(FARTHEST).exp();
            if w > cap { 0.0 } else { w }
        };
        match self.correction {
            Correction::TokenTruncate => gaps.map(truncated).collect(),
            Correction::TokenMask => gaps.map(masked).collect(),
            Correction::SequenceTruncate => vec![truncated(gaps.sum()); old.len()],
            Correction::SequenceMask => vec![masked(gaps.sum()); old.len()],
        }
    }
}

/// The loss of a token and its derivative.
#[derive(Default)]
struct Step {
    loss: f64,
    slope: f64,
    clipped: bool,
}

/// The difference of two log-probabilities, clamped to ±[`FARTHEST`].
fn apart(one: f64, other: f64) -> f64 {
    (one - other).clamp(-FARTHEST, FARTHEST)
}

/// ln w of each token; 0 where the engine's log-probability is not known.
fn gaps(old: &[f64], engine: &[f64]) -> impl Iterator<Item = f64> {
    let gap =
        |(&old, &engine): (&f64, &f64)| if engine.is_nan() { 0.0 } else { apart(old, engine) };
    old.iter().zip(engine).map(gap)
}

/// −min(r A, clip(r) A) as a function of ln r, and its derivative by ln r. `limits` are the clip
/// ranges below and above 1 (Schulman et al. 2017, arXiv:1707.06347).
fn surrogate(log: f64, advantage: f64, limits: [f64; 2]) -> Step {
    let ratio = log.exp();
    let low = advantage < 0.0 && ratio < 1.0 - limits[0];
    let high = advantage > 0.0 && ratio > 1.0 + limits[1];
    if low || high {
        let limit = if low { 1.0 - limits[0] } else { 1.0 + limits[1] };
        return Step { loss: -limit * advantage, slope: 0.0, clipped: true };
    }
    Step { loss: -ratio * advantage, slope: -ratio * advantage, clipped: false }
}

/// exp(d) − d − 1 with d = ln π_ref − ln π, and its derivative by ln π: an estimate of KL(π ‖
/// π_ref) that is never negative (Schulman 2020, joschu.net/blog/kl-approx.html).
fn k3(policy: f64, reference: f64) -> Step {
    let log = apart(reference, policy);
    Step { loss: log.exp_m1() - log, slope: -log.exp_m1(), clipped: false }
}

/// A completion before the first update; one number per token.
#[derive(Debug, Clone, Copy)]
pub struct PpoCompletion<'a> {
    /// ln π.
    pub old: &'a [f64],
    pub old_values: &'a [f64],
    pub advantages: &'a [f64],
    pub returns: &'a [f64],
}

/// The contribution of a completion to the loss of a batch: sums over its tokens. All of them are
/// divided by the number of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct PpoFound {
    /// The policy loss plus `value_weight` times the value loss.
    pub loss: f64,
    pub policy_loss: f64,
    pub value_loss: f64,
    /// (tokens) gradient with respect to each token's ln π.
    pub policy_slopes: Vec<f64>,
    /// (tokens) gradient with respect to each token's value.
    pub value_slopes: Vec<f64>,
    /// Number of tokens.
    pub weight: f64,
    /// Number of tokens whose ratio was clipped, and (`value_clipped`) whose value was.
    pub clipped: f64,
    pub value_clipped: f64,
}

impl PpoLoss {
    /// The reward of each token: minus the KL penalty (k1 estimator), plus the score at the last
    /// token. TRL adds the score at the position after the last token where there is one, and has a
    /// value there.
    pub fn rewards(&self, score: f64, old: &[f64], reference: &[f64]) -> Vec<f64> {
        assert_eq!(old.len(), reference.len(), "one number a token");
        let cost = |(&old, &reference): (&f64, &f64)| -self.beta * apart(old, reference);
        let mut rewards: Vec<f64> = old.iter().zip(reference).map(cost).collect();
        if let Some(last) = rewards.last_mut() {
            *last += score;
        }
        rewards
    }

    /// Advantages and returns of a completion's tokens from their rewards and values (GAE). The
    /// value after the last token is 0.
    pub fn estimate(&self, rewards: &[f64], values: &[f64]) -> (Vec<f64>, Vec<f64>) {
        assert_eq!(rewards.len(), values.len(), "one number a token");
        let mut advantages = vec![0.0; rewards.len()];
        let (mut advantage, mut next) = (0.0, 0.0);
        for token in (0..rewards.len()).rev() {
            let error = rewards[token] + self.gamma * next - values[token];
            advantage = error + self.gamma * self.lambda * advantage;
            advantages[token] = advantage;
            next = values[token];
        }
        let returns = advantages.iter().zip(values).map(|(a, value)| a + value).collect();
        (advantages, returns)
    }

    /// Normalizes the advantages of all tokens of a batch to mean 0 and variance 1 (n − 1), if
    /// `whiten` is set.
    pub fn whiten(&self, batch: &mut [Vec<f64>]) {
        let all = || batch.iter().flatten();
        let count = all().count() as f64;
        if !self.whiten || count == 0.0 {
            return;
        }
        let mean = all().sum::<f64>() / count;
        let squares: f64 = all().map(|advantage| (advantage - mean).powi(2)).sum();
        let std = (squares / (count - 1.0).max(1.0) + 1e-8).sqrt();
        for advantage in batch.iter_mut().flatten() {
            *advantage = (*advantage - mean) / std;
        }
    }

    /// The loss of a completion as a function of its tokens' log-probabilities and values.
    pub fn completion(
        &self,
        policy: &[f64],
        values: &[f64],
        completion: &PpoCompletion,
    ) -> PpoFound {
        let PpoCompletion { old, old_values, advantages, returns } = *completion;
        let tokens = policy.len();
        let lengths = [values, old, old_values, advantages, returns].map(<[f64]>::len);
        assert_eq!(lengths, [tokens; 5], "one number a token");
        let mut found = PpoFound {
            loss: 0.0,
            policy_loss: 0.0,
            value_loss: 0.0,
            policy_slopes: Vec::with_capacity(tokens),
            value_slopes: Vec::with_capacity(tokens),
            weight: tokens as f64,
            clipped: 0.0,
            value_clipped: 0.0,
        };
        for token in 0..tokens {
            let log = apart(policy[token], old[token]);
            let step = surrogate(log, advantages[token], [self.epsilon; 2]);
            let value = self.value(values[token], old_values[token], returns[token]);
            found.policy_loss += step.loss;
            found.value_loss += value.loss;
            found.policy_slopes.push(step.slope);
            found.value_slopes.push(self.value_weight * value.slope);
            found.clipped += f64::from(u8::from(step.clipped));
            found.value_clipped += f64::from(u8::from(value.clipped));
        }
        found.loss = found.policy_loss + self.value_weight * found.value_loss;
        found
    }

    /// ½ max((v − R)², (clip(v) − R)²), and its derivative by v: moving far from the old value does
    /// not lower the loss.
    fn value(&self, value: f64, old: f64, target: f64) -> Step {
        let moved = (value - old).clamp(-self.value_clip, self.value_clip);
        let (off, cut) = (value - target, old + moved - target);
        // Compares differences, because a value that was not clipped may still change by rounding.
        if value - old != moved && cut * cut > off * off {
            return Step { loss: 0.5 * cut * cut, slope: 0.0, clipped: true };
        }
        Step { loss: 0.5 * off * off, slope: off, clipped: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Fixture {
        groups: Vec<Group>,
        grpo: Vec<GrpoBatch>,
        ppo_batches: Vec<PpoBatch>,
    }

    #[derive(Deserialize)]
    struct Group {
        rewards: Vec<Option<f64>>,
        advantages: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct GrpoBatch {
        policy: Vec<Vec<f64>>,
        old: Vec<Vec<f64>>,
        engine: Vec<Vec<f64>>,
        reference: Vec<Vec<f64>>,
        rewards: Vec<f64>,
        advantages: Vec<f64>,
        cases: Vec<GrpoCase>,
    }

    #[derive(Deserialize)]
    struct GrpoCase {
        settings: GrpoLoss,
        old: bool,
        loss: f64,
        slopes: Vec<Vec<f64>>,
        clipped: f64,
        kl: Option<f64>,
        gap: f64,
        weight: Option<f64>,
    }

    #[derive(Deserialize)]
    struct PpoBatch {
        settings: PpoLoss,
        scores: Vec<f64>,
        policy: Vec<Vec<f64>>,
        old: Vec<Vec<f64>>,
        reference: Vec<Vec<f64>>,
        old_values: Vec<Vec<f64>>,
        values: Vec<Vec<f64>>,
        rewards: Vec<Vec<f64>>,
        advantages: Vec<Vec<f64>>,
        returns: Vec<Vec<f64>>,
        whitened: Vec<Vec<f64>>,
        policy_slopes: Vec<Vec<f64>>,
        value_slopes: Vec<Vec<f64>>,
        loss: f64,
        policy_loss: f64,
        value_loss: f64,
        clipped: f64,
        value_clipped: f64,
    }

    fn fixture() -> Fixture {
        serde_json::from_str(include_str!("../../../tests/train/policy.json")).unwrap()
    }

    #[track_caller]
    fn same(found: f64, expected: f64) {
        let off = (found - expected).abs() / expected.abs().max(1e-3);
        assert!(off < 1e-6, "{found}, not {expected}");
    }

    #[track_caller]
    fn all_same(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            same(*found, *expected);
        }
    }

    const CORRECTIONS: [Correction; 4] = [
        Correction::TokenTruncate,
        Correction::TokenMask,
        Correction::SequenceTruncate,
        Correction::SequenceMask,
    ];

    /// Ratios on both sides of either limit, and an importance-sampling weight above the cap.
    const POLICY: [f64; 5] = [-1.0, -2.0, -0.5, -3.0, -1.5];
    const OLD: [f64; 5] = [-1.1, -1.2, -1.0, -2.95, -1.25];
    const ENGINE: [f64; 5] = [-1.0, -2.9, -0.8, -3.0, -1.2];
    const REFERENCE: [f64; 5] = [-0.7, -2.5, -0.5, -2.0, -1.6];

    /// Compares each derivative with a finite difference of the loss.
    fn check(at: &[f64], slopes: &[f64], loss: impl Fn(&[f64]) -> f64) {
        assert_eq!(at.len(), slopes.len());
        for (which, slope) in slopes.iter().enumerate() {
            let moved = |by: f64| {
                let mut to = at.to_vec();
                to[which] += by;
                loss(&to)
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - difference).abs() < 1e-7, "{which}: {slope}, {difference}");
        }
    }

    #[test]
    fn groups_are_compared_as_in_trl() {
        let fixture = fixture();
        assert_eq!((fixture.groups.len(), fixture.grpo.len()), (4, 2));
        for Group { rewards, advantages: expected } in &fixture.groups {
            let rewards: Vec<f64> = rewards.iter().map(|r| r.unwrap_or(f64::NAN)).collect();
            all_same(&advantages(&rewards), expected);
        }
        for batch in &fixture.grpo {
            all_same(&advantages(&batch.rewards), &batch.advantages);
        }
        // (1 − ½) / (√½ + 1e-4)
        let half = 0.5 / (0.5f64.sqrt() + 1e-4);
        all_same(&advantages(&[1.0, 0.0]), &[half, -half]);
        assert_eq!(advantages(&[0.1; 3]), [0.0; 3]);
        assert_eq!(advantages(&[0.7]), [0.0]);
        assert_eq!(advantages(&[f64::NAN, 0.7]), [0.0; 2]);
        assert!(advantages(&[]).is_empty());
    }

    #[test]
    fn grpo_is_as_in_trl() {
        for batch in &fixture().grpo {
            assert_eq!(batch.cases.len(), 64);
            for case in &batch.cases {
                let grpo = case.settings;
                let found: Vec<Found> = (0..batch.policy.len())
                    .map(|which| {
                        let completion = Completion {
                            advantage: batch.advantages[which],
                            old: case.old.then_some(&batch.old[which]),
                            engine: &batch.engine[which],
                            reference: (grpo.beta != 0.0).then_some(&batch.reference[which]),
                        };
                        grpo.completion(&batch.policy[which], &completion)
                    })
                    .collect();
                let sum = |of: fn(&Found) -> f64| found.iter().map(of).sum::<f64>();
                let (weight, tokens) = (sum(|f| f.weight), sum(|f| f.tokens as f64));
                same(sum(|f| f.loss) / weight, case.loss);
                for (found, expected) in found.iter().zip(&case.slopes) {
                    let slopes: Vec<f64> = found.slopes.iter().map(|x| x / weight).collect();
                    all_same(&slopes, expected);
                }
                same(sum(|f| f.clipped) / tokens, case.clipped);
                same(sum(|f| f.kl) / tokens, case.kl.unwrap_or(0.0));
                same(sum(|f| f.gap) / tokens, case.gap);
                if let Some(mean) = case.weight {
                    same(sum(|f| f.correction) / tokens, mean);
                }
            }
        }
    }

    #[test]
    fn slopes_are_those_of_grpo() {
        for loss in [PolicyLoss::Dapo, PolicyLoss::Grpo] {
            for correction in CORRECTIONS {
                for (epsilon_high, beta) in [(None, 0.0), (Some(0.8), 0.0), (None, 0.3)] {
                    let grpo =
                        GrpoLoss { loss, correction, epsilon_high, beta, ..GrpoLoss::default() };
                    for (advantage, old) in [(1.3, &OLD), (-0.7, &OLD), (-0.7, &POLICY)] {
                        let completion = Completion {
                            advantage,
                            old: Some(old),
                            engine: &ENGINE,
                            reference: Some(&REFERENCE),
                        };
                        let of = |policy: &[f64]| grpo.completion(policy, &completion);
                        let found = of(&POLICY);
                        check(&POLICY, &found.slopes, |policy| of(policy).loss);
                        // If nothing was updated, the old policy equals the policy.
                        if old == &POLICY {
                            let fresh = Completion { old: None, ..completion };
                            assert_eq!(grpo.completion(&POLICY, &fresh), found);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn limits_cut_the_ratio_off() {
        // Ratios 1.11, 0.45, 1.65, 0.95, 0.78.
        let of = |grpo: GrpoLoss, advantage| {
            let completion =
                Completion { advantage, old: Some(&OLD), engine: &OLD, reference: None };
            grpo.completion(&POLICY, &completion)
        };
        let up = of(GrpoLoss::default(), 2.0);
        let down = of(GrpoLoss::default(), -2.0);
        assert_eq!((up.clipped, down.clipped), (1.0, 2.0));
        let cut = |found: &Found| found.slopes.iter().map(|x| *x == 0.0).collect::<Vec<_>>();
        assert_eq!(cut(&up), [false, false, true, false, false]);
        assert_eq!(cut(&down), [false, true, false, false, true]);
        let ratio = |token: usize| (POLICY[token] - OLD[token]).exp();
        same(up.loss, -2.0 * (ratio(0) + ratio(1) + 1.2 + ratio(3) + ratio(4)));
        same(down.loss, 2.0 * (ratio(0) + 0.8 + ratio(2) + ratio(3) + 0.8));
        let higher = of(GrpoLoss { epsilon_high: Some(0.7), ..GrpoLoss::default() }, 2.0);
        assert_eq!(higher.clipped, 0.0);
        same(higher.slopes[2], -2.0 * ratio(2));
    }

    #[test]
    fn the_first_step_of_grpo_is_known() {
        // w: 1, 2.46, 1.35, 1, 0.74; together 2.46.
        let w = |token: usize| (POLICY[token] - ENGINE[token]).exp();
        for correction in CORRECTIONS {
            let grpo = GrpoLoss { correction, cap: 2.0, ..GrpoLoss::default() };
            let of = |engine: &[f64]| {
                let completion = Completion { advantage: 1.5, old: None, engine, reference: None };
                grpo.completion(&POLICY, &completion)
            };
            let rest = w(0) + w(2) + w(3) + w(4);
            let sum = match correction {
                Correction::TokenTruncate => rest + 2.0,
                Correction::TokenMask => rest,
                Correction::SequenceTruncate => 5.0 * 2.0,
                Correction::SequenceMask => 0.0,
            };
            let found = of(&ENGINE);
            same(found.loss, -1.5 * sum);
            same(found.correction, sum);
            same(found.slopes.iter().sum(), found.loss);
            same(found.gap, 0.0 + 0.9 + 0.3 + 0.0 + 0.3);
            assert_eq!((found.clipped, found.kl, found.weight), (0.0, 0.0, 5.0));
            let under = GrpoLoss { cap: 3.0, ..grpo }.weights(&POLICY, &ENGINE);
            if matches!(correction, Correction::SequenceTruncate | Correction::SequenceMask) {
                all_same(&under, &[0.9f64.exp(); 5]);
            } else {
                all_same(&under, &[0, 1, 2, 3, 4].map(w));
            }
            // Only weights above the cap are cut off.
            assert_eq!(GrpoLoss { cap: 1.0, ..grpo }.weights(&POLICY, &POLICY), [1.0; 5]);
            // The trainer's own log-probabilities need no correction: the loss is -A per token.
            assert_eq!(of(&POLICY).loss, -7.5);
            assert_eq!(of(&[f64::NAN; 5]), of(&POLICY));
        }
        let mean = GrpoLoss { loss: PolicyLoss::Grpo, ..GrpoLoss::default() };
        let completion =
            Completion { advantage: 1.5, old: None, engine: &POLICY, reference: Some(&POLICY) };
        let found = mean.completion(&POLICY, &completion);
        assert_eq!((found.loss, found.weight, found.kl), (-1.5, 1.0, 0.0));
        assert_eq!(found.slopes, [-0.3; 5]);
    }

    #[test]
    fn nothing_and_far_apart_are_no_trouble() {
        for loss in [PolicyLoss::Dapo, PolicyLoss::Grpo] {
            for correction in CORRECTIONS {
                let grpo = GrpoLoss { loss, correction, beta: 0.1, ..GrpoLoss::default() };
                let completion =
                    Completion { advantage: 1.0, old: None, engine: &[], reference: Some(&[]) };
                let found = grpo.completion(&[], &completion);
                assert_eq!((found.loss, found.tokens), (0.0, 0));
                assert_eq!(found.weight, if loss == PolicyLoss::Grpo { 1.0 } else { 0.0 });
                for (near, far) in [(0.0, -9e4), (-9e4, 0.0), (-1.0, f64::NEG_INFINITY)] {
                    for advantage in [-1.0, 1.0] {
                        let all = [far; 3];
                        let completion = Completion {
                            advantage,
                            old: Some(&all),
                            engine: &[near; 3],
                            reference: Some(&all),
                        };
                        let found = grpo.completion(&[near; 3], &completion);
                        assert!(found.loss.is_finite() && found.kl.is_finite(), "{found:?}");
                        assert!(found.slopes.iter().all(|slope| slope.is_finite()), "{found:?}");
                        let turned = Completion { old: None, engine: &all, ..completion };
                        assert!(grpo.completion(&[near; 3], &turned).loss.is_finite());
                    }
                }
            }
        }
        let ppo = PpoLoss::default();
        let nothing = PpoCompletion { old: &[], old_values: &[], advantages: &[], returns: &[] };
        assert_eq!(ppo.completion(&[], &[], &nothing).loss, 0.0);
        assert!(ppo.rewards(1.0, &[], &[]).is_empty() && ppo.estimate(&[], &[]).0.is_empty());
        ppo.whiten(&mut []);
        let mut one = [vec![3.0], vec![]];
        ppo.whiten(&mut one);
        assert_eq!(one[0], [0.0]);
        let one = PpoCompletion {
            old: &[-9e4],
            old_values: &[0.0],
            advantages: &[-1.0],
            returns: &[0.0],
        };
        assert!(ppo.completion(&[0.0], &[0.0], &one).loss.is_finite());
    }

    #[test]
    fn ppo_is_as_in_trl() {
        let batches = fixture().ppo_batches;
        assert_eq!(batches.len(), 2);
        for batch in &batches {
            let ppo = batch.settings;
            let mut whitened = Vec::new();
            for (which, score) in batch.scores.iter().enumerate() {
                let rewards = ppo.rewards(*score, &batch.old[which], &batch.reference[which]);
                all_same(&rewards, &batch.rewards[which]);
                let (advantages, returns) = ppo.estimate(&rewards, &batch.old_values[which]);
                all_same(&advantages, &batch.advantages[which]);
                all_same(&returns, &batch.returns[which]);
                whitened.push(advantages);
            }
            ppo.whiten(&mut whitened);
            let found: Vec<PpoFound> = (0..batch.scores.len())
                .map(|which| {
                    all_same(&whitened[which], &batch.whitened[which]);
                    let completion = PpoCompletion {
                        old: &batch.old[which],
                        old_values: &batch.old_values[which],
                        advantages: &whitened[which],
                        returns: &batch.returns[which],
                    };
                    ppo.completion(&batch.policy[which], &batch.values[which], &completion)
                })
                .collect();
            let weight: f64 = found.iter().map(|f| f.weight).sum();
            let mean = |of: fn(&PpoFound) -> f64| found.iter().map(of).sum::<f64>() / weight;
            same(mean(|f| f.loss), batch.loss);
            same(mean(|f| f.policy_loss), batch.policy_loss);
            same(mean(|f| f.value_loss), batch.value_loss);
            same(mean(|f| f.clipped), batch.clipped);
            same(mean(|f| f.value_clipped), batch.value_clipped);
            let scaled = |slopes: &[f64]| slopes.iter().map(|x| x / weight).collect::<Vec<_>>();
            for (which, found) in found.iter().enumerate() {
                all_same(&scaled(&found.policy_slopes), &batch.policy_slopes[which]);
                all_same(&scaled(&found.value_slopes), &batch.value_slopes[which]);
            }
        }
    }

    #[test]
    fn slopes_are_those_of_ppo() {
        let values = [0.3, -0.4, 1.0, 0.2, -0.9];
        let completion = PpoCompletion {
            old: &OLD,
            old_values: &[0.25, 0.1, 0.5, 0.2, -0.2],
            advantages: &[1.0, -0.5, 0.7, -2.0, 0.3],
            returns: &[1.0, -0.5, 0.0, -0.5, -1.0],
        };
        for (value_clip, clipped) in [(0.2, 2.0), (10.0, 0.0)] {
            let ppo = PpoLoss { value_clip, value_weight: 0.4, ..PpoLoss::default() };
            let found = ppo.completion(&POLICY, &values, &completion);
            assert_eq!((found.clipped, found.value_clipped), (2.0, clipped));
            check(&POLICY, &found.policy_slopes, |policy| {
                ppo.completion(policy, &values, &completion).loss
            });
            check(&values, &found.value_slopes, |values| {
                ppo.completion(&POLICY, values, &completion).loss
            });
        }
    }

    #[test]
    fn rewards_and_advantages_are_their_closed_forms() {
        let ppo = PpoLoss { beta: 0.1, ..PpoLoss::default() };
        all_same(&ppo.rewards(2.0, &[-1.0, -2.0], &[-1.5, -1.0]), &[-0.05, 2.1]);
        // λ = 1: the discounted sum of the remaining rewards, minus the value. λ = 0: the one-step
        // TD error.
        let (rewards, values) = ([0.5, -0.2, 1.0], [0.1, 0.4, 0.3]);
        let far = PpoLoss { lambda: 1.0, gamma: 0.5, ..ppo };
        let (advantages, returns) = far.estimate(&rewards, &values);
        all_same(&returns, &[0.5 - 0.1 + 0.25, -0.2 + 0.5, 1.0]);
        all_same(&advantages, &[0.55, -0.1, 0.7]);
        let near = PpoLoss { lambda: 0.0, gamma: 0.5, ..ppo };
        let (advantages, _) = near.estimate(&rewards, &values);
        all_same(&advantages, &[0.5 + 0.2 - 0.1, -0.2 + 0.15 - 0.4, 0.7]);
        // In the first step, whitened advantages sum to 0, and so does the loss.
        let mut batch = vec![vec![1.0, 2.0], vec![6.0]];
        PpoLoss { whiten: false, ..ppo }.whiten(&mut batch);
        assert_eq!(batch, [vec![1.0, 2.0], vec![6.0]]);
        ppo.whiten(&mut batch);
        let std = 7f64.sqrt();
        all_same(&batch.concat(), &[-2.0 / std, -1.0 / std, 3.0 / std]);
        let advantages = batch.concat();
        let (old, values) = ([-1.0, -2.0, -3.0], [0.5; 3]);
        let completion = PpoCompletion {
            old: &old,
            old_values: &values,
            advantages: &advantages,
            returns: &[0.0; 3],
        };
        let found = ppo.completion(&old, &values, &completion);
        assert!(found.policy_loss.abs() < 1e-12);
        same(found.loss, 0.1 * 3.0 * 0.5 * 0.25);
    }

    #[test]
    fn settings_are_read() {
        assert_eq!(serde_json::from_str::<GrpoLoss>("{}").unwrap(), GrpoLoss::default());
        assert_eq!(serde_json::from_str::<PpoLoss>("{}").unwrap(), PpoLoss::default());
        let text = r#"{"loss": "grpo", "correction": "sequence_mask", "epsilon_high": 0.28}"#;
        let grpo: GrpoLoss = serde_json::from_str(text).unwrap();
        assert_eq!((grpo.loss, grpo.epsilon_high), (PolicyLoss::Grpo, Some(0.28)));
        assert_eq!(grpo.correction, Correction::SequenceMask);
        assert!(serde_json::from_str::<GrpoLoss>(r#"{"delta": 1}"#).is_err());
        assert!(serde_json::from_str::<PpoLoss>(r#"{"epochs": 1}"#).is_err());
    }
}
