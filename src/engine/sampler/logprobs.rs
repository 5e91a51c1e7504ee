//! Log-probabilities of the model's own distribution, as OpenAI's `logprobs` reports them.

use super::{Scratch, numeric, select};
use crate::ipc::Token;

/// Reported in place of minus infinity, which JSON cannot say (OpenAI's own stand-in).
pub const LOGPROB_FLOOR: f32 = -9999.0;

/// Natural log-softmax of the raw logits at `chosen`, and the `k` most likely tokens with theirs,
/// most likely first, ties by lower id.
///
/// Call it before [`Sampler::sample`](super::Sampler::sample), which changes the logits. A token
/// that is impossible or outside the row has [`LOGPROB_FLOOR`]. Sums in `f64`; the result is
/// within about 1e-6 of exact.
pub fn logprobs(
    logits: &[f32],
    chosen: Token,
    k: usize,
    scratch: &mut Scratch,
) -> (f32, Vec<(Token, f32)>) {
    let max = numeric::max(logits);
    let log_sum = match max {
        max if max.is_finite() => f64::from(max) + numeric::weight(logits, max).ln(),
        // Infinite logits share everything; of minus infinity and NaN alone nothing is possible.
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
