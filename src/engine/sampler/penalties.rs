//! Logit bias, and the penalties on tokens that have already occurred.
//!
//! The penalties count occurrences in two ways, as in vLLM and llama.cpp:
//! - *repetition* (Keskar et al., "CTRL", arXiv:1909.05858, with llama.cpp's fix of multiplying
//!   negative logits) counts prompt and output, at most `penalty_window` tokens back;
//! - *presence* and *frequency* are OpenAI's: they count the whole output and nothing else.

use crate::ipc::{SamplingParams, Token};
use std::collections::HashMap;

/// Number of occurrences of one token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    /// In prompt and output, within the window.
    window: u32,
    /// In the output, since its beginning.
    output: u32,
}

/// The logit penalties of one sequence; stores nothing if all of them are neutral.
#[derive(Debug, Clone)]
pub(super) struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    /// Number of tokens that repetition looks back on; `usize::MAX` for all.
    window: usize,
    counts: HashMap<Token, Count>,
}

impl Penalties {
    /// Invalid values (NaN, a repetition penalty of zero or less) count as neutral.
    pub(super) fn new(params: &SamplingParams) -> Self {
        let sane = |x: f32| if x.is_finite() { x } else { 0.0 };
        let repetition = params.repetition_penalty;
        Self {
            repetition: if repetition.is_finite() && repetition > 0.0 { repetition } else { 1.0 },
            frequency: sane(params.frequency_penalty),
            presence: sane(params.presence_penalty),
            window: match params.penalty_window {
                0 => usize::MAX,
                n => n as usize,
            },
            counts: HashMap::new(),
        }
    }

    /// Number of history tokens needed to know which tokens leave the window; 0 if none do.
    pub(super) fn lookback(&self) -> usize {
        if self.repeats() && self.window != usize::MAX { self.window } else { 0 }
    }

    fn repeats(&self) -> bool {
        self.repetition != 1.0
    }

    fn counts_output(&self) -> bool {
        self.frequency != 0.0 || self.presence != 0.0
    }

    /// Counts a token. `history` is the tokens before it, of which the last
    /// [`lookback`](Self::lookback) must be complete.
    pub(super) fn accept(&mut self, token: Token, history: &[Token], is_output: bool) {
        let output = is_output && self.counts_output();
        let repeats = self.repeats();
        if !repeats && !output {
            return;
        }
        let count = self.counts.entry(token).or_default();
        count.output = count.output.saturating_add(u32::from(output));
        count.window = count.window.saturating_add(u32::from(repeats));
        if repeats && history.len() >= self.window {
            let leaving = history[history.len() - self.window];
            if let Some(count) = self.counts.get_mut(&leaving) {
                count.window = count.window.saturating_sub(1);
                if *count == Count::default() {
                    self.counts.remove(&leaving);
                }
            }
        }
    }

    /// Lowers the logits of counted tokens; leaves the others unchanged.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        // Each token is changed independently, so the map's order does not matter.
        for (&token, count) in &self.counts {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if count.window > 0 {
                *logit =
                    if *logit <= 0.0 { *logit * self.repetition } else { *logit / self.repetition };
            }
            if count.output > 0 {
                *logit -= count.output as f32 * self.frequency + self.presence;
            }
        }
    }
}

/// Adds each bias to its token's logit. Tokens outside the vocabulary are ignored.
pub(super) fn apply_bias(logits: &mut [f32], bias: &[(Token, f32)]) {
    for &(token, value) in bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += value;
        }
    }
}
