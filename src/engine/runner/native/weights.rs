//! A model's weights, read from its GGUF and packed for the kernels.

use super::rounding::{self, LayerResiduals};
use crate::gguf::{
    Gguf, GgufError, LayerKind, ModelConfig, PARTS, PROJECTIONS, Projection, UnsupportedModel,
    dequantize, rows_of,
};
use crate::ipc::{ActivationType, Token};
use crate::kernels::rope::rope;
use crate::kernels::vector::Rope;
use crate::kernels::{Matrix, Pool, Residuals};
use std::ops::Range;

const EMBEDDING: &str = "token_embd.weight";

/// The reason why the native runner rejects a file; llama.cpp may accept it.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    #[error("{0}")]
    File(#[from] GgufError),
    #[error("{0}")]
    Header(#[from] UnsupportedModel),
    #[error("{0}")]
    Other(String),
}

fn unsupported<T>(why: impl Into<String>) -> Result<T, Unsupported> {
    Err(Unsupported::Other(why.into()))
}

/// The weights of one layer; `None` for parts that the architecture lacks.
pub(super) struct Layer {
    pub kind: LayerKind,
    pub attention_norm: Vec<f32>,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    /// Added to queries, keys and values (Qwen2).
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// Norms of single query and key heads (Qwen3, Gemma 3).
    pub qk_norm: Option<[Vec<f32>; 2]>,
    pub output: Matrix,
    /// Norm of attention's output before it is added to the residual stream (Gemma).
    pub attention_post_norm: Option<Vec<f32>>,
    pub ff_norm: Vec<f32>,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    /// Norm of the feed-forward half's output before it is added (Gemma).
    pub ff_post_norm: Option<Vec<f32>>,
    pub residuals: LayerResiduals,
}

pub(super) struct Weights {
    pub shape: ModelConfig,
    /// In the order of the indices in [`LayerKind::rope`].
    pub ropes: Vec<Rope>,
    pub layers: Vec<Layer>,
    pub output_norm: Vec<f32>,
    pub head: Matrix,
    /// Residuals of the inputs of `head`.
    pub head_residuals: Residuals,
    pub parameters: u64,
    /// Embedding rows are read directly from the file.
    pub file: Gguf,
}

impl Weights {
    /// Reads and packs all weights, on all threads of the pool. `context` is the most tokens of a
    /// sequence.
    pub(super) fn load(
        file: Gguf,
        context: usize,
        activations: ActivationType,
        pool: &mut Pool,
    ) -> Result<Self, Unsupported> {
        let shape = ModelConfig::read(&file)?;
        let ropes = shape.ropes.iter().map(|facts| rope(&file, facts, context));
        let ropes = ropes.collect::<Result<_, _>>().map_err(Unsupported::Other)?;
        let mut reader = Reader { file: &file, shape: &shape, activations, pool };
        let layers = (0..shape.layers).map(|layer| reader.layer(layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let tied = file.tensor("output.weight").is_none();
        let head = if tied { EMBEDDING } else { "output.weight" };
        let head = reader.matrix(head, shape.vocab, 0..shape.vocab, shape.width)?;
        let output_norm = reader.vector("output_norm.weight", shape.width)?;
        let parameters = file.tensors().iter().map(|tensor| tensor.elements()).sum();
        let head_residuals = rounding::of_head(activations);
        Ok(Self { shape, ropes, layers, output_norm, head, head_residuals, parameters, file })
    }

    /// (width) the embedding of a token.
    pub(super) fn embedding(&self, token: Token, out: &mut [f32]) -> Result<(), String> {
        let tensor = self.file.tensor(EMBEDDING).expect("it was there at load");
        let data = self.file.data(EMBEDDING).map_err(|error| error.to_string())?;
        let row = data.len() / self.shape.vocab;
        let at = token as usize * row;
        let bytes = data.get(at..at + row);
        let bytes = bytes.ok_or_else(|| format!("token {token} is not in the vocabulary"))?;
        dequantize(tensor.ty(), bytes, out).map_err(|error| error.to_string())?;
        if self.shape.embedding_scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= self.shape.embedding_scale);
        }
        Ok(())
    }
}

struct Reader<'a> {
    file: &'a Gguf,
    shape: &'a ModelConfig,
    activations: ActivationType,
    pool: &'a mut Pool,
}

impl Reader<'_> {
    fn layer(&mut self, layer: usize) -> Result<Layer, Unsupported> {
        let ModelConfig { width, head_dim, .. } = *self.shape;
        let mut matrices = self.matrices(layer)?;
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let norm = |part: &str, len: usize| self.vector(&name(part), len);
        let norm_if_there = |part: &str, len: usize| match self.file.tensor(&name(part)) {
            Some(_) => norm(part, len).map(Some),
            None => Ok(None),
        };
        let mut take = |target: Projection| {
            let why = || Unsupported::Other(format!("layer {layer} has no matrix {target:?}"));
            matrices[target as usize].take().ok_or_else(why)
        };
        let qk_norm =
            (norm_if_there("attn_q_norm", head_dim)?, norm_if_there("attn_k_norm", head_dim)?);
        Ok(Layer {
            kind: self.shape.kinds[layer],
            attention_norm: norm("attn_norm", width)?,
            q: take(Projection::Q)?,
            k: take(Projection::K)?,
            v: take(Projection::V)?,
            qkv_bias: self.biases(layer)?,
            qk_norm: qk_norm.0.zip(qk_norm.1).map(|(q, k)| [q, k]),
            output: take(Projection::O)?,
            attention_post_norm: norm_if_there("post_attention_norm", width)?,
            ff_norm: norm("ffn_norm", width)?,
            gate: take(Projection::Gate)?,
            up: take(Projection::Up)?,
            down: take(Projection::Down)?,
            ff_post_norm: norm_if_there("post_ffw_norm", width)?,
            residuals: rounding::of_layer(self.activations, layer, self.shape.layers),
        })
    }

    /// The layer's matrices, from whichever tensors hold them.
    fn matrices(&mut self, layer: usize) -> Result<[Option<Matrix>; PROJECTIONS], Unsupported> {
        let mut matrices = [const { None }; PROJECTIONS];
        for part in PARTS {
            let name = format!("blk.{layer}.{part}.weight");
            let held = rows_of(part, self.shape);
            let total = held.last().map_or(0, |(_, rows)| rows.end);
            if self.file.tensor(&name).is_none() {
                continue;
            }
            for (target, rows) in held {
                let cols = target.shape(self.shape).1;
                matrices[target as usize] = Some(self.matrix(&name, total, rows, cols)?);
            }
        }
        Ok(matrices)
    }

    /// Biases of queries, keys and values: all three or none.
    fn biases(&self, layer: usize) -> Result<Option<[Vec<f32>; 3]>, Unsupported> {
        let mut biases = [const { None }; PROJECTIONS];
        for part in &PARTS[..4] {
            let name = format!("blk.{layer}.{part}.bias");
            let held = rows_of(part, self.shape);
            if self.file.tensor(&name).is_none() {
                continue;
            }
            let all = self.vector(&name, held.last().map_or(0, |(_, rows)| rows.end))?;
            for (target, rows) in held {
                biases[target as usize] = Some(all[rows].to_vec());
            }
        }
        match biases {
            [Some(q), Some(k), Some(v), ..] => Ok(Some([q, k, v])),
            [None, None, None, ..] => Ok(None),
            _ => unsupported(format!("layer {layer} has biases on some of its projections only")),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Unsupported> {
        let values = self.file.to_f32(name)?;
        match values.len() == len {
            true => Ok(values),
            false => unsupported(format!("`{name}` has {} elements, not {len}", values.len())),
        }
    }

    /// Reads and packs some of the `total` rows of a tensor.
    fn matrix(
        &mut self,
        name: &str,
        total: usize,
        rows: Range<usize>,
        cols: usize,
    ) -> Result<Matrix, Unsupported> {
        let Some(tensor) = self.file.tensor(name) else {
            return unsupported(format!("the file has no tensor `{name}`"));
        };
        if tensor.dims() != [cols as u64, total as u64] {
            let dims = tensor.dims();
            return unsupported(format!("`{name}` is {dims:?}, not {cols} by {total}"));
        }
        let data = self.file.data(name)?;
        let row = data.len() / total;
        let bytes = &data[rows.start * row..rows.end * row];
        let packed = Matrix::pack(tensor.ty(), rows.len(), cols, bytes, self.pool);
        packed.map_err(|error| Unsupported::Other(format!("`{name}`: {error}")))
    }
}
