//! The stages of the pipeline, and what they share.

use super::super::calls::Calls;
use super::super::grpo::GrpoTrainer;
use super::super::judge::Judge;
use super::super::preference::PreferenceTrainer;
use super::super::sampler::{Ranking, ReferenceModel, Reward, check_items};
use super::super::sft::SftTrainer;
use super::super::{Event, Job, Outcome, TrainError};
use super::evaluate::Phase;
use super::report::{Report, reasons};
use super::table::lines;
use super::{compare, evaluate, revise};
use crate::dataset::Chat;
use crate::job::rollout::{Rollout, RolloutRequest};
use crate::job::spec::{Constitutional, PreferenceMethod, Principle, Stage};
use crate::job::{Control, StepMetrics, Validation, write_whole};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Dataset, Prepared, PreparedPairs, PreparedPrompts};
use crate::train::ops::mixed;
use serde::Serialize;
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const RANKED: Purpose = Purpose(0x7261_6e6b);
/// Interval of progress messages.
const TOLD: Duration = Duration::from_secs(10);

/// A run of the pipeline.
pub(super) struct Pipeline<'a> {
    pub block: &'a Constitutional,
    pub job: &'a Job<'a, PreparedPrompts>,
    pub calls: Calls<'a>,
    pub judge: Judge<'a>,
    /// The weights before training.
    pub reference: ReferenceModel,
    control: &'a Control,
}

/// The number of trained tokens and of steps of a stage, or `None` if it was stopped.
type Trained = Option<(u64, u64)>;

impl<'a> Pipeline<'a> {
    pub(super) fn new(
        block: &'a Constitutional,
        job: &'a Job<'a, PreparedPrompts>,
        calls: Calls<'a>,
        control: &'a Control,
    ) -> Result<Self, TrainError> {
        let model = block.judge.as_deref().unwrap_or(job.making.model_name);
        let reasoning = block.chain_of_thought.then_some(block.chain_of_thought_tokens as u32);
        let judge = Judge { calls, model, reasoning };
        check_prompts(block, "data.train", job.train)?;
        if let Some(validation) = job.validation {
            check_prompts(block, "data.validation", validation)?;
        }
        std::fs::create_dir_all(job.making.folder)?;
        let reference = ReferenceModel::of(job.model)?;
        Ok(Self { block, job, calls, judge, reference, control })
    }

    /// Carries out the stages. Each goes on where an earlier process of the job ended: its examples
    /// are in a file, and its weights in checkpoints.
    pub(super) fn run(&self, event: &mut dyn FnMut(Event)) -> Result<Outcome, TrainError> {
        let mut report = Report::new(self.judge.model, self.block.judge.is_none());
        report.human = evaluate::measure_judge(self, event)?;
        let before = evaluate::answers(self, Phase::Before, event)?;
        let mut trained = (0, 0);
        if self.block.runs(Stage::Revise) {
            let rows = revise::revise(self, event)?;
            report.revised(&rows, self.block);
            let Some(more) = self.learn_revisions(&rows, event)? else {
                return Ok(Outcome::Stopped);
            };
            trained = more;
        }
        // A job that is asked to finish keeps what it has learned: it begins no stage, but goes on
        // with one that an earlier process has begun.
        let begun = !self.preference_checkpoints(1)?.steps()?.is_empty();
        if self.block.runs(Stage::Compare) && (begun || !self.control.finishes()) {
            let more = match self.block.preference_method {
                PreferenceMethod::Dpo => {
                    let rows = compare::compare(self, event)?;
                    report.compared(&rows);
                    self.learn_preferences(&rows, trained.1, event)?
                }
                PreferenceMethod::Rank => self.learn_from_judge(trained.1, event)?,
            };
            let Some(more) = more else { return Ok(Outcome::Stopped) };
            trained = (trained.0 + more.0, trained.1 + more.1);
        }
        let after = evaluate::answers(self, Phase::After, event)?;
        report.evaluated(evaluate::evaluate(self, &before, &after, event)?);
        let write = |name: &str, bytes: &[u8]| write_whole(&self.file(name), bytes);
        write(
            "constitutional.json",
            &serde_json::to_vec_pretty(&report).map_err(std::io::Error::other)?,
        )?;
        write("constitutional.html", report.html().map_err(std::io::Error::other)?.as_bytes())?;
        event(Event::Evaluated(Validation {
            step: trained.1,
            loss: None,
            accuracy: None,
            bits_per_byte: None,
            metrics: report.metrics(),
        }));
        event(Event::Note { text: report.summary() });
        Ok(Outcome::Done { tokens: trained.0 })
    }

    /// The checkpoints of training on preferences.
    fn preference_checkpoints(&self, keep: usize) -> Result<Checkpoints, TrainError> {
        Ok(Checkpoints::new(&self.job.making.cache.join("preference"), keep)?)
    }

    /// A file of the job's examples.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.job.making.folder.join(name)
    }

    /// Supervised fine-tuning on the kept revisions and on the answers to helpful prompts.
    fn learn_revisions(
        &self,
        rows: &[revise::Revised],
        event: &mut dyn FnMut(Event),
    ) -> Result<Trained, TrainError> {
        let examples: Vec<Value> = rows.iter().filter_map(revise::Revised::example).collect();
        if examples.is_empty() {
            return Err(TrainError::Spec(format!(
                "constitutional: no revision was kept ({}). Try another constitution or examples, a \
                 larger model, or lower constitutional.min_preferred and min_on_topic",
                reasons(rows.iter().filter_map(|row| row.dropped.as_deref()))
            )));
        }
        let most = self.job.settings.max_length;
        let data: Prepared = self.prepare("sft", &examples, most, event)?;
        let trainer = SftTrainer {
            model: self.job.model,
            settings: self.job.settings,
            train: &data,
            validation: None,
            checkpoints: self.job.checkpoints,
            shuffle: self.job.shuffle,
        };
        let text = format!("Supervised fine-tuning on {} examples.", examples.len());
        event(Event::Note { text });
        let mut steps = 0;
        let outcome = trainer.run(self.control, |what| {
            if let Event::Step(StepMetrics { step, .. }) | Event::Resumed { step } = &what {
                steps = *step;
            }
            event(what);
        })?;
        Ok(match outcome {
            Outcome::Done { tokens } => Some((tokens, steps)),
            Outcome::Stopped => None,
        })
    }

    /// DPO on the kept pairs. The reference is the model after `before` steps of fine-tuning.
    fn learn_preferences(
        &self,
        rows: &[compare::Compared],
        before: u64,
        event: &mut dyn FnMut(Event),
    ) -> Result<Trained, TrainError> {
        let pairs: Vec<Value> = rows.iter().filter_map(|row| row.example(self.block)).collect();
        if pairs.is_empty() {
            let text = format!(
                "No pair was kept, so there is no training on preferences ({}).",
                reasons(rows.iter().filter_map(|row| row.dropped.as_deref()))
            );
            event(Event::Note { text });
            return Ok(Some((0, 0)));
        }
        let settings = self.block.preference_settings(self.job.settings);
        let data: PreparedPairs =
            self.prepare("preferences", &pairs, settings.max_length, event)?;
        let loss = self.block.preference_loss();
        let checkpoints = self.preference_checkpoints(settings.keep_checkpoints)?;
        let trainer = PreferenceTrainer {
            model: self.job.model,
            settings: &settings,
            objective: &loss,
            train: &data,
            validation: None,
            checkpoints: &checkpoints,
            shuffle: self.job.shuffle,
            reference: self.job.reference,
        };
        event(Event::Note { text: format!("Training on {} preferences (DPO).", pairs.len()) });
        let mut steps = Continued { before, steps: 0 };
        let outcome = trainer.run(self.control, |what| steps.tell(what, event))?;
        Ok(steps.trained(outcome))
    }

    /// GRPO with the judge's comparisons of the model's own completions as reward.
    fn learn_from_judge(
        &self,
        before: u64,
        event: &mut dyn FnMut(Event),
    ) -> Result<Trained, TrainError> {
        let settings = self.block.preference_settings(self.job.settings);
        let checkpoints = self.preference_checkpoints(settings.keep_checkpoints)?;
        let job = Job { settings: &settings, checkpoints: &checkpoints, ..*self.job };
        let helpful: Vec<bool> = (0..job.train.len())
            .map(|prompt| Ok(is_helpful(&job.train.get(prompt)?.item)))
            .collect::<Result<_, TrainError>>()?;
        let question = |prompt: usize| match helpful[prompt] {
            true => evaluate::HELPFULNESS.1,
            false => self.principle(self.seed(RANKED, prompt)).comparison.as_str(),
        };
        let (judge, reasoning) = (self.judge.model, self.judge.reasoning);
        let ranking = Ranking { judge, reasoning, question: &question };
        let policy = self.block.policy(judge);
        let trainer = GrpoTrainer::new(&job, &policy, Reward::Rank(ranking), self.control)?;
        event(Event::Note { text: "Training with the judge as reward (GRPO).".into() });
        let mut steps = Continued { before, steps: 0 };
        let outcome = trainer.run(self.control, |what| steps.tell(what, event))?;
        Ok(steps.trained(outcome))
    }

    /// Writes examples to a file of the job, and tokenizes them.
    fn prepare<D: Dataset<Encoder = crate::train::data::Encoder>>(
        &self,
        name: &str,
        examples: &[impl Serialize],
        max_length: usize,
        event: &mut dyn FnMut(Event),
    ) -> Result<D, TrainError> {
        let file = self.file(&format!("{name}.jsonl"));
        write_whole(&file, &lines(examples)?)?;
        let cache = self.job.making.cache.join(format!("{name}.tokens"));
        let (data, report) = D::prepare(&file, self.job.making.encoder, max_length, &cache)?;
        if report.truncated + report.dropped > 0 {
            let text = format!(
                "Of {} examples {} were cut at max_length, and {} left out because of it.",
                report.examples, report.truncated, report.dropped
            );
            event(Event::Note { text });
        }
        Ok(data)
    }

    /// Samples `answers` completions of each conversation. `None` for one that leaves no room for
    /// an answer in the model's context.
    pub(super) fn sample(
        &self,
        conversations: &[Vec<Value>],
        seeds: &[u64],
        answers: u32,
    ) -> Result<Vec<Option<Vec<Rollout>>>, TrainError> {
        let mut request = RolloutRequest {
            prompts: Vec::new(),
            seeds: Vec::new(),
            answers,
            max_tokens: self.block.max_tokens as u32,
            temperature: self.block.temperature as f32,
            response_format: None,
            skip_too_long: true,
        };
        let mut fits = Vec::with_capacity(conversations.len());
        for (messages, seed) in conversations.iter().zip(seeds) {
            let trained = vec![false; messages.len()];
            let chat = Chat { messages: messages.clone(), trained, tools: None };
            let tokens = self.job.making.encoder.prompt(&chat).map_err(TrainError::Spec)?;
            fits.push(tokens.len() + self.block.max_tokens <= self.job.making.context);
            if fits[fits.len() - 1] {
                request.prompts.push(tokens);
                request.seeds.push(*seed);
            }
        }
        let mut sampled = match request.prompts.is_empty() {
            true => Vec::new().into_iter(),
            false => self.calls.generate(&request)?.into_iter(),
        };
        // A prompt that the server finds too long has no completions.
        let mut next = || sampled.next().filter(|found| !found.is_empty());
        Ok(fits.into_iter().map(|fits| if fits { next() } else { None }).collect())
    }

    /// A random number of a purpose and a prompt.
    pub(super) fn seed(&self, purpose: Purpose, prompt: usize) -> u64 {
        mixed(mixed(self.job.seed, purpose.0), prompt as u64)
    }

    /// A principle, drawn by weight.
    pub(super) fn principle(&self, seed: u64) -> &'a Principle {
        let principles = &self.block.constitution.principles;
        let total: f64 = principles.iter().map(|principle| principle.weight).sum();
        let mut left = (mixed(seed, 1) >> 11) as f64 / (1u64 << 53) as f64 * total;
        let found = principles.iter().find(|principle| {
            left -= principle.weight;
            left < 0.0
        });
        found.unwrap_or(&principles[principles.len() - 1])
    }

    /// Passes the numbers from `done` to `total` to `each`, a batch at a time, and reports progress.
    pub(super) fn batches(
        &self,
        what: &str,
        done: usize,
        total: usize,
        event: &mut dyn FnMut(Event),
        mut each: impl FnMut(&[usize]) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let mut told: Option<Instant> = None;
        let numbers: Vec<usize> = (done..total).collect();
        for batch in numbers.chunks(self.job.settings.batch_size) {
            self.calls.check_stop()?;
            if told.is_none_or(|told| told.elapsed() > TOLD) {
                event(Event::Note { text: format!("{what}: {} of {total}.", batch[0]) });
                told = Some(Instant::now());
            }
            each(batch)?;
        }
        if done < total {
            event(Event::Note { text: format!("{what}: {total} of {total}.") });
        }
        Ok(())
    }
}

/// Counts the steps of a stage after those of the stage before.
struct Continued {
    before: u64,
    steps: u64,
}

impl Continued {
    fn tell(&mut self, what: Event, event: &mut dyn FnMut(Event)) {
        match what {
            Event::Step(step) => {
                self.steps = step.step;
                let (number, total) = (self.before + step.step, self.before + step.total_steps);
                event(Event::Step(StepMetrics { step: number, total_steps: total, ..step }));
            }
            Event::Resumed { step } => {
                self.steps = step;
                event(Event::Resumed { step: self.before + step });
            }
            Event::Rollouts(mut rows) => {
                rows.iter_mut().for_each(|row| row.step += self.before);
                event(Event::Rollouts(rows));
            }
            // Its adapter would replace those of the checkpoints of fine-tuning.
            Event::Checkpoint { .. } => {}
            other => event(other),
        }
    }

    fn trained(&self, outcome: Outcome) -> Trained {
        match outcome {
            Outcome::Done { tokens } => Some((tokens, self.steps)),
            Outcome::Stopped => None,
        }
    }
}

/// Checks the keys of the prompts that this kind reads, and those that its graders read.
fn check_prompts(
    block: &Constitutional,
    param: &'static str,
    prompts: &PreparedPrompts,
) -> Result<(), TrainError> {
    for number in 0..prompts.len() {
        let item = prompts.get(number)?.item;
        let wrong =
            |why: &str| Err(TrainError::Spec(format!("{param}: prompt {}: {why}", number + 1)));
        match (&item["helpful"], &item["answer"]) {
            _ if !item["tools"].is_null() => return wrong("tools are not supported by this kind"),
            (Value::Null | Value::Bool(false), _) => {}
            (Value::Bool(true), Value::Null) => {}
            (Value::Bool(true), Value::String(answer)) if !answer.trim().is_empty() => {}
            (Value::Bool(true), _) => return wrong("`answer` is empty or not a string"),
            _ => return wrong("`helpful` is neither true nor false"),
        }
    }
    block.graders.values().try_for_each(|grader| check_items(grader, param, prompts))
}

/// What a random number is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Purpose(pub u64);

/// A message of a conversation.
pub(super) fn message(role: &str, content: &str) -> Value {
    serde_json::json!({"role": role, "content": content})
}

/// The messages of a prompt.
pub(super) fn messages(item: &Value) -> Vec<Value> {
    item["messages"].as_array().cloned().unwrap_or_default()
}

/// Whether a prompt is marked as one that needs no principle: its answer is trained on as it is, and
/// measured apart.
pub(super) fn is_helpful(item: &Value) -> bool {
    item["helpful"].as_bool() == Some(true)
}
