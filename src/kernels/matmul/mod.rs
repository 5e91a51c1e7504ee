//! Products of a packed matrix (rows) and activations (tokens of a batch).
//!
//! A result is one sum over the blocks of a row and then over its residuals, in order, whatever tile
//! computes it: a token's result is bit-identical alone and in any batch. (Where other tokens have
//! residuals and this one has none, zeros are added.)

use super::activation::{PANEL, Quantized, Row};
use super::isa::Isa;
use super::pack::{Kind, LANES, Matrix};
use super::pool::Disjoint;
use std::ops::Range;

/// Computes a tile of the result: `groups` groups of eight rows from `weights` on, with `blocks`
/// blocks (or columns) per group, times the rows of `x`, and times the residuals that follow their
/// blocks. Row `t` of the result starts at `out + t * stride`.
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

/// Tiles of tokens from which on it pays to unpack the weights first.
const UNPACK: usize = 2;

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
    assert_eq!(matches!(input, Input::Float(..)), !matrix.takes_quantized());
    if tokens.is_empty() || groups.is_empty() {
        return;
    }
    // Check the bounds once for all tiles: the last tile ends where this span does.
    let span = (tokens.len() - 1) * stride + groups.len() * LANES;
    let out = out.span(at, span);
    let weights = Weights::of(matrix);
    // SAFETY: guaranteed by the caller and checked above.
    unsafe { run(isa, &weights, groups, input, tokens, out, stride) };
}

/// Computes the products of some rows of the input; the first row's first product is stored at
/// `out`.
///
/// # Safety
/// The groups and rows must be inside, and the products writable; the CPU must have the
/// instructions.
unsafe fn run(
    isa: Isa,
    weights: &Weights,
    groups: Range<usize>,
    input: &Input,
    tokens: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    let kernels = isa.kernels();
    let mut rows = [Row::default(); PANEL];
    let most = (kernels.tokens)(weights.kind);
    let mut first = tokens.start;
    if let Some(tiles) = kernels.tiles.and_then(|tiles| tiles(weights.kind)) {
        // SAFETY: guaranteed by the caller.
        first += unsafe {
            run_unpacked(
                isa,
                tiles,
                most,
                weights,
                groups.clone(),
                input,
                tokens.clone(),
                out,
                stride,
            )
        };
    }
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
            // SAFETY: guaranteed by the caller.
            unsafe {
                let from = weights.data.add(group * weights.group_bytes);
                tile(from, weights.blocks, &rows[..count], out.add(offset), stride);
            }
            group += wide;
        }
        first += count;
    }
}

/// Computes the products of whole tiles of tokens, for which the weights are unpacked first, if
/// there are enough of them. Returns the number of tokens.
///
/// # Safety
/// As for [`run`].
unsafe fn run_unpacked(
    isa: Isa,
    tiles: Tile,
    most: usize,
    weights: &Weights,
    groups: Range<usize>,
    input: &Input,
    tokens: Range<usize>,
    out: *mut f32,
    stride: usize,
) -> usize {
    let whole = tokens.len() / most;
    let pairs = groups.start..groups.start + groups.len() / 2 * 2;
    if whole < UNPACK || pairs.is_empty() || !tokens.start.is_multiple_of(most) {
        return 0;
    }
    let done = tokens.start..tokens.start + whole * most;
    let x: Vec<Row> = done.clone().step_by(most).map(|first| input.row(first)).collect();
    for group in pairs.clone().step_by(2) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let from = weights.data.add(group * weights.group_bytes);
            tiles(from, weights.blocks, &x, out.add((group - groups.start) * LANES), stride);
        }
    }
    if pairs.end < groups.end {
        // SAFETY: as above; a single group is not unpacked.
        unsafe {
            let out = out.add((pairs.end - groups.start) * LANES);
            run(isa, weights, pairs.end..groups.end, input, done.clone(), out, stride);
        }
    }
    done.len()
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
