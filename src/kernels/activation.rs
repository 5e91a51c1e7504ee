//! Activations as the kernels read them: f32 rows, and the same rows quantized to 8 bits, of which
//! some blocks also have residuals.

use super::isa::isa;
use super::pack::BLOCK;
use super::pool::Disjoint;
use super::vector::sum_of_squares;
use std::ops::Range;

/// Rows per panel: the most tokens that a kernel multiplies at once.
pub(super) const PANEL: usize = 12;

/// Which blocks have residuals: what the rounding to 8 bits left out, quantized to 8 bits with a
/// scale of its own, so that the block has 16 bits (residual quantization; nothing to do with the
/// residual stream of a transformer). A kernel multiplies each of them as one more block.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub enum Residuals {
    #[default]
    None,
    /// Blocks whose largest magnitude is more than this times the root mean square of their row. The
    /// rounding of any other block leaves out at most this / 254 of the root mean square per value.
    Above(f32),
    All,
}

/// Rows of activations, quantized in blocks of 32. A value is `d * q`, where `d` is the block's
/// largest magnitude divided by 127.
///
/// The blocks of up to [`PANEL`] rows are interleaved: a panel has the first block of each of its
/// rows, then the second ones. A kernel then reads the blocks of all its tokens from adjacent
/// memory. After the blocks of the columns come the residuals of those blocks that have one in any
/// row of the panel; the other rows have zeros there.
#[derive(Debug, Default, Clone)]
pub struct Quantized {
    layout: Layout,
    q: Vec<i8>,
    d: Vec<f32>,
    /// `d` times the sum of the block's `q`; weights with a minimum need it.
    s: Vec<f32>,
    /// As `s`, for half blocks.
    h: Vec<f32>,
    /// -128 times the sum of the block's `q`: where a sum starts whose weights are 128 too large,
    /// so that they are unsigned.
    z: Vec<i32>,
    /// The sum of the squares of the block's values, if there may be residuals.
    squares: Vec<f32>,
    /// (panels, blocks) the numbers of the blocks that have residuals, in order.
    refined: Vec<u32>,
    /// (panels) how many there are.
    counts: Vec<u32>,
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
    /// See [`Row::refined`], and how many there are.
    pub refined: *const u32,
    pub refined_count: usize,
    /// (columns) the row in f32.
    pub f: *const f32,
}

impl Row {
    /// The numbers of the blocks whose residuals follow the row's blocks.
    ///
    /// # Safety
    /// The [`Quantized`] must still be borrowed.
    pub unsafe fn refined<'a>(&self) -> &'a [u32] {
        match self.refined_count {
            0 => &[],
            // SAFETY: guaranteed by the caller.
            count => unsafe { std::slice::from_raw_parts(self.refined, count) },
        }
    }

    /// Whether the `T` blocks from block `at` of the panel on are zeros: no token of a tile has a
    /// residual there.
    ///
    /// # Safety
    /// The panel must have these blocks.
    #[inline]
    pub unsafe fn are_zeros<const T: usize>(&self, at: usize) -> bool {
        // SAFETY: guaranteed by the caller. Scales are not negative.
        (0..T).fold(0, |bits, t| bits | unsafe { *self.d.add(at + t) }.to_bits()) == 0
    }
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
            refined: std::ptr::null(),
            refined_count: 0,
            f: none,
        }
    }
}

/// The blocks of `rows` rows of `cols` columns in memory.
#[derive(Debug, Default, Clone, Copy)]
struct Layout {
    rows: usize,
    cols: usize,
    residuals: Residuals,
}

impl Layout {
    /// Blocks of the columns.
    fn blocks(self) -> usize {
        self.cols / BLOCK
    }

    /// Blocks for which a row has room.
    fn room(self) -> usize {
        match self.residuals {
            Residuals::None => self.blocks(),
            _ => 2 * self.blocks(),
        }
    }

    /// The place of a row's blocks: the first one's index, and the distance to the next one.
    fn place(self, row: usize) -> (usize, usize) {
        let first = row / PANEL * PANEL;
        (first * self.room() + row - first, PANEL.min(self.rows - first))
    }

    fn panel(self, panel: usize) -> Range<usize> {
        panel * PANEL..((panel + 1) * PANEL).min(self.rows)
    }
}

impl Quantized {
    /// Resizes to `rows` rows of `cols` columns; the contents become unspecified.
    pub fn resize(&mut self, rows: usize, cols: usize, residuals: Residuals) {
        assert!(cols.is_multiple_of(BLOCK), "{cols} columns are not whole blocks");
        let layout = Layout { rows, cols, residuals };
        self.layout = layout;
        let blocks = rows * layout.room();
        // The buffers only grow: their size changes from layer to layer.
        if self.d.len() < blocks {
            self.q.resize(blocks * BLOCK, 0);
            self.d.resize(blocks, 0.0);
            self.s.resize(blocks, 0.0);
            self.h.resize(blocks * 2, 0.0);
            self.z.resize(blocks, 0);
            self.squares.resize(blocks, 0.0);
        }
        let panels = rows.div_ceil(PANEL);
        if self.refined.len() < panels * layout.blocks() {
            self.refined.resize(panels * layout.blocks(), 0);
        }
        self.counts.clear();
        self.counts.resize(panels, 0);
    }

    pub fn cols(&self) -> usize {
        self.layout.cols
    }

    /// One row's blocks, for the kernels.
    pub(super) fn row(&self, row: usize) -> Row {
        assert!(row < self.layout.rows, "the row is inside");
        let (layout, panel) = (self.layout, row / PANEL);
        let (at, step) = layout.place(row);
        Row {
            q: self.q[at * BLOCK..].as_ptr(),
            d: self.d[at..].as_ptr(),
            s: self.s[at..].as_ptr(),
            h: self.h[at * 2..].as_ptr(),
            z: self.z[at..].as_ptr(),
            step,
            refined: self.refined[panel * layout.blocks()..].as_ptr(),
            refined_count: self.counts[panel] as usize,
            f: std::ptr::null(),
        }
    }

    /// The integer and the scale of one value, without its residual.
    pub fn value(&self, row: usize, col: usize) -> (i8, f32) {
        let (at, step) = self.layout.place(row);
        let block = at + col / BLOCK * step;
        (self.q[block * BLOCK + col % BLOCK], self.d[block])
    }

    pub fn has_residuals(&self) -> bool {
        self.layout.cols > 0 && self.layout.residuals != Residuals::None
    }

    /// The share of blocks whose residuals the kernels multiply.
    #[cfg(test)]
    pub(super) fn refined_share(&self) -> f64 {
        let most = self.counts.len() * self.layout.blocks();
        self.counts.iter().map(|&count| f64::from(count)).sum::<f64>() / most.max(1) as f64
    }

    /// A writer for jobs whose chunks write different blocks.
    pub fn writer(&mut self) -> QuantizedWriter {
        QuantizedWriter {
            layout: self.layout,
            q: Disjoint::new(&mut self.q),
            d: Disjoint::new(&mut self.d),
            s: Disjoint::new(&mut self.s),
            h: Disjoint::new(&mut self.h),
            z: Disjoint::new(&mut self.z),
            squares: Disjoint::new(&mut self.squares),
            refined: Disjoint::new(&mut self.refined),
            counts: Disjoint::new(&mut self.counts),
        }
    }
}

/// Writes blocks of a [`Quantized`] from several threads.
#[derive(Clone, Copy)]
pub struct QuantizedWriter {
    layout: Layout,
    q: Disjoint<i8>,
    d: Disjoint<f32>,
    s: Disjoint<f32>,
    h: Disjoint<f32>,
    z: Disjoint<i32>,
    squares: Disjoint<f32>,
    refined: Disjoint<u32>,
    counts: Disjoint<u32>,
}

impl QuantizedWriter {
    /// Quantizes `values` (whole blocks) into `row`, from column `col` on. Does nothing if the rows
    /// have no columns.
    ///
    /// # Safety
    /// The [`Quantized`] must still be borrowed, and no other thread may read or write these
    /// blocks.
    pub unsafe fn write(&self, row: usize, col: usize, values: &[f32]) {
        let Layout { rows, cols, .. } = self.layout;
        if cols == 0 {
            return;
        }
        assert!(col.is_multiple_of(BLOCK) && values.len().is_multiple_of(BLOCK));
        assert!(col + values.len() <= cols && row < rows);
        let (first, step) = self.layout.place(row);
        for (block, values) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let at = first + (col / BLOCK + block) * step;
            // SAFETY: guaranteed by the caller.
            unsafe {
                self.write_block(at, values);
                if self.layout.residuals != Residuals::None {
                    self.squares.part(at, 1)[0] = sum_of_squares(values);
                }
            }
        }
    }

    /// Writes the residuals of the rows of a panel; `x` returns a row in f32. Which blocks of a row
    /// have residuals depends on this row alone.
    ///
    /// # Safety
    /// As for [`QuantizedWriter::write`], for the whole panel, of which every block must have been
    /// written.
    pub unsafe fn refine<'a>(&self, panel: usize, x: impl Fn(usize) -> &'a [f32]) {
        let (layout, blocks) = (self.layout, self.layout.blocks());
        let rows = layout.panel(panel);
        assert!(!rows.is_empty(), "the panel is inside");
        if blocks == 0 || layout.residuals == Residuals::None {
            return;
        }
        let (first, step) = layout.place(rows.start);
        // A block whose scale is above its row's limit has a residual.
        let mut limits = [0f32; PANEL];
        if let Residuals::Above(times) = layout.residuals {
            for block in 0..blocks {
                // SAFETY: guaranteed by the caller.
                let squares = unsafe { self.squares.part(first + block * step, step) };
                limits.iter_mut().zip(squares).for_each(|(sum, squares)| *sum += *squares);
            }
            for limit in &mut limits {
                *limit = times / 127.0 * (*limit / layout.cols as f32).sqrt();
            }
        }
        let mut count = 0;
        for block in 0..blocks {
            let at = first + block * step;
            // SAFETY: guaranteed by the caller.
            let scales = unsafe { self.d.part(at, step) };
            let refined: [bool; PANEL] = std::array::from_fn(|t| t < step && scales[t] > limits[t]);
            if !refined.contains(&true) {
                continue;
            }
            let to = first + (blocks + count) * step;
            for (t, row) in rows.clone().enumerate() {
                let mut rest = [0f32; BLOCK];
                if refined[t] {
                    // SAFETY: guaranteed by the caller.
                    let q = unsafe { self.q.part((at + t) * BLOCK, BLOCK) };
                    let values = &x(row)[block * BLOCK..][..BLOCK];
                    for ((rest, q), value) in rest.iter_mut().zip(q).zip(values) {
                        *rest = value - f32::from(*q) * scales[t];
                    }
                }
                // SAFETY: guaranteed by the caller.
                unsafe { self.write_block(to + t, &rest) };
            }
            // SAFETY: guaranteed by the caller.
            unsafe { self.refined.part(panel * blocks + count, 1)[0] = block as u32 };
            count += 1;
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.counts.part(panel, 1)[0] = count as u32 };
    }

    /// Quantizes one block.
    ///
    /// # Safety
    /// As for [`QuantizedWriter::write`].
    unsafe fn write_block(&self, at: usize, values: &[f32; BLOCK]) {
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
        quantized.resize(2, 96, Residuals::None);
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
