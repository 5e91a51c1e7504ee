//! A model's weights, read from its GGUF and packed for the kernels.

use crate::gguf::{Covered, Gguf, GgufError, Uncovered, dequantize};
use crate::ipc::Token;
use crate::kernels::vector::{Rope, RopePairs};
use crate::kernels::{Matrix, Pool};
use std::sync::Mutex;

const EMBEDDING: &str = "token_embd.weight";

/// Why the native runner does not take a file; llama.cpp may.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    #[error("{0}")]
    File(#[from] GgufError),
    #[error("{0}")]
    Header(#[from] Uncovered),
    #[error("{0}")]
    Other(String),
}

fn unsupported<T>(why: impl Into<String>) -> Result<T, Unsupported> {
    Err(Unsupported::Other(why.into()))
}

pub struct Layer {
    pub attention_norm: Vec<f32>,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    /// Added to queries, keys and values (Qwen2).
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// Norms of single query and key heads (Qwen3).
    pub qk_norm: Option<[Vec<f32>; 2]>,
    pub output: Matrix,
    pub ff_norm: Vec<f32>,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

pub struct Weights {
    pub shape: Covered,
    pub rope: Rope,
    pub layers: Vec<Layer>,
    pub output_norm: Vec<f32>,
    pub head: Matrix,
    pub parameters: u64,
    /// The embedding's rows are read where they lie.
    pub file: Gguf,
}

impl Weights {
    /// Reads and packs everything, on all threads of the pool.
    pub fn load(file: Gguf, pool: &mut Pool) -> Result<Self, Unsupported> {
        let shape = Covered::read(&file)?;
        let rope = read_rope(&file, &shape)?;
        let reader = Reader { file: &file, shape: &shape };
        let layers: Vec<_> = (0..shape.layers).map(|_| Mutex::new(None)).collect();
        pool.run(shape.layers, |layer| {
            *layers[layer].lock().expect("one thread each") = Some(reader.layer(layer));
        });
        let layers = layers.into_iter().map(|layer| {
            layer.into_inner().expect("one thread each").expect("every layer was read")
        });
        let layers = layers.collect::<Result<_, _>>()?;
        let tied = file.tensor("output.weight").is_none();
        let head = if tied { EMBEDDING } else { "output.weight" };
        let head = reader.matrix(head, shape.vocab, shape.width)?;
        let output_norm = reader.vector("output_norm.weight", shape.width)?;
        let parameters = file.tensors().iter().map(|tensor| tensor.elements()).sum();
        Ok(Self { shape, rope, layers, output_norm, head, parameters, file })
    }

    /// (width) the embedding of a token.
    pub fn embedding(&self, token: Token, out: &mut [f32]) -> Result<(), String> {
        let tensor = self.file.tensor(EMBEDDING).expect("it was there at load");
        let data = self.file.data(EMBEDDING).map_err(|error| error.to_string())?;
        let row = data.len() / self.shape.vocab;
        let at = token as usize * row;
        let bytes = data.get(at..at + row);
        let bytes = bytes.ok_or_else(|| format!("token {token} is not in the vocabulary"))?;
        dequantize(tensor.ty(), bytes, out).map_err(|error| error.to_string())
    }
}

fn read_rope(file: &Gguf, shape: &Covered) -> Result<Rope, Unsupported> {
    let facts = &shape.rope;
    let pairs = if facts.adjacent { RopePairs::Adjacent } else { RopePairs::Halves };
    let factors = match file.tensor("rope_freqs.weight") {
        Some(_) => Some(file.to_f32("rope_freqs.weight")?),
        None => None,
    };
    Ok(Rope::new(pairs, facts.dims, facts.base, facts.scale, factors.as_deref()))
}

struct Reader<'a> {
    file: &'a Gguf,
    shape: &'a Covered,
}

impl Reader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, Unsupported> {
        let Covered { width, heads, kv_heads, head_dim, ff, .. } = *self.shape;
        let name = |part: &str, kind: &str| format!("blk.{layer}.{part}.{kind}");
        let vector = |part: &str, len: usize| self.vector(&name(part, "weight"), len);
        let matrix = |part: &str, rows, cols| self.matrix(&name(part, "weight"), rows, cols);
        let has = |part: &str, kind: &str| self.file.tensor(&name(part, kind)).is_some();
        let (q_rows, kv_rows) = (heads * head_dim, kv_heads * head_dim);
        let qkv_bias = match has("attn_q", "bias") {
            true => Some([
                self.vector(&name("attn_q", "bias"), q_rows)?,
                self.vector(&name("attn_k", "bias"), kv_rows)?,
                self.vector(&name("attn_v", "bias"), kv_rows)?,
            ]),
            false => None,
        };
        let qk_norm = match has("attn_q_norm", "weight") {
            true => Some([vector("attn_q_norm", head_dim)?, vector("attn_k_norm", head_dim)?]),
            false => None,
        };
        Ok(Layer {
            attention_norm: vector("attn_norm", width)?,
            q: matrix("attn_q", q_rows, width)?,
            k: matrix("attn_k", kv_rows, width)?,
            v: matrix("attn_v", kv_rows, width)?,
            qkv_bias,
            qk_norm,
            output: matrix("attn_output", width, q_rows)?,
            ff_norm: vector("ffn_norm", width)?,
            gate: matrix("ffn_gate", ff, width)?,
            up: matrix("ffn_up", ff, width)?,
            down: matrix("ffn_down", width, ff)?,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Unsupported> {
        let values = self.file.to_f32(name)?;
        match values.len() == len {
            true => Ok(values),
            false => unsupported(format!("`{name}` has {} elements, not {len}", values.len())),
        }
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, Unsupported> {
        let Some(tensor) = self.file.tensor(name) else {
            return unsupported(format!("the file has no tensor `{name}`"));
        };
        if tensor.dims() != [cols as u64, rows as u64] {
            let dims = tensor.dims();
            return unsupported(format!("`{name}` is {dims:?}, not {cols} by {rows}"));
        }
        let packed = Matrix::pack(tensor.ty(), rows, cols, self.file.data(name)?);
        packed.map_err(|error| Unsupported::Other(format!("`{name}`: {error}")))
    }
}
