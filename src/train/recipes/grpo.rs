//! GRPO (Shao et al. 2024, arXiv:2402.03300; Yu et al. 2025, DAPO, arXiv:2503.14476): completions
//! are sampled from the served model and graded, and a policy gradient raises or lowers their
//! probability.

use super::run::{BatchSource, Event, LossSums, MicroBatch, Outcome, Run, StepCount, TrainError};
use super::{Job, Policy, Recipe};
use crate::grade::{Context, Grader};
use crate::job::Metrics;
use crate::job::rollout::{CallError, Rollout, RolloutRequest};
use crate::job::spec::{Grpo, GrpoLoss, PolicyLoss, Resolved};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Encoded, EncodedPrompt, Order, PreparedPrompts, pack};
use crate::train::loss::{Completion, advantages};
use crate::train::model::{Batch, Gradients, Model, OutputGrads, Outputs, Pass, Wanted};
use crate::train::rollout::RolloutClient;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Number of attempts while the engine fails, and the longest wait between two attempts.
const TRIES: u32 = 30;
const MAX_BACK_OFF: Duration = Duration::from_secs(10);

impl Recipe for Grpo {
    type Data = PreparedPrompts;

    /// Prompts leave room for the completion.
    fn max_length(&self, settings: &Resolved) -> usize {
        settings.max_length.saturating_sub(self.max_tokens)
    }

    fn run(
        &self,
        job: &Job<'_, PreparedPrompts>,
        stop: &AtomicBool,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let Some(policy) = job.policy else {
            return Err(TrainError::Spec("grpo: there is no served model to sample from".into()));
        };
        check_items(&self.grader, "data.train", job.train)?;
        if let Some(validation) = job.validation {
            check_items(&self.grader, "data.validation", validation)?;
        }
        let trainer = GrpoTrainer {
            model: job.model,
            settings: job.settings,
            block: self,
            train: job.train,
            validation: job.validation,
            checkpoints: job.checkpoints,
            shuffle: job.shuffle,
            seed: job.seed,
            policy,
        };
        trainer.run(stop, event)
    }
}

/// Checks that every template of a grader can be filled from every item. A missing key would set
/// all rewards of an item to 0 without an error.
fn check_items(
    grader: &Grader,
    param: &'static str,
    prompts: &PreparedPrompts,
) -> Result<(), TrainError> {
    for number in 0..prompts.len() {
        if let Some(why) = grader.missing_key(&prompts.get(number)?.item) {
            let message = format!(
                "{param}: prompt {}: {why}, which the grader's template names; add the key to the line, \
                 or change the grader",
                number + 1
            );
            return Err(TrainError::Grader { param, message });
        }
    }
    Ok(())
}

/// A GRPO run.
struct GrpoTrainer<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub block: &'a Grpo,
    pub train: &'a PreparedPrompts,
    /// Validation prompts: completions are sampled and graded, but not trained on.
    pub validation: Option<&'a PreparedPrompts>,
    pub checkpoints: &'a Checkpoints,
    /// Shuffle seed; `None` keeps the file's order.
    pub shuffle: Option<u64>,
    /// Sampling seed.
    pub seed: u64,
    pub policy: Policy<'a>,
}

/// (sum, count) of each metric, by name.
type Measured = BTreeMap<String, (f64, f64)>;

fn measure(measured: &mut Measured, name: &str, value: f64) {
    let found = measured.entry(name.to_owned()).or_default();
    *found = (found.0 + value, found.1 + 1.0);
}

/// The completions of one prompt.
struct Group {
    prompt: Vec<u32>,
    answers: Vec<Rollout>,
    /// (completions) NaN for completions without a reward.
    rewards: Vec<f64>,
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
}

impl GrpoTrainer<'_> {
    /// Trains from the newest checkpoint to the last step, or until `stop` is set. `model` holds
    /// the initial weights.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint is kept.
    fn run(&self, stop: &AtomicBool, mut event: impl FnMut(Event)) -> Result<Outcome, TrainError> {
        let run = Run { model: self.model, settings: self.settings, checkpoints: self.checkpoints };
        let params = self.model.params().iter();
        let began = params.map(|param| param.var.as_tensor().copy()).collect::<Result<_, _>>()?;
        let order = Order::new(self.train.len(), self.shuffle);
        let held = Rc::default();
        run.run(&mut Steps { run: self, order, began, held }, stop, &mut event)
    }

    /// Samples completions to train on.
    fn sample(&self, prompts: &[usize], cursor: &Cursor) -> Result<RolloutBuffer, TrainError> {
        let first = (cursor.epoch << 32) + cursor.taken;
        let seeds = (0..prompts.len() as u64).map(|at| mixed(self.seed, first + at)).collect();
        let mut held =
            RolloutBuffer { updates: self.block.num_iterations as u64, ..RolloutBuffer::default() };
        (self.policy.export)(self.policy.adapter)?;
        let answers = self.block.num_generations;
        for group in self.groups(self.train, prompts, seeds, answers, &mut held.measured)? {
            held.take_group(group, self.block);
        }
        Ok(held)
    }

    /// Mean rewards of completions of the validation prompts. The same random seeds are used each
    /// time.
    fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        let Some(held_out) = self.validation else { return Ok(None) };
        let mut measured = Measured::new();
        (self.policy.export)(self.policy.adapter)?;
        let all: Vec<usize> = (0..held_out.len()).collect();
        for prompts in all.chunks(self.settings.batch_size) {
            let seeds = prompts.iter().map(|&number| mixed(!self.seed, number as u64)).collect();
            self.groups(held_out, prompts, seeds, self.block.eval_samples, &mut measured)?;
        }
        let mean = |(name, (sum, count)): (String, (f64, f64))| (name, sum / count);
        Ok(Some(measured.into_iter().map(mean).collect()))
    }

    /// Samples completions of some prompts with the adapter that was exported last, and grades
    /// them.
    fn groups(
        &self,
        from: &PreparedPrompts,
        prompts: &[usize],
        seeds: Vec<u64>,
        answers: usize,
        measured: &mut Measured,
    ) -> Result<Vec<Group>, TrainError> {
        let block = self.block;
        let prompts: Vec<_> =
            prompts.iter().map(|&number| from.get(number)).collect::<Result<_, _>>()?;
        let asked = RolloutRequest {
            prompts: prompts.iter().map(|prompt| prompt.tokens.clone()).collect(),
            seeds,
            answers: answers as u32,
            max_tokens: block.max_tokens as u32,
            temperature: block.temperature as f32,
        };
        let started = Instant::now();
        // An engine that was restarted has lost the adapter.
        let sampled = self.patiently(|client| {
            client.load_policy(self.policy.adapter)?;
            client.generate(&asked)
        })?;
        measure(measured, "rollout_seconds", started.elapsed().as_secs_f64());
        let samples: Vec<(&serde_json::Value, &Rollout)> = prompts
            .iter()
            .zip(&sampled)
            .flat_map(|(prompt, group)| group.iter().map(|answer| (&prompt.item, answer)))
            .collect();
        for (_, answer) in &samples {
            measure(measured, "completion_length", answer.tokens.len() as f64);
            measure(measured, "terminated_ratio", f64::from(u8::from(answer.ended)));
        }
        let started = Instant::now();
        let rewards = self.grade(&block.grader, &samples, measured)?;
        measure(measured, "grade_seconds", started.elapsed().as_secs_f64());
        let mut left = rewards.into_iter();
        let group = |(prompt, answers): (&EncodedPrompt, Vec<Rollout>)| {
            let rewards = left.by_ref().take(answers.len()).collect();
            Group { prompt: prompt.tokens.clone(), answers, rewards }
        };
        Ok(prompts.iter().zip(sampled).map(group).collect())
    }

    /// (completions) rewards; NaN for a completion that could not be graded.
    fn grade(
        &self,
        grader: &Grader,
        samples: &[(&serde_json::Value, &Rollout)],
        measured: &mut Measured,
    ) -> Result<Vec<f64>, TrainError> {
        let contexts: Vec<Context> =
            samples.iter().map(|(item, answer)| Context::new(item, &answer.text)).collect();
        let questions: Vec<_> = contexts.iter().map(|context| grader.questions(context)).collect();
        let all: Vec<_> = questions.iter().flatten().cloned().collect();
        let answers = self.patiently(|client| client.query_graders(&all))?;
        let mut left = &answers[..];
        let mut rewards = Vec::with_capacity(samples.len());
        for (context, questions) in contexts.iter().zip(&questions) {
            let (own, others) = left.split_at(questions.len().min(left.len()));
            left = others;
            let graded = grader.grade(context, own);
            measure(measured, "grader_errors", f64::from(u8::from(graded.errors.any())));
            // A failure of the grader model says nothing about the completion.
            let errors = &graded.errors;
            let lost = errors.model_grader_server_error
                || errors.model_grader_refusal_error
                || errors.model_grader_parse_error;
            if lost {
                rewards.push(f64::NAN);
                continue;
            }
            measure(measured, "reward_mean", graded.reward);
            for (name, reward) in &graded.sub_rewards {
                measure(measured, &format!("reward_{name}"), *reward);
            }
            rewards.push(graded.reward);
        }
        Ok(rewards)
    }

    /// Repeats a request that fails temporarily, [`TRIES`] times at most: a dead engine is
    /// restarted.
    fn patiently<T>(
        &self,
        mut ask: impl FnMut(&mut dyn RolloutClient) -> Result<T, CallError>,
    ) -> Result<T, TrainError> {
        let mut pause = Duration::from_millis(200);
        for _ in 1..TRIES {
            match ask(&mut *self.policy.client.borrow_mut()) {
                Ok(answer) => return Ok(answer),
                Err(error) if error.passing => {
                    tracing::warn!("the engine is asked again: {error}");
                    std::thread::sleep(pause);
                    pause = MAX_BACK_OFF.min(2 * pause);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(ask(&mut *self.policy.client.borrow_mut())?)
    }
}

impl RolloutBuffer {
    /// Adds the completions of one prompt. Completions whose gradient is zero are only counted.
    fn take_group(&mut self, group: Group, block: &Grpo) {
        let Group { prompt, answers, rewards } = group;
        let advantages = advantages(&rewards);
        let silent = advantages.iter().all(|advantage| *advantage == 0.0) && block.beta == 0.0;
        measure(&mut self.measured, "reward_std", deviation(&rewards));
        measure(&mut self.measured, "frac_reward_zero_std", f64::from(u8::from(silent)));
        for (answer, advantage) in answers.into_iter().zip(advantages) {
            let overlong = block.mask_overlong && !answer.ended;
            if block.mask_overlong {
                measure(&mut self.measured, "masked_ratio", f64::from(u8::from(overlong)));
            }
            if answer.tokens.is_empty() || overlong {
                continue;
            }
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

/// A separate random number for every prompt of a run (Steele et al. 2014, SplitMix64).
fn mixed(seed: u64, at: u64) -> u64 {
    let mut z = seed.wrapping_add(at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The batches of completions, one per optimizer step.
struct Steps<'a, 'b> {
    run: &'a GrpoTrainer<'b>,
    order: Order,
    /// (parameters) the initial values: the reference model.
    began: Vec<Tensor>,
    held: Rc<RefCell<RolloutBuffer>>,
}

impl Steps<'_, '_> {
    /// Computes the reference model's log-probabilities of the completions.
    fn compute_reference(&self, rows: &[Row]) -> Result<(), TrainError> {
        let params = self.run.model.params();
        let now: Vec<Tensor> =
            params.iter().map(|param| param.var.as_tensor().copy()).collect::<Result<_, _>>()?;
        let set = |values: &[Tensor]| {
            params.iter().zip(values).try_for_each(|(param, value)| param.var.set(value))
        };
        set(&self.began)?;
        let read = || -> Result<(), TrainError> {
            for row in rows {
                let outputs = self.run.model.outputs(&row.batch, row.wanted)?;
                let mut held = self.held.borrow_mut();
                for (answer, range) in &row.loss.answers {
                    held.answers[*answer].reference = Some(outputs.log_probs[range.clone()].into());
                }
            }
            Ok(())
        };
        let found = read();
        set(&now)?;
        found
    }

    /// The buffered completions, packed into rows of tokens.
    fn rows(&self) -> Vec<Row> {
        let (held, settings) = (self.held.borrow(), self.run.settings);
        let encoded: Vec<Encoded> = held
            .answers
            .iter()
            .map(|answer| {
                let mut trained = vec![false; answer.prompt.len()];
                trained.resize(answer.prompt.len() + answer.tokens.len(), true);
                Encoded { tokens: [&answer.prompt[..], &answer.tokens].concat(), trained }
            })
            .collect();
        let lengths: Vec<usize> = encoded.iter().map(|answer| answer.tokens.len()).collect();
        let packed = pack(&lengths, settings.max_length);
        let temperature = self.run.block.temperature;
        let row = |rows: &[crate::train::data::Row]| {
            let members: Vec<usize> = rows.iter().flat_map(|row| row.members.clone()).collect();
            let mut at = 0;
            let answers = members.iter().map(|&member| {
                let count = held.answers[member].tokens.len();
                at += count;
                (member, at - count..at)
            });
            Row {
                loss: Loss { answers: answers.collect(), objective: self.run.block.objective() },
                batch: Batch::of(members.iter().map(|&member| &encoded[member])),
                wanted: Wanted { temperature, ..Wanted::LOG_PROBS },
                held: self.held.clone(),
            }
        };
        packed.chunks(settings.micro_batch).map(row).collect()
    }
}

impl BatchSource for Steps<'_, '_> {
    type MicroBatch = Row;

    fn extent(&self) -> StepCount {
        let block = self.run.block;
        StepCount::new(self.run.train.len(), self.run.settings)
            .with_updates(block.num_iterations as u64)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Row>, TrainError> {
        let fresh = self.held.borrow().updates == 0;
        if fresh {
            let before = *cursor;
            let prompts = self.order.next(cursor, count);
            let held = self.run.sample(&prompts, &before)?;
            *self.held.borrow_mut() = held;
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

    fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        self.run.examine()
    }

    fn save(&self) -> Result<Vec<u8>, TrainError> {
        let held = self.held.borrow();
        match held.updates {
            0 => Ok(Vec::new()),
            _ => rmp_serde::to_vec(&*held).map_err(|error| std::io::Error::other(error).into()),
        }
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), TrainError> {
        if !saved.is_empty() {
            let held = rmp_serde::from_slice(saved).map_err(std::io::Error::other)?;
            *self.held.borrow_mut() = held;
        }
        Ok(())
    }
}

/// Completions that are computed in one pass.
struct Row {
    batch: Batch,
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
        self.batch.tokens.len()
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
            held.answers[*answer].old.get_or_insert_with(|| log_probs[range.clone()].into());
        }
        Ok(sums)
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        Ok(self.loss.of(&self.held.borrow(), &model.outputs(&self.batch, self.wanted)?).0)
    }
}
