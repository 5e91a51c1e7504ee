//! [`ModelConfig`]: the configuration of a model that the native runner supports, read from the header.
//!
//! The gateway plans with it and the engine loads with it, so both choose the same runner. Every
//! family is a decoder with RMS norms, rotary positions and gated feed-forward layers; each
//! family's own file states the differences.

mod gemma;
mod layout;
mod llama;
mod phi;
mod qwen;
mod rope;

pub use layout::{PARTS, PROJECTIONS, Projection, rows_of};
pub use rope::{RopeFactors, RopeFacts, Yarn};

use super::{Gguf, GgufError, TensorInfo, TensorType};

/// Types of matrices that have kernels.
pub const KERNEL_TYPES: [TensorType; 15] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::IQ4_NL,
    TensorType::IQ4_XS,
];

/// An architecture, identified by its GGUF name.
struct Family {
    name: &'static str,
    /// Weights of a layer that the family needs in addition to those of all families.
    needs: &'static [&'static str],
    /// Optional tensors outside the layers.
    takes: &'static [&'static str],
    read: fn(&Keys) -> Result<ModelConfig, UnsupportedModel>,
}

const FAMILIES: [Family; 6] =
    [llama::LLAMA, qwen::QWEN2, qwen::QWEN3, phi::PHI3, gemma::GEMMA2, gemma::GEMMA3];

/// Columns of a quantized block; a multiple of the vector width of every kernel.
const BLOCK: usize = 32;
/// Maximum number of query elements per token: far above any model, and sums of rows cannot
/// overflow.
const MAX_QUERY: usize = 1 << 24;

/// Reason why llama.cpp has to run a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnsupportedModel {
    #[error("{0}")]
    File(String),
    #[error("the architecture `{0}` is not covered")]
    Architecture(String),
    #[error("tensor `{name}` is of type {ty}, which has no kernel yet")]
    Type { name: String, ty: &'static str },
    #[error("{0}")]
    Other(String),
}

impl From<GgufError> for UnsupportedModel {
    fn from(error: GgufError) -> Self {
        Self::File(error.to_string())
    }
}

/// Dimensions and constants of a model that the native runner supports.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: String,
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Width of the feed-forward layers.
    pub ff: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Epsilon of the norms.
    pub epsilon: f32,
    /// Factor on token embeddings.
    pub embedding_scale: f32,
    /// Factor on attention scores.
    pub attention_scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub attention_cap: Option<f32>,
    /// The same cap for logits.
    pub logit_cap: Option<f32>,
    pub gating: Gating,
    /// Whether `ffn_up` holds the gate's rows, followed by its own.
    pub gate_in_up: bool,
    /// (layers)
    pub kinds: Vec<LayerKind>,
    /// RoPE variants, indexed by [`LayerKind::rope`].
    pub ropes: Vec<RopeFacts>,
}

/// Properties that may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerKind {
    /// Number of tokens that a query sees, including its own as the last; `None`: all.
    pub window: Option<usize>,
    /// Index into [`ModelConfig::ropes`].
    pub rope: usize,
}

/// The activation of the gate (Shazeer 2020, arXiv:2002.05202).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gating {
    Silu,
    /// In the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    Gelu,
}

impl ModelConfig {
    /// Reads the header.
    ///
    /// # Errors
    /// [`UnsupportedModel`] with the reason why the model is not supported.
    pub fn read(file: &Gguf) -> Result<Self, UnsupportedModel> {
        let architecture = file.str("general.architecture")?.unwrap_or_default();
        let Some(family) = FAMILIES.iter().find(|family| family.name == architecture) else {
            return Err(UnsupportedModel::Architecture(architecture.into()));
        };
        let keys = Keys { file, architecture };
        if keys.optional("expert_count")?.unwrap_or(0) > 0 {
            return other("mixtures of experts are not covered");
        }
        if file.bool(&keys.key("attention.causal"))? == Some(false) {
            return other("attention to later tokens is not covered");
        }
        // `enum llama_pooling_type`: unspecified, none, or the last token's.
        if !matches!(keys.optional("pooling_type")?, None | Some(0 | 3)) {
            return other("embeddings other than the last token's are not covered");
        }
        let covered = (family.read)(&keys)?;
        let value_length = keys.optional("attention.value_length")?.unwrap_or(covered.head_dim);
        covered.check_shape(value_length)?;
        covered.check_sizes(file)?;
        check_tensors(file, family, covered.layers)?;
        Ok(covered)
    }

    fn check_shape(&self, value_length: usize) -> Result<(), UnsupportedModel> {
        let Self { width, ff, heads, kv_heads, head_dim, .. } = *self;
        let blocks = |n: usize| n > 0 && n.is_multiple_of(BLOCK);
        let problem = match () {
            () if kv_heads == 0 || !heads.is_multiple_of(kv_heads) => {
                format!("its {heads} heads are no multiple of its {kv_heads} KV heads")
            }
            () if !blocks(width) => format!("its width of {width} is no multiple of {BLOCK}"),
            () if !blocks(ff) => {
                format!("its feed-forward width of {ff} is no multiple of {BLOCK}")
            }
            () if !head_dim.is_multiple_of(8) || !blocks(heads / kv_heads * head_dim) => format!(
                "the queries of one of its KV heads ({} heads of {head_dim}) are no multiple of \
                 {BLOCK}",
                heads / kv_heads
            ),
            () if heads.saturating_mul(head_dim) > MAX_QUERY => {
                format!("its {heads} heads of {head_dim} are more than {MAX_QUERY} wide")
            }
            () if value_length != head_dim => {
                format!("its values are {value_length} wide, its keys {head_dim}")
            }
            () => return Ok(()),
        };
        other(format!("no kernel fits its dimensions: {problem}"))
    }

    /// Checks the sizes in the header against the file's tensors, because memory is allocated by
    /// these sizes.
    fn check_sizes(&self, file: &Gguf) -> Result<(), UnsupportedModel> {
        let largest = file.tensors().iter().map(TensorInfo::elements).max().unwrap_or(0);
        let sizes = [
            ("width", self.width),
            ("feed-forward width", self.ff),
            ("heads' width", self.heads.saturating_mul(self.head_dim)),
        ];
        match sizes.iter().find(|(_, size)| *size as u64 > largest) {
            None => Ok(()),
            Some((what, size)) => other(format!(
                "its {what} is {size}, but its largest tensor has {largest} elements: the file's \
                 header is wrong"
            )),
        }
    }
}

/// Checks that every matrix has a kernel and that no tensor would be ignored.
fn check_tensors(file: &Gguf, family: &Family, layers: usize) -> Result<(), UnsupportedModel> {
    for tensor in file.tensors() {
        let name = tensor.name();
        if tensor.dims().len() > 1 && !KERNEL_TYPES.contains(&tensor.ty()) {
            return Err(UnsupportedModel::Type { name: name.into(), ty: tensor.ty().name() });
        }
        let known = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((_, part)) => known_of_layer(part, family),
            None => {
                matches!(name, "token_embd.weight" | "output.weight" | "output_norm.weight")
                    || family.takes.contains(&name)
            }
        };
        if !known {
            return other(format!("tensor `{name}` is not covered"));
        }
    }
    for (layer, part) in (0..layers).flat_map(|layer| family.needs.iter().map(move |p| (layer, p)))
    {
        let name = format!("blk.{layer}.{part}.weight");
        if file.tensor(&name).is_none() {
            return other(format!("the file has no tensor `{name}`"));
        }
    }
    Ok(())
}

fn known_of_layer(part: &str, family: &Family) -> bool {
    match part.rsplit_once('.') {
        Some((part, "bias")) => matches!(part, "attn_q" | "attn_k" | "attn_v" | "attn_qkv"),
        Some((part, "weight")) => {
            matches!(part, "attn_norm" | "attn_q" | "attn_k" | "attn_v" | "attn_qkv")
                || matches!(part, "attn_output" | "ffn_norm" | "ffn_gate" | "ffn_up" | "ffn_down")
                || family.needs.contains(&part)
        }
        _ => false,
    }
}

fn other<T>(why: impl Into<String>) -> Result<T, UnsupportedModel> {
    Err(UnsupportedModel::Other(why.into()))
}

/// Reader of the keys with the architecture's prefix.
struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn optional(&self, name: &str) -> Result<Option<usize>, UnsupportedModel> {
        Ok(self.file.u32(&self.key(name))?.map(|number| number as usize))
    }

    fn needed(&self, name: &str) -> Result<usize, UnsupportedModel> {
        match self.optional(name)? {
            Some(number) if number > 0 => Ok(number),
            _ => other(format!("the file has no number `{}`", self.key(name))),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f32>, UnsupportedModel> {
        Ok(self.file.f32(&self.key(name))?)
    }

    /// Reads a cap; 0 in the file means none.
    fn cap(&self, name: &str, default: f32) -> Result<Option<f32>, UnsupportedModel> {
        let cap = self.float(name)?.unwrap_or(default);
        match cap.is_finite() && cap >= 0.0 {
            true => Ok(Some(cap).filter(|&cap| cap > 0.0)),
            false => other(format!("`{}` is {cap}", self.key(name))),
        }
    }

    /// The configuration that families share: full attention, SiLU, one RoPE, no scaling.
    fn decoder(&self, adjacent: bool) -> Result<ModelConfig, UnsupportedModel> {
        let (width, heads) =
            (self.needed("embedding_length")?, self.needed("attention.head_count")?);
        let head_dim = self.optional("attention.key_length")?.unwrap_or(width / heads);
        let layers = self.needed("block_count")?;
        if layers > self.file.tensors().len() {
            return other(format!("the file has fewer tensors than its {layers} layers"));
        }
        let vocab = match self.file.tensor("token_embd.weight").map(TensorInfo::dims) {
            Some(&[_, rows]) => rows as usize,
            _ => return other("the file has no matrix `token_embd.weight`"),
        };
        Ok(ModelConfig {
            architecture: self.architecture.to_owned(),
            layers,
            width,
            heads,
            kv_heads: self.optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ff: self.needed("feed_forward_length")?,
            vocab,
            epsilon: self.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            embedding_scale: 1.0,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_cap: None,
            logit_cap: None,
            gating: Gating::Silu,
            gate_in_up: false,
            kinds: vec![LayerKind::default(); layers],
            ropes: vec![self.rope(adjacent, head_dim)?],
        })
    }
}
