//! On-policy distillation (Agarwal et al. 2024, GKD, arXiv:2306.13649): the student writes the
//! completions on which it learns the teacher's distributions.

use super::calls::Calls;
use super::run::{Event, LossSums};
use super::sampler::encoded;
use super::{Job, TrainError};
use crate::job::Control;
use crate::job::rollout::RolloutRequest;
use crate::job::spec::Distill;
use crate::train::data::{Cursor, Encoded, Prepared};
use crate::train::ops::mixed;
use std::time::Instant;

/// Samples completions of the student.
pub(super) struct OnPolicy<'a> {
    calls: Calls<'a>,
    share: f64,
    max_tokens: usize,
    max_length: usize,
    seed: u64,
}

/// The examples of a batch.
pub(super) struct Mixture {
    /// Numbers of those that keep the completion of the data.
    pub kept: Vec<usize>,
    /// Those whose completion the student wrote.
    pub sampled: Vec<Encoded>,
    /// The metrics of sampling.
    pub measured: LossSums,
}

impl<'a> OnPolicy<'a> {
    /// `None` if no completions are sampled.
    ///
    /// # Errors
    /// If there is no served model, or examples have no prompt.
    pub(super) fn new(
        block: &Distill,
        job: &Job<'a, Prepared>,
        control: &'a Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Option<Self>, TrainError> {
        if block.on_policy == 0.0 {
            return Ok(None);
        }
        let found = Self {
            calls: Calls::new(job.policy, control)?,
            share: block.on_policy,
            max_tokens: block.max_tokens,
            max_length: job.settings.max_length,
            seed: job.seed,
        };
        let mut too_long = 0;
        for number in 0..job.train.len() {
            let example = job.train.get(number)?;
            if prompt(&example).is_empty() {
                return Err(TrainError::Spec(format!(
                    "distill.on_policy: example {} of the training data has no prompt that the \
                     student could answer: give conversations, or `prompt` and `completion`",
                    number + 1
                )));
            }
            too_long += usize::from(!found.fits(&example));
        }
        if too_long > 0 {
            let text = format!(
                "{too_long} of {} examples keep their completion: with `distill.max_tokens` more \
                 tokens their prompts are longer than `train.max_length`.",
                job.train.len()
            );
            event(Event::Note { text });
        }
        Ok(Some(found))
    }

    fn fits(&self, example: &Encoded) -> bool {
        prompt(example).len() + self.max_tokens <= self.max_length
    }

    /// Draws which of the examples `numbers` the student completes, and samples their completions
    /// with its current weights. `cursor` is the position of the run before these examples.
    ///
    /// # Errors
    /// As of [`Calls::generate`].
    pub(super) fn mix(
        &self,
        data: &Prepared,
        numbers: Vec<usize>,
        cursor: &Cursor,
    ) -> Result<Mixture, TrainError> {
        let first = (cursor.epoch << 32) + cursor.taken;
        let (mut kept, mut prompts, mut seeds) = (Vec::new(), Vec::new(), Vec::new());
        for (place, number) in (first..).zip(numbers) {
            let example = data.get(number)?;
            // Uniform in [0, 1).
            let drawn = (mixed(!self.seed, place) >> 11) as f64 / (1u64 << 53) as f64;
            match drawn < self.share && self.fits(&example) {
                true => {
                    prompts.push(prompt(&example).to_vec());
                    seeds.push(mixed(self.seed, place));
                }
                false => kept.push(number),
            }
        }
        let (mut sampled, mut measured) = (Vec::new(), LossSums::default());
        if prompts.is_empty() {
            return Ok(Mixture { kept, sampled, measured });
        }
        let request = RolloutRequest {
            prompts,
            seeds,
            answers: 1,
            max_tokens: self.max_tokens as u32,
            temperature: 1.0,
            response_format: None,
            skip_too_long: false,
        };
        let since = Instant::now();
        self.calls.export()?;
        let completions = self.calls.generate(&request)?;
        measured.measure("rollout_seconds", since.elapsed().as_secs_f64());
        for (prompt, completion) in request.prompts.iter().zip(completions.into_iter().flatten()) {
            measured.measure("completion_length", completion.tokens.len() as f64);
            measured.measure("terminated_ratio", f64::from(u8::from(completion.ended)));
            if !completion.tokens.is_empty() {
                sampled.push(encoded(prompt, &completion.tokens));
            }
        }
        Ok(Mixture { kept, sampled, measured })
    }
}

/// The tokens before the first trained one.
fn prompt(example: &Encoded) -> &[u32] {
    let end = example.trained.iter().position(|trained| *trained);
    &example.tokens[..end.unwrap_or(example.tokens.len())]
}
