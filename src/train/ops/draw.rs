//! Random numbers of dropout, determined by a key and the position.

use super::Number;
use rayon::prelude::*;

/// Numbers that a thread processes at a time.
const CHUNK: usize = 1 << 14;
/// Numbers that one random draw decides about.
const LANES: usize = 4;
/// Exclusive upper bound of the random number of a lane.
const RANGE: f64 = 65_536.0;

/// Which numbers are dropped: determined by a key and the position, so that a layer that is
/// recomputed drops the same numbers, on any thread.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    pub key: u64,
    /// Dropout rate, below 1, in multiples of 1/65,536.
    pub rate: f64,
}

impl Draw {
    /// Numbers whose draw is below this bound are dropped.
    fn bound(self) -> u32 {
        (self.rate * RANGE).round().min(RANGE - 1.0) as u32
    }

    /// Multiplies numbers, the first of which is at position `from`, a multiple of [`LANES`], by
    /// zero or by the factor that preserves the mean.
    fn apply<T: Number>(self, from: usize, x: &[T], out: &mut [T]) {
        let bound = self.bound();
        let kept = T::of(RANGE / (RANGE - f64::from(bound)));
        let all = x.chunks(LANES).zip(out.chunks_mut(LANES));
        for (at, (x, out)) in (from / LANES..).zip(all) {
            let bits = mixed(self.key, at as u64);
            for (lane, (x, out)) in x.iter().zip(out).enumerate() {
                let draw = (bits >> (16 * lane)) as u16;
                *out = if u32::from(draw) < bound { T::ZERO } else { *x * kept };
            }
        }
    }

    pub(super) fn applied<T: Number>(self, x: &[T]) -> Vec<T> {
        let mut out = vec![T::ZERO; x.len()];
        let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate();
        chunks.for_each(|(chunk, (out, x))| self.apply(chunk * CHUNK, x, out));
        out
    }
}

/// Number `at` of the sequence with seed `key` (SplitMix64; Steele et al. 2014,
/// doi:10.1145/2660193.2660195).
pub fn mixed(key: u64, at: u64) -> u64 {
    let mut z = key.wrapping_add(at.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The dropped fraction is the rate, other keys drop other numbers, and the mean is preserved.
    #[test]
    fn a_share_is_dropped() {
        let x = vec![1f64; 100_003];
        for rate in [0.0, 0.1, 0.5, 0.9] {
            let out = Draw { key: 7, rate }.applied(&x);
            let dropped = out.iter().filter(|x| **x == 0.0).count() as f64 / x.len() as f64;
            assert!((dropped - rate).abs() < 0.006, "{rate}: {dropped}");
            let mean = out.iter().sum::<f64>() / x.len() as f64;
            assert!((mean - 1.0).abs() < 0.03, "{rate}: {mean}");
            let other = Draw { key: 8, rate }.applied(&x);
            assert_eq!(other == out, rate == 0.0);
        }
    }

    /// Neighbouring positions, and the same positions under neighbouring keys, are independent.
    #[test]
    fn draws_are_independent() {
        let x = vec![1f64; 1 << 16];
        let dropped = |key: u64| Draw { key, rate: 0.5 }.applied(&x);
        let a = dropped(1);
        let both = |b: &[f64]| {
            let both = a.iter().zip(b).filter(|(a, b)| **a == 0.0 && **b == 0.0).count();
            both as f64 / a.len() as f64
        };
        for b in [&dropped(2)[..], &a[1..], &a[4..]] {
            assert!((both(b) - 0.25).abs() < 0.01, "{}", both(b));
        }
    }
}
