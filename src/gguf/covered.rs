//! [`Covered`]: what a header must say for our own kernels to run the model.
//!
//! The gateway plans by it and the engine loads by it, so both take the same side.

use super::{Gguf, GgufError, TensorInfo, TensorType};

/// Types of matrices that there are kernels for.
pub const KERNEL_TYPES: [TensorType; 11] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
];

/// Decoder-only transformers with RMS norms, rotary positions and SiLU-gated feed-forward layers
/// (Touvron et al. 2023, arXiv:2302.13971), and whether the two halves of a rotated pair are
/// neighbours. Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) need no more than the biases,
/// head norms and distant pairs that the runner has, but come in only with a test against llama.cpp.
const ARCHITECTURES: [(&str, bool); 1] = [("llama", true)];

/// Columns of a quantized block, and a multiple of every kernel's width.
const BLOCK: usize = 32;

/// Why llama.cpp has to run a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Uncovered {
    #[error("{0}")]
    File(String),
    #[error("the architecture `{0}` is not covered")]
    Architecture(String),
    #[error("tensor `{name}` is of type {ty}, which has no kernel yet")]
    Type { name: String, ty: &'static str },
    #[error("{0}")]
    Other(String),
}

impl From<GgufError> for Uncovered {
    fn from(error: GgufError) -> Self {
        Self::File(error.to_string())
    }
}

/// The numbers of a model that the native runner covers.
#[derive(Debug, Clone, PartialEq)]
pub struct Covered {
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
    /// Of the norms.
    pub epsilon: f32,
    pub rope: RopeFacts,
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFacts {
    /// The halves of a pair are neighbours; otherwise half the rotated elements apart.
    pub adjacent: bool,
    /// Rotated elements of a head.
    pub dims: usize,
    pub base: f32,
    /// Positions are multiplied by it.
    pub scale: f32,
}

impl Covered {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Uncovered`] with the reason.
    pub fn read(file: &Gguf) -> Result<Self, Uncovered> {
        let architecture = file.str("general.architecture")?.unwrap_or_default().to_owned();
        let known = ARCHITECTURES.iter().find(|(name, _)| *name == architecture);
        let Some(&(_, adjacent)) = known else {
            return Err(Uncovered::Architecture(architecture));
        };
        let keys = Keys { file, architecture: &architecture };
        let (width, heads) =
            (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
        let head_dim = keys.optional("attention.key_length")?.unwrap_or(width / heads);
        let covered = Self {
            layers: keys.needed("block_count")?,
            width,
            heads,
            kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ff: keys.needed("feed_forward_length")?,
            vocab: match file.tensor("token_embd.weight").map(TensorInfo::dims) {
                Some(&[_, rows]) => rows as usize,
                _ => return other("the file has no matrix `token_embd.weight`"),
            },
            epsilon: keys.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            rope: keys.rope(adjacent, head_dim)?,
            architecture: architecture.clone(),
        };
        if keys.optional("expert_count")?.unwrap_or(0) > 0 {
            return other("mixtures of experts are not covered");
        }
        let value_length = keys.optional("attention.value_length")?.unwrap_or(head_dim);
        covered.check_shape(value_length)?;
        covered.check_sizes(file)?;
        check_tensors(file)?;
        Ok(covered)
    }

    fn check_shape(&self, value_length: usize) -> Result<(), Uncovered> {
        let blocks = |n: usize| n > 0 && n.is_multiple_of(BLOCK);
        let fits = self.kv_heads > 0
            && self.heads.is_multiple_of(self.kv_heads)
            && blocks(self.width)
            && blocks(self.ff)
            && blocks(self.heads / self.kv_heads * self.head_dim)
            && self.head_dim.is_multiple_of(8)
            && value_length == self.head_dim;
        match fits {
            true => Ok(()),
            false => other(format!("no kernel fits its dimensions: {self:?}")),
        }
    }

    /// Nothing may be announced that the file's tensors do not bear out: room is made by these
    /// numbers.
    fn check_sizes(&self, file: &Gguf) -> Result<(), Uncovered> {
        let largest = file.tensors().iter().map(TensorInfo::elements).max().unwrap_or(0);
        let sizes = [self.width, self.ff, self.heads * self.head_dim];
        match sizes.iter().all(|&size| size as u64 <= largest)
            && self.layers <= file.tensors().len()
        {
            true => Ok(()),
            false => other(format!("its tensors do not bear out its dimensions: {self:?}")),
        }
    }
}

/// Every matrix must have a kernel, and nothing may be there that would be left out.
fn check_tensors(file: &Gguf) -> Result<(), Uncovered> {
    for tensor in file.tensors() {
        let name = tensor.name();
        if tensor.dims().len() > 1 && !KERNEL_TYPES.contains(&tensor.ty()) {
            return Err(Uncovered::Type { name: name.into(), ty: tensor.ty().name() });
        }
        let last = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let known = match last.map_or(name, |(_, part)| part) {
            "token_embd.weight" | "output.weight" | "output_norm.weight" | "rope_freqs.weight" => {
                true
            }
            "attn_q.bias" | "attn_k.bias" | "attn_v.bias" => true,
            part => part.strip_suffix(".weight").is_some_and(|part| {
                matches!(part, "attn_norm" | "attn_q" | "attn_k" | "attn_v" | "attn_output")
                    || matches!(part, "attn_q_norm" | "attn_k_norm" | "ffn_norm" | "ffn_gate")
                    || matches!(part, "ffn_up" | "ffn_down")
            }),
        };
        if !known {
            return other(format!("tensor `{name}` is not covered"));
        }
    }
    Ok(())
}

fn other<T>(why: impl Into<String>) -> Result<T, Uncovered> {
    Err(Uncovered::Other(why.into()))
}

/// Numbers under the architecture's own keys.
struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn optional(&self, name: &str) -> Result<Option<usize>, Uncovered> {
        Ok(self.file.u32(&self.key(name))?.map(|number| number as usize))
    }

    fn needed(&self, name: &str) -> Result<usize, Uncovered> {
        match self.optional(name)? {
            Some(number) if number > 0 => Ok(number),
            _ => other(format!("the file has no number `{}`", self.key(name))),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f32>, Uncovered> {
        Ok(self.file.f32(&self.key(name))?)
    }

    fn rope(&self, adjacent: bool, head_dim: usize) -> Result<RopeFacts, Uncovered> {
        let kind = self.key("rope.scaling.type");
        let scale = match self.file.str(&kind)?.unwrap_or("none") {
            "none" => 1.0,
            "linear" => 1.0 / self.float("rope.scaling.factor")?.unwrap_or(1.0),
            kind => return other(format!("rope scaling `{kind}` is not covered")),
        };
        let dims = self.optional("rope.dimension_count")?.unwrap_or(head_dim);
        if dims > head_dim || dims % 2 != 0 || dims == 0 {
            return other(format!("{dims} rotated elements do not fit heads of {head_dim}"));
        }
        let base = self.float("rope.freq_base")?.unwrap_or(10_000.0);
        Ok(RopeFacts { adjacent, dims, base, scale })
    }
}
