//! Dense products of training.
//!
//! The right side is packed into strips of sixteen columns, which stay in the first cache while rows
//! of the left side pass by, six at a time (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053).
//! [`product`] shares the result's rows out in blocks of a fixed size, so that no sum depends on how
//! many threads there are.

use super::real::Real;
use rayon::prelude::*;
use std::ops::Range;

/// Columns of a strip.
pub const STRIP: usize = 16;
/// Rows of a tile, at most.
pub const TILE: usize = 6;
/// Terms of a sum that a tile adds at a time: a strip of so many is 32 KB of f32.
const DEPTH: usize = 512;
/// Rows of the result that one thread computes at a time.
const ROWS: usize = 60;

/// Adds a product to a tile of the result, or puts it there: `rows` rows of `a`, whose elements lie by
/// `strides`, times a strip (`depth`, [`STRIP`]); a row of `out` every `stride` numbers.
///
/// # Safety
/// All of that can be read and written, and the CPU has the instructions.
pub type Tile<T> = unsafe fn(
    depth: usize,
    a: *const T,
    strides: [usize; 2],
    strip: *const T,
    out: *mut T,
    stride: usize,
    add: bool,
);

/// A matrix that lies somewhere in a slice, by any strides.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    /// From a row to the next, and from a column to the next.
    strides: [usize; 2],
}

impl<'a, T> Mat<'a, T> {
    /// (rows, columns), row by row.
    ///
    /// # Panics
    /// If there are not as many numbers.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{rows} rows of {cols}");
        Self { data, rows, cols, strides: [cols, 1] }
    }

    /// (rows, columns) a part of `x` (…, `stride`).
    pub fn part(x: &'a [T], rows: Range<usize>, cols: Range<usize>, stride: usize) -> Self {
        let whole = Mat { data: x, rows: x.len() / stride, cols: stride, strides: [stride, 1] };
        whole.rows(rows).cols(cols)
    }

    /// (columns, rows)
    pub fn t(self) -> Self {
        let [row, col] = self.strides;
        Self { rows: self.cols, cols: self.rows, strides: [col, row], ..self }
    }

    /// Some of the rows.
    pub fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let from = if rows.is_empty() { 0 } else { rows.start * self.strides[0] };
        Self { data: &self.data[from..], rows: rows.len(), ..self }
    }

    /// Some of the columns.
    pub fn cols(self, cols: Range<usize>) -> Self {
        self.t().rows(cols).t()
    }

    fn check(&self) {
        if self.rows > 0 && self.cols > 0 {
            let last = (self.rows - 1) * self.strides[0] + (self.cols - 1) * self.strides[1];
            assert!(last < self.data.len(), "the matrix is inside its slice");
        }
    }
}

/// Where a product goes: the columns from `at` on of rows that are `stride` long.
#[derive(Clone, Copy)]
struct Place {
    stride: usize,
    at: usize,
    add: bool,
}

/// `out = a b`, or `out += a b`; `out` (rows, `stride`) holds the product in its columns from `at`
/// on. On this thread.
///
/// # Panics
/// If the shapes do not fit.
pub fn product_here<T: Real>(
    a: Mat<T>,
    b: Mat<T>,
    out: &mut [T],
    stride: usize,
    at: usize,
    add: bool,
) {
    check(&a, &b, out, stride, at);
    with_scratch(strips(b.cols) * b.rows * STRIP, |packed| {
        packed.chunks_exact_mut((b.rows * STRIP).max(1)).enumerate().for_each(|(strip, packed)| {
            pack(b, strip, packed);
        });
        compute(a, packed, b.cols, out, Place { stride, at, add });
    });
}

/// As [`product_here`], on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub fn product<T: Real>(a: Mat<T>, b: Mat<T>, out: &mut [T], stride: usize, at: usize, add: bool) {
    check(&a, &b, out, stride, at);
    with_scratch(strips(b.cols) * b.rows * STRIP, |packed| {
        let each = (b.rows * STRIP).max(1);
        packed.par_chunks_exact_mut(each).enumerate().for_each(|(strip, packed)| {
            pack(b, strip, packed);
        });
        let packed = &*packed;
        out.par_chunks_mut(ROWS * stride).enumerate().for_each(|(block, out)| {
            let rows = block * ROWS..((block + 1) * ROWS).min(a.rows);
            if rows.start < rows.end {
                compute(a.rows(rows), packed, b.cols, out, Place { stride, at, add });
            }
        });
    });
}

fn check<T>(a: &Mat<T>, b: &Mat<T>, out: &[T], stride: usize, at: usize) {
    assert_eq!(a.cols, b.rows, "inner sizes");
    let end = a.rows.saturating_sub(1) * stride + at + b.cols;
    assert!(at + b.cols <= stride && (a.rows == 0 || end <= out.len()), "the result is inside");
    a.check();
    b.check();
}

fn strips(cols: usize) -> usize {
    cols.div_ceil(STRIP)
}

/// Lends a buffer that the thread keeps. A second one is made if the first is lent.
fn with_scratch<T: Real>(len: usize, run: impl FnOnce(&mut [T])) {
    let mut scratch = T::scratch().take();
    if scratch.len() < len {
        scratch.resize(len, T::ZERO);
    }
    run(&mut scratch[..len]);
    T::scratch().set(scratch);
}

/// (rows, [`STRIP`]) some columns of `b`; those that are not there are zeros.
fn pack<T: Real>(b: Mat<T>, strip: usize, packed: &mut [T]) {
    let from = strip * STRIP;
    let cols = STRIP.min(b.cols - from);
    let [row, col] = b.strides;
    if col == 1 {
        for (k, packed) in packed.chunks_exact_mut(STRIP).enumerate() {
            packed[..cols].copy_from_slice(&b.data[k * row + from..][..cols]);
            packed[cols..].fill(T::ZERO);
        }
        return;
    }
    // Sixteen rows at a time: what is written stays in the first cache.
    for (block, packed) in packed.chunks_mut(STRIP * STRIP).enumerate() {
        let depth = packed.len() / STRIP;
        for c in 0..STRIP {
            if c >= cols {
                (0..depth).for_each(|k| packed[k * STRIP + c] = T::ZERO);
                continue;
            }
            let start = (from + c) * col + block * STRIP * row;
            for k in 0..depth {
                packed[k * STRIP + c] = b.data[start + k * row];
            }
        }
    }
}

fn compute<T: Real>(a: Mat<T>, packed: &[T], cols: usize, out: &mut [T], place: Place) {
    let (depth, Place { stride, at, add }) = (a.cols, place);
    if depth == 0 && !add {
        for row in out.chunks_mut(stride).take(a.rows) {
            row[at..at + cols].fill(T::ZERO);
        }
    }
    for from in (0..depth).step_by(DEPTH) {
        let some = DEPTH.min(depth - from);
        let add = add || from > 0;
        for strip in 0..strips(cols) {
            let width = STRIP.min(cols - strip * STRIP);
            let b = &packed[(strip * depth + from) * STRIP..][..some * STRIP];
            for row in (0..a.rows).step_by(TILE) {
                let rows = TILE.min(a.rows - row);
                let left = a.data[row * a.strides[0] + from * a.strides[1]..].as_ptr();
                let tile = T::tile(rows);
                let first = row * stride + at + strip * STRIP;
                if width == STRIP {
                    let out = &mut out[first..(first + (rows - 1) * stride + STRIP)];
                    // SAFETY: `a` was checked to be inside its slice, the strip has `some` rows, and
                    // the tile's rows are inside `out`.
                    unsafe {
                        tile(some, left, a.strides, b.as_ptr(), out.as_mut_ptr(), stride, add);
                    }
                    continue;
                }
                let mut whole = [T::ZERO; TILE * STRIP];
                // SAFETY: as above; the buffer holds a whole tile.
                unsafe {
                    tile(some, left, a.strides, b.as_ptr(), whole.as_mut_ptr(), STRIP, false);
                }
                for (r, whole) in whole.chunks_exact(STRIP).take(rows).enumerate() {
                    for (out, &x) in out[first + r * stride..][..width].iter_mut().zip(whole) {
                        *out = if add { *out + x } else { x };
                    }
                }
            }
        }
    }
}

/// A tile in plain code.
///
/// # Safety
/// As [`Tile`] says.
pub unsafe fn plain_tile<T: Real, const R: usize>(
    depth: usize,
    a: *const T,
    strides: [usize; 2],
    strip: *const T,
    out: *mut T,
    stride: usize,
    add: bool,
) {
    let mut sums = [[T::ZERO; STRIP]; R];
    for k in 0..depth {
        for r in 0..R {
            for c in 0..STRIP {
                // SAFETY: the caller's promise.
                let (x, w) =
                    unsafe { (*a.add(r * strides[0] + k * strides[1]), *strip.add(k * STRIP + c)) };
                sums[r][c] += x * w;
            }
        }
    }
    for r in 0..R {
        for c in 0..STRIP {
            // SAFETY: the caller's promise.
            unsafe {
                let out = out.add(r * stride + c);
                *out = if add { *out + sums[r][c] } else { sums[r][c] };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn numbers(count: usize, seed: u64) -> Vec<f64> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// In f32 and f64, from and to matrices by any strides, against the definition.
    #[test]
    fn products_are_what_they_should_be() {
        for (m, n, k) in
            [(1, 1, 1), (6, 16, 512), (7, 17, 513), (130, 40, 33), (61, 100, 1030), (5, 3, 0)]
        {
            for turned in 0..4 {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                let (stride, at) = (n + 5, 3);
                let before = numbers(m * stride, 3);
                for add in [false, true] {
                    let mut right = before.clone();
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let at_a = |x| if turned & 1 == 0 { i * k + x } else { x * m + i };
                        let at_b = |x| if turned & 2 == 0 { x * n + j } else { j * k + x };
                        let sum: f64 = (0..k).map(|x| a[at_a(x)] * b[at_b(x)]).sum();
                        let out = &mut right[i * stride + at + j];
                        *out = if add { *out + sum } else { sum };
                    }
                    fn run<T: Real>(
                        [a, b, before]: [&[f64]; 3],
                        [m, n, k]: [usize; 3],
                        turned: usize,
                        place: Place,
                    ) -> [Vec<f64>; 2] {
                        let of = |x: &[f64]| x.iter().map(|x| T::of(*x)).collect::<Vec<T>>();
                        let (a, b) = (of(a), of(b));
                        let a = if turned & 1 == 0 {
                            Mat::new(&a, m, k)
                        } else {
                            Mat::new(&a, k, m).t()
                        };
                        let b = if turned & 2 == 0 {
                            Mat::new(&b, k, n)
                        } else {
                            Mat::new(&b, n, k).t()
                        };
                        [product::<T>, product_here::<T>].map(|product| {
                            let mut out = of(before);
                            product(a, b, &mut out, place.stride, place.at, place.add);
                            out.iter().map(|x| x.wide()).collect()
                        })
                    }
                    let place = Place { stride, at, add };
                    let wide = run::<f64>([&a, &b, &before], [m, n, k], turned, place);
                    let narrow = run::<f32>([&a, &b, &before], [m, n, k], turned, place);
                    assert_eq!(narrow[0], narrow[1], "threads change nothing");
                    for (found, bound) in [(&wide[0], 1e-12), (&wide[1], 1e-12), (&narrow[0], 1e-4)]
                    {
                        for (found, right) in found.iter().zip(&right) {
                            assert!((found - right).abs() < bound, "{m} {n} {k}: {found}, {right}");
                        }
                    }
                }
            }
        }
    }
}
