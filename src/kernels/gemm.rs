//! Dense products of training: the crate `gemm` behind bounds checks.
//!
//! [`product`] shares the result's rows out in blocks of a fixed size, so that no sum depends on how
//! many threads there are.

use super::real::Real;
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of the result that one thread computes at a time.
const ROWS: usize = 128;

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
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes");
    if m == 0 || n == 0 {
        return;
    }
    assert!(at + n <= stride && (m - 1) * stride + at + n <= out.len(), "the result is inside");
    a.check();
    b.check();
    let beta = if add { T::ONE } else { T::ZERO };
    // SAFETY: all three have been checked to lie within their slices, and `out` is ours alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr().add(at),
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.data.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            beta,
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// As [`product_here`], on all threads.
pub fn product<T: Real>(
    a: Mat<T>,
    b: Mat<T>,
    out: &mut [T],
    stride: usize,
    at: usize,
    add: bool,
) {
    out.par_chunks_mut(ROWS * stride).enumerate().for_each(|(block, out)| {
        let rows = block * ROWS..((block + 1) * ROWS).min(a.rows);
        if rows.start < rows.end {
            product_here(a.rows(rows), b, out, stride, at, add);
        }
    });
}
