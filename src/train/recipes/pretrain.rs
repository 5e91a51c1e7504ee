//! Pretraining: next-token prediction on plain text with all weights, starting from random weights
//! or from an existing model.

use super::run::{BatchSource, Each, Event, Outcome, Run, StepCount, TrainError};
use super::sample::sample;
use super::{Job, Recipe};
use crate::gguf::Gguf;
use crate::job::spec::{Pretrain, Resolved, TokenizerPlan};
use crate::job::{Control, Order};
use crate::tokenizer::Tokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Stream, Windows};
use crate::train::model::{Batch, Model};
use crate::train::random_init;
use crate::train::tokenizer_training::Vocabulary;
use std::path::Path;

/// Number of tokens of the default prompt of samples.
const PROMPT: usize = 8;

impl Recipe for Pretrain {
    type Data = Stream;

    fn held_out(&self) -> f64 {
        Pretrain::held_out(self)
    }

    fn create_model(&self, order: &Order, path: &Path) -> Result<(), TrainError> {
        let parent = order.tokenizer.as_ref().map(Gguf::open).transpose()?;
        init_pretrain(self, parent.as_ref(), &order.train, &order.name, order.spec.seed, path)
    }

    fn run(
        &self,
        job: &Job<'_, Stream>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let trainer = PretrainTrainer {
            model: job.model,
            settings: job.settings,
            train: job.train,
            validation: job.validation,
            checkpoints: job.checkpoints,
            tokenizer: job.tokenizer,
            seed: job.seed,
            shuffle: job.shuffle,
            prompt: self.prompt.as_deref(),
        };
        trainer.run(control, event)
    }
}

/// A pretraining run. The model is loaded with
/// [`Training::Full`](crate::train::model::Training::Full).
pub(super) struct PretrainTrainer<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub train: &'a Stream,
    pub validation: Option<&'a Stream>,
    pub checkpoints: &'a Checkpoints,
    /// The model's tokenizer.
    pub tokenizer: &'a dyn Tokenizer,
    /// Sampling seed.
    pub seed: u64,
    /// Seed of the shuffled order of the windows; `None` keeps their order in the text.
    pub shuffle: Option<u64>,
    /// Beginning of the samples; by default the first words of the validation or training data.
    pub prompt: Option<&'a str>,
}

/// Writes the initial model to `path`: a tokenizer trained on `data`, or the one of `parent`, and
/// random weights. The file is written atomically. If it exists already, nothing is done.
///
/// # Errors
/// [`TrainError`].
pub(super) fn init_pretrain(
    block: &Pretrain,
    parent: Option<&Gguf>,
    data: &Path,
    name: &str,
    seed: u64,
    path: &Path,
) -> Result<(), TrainError> {
    if path.exists() {
        return Ok(());
    }
    let vocabulary = match (block.tokenizer().map_err(TrainError::Spec)?, parent) {
        (TokenizerPlan::Train { vocab_size }, _) => Vocabulary::train(data, vocab_size)?,
        (TokenizerPlan::From(_), Some(parent)) => Vocabulary::of(parent)?,
        (TokenizerPlan::From(from), None) => {
            return Err(TrainError::Spec(format!("pretrain.tokenizer.from: `{from}` is not open")));
        }
    };
    let shape = block.shape(vocabulary.len()).map_err(TrainError::Spec)?;
    random_init::write(&shape, &vocabulary, name, seed, path)?;
    Ok(())
}

impl PretrainTrainer<'_> {
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

    pub(super) fn loops(&self) -> Run<'_> {
        Run { model: self.model, settings: self.settings, checkpoints: self.checkpoints }
    }

    fn windows<'a>(&self, stream: &'a Stream) -> Windows<'a> {
        let end = self.tokenizer.vocab().eos;
        Windows::new(stream, self.settings.max_length, end, self.shuffle)
    }

    pub(super) fn source(&self) -> Text<'_> {
        Text { run: self, windows: self.windows(self.train) }
    }

    /// The prompt of samples, as tokens.
    fn prompt(&self) -> Result<Vec<u32>, TrainError> {
        let given = self.prompt.map(|prompt| self.tokenizer.encode(prompt, true, true));
        if let Some(given) = given.filter(|given| !given.is_empty()) {
            return Ok(given);
        }
        let from = self.validation.filter(|text| !text.is_empty()).unwrap_or(self.train);
        Ok(from.read(0, PROMPT.min(from.len() as usize))?)
    }
}

/// Windows of a stream of tokens, as batches.
pub(super) struct Text<'a> {
    run: &'a PretrainTrainer<'a>,
    windows: Windows<'a>,
}

impl BatchSource for Text<'_> {
    type MicroBatch = Batch;

    fn extent(&self) -> StepCount {
        StepCount::new(self.windows.count(), self.run.settings)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Batch>, TrainError> {
        Ok(self.windows.next(cursor, count, self.run.settings.micro_batch)?)
    }

    fn held_out(&self, each: &mut Each<Batch>) -> Result<bool, TrainError> {
        let Some(stream) = self.run.validation.filter(|stream| stream.len() > 1) else {
            return Ok(false);
        };
        self.run.windows(stream).all(self.run.settings.micro_batch, each)?;
        Ok(true)
    }

    fn bytes(&self, batch: &Batch) -> Option<u64> {
        let vocab = self.run.tokenizer.vocab();
        let bytes = |token: &u32| match vocab.is_control(*token) {
            true => 0,
            false => vocab.piece(*token).len() as u64,
        };
        Some(batch.targets.iter().map(bytes).sum())
    }

    fn sample(&self, step: u64) -> Result<Option<String>, TrainError> {
        let run = self.run;
        let (vocab, context) = (run.tokenizer.vocab(), run.settings.max_length);
        sample(run.model, vocab, &run.prompt()?, context, (run.seed, step)).map(Some)
    }
}
