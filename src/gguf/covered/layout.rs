//! Layout of the matrices of a layer in a file.

use super::Covered;
use std::ops::Range;

/// The matrices of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Q,
    K,
    V,
    Output,
    Gate,
    Up,
    Down,
}

/// Number of matrices.
pub const TARGETS: usize = 7;

/// The tensors that hold the matrices.
pub const PARTS: [&str; 8] =
    ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

impl Target {
    /// Rows and columns.
    pub fn shape(self, model: &Covered) -> (usize, usize) {
        let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
        match self {
            Self::Q => (q, model.width),
            Self::K | Self::V => (kv, model.width),
            Self::Output => (model.width, q),
            Self::Gate | Self::Up => (model.ff, model.width),
            Self::Down => (model.width, model.ff),
        }
    }
}

/// The matrices that the tensor `part` of a layer holds, concatenated by rows.
fn held(part: &str, model: &Covered) -> &'static [Target] {
    match part {
        "attn_q" => &[Target::Q],
        "attn_k" => &[Target::K],
        "attn_v" => &[Target::V],
        "attn_qkv" => &[Target::Q, Target::K, Target::V],
        "attn_output" => &[Target::Output],
        "ffn_gate" => &[Target::Gate],
        "ffn_up" if model.gate_in_up => &[Target::Gate, Target::Up],
        "ffn_up" => &[Target::Up],
        "ffn_down" => &[Target::Down],
        _ => &[],
    }
}

/// The matrices in a tensor, with the rows of each; empty for a tensor that holds none.
pub fn rows_of(part: &str, model: &Covered) -> Vec<(Target, Range<usize>)> {
    let mut end = 0;
    let mut rows = |target: &Target| {
        let start = end;
        end += target.shape(model).0;
        (*target, start..end)
    };
    held(part, model).iter().map(&mut rows).collect()
}
