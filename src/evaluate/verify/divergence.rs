//! Comparisons of rows of logits, with sums in f64.

use crate::ipc::Token;

/// The reference's prediction for one row, and its likelihood of the text so far.
#[derive(Debug, Default)]
pub(super) struct Reference {
    /// (vocabulary) log p: the logits minus the logarithm of the sum of their exponentials.
    log_p: Vec<f64>,
    /// (vocabulary) p.
    p: Vec<f64>,
    best: usize,
    pub likelihood: Likelihood,
}

/// Log likelihood of the tokens of the text.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Likelihood {
    sum: f64,
    count: usize,
}

impl Likelihood {
    fn add(&mut self, log_p: f64) {
        self.sum += log_p;
        self.count += 1;
    }

    /// e to the power of the mean negative log likelihood.
    pub(super) fn perplexity(&self) -> f64 {
        (-self.sum / self.count.max(1) as f64).exp()
    }
}

impl Reference {
    /// Reads a row and the token that follows it in the text. Returns `None` if a logit is not
    /// finite.
    pub(super) fn read(&mut self, logits: &[f32], target: Option<Token>) -> Option<()> {
        let (best, total) = log_sum_exp(logits)?;
        self.best = best;
        self.log_p.clear();
        self.log_p.extend(logits.iter().map(|&x| f64::from(x) - total));
        self.p.clear();
        self.p.extend(self.log_p.iter().map(|log_p| log_p.exp()));
        if let Some(&log_p) = target.and_then(|token| self.log_p.get(token as usize)) {
            self.likelihood.add(log_p);
        }
        Some(())
    }
}

/// The distance of a runner from the reference.
#[derive(Debug, Default)]
pub(super) struct Divergence {
    /// (rows) KL(reference || runner) in nats: the expectation under p of log p - log q.
    pub kl: Vec<f64>,
    /// Number of rows whose most probable token is also the reference's.
    pub same_best: usize,
    pub likelihood: Likelihood,
}

impl Divergence {
    /// Adds the row that the reference has just read. Returns `None` if a logit is not finite.
    pub(super) fn add(
        &mut self,
        reference: &Reference,
        logits: &[f32],
        target: Option<Token>,
    ) -> Option<()> {
        let (best, total) = log_sum_exp(logits)?;
        let terms = reference.p.iter().zip(&reference.log_p).zip(logits);
        // Not negative, except for rounding.
        self.kl.push(terms.map(|((p, log_p), &x)| p * (log_p - (f64::from(x) - total))).sum());
        self.same_best += usize::from(best == reference.best);
        if let Some(&x) = target.and_then(|token| logits.get(token as usize)) {
            self.likelihood.add(f64::from(x) - total);
        }
        Some(())
    }

    pub(super) fn mean(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.kl.len().max(1) as f64
    }

    /// The quantile by nearest rank: the smallest value that at least this share of the rows does
    /// not exceed.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.kl.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
    }
}

/// The index of the largest logit (the first, if several are equal), and the logarithm of the sum
/// of all exponentials. `None` if a logit is not finite: a comparison would then be meaningless.
fn log_sum_exp(logits: &[f32]) -> Option<(usize, f64)> {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (at, &x) in logits.iter().enumerate() {
        if !x.is_finite() {
            return None;
        }
        if x > largest {
            (best, largest) = (at, x);
        }
    }
    let largest = f64::from(largest);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
    Some((best, largest + sum.ln()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(p: &[f64]) -> Vec<f32> {
        // Adding a constant to all logits does not change the distribution.
        p.iter().map(|p| (p.ln() + 3.0) as f32).collect()
    }

    #[test]
    fn sums_are_those_of_the_definitions() {
        let (mut reference, mut divergence) = (Reference::default(), Divergence::default());
        let rows = [
            ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], Some(0)),
            ([0.7, 0.2, 0.1], [0.7, 0.2, 0.1], Some(2)),
            ([0.7, 0.2, 0.1], [0.6, 0.3, 0.1], None),
        ];
        for (p, q, target) in rows {
            reference.read(&logits(&p), target).unwrap();
            divergence.add(&reference, &logits(&q), target).unwrap();
        }
        let kl = [0.25 * 2f64.ln(), 0.0, 0.7 * (7f64 / 6.0).ln() + 0.2 * (2f64 / 3.0).ln()];
        for (got, right) in divergence.kl.iter().zip(kl) {
            assert!((got - right).abs() < 1e-6, "{got}, not {right}");
        }
        assert_eq!(divergence.same_best, 2);
        assert!((divergence.quantile(1.0) - kl[0]).abs() < 1e-6);
        assert!((divergence.quantile(0.5) - kl[2]).abs() < 1e-6);
        assert!((divergence.mean() - kl.iter().sum::<f64>() / 3.0).abs() < 1e-6);
        let perplexity = |a: f64, b: f64| 1.0 / (a * b).sqrt();
        assert!((reference.likelihood.perplexity() - perplexity(0.5, 0.1)).abs() < 1e-5);
        assert!((divergence.likelihood.perplexity() - perplexity(0.25, 0.1)).abs() < 1e-5);
    }

    #[test]
    fn what_is_no_number_is_noticed() {
        let mut reference = Reference::default();
        assert!(reference.read(&[0.0, f32::NAN], None).is_none());
        assert!(reference.read(&[0.0, f32::INFINITY], None).is_none());
        reference.read(&[0.0, 1.0], None).unwrap();
        assert!(Divergence::default().add(&reference, &[f32::NAN, 0.0], None).is_none());
    }
}
