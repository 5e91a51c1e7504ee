//! Intervals and quantiles.

use crate::job::Interval;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Number of samples from which an interval is read.
const RESAMPLES: usize = 1_000;

/// The ratio of two sums over chunks, by `map`, with its 95% interval: the chunks are drawn with
/// replacement (percentile bootstrap; Efron 1979). The draws are the same in every run.
pub(super) fn bootstrap(chunks: &[(f64, f64)], map: impl Fn(f64) -> f64) -> Interval {
    let ratio = |each: &mut dyn Iterator<Item = usize>| {
        let (sum, count) =
            each.fold((0.0, 0.0), |(sum, count), at| (sum + chunks[at].0, count + chunks[at].1));
        map(sum / count)
    };
    let mut rng = StdRng::seed_from_u64(0);
    let mut resampled: Vec<f64> = (0..RESAMPLES)
        .map(|_| ratio(&mut (0..chunks.len()).map(|_| rng.random_range(0..chunks.len()))))
        .collect();
    resampled.sort_by(f64::total_cmp);
    let value = ratio(&mut (0..chunks.len()));
    Interval { value, low: quantile(&resampled, 0.025), high: quantile(&resampled, 0.975) }
}

/// The quantile of sorted values, interpolated between neighbours as by llama-perplexity.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, part) = (place as usize, place.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] * (1.0 - part) + sorted[above] * part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let values = [0.0, 1.0, 2.0, 4.0];
        for (share, right) in [(0.0, 0.0), (0.5, 1.5), (0.75, 2.5), (1.0, 4.0)] {
            assert!((quantile(&values, share) - right).abs() < 1e-12, "{share}");
        }
        assert_eq!(quantile(&[3.0], 0.99), 3.0);
    }

    #[test]
    fn an_interval_holds_the_mean_of_most_samples() {
        // The mean of 40 chunks of a uniform variable has the standard deviation 0.29 / √40.
        let mut rng = StdRng::seed_from_u64(1);
        let mut hits = 0;
        for _ in 0..200 {
            let chunks: Vec<_> = (0..40).map(|_| (10.0 * rng.random::<f64>(), 10.0)).collect();
            let Interval { value, low, high } = bootstrap(&chunks, |mean| mean);
            assert!(low < value && value < high);
            assert!((high - low - 2.0 * 1.96 * 0.2887 / 40f64.sqrt()).abs() < 0.08, "{low} {high}");
            hits += usize::from(low < 0.5 && 0.5 < high);
        }
        assert!((178..=200).contains(&hits), "{hits} of 200");
        let same = bootstrap(&[(2.0, 1.0); 3], f64::exp);
        assert_eq!((same.low, same.high), (same.value, same.value));
    }
}
