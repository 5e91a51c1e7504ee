//! Supervised fine-tuning: predict the answers of examples, with LoRA or with all weights.

use crate::train::checkpoint::{CheckpointError, Checkpoints};
use crate::train::data::{Cursor, DataError, Encoded, Order, Prepared, Report, pack};
use crate::train::model::{Batch, Gradients, Model};
use crate::train::optim::Optimization;
use crate::train::spec::Resolved;
use serde::{Deserialize, Serialize};
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
}

/// What happens on the way.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    Data {
        train: Report,
        #[serde(skip_serializing_if = "Option::is_none")]
        validation: Option<Report>,
    },
    Resumed {
        step: u64,
    },
    Step(Progress),
    Evaluated(Evaluated),
    Checkpoint {
        step: u64,
    },
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub step: u64,
    pub total_steps: u64,
    pub epoch: f64,
    /// Nats a trained token.
    pub loss: f64,
    /// The share of trained tokens that are the most likely ones.
    pub accuracy: f64,
    pub learning_rate: f64,
    pub grad_norm: f64,
    /// Tokens so far, whether trained or context.
    pub tokens: u64,
    pub tokens_per_second: f64,
}

/// The loss on examples that are not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    pub step: u64,
    pub loss: f64,
    pub accuracy: f64,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Told to stop; a checkpoint was written.
    Stopped,
}

/// Where a run stands, besides weights and moments.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct State {
    cursor: Cursor,
    tokens: u64,
}

/// A run.
pub struct Sft<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub train: &'a Prepared,
    pub validation: Option<&'a Prepared>,
    pub checkpoints: &'a Checkpoints,
    /// `None` keeps the file's order.
    pub shuffle: Option<u64>,
}

impl Sft<'_> {
    /// Examples that are trained on, over all epochs, and the steps that they make.
    pub fn size(&self) -> (u64, u64) {
        let examples = (self.train.len() as f64 * self.settings.epochs).ceil().max(1.0) as u64;
        let steps = examples.div_ceil(self.settings.batch_size as u64);
        (examples, self.settings.max_steps.map_or(steps, |most| most.min(steps)))
    }

    /// Trains from the newest checkpoint to the end, or until told to stop.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint stays.
    pub fn run(
        &self,
        stop: &AtomicBool,
        mut event: impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let params = self.model.params();
        let mut optimization = Optimization::new(self.settings.optimizer.clone());
        let (mut step, mut state) = (0, State::default());
        if let Some(restored) = self.checkpoints.newest::<State>()? {
            restored.apply(params, &mut optimization)?;
            (step, state) = (restored.step, restored.state);
            event(Event::Resumed { step });
        }
        let (examples, total) = self.size();
        let warmup = (total as f64 * self.settings.warmup).ceil() as u64;
        let mut order = Order::new(self.train.len(), self.shuffle);
        while step < total {
            if stop.load(Ordering::Relaxed) {
                self.save(step, &optimization, &state, &mut event)?;
                return Ok(Outcome::Stopped);
            }
            let started = Instant::now();
            let left = examples - step * self.settings.batch_size as u64;
            let count = left.min(self.settings.batch_size as u64) as usize;
            let batch = self.read(self.train, &order.next(&mut state.cursor, count))?;
            let factor = self.settings.schedule.factor(step, total, warmup);
            step += 1;
            let sums = self.gradients(&batch, step)?;
            let rate = self.settings.learning_rate;
            let stepped = optimization.step(params, &sums.gradients, sums.weight, rate, factor)?;
            let tokens: usize = batch.iter().map(|example| example.tokens.len()).sum();
            state.tokens += tokens as u64;
            event(Event::Step(Progress {
                step,
                total_steps: total,
                epoch: state.cursor.epoch as f64
                    + state.cursor.taken as f64 / self.train.len().max(1) as f64,
                loss: sums.loss / sums.weight,
                accuracy: sums.correct / sums.weight,
                learning_rate: rate * factor,
                grad_norm: stepped.grad_norm,
                tokens: state.tokens,
                tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
            }));
            let last = step == total;
            if (last || step.is_multiple_of(self.settings.eval_every))
                && let Some(evaluated) = self.evaluate(step)?
            {
                event(Event::Evaluated(evaluated));
            }
            if last || step.is_multiple_of(self.settings.checkpoint_every) {
                self.save(step, &optimization, &state, &mut event)?;
            }
        }
        Ok(Outcome::Done)
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

    fn read(&self, data: &Prepared, examples: &[usize]) -> Result<Vec<Encoded>, TrainError> {
        Ok(examples.iter().map(|&example| data.get(example)).collect::<Result<_, _>>()?)
    }

    /// Rows of packed examples, as many as are computed at once.
    fn micro_batches(&self, examples: &[Encoded]) -> Vec<Batch> {
        let lengths: Vec<_> = examples.iter().map(|example| example.tokens.len()).collect();
        let rows = pack(&lengths, self.settings.max_length);
        let members = |rows: &[super::super::data::Row]| {
            Batch::of(rows.iter().flat_map(|row| &row.members).map(|&member| &examples[member]))
        };
        rows.chunks(self.settings.micro_batch).map(members).collect()
    }

    fn gradients(&self, examples: &[Encoded], step: u64) -> Result<Sums, TrainError> {
        let mut gradients = Gradients::default();
        let mut sums = Sums::default();
        for batch in self.micro_batches(examples) {
            let checkpoint = self.settings.activation_checkpointing;
            let losses = self.model.train(&batch, checkpoint, &mut gradients)?;
            sums.add(&batch, &losses)?;
        }
        if !sums.loss.is_finite() {
            return Err(TrainError::NotFinite { step, loss: sums.loss / sums.weight });
        }
        sums.gradients = gradients.take(self.model.params())?;
        Ok(sums)
    }

    /// The loss over all validation examples.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn evaluate(&self, step: u64) -> Result<Option<Evaluated>, TrainError> {
        let Some(data) = self.validation else { return Ok(None) };
        let mut sums = Sums::default();
        let all: Vec<usize> = (0..data.len()).collect();
        for some in all.chunks(self.settings.batch_size) {
            for batch in self.micro_batches(&self.read(data, some)?) {
                sums.add(&batch, &self.model.losses(&batch)?)?;
            }
        }
        let (loss, accuracy) = (sums.loss / sums.weight, sums.correct / sums.weight);
        Ok(Some(Evaluated { step, loss, accuracy }))
    }
}

/// Sums over the parts of a batch.
#[derive(Default)]
struct Sums {
    loss: f64,
    correct: f64,
    weight: f64,
    gradients: Vec<candle_core::Tensor>,
}

impl Sums {
    fn add(&mut self, batch: &Batch, losses: &crate::train::ops::Losses) -> Result<(), TrainError> {
        let loss = losses.sum.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        self.loss += loss;
        self.correct += losses.correct;
        self.weight += batch.weights.iter().map(|weight| f64::from(*weight)).sum::<f64>();
        Ok(())
    }
}
