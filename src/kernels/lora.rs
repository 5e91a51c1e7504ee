//! LoRA adapters applied beside a matrix product: each row of a batch may have a different one.

use super::isa::isa;
use super::matmul::{Input, multiply};
use super::ops::Activations;
use super::pack::{LANES, Matrix};
use super::pool::{Disjoint, Pool};
use super::vector::add;
use std::ops::Range;

/// Rows of one adapter per chunk of the first products.
const LORA_TILE: usize = 8;

/// The two small matrices of a LoRA (Hu et al. 2021, arXiv:2106.09685).
///
/// Stored in f16: if every row has its own adapter, these matrices are most of what a step reads.
/// They are scaled by powers of two into the range of f16 with full precision, so that the small
/// values of a barely trained adapter are preserved.
#[derive(Debug)]
pub struct LoraPair {
    /// (rank, columns)
    a: Matrix,
    /// (rows, rank padded to eight)
    b: Matrix,
    /// The scale to multiply the product of both by; includes the powers of two.
    scale: f32,
}

/// The power of two that scales the largest magnitude to between 1 and 2.
fn shift(values: &[f32]) -> i32 {
    let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    match largest.is_normal() {
        true => -(largest.log2().floor() as i32),
        false => 0,
    }
}

impl LoraPair {
    /// Creates a pair from `a` (rank, cols) and `b` (rows, rank), row-major; the product is
    /// multiplied by `scale`.
    ///
    /// # Panics
    /// If the lengths do not match.
    pub fn new(rank: usize, a: &[f32], b: &[f32], scale: f32) -> Self {
        assert!(rank > 0 && a.len().is_multiple_of(rank) && b.len().is_multiple_of(rank));
        let padded = rank.next_multiple_of(LANES);
        let rows = b.chunks_exact(rank);
        let b: Vec<f32> =
            rows.flat_map(|row| (0..padded).map(|r| row.get(r).copied().unwrap_or(0.0))).collect();
        let (of_a, of_b) = (shift(a), shift(&b));
        Self {
            a: Matrix::in_f16(rank, a.len() / rank, a, of_a),
            b: Matrix::in_f16(b.len() / padded, padded, &b, of_b),
            scale: scale * f32::powi(2.0, -of_a) * f32::powi(2.0, -of_b),
        }
    }

    /// Rows and columns of the matrix that it changes.
    pub fn shape(&self) -> (usize, usize) {
        (self.b.rows(), self.a.cols())
    }

    pub fn bytes(&self) -> usize {
        self.a.bytes().len() + self.b.bytes().len()
    }
}

/// Ordered, disjoint ranges of rows, each with the LoRA that applies to a matrix for these rows.
/// The ranks may differ.
pub type Adapted<'a> = Vec<(Range<usize>, &'a LoraPair)>;

/// The results of the first products. A range's rows are consecutive, from its first row times the
/// largest rank on.
#[derive(Clone, Copy)]
pub(super) struct Low<'a> {
    widest: usize,
    values: &'a [f32],
}

/// Multiplies the rows of `x` by the first matrices of all LoRAs, in one job. Returns, for each of
/// `adapted`, the input of [`add_second_halves`].
pub(super) fn first_halves<'a>(
    pool: &mut Pool,
    x: &Activations,
    adapted: &[&[(Range<usize>, &LoraPair)]],
    low: &'a mut Vec<f32>,
) -> Vec<Low<'a>> {
    let all = || adapted.iter().flat_map(|ranges| ranges.iter());
    let widest = all().map(|(_, pair)| pair.b.cols()).max().unwrap_or(0);
    let size = x.rows() * widest;
    low.clear();
    low.resize(adapted.len() * size, 0.0);
    let mut tiles = Vec::new();
    for (number, ranges) in adapted.iter().enumerate() {
        let fits = |(rows, pair): &(Range<usize>, &LoraPair)| {
            rows.end <= x.rows() && pair.a.cols() == x.cols()
        };
        assert!(ranges.iter().all(fits) && ranges.is_sorted_by(|a, b| a.0.end <= b.0.start));
        for (rows, pair) in ranges.iter() {
            let at = number * size + rows.start * widest;
            tiles.extend(rows.clone().step_by(LORA_TILE).map(|from| {
                let tile = from..(from + LORA_TILE).min(rows.end);
                (tile, *pair, at + (from - rows.start) * pair.b.cols())
            }));
        }
    }
    let part = Disjoint::new(low);
    pool.run(tiles.len(), |chunk| {
        let (rows, LoraPair { a, b, scale }, at) = tiles[chunk].clone();
        let size = rows.len() * b.cols();
        // SAFETY: a row's values belong to one chunk.
        unsafe {
            multiply(isa(), a, 0..a.groups(), &x.floats(), rows, part, at, b.cols());
            part.part(at, size).iter_mut().for_each(|x| *x *= scale);
        }
    });
    let low = &*low;
    (0..adapted.len())
        .map(|number| Low { widest, values: &low[number * size..(number + 1) * size] })
        .collect()
}

/// Adds the second matrices' products to `out`: the columns of `groups` for the rows `tokens`. The
/// first row's first column is at `at`; the rows are `stride` elements apart.
///
/// # Safety
/// As for [`multiply`].
pub(super) unsafe fn add_second_halves(
    adapted: &Adapted,
    low: Low,
    groups: Range<usize>,
    tokens: Range<usize>,
    out: Disjoint<f32>,
    at: usize,
    stride: usize,
) {
    let count = groups.len() * LANES;
    for (range, LoraPair { b, .. }) in adapted {
        let rows = range.start.max(tokens.start)..range.end.min(tokens.end);
        if rows.is_empty() {
            continue;
        }
        let from = range.start * low.widest;
        let input = Input::Float(&low.values[from..from + range.len() * b.cols()], b.cols());
        let mut delta = vec![0f32; rows.len() * count];
        let (part, inside) = (Disjoint::new(&mut delta), rows.start - range.start);
        // SAFETY: `delta` is local to this call; `out` is guaranteed by the caller.
        unsafe {
            let rows = inside..inside + rows.len();
            multiply(isa(), b, groups.clone(), &input, rows, part, 0, count);
        }
        for (row, delta) in rows.zip(delta.chunks_exact(count)) {
            // SAFETY: guaranteed by the caller.
            unsafe { add(out.part(at + (row - tokens.start) * stride, count), delta) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from 1e-7 to 1e3 keep the precision of f16.
    #[test]
    fn magnitudes_do_not_matter() {
        let (rank, cols, rows) = (3, 64, 24);
        let numbers = |count: usize, size: f32| -> Vec<f32> {
            (0..count).map(|i| size * ((i * 37 % 101) as f32 / 50.0 - 1.0)).collect()
        };
        let x = numbers(cols, 1.0);
        for (size_a, size_b) in [(1.0, 1.0), (0.02, 1e-7), (1e3, 1e-3), (1e-6, 1e-6), (0.0, 1.0)] {
            let (a, b) = (numbers(rank * cols, size_a), numbers(rows * rank, size_b));
            let pair = LoraPair::new(rank, &a, &b, 2.0);
            let mut pool = Pool::new(1).unwrap();
            let mut input = Activations::default();
            input.resize(1, cols);
            super::super::ops::norm(&mut pool, &x, &vec![1.0; cols], 1e-6, &mut input);
            let x = input.row(0).to_vec();
            let (mut low, mut out) = (Vec::new(), vec![0f32; rows]);
            let adapted: Adapted = vec![(0..1, &pair)];
            let low = first_halves(&mut pool, &input, &[&adapted], &mut low)[0];
            let part = Disjoint::new(&mut out);
            // SAFETY: no other thread has access to `out`.
            unsafe { add_second_halves(&adapted, low, 0..rows / LANES, 0..1, part, 0, rows) };
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let low: Vec<f32> = a.chunks(cols).map(|row| dot(row, &x) as f32).collect();
            let expected: Vec<f64> = b.chunks(rank).map(|row| 2.0 * dot(row, &low)).collect();
            let largest = expected.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            for (got, expected) in out.iter().zip(&expected) {
                let error = (f64::from(*got) - expected).abs();
                assert!(error <= 2e-3 * largest, "{got} for {expected} of {largest}");
            }
        }
    }
}
