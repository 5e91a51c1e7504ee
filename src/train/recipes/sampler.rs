//! Sampling of completions from the served model, and their rewards: what recipes of policies share.

use super::calls::{Calls, MAX_BACK_OFF, StartedRollouts};
use super::judge::{Comparison, Judge};
use super::{Job, TrainError};
use crate::grade::{Context, Grader};
use crate::job::rollout::{Rollout, RolloutRequest};
use crate::job::rollout_table::RolloutRow;
use crate::job::{Control, Metrics};
use crate::train::data::{Cursor, Encoded, EncodedPrompt, PreparedPrompts};
use crate::train::model::Model;
use crate::train::ops::mixed;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Number of attempts while a grader's models are not available for [`TRAIN_SHARE`] of the
/// completions of a batch.
const GRADE_TRIES: u32 = 4;
const TRAIN_SHARE: f64 = 0.5;

/// How completions are sampled and graded.
#[derive(Clone, Copy)]
pub(super) struct Sampling<'a> {
    pub reward: Reward<'a>,
    /// Completions sampled for each prompt.
    pub num_generations: usize,
    /// Maximum number of tokens of a completion.
    pub max_tokens: usize,
    pub temperature: f64,
    /// The form of the completions.
    pub response_format: Option<&'a Value>,
    /// Completions sampled for each validation prompt.
    pub eval_samples: usize,
}

/// Where rewards come from.
#[derive(Clone, Copy)]
pub(super) enum Reward<'a> {
    /// A completion is graded on its own.
    Grader(&'a Grader),
    /// The completions of a prompt are compared with each other.
    Rank(Ranking<'a>),
}

/// How completions are compared.
#[derive(Clone, Copy)]
pub(super) struct Ranking<'a> {
    /// The model that compares, and the tokens it may write before ([`Judge`]).
    pub judge: &'a str,
    pub reasoning: Option<u32>,
    /// The question about the completions of a prompt, by its number.
    pub question: &'a dyn Fn(usize) -> &'a str,
}

/// Samples and grades completions of the prompts of a job.
pub(super) struct Sampler<'a> {
    calls: Calls<'a>,
    sampling: Sampling<'a>,
    train: &'a PreparedPrompts,
    /// Prompts whose completions are graded, but not trained on.
    validation: Option<&'a PreparedPrompts>,
    batch_size: usize,
    seed: u64,
    /// Folder of files that the job needs until its end.
    cache: &'a Path,
}

/// Completions of some prompts to train on.
pub(super) struct Sampled {
    prompts: Vec<usize>,
    /// Position of the run before these prompts.
    cursor: Cursor,
    state: SampledState,
    /// Seconds in which nothing was done but to wait for them.
    seconds: f64,
}

enum SampledState {
    Started(StartedRollouts),
    /// An earlier process began to sample them, with the adapter in this file.
    Restored(PathBuf),
    /// (prompts, completions)
    Done(Vec<Vec<Rollout>>),
}

/// Completions as a checkpoint holds them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedRollouts {
    prompts: Vec<usize>,
    cursor: Cursor,
    /// (prompts, completions); `None` if they were not complete: the adapter that samples them is
    /// in a file of the job's cache.
    rollouts: Option<Vec<Vec<Rollout>>>,
}

fn encoded_prompts(
    from: &PreparedPrompts,
    prompts: &[usize],
) -> Result<Vec<EncodedPrompt>, TrainError> {
    Ok(prompts.iter().map(|&number| from.get(number)).collect::<Result<_, _>>()?)
}

/// (sum, count) of each metric, by name.
pub(super) type Measured = BTreeMap<String, (f64, f64)>;

pub(super) fn measure(measured: &mut Measured, name: &str, value: f64) {
    let found = measured.entry(name.to_owned()).or_default();
    *found = (found.0 + value, found.1 + 1.0);
}

/// The completions of one prompt.
pub(super) struct Group {
    pub prompt: Vec<u32>,
    pub completions: Vec<GradedCompletion>,
}

/// A completion with its reward.
pub(super) struct GradedCompletion {
    pub rollout: Rollout,
    /// Its row in the rollout table.
    pub row: RolloutRow,
    /// A model of the grader could not be asked about it.
    unavailable: bool,
}

/// A row of the rollout table, and whether a model of the grader could not be asked.
struct GradedRow {
    row: RolloutRow,
    unavailable: bool,
}

/// Checks that the grader's models could be asked about more than `1 - share` of the completions.
fn check_graded(groups: &[Group], share: f64) -> Result<(), TrainError> {
    let completions = || groups.iter().flat_map(|group| &group.completions);
    let lost = completions().filter(|completion| completion.unavailable);
    let (all, lost): (usize, Vec<_>) = (completions().count(), lost.collect());
    match lost.first() {
        Some(first) if lost.len() as f64 >= share * all as f64 => {
            let reason = first.row.reasons.first().cloned().unwrap_or_default();
            Err(TrainError::Ungraded { lost: lost.len(), all, reason })
        }
        _ => Ok(()),
    }
}

impl GradedCompletion {
    /// NaN for a completion without a reward.
    pub(super) fn reward(&self) -> f64 {
        self.row.reward.unwrap_or(f64::NAN)
    }
}

/// The mean absolute difference of two log-probabilities of each token of a completion, without
/// those that the engine does not know.
pub(super) fn mean_gap(trainer: &[f64], engine: &[f64]) -> Option<f64> {
    let known = trainer.iter().zip(engine).filter(|(_, engine)| !engine.is_nan());
    let gaps: Vec<f64> = known.map(|(trainer, engine)| (trainer - engine).abs()).collect();
    (!gaps.is_empty()).then(|| gaps.iter().sum::<f64>() / gaps.len() as f64)
}

impl<'a> Sampler<'a> {
    /// # Errors
    /// If the job has no served model, or the grader does not fit the data.
    pub(super) fn new(
        job: &Job<'a, PreparedPrompts>,
        sampling: Sampling<'a>,
        control: &'a Control,
    ) -> Result<Self, TrainError> {
        let calls = Calls::new(job.policy, control)?;
        if let Reward::Grader(grader) = sampling.reward {
            check_items(grader, "data.train", job.train)?;
            if let Some(validation) = job.validation {
                check_items(grader, "data.validation", validation)?;
            }
        }
        let (train, validation) = (job.train, job.validation);
        let (batch_size, seed) = (job.settings.batch_size, job.seed);
        let cache = job.making.cache;
        Ok(Self { calls, sampling, train, validation, batch_size, seed, cache })
    }

    /// Begins to sample completions to train on, with the current weights. `cursor` is the position
    /// of the run before these prompts. [`Sampler::collect`] is the next call.
    pub(super) fn start(
        &self,
        prompts: Vec<usize>,
        cursor: &Cursor,
    ) -> Result<Sampled, TrainError> {
        let request = self.training_request(&prompts, cursor)?;
        self.calls.export()?;
        let state = SampledState::Started(self.calls.start(request)?);
        Ok(Sampled { prompts, cursor: *cursor, state, seconds: 0.0 })
    }

    fn training_request(
        &self,
        prompts: &[usize],
        cursor: &Cursor,
    ) -> Result<RolloutRequest, TrainError> {
        let first = (cursor.epoch << 32) + cursor.taken;
        let seeds = (0..prompts.len() as u64).map(|at| mixed(self.seed, first + at)).collect();
        let encoded = encoded_prompts(self.train, prompts)?;
        Ok(self.request(&encoded, seeds, self.sampling.num_generations))
    }

    /// Waits until the completions are sampled.
    pub(super) fn collect(&self, sampled: &mut Sampled) -> Result<(), TrainError> {
        let since = Instant::now();
        let rollouts = match &mut sampled.state {
            SampledState::Done(_) => return Ok(()),
            SampledState::Started(started) => self.calls.collect(started)?,
            SampledState::Restored(adapter) => {
                let request = self.training_request(&sampled.prompts, &sampled.cursor)?;
                self.calls.export_kept(adapter)?;
                self.calls.generate(&request)?
            }
        };
        sampled.seconds = since.elapsed().as_secs_f64();
        sampled.state = SampledState::Done(rollouts);
        Ok(())
    }

    /// The file that holds the adapter which samples the completions after a position.
    fn adapter_file(&self, cursor: &Cursor) -> PathBuf {
        self.cache.join(format!("policy-{}-{}.gguf", cursor.epoch, cursor.taken))
    }

    /// Completions for a checkpoint. It does not wait for them: what is being sampled is sampled
    /// again by the process that resumes, with the same adapter.
    ///
    /// # Errors
    /// If the adapter cannot be kept.
    pub(super) fn save(&self, sampled: &Sampled) -> Result<SavedRollouts, TrainError> {
        let Sampled { prompts, cursor, state, .. } = sampled;
        let rollouts = match state {
            SampledState::Done(rollouts) => Some(rollouts.clone()),
            SampledState::Restored(_) => None,
            SampledState::Started(_) => {
                self.calls.keep_adapter(&self.adapter_file(cursor))?;
                None
            }
        };
        Ok(SavedRollouts { prompts: prompts.clone(), cursor: *cursor, rollouts })
    }

    /// What [`Sampler::save`] returned.
    pub(super) fn restore(&self, saved: SavedRollouts) -> Sampled {
        let SavedRollouts { prompts, cursor, rollouts } = saved;
        let state = match rollouts {
            Some(rollouts) => SampledState::Done(rollouts),
            None => SampledState::Restored(self.adapter_file(&cursor)),
        };
        Sampled { prompts, cursor, state, seconds: 0.0 }
    }

    /// Grades completions that are sampled, and waits for them before if necessary.
    pub(super) fn graded(
        &self,
        sampled: &mut Sampled,
        measured: &mut Measured,
    ) -> Result<Vec<Group>, TrainError> {
        self.collect(sampled)?;
        let SampledState::Done(rollouts) = &sampled.state else {
            unreachable!("the completions have been collected")
        };
        let prompts = encoded_prompts(self.train, &sampled.prompts)?;
        // If grading fails, the completions are graded again later.
        let rollouts = rollouts.clone();
        measure(measured, "rollout_seconds", sampled.seconds);
        let groups = self.groups(&sampled.prompts, prompts, rollouts, TRAIN_SHARE, measured)?;
        check_graded(&groups, TRAIN_SHARE)?;
        Ok(groups)
    }

    /// Mean rewards of completions of the validation prompts. The same random seeds are used each
    /// time.
    pub(super) fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        // Compared with each other, the completions of a prompt have a mean reward of one half.
        let (Some(held_out), Reward::Grader(_)) = (self.validation, self.sampling.reward) else {
            return Ok(None);
        };
        let mut measured = Measured::new();
        self.calls.export()?;
        let (all, mut groups): (Vec<usize>, _) = ((0..held_out.len()).collect(), Vec::new());
        for prompts in all.chunks(self.batch_size) {
            let seeds = prompts.iter().map(|&number| mixed(!self.seed, number as u64)).collect();
            let encoded = encoded_prompts(held_out, prompts)?;
            let request = self.request(&encoded, seeds, self.sampling.eval_samples);
            let started = Instant::now();
            let rollouts = self.calls.generate(&request)?;
            measure(&mut measured, "rollout_seconds", started.elapsed().as_secs_f64());
            groups.extend(self.groups(prompts, encoded, rollouts, 1.0, &mut measured)?);
        }
        // An answer that no judge can be asked about, because it is too long, must not end every
        // evaluation.
        check_graded(&groups, 1.0)?;
        let mean = |(name, (sum, count)): (String, (f64, f64))| (name, sum / count);
        Ok(Some(measured.into_iter().map(mean).collect()))
    }

    fn request(
        &self,
        prompts: &[EncodedPrompt],
        seeds: Vec<u64>,
        answers: usize,
    ) -> RolloutRequest {
        let sampling = self.sampling;
        RolloutRequest {
            prompts: prompts.iter().map(|prompt| prompt.tokens.clone()).collect(),
            seeds,
            answers: answers as u32,
            max_tokens: sampling.max_tokens as u32,
            temperature: sampling.temperature as f32,
            response_format: sampling.response_format.cloned(),
            skip_too_long: false,
        }
    }

    /// Grades the completions of some prompts.
    fn groups(
        &self,
        numbers: &[usize],
        prompts: Vec<EncodedPrompt>,
        sampled: Vec<Vec<Rollout>>,
        share: f64,
        measured: &mut Measured,
    ) -> Result<Vec<Group>, TrainError> {
        let samples: Vec<(&Value, &Rollout)> = prompts
            .iter()
            .zip(&sampled)
            .flat_map(|(prompt, group)| group.iter().map(|answer| (&prompt.item, answer)))
            .collect();
        for (_, answer) in &samples {
            measure(measured, "completion_length", answer.tokens.len() as f64);
            measure(measured, "terminated_ratio", f64::from(u8::from(answer.ended)));
        }
        let started = Instant::now();
        let rows = match self.sampling.reward {
            Reward::Grader(grader) => self.grade(grader, &samples, share)?,
            Reward::Rank(ranking) => self.rank(ranking, numbers, &prompts, &sampled)?,
        };
        for GradedRow { row, .. } in &rows {
            measure(measured, "grader_errors", f64::from(u8::from(!row.reasons.is_empty())));
            let Some(reward) = row.reward else { continue };
            measure(measured, "reward_mean", reward);
            for (name, reward) in &row.sub_rewards {
                measure(measured, &format!("reward_{name}"), *reward);
            }
        }
        measure(measured, "grade_seconds", started.elapsed().as_secs_f64());
        let mut rows = rows.into_iter();
        let mut groups = Vec::with_capacity(prompts.len());
        for ((number, prompt), rollouts) in numbers.iter().zip(&prompts).zip(sampled) {
            let graded = rollouts.into_iter().zip(rows.by_ref());
            let completions = graded
                .map(|(rollout, graded)| {
                    let GradedRow { row, unavailable } = graded;
                    let row = RolloutRow { prompt: *number, item: prompt.item.clone(), ..row };
                    GradedCompletion { rollout, row, unavailable }
                })
                .collect();
            groups.push(Group { prompt: prompt.tokens.clone(), completions });
        }
        Ok(groups)
    }

    /// (completions) rows with rewards, but without the prompt. Each completion is compared with the
    /// next one of its prompt, and the last one with the first.
    fn rank(
        &self,
        ranking: Ranking,
        numbers: &[usize],
        prompts: &[EncodedPrompt],
        sampled: &[Vec<Rollout>],
    ) -> Result<Vec<GradedRow>, TrainError> {
        let Ranking { judge: model, reasoning, question } = ranking;
        let judge = Judge { calls: self.calls, model, reasoning };
        let rollouts: Vec<&Rollout> = sampled.iter().flatten().collect();
        let (mut pairs, mut comparisons, mut first) = (Vec::new(), Vec::new(), 0);
        for ((&number, prompt), group) in numbers.iter().zip(prompts).zip(sampled) {
            // Two completions make one pair.
            let count = if group.len() > 2 { group.len() } else { group.len().saturating_sub(1) };
            for at in 0..count {
                let pair = [first + at, first + (at + 1) % group.len()];
                let answers = pair.map(|at| rollouts[at].text.as_str());
                pairs.push(pair);
                // Equal ones need no judge.
                if answers[0] != answers[1] {
                    let (messages, question) = (&prompt.item["messages"], question(number));
                    comparisons.push(Comparison { messages, principle: "", question, answers });
                }
            }
            first += group.len();
        }
        let mut found = judge.compare(&comparisons)?.into_iter();
        // (completions) the sum and the number of its probabilities of being the better one.
        let mut wins = vec![(0.0, 0.0); rollouts.len()];
        for [one, other] in pairs {
            let equal = rollouts[one].text == rollouts[other].text;
            let judged =
                if equal { Some(0.5) } else { found.next().flatten().map(|p| p.probability()) };
            let Some(p) = judged else { continue };
            for (at, p) in [(one, p), (other, 1.0 - p)] {
                wins[at] = (wins[at].0 + p, wins[at].1 + 1.0);
            }
        }
        let row = |(rollout, (sum, count)): (&&Rollout, (f64, f64))| {
            let lost = (count == 0.0).then(|| "the judge gave no answer".to_owned());
            let row = RolloutRow {
                completion: rollout.text.clone(),
                tokens: rollout.tokens.len(),
                ended: rollout.ended,
                reward: (count > 0.0).then(|| sum / count),
                reasons: lost.into_iter().collect(),
                ..RolloutRow::default()
            };
            GradedRow { row, unavailable: false }
        };
        Ok(rollouts.iter().zip(wins).map(row).collect())
    }

    /// (completions) rows with rewards, but without the prompt. While the grader's models cannot be
    /// asked about `share` of the completions or more, they are asked again, [`GRADE_TRIES`] times
    /// at most.
    fn grade(
        &self,
        grader: &Grader,
        samples: &[(&Value, &Rollout)],
        share: f64,
    ) -> Result<Vec<GradedRow>, TrainError> {
        let (mut pause, mut attempt) = (Duration::from_millis(200), 1);
        loop {
            let rows = self.grade_once(grader, samples)?;
            let down = rows.iter().filter(|row| row.unavailable).count();
            if attempt == GRADE_TRIES || down == 0 || (down as f64) < share * rows.len() as f64 {
                return Ok(rows);
            }
            tracing::warn!("{down} of {} answers are graded again", rows.len());
            self.calls.wait(pause)?;
            (pause, attempt) = (MAX_BACK_OFF.min(4 * pause), attempt + 1);
        }
    }

    fn grade_once(
        &self,
        grader: &Grader,
        samples: &[(&Value, &Rollout)],
    ) -> Result<Vec<GradedRow>, TrainError> {
        let contexts: Vec<Context> =
            samples.iter().map(|(item, answer)| Context::new(item, &answer.text)).collect();
        let questions: Vec<_> = contexts.iter().map(|context| grader.questions(context)).collect();
        let all: Vec<_> = questions.iter().flatten().cloned().collect();
        let answers = self.calls.query(&all)?;
        let mut left = &answers[..];
        let mut rows = Vec::with_capacity(samples.len());
        for ((context, questions), (_, answer)) in contexts.iter().zip(&questions).zip(samples) {
            let (own, others) = left.split_at(questions.len().min(left.len()));
            left = others;
            let graded = grader.grade(context, own);
            // A failure of the grader model says nothing about the completion.
            let errors = &graded.errors;
            let lost = errors.model_grader_server_error
                || errors.model_grader_refusal_error
                || errors.model_grader_parse_error;
            let unavailable = errors.model_grader_server_error;
            let row = RolloutRow {
                completion: answer.text.clone(),
                tokens: answer.tokens.len(),
                ended: answer.ended,
                reward: (!lost).then_some(graded.reward),
                sub_rewards: graded.sub_rewards,
                reasons: graded.reasons,
                ..RolloutRow::default()
            };
            rows.push(GradedRow { row, unavailable });
        }
        Ok(rows)
    }
}

/// The weights with which a process began, before a checkpoint is restored: the initial model, which
/// the policy is compared with.
pub(super) struct ReferenceModel {
    /// (parameters)
    weights: Vec<Tensor>,
}

impl ReferenceModel {
    /// # Errors
    /// If memory cannot be allocated.
    pub(super) fn of(model: &Model) -> candle_core::Result<Self> {
        let params = model.params().iter();
        let weights = params.map(|param| param.var.as_tensor().copy()).collect::<Result<_, _>>()?;
        Ok(Self { weights })
    }

    /// Runs `compute` while `model` has the initial weights.
    ///
    /// # Errors
    /// Those of `compute`.
    pub(super) fn with<T>(
        &self,
        model: &Model,
        compute: impl FnOnce() -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let set = |weights: &[Tensor]| {
            model.params().iter().zip(weights).try_for_each(|(param, value)| param.var.set(value))
        };
        let now = Self::of(model)?;
        set(&self.weights)?;
        let found = compute();
        set(&now.weights)?;
        found
    }
}

/// A prompt and its completion as a training example.
pub(super) fn encoded(prompt: &[u32], tokens: &[u32]) -> Encoded {
    let mut trained = vec![false; prompt.len()];
    trained.resize(prompt.len() + tokens.len(), true);
    Encoded { tokens: [prompt, tokens].concat(), trained }
}

/// The numbers of items, in groups of consecutive ones with the same prompt.
pub(super) fn consecutive<T>(items: &[T], prompt: impl Fn(&T) -> &[u32]) -> Vec<Vec<usize>> {
    let mut next = 0;
    let group = |group: &[T]| {
        let start = next;
        next += group.len();
        (start..next).collect()
    };
    items.chunk_by(|one, other| prompt(one) == prompt(other)).map(group).collect()
}

/// Checks that every template of a grader can be filled from every item. A missing key would set
/// all rewards of an item to 0 without an error.
pub(super) fn check_items(
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
