//! Activations as the kernels read them: f32 rows, and the same rows quantized to 8 bits.

use super::isa::isa;
use super::pack::BLOCK;
use super::pool::Disjoint;

/// Rows per panel: the most tokens that a kernel multiplies at once.
pub(super) const PANEL: usize = 12;

/// Rows of activations, quantized in blocks of 32. A value is `d * q`, where `d` is the block's
/// largest magnitude divided by 127.
///
/// The blocks of up to [`PANEL`] rows are interleaved: a panel has the first block of each of its
/// rows, then the second ones. A kernel then reads the blocks of all its tokens from adjacent
/// memory.
#[derive(Debug, Default, Clone)]
pub struct Quantized {
    rows: usize,
    cols: usize,
    q: Vec<i8>,
    d: Vec<f32>,
    /// `d` times the sum of the block's `q`; weights with a minimum need it.
    s: Vec<f32>,
    /// As `s`, for half blocks.
    h: Vec<f32>,
    /// -128 times the sum of the block's `q`: where a sum starts whose weights are 128 too large,
    /// so that they are unsigned.
    z: Vec<i32>,
}

/// Pointers to the first block of one row, for the kernels.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub q: *const i8,
    pub d: *const f32,
    pub s: *const f32,
    /// Two values per block.
    pub h: *const f32,
    pub z: *const i32,
    /// Distance of a row's blocks, in blocks.
    pub step: usize,
    /// (columns) the row in f32.
    pub f: *const f32,
}

impl Default for Row {
    fn default() -> Self {
        let none = std::ptr::null();
        Self {
            q: std::ptr::null(),
            d: none,
            s: none,
            h: none,
            z: std::ptr::null(),
            step: 0,
            f: none,
        }
    }
}

/// The place of a row's blocks: the first one's index, and the distance to the next one.
fn blocks_of(row: usize, rows: usize, blocks: usize) -> (usize, usize) {
    let first = row / PANEL * PANEL;
    (first * blocks + row - first, PANEL.min(rows - first))
}

impl Quantized {
    /// Resizes to `rows` rows of `cols` columns; the contents become unspecified.
    pub fn resize(&mut self, rows: usize, cols: usize) {
        assert!(cols.is_multiple_of(BLOCK), "{cols} columns are not whole blocks");
        (self.rows, self.cols) = (rows, cols);
        let blocks = rows * cols / BLOCK;
        // The buffers only grow: their size changes from layer to layer.
        if self.d.len() < blocks {
            self.q.resize(rows * cols, 0);
            self.d.resize(blocks, 0.0);
            self.s.resize(blocks, 0.0);
            self.h.resize(blocks * 2, 0.0);
            self.z.resize(blocks, 0);
        }
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row's blocks, for the kernels.
    pub(super) fn row(&self, row: usize) -> Row {
        assert!(row < self.rows, "the row is inside");
        let (at, step) = blocks_of(row, self.rows, self.cols / BLOCK);
        Row {
            q: self.q[at * BLOCK..].as_ptr(),
            d: self.d[at..].as_ptr(),
            s: self.s[at..].as_ptr(),
            h: self.h[at * 2..].as_ptr(),
            z: self.z[at..].as_ptr(),
            step,
            f: std::ptr::null(),
        }
    }

    /// The integer and the scale of one value.
    pub fn value(&self, row: usize, col: usize) -> (i8, f32) {
        let (at, step) = blocks_of(row, self.rows, self.cols / BLOCK);
        let block = at + col / BLOCK * step;
        (self.q[block * BLOCK + col % BLOCK], self.d[block])
    }

    /// A writer for jobs whose chunks write different blocks.
    pub fn writer(&mut self) -> QuantizedWriter {
        QuantizedWriter {
            rows: self.rows,
            cols: self.cols,
            q: Disjoint::new(&mut self.q),
            d: Disjoint::new(&mut self.d),
            s: Disjoint::new(&mut self.s),
            h: Disjoint::new(&mut self.h),
            z: Disjoint::new(&mut self.z),
        }
    }
}

/// Writes blocks of a [`Quantized`] from several threads.
#[derive(Clone, Copy)]
pub struct QuantizedWriter {
    rows: usize,
    cols: usize,
    q: Disjoint<i8>,
    d: Disjoint<f32>,
    s: Disjoint<f32>,
    h: Disjoint<f32>,
    z: Disjoint<i32>,
}

impl QuantizedWriter {
    /// Quantizes `values` (whole blocks) into `row`, from column `col` on. Does nothing if the rows
    /// have no columns.
    ///
    /// # Safety
    /// The [`Quantized`] must still be borrowed, and no other thread may read or write these
    /// blocks.
    pub unsafe fn write(&self, row: usize, col: usize, values: &[f32]) {
        if self.cols == 0 {
            return;
        }
        assert!(col.is_multiple_of(BLOCK) && values.len().is_multiple_of(BLOCK));
        assert!(col + values.len() <= self.cols && row < self.rows);
        let (first, step) = blocks_of(row, self.rows, self.cols / BLOCK);
        for (block, values) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { self.write_block(first + (col / BLOCK + block) * step, values) };
        }
    }

    /// Quantizes `values` (whole blocks) into rows `2 * row` and `2 * row + 1`: the first holds the
    /// values, and the second what their rounding left out, with a scale of its own.
    ///
    /// # Safety
    /// As for [`QuantizedWriter::write`].
    pub unsafe fn write_twice(&self, row: usize, col: usize, values: &[f32]) {
        if self.cols == 0 {
            return;
        }
        assert!(col.is_multiple_of(BLOCK) && values.len().is_multiple_of(BLOCK));
        assert!(col + values.len() <= self.cols && 2 * row + 1 < self.rows);
        let (first, step) = blocks_of(2 * row, self.rows, self.cols / BLOCK);
        for (block, values) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let at = first + (col / BLOCK + block) * step;
            // SAFETY: guaranteed by the caller; the second row is in the same panel.
            unsafe {
                let (q, d) = self.write_block(at, values);
                let rest = |i: usize| f32::from(q[i]).mul_add(-d, values[i]);
                self.write_block(at + 1, &std::array::from_fn(rest));
            }
        }
    }

    /// Quantizes one block; returns the integers and the scale.
    ///
    /// # Safety
    /// As for [`QuantizedWriter::write`].
    unsafe fn write_block(&self, at: usize, values: &[f32; BLOCK]) -> (&[i8; BLOCK], f32) {
        // SAFETY: guaranteed by the caller.
        let (q, d, s, h, z) = unsafe {
            (
                self.q.part(at * BLOCK, BLOCK),
                self.d.part(at, 1),
                self.s.part(at, 1),
                self.h.part(at * 2, 2),
                self.z.part(at, 1),
            )
        };
        let q: &mut [i8; BLOCK] = q.try_into().expect("a block");
        let (scale, sums) = (isa().kernels().quantize)(values, q);
        d[0] = scale;
        s[0] = scale * (sums[0] + sums[1]) as f32;
        h[0] = scale * sums[0] as f32;
        h[1] = scale * sums[1] as f32;
        z[0] = -128 * (sums[0] + sums[1]);
        (q, scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    #[test]
    fn plain_code_gives_the_same_bits() {
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, -1e-40, 0.0, -0.0, f32::MAX];
        for round in 0..2_000usize {
            let scale = [1.0, 1e-42, 1e-30, 1e30][round % 4];
            let values: [f32; BLOCK] =
                std::array::from_fn(|i| match round % 7 == 6 && i % 5 == 0 {
                    true => odd[(round / 7 + i) % odd.len()],
                    false => ((i * 7919 + round * 104_729) % 2_001) as f32 * scale / 1e3 - scale,
                });
            let quantize = |isa: Isa| {
                let mut q = [0; BLOCK];
                let (d, sums) = (isa.kernels().quantize)(&values, &mut q);
                (d.to_bits(), sums, q)
            };
            for isa in Isa::available() {
                assert_eq!(quantize(isa), quantize(Isa::Scalar), "{isa}: {values:?}");
            }
        }
    }

    #[test]
    fn values_come_back_within_half_a_step() {
        let values: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3).collect();
        let mut quantized = Quantized::default();
        quantized.resize(2, 96);
        // SAFETY: there is only one thread.
        unsafe { quantized.writer().write(1, 0, &values) };
        for (at, value) in values.iter().enumerate() {
            let (q, d) = quantized.value(1, at);
            let back = d * f32::from(q);
            assert!((back - value).abs() <= d * 0.5001, "{back} is not {value}");
        }
        let sum: i32 = (0..BLOCK).map(|at| i32::from(quantized.value(1, at).0)).sum();
        let row = quantized.row(1);
        // SAFETY: the row has a first block.
        let (s, z) = unsafe { (*row.s, *row.z) };
        assert_eq!((s, z), (quantized.value(1, 0).1 * sum as f32, -128 * sum));
        assert!((0..96).all(|at| quantized.value(0, at).0 == 0));
    }
}
