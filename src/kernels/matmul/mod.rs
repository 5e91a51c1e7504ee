//! Products of a packed matrix (rows) and activations (tokens of a batch).
//!
//! A result is one sum over the blocks of a row, in order, whatever tile computes it: a token's
//! result is bit-identical alone and in any batch.

use super::activation::{PANEL, Quantized, Row};
use super::isa::Isa;
use super::pack::{Kind, LANES, Matrix};
use super::pool::Disjoint;
use std::ops::Range;

/// Computes a tile of the result: `groups` groups of eight rows from `weights` on, with `blocks`
/// blocks (or columns) per group, times the rows of `x`. Row `t` of the result starts at `out + t *
/// stride`.
///
/// # Safety
/// All of these elements must be readable and writable, and the CPU must support the instructions.
pub(super) type Tile =
    unsafe fn(weights: *const u8, blocks: usize, x: &[Row], out: *mut f32, stride: usize);

/// Activations in the form that a matrix needs.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    Quantized(&'a Quantized),
    /// (rows, columns)
    Float(&'a [f32], usize),
}

impl Input<'_> {
    fn row(&self, row: usize) -> Row {
        match self {
            Self::Quantized(x) => x.row(row),
            Self::Float(x, cols) => {
                Row { f: x[row * cols..(row + 1) * cols].as_ptr(), ..Row::default() }
            }
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Quantized(x) => x.cols(),
            Self::Float(_, cols) => *cols,
        }
    }
}

/// Computes `out[t][n]` for the rows of `groups` and the tokens of `tokens`. The first token's
/// first row is at index `at` of `out`; tokens are `stride` elements apart.
///
/// # Safety
/// `out`'s slice must still be borrowed, and no other thread may access the part that is written.
pub unsafe fn multiply(
    isa: Isa,
    matrix: &Matrix,
    groups: Range<usize>,
    input: &Input,
    tokens: Range<usize>,
    out: Disjoint<f32>,
    at: usize,
    stride: usize,
) {
    assert!(groups.end <= matrix.groups(), "the rows are inside");
    assert_eq!(input.cols(), matrix.cols(), "the input has a value for every column");
    assert_eq!(matches!(input, Input::Quantized(_)), matrix.takes_quantized());
    if tokens.is_empty() || groups.is_empty() {
        return;
    }
    // Check the bounds once for all tiles: the last tile ends where this span does.
    let span = (tokens.len() - 1) * stride + groups.len() * LANES;
    let out = out.span(at, span);
    let weights = Weights::of(matrix);
    let kernels = isa.kernels();
    let mut rows = [Row::default(); PANEL];
    let most = (kernels.tokens)(weights.kind);
    let mut first = tokens.start;
    while first < tokens.end {
        // A tile's tokens are of one panel.
        let count = most.min(tokens.end - first).min(PANEL - first % PANEL);
        for (t, row) in rows[..count].iter_mut().enumerate() {
            *row = input.row(first + t);
        }
        let most = (kernels.groups)(weights.kind, count);
        let mut group = groups.start;
        while group < groups.end {
            let left = groups.end - group;
            let wide = if left >= most { most } else { 1 << left.ilog2() };
            let tile = (kernels.tile)(weights.kind, wide, count);
            let offset = (first - tokens.start) * stride + (group - groups.start) * LANES;
            // SAFETY: the groups and tokens are inside, `span` covers what is written, and the CPU
            // supports the instructions.
            unsafe {
                let from = weights.data.add(group * weights.group_bytes);
                tile(from, weights.blocks, &rows[..count], out.add(offset), stride);
            }
            group += wide;
        }
        first += count;
    }
}

/// A matrix without its type.
struct Weights {
    kind: Kind,
    data: *const u8,
    /// Blocks (or columns) per group.
    blocks: usize,
    group_bytes: usize,
}

impl Weights {
    fn of(matrix: &Matrix) -> Self {
        let raw = matrix.raw();
        let blocks = raw.len / matrix.groups().max(1);
        Self { kind: raw.kind, data: raw.data, blocks, group_bytes: blocks * raw.size }
    }
}

#[cfg(test)]
mod tests;
