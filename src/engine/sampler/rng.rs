//! A counter-based random number generator without state: a number depends only on its key.

/// Independent random streams of one position, so that a draw in one stage does not change
/// another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// The draw of the token itself.
    Token = 1,
    /// Whether XTC acts at this position.
    Xtc = 2,
}

/// SplitMix64's finalizer (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
/// OOPSLA 2014): a bijection in which every input bit flips every output bit about half the time.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Uniform in `[0, 1)` with 53 random bits, a pure function of the four keys.
///
/// Each key is mixed in before the next one is added, so that (seed 1, position 0) and (seed 0,
/// position 1) are unrelated.
pub(super) fn uniform(seed: u64, choice: u32, position: u64, stream: Stream) -> f64 {
    let mut x = mix(seed);
    x = mix(x ^ u64::from(choice));
    x = mix(x ^ position);
    x = mix(x ^ stream as u64);
    (x >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_uniform_over_every_key() {
        // Chi-square over 64 bins for consecutive values of each key; 99.9th percentile is 103.4.
        let keys: [fn(u64) -> f64; 4] = [
            |i| uniform(i, 0, 0, Stream::Token),
            |i| uniform(7, i as u32, 0, Stream::Token),
            |i| uniform(7, 3, i, Stream::Token),
            |i| uniform(7, 3, i, Stream::Xtc),
        ];
        for key in keys {
            let mut bins = [0f64; 64];
            let n = 64_000;
            for i in 0..n {
                let u = key(i);
                assert!((0.0..1.0).contains(&u));
                bins[(u * 64.0) as usize] += 1.0;
            }
            let expected = n as f64 / 64.0;
            let chi: f64 = bins.iter().map(|b| (b - expected).powi(2) / expected).sum();
            assert!(chi < 110.0, "chi-square {chi}");
        }
    }

    #[test]
    fn keys_do_not_alias() {
        let a = uniform(1, 0, 0, Stream::Token);
        assert_ne!(a, uniform(0, 1, 0, Stream::Token));
        assert_ne!(a, uniform(0, 0, 1, Stream::Token));
        assert_ne!(a, uniform(1, 0, 0, Stream::Xtc));
    }
}
