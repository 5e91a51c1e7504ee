//! [`ModelFacts`]: properties of a model that serving needs, from its header alone.
//!
//! Source: `llama_model_base::load_hparams` (`src/llama-model.cpp`), `src/llama-arch.cpp`,
//! `src/llama-hparams.cpp` and `enum llama_ftype` (`include/llama.h`) of llama.cpp.

use serde::{Deserialize, Serialize};

use super::error::malformed;
use crate::gguf::{Gguf, GgufError, TensorType, TokenizerFacts, Value};

/// Maximum number of layers (`LLAMA_MAX_LAYERS`): llama.cpp aborts the process beyond it.
const MAX_LAYERS: u32 = 512;
/// Maximum width. Larger values are invalid, and below it no product of two overflows `u64`.
const MAX_WIDTH: u32 = 1 << 24;

/// How per-token outputs are combined into one embedding (`enum llama_pooling_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolingType {
    /// One embedding per token.
    None,
    /// The mean over tokens.
    Mean,
    /// The first token.
    Cls,
    /// The last token.
    Last,
    /// A classification head: a reranker.
    Rank,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvType {
    /// 16 bits per element.
    F16,
    /// Blocks of 32 elements of 8 bits, each with an f16.
    Q8_0,
}

impl KvType {
    /// Bytes of a row of `elements` in heads of `head`: blocks do not cross heads, so the
    /// last block of a head may be shorter.
    pub fn row_bytes(self, elements: u64, head: u64) -> u64 {
        match self {
            KvType::F16 => elements * 2,
            KvType::Q8_0 => elements + elements.div_ceil(head.max(1)) * head.div_ceil(32) * 2,
        }
    }
}

/// Position of a file in a split model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitFacts {
    /// Index of this file, from 0.
    pub no: u32,
    /// Number of files.
    pub count: u32,
}

/// Properties of a model file, read from its header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// `general.type`: `model` if absent; `adapter`, `mmproj`, `imatrix`, … are not models.
    pub general_type: String,
    /// `general.architecture`, such as `llama`.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// `general.basename`, such as `SmolLM2`.
    pub basename: Option<String>,
    /// `general.size_label`, such as `135M`.
    pub size_label: Option<String>,
    /// Name of the quantization, such as `Q4_K_M`; `unknown` if there are neither key nor tensors.
    pub quantization: String,
    /// Elements over all tensors of this file.
    pub parameters: u64,
    /// Bytes of tensor data in this file, without padding.
    pub weights_bytes: u64,
    /// Number of layers, including those for multi-token prediction; 0 only if the file has no
    /// tensors.
    pub n_layer: u32,
    /// Width of the hidden state.
    pub n_embd: u32,
    /// Query heads; the maximum over all layers.
    pub n_head: u32,
    /// Key and value heads per layer; 0 for layers without attention.
    pub n_head_kv: Vec<u32>,
    /// Elements of one key head.
    pub key_length: u32,
    /// Elements of one value head.
    pub value_length: u32,
    /// Elements of K and of V that each layer caches per token.
    pub kv_elements: Vec<(u64, u64)>,
    /// Context length of training, in tokens.
    pub n_ctx_train: u32,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Experts per layer, 0 for dense models.
    pub n_expert: u32,
    /// Pooling, if the file names one.
    pub pooling_type: Option<PoolingType>,
    /// Whether a token sees only the tokens before it.
    pub causal: bool,
    /// Window of sliding-window layers in tokens, if there are such layers.
    pub sliding_window: Option<u32>,
    /// Whether a state of fixed size replaces the KV cache (Mamba, RWKV): no partial rollback.
    pub is_recurrent: bool,
    /// Whether some layers are recurrent and some have attention (Jamba, LFM2, Qwen3-Next).
    pub is_hybrid: bool,
    /// Whether it is a text diffusion model, which does not generate from left to right.
    pub is_diffusion: bool,
    /// Whether the model only makes embeddings and does not predict a next token.
    pub is_encoder_only: bool,
    /// Whether an encoder runs before the decoder (T5).
    pub is_encoder_decoder: bool,
    /// Set for one file of a split model. Counts and bytes are then those of this file only.
    pub split: Option<SplitFacts>,
    /// Special tokens and templates.
    pub tokenizer: TokenizerFacts,
}

const RECURRENT: &[&str] = &["mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"];
const HYBRID: &[&str] = &[
    "jamba",
    "falcon-h1",
    "plamo2",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "nemotron_h_moe",
    "qwen3next",
    "kimi-linear",
    "bailingmoe3",
    "kimi-k3",
    "glm5-next",
    "qwen35",
    "qwen35moe",
    "qwen4exp",
    "deepseek4",
    "minimax-01",
];
const DIFFUSION: &[&str] = &["dream", "llada", "llada-moe", "rnd1"];
const ENCODER_ONLY: &[&str] = &[
    "bert",
    "modern-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "eurobert",
    "gemma-embedding",
    "t5encoder",
];
/// Architectures in which every n-th layer has attention and the others are recurrent.
const INTERVAL: &[&str] = &["qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01"];

impl ModelFacts {
    /// Reads the facts. Also works with [`Gguf::open_header`]; no tensor data is read.
    ///
    /// # Errors
    /// [`GgufError`] if a key that every model has is missing, has the wrong type, or has a value
    /// on which llama.cpp would abort. A file without tensors (a vocabulary) may lack the
    /// dimensions.
    pub fn read(gguf: &Gguf) -> Result<ModelFacts, GgufError> {
        let text = |key: &str| Ok::<_, GgufError>(gguf.str(key)?.map(str::to_owned));
        let arch = text("general.architecture")?
            .ok_or_else(|| GgufError::MissingKey("general.architecture".into()))?;
        let is = |list: &[&str]| list.contains(&arch.as_str());
        let tokenizer = TokenizerFacts::read(gguf)?;
        let general_type = text("general.type")?.unwrap_or_else(|| "model".into());
        let shape = Shape::read(gguf, &arch, general_type == "model")?;
        let pooling = gguf.u32(&format!("{arch}.pooling_type"))?;
        let causal_key = gguf.bool(&format!("{arch}.attention.causal"))?.unwrap_or(true);
        let window = gguf.get(&format!("{arch}.attention.sliding_window")).and_then(Value::as_u64);

        Ok(ModelFacts {
            general_type,
            name: text("general.name")?,
            basename: text("general.basename")?,
            size_label: text("general.size_label")?,
            quantization: quantization(gguf)?,
            parameters: gguf.tensors().iter().map(|t| t.elements()).fold(0, u64::saturating_add),
            weights_bytes: gguf.tensors().iter().map(|t| t.bytes()).sum(),
            n_layer: shape.n_layer,
            n_embd: shape.n_embd,
            n_head: shape.n_head,
            key_length: shape.key_length,
            value_length: shape.value_length,
            kv_elements: shape.kv_elements(gguf, &arch)?,
            n_head_kv: shape.n_head_kv,
            n_ctx_train: shape.n_ctx,
            n_vocab: n_vocab(gguf, &arch, tokenizer.n_tokens)?,
            n_expert: gguf.u32(&format!("{arch}.expert_count"))?.unwrap_or(0),
            pooling_type: pooling.and_then(pooling_type),
            causal: causal_key && !is(DIFFUSION) && !is(ENCODER_ONLY),
            sliding_window: window.and_then(|w| u32::try_from(w).ok()).filter(|&w| w > 0),
            is_recurrent: is(RECURRENT),
            is_hybrid: is(HYBRID),
            is_diffusion: is(DIFFUSION),
            is_encoder_only: is(ENCODER_ONLY),
            is_encoder_decoder: arch == "t5",
            split: split(gguf)?,
            tokenizer,
            architecture: arch,
        })
    }

    /// Bytes of keys and values that one token adds to the cache, over all layers, if every layer
    /// keeps the whole context: an upper bound for models with sliding windows, and 0 for recurrent
    /// models.
    pub fn kv_bytes_per_token(&self, ty: KvType) -> u64 {
        let (key, value) = (u64::from(self.key_length), u64::from(self.value_length));
        let row = |&(k, v): &(u64, u64)| ty.row_bytes(k, key) + ty.row_bytes(v, value);
        self.kv_elements.iter().map(row).sum()
    }

    /// Whether this file is a model that can be loaded by itself: not an adapter, a projector, a
    /// bare vocabulary, or a later part of a split model.
    pub fn is_model(&self) -> bool {
        self.general_type == "model"
            && self.architecture != "clip"
            && self.parameters > 0
            && self.split.is_none_or(|split| split.no == 0)
    }
}

/// Dimensions of a transformer.
struct Shape {
    n_layer: u32,
    n_embd: u32,
    n_head: u32,
    n_head_kv: Vec<u32>,
    key_length: u32,
    value_length: u32,
    n_ctx: u32,
}

impl Shape {
    /// `strict`: whether the file is a model, whose dimensions are required if it has tensors.
    fn read(gguf: &Gguf, arch: &str, strict: bool) -> Result<Shape, GgufError> {
        let needed = strict && arch != "clip" && !gguf.tensors().is_empty();
        let get = |name: &str| {
            let key = format!("{arch}.{name}");
            match gguf.u32(&key)? {
                Some(v) if v > MAX_WIDTH && name != "context_length" => {
                    malformed!("key '{key}' is {v}, more than {MAX_WIDTH}")
                }
                Some(0) if needed && name != "context_length" => malformed!("key '{key}' is 0"),
                Some(v) => Ok(v),
                None if needed => Err(GgufError::MissingKey(key)),
                None => Ok(0),
            }
        };
        let n_layer = get("block_count")?;
        if n_layer > MAX_LAYERS {
            malformed!("key '{arch}.block_count' is {n_layer}, more than {MAX_LAYERS}");
        }
        let n_embd = get("embedding_length")?;
        let n_ctx = get("context_length")?;

        let heads = per_layer(gguf, &format!("{arch}.attention.head_count"), n_layer)?
            .unwrap_or_else(|| vec![0; n_layer as usize]);
        let n_head = heads.iter().copied().max().unwrap_or(0);
        let n_head_kv =
            per_layer(gguf, &format!("{arch}.attention.head_count_kv"), n_layer)?.unwrap_or(heads);
        let length = |name: &str| {
            let key = format!("{arch}.attention.{name}");
            let length = gguf.u32(&key)?.or(n_embd.checked_div(n_head)).unwrap_or(0);
            if length > MAX_WIDTH {
                malformed!("key '{key}' is {length}, more than {MAX_WIDTH}");
            }
            Ok(length)
        };
        let (key_length, value_length) = (length("key_length")?, length("value_length")?);
        Ok(Shape { n_layer, n_embd, n_head, n_head_kv, key_length, value_length, n_ctx })
    }

    /// Elements of K and V per token and layer, as `llama_kv_cache` allocates them.
    fn kv_elements(&self, gguf: &Gguf, arch: &str) -> Result<Vec<(u64, u64)>, GgufError> {
        let caches = !RECURRENT.contains(&arch)
            && !DIFFUSION.contains(&arch)
            && !ENCODER_ONLY.contains(&arch);
        // Latent attention (DeepSeek) caches one vector, from which K and V are computed.
        let latent = gguf.u32(&format!("{arch}.attention.key_length_mla"))?.is_some();
        let interval = match gguf.u32(&format!("{arch}.full_attention_interval"))? {
            Some(n) => n.max(1),
            None if arch == "minimax-01" => 8,
            None if INTERVAL.contains(&arch) => 4,
            None => 1,
        };
        let recurrent =
            per_layer(gguf, &format!("{arch}.attention.recurrent_layers"), self.n_layer)?;
        // In some models (Gemma 4) the last layers use the cache of earlier layers.
        let shared = gguf.get(&format!("{arch}.attention.shared_kv_layers"));
        let shared = shared.and_then(Value::as_u64).unwrap_or(0);
        let predicting = gguf.u32(&format!("{arch}.nextn_predict_layers"))?.unwrap_or(0);
        let without_kv = shared.saturating_add(predicting.into());
        let mut with_kv = u64::from(self.n_layer).saturating_sub(without_kv);
        if arch == "gemma3n" {
            with_kv = with_kv.min(20);
        }

        let layer = |(il, &heads): (usize, &u32)| {
            let attends = match &recurrent {
                Some(layers) => layers[il] == 0,
                None => !INTERVAL.contains(&arch) || (il as u32 + 1).is_multiple_of(interval),
            };
            if !caches || !attends || il as u64 >= with_kv {
                return (0, 0);
            }
            let heads = u64::from(heads);
            let v = if latent { 0 } else { heads * u64::from(self.value_length) };
            (heads * u64::from(self.key_length), v)
        };
        Ok(self.n_head_kv.iter().enumerate().map(layer).collect())
    }
}

/// A key that holds either one number for all layers or an array with one per layer.
fn per_layer(gguf: &Gguf, key: &str, n_layer: u32) -> Result<Option<Vec<u32>>, GgufError> {
    let values = match gguf.get(key) {
        None => return Ok(None),
        Some(Value::Array(_)) => gguf.u64s(key)?.unwrap_or_default(),
        Some(Value::Bool(value)) => vec![u64::from(*value); n_layer as usize],
        Some(_) => vec![gguf.u64(key)?.unwrap_or(0); n_layer as usize],
    };
    if values.len() != n_layer as usize {
        malformed!("key '{key}' has {} elements for {n_layer} layers", values.len());
    }
    if let Some(large) = values.iter().find(|&&v| v > u64::from(MAX_WIDTH)) {
        malformed!("key '{key}' holds {large}, more than {MAX_WIDTH}");
    }
    Ok(Some(values.into_iter().map(|v| v as u32).collect()))
}

/// Vocabulary size: the number of listed tokens, else the key, else the rows of the embedding.
fn n_vocab(gguf: &Gguf, arch: &str, listed: u32) -> Result<u32, GgufError> {
    if listed > 0 {
        return Ok(listed);
    }
    if let Some(n) = gguf.u32(&format!("{arch}.vocab_size"))? {
        return Ok(n);
    }
    let rows = gguf.tensor("token_embd.weight").map_or(0, |t| t.ne()[1]);
    Ok(u32::try_from(rows).unwrap_or(u32::MAX))
}

fn pooling_type(id: u32) -> Option<PoolingType> {
    match id {
        0 => Some(PoolingType::None),
        1 => Some(PoolingType::Mean),
        2 => Some(PoolingType::Cls),
        3 => Some(PoolingType::Last),
        4 => Some(PoolingType::Rank),
        _ => None,
    }
}

fn split(gguf: &Gguf) -> Result<Option<SplitFacts>, GgufError> {
    let count = gguf.u32("split.count")?.unwrap_or(0);
    let no = gguf.u32("split.no")?.unwrap_or(0);
    if count > 0 && no >= count {
        malformed!("key 'split.no' is {no}, but there are only {count} files");
    }
    Ok((count > 1).then_some(SplitFacts { no, count }))
}

/// Name of an `enum llama_ftype` value. Missing numbers were withdrawn.
fn file_type_name(id: u32) -> Option<&'static str> {
    Some(match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4_MOE",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

/// Quantization name by `general.file_type`, else by the type with the most elements.
fn quantization(gguf: &Gguf) -> Result<String, GgufError> {
    /// Flag that llama.cpp sets if it had to guess (`LLAMA_FTYPE_GUESSED`).
    const GUESSED: u32 = 1024;
    let id = gguf.u32("general.file_type")?.map(|id| id & !GUESSED);
    if let Some(name) = id.and_then(file_type_name) {
        return Ok(name.to_owned());
    }
    let elements = |ty: TensorType| -> u64 {
        gguf.tensors()
            .iter()
            .filter(|t| t.ty() == ty)
            .map(|t| t.elements())
            .fold(0, u64::saturating_add)
    };
    let most = TensorType::all().max_by_key(|&ty| elements(ty)).filter(|&ty| elements(ty) > 0);
    Ok(most.map_or_else(|| "unknown".to_owned(), |ty| ty.name().to_owned()))
}
