//! The loop that recipes share: take a batch, step, evaluate, save.

use crate::dataset::DataError;
use crate::gguf::GgufError;
use crate::job::spec::Resolved;
use crate::job::{Metrics, StepMetrics, Validation};
use crate::train::checkpoint::{CheckpointError, Checkpoints};
use crate::train::data::Cursor;
use crate::train::model::{Batch, Gradients, Model, Pass};
use crate::train::ops::Losses;
use crate::train::optim::Optimization;
use crate::train::rollout::RolloutError;
use crate::train::tokenizer_training::VocabularyError;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Why training ended early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("the data cannot be read: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error("step {step}: the loss is {loss}: lower the learning rate, or look at the data")]
    NotFinite { step: u64, loss: f64 },
    #[error("the served model does not answer: {0}")]
    Rollout(#[from] RolloutError),
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A key of the spec, and what it may be.
    #[error("{0}")]
    Spec(String),
    /// The optimizer refused its gradients: they are not finite.
    #[error("step {step}: {source}: lower the learning rate, or look at the data")]
    Update { step: u64, source: candle_core::Error },
}

/// What a recipe reports while it runs. The reporter fills in `eta_seconds` and `memory_bytes` of a step.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    Resumed {
        step: u64,
    },
    Step(StepMetrics),
    Evaluated(Validation),
    /// What the model writes by now (pretraining).
    Sample {
        step: u64,
        text: String,
    },
    Checkpoint {
        step: u64,
    },
    /// What else people may want to know.
    Note {
        text: String,
    },
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done {
        /// Of all steps, whether trained or context.
        tokens: u64,
    },
    /// Told to stop; a checkpoint was written.
    Stopped,
}

/// Where a run stands, besides weights and moments.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    cursor: Cursor,
    tokens: u64,
    /// Time spent, before and after resuming.
    #[serde(default)]
    seconds: f64,
    /// [`BatchSource::save`].
    #[serde(default, with = "serde_bytes", skip_serializing_if = "Vec::is_empty")]
    source: Vec<u8>,
}

/// What is computed at once.
pub(super) trait MicroBatch {
    /// Trained or context.
    fn tokens(&self) -> usize;

    /// The loss, and its gradients added to `gradients`.
    fn train(
        &self,
        model: &Model,
        pass: Pass,
        gradients: &mut Gradients,
    ) -> Result<LossSums, TrainError>;

    /// The loss alone.
    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError>;
}

impl MicroBatch for Batch {
    fn tokens(&self) -> usize {
        self.tokens.len()
    }

    fn train(
        &self,
        model: &Model,
        pass: Pass,
        gradients: &mut Gradients,
    ) -> Result<LossSums, TrainError> {
        LossSums::of(self, &model.train(self, pass, gradients)?)
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        LossSums::of(self, &model.losses(self)?)
    }
}

/// Where a step's parts come from.
pub(super) trait BatchSource {
    type MicroBatch: MicroBatch;

    /// How far the run goes.
    fn extent(&self) -> StepCount;

    /// The next `count` examples, in the parts that are computed at once; moves the cursor on.
    fn next(
        &mut self,
        cursor: &mut Cursor,
        count: usize,
    ) -> Result<Vec<Self::MicroBatch>, TrainError>;

    /// What a checkpoint keeps of a step that is not over.
    fn save(&self) -> Result<Vec<u8>, TrainError> {
        Ok(Vec::new())
    }

    /// Takes up what a checkpoint kept.
    fn restore(&mut self, _saved: &[u8]) -> Result<(), TrainError> {
        Ok(())
    }

    /// Gives `each` all that is held out, part by part; `false` if nothing is.
    fn held_out(&self, _each: &mut Each<Self::MicroBatch>) -> Result<bool, TrainError> {
        Ok(false)
    }

    /// What counts of the step beside the parts that [`BatchSource::next`] gave: their weight in the loss, and
    /// what was measured. A step may be of nothing else.
    fn extra_losses(&self) -> LossSums {
        LossSums::default()
    }

    /// What is measured of all that is held out, where that is no loss.
    fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        Ok(None)
    }

    /// Bytes of text that a part's targets stand for, if that is of interest.
    fn bytes(&self, _: &Self::MicroBatch) -> Option<u64> {
        None
    }

    /// What the model writes by now.
    fn sample(&self, _step: u64) -> Result<Option<String>, TrainError> {
        Ok(None)
    }
}

pub(super) type Each<'a, P> = dyn FnMut(P) -> Result<(), TrainError> + 'a;

/// A run over some source.
pub(super) struct Run<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub checkpoints: &'a Checkpoints,
}

impl Run<'_> {
    /// Trains from the newest checkpoint to the end, or until told to stop.
    pub fn run(
        &self,
        source: &mut impl BatchSource,
        stop: &AtomicBool,
        event: &mut impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let (settings, params) = (self.settings, self.model.params());
        let mut optimization = Optimization::new(settings.optimizer.clone());
        let (mut step, mut state) = (0, State::default());
        if let Some(restored) = self.checkpoints.newest::<State>()? {
            restored.apply(params, &mut optimization)?;
            (step, state) = (restored.step, restored.state);
            source.restore(&state.source)?;
            event(Event::Resumed { step });
        }
        let extent = source.extent();
        let total = extent.steps;
        let warmup = (total as f64 * settings.warmup).ceil() as u64;
        let limit = settings.max_minutes.map_or(f64::INFINITY, |minutes| minutes * 60.0);
        while step < total && state.seconds < limit {
            if stop.load(Ordering::Relaxed) {
                state.source = source.save()?;
                self.save(step, &optimization, &state, event)?;
                return Ok(Outcome::Stopped);
            }
            let started = Instant::now();
            let due = extent.due(&state.cursor);
            let parts = source.next(&mut state.cursor, due)?;
            let factor = settings.schedule.factor(step, total, warmup);
            step += 1;
            let (sums, gradients) = self.gradients(&parts, source.extra_losses(), step)?;
            let rate = settings.learning_rate;
            let stepped = optimization
                .step(params, &gradients, sums.divisor(), rate, factor)
                .map_err(|source| TrainError::Update { step, source })?;
            let tokens: usize = parts.iter().map(MicroBatch::tokens).sum();
            state.tokens += tokens as u64;
            let due = state.seconds + started.elapsed().as_secs_f64() >= limit;
            let last = step == total || due;
            event(Event::Step(StepMetrics {
                step,
                total_steps: total,
                epoch: extent.epochs(&state.cursor),
                loss: sums.loss / sums.divisor(),
                accuracy: sums.correct.map(|correct| correct / sums.divisor()),
                learning_rate: rate * factor,
                grad_norm: stepped.grad_norm,
                tokens: state.tokens,
                tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
                eta_seconds: 0.0,
                memory_bytes: 0,
                last,
                metrics: sums.metrics(),
            }));
            if last || step.is_multiple_of(settings.eval_every) {
                self.report(source, step, event)?;
            }
            state.seconds += started.elapsed().as_secs_f64();
            if last || step.is_multiple_of(settings.checkpoint_every) {
                state.source = source.save()?;
                self.save(step, &optimization, &state, event)?;
            }
        }
        Ok(Outcome::Done { tokens: state.tokens })
    }

    fn save(
        &self,
        step: u64,
        optimization: &Optimization,
        state: &State,
        event: &mut impl FnMut(Event),
    ) -> Result<(), TrainError> {
        self.checkpoints.write(step, self.model.params(), optimization, state)?;
        event(Event::Checkpoint { step });
        Ok(())
    }

    fn report(
        &self,
        source: &impl BatchSource,
        step: u64,
        event: &mut impl FnMut(Event),
    ) -> Result<(), TrainError> {
        if let Some(evaluated) = self.evaluate(source, step)? {
            event(Event::Evaluated(evaluated));
        }
        if let Some(text) = source.sample(step)? {
            event(Event::Sample { step, text });
        }
        Ok(())
    }

    fn gradients(
        &self,
        parts: &[impl MicroBatch],
        extra_losses: LossSums,
        step: u64,
    ) -> Result<(LossSums, Vec<candle_core::Tensor>), TrainError> {
        let mut gradients = Gradients::default();
        let mut sums = extra_losses;
        let checkpoint = self.settings.activation_checkpointing;
        for (number, part) in (0u64..).zip(parts) {
            let pass = Pass { number: step << 32 | number, checkpoint };
            sums.add(part.train(self.model, pass, &mut gradients)?);
        }
        if !sums.loss.is_finite() {
            return Err(TrainError::NotFinite { step, loss: sums.loss / sums.weight });
        }
        let params = self.model.params();
        if parts.is_empty() {
            let zeros = params.iter().map(|param| param.var.zeros_like());
            return Ok((sums, zeros.collect::<Result<_, _>>()?));
        }
        Ok((sums, gradients.take(params)?))
    }

    /// The loss over all that is held out, or what else is measured of it.
    pub fn evaluate(
        &self,
        source: &impl BatchSource,
        step: u64,
    ) -> Result<Option<Validation>, TrainError> {
        if let Some(metrics) = source.examine()? {
            let (loss, accuracy, bits_per_byte) = (None, None, None);
            return Ok(Some(Validation { step, loss, accuracy, bits_per_byte, metrics }));
        }
        let (mut sums, mut bytes) = (LossSums::default(), 0);
        let there = source.held_out(&mut |part| {
            bytes += source.bytes(&part).unwrap_or_default();
            sums.add(part.evaluate_part(self.model)?);
            Ok(())
        })?;
        if !there {
            return Ok(None);
        }
        let loss = Some(sums.loss / sums.weight);
        let accuracy = sums.correct.map(|correct| correct / sums.weight);
        let bits_per_byte = (bytes > 0).then(|| sums.loss / std::f64::consts::LN_2 / bytes as f64);
        Ok(Some(Validation { step, loss, accuracy, bits_per_byte, metrics: sums.metrics() }))
    }
}

/// How far a run goes through its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StepCount {
    /// Examples of an epoch.
    count: u64,
    batch_size: u64,
    max_steps: Option<u64>,
    /// Over all epochs.
    pub examples: u64,
    pub steps: u64,
}

impl StepCount {
    /// Of `count` examples.
    pub fn new(count: usize, settings: &Resolved) -> Self {
        let batch_size = settings.batch_size as u64;
        let max_steps = settings.max_steps;
        let examples = match settings.epochs {
            Some(epochs) => (count as f64 * epochs).ceil().max(1.0) as u64,
            // The data are repeated until the steps are done.
            None => max_steps.unwrap_or(1).saturating_mul(batch_size),
        };
        let steps = examples.div_ceil(batch_size);
        Self { count: count as u64, batch_size, max_steps, examples, steps }.capped()
    }

    /// With so many steps on every batch.
    pub fn with_updates(mut self, updates: u64) -> Self {
        self.steps = self.examples.div_ceil(self.batch_size).saturating_mul(updates);
        self.capped()
    }

    fn capped(mut self) -> Self {
        self.steps = self.max_steps.map_or(self.steps, |most| most.min(self.steps));
        self
    }

    /// Epochs behind a cursor.
    fn epochs(&self, cursor: &Cursor) -> f64 {
        cursor.epoch as f64 + cursor.taken as f64 / self.count.max(1) as f64
    }

    /// Examples of the step at a cursor: the last one may have fewer.
    fn due(&self, cursor: &Cursor) -> usize {
        let taken = cursor.epoch * self.count + cursor.taken;
        self.examples.saturating_sub(taken).min(self.batch_size) as usize
    }

    /// Examples that are seen, counting those that come again.
    pub fn seen(&self) -> u64 {
        self.examples.min(self.steps.saturating_mul(self.batch_size))
    }
}

/// Sums over the parts of a batch.
#[derive(Debug, Clone, Default)]
pub(super) struct LossSums {
    pub loss: f64,
    /// Of those that can be right.
    pub correct: Option<f64>,
    /// What the others are divided by in the end.
    pub weight: f64,
    /// Sums by name, and what they are divided by.
    pub measured: BTreeMap<Cow<'static, str>, (f64, f64)>,
}

impl LossSums {
    fn of(batch: &Batch, losses: &Losses) -> Result<Self, TrainError> {
        let loss = losses.sum.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        let weight = batch.weights.iter().map(|weight| f64::from(*weight)).sum();
        Ok(Self { loss, correct: Some(losses.correct), weight, ..Self::default() })
    }

    /// What sums are divided by; a step without any trained token has a loss of 0.
    fn divisor(&self) -> f64 {
        if self.weight > 0.0 { self.weight } else { 1.0 }
    }

    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct = match (self.correct, other.correct) {
            (Some(one), Some(more)) => Some(one + more),
            (one, more) => one.or(more),
        };
        self.weight += other.weight;
        for (name, (sum, count)) in other.measured {
            self.measure_all(name, sum, count);
        }
    }

    pub fn measure(&mut self, name: &'static str, value: f64) {
        self.measure_all(name, value, 1.0);
    }

    /// A sum over `count` of what is measured.
    pub fn measure_all(&mut self, name: impl Into<Cow<'static, str>>, sum: f64, count: f64) {
        let found = self.measured.entry(name.into()).or_default();
        *found = (found.0 + sum, found.1 + count);
    }

    /// Means.
    fn metrics(&self) -> Metrics {
        let mean = |(name, (sum, count)): (&Cow<str>, &(f64, f64))| (name.to_string(), sum / count);
        self.measured.iter().map(mean).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::Spec;

    #[test]
    fn counted_steps_repeat_the_data() {
        for (train, count, steps) in [
            (r#""max_steps": 20, "batch_size": 2"#, 4, 20),
            (r#""max_steps": 1000, "batch_size": 32"#, 1, 1000),
            (r#""max_steps": 1, "batch_size": 2"#, 4, 1),
            (r#""batch_size": 2"#, 4, 2),
            (r#""max_steps": 20, "epochs": 1, "batch_size": 2"#, 4, 2),
            (r#""max_steps": 3, "epochs": 5, "batch_size": 2"#, 4, 3),
        ] {
            let text = format!(
                r#"{{"kind": "sft", "model": "m", "data": {{"train": "f"}}, "train": {{{train}}}}}"#
            );
            let spec: Spec = serde_json::from_str(&text).unwrap();
            let settings = spec.resolve().unwrap();
            assert_eq!(StepCount::new(count, &settings).steps, steps, "{train}");
            // The same when the stored specification is read again.
            let again = spec.filled(&settings).resolve().unwrap();
            assert_eq!(StepCount::new(count, &again).steps, steps, "{train}");
        }
    }
}
