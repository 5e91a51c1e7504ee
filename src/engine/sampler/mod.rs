//! Samples the next token from a row of logits.
//!
//! The stages and their order are those of [`SamplingParams`], llama.cpp's default chain: bias,
//! grammar mask, penalties, DRY, top-k, typical-p, top-p, min-p, XTC, temperature, draw. The
//! truncating stages use the distribution at temperature 1; each renormalizes over the tokens that
//! the previous stage kept.
//!
//! No stage sorts the vocabulary, and no call allocates once its buffers have grown. A draw depends
//! only on the logits and on (seed, choice, position): the random number is a hash of these, and
//! the remaining tokens are always arranged in the order of their ids.

mod dry;
mod logprobs;
mod numeric;
mod penalties;
mod rng;
mod select;

#[cfg(test)]
mod tests;

pub use dry::{MAX_BREAKER_BYTES, MAX_BREAKER_TOKENS, overlapping_sequences};
pub use logprobs::{LOGPROB_FLOOR, logprobs};

use crate::ipc::{SamplingParams, Token};
use dry::{Dry, DryScratch};
use penalties::Penalties;
use rng::Stream;
use select::Candidate;

/// At or below this temperature sampling is greedy (vLLM's `_SAMPLING_EPS`).
const GREEDY_BELOW: f32 = 1e-5;
/// Longer candidate lists are written back into the row, where drawing needs no sort by id.
const SHORT_LIST: usize = 1024;

/// The reason why no token can be sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// Every logit is minus infinity or NaN, because of the model, the bias or the grammar's mask.
    #[error("no token is possible: all logits are masked or not a number")]
    NoToken,
}

/// Scratch buffers that samplers share: one per sampling thread.
#[derive(Debug, Default)]
pub struct Scratch {
    keys: Vec<u64>,
    candidates: Vec<Candidate>,
    blocks: Vec<f64>,
    dry: DryScratch,
}

/// The sampling state of one choice of one request.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f32,
    top_k: usize,
    typical_p: f32,
    top_p: f32,
    min_p: f32,
    xtc_probability: f32,
    xtc_threshold: f32,
    seed: u64,
    choice: u32,
    bias: Vec<(Token, f32)>,
    penalties: Penalties,
    dry: Option<Dry>,
    /// The newest tokens of prompt and output; at least as many as the penalties look back on.
    history: Vec<Token>,
    lookback: usize,
}

impl Sampler {
    /// Creates a sampler. `choice` is the index among the request's `n`; biases of tokens at or
    /// above `vocab_size` are dropped. `breakers` maps the text of a DRY sequence breaker to the
    /// token sequences that represent it (see [`overlapping_sequences`]); it is called only if DRY
    /// is on.
    ///
    /// Values outside their range are replaced by the neutral value: the gateway has rejected them
    /// before.
    pub fn new(
        params: &SamplingParams,
        choice: u32,
        vocab_size: usize,
        breakers: &dyn Fn(&str) -> Vec<Vec<Token>>,
    ) -> Self {
        let or = |x: f32, neutral: f32| if x.is_nan() { neutral } else { x };
        let penalties = Penalties::new(params);
        let dry = Dry::new(params, breakers);
        let lookback = penalties.lookback().max(dry.as_ref().map_or(0, Dry::lookback));
        let in_vocabulary = |&(token, _): &(Token, f32)| (token as usize) < vocab_size;
        Self {
            temperature: or(params.temperature, 1.0),
            top_k: params.top_k as usize,
            typical_p: or(params.typical_p, 1.0),
            top_p: or(params.top_p, 1.0),
            min_p: or(params.min_p, 0.0).min(1.0),
            xtc_probability: or(params.xtc_probability, 0.0),
            // With zero, only the least likely of all tokens would remain.
            xtc_threshold: or(params.xtc_threshold, 1.0).max(f32::MIN_POSITIVE),
            seed: params.seed,
            choice,
            bias: params.logit_bias.iter().copied().filter(in_vocabulary).collect(),
            penalties,
            dry,
            history: Vec::new(),
            lookback,
        }
    }

    /// Records the prompt. Call once, before sampling. Presence and frequency penalties count only
    /// the output; the repetition penalty and DRY also use the prompt.
    pub fn accept_prompt(&mut self, tokens: &[Token]) {
        for &token in tokens {
            self.remember(token, false);
        }
    }

    /// Records a token of the output. Call for every output token, in order.
    pub fn accept(&mut self, token: Token) {
        self.remember(token, true);
    }

    fn remember(&mut self, token: Token, is_output: bool) {
        self.penalties.accept(token, &self.history, is_output);
        if self.lookback == 0 {
            return;
        }
        // Trimmed to half occasionally, so that the newest tokens are always one slice.
        if self.history.len() >= self.lookback.saturating_mul(2).saturating_add(1024) {
            let old = self.history.len() - self.lookback;
            self.history.drain(..old);
        }
        self.history.push(token);
    }

    /// Samples the token at `position` of the sequence. Modifies `logits`: excluded tokens may be
    /// minus infinity afterwards.
    ///
    /// `mask` has one bit per token, low bits first; tokens beyond its end are forbidden. NaN
    /// counts as minus infinity; plus infinity always wins. The token is not recorded: call
    /// [`accept`](Self::accept) with the token that the sequence continues with.
    ///
    /// # Errors
    /// [`SampleError::NoToken`] if no logit is above minus infinity.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        mask: Option<&[u32]>,
        position: u64,
        scratch: &mut Scratch,
    ) -> Result<Token, SampleError> {
        penalties::apply_bias(logits, &self.bias);
        if let Some(mask) = mask {
            numeric::apply_mask(logits, mask);
        }
        self.penalties.apply(logits);
        if let Some(dry) = &self.dry {
            dry.apply(logits, &self.history, &mut scratch.dry);
        }
        if self.temperature < GREEDY_BELOW || self.top_k == 1 {
            return numeric::argmax(logits).map(|id| id as Token).ok_or(SampleError::NoToken);
        }
        let max = numeric::max(logits);
        if !max.is_finite() {
            return numeric::argmax(logits).map(|id| id as Token).ok_or(SampleError::NoToken);
        }
        let u = rng::uniform(self.seed, self.choice, position, Stream::Token);
        let cuts = self.cuts(logits.len(), position);
        if !cuts.any() {
            let scale = self.temperature.recip();
            return Ok(numeric::draw(logits, max, scale, u, &mut scratch.blocks) as Token);
        }
        self.cut(logits, max, &cuts, scratch);
        Ok(self.draw_candidate(logits, u, scratch))
    }

    /// The truncating stages that are active at this position.
    fn cuts(&self, vocab_size: usize, position: u64) -> Cuts {
        // As in llama.cpp: above one half at most one token can qualify, so XTC would have no
        // effect.
        let xtc = self.xtc_probability > 0.0
            && self.xtc_threshold <= 0.5
            && rng::uniform(self.seed, self.choice, position, Stream::Xtc)
                < f64::from(self.xtc_probability);
        Cuts {
            top_k: self.top_k > 0 && self.top_k < vocab_size,
            typical: self.typical_p < 1.0,
            top_p: self.top_p < 1.0,
            min_p: self.min_p > 0.0,
            xtc,
        }
    }

    /// Fills `scratch.candidates` with the tokens that the truncating stages keep, in any order.
    fn cut(&self, logits: &[f32], max: f32, cuts: &Cuts, scratch: &mut Scratch) {
        let list = &mut scratch.candidates;
        list.clear();
        let mut nucleus_done = false;
        if cuts.top_k {
            list.extend(
                select::top(logits, self.top_k, &mut scratch.keys)
                    .map(|(logit, id)| Candidate::new(id, logit, max)),
            );
        } else if cuts.top_p && !cuts.typical {
            nucleus_done = self.nucleus(logits, max, cuts, &mut scratch.keys, list);
        } else {
            let floor = match cuts {
                // Min-p without typical-p depends only on the ratio to the most probable token.
                Cuts { min_p: true, typical: false, .. } => select::min_p_floor(max, self.min_p),
                _ => f32::NEG_INFINITY,
            };
            collect_above(logits, floor, max, list);
        }
        if cuts.typical {
            select::typical_p(list, self.typical_p, max);
        }
        if cuts.top_p && !nucleus_done {
            select::top_p(list, self.top_p);
        }
        if cuts.min_p {
            select::min_p(list, self.min_p);
        }
        if cuts.xtc {
            select::xtc(list, self.xtc_threshold);
        }
    }

    /// Top-p over the whole row: tries the most probable tokens first, which are nearly always
    /// enough, then more. If top-p does not end within these, the list becomes the whole row
    /// (except tokens that min-p excludes) and the function returns false: top-p still has to be
    /// applied.
    fn nucleus(
        &self,
        logits: &[f32],
        max: f32,
        cuts: &Cuts,
        keys: &mut Vec<u64>,
        list: &mut Vec<Candidate>,
    ) -> bool {
        let mass = f64::from(self.top_p) * numeric::weight(logits, max);
        // If min-p ends the sorted list before top-p does, the remaining tokens are not needed.
        let floor =
            if cuts.min_p { select::min_p_floor(max, self.min_p) } else { f32::NEG_INFINITY };
        for size in [256, 4096] {
            if size >= logits.len() {
                break;
            }
            list.clear();
            let mut sum = 0f64;
            for (logit, id) in select::top(logits, size, keys) {
                if logit < floor {
                    return true;
                }
                let candidate = Candidate::new(id, logit, max);
                sum += f64::from(candidate.weight);
                list.push(candidate);
                if sum >= mass {
                    return true;
                }
            }
        }
        list.clear();
        collect_above(logits, f32::NEG_INFINITY, max, list);
        false
    }

    /// Draws from the candidates at the sampler's temperature, in the order of ids.
    fn draw_candidate(&self, logits: &mut [f32], u: f64, scratch: &mut Scratch) -> Token {
        let list = &mut scratch.candidates;
        let scale = self.temperature.recip();
        let max = list.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.logit));
        if list.len() > SHORT_LIST {
            logits.fill(f32::NEG_INFINITY);
            for c in list.iter() {
                logits[c.id as usize] = c.logit;
            }
            return numeric::draw(logits, max, scale, u, &mut scratch.blocks) as Token;
        }
        list.sort_unstable_by_key(|c| c.id);
        let mut sum = 0f64;
        for c in list.iter_mut() {
            c.weight = numeric::exp_nonpositive((c.logit - max) * scale);
            sum += f64::from(c.weight);
        }
        let target = u * sum;
        let mut cumulative = 0f64;
        let mut last = list[0].id;
        for c in list.iter().filter(|c| c.weight > 0.0) {
            cumulative += f64::from(c.weight);
            last = c.id;
            if cumulative > target {
                break;
            }
        }
        last
    }
}

/// The truncating stages that are active for one draw.
struct Cuts {
    top_k: bool,
    typical: bool,
    top_p: bool,
    min_p: bool,
    xtc: bool,
}

impl Cuts {
    fn any(&self) -> bool {
        self.top_k || self.typical || self.top_p || self.min_p || self.xtc
    }
}

/// Collects every token at or above `floor` whose weight is not zero.
fn collect_above(logits: &[f32], floor: f32, max: f32, list: &mut Vec<Candidate>) {
    const STRIDE: usize = 64;
    // e^-87 is near the smallest normal `f32`.
    let floor = floor.max(max - 87.0);
    for (i, chunk) in logits.chunks(STRIDE).enumerate() {
        if !chunk.iter().fold(false, |any, &x| any | (x >= floor)) {
            continue;
        }
        // All exponentials of the chunk are computed together: that vectorizes, single ones do not.
        let mut weights = [0f32; STRIDE];
        for (weight, &logit) in weights.iter_mut().zip(chunk) {
            *weight = numeric::exp_nonpositive(logit - max);
        }
        let all = chunk.iter().zip(weights).zip((i * STRIDE) as Token..);
        let above = all.filter(|((logit, _), _)| **logit >= floor);
        list.extend(above.map(|((&logit, weight), id)| Candidate::weighed(id, logit, weight)));
    }
}
