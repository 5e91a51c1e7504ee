//! Supervised fine-tuning: predicts the completions of examples, with LoRA or with all weights.

use super::run::{BatchSource, Each, Event, Outcome, Run, StepCount, TrainError};
use super::{Job, Recipe};
use crate::job::Control;
use crate::job::spec::{Resolved, Sft};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Encoded, Order, Prepared, Row, pack};
use crate::train::model::{Batch, Model};

impl Recipe for Sft {
    type Data = Prepared;

    fn run(
        &self,
        job: &Job<'_, Prepared>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let trainer = SftTrainer {
            model: job.model,
            settings: job.settings,
            train: job.train,
            validation: job.validation,
            checkpoints: job.checkpoints,
            shuffle: job.shuffle,
        };
        trainer.run(control, event)
    }
}

/// A supervised fine-tuning run.
pub(super) struct SftTrainer<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub train: &'a Prepared,
    pub validation: Option<&'a Prepared>,
    pub checkpoints: &'a Checkpoints,
    /// Shuffle seed; `None` keeps the file's order.
    pub shuffle: Option<u64>,
}

impl SftTrainer<'_> {
    /// Trains from the newest checkpoint to the last step, or until `control` stops it.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint is kept.
    pub(super) fn run(
        &self,
        control: &Control,
        mut event: impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        self.loops().run(&mut self.source(), control, &mut event)
    }

    fn loops(&self) -> Run<'_> {
        Run { model: self.model, settings: self.settings, checkpoints: self.checkpoints }
    }

    fn source(&self) -> Examples<'_> {
        Examples { sft: self, order: Order::new(self.train.len(), self.shuffle) }
    }
}

/// The examples of each step, packed into rows.
struct Examples<'a> {
    sft: &'a SftTrainer<'a>,
    order: Order,
}

impl Examples<'_> {
    /// Packs examples into rows and groups the rows into micro-batches.
    fn read(&self, data: &Prepared, examples: &[usize]) -> Result<Vec<Batch>, TrainError> {
        let settings = self.sft.settings;
        let examples: Vec<Encoded> =
            examples.iter().map(|&example| data.get(example)).collect::<Result<_, _>>()?;
        let lengths: Vec<_> = examples.iter().map(|example| example.tokens.len()).collect();
        let rows = pack(&lengths, settings.max_length);
        let members = |rows: &[Row]| {
            Batch::of(rows.iter().flat_map(|row| &row.members).map(|&member| &examples[member]))
        };
        Ok(rows.chunks(settings.micro_batch).map(members).collect())
    }
}

impl BatchSource for Examples<'_> {
    type MicroBatch = Batch;

    fn extent(&self) -> StepCount {
        StepCount::new(self.sft.train.len(), self.sft.settings)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Batch>, TrainError> {
        let examples = self.order.next(cursor, count);
        self.read(self.sft.train, &examples)
    }

    fn held_out(&self, each: &mut Each<Batch>) -> Result<bool, TrainError> {
        let Some(data) = self.sft.validation else { return Ok(false) };
        let all: Vec<usize> = (0..data.len()).collect();
        for some in all.chunks(self.sft.settings.batch_size) {
            self.read(data, some)?.into_iter().try_for_each(&mut *each)?;
        }
        Ok(true)
    }
}
