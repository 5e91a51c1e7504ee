//! What a step costs, learned from the steps so far.
//!
//! A step takes about `decode + prefill_tokens × per_token` seconds. Both are decaying means, so
//! they follow longer contexts and a busier machine; the chunk of prefill that a step may carry
//! follows from them and the time a step should take.

use std::time::Duration;

/// Weight of the newest step.
const ALPHA: f32 = 0.2;
/// Smaller chunks waste the fixed part of a step.
const MIN_CHUNK: usize = 8;

#[derive(Debug)]
pub struct CostModel {
    target: f32,
    max_tokens: usize,
    /// Seconds of a step that only decodes.
    decode: Option<f32>,
    /// Seconds per token of prefill.
    per_token: Option<f32>,
    /// Longest recent step, decayed.
    longest: f32,
}

impl CostModel {
    /// `target` is the time a step should take while anyone decodes; `max_tokens` the most tokens
    /// in a step.
    pub fn new(target: Duration, max_tokens: usize) -> Self {
        Self {
            target: target.as_secs_f32(),
            max_tokens,
            decode: None,
            per_token: None,
            longest: 0.0,
        }
    }

    /// Tokens that the next step may hold, its `decoding` rows included.
    pub fn budget(&self, decoding: usize) -> usize {
        if decoding == 0 {
            return self.max_tokens;
        }
        let chunk = match self.per_token {
            Some(per_token) if per_token > 0.0 => {
                let spare = self.target - self.decode.unwrap_or(0.0);
                (spare / per_token).max(0.0) as usize
            }
            // Nothing known yet: a cautious first chunk.
            _ => 8 * MIN_CHUNK,
        };
        (decoding + chunk.max(MIN_CHUNK)).min(self.max_tokens)
    }

    /// Longest recent step in seconds, decayed.
    pub fn longest(&self) -> f32 {
        self.longest
    }

    pub fn observe(&mut self, decoding: usize, prefill: usize, took: Duration) {
        let took = took.as_secs_f32();
        self.longest = took.max(self.longest * 0.98);
        if prefill == 0 {
            blend(&mut self.decode, took);
        } else if prefill >= MIN_CHUNK / 2 {
            let base = if decoding > 0 { self.decode.unwrap_or(0.0) } else { 0.0 };
            // A step that went faster than decoding alone still cost something.
            blend(&mut self.per_token, (took - base).max(took * 0.1) / prefill as f32);
        }
    }
}

fn blend(mean: &mut Option<f32>, value: f32) {
    *mean = Some(mean.map_or(value, |mean| mean + ALPHA * (value - mean)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_shrink_until_steps_meet_the_target() {
        let mut cost = CostModel::new(Duration::from_millis(100), 512);
        assert_eq!(cost.budget(0), 512);
        let seconds =
            |decoding: usize, prefill: usize| 0.002 * decoding as f32 + 0.0025 * prefill as f32;
        for _ in 0..50 {
            cost.observe(4, 0, Duration::from_secs_f32(seconds(4, 0)));
            let prefill = cost.budget(4) - 4;
            cost.observe(4, prefill, Duration::from_secs_f32(seconds(4, prefill)));
        }
        let prefill = cost.budget(4) - 4;
        let step = seconds(4, prefill);
        assert!((0.08..=0.11).contains(&step), "{prefill} tokens take {step} s");
    }

    #[test]
    fn prefill_never_starves() {
        let mut cost = CostModel::new(Duration::from_millis(1), 512);
        for _ in 0..10 {
            cost.observe(8, 0, Duration::from_secs(1));
            cost.observe(8, 64, Duration::from_secs(2));
        }
        assert!(cost.budget(8) >= 8 + MIN_CHUNK);
    }
}
