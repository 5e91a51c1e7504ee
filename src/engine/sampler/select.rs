//! Selects the largest logits of a row without sorting it, and implements the stages on such lists.

use super::numeric::exp_nonpositive;
use crate::ipc::Token;

/// A token that has not been excluded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub id: Token,
    pub logit: f32,
    /// `exp(logit - max)`, not normalized.
    pub weight: f32,
    /// The sort key of the current stage, smallest first.
    key: f32,
}

impl Candidate {
    pub(super) fn new(id: Token, logit: f32, max: f32) -> Self {
        Self::weighed(id, logit, exp_nonpositive(logit - max))
    }

    /// Creates a candidate whose weight is already known.
    pub(super) fn weighed(id: Token, logit: f32, weight: f32) -> Self {
        Self { id, logit, weight, key: -logit }
    }
}

/// Packs a logit and its token so that a larger integer is a better candidate: a larger logit or,
/// among equals, a lower id.
fn pack(logit: f32, id: Token) -> u64 {
    // Adding zero turns -0.0 into 0.0. Then bits are flipped so that they sort like the numbers.
    let bits = (logit + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!id)
}

fn unpack(packed: u64) -> (f32, Token) {
    let ordered = (packed >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (f32::from_bits(bits), !(packed as u32))
}

/// The `m` largest logits, largest first, ties by lower id; fewer if fewer are above minus
/// infinity.
///
/// One pass with a rising threshold: a buffer of `2m` entries is reduced to its best `m` whenever
/// it is full, so the work is linear in the row in any order.
pub(super) fn top<'a>(
    logits: &[f32],
    m: usize,
    buffer: &'a mut Vec<u64>,
) -> impl ExactSizeIterator<Item = (f32, Token)> + use<'a> {
    const STRIDE: usize = 64;
    buffer.clear();
    if m > 0 {
        let capacity = m.saturating_mul(2).min(logits.len());
        let mut threshold = f32::NEG_INFINITY;
        for (i, chunk) in logits.chunks(STRIDE).enumerate() {
            // No early exit, so that the comparison vectorizes.
            if !chunk.iter().fold(false, |any, &x| any | (x > threshold)) {
                continue;
            }
            for (j, &x) in chunk.iter().enumerate() {
                if x > threshold {
                    buffer.push(pack(x, (i * STRIDE + j) as Token));
                }
            }
            if buffer.len() > m && buffer.len() >= capacity {
                let (_, worst, _) = buffer.select_nth_unstable_by(m - 1, |a, b| b.cmp(a));
                threshold = unpack(*worst).0;
                buffer.truncate(m);
            }
        }
        if buffer.len() > m {
            buffer.select_nth_unstable_by(m - 1, |a, b| b.cmp(a));
            buffer.truncate(m);
        }
        buffer.sort_unstable_by(|a, b| b.cmp(a));
    }
    buffer.iter().map(|&packed| unpack(packed))
}

/// Total weight of a list.
pub(super) fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

fn by_key(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    a.key.total_cmp(&b.key).then(a.id.cmp(&b.id))
}

/// Keeps the shortest prefix, in the order of keys, whose weight is at least `mass`; at least one
/// candidate. Linear time without a sort: a histogram of the keys finds the narrow range in which
/// the prefix ends, and selection by halves finds the end within that range.
fn keep_mass(candidates: &mut Vec<Candidate>, mass: f64) {
    const SORT_BELOW: usize = 128;
    let (mut start, mut end, mut need) = (0, candidates.len(), mass);
    if candidates.len() > BUCKETS {
        (start, end, need) = narrow(candidates, mass);
    }
    while end - start > SORT_BELOW {
        let half = (end - start) / 2;
        let window = &mut candidates[start..end];
        window.select_nth_unstable_by(half, by_key);
        let weight = total(&window[..half]);
        if weight >= need {
            end = start + half;
        } else {
            need -= weight;
            start += half;
        }
    }
    candidates[start..end].sort_unstable_by(by_key);
    let mut kept = start;
    while kept < end && (need > 0.0 || kept == 0) {
        need -= f64::from(candidates[kept].weight);
        kept += 1;
    }
    candidates.truncate(kept);
}

const BUCKETS: usize = 1024;

/// Moves the candidates before the bucket in which the prefix of weight `mass` ends to the front,
/// followed by that bucket's candidates. Returns the bucket's range and the mass still needed from
/// it.
fn narrow(candidates: &mut Vec<Candidate>, mass: f64) -> (usize, usize, f64) {
    let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
    for c in candidates.iter() {
        low = if c.key < low { c.key } else { low };
        high = if c.key > high { c.key } else { high };
    }
    let scale = (BUCKETS - 1) as f32 / (high - low).max(f32::MIN_POSITIVE);
    // The conversion saturates; sorted keys give sorted buckets.
    let bucket = |c: &Candidate| (((c.key - low) * scale) as usize).min(BUCKETS - 1);
    let mut weights = [0f64; BUCKETS];
    for c in candidates.iter() {
        weights[bucket(c)] += f64::from(c.weight);
    }
    let mut need = mass;
    let mut border = 0;
    while border < BUCKETS - 1 && weights[border] < need {
        need -= weights[border];
        border += 1;
    }
    candidates.retain(|c| bucket(c) <= border);
    let (mut start, mut i) = (0, 0);
    while i < candidates.len() {
        if bucket(&candidates[i]) < border {
            candidates.swap(start, i);
            start += 1;
        }
        i += 1;
    }
    (start, candidates.len(), need)
}

/// Nucleus sampling: keeps the fewest most probable tokens whose total probability reaches `p`
/// (Holtzman et al., arXiv:1904.09751).
pub(super) fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    for c in candidates.iter_mut() {
        c.key = -c.logit;
    }
    let mass = f64::from(p) * total(candidates);
    keep_mass(candidates, mass);
}

/// Locally typical sampling: keeps the fewest tokens with surprise nearest to the entropy whose
/// total probability reaches `p` (Meister et al., arXiv:2202.00666).
pub(super) fn typical_p(candidates: &mut Vec<Candidate>, p: f32, max: f32) {
    let sum = total(candidates);
    let log_sum = sum.ln();
    // A token's surprise is log_sum - (logit - max); the entropy is its mean.
    let mean: f64 = candidates
        .iter()
        .map(|c| f64::from(c.weight) * f64::from((c.logit - max).max(-87.0)))
        .sum::<f64>()
        / sum;
    let entropy = log_sum - mean;
    for c in candidates.iter_mut() {
        c.key = ((log_sum - f64::from(c.logit - max) - entropy).abs()) as f32;
    }
    keep_mass(candidates, f64::from(p) * sum);
}

/// Keeps tokens at least `p` times as probable as the most probable (Nguyen et al.,
/// arXiv:2407.01082).
pub(super) fn min_p(candidates: &mut Vec<Candidate>, p: f32) {
    let best = candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.logit));
    let floor = min_p_floor(best, p);
    candidates.retain(|c| c.logit >= floor);
}

/// The lowest logit that min-p keeps, for the largest logit `max`.
pub(super) fn min_p_floor(max: f32, p: f32) -> f32 {
    max + p.clamp(0.0, 1.0).ln()
}

/// "Exclude top choices": of the tokens with at least `threshold` probability, removes all but the
/// least probable (llama.cpp's `llama_sample_xtc_apply`; text-generation-webui#6335). Does not
/// change a list with fewer than two such tokens.
pub(super) fn xtc(candidates: &mut Vec<Candidate>, threshold: f32) {
    let floor = f64::from(threshold) * total(candidates);
    let above = |c: &Candidate| f64::from(c.weight) >= floor;
    let least = candidates
        .iter()
        .filter(|c| above(c))
        .max_by(|a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)))
        .map(|c| c.id);
    if let Some(least) = least {
        candidates.retain(|c| !above(c) || c.id == least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn packing_sorts_as_the_logits_do() {
        let mut values = [-f32::MAX, -1.5, -1e-30, 0.0, 1e-30, 2.0, f32::MAX];
        for pair in values.windows(2) {
            assert!(pack(pair[0], 0) < pack(pair[1], 9), "{pair:?}");
        }
        assert_eq!(pack(-0.0, 3), pack(0.0, 3));
        assert!(pack(1.0, 3) > pack(1.0, 4));
        values.reverse();
        for x in values {
            assert_eq!(unpack(pack(x, 77)), (x, 77));
        }
    }

    proptest! {
        #[test]
        fn top_equals_a_full_sort(
            logits in prop::collection::vec(
                prop_oneof![(-3i32..3).prop_map(|x| x as f32), -9.0f32..9.0, Just(f32::NAN),
                    Just(f32::NEG_INFINITY)], 0..600),
            m in 0usize..80,
        ) {
            let mut all: Vec<(f32, Token)> = logits.iter().zip(0..)
                .filter(|(x, _)| **x > f32::NEG_INFINITY).map(|(&x, i)| (x, i)).collect();
            all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
            all.truncate(m);
            let mut buffer = Vec::new();
            prop_assert_eq!(top(&logits, m, &mut buffer).collect::<Vec<_>>(), all);
        }

        #[test]
        fn keep_mass_equals_a_full_sort(
            logits in prop::collection::vec((-40i32..0).prop_map(|x| x as f32 * 0.25), 1..3000),
            p in 0.0f32..1.0,
        ) {
            let max = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let list: Vec<Candidate> = logits.iter().zip(0..)
                .map(|(&x, i)| Candidate::new(i, x, max)).collect();
            // Different summation orders round differently, so avoid a boundary.
            let mass = f64::from(p) * total(&list) + 1e-7;
            let mut sorted = list.clone();
            sorted.sort_by(by_key);
            let mut sum = 0.0;
            let kept = sorted.iter()
                .take_while(|c| { let go = sum < mass; sum += f64::from(c.weight); go })
                .count().max(1);
            let mut expected: Vec<Token> = sorted[..kept].iter().map(|c| c.id).collect();
            let mut fast = list;
            keep_mass(&mut fast, mass);
            let mut got: Vec<Token> = fast.iter().map(|c| c.id).collect();
            expected.sort();
            got.sort();
            prop_assert_eq!(got, expected);
        }
    }
}
