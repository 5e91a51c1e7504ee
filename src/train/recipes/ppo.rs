//! PPO (Schulman et al. 2017, arXiv:1707.06347), as for language models (Ziegler et al. 2019,
//! arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325): completions are sampled from the
//! served model and graded; a value head on the trained model predicts the rewards to come.
//!
//! The reward of a token is minus β times its log-ratio to the initial model; the score of the
//! completion is added at the last token.

use super::run::{BatchSource, Event, LossSums, MicroBatch, Outcome, Run, StepCount, TrainError};
use super::sampler::{
    GradedCompletion, Measured, ReferenceModel, Reward, Sampler, Sampling, consecutive, encoded,
    mean_gap, measure,
};
use super::{Job, Recipe};
use crate::job::rollout_table::RolloutRow;
use crate::job::spec::{Ppo, PpoLoss, Resolved};
use crate::job::{Control, Metrics};
use crate::train::data::{Cursor, Encoded, Order, PackedGroups, PreparedPrompts, pack_groups};
use crate::train::loss::PpoCompletion;
use crate::train::model::{Batch, Gradients, Model, OutputGrads, Outputs, Pass, VALUE, Wanted};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

impl Recipe for Ppo {
    type Data = PreparedPrompts;

    /// Prompts leave room for the completion.
    fn max_length(&self, settings: &Resolved) -> usize {
        settings.max_length.saturating_sub(self.max_tokens)
    }

    fn head(&self) -> Option<&'static str> {
        Some(VALUE)
    }

    fn run(
        &self,
        job: &Job<'_, PreparedPrompts>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let sampling = Sampling {
            reward: Reward::Grader(&self.grader),
            num_generations: self.num_generations,
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            response_format: self.response_format.as_ref(),
            eval_samples: self.eval_samples,
        };
        let mut steps = Steps {
            model: job.model,
            settings: job.settings,
            block: self,
            sampler: Sampler::new(job, sampling, control)?,
            examples: job.train.len(),
            order: Order::new(job.train.len(), job.shuffle),
            reference: ReferenceModel::of(job.model)?,
            buffer: Rc::default(),
        };
        let run = Run { model: job.model, settings: job.settings, checkpoints: job.checkpoints };
        run.run(&mut steps, control, &mut |found| event(found))
    }
}

/// A completion, and one number per token of what was computed before the first update.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct ScoredCompletion {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    /// The engine's log-probabilities.
    sampled: Vec<f64>,
    score: f64,
    /// The trainer's log-probabilities and values.
    old: Vec<f64>,
    old_values: Vec<f64>,
    /// Log-probabilities by the initial model.
    reference: Vec<f64>,
    advantages: Vec<f64>,
    returns: Vec<f64>,
    /// Index in [`RolloutBuffer::rows`], until they are reported.
    #[serde(skip)]
    row: usize,
}

/// The completions sampled for a batch of prompts, and the state of their updates. The buffer is
/// stored in checkpoints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct RolloutBuffer {
    completions: Vec<ScoredCompletion>,
    /// Remaining optimizer steps on this buffer.
    updates: u64,
    measured: Measured,
    /// Rows of the rollout table that are not reported yet.
    #[serde(skip)]
    rows: Vec<RolloutRow>,
}

impl RolloutBuffer {
    /// Adds a completion. One that is empty, or could not be graded, is left out.
    fn take(&mut self, prompt: &[u32], completion: GradedCompletion, penalty: f64) {
        let reward = completion.reward();
        let GradedCompletion { rollout: completion, row, .. } = completion;
        self.rows.push(row);
        if completion.tokens.is_empty() || reward.is_nan() {
            return;
        }
        let penalty = if completion.ended { 0.0 } else { penalty };
        self.completions.push(ScoredCompletion {
            prompt: prompt.to_vec(),
            tokens: completion.tokens,
            sampled: completion.log_probs.into_iter().map(f64::from).collect(),
            score: reward - penalty,
            row: self.rows.len() - 1,
            ..ScoredCompletion::default()
        });
    }

    /// Computes advantages and returns from scores, log-probabilities and values.
    fn estimate(&mut self, loss: &PpoLoss) {
        let mut advantages = Vec::with_capacity(self.completions.len());
        for completion in &mut self.completions {
            let rewards = loss.rewards(completion.score, &completion.old, &completion.reference);
            let (found, returns) = loss.estimate(&rewards, &completion.old_values);
            completion.returns = returns;
            advantages.push(found);
            for (old, reference) in completion.old.iter().zip(&completion.reference) {
                measure(&mut self.measured, "kl", old - reference);
            }
            for (old, sampled) in completion.old.iter().zip(&completion.sampled) {
                if !sampled.is_nan() {
                    let gap = (old - sampled).abs();
                    measure(&mut self.measured, "sampling_logp_difference", gap);
                }
            }
            for value in &completion.old_values {
                measure(&mut self.measured, "value_mean", *value);
            }
        }
        loss.whiten(&mut advantages);
        for (completion, found) in self.completions.iter_mut().zip(advantages) {
            let row = &mut self.rows[completion.row];
            row.advantage = Some(found.iter().sum::<f64>() / found.len() as f64);
            row.sampling_logp_difference = mean_gap(&completion.old, &completion.sampled);
            completion.advantages = found;
        }
    }
}

/// The batches of completions, one per optimizer step.
struct Steps<'a> {
    model: &'a Model,
    settings: &'a Resolved,
    block: &'a Ppo,
    sampler: Sampler<'a>,
    /// Number of prompts.
    examples: usize,
    order: Order,
    reference: ReferenceModel,
    buffer: Rc<RefCell<RolloutBuffer>>,
}

impl Steps<'_> {
    /// Samples completions, and computes what the updates on them need.
    fn sample(&self, prompts: Vec<usize>, cursor: &Cursor) -> Result<(), TrainError> {
        let updates = self.block.num_iterations as u64;
        let mut buffer = RolloutBuffer { updates, ..RolloutBuffer::default() };
        let penalty = self.block.missing_eos_penalty;
        let mut sampled = self.sampler.start(prompts, cursor)?;
        for group in self.sampler.graded(&mut sampled, &mut buffer.measured)? {
            for completion in group.completions {
                buffer.take(&group.prompt, completion, penalty);
            }
        }
        *self.buffer.borrow_mut() = buffer;
        let rows = self.rows();
        for row in &rows {
            let outputs = self.model.outputs(&row.batch, row.wanted)?;
            let mut buffer = self.buffer.borrow_mut();
            for (completion, range) in &row.completions {
                let completion = &mut buffer.completions[*completion];
                completion.old = outputs.log_probs[range.clone()].into();
                completion.old_values = outputs.values[range.clone()].into();
            }
        }
        self.reference.with(self.model, || {
            for row in &rows {
                let wanted = Wanted { values: false, ..row.wanted };
                let outputs = self.model.outputs(&row.batch, wanted)?;
                let mut buffer = self.buffer.borrow_mut();
                for (completion, range) in &row.completions {
                    buffer.completions[*completion].reference =
                        outputs.log_probs[range.clone()].into();
                }
            }
            Ok(())
        })?;
        self.buffer.borrow_mut().estimate(&self.block.objective());
        Ok(())
    }

    /// The buffered completions, packed for passes. Completions of one prompt share its rows.
    fn rows(&self) -> Vec<Row> {
        let buffer = self.buffer.borrow();
        let completions = &buffer.completions;
        let examples: Vec<Encoded> = completions
            .iter()
            .map(|completion| encoded(&completion.prompt, &completion.tokens))
            .collect();
        let groups = consecutive(completions, |completion| &completion.prompt[..]);
        let wanted =
            Wanted { values: true, temperature: self.block.temperature, ..Wanted::LOG_PROBS };
        let row = |pass: PackedGroups| Row {
            completions: pass.counted(&examples),
            tokens: pass.members().map(|member| examples[member].tokens.len()).sum(),
            batch: pass.batch(&examples),
            wanted,
            loss: self.block.objective(),
            buffer: self.buffer.clone(),
        };
        let capacity = self.settings.max_length * self.settings.micro_batch;
        pack_groups(&examples, groups, capacity).into_iter().map(row).collect()
    }
}

impl BatchSource for Steps<'_> {
    type MicroBatch = Row;

    fn extent(&self) -> StepCount {
        StepCount::new(self.examples, self.settings).with_updates(self.block.num_iterations as u64)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Row>, TrainError> {
        if self.buffer.borrow().updates == 0 {
            let before = *cursor;
            let prompts = self.order.next(cursor, count);
            self.sample(prompts, &before)?;
        }
        self.buffer.borrow_mut().updates -= 1;
        Ok(self.rows())
    }

    /// The metrics of sampling. There is no loss besides that of the micro-batches.
    fn extra_losses(&self) -> LossSums {
        let mut sums = LossSums::default();
        for (name, (sum, count)) in &self.buffer.borrow().measured {
            sums.measure_all(name.clone(), *sum, *count);
        }
        sums
    }

    fn target_reward(&self) -> Option<f64> {
        self.block.target_reward
    }

    fn rollouts(&mut self) -> Vec<RolloutRow> {
        std::mem::take(&mut self.buffer.borrow_mut().rows)
    }

    fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        self.sampler.examine()
    }

    fn save(&self) -> Result<Vec<u8>, TrainError> {
        let buffer = self.buffer.borrow();
        match buffer.updates {
            0 => Ok(Vec::new()),
            _ => rmp_serde::to_vec(&*buffer).map_err(|error| std::io::Error::other(error).into()),
        }
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), TrainError> {
        if !saved.is_empty() {
            let buffer = rmp_serde::from_slice(saved).map_err(std::io::Error::other)?;
            *self.buffer.borrow_mut() = buffer;
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
    /// Index of each completion, and its range among the rows with a weight other than 0.
    completions: Vec<(usize, Range<usize>)>,
    loss: PpoLoss,
    buffer: Rc<RefCell<RolloutBuffer>>,
}

/// The loss of a row as a function of the model's outputs, its gradient, and the metrics.
fn loss(
    objective: &PpoLoss,
    completions: &[(usize, Range<usize>)],
    buffer: &RolloutBuffer,
    outputs: &Outputs,
) -> (LossSums, OutputGrads) {
    let mut sums = LossSums::default();
    let mut gradients = OutputGrads {
        log_probs: vec![0.0; outputs.log_probs.len()],
        values: vec![0.0; outputs.values.len()],
    };
    for (completion, range) in completions {
        let completion = &buffer.completions[*completion];
        let found = objective.completion(
            &outputs.log_probs[range.clone()],
            &outputs.values[range.clone()],
            &PpoCompletion {
                old: &completion.old,
                old_values: &completion.old_values,
                advantages: &completion.advantages,
                returns: &completion.returns,
            },
        );
        gradients.log_probs[range.clone()].copy_from_slice(&found.policy_slopes);
        gradients.values[range.clone()].copy_from_slice(&found.value_slopes);
        sums.loss += found.loss;
        sums.weight += found.weight;
        let entropy: f64 = outputs.entropies[range.clone()].iter().sum();
        for (name, sum) in [
            ("entropy", entropy),
            ("policy_loss", found.policy_loss),
            ("value_loss", found.value_loss),
            ("clip_ratio", found.clipped),
            ("value_clip_ratio", found.value_clipped),
        ] {
            sums.measure_all(name, sum, range.len() as f64);
        }
    }
    (sums, gradients)
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
        let buffer = self.buffer.borrow();
        let mut sums = LossSums::default();
        let (buffer, completions, objective) = (&*buffer, &self.completions, &self.loss);
        model.train_with(&self.batch, pass, self.wanted, gradients, |outputs| {
            let (found, slopes) = loss(objective, completions, buffer, outputs);
            sums = found;
            slopes
        })?;
        Ok(sums)
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        let outputs = model.outputs(&self.batch, self.wanted)?;
        Ok(loss(&self.loss, &self.completions, &self.buffer.borrow(), &outputs).0)
    }
}
