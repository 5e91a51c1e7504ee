//! Estimates the memory and disk space of a job from the model's header and the settings.

use super::spec::{Resolved, Shape, Spec, TokenizerPlan};
use super::{EvalModel, Evaluate, JobOrder, QuantizeSettings};
use crate::dataset::DatasetKind;
use crate::gguf::{Gguf, GgufError, ModelConfig, ModelFacts, TensorType};
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
/// Bytes of one of the teacher's tokens with its log-probability, in memory and on disk.
const TEACHER_ENTRY: u64 = 8;
/// Bytes of a text for each of its tokens, at least in most texts. Data files have more for each
/// trained token, as keys and prompts are not trained.
const TOKEN_BYTES: u64 = 3;
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
                let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
                let data = order.validation.iter().chain([&order.train]).map(size).sum();
                let (spec, settings) = (&order.spec, order.spec.resolve()?);
                let teacher = order.teacher.as_deref();
                Ok(estimate.with_teacher(model.as_ref(), spec, &settings, teacher, data))
            }
            JobOrder::Quantize(order) => {
                let settings = &order.spec.quantize;
                Ok(Self::of_quantization(&open(&order.model)?, settings))
            }
            JobOrder::Evaluate(order) => {
                let text = order.text.as_ref().and_then(|path| std::fs::metadata(path).ok());
                let text = text.map_or(0, |file| file.len());
                let (spec, reference) = (&order.spec.evaluate, order.reference.as_ref());
                Self::of_evaluation(spec, &order.models, reference, text)
            }
        }
    }

    /// Adds what a distillation needs besides the training of the student: the teacher's file, which
    /// is mapped; its distributions of a micro-batch, and in a file those of all data; and the file of
    /// a student that is cut from the model. `data_bytes` is the size of the data files.
    pub(super) fn with_teacher(
        self,
        model: Option<&Gguf>,
        spec: &Spec,
        settings: &Resolved,
        teacher: Option<&Path>,
        data_bytes: u64,
    ) -> Self {
        let (Some(block), Some(model)) = (spec.task.settings().distillation(), model) else {
            return self;
        };
        let file = teacher.and_then(|path| std::fs::metadata(path).ok());
        // Without a name the teacher is the model from which the student is cut.
        let teacher = file.map_or(model.file_size(), |file| file.len());
        let vocab = ModelConfig::read(model).map_or(usize::MAX, |config| config.vocab);
        let row = block.top_k.min(vocab) as u64 * TEACHER_ENTRY;
        let rows = settings.micro_batch as u64 * settings.max_length as u64;
        let student = block.layers.map_or(0, |_| model.file_size());
        let cache = data_bytes / TOKEN_BYTES * row;
        Self {
            memory: self.memory + teacher + rows * row,
            disk: self.disk + cache + student,
            ..self
        }
    }

    /// A quantization holds three times the largest tensor; the input is mapped. Its output is at
    /// most as large as its input, or as the model in F16; in F32 it has 4 bytes per weight.
    pub fn of_quantization(model: &Gguf, settings: &QuantizeSettings) -> Self {
        let elements = || model.tensors().iter().map(|tensor| tensor.elements());
        let largest = elements().max().unwrap_or_default();
        let all: u64 = elements().sum();
        let given = settings.overrides.iter().map(|given| given.ty);
        let given = given.chain(settings.output_type).chain(settings.embedding_type);
        let wide = settings.ty.name() == "F32" || given.into_iter().any(|ty| ty == TensorType::F32);
        let disk = model.file_size().max(if wide { 4 } else { 2 } * all);
        Self { memory: PROCESS + 3 * 4 * largest, disk, trained: 0 }
    }

    /// An evaluation has one model at a time in memory: its file, which is mapped, and as much again
    /// for weights in the layout of the kernels and the cache. On disk it has the log-probabilities of
    /// the reference, two bytes for each token of the vocabulary, for half of the text's tokens.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of_evaluation(
        spec: &Evaluate,
        models: &[EvalModel],
        reference: Option<&EvalModel>,
        text_bytes: u64,
    ) -> Result<Self, String> {
        let mut largest = 0;
        for model in models.iter().chain(reference) {
            let file = std::fs::metadata(&model.file);
            let file = file.map_err(|error| format!("{}: {error}", model.name))?;
            largest = largest.max(file.len());
        }
        let disk = match reference {
            None => 0,
            Some(model) => {
                let wrong = |error: GgufError| format!("{}: {error}", model.name);
                let header = Gguf::open_header(&model.file).map_err(wrong)?;
                let vocab = u64::from(ModelFacts::read(&header).map_err(wrong)?.n_vocab);
                let context = spec.context as u64;
                let chunks = text_bytes / TOKEN_BYTES / context + 1;
                let chunks = spec.chunks.map_or(chunks, |most| chunks.min(most as u64));
                let row = 2 * (vocab.next_multiple_of(2) + 4);
                chunks * (context / 2 * row + 4 * context)
            }
        };
        Ok(Self { memory: PROCESS + 2 * largest, disk, trained: 0 })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::fixture::TinyDecoder;
    use serde_json::json;

    fn model(folder: &Path) -> (PathBuf, Gguf) {
        let path = folder.join("model.gguf");
        TinyDecoder::new("llama").write(&path).unwrap();
        let header = Gguf::open_header(&path).unwrap();
        (path, header)
    }

    #[test]
    fn a_distillation_counts_its_teacher_and_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let (path, model) = model(folder.path());
        let with = |block: serde_json::Value, teacher: Option<&Path>, data: u64| {
            let spec = json!({
                "kind": "distill", "model": "m", "data": {"train": "f"}, "distill": block,
                "train": {"max_length": 32, "micro_batch": 2},
            });
            let spec: Spec = serde_json::from_value(spec).unwrap();
            let settings = spec.resolve().unwrap();
            let plain = ResourceEstimate::of(Some(&model), &spec, &settings).unwrap();
            let found = plain.with_teacher(Some(&model), &spec, &settings, teacher, data);
            (found.memory - plain.memory, found.disk - plain.disk)
        };
        let file = model.file_size();
        let named = with(json!({"teacher": "t", "top_k": 5}), Some(&path), 300);
        assert_eq!(named, (file + 64 * 5 * 8, 100 * 5 * 8));
        // The base is the teacher, and the student has a file of its own.
        let cut = with(json!({"layers": 1, "top_k": 5}), None, 300);
        assert_eq!(cut, (file + 64 * 5 * 8, file + 100 * 5 * 8));
        // No more tokens than the vocabulary has.
        let all = with(json!({"teacher": "t", "top_k": 1 << 20}), Some(&path), 300);
        assert_eq!(all.1, 100 * 8 * u64::from(TinyDecoder::vocab()));
    }

    #[test]
    fn an_evaluation_counts_the_references_log_probabilities() {
        let folder = tempfile::tempdir().unwrap();
        let (file, _) = model(folder.path());
        let model = EvalModel { name: "m".into(), file, ..EvalModel::default() };
        let disk = |chunks: Option<usize>, reference: Option<&EvalModel>| {
            let spec = json!({"models": ["m"], "text": "f", "context": 64, "chunks": chunks});
            let spec: Evaluate = serde_json::from_value(spec).unwrap();
            let models = std::slice::from_ref(&model);
            ResourceEstimate::of_evaluation(&spec, models, reference, 64 * 3 * 9).unwrap().disk
        };
        let row = 2 * (u64::from(TinyDecoder::vocab()).next_multiple_of(2) + 4);
        let chunk = 32 * row + 4 * 64;
        assert_eq!(disk(None, None), 0);
        assert_eq!(disk(None, Some(&model)), 10 * chunk);
        assert_eq!(disk(Some(2), Some(&model)), 2 * chunk);
    }

    #[test]
    fn quantized_models_have_two_or_four_bytes_per_weight_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let (_, model) = model(folder.path());
        let weights: u64 = model.tensors().iter().map(|tensor| tensor.elements()).sum();
        let disk = |settings: serde_json::Value| {
            let settings: QuantizeSettings = serde_json::from_value(settings).unwrap();
            ResourceEstimate::of_quantization(&model, &settings).disk
        };
        assert_eq!(disk(json!({"type": "Q8_0"})), model.file_size().max(2 * weights));
        let wide = model.file_size().max(4 * weights);
        assert_eq!(disk(json!({"type": "F32"})), wide);
        assert_eq!(disk(json!({"type": "Q8_0", "tensor_types": ["ffn_down=F32"]})), wide);
    }
}
