//! GRPO (Shao et al. 2024, arXiv:2402.03300; Yu et al. 2025, DAPO, arXiv:2503.14476): completions
//! are sampled from the served model and graded, and a policy gradient raises or lowers their
//! probability.

use super::run::{BatchSource, Event, LossSums, MicroBatch, Outcome, Run, StepCount, TrainError};
use super::sampler::{
    GradedCompletion, Group, Measured, Ranking, ReferenceModel, Reward, Sampled, Sampler, Sampling,
    SavedRollouts, consecutive, encoded, mean_gap, measure,
};
use super::{Job, Recipe};
use crate::job::rollout_table::RolloutRow;
use crate::job::spec::{Grpo, GrpoLoss, PolicyLoss, Resolved, RewardSource};
use crate::job::{Control, Metrics};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Encoded, Order, PackedGroups, PreparedPrompts, pack_groups};
use crate::train::loss::{Completion, advantages};
use crate::train::model::{Batch, Gradients, Model, OutputGrads, Outputs, Pass, Wanted};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

impl Recipe for Grpo {
    type Data = PreparedPrompts;

    /// Prompts leave room for the completion.
    fn max_length(&self, settings: &Resolved) -> usize {
        settings.max_length.saturating_sub(self.max_tokens)
    }

    fn run(
        &self,
        job: &Job<'_, PreparedPrompts>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        match &self.grader {
            RewardSource::Grader(grader) => {
                GrpoTrainer::new(job, self, Reward::Grader(grader), control)?.run(control, event)
            }
            RewardSource::Rank(rank) => {
                let question = |_| rank.question.as_str();
                let ranking = Ranking { judge: &rank.model, reasoning: None, question: &question };
                GrpoTrainer::new(job, self, Reward::Rank(ranking), control)?.run(control, event)
            }
        }
    }
}

/// A GRPO run.
pub(super) struct GrpoTrainer<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub block: &'a Grpo,
    /// Number of prompts.
    pub examples: usize,
    pub checkpoints: &'a Checkpoints,
    /// Shuffle seed; `None` keeps the file's order.
    pub shuffle: Option<u64>,
    pub sampler: Sampler<'a>,
}

/// One graded completion.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ScoredCompletion {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    /// (tokens) the engine's log-probabilities.
    sampled: Vec<f64>,
    advantage: f64,
    /// (tokens) the trainer's log-probabilities before the first update; `None` until they are
    /// computed.
    old: Option<Vec<f64>>,
    /// (tokens) log-probabilities by the reference model, the model at the start of the job; `None`
    /// if not needed.
    reference: Option<Vec<f64>>,
    /// Index in [`RolloutBuffer::rows`], until they are reported.
    #[serde(skip)]
    row: usize,
}

/// The completions sampled for a batch of prompts, and the state of their updates. The buffer is
/// stored in checkpoints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct RolloutBuffer {
    answers: Vec<ScoredCompletion>,
    /// Number of tokens of completions that are not stored because their gradient is zero (all
    /// rewards of their group are equal), and the number of these completions.
    silent_tokens: f64,
    silent_answers: f64,
    /// Remaining optimizer steps on this buffer.
    updates: u64,
    measured: Measured,
    /// Rows of the rollout table that are not reported yet.
    #[serde(skip)]
    rows: Vec<RolloutRow>,
}

impl<'a> GrpoTrainer<'a> {
    /// # Errors
    /// As [`Sampler::new`].
    pub(super) fn new(
        job: &Job<'a, PreparedPrompts>,
        block: &'a Grpo,
        reward: Reward<'a>,
        control: &'a Control,
    ) -> Result<Self, TrainError> {
        let sampling = Sampling {
            reward,
            num_generations: block.num_generations,
            max_tokens: block.max_tokens,
            temperature: block.temperature,
            response_format: block.response_format.as_ref(),
            eval_samples: block.eval_samples,
        };
        Ok(Self {
            model: job.model,
            settings: job.settings,
            block,
            examples: job.train.len(),
            checkpoints: job.checkpoints,
            shuffle: job.shuffle,
            sampler: Sampler::new(job, sampling, control)?,
        })
    }

    /// Trains from the newest checkpoint to the last step, or until `control` stops it. `model` holds
    /// the initial weights.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint is kept.
    pub(super) fn run(
        &self,
        control: &Control,
        mut event: impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let run = Run { model: self.model, settings: self.settings, checkpoints: self.checkpoints };
        let reference = ReferenceModel::of(self.model)?;
        let order = Order::new(self.examples, self.shuffle);
        let (held, ahead) = (Rc::default(), RefCell::default());
        run.run(&mut Steps { run: self, order, reference, held, ahead }, control, &mut event)
    }

    /// Grades completions to train on.
    fn graded(&self, sampled: &mut Sampled) -> Result<RolloutBuffer, TrainError> {
        let mut held =
            RolloutBuffer { updates: self.block.num_iterations as u64, ..RolloutBuffer::default() };
        for group in self.sampler.graded(sampled, &mut held.measured)? {
            held.take_group(group, self.block);
        }
        Ok(held)
    }
}

impl RolloutBuffer {
    /// Adds the completions of one prompt. Completions whose gradient is zero are only counted.
    fn take_group(&mut self, group: Group, block: &Grpo) {
        let Group { prompt, completions } = group;
        let rewards: Vec<f64> = completions.iter().map(GradedCompletion::reward).collect();
        let advantages = advantages(&rewards);
        let silent = advantages.iter().all(|advantage| *advantage == 0.0) && block.beta == 0.0;
        measure(&mut self.measured, "reward_std", deviation(&rewards));
        measure(&mut self.measured, "frac_reward_zero_std", f64::from(u8::from(silent)));
        for (completion, advantage) in completions.into_iter().zip(advantages) {
            let GradedCompletion { rollout: answer, row, .. } = completion;
            let graded = row.reward.is_some();
            self.rows.push(row);
            let overlong = block.mask_overlong && !answer.ended;
            if block.mask_overlong {
                measure(&mut self.measured, "masked_ratio", f64::from(u8::from(overlong)));
            }
            if answer.tokens.is_empty() || overlong || !graded {
                continue;
            }
            let row = self.rows.len() - 1;
            self.rows[row].advantage = Some(advantage);
            if silent {
                self.silent_tokens += answer.tokens.len() as f64;
                self.silent_answers += 1.0;
                continue;
            }
            self.answers.push(ScoredCompletion {
                prompt: prompt.clone(),
                tokens: answer.tokens,
                sampled: answer.log_probs.into_iter().map(f64::from).collect(),
                advantage,
                old: None,
                reference: None,
                row,
            });
        }
    }
}

/// Standard deviation of the rewards that are not NaN, with n − 1.
fn deviation(rewards: &[f64]) -> f64 {
    let rewards: Vec<f64> = rewards.iter().copied().filter(|reward| !reward.is_nan()).collect();
    let count = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / count.max(1.0);
    let squares: f64 = rewards.iter().map(|reward| (reward - mean).powi(2)).sum();
    (squares / (count - 1.0).max(1.0)).sqrt()
}

/// The batches of completions, one per optimizer step.
struct Steps<'a, 'b> {
    run: &'a GrpoTrainer<'b>,
    order: Order,
    reference: ReferenceModel,
    held: Rc<RefCell<RolloutBuffer>>,
    /// The next batch, if it is sampled while the model is trained on this one.
    ahead: RefCell<Option<Sampled>>,
}

/// What a checkpoint holds besides the position in the data.
#[derive(Default, Serialize, Deserialize)]
struct Saved {
    /// If updates remain to be made on it.
    held: Option<RolloutBuffer>,
    /// The next batch, if it is sampled ahead.
    ahead: Option<SavedRollouts>,
}

impl Steps<'_, '_> {
    /// The completions of the next prompts, graded. If they were not sampled ahead, the current
    /// weights sample them.
    fn sample(&mut self, cursor: &mut Cursor, count: usize) -> Result<RolloutBuffer, TrainError> {
        let before = *cursor;
        let prompts = self.order.next(cursor, count);
        let ahead = self.ahead.get_mut();
        let mut now = None;
        let sampled = match ahead {
            Some(sampled) => sampled,
            None => now.insert(self.run.sampler.start(prompts, &before)?),
        };
        let held = self.run.graded(sampled)?;
        // If they could not be graded, they are kept.
        *ahead = None;
        Ok(held)
    }

    /// Begins to sample the batch after the next update, if there is one.
    fn sample_ahead(&mut self, cursor: &Cursor) -> Result<(), TrainError> {
        let (extent, updates) = (self.extent(), self.run.block.num_iterations as u64);
        let taken = cursor.epoch * self.run.examples as u64 + cursor.taken;
        let batches = taken.div_ceil(self.run.settings.batch_size as u64);
        if !self.run.block.async_rollouts || batches >= extent.steps.div_ceil(updates) {
            return Ok(());
        }
        let mut after = *cursor;
        let prompts = self.order.next(&mut after, extent.due(cursor));
        *self.ahead.get_mut() = Some(self.run.sampler.start(prompts, cursor)?);
        Ok(())
    }

    /// Computes the reference model's log-probabilities of the completions.
    fn compute_reference(&self, rows: &[Row]) -> Result<(), TrainError> {
        self.reference.with(self.run.model, || {
            for row in rows {
                let outputs = self.run.model.outputs(&row.batch, row.wanted)?;
                let mut held = self.held.borrow_mut();
                for (answer, range) in &row.loss.answers {
                    held.answers[*answer].reference = Some(outputs.log_probs[range.clone()].into());
                }
            }
            Ok(())
        })
    }

    /// The buffered completions, packed for passes. Completions of one prompt share its rows.
    fn rows(&self) -> Vec<Row> {
        let held = self.held.borrow();
        let examples: Vec<Encoded> =
            held.answers.iter().map(|answer| encoded(&answer.prompt, &answer.tokens)).collect();
        let groups = consecutive(&held.answers, |answer| &answer.prompt[..]);
        let temperature = self.run.block.temperature;
        let row = |pass: PackedGroups| Row {
            loss: Loss { answers: pass.counted(&examples), objective: self.run.block.objective() },
            tokens: pass.members().map(|member| examples[member].tokens.len()).sum(),
            batch: pass.batch(&examples),
            wanted: Wanted { temperature, ..Wanted::LOG_PROBS },
            held: self.held.clone(),
        };
        let capacity = self.run.settings.max_length * self.run.settings.micro_batch;
        pack_groups(&examples, groups, capacity).into_iter().map(row).collect()
    }
}

impl BatchSource for Steps<'_, '_> {
    type MicroBatch = Row;

    fn extent(&self) -> StepCount {
        let block = self.run.block;
        StepCount::new(self.run.examples, self.run.settings)
            .with_updates(block.num_iterations as u64)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Row>, TrainError> {
        let fresh = self.held.borrow().updates == 0;
        if fresh {
            let held = self.sample(cursor, count)?;
            *self.held.borrow_mut() = held;
            if let Err(error) = self.sample_ahead(cursor) {
                // This batch is complete; the same error ends the next one.
                tracing::warn!("the next batch is not sampled ahead: {error}");
            }
        }
        let rows = self.rows();
        if fresh && self.run.block.beta > 0.0 {
            self.compute_reference(&rows)?;
        }
        self.held.borrow_mut().updates -= 1;
        Ok(rows)
    }

    /// Completions with a zero gradient are not computed, but they count in the loss's divisor.
    fn extra_losses(&self) -> LossSums {
        let held = self.held.borrow();
        let weight = match self.run.block.loss {
            PolicyLoss::Dapo => held.silent_tokens,
            PolicyLoss::Grpo => held.silent_answers,
        };
        let mut sums = LossSums { weight, ..LossSums::default() };
        for (name, (sum, count)) in &held.measured {
            sums.measure_all(name.clone(), *sum, *count);
        }
        sums
    }

    fn target_reward(&self) -> Option<f64> {
        self.run.block.target_reward
    }

    fn rollouts(&mut self) -> Vec<RolloutRow> {
        std::mem::take(&mut self.held.borrow_mut().rows)
    }

    fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        // The engine answers one request of a job at a time.
        if let Some(sampled) = &mut *self.ahead.borrow_mut() {
            self.run.sampler.collect(sampled)?;
        }
        self.run.sampler.examine()
    }

    fn save(&self) -> Result<Vec<u8>, TrainError> {
        let held = Some(self.held.borrow()).filter(|held| held.updates > 0);
        let ahead = self.ahead.borrow();
        let ahead = ahead.as_ref().map(|sampled| self.run.sampler.save(sampled)).transpose()?;
        if held.is_none() && ahead.is_none() {
            return Ok(Vec::new());
        }
        let saved = Saved { held: held.map(|held| held.clone()), ahead };
        rmp_serde::to_vec(&saved).map_err(|error| std::io::Error::other(error).into())
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), TrainError> {
        if !saved.is_empty() {
            let saved = rmp_serde::from_slice::<Saved>(saved)
                // Earlier versions stored the completions alone.
                .or_else(|_| {
                    let held = rmp_serde::from_slice(saved)?;
                    Ok::<_, rmp_serde::decode::Error>(Saved { held: Some(held), ahead: None })
                })
                .map_err(std::io::Error::other)?;
            *self.held.borrow_mut() = saved.held.unwrap_or_default();
            *self.ahead.get_mut() = saved.ahead.map(|saved| self.run.sampler.restore(saved));
        }
        Ok(())
    }
}

/// Completions that are computed in one pass.
struct Row {
    batch: Batch,
    /// Number of tokens of the completions, each with its prompt.
    tokens: usize,
    wanted: Wanted,
    loss: Loss,
    held: Rc<RefCell<RolloutBuffer>>,
}

/// The loss of a row, as a function of the model's outputs.
struct Loss {
    /// Index of each completion, and its range among the rows with a weight other than 0.
    answers: Vec<(usize, Range<usize>)>,
    objective: GrpoLoss,
}

impl Loss {
    /// The loss, its gradient with respect to the outputs, and the metrics.
    fn of(&self, held: &RolloutBuffer, outputs: &Outputs) -> (LossSums, OutputGrads) {
        let mut sums = LossSums::default();
        let mut slopes =
            OutputGrads { log_probs: vec![0.0; outputs.log_probs.len()], values: vec![] };
        for (answer, range) in &self.answers {
            let answer = &held.answers[*answer];
            let found = self.objective.completion(
                &outputs.log_probs[range.clone()],
                &Completion {
                    advantage: answer.advantage,
                    old: answer.old.as_deref(),
                    engine: &answer.sampled,
                    reference: answer.reference.as_deref(),
                },
            );
            slopes.log_probs[range.clone()].copy_from_slice(&found.slopes);
            sums.loss += found.loss;
            sums.weight += found.weight;
            let tokens = range.len() as f64;
            let entropy: f64 = outputs.entropies[range.clone()].iter().sum();
            sums.measure_all("entropy", entropy, tokens);
            sums.measure_all("clip_ratio", found.clipped, tokens);
            sums.measure_all("sampling_logp_difference", found.gap, tokens);
            sums.measure_all("importance_sampling_ratio", found.correction, tokens);
            if answer.reference.is_some() {
                sums.measure_all("kl", found.kl, tokens);
            }
        }
        (sums, slopes)
    }
}

impl MicroBatch for Row {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn train(
        &self,
        model: &Model,
        pass: Pass,
        gradients: &mut Gradients,
    ) -> Result<LossSums, TrainError> {
        let mut found = (LossSums::default(), Vec::new());
        {
            let held = self.held.borrow();
            let (held, loss, found) = (&*held, &self.loss, &mut found);
            model.train_with(&self.batch, pass, self.wanted, gradients, |outputs| {
                let (sums, slopes) = loss.of(held, outputs);
                *found = (sums, outputs.log_probs.clone());
                slopes
            })?;
        }
        let (sums, log_probs) = found;
        let mut held = self.held.borrow_mut();
        for (answer, range) in &self.loss.answers {
            // The ratio of later updates is taken to the policy before the first update.
            let RolloutBuffer { answers, rows, .. } = &mut *held;
            let answer = &mut answers[*answer];
            let old = answer.old.get_or_insert_with(|| log_probs[range.clone()].into());
            if let Some(row) = rows.get_mut(answer.row) {
                row.sampling_logp_difference = mean_gap(old, &answer.sampled);
            }
        }
        Ok(sums)
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        Ok(self.loss.of(&self.held.borrow(), &model.outputs(&self.batch, self.wanted)?).0)
    }
}
