//! Estimates the memory and disk space of a job from the model's header and the settings.

use super::spec::{Resolved, Shape, Spec, TokenizerPlan};
use super::{EvalModel, JobOrder};
use crate::dataset::DatasetKind;
use crate::gguf::{Gguf, ModelConfig};
use std::path::{Path, PathBuf};

/// Bytes for the process itself: code, thread stacks, tokenizer and buffers.
const PROCESS: u64 = 160 << 20;
/// Bytes per trained parameter in memory: the f32 weight, its gradient and both moments.
const TRAINED_BYTES: u64 = 16;
/// Bytes per trained parameter in a checkpoint: the weight and both moments.
const CHECKPOINT_BYTES: u64 = 12;
/// Rows of logits in memory at once, in the forward and the backward pass
/// (`ops::linear_cross_entropy`).
const LOGIT_ROWS: u64 = 2 * 128;
/// Assumed vocabulary size if the tokenizer is taken from another model.
const TAKEN_VOCABULARY: usize = 65_536;

/// Estimated memory and disk space in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceEstimate {
    pub memory: u64,
    /// Two checkpoints and the artifacts.
    pub disk: u64,
    /// Number of trained parameters; 0 if the job does not train.
    pub trained: u64,
}

/// The model dimensions that the estimate needs.
struct Dimensions {
    layers: u64,
    width: u64,
    query: u64,
    kv: u64,
    ff: u64,
    vocab: u64,
}

impl ResourceEstimate {
    /// The estimate of an order.
    ///
    /// # Errors
    /// If its model cannot be read, or as [`ResourceEstimate::of`].
    pub fn of_order(order: &JobOrder) -> Result<Self, String> {
        let open = |path: &PathBuf| Gguf::open_header(path).map_err(|error| error.to_string());
        match order {
            JobOrder::Train(order) => {
                let model = order.model.as_ref().map(open).transpose()?;
                let estimate = Self::of(model.as_ref(), &order.spec, &order.spec.resolve()?)?;
                Ok(estimate.with_teacher(order.teacher.as_deref()))
            }
            JobOrder::Quantize(order) => Ok(Self::of_quantization(&open(&order.model)?)),
            JobOrder::Evaluate(order) => {
                Self::of_evaluation(order.models.iter().chain(&order.reference))
            }
        }
    }

    /// Adds the file of a teacher, which is mapped beside the model.
    pub(super) fn with_teacher(self, teacher: Option<&Path>) -> Self {
        let file = teacher.and_then(|path| std::fs::metadata(path).ok());
        Self { memory: self.memory + file.map_or(0, |file| file.len()), ..self }
    }

    /// A quantization holds three times the largest tensor; the input is mapped. Its output is at
    /// most as large as the model in F16, or as its input.
    pub fn of_quantization(model: &Gguf) -> Self {
        let elements = || model.tensors().iter().map(|tensor| tensor.elements());
        let largest = elements().max().unwrap_or_default();
        let all: u64 = elements().sum();
        let disk = model.file_size().max(2 * all);
        Self { memory: PROCESS + 3 * 4 * largest, disk, trained: 0 }
    }

    /// An evaluation has one model at a time in memory: its file, which is mapped, and as much again
    /// for weights in the layout of the kernels and the cache.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of_evaluation<'a>(models: impl Iterator<Item = &'a EvalModel>) -> Result<Self, String> {
        let mut largest = 0;
        for model in models {
            let file = std::fs::metadata(&model.file);
            let file = file.map_err(|error| format!("{}: {error}", model.name))?;
            largest = largest.max(file.len());
        }
        Ok(Self { memory: PROCESS + 2 * largest, disk: 0, trained: 0 })
    }

    /// Estimates rather too much than too little. `model` is the base model.
    ///
    /// # Errors
    /// If the model's family cannot be trained, or the adapter's targets are unknown.
    pub fn of(model: Option<&Gguf>, spec: &Spec, settings: &Resolved) -> Result<Self, String> {
        let Some(model) = model else { return Self::of_fresh(spec, settings) };
        let shape = ModelConfig::read(model).map_err(|error| error.to_string())?;
        let all: u64 = model.tensors().iter().map(|tensor| tensor.elements()).sum();
        let trained = match &spec.adapter {
            None => all,
            Some(adapter) => {
                let lora = adapter.lora(spec.seed)?;
                let sides = lora.targets.iter().map(|target| target.shape(&shape));
                let sum: usize = sides.map(|(rows, cols)| rows + cols).sum();
                (shape.layers * lora.rank * sum) as u64
            }
        };
        let dimensions = Dimensions {
            layers: shape.layers as u64,
            width: shape.width as u64,
            query: (shape.heads * shape.head_dim) as u64,
            kv: (shape.kv_heads * shape.head_dim) as u64,
            ff: shape.ff as u64,
            vocab: shape.vocab as u64,
        };
        Ok(dimensions.needs(model.file_size(), all, trained, spec, settings))
    }

    fn of_fresh(spec: &Spec, settings: &Resolved) -> Result<Self, String> {
        let Some(block) = spec.task.settings().new_model() else {
            return Err(format!("model: a job of kind `{}` needs one", spec.task.name()));
        };
        let vocab = match block.tokenizer()? {
            TokenizerPlan::Train { vocab_size } => vocab_size,
            TokenizerPlan::From(_) => TAKEN_VOCABULARY,
        };
        let shape: Shape = block.shape(vocab)?;
        let all = shape.parameters() as u64;
        let head = shape.width / shape.heads;
        let dimensions = Dimensions {
            layers: shape.layers as u64,
            width: shape.width as u64,
            query: shape.width as u64,
            kv: (shape.kv_heads * head) as u64,
            ff: shape.ffn as u64,
            vocab: vocab as u64,
        };
        Ok(dimensions.needs(4 * all, all, all, spec, settings))
    }
}

impl Dimensions {
    fn needs(
        &self,
        file: u64,
        all: u64,
        trained: u64,
        spec: &Spec,
        settings: &Resolved,
    ) -> ResourceEstimate {
        // Activations that a layer stores per token for the backward pass, as `block.rs` computes
        // it.
        let layer = 5 * self.width + 3 * self.query + 4 * self.kv + 4 * self.ff;
        let kept = match settings.activation_checkpointing {
            true => self.layers * self.width + 2 * layer,
            false => (self.layers + 1) * layer,
        };
        // Both completions of a pair are in one row.
        let task = spec.task.settings();
        let pairs = task.dataset() == Some(DatasetKind::Preference) || task.trains_on_pairs();
        let answers = if pairs { 2 } else { 1 };
        let tokens = answers * settings.micro_batch as u64 * settings.max_length as u64;
        let logits = LOGIT_ROWS * self.vocab;
        let memory = PROCESS + file + trained * TRAINED_BYTES + 4 * (tokens * kept + logits);
        let whole = if spec.adapter.is_none() || spec.export.merged { 4 * all } else { 0 };
        let folder = if spec.writes_hugging_face() { 4 * all } else { 0 };
        // A second stage has its own checkpoints.
        let stages = if task.trains_on_pairs() { 2 } else { 1 };
        let disk = stages * 2 * trained * CHECKPOINT_BYTES + trained * 8 + whole + folder;
        ResourceEstimate { memory, disk, trained }
    }
}
