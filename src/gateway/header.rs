//! Model properties that are read from the file header before the model is loaded.

use crate::gateway::error::ApiError;
use crate::gguf::{Gguf, ModelConfig, ModelFacts, TensorType, TokenizerFacts};
use crate::ipc::RunnerKind;
use std::path::Path;

/// Properties of a model and its memory needs, from the file header.
#[derive(Debug, Clone)]
pub struct ModelHeader {
    pub facts: ModelFacts,
    /// Bytes of weights in all files of the model.
    pub weights_bytes: u64,
    /// Bytes of those weights whose type llama.cpp's CPU backend copies into another layout.
    pub repackable_bytes: u64,
    /// Reason why the native runner does not support the model.
    pub uncovered: Option<String>,
    pub(in crate::gateway) fileless: bool,
}

/// Types that ggml's CPU backend repacks on some machine (`ggml/src/ggml-cpu/repack.cpp`).
const REPACKED: &[TensorType] = &[
    TensorType::Q4_0,
    TensorType::Q8_0,
    TensorType::Q2_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::IQ4_NL,
    TensorType::MXFP4,
];

impl ModelHeader {
    /// Reads the header of the file at `path`. Blocks.
    ///
    /// # Errors
    /// 422 if it is not a model that can be loaded.
    pub fn read(path: &Path, runner: Option<RunnerKind>) -> Result<Self, ApiError> {
        if runner == Some(RunnerKind::Mock) && !path.is_file() {
            return Ok(Self::mock());
        }
        let refused =
            |error| ApiError::unprocessable(format!("The model cannot be read: {error}."));
        let gguf = Gguf::open_header(path).map_err(refused)?;
        let facts = ModelFacts::read(&gguf).map_err(refused)?;
        if !facts.is_model() {
            let what = match facts.split {
                Some(split) if split.no > 0 => format!("part {} of a split model", split.no + 1),
                _ => format!("of type `{}`", facts.general_type),
            };
            return Err(ApiError::unprocessable(format!(
                "The file is no model that can be served by itself: it is {what}."
            )));
        }
        let repacked = |tensor: &&crate::gguf::TensorInfo| {
            REPACKED.contains(&tensor.ty())
                && tensor.dims().len() > 1
                && !tensor.name().starts_with("token_embd")
        };
        let repackable_bytes = gguf.tensors().iter().filter(repacked).map(|t| t.bytes()).sum();
        let others = facts.split.map_or(0, |split| other_parts_bytes(path, split.count));
        Ok(Self {
            weights_bytes: facts.weights_bytes.saturating_add(others),
            repackable_bytes,
            uncovered: match facts.split {
                Some(_) => Some("it is split over several files".into()),
                None => ModelConfig::read(&gguf).err().map(|reason| reason.to_string()),
            },
            facts,
            fileless: false,
        })
    }

    /// Header of the mock runner's model, whose tokens are bytes.
    pub(in crate::gateway) fn mock() -> Self {
        let facts = ModelFacts {
            general_type: "model".into(),
            architecture: "mock".into(),
            name: Some("mock".into()),
            basename: None,
            size_label: None,
            quantization: "none".into(),
            parameters: 0,
            weights_bytes: 0,
            n_layer: 0,
            n_embd: 0,
            n_head: 0,
            n_head_kv: Vec::new(),
            key_length: 0,
            value_length: 0,
            kv_elements: Vec::new(),
            n_ctx_train: 0,
            n_vocab: 256,
            n_expert: 0,
            pooling_type: None,
            causal: true,
            sliding_window: None,
            is_recurrent: false,
            is_hybrid: false,
            is_diffusion: false,
            is_encoder_only: false,
            is_encoder_decoder: false,
            split: None,
            tokenizer: TokenizerFacts::default(),
        };
        let uncovered = Some("there is no file".into());
        Self { facts, weights_bytes: 0, repackable_bytes: 0, uncovered, fileless: true }
    }
}

/// Total size of the files `…-00002-of-00005.gguf` beside the first. A missing file counts as 0
/// here; loading the model then fails.
fn other_parts_bytes(first: &Path, count: u32) -> u64 {
    let Some(name) = first.file_name().and_then(|name| name.to_str()) else { return 0 };
    let Some(stem) = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")) else { return 0 };
    (2..=count.min(99_999))
        .map(|part| first.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf")))
        .map_while(|path| std::fs::metadata(path).ok())
        .map(|file| file.len())
        .sum()
}
