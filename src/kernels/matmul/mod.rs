//! Products of a packed matrix (rows) and activations (tokens of a batch).
//!
//! A result is one sum over the blocks of a row, in order, whatever tile computes it: a token's
//! result is bit-identical alone and in any batch.

use super::activation::{PANEL, Quantized, Row};
use super::isa::Isa;
use super::pack::{Kind, LANES, Matrix};
use super::pool::Disjoint;
use std::cell::Cell;
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
    /// Two rows for each token, whose products are added: see [`Matrix::takes_wide`].
    Wide(&'a Quantized),
    /// (rows, columns)
    Float(&'a [f32], usize),
}

impl Input<'_> {
    fn row(&self, row: usize) -> Row {
        match self {
            Self::Quantized(x) | Self::Wide(x) => x.row(row),
            Self::Float(x, cols) => {
                Row { f: x[row * cols..(row + 1) * cols].as_ptr(), ..Row::default() }
            }
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Quantized(x) | Self::Wide(x) => x.cols(),
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
    if !matches!(input, Input::Wide(_)) {
        // SAFETY: guaranteed by the caller and checked above.
        return unsafe { run(isa, &weights, groups, input, tokens, out, stride) };
    }
    // The rows of as many tokens as some panels hold.
    const TOKENS: usize = 3 * PANEL;
    let count = groups.len() * LANES;
    let mut sums = SUMS.take();
    let most = 2 * TOKENS.min(tokens.len()) * count;
    if sums.len() < most {
        sums.resize(most, 0.0);
    }
    for first in tokens.clone().step_by(TOKENS) {
        let rows = 2 * first..2 * (first + TOKENS).min(tokens.end);
        // SAFETY: as above; the sums have room for the rows.
        unsafe {
            run(isa, &weights, groups.clone(), input, rows.clone(), sums.as_mut_ptr(), count);
            for (t, pair) in sums.chunks_exact(2 * count).take(rows.len() / 2).enumerate() {
                let (values, rests) = pair.split_at(count);
                let out = out.add((first + t - tokens.start) * stride);
                for (at, (value, rest)) in values.iter().zip(rests).enumerate() {
                    *out.add(at) = value + rest;
                }
            }
        }
    }
    SUMS.set(sums);
}

thread_local! {
    /// Scratch for the products of two rows for each token.
    static SUMS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
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
