//! Statistics of the report.

use crate::job::Rate;
use serde::Serialize;

const BINS: usize = 10;

/// How well the probabilities of a judge agree with people.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Calibration {
    /// Share of the pairs in which the judge prefers what people prefer.
    pub accuracy: Rate,
    /// Whether the interval of the accuracy includes one half or lies below.
    pub near_chance: bool,
    /// Share of the pairs whose better answer depends on the order.
    pub flips: Rate,
    /// Expected calibration error: the mean difference of confidence and accuracy over ten bins
    /// (Guo et al. 2017, arXiv:1706.04599).
    pub ece: f64,
    /// Mean squared error of the probabilities (Brier 1950).
    pub brier: f64,
    pub bins: Vec<Bin>,
}

/// Pairs of similar confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Bin {
    pub confidence: f64,
    pub accuracy: f64,
    pub count: usize,
}

impl Calibration {
    /// From the probability of each pair's better answer, and whether both orders agree.
    pub(super) fn of(pairs: &[(f64, bool)]) -> Option<Self> {
        let count = pairs.len();
        let correct = |p: f64| match p {
            0.5 => 0.5,
            p => f64::from(u8::from(p > 0.5)),
        };
        let accuracy = Rate::of(pairs.iter().map(|(p, _)| correct(*p)).sum(), count)?;
        let flipped = pairs.iter().filter(|(_, consistent)| !consistent).count();
        let mut bins = vec![(0.0, 0.0, 0usize); BINS];
        for &(p, _) in pairs {
            let confidence = p.max(1.0 - p);
            let at = ((confidence - 0.5) * 2.0 * BINS as f64) as usize;
            let bin = &mut bins[at.min(BINS - 1)];
            *bin = (bin.0 + confidence, bin.1 + correct(p), bin.2 + 1);
        }
        let bins: Vec<Bin> = bins
            .into_iter()
            .filter(|bin| bin.2 > 0)
            .map(|(confidence, accuracy, count)| {
                let n = count as f64;
                Bin { confidence: confidence / n, accuracy: accuracy / n, count }
            })
            .collect();
        let gap = |bin: &Bin| bin.count as f64 * (bin.confidence - bin.accuracy).abs();
        Some(Self {
            accuracy,
            near_chance: accuracy.low <= 0.5,
            flips: Rate::of(flipped as f64, count)?,
            ece: bins.iter().map(gap).sum::<f64>() / count as f64,
            brier: pairs.iter().map(|(p, _)| (1.0 - p).powi(2)).sum::<f64>() / count as f64,
            bins,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_wilsons() {
        // Newcombe 1998, Statistics in Medicine 17: 81 of 263 has the interval 0.2553 to 0.3662.
        let rate = Rate::of(81.0, 263).unwrap();
        assert!((rate.low - 0.2553).abs() < 1e-4 && (rate.high - 0.3662).abs() < 1e-4, "{rate:?}");
        let none = Rate::of(0.0, 20).unwrap();
        assert!(none.low == 0.0 && (none.high - 0.1611).abs() < 1e-4, "{none:?}");
        assert_eq!(Rate::of(0.0, 0), None);
    }

    #[test]
    fn a_calibration_compares_confidence_and_accuracy() {
        // Confident and right in nine of ten pairs.
        let mut pairs = vec![(0.9, true); 9];
        pairs.push((0.1, false));
        let found = Calibration::of(&pairs).unwrap();
        assert!((found.accuracy.value - 0.9).abs() < 1e-9);
        assert!(found.ece < 1e-9, "{found:?}");
        assert!((found.brier - (9.0 * 0.01 + 0.81) / 10.0).abs() < 1e-9);
        assert!((found.flips.value - 0.1).abs() < 1e-9);
        assert!(!found.near_chance);
        // Confident and right in half of the pairs.
        let pairs = [[(0.95, true); 10], [(0.05, true); 10]].concat();
        let found = Calibration::of(&pairs).unwrap();
        assert!((found.ece - 0.45).abs() < 1e-9 && found.near_chance, "{found:?}");
        assert_eq!(found.bins.len(), 1);
        // Undecided pairs are half right.
        assert_eq!(Calibration::of(&[(0.5, true)]).unwrap().accuracy.value, 0.5);
        assert_eq!(Calibration::of(&[]), None);
    }
}
