//! Layout of the matrices of a layer in a file.

use super::ModelConfig;
use std::ops::Range;

/// The matrices of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

/// Number of matrices.
pub const PROJECTIONS: usize = 7;

/// The tensors that hold the matrices.
pub const PARTS: [&str; 8] =
    ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

impl Projection {
    /// Rows and columns.
    pub fn shape(self, model: &ModelConfig) -> (usize, usize) {
        let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
        match self {
            Self::Q => (q, model.width),
            Self::K | Self::V => (kv, model.width),
            Self::O => (model.width, q),
            Self::Gate | Self::Up => (model.ff, model.width),
            Self::Down => (model.width, model.ff),
        }
    }
}

/// The matrices that the tensor `part` of a layer holds, concatenated by rows.
fn held(part: &str, model: &ModelConfig) -> &'static [Projection] {
    match part {
        "attn_q" => &[Projection::Q],
        "attn_k" => &[Projection::K],
        "attn_v" => &[Projection::V],
        "attn_qkv" => &[Projection::Q, Projection::K, Projection::V],
        "attn_output" => &[Projection::O],
        "ffn_gate" => &[Projection::Gate],
        "ffn_up" if model.gate_in_up => &[Projection::Gate, Projection::Up],
        "ffn_up" => &[Projection::Up],
        "ffn_down" => &[Projection::Down],
        _ => &[],
    }
}

/// The matrices in a tensor, with the rows of each; empty for a tensor that holds none.
pub fn rows_of(part: &str, model: &ModelConfig) -> Vec<(Projection, Range<usize>)> {
    let mut end = 0;
    let mut rows = |target: &Projection| {
        let start = end;
        end += target.shape(model).0;
        (*target, start..end)
    };
    held(part, model).iter().map(&mut rows).collect()
}
