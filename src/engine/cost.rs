//! Predicts the duration of a step from the durations of earlier steps.
//!
//! A step takes about `decode + prefill_tokens × per_token` seconds. Both coefficients are
//! exponentially decaying means, so they follow longer contexts and changes in machine load. These
//! coefficients and the target step time give the chunk of prefill tokens that a step may carry.
//!
//! A step that only decodes takes about `fixed + rows × row` seconds, a line fitted to recent
//! steps; its slope is the cost of a drafted row. The passes of a draft model are measured the same
//! way.

use std::time::Duration;

/// Weight of the newest step in the decaying means.
const ALPHA: f32 = 0.2;
/// Smaller prefill chunks waste the fixed cost of a step.
const MIN_CHUNK: usize = 8;
/// Forgetting factor of the line fit, per step.
const MEMORY: f32 = 0.97;
/// The slope is updated only if the variance of the rows of recent steps is at least this.
const MIN_SPREAD: f32 = 0.5;
/// Until a slope is known, the fixed cost of a step is taken to equal the cost of this many rows.
const FIXED_ROWS: f32 = 8.0;
/// Upper limit of the fixed cost, in rows: a slope near zero is a measurement error.
const CHEAP_ROWS: f32 = 64.0;
/// Outlier limit: a step that takes longer than this many times its expected maximum counts as that
/// product.
const DISTURBED: f32 = 2.0;

/// Time and expected tokens of a step that is being built.
///
/// An addition is worthwhile while it raises the tokens per second: while its `tokens / seconds`
/// exceeds that of the step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub seconds: f32,
    pub tokens: f32,
    /// Seconds of one more row.
    pub row: f32,
}

impl Pace {
    pub(super) fn gains(&self, tokens: f32, seconds: f32) -> bool {
        tokens * self.seconds > seconds * self.tokens
    }

    pub(super) fn add(&mut self, tokens: f32, seconds: f32) {
        self.tokens += tokens;
        self.seconds += seconds;
    }
}

#[derive(Debug)]
pub(super) struct CostModel {
    target: f32,
    max_tokens: usize,
    /// Seconds of a step of one row, used until a step has been measured.
    first: f32,
    /// Seconds of a step that only decodes.
    decode: Option<f32>,
    /// Seconds per token of prefill.
    per_token: Option<f32>,
    /// Duration of the longest recent step in seconds, decayed.
    longest: f32,
    line: Line,
}

/// Seconds of a step as a linear function of its rows: least squares with exponential forgetting.
#[derive(Debug, Default)]
struct Line {
    weight: f32,
    /// Weighted means.
    rows: f32,
    seconds: f32,
    /// Variance of the rows, and covariance of rows and seconds.
    spread: f32,
    together: f32,
    /// The last slope that passed the variance check.
    slope: Option<f32>,
}

impl Line {
    fn observe(&mut self, rows: f32, seconds: f32) {
        // Rows never cost more than separate steps of one row would.
        let most = match self.weight > 1.0 {
            true => DISTURBED * self.seconds * (rows / self.rows).max(1.0),
            false => f32::INFINITY,
        };
        self.weight = self.weight * MEMORY + 1.0;
        let share = self.weight.recip();
        let (further, longer) = (rows - self.rows, seconds.min(most) - self.seconds);
        self.rows += share * further;
        self.seconds += share * longer;
        self.spread += share * (further * further * (1.0 - share) - self.spread);
        self.together += share * (further * longer * (1.0 - share) - self.together);
        if self.spread >= MIN_SPREAD {
            let bounds = [CHEAP_ROWS, 0.0].map(|more| self.seconds / (self.rows + more));
            self.slope = Some((self.together / self.spread).clamp(bounds[0], bounds[1]));
        }
    }

    /// Seconds of one more row.
    fn slope(&self) -> f32 {
        self.slope.unwrap_or(self.seconds / (self.rows + FIXED_ROWS))
    }

    fn at(&self, rows: f32) -> f32 {
        (self.seconds + (rows - self.rows) * self.slope()).max(0.0)
    }
}

impl CostModel {
    /// `target` is the duration that a step should have while any sequence decodes; `max_tokens`
    /// the most tokens in a step; `first` the measured duration of a step of one row.
    pub(super) fn new(target: Duration, max_tokens: usize, first: Duration) -> Self {
        Self {
            target: target.as_secs_f32(),
            max_tokens,
            first: first.as_secs_f32(),
            decode: None,
            per_token: None,
            longest: 0.0,
            line: Line::default(),
        }
    }

    /// Most tokens that the next step may hold, including its `decoding` rows.
    pub(super) fn budget(&self, decoding: usize) -> usize {
        if decoding == 0 {
            return self.max_tokens;
        }
        let chunk = match self.per_token {
            Some(per_token) if per_token > 0.0 => {
                let spare = self.target - self.decode.unwrap_or(0.0);
                (spare / per_token).max(0.0) as usize
            }
            // Nothing has been measured yet: start with a cautious chunk.
            _ => 8 * MIN_CHUNK,
        };
        (decoding + chunk.max(MIN_CHUNK)).min(self.max_tokens)
    }

    /// Expected seconds of a step with these rows. Until a prompt has been measured, each of its
    /// rows counts as a step of one row, which is an upper bound.
    pub(super) fn expected(&self, decoding: usize, prefill: usize) -> f32 {
        let decode = self.decode.unwrap_or(self.first);
        let per_token = self.per_token.unwrap_or(decode);
        decode * f32::from(u8::from(decoding > 0)) + per_token * prefill as f32
    }

    /// Duration of the longest recent step in seconds, decayed.
    pub(super) fn longest(&self) -> f32 {
        self.longest
    }

    /// The pace of a step that only decodes `rows` rows.
    pub(super) fn decoding(&self, rows: usize) -> Pace {
        let rows = rows as f32;
        Pace { seconds: self.line.at(rows), tokens: rows, row: self.line.slope() }
    }

    /// Seconds per token of prefill.
    pub(super) fn prefill(&self) -> f32 {
        self.per_token.unwrap_or(self.line.slope())
    }

    /// Records the duration of a step: with `decoding` rows of sequences' next tokens, `drafted`
    /// speculative rows beside them, and `prefill` rows of prompts.
    pub(super) fn observe(
        &mut self,
        decoding: usize,
        drafted: usize,
        prefill: usize,
        took: Duration,
    ) {
        let took = took.as_secs_f32();
        self.longest = took.max(self.longest * 0.98);
        if prefill == 0 {
            blend(&mut self.decode, took);
            self.line.observe((decoding + drafted).max(1) as f32, took);
        } else if prefill >= MIN_CHUNK / 2 {
            let base = if decoding > 0 { self.decode.unwrap_or(0.0) } else { 0.0 };
            // Even a step that was faster than decoding alone has a positive cost per token.
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
        let mut cost = CostModel::new(Duration::from_millis(100), 512, Duration::ZERO);
        assert_eq!(cost.budget(0), 512);
        let seconds =
            |decoding: usize, prefill: usize| 0.002 * decoding as f32 + 0.0025 * prefill as f32;
        for _ in 0..50 {
            cost.observe(4, 0, 0, Duration::from_secs_f32(seconds(4, 0)));
            let prefill = cost.budget(4) - 4;
            cost.observe(4, 0, prefill, Duration::from_secs_f32(seconds(4, prefill)));
        }
        let prefill = cost.budget(4) - 4;
        let step = seconds(4, prefill);
        assert!((0.08..=0.11).contains(&step), "{prefill} tokens take {step} s");
    }

    #[test]
    fn the_cost_of_a_row_is_learned_and_kept() {
        let mut cost = CostModel::new(Duration::from_millis(100), 512, Duration::ZERO);
        let seconds = |rows: usize| 0.008 + 0.001 * rows as f32;
        let step = |drafted: usize, cost: &mut CostModel| {
            // One step in ten is an outlier.
            let slow = if drafted == 7 { 5.0 } else { 1.0 };
            let took = Duration::from_secs_f32(seconds(1 + drafted) * slow);
            cost.observe(1, drafted, 0, took);
        };
        step(0, &mut cost);
        assert!((cost.decoding(1).row - seconds(1) / 9.0).abs() < 1e-6);
        (0..300).for_each(|turn| step(turn * 7 % 10, &mut cost));
        let Pace { seconds: alone, row, .. } = cost.decoding(1);
        assert!((0.007..0.013).contains(&alone), "{alone}");
        assert!((0.0005..0.002).contains(&row), "{row}");
        // Steps with equal row counts neither improve nor degrade the slope.
        (0..300).for_each(|_| step(0, &mut cost));
        let Pace { seconds: alone, row, .. } = cost.decoding(1);
        assert!((alone - seconds(1)).abs() < 1e-4, "{alone}");
        assert!((0.0005..0.002).contains(&row), "{row}");
    }

    #[test]
    fn prefill_never_starves() {
        let mut cost = CostModel::new(Duration::from_millis(1), 512, Duration::ZERO);
        for _ in 0..10 {
            cost.observe(8, 0, 0, Duration::from_secs(1));
            cost.observe(8, 0, 64, Duration::from_secs(2));
        }
        assert!(cost.budget(8) >= 8 + MIN_CHUNK);
    }
}
