//! Log-probabilities of the model's own distribution, as OpenAI's `logprobs` reports them.

use super::{Scratch, numeric, select};
use crate::ipc::Token;

/// Reported instead of minus infinity, which JSON cannot represent (OpenAI uses the same value).
pub const LOGPROB_FLOOR: f32 = -9999.0;

/// Returns the natural log-softmax of the raw logits at `chosen`, and the `k` most probable tokens
/// with their logprobs, most probable first, ties by lower id.
///
/// Call it before [`Sampler::sample`](super::Sampler::sample), which modifies the logits. A token
/// that is impossible or outside the row gets [`LOGPROB_FLOOR`]. Sums are in `f64`; the result is
/// within about 1e-6 of the exact value.
pub fn logprobs(
    logits: &[f32],
    chosen: Token,
    k: usize,
    scratch: &mut Scratch,
) -> (f32, Vec<(Token, f32)>) {
    let max = numeric::max(logits);
    let log_sum = match max {
        max if max.is_finite() => f64::from(max) + numeric::weight(logits, max).ln(),
        // Infinite logits share the whole probability; a row of only minus infinity and NaN allows
        // no token.
        max => f64::from(max),
    };
    let certain = -(logits.iter().filter(|&&x| x == f32::INFINITY).count().max(1) as f32).ln();
    let logprob = |x: f32| match x {
        f32::INFINITY => certain,
        x => ((f64::from(x) - log_sum) as f32).max(LOGPROB_FLOOR),
    };
    let most_likely = select::top(logits, k.min(logits.len()), &mut scratch.keys)
        .map(|(logit, id)| (id, logprob(logit)))
        .collect();
    let chosen = logits.get(chosen as usize).map_or(LOGPROB_FLOOR, |&x| logprob(x));
    (chosen, most_likely)
}
