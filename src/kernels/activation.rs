//! Activations as the kernels read them: f32 rows, and the same rows quantized to 8 bits.

#[cfg(target_arch = "x86_64")]
use super::avx2;
use super::matmul::{Isa, isa};
use super::pack::BLOCK;
use super::pool::Disjoint;

/// Rows of activations, quantized in blocks of 32. A value is `d * q`, where `d` is the block's
/// largest magnitude divided by 127. `s` is `d` times the sum of the block's `q`; weights with a
/// minimum need it.
#[derive(Debug, Default, Clone)]
pub struct Quantized {
    cols: usize,
    q: Vec<i8>,
    d: Vec<f32>,
    s: Vec<f32>,
    /// As `s`, for half blocks.
    h: Vec<f32>,
}

/// Pointers to one row, for the kernels.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub q: *const i8,
    pub d: *const f32,
    pub s: *const f32,
    /// Two values per block.
    pub h: *const f32,
    pub f: *const f32,
}

impl Default for Row {
    fn default() -> Self {
        let none = std::ptr::null();
        Self { q: std::ptr::null(), d: none, s: none, h: none, f: none }
    }
}

impl Quantized {
    /// Resizes to `rows` rows of `cols` columns; the contents become unspecified.
    pub fn resize(&mut self, rows: usize, cols: usize) {
        assert!(cols.is_multiple_of(BLOCK), "{cols} columns are not whole blocks");
        self.cols = cols;
        self.q.resize(rows * cols, 0);
        self.d.resize(rows * cols / BLOCK, 0.0);
        self.s.resize(rows * cols / BLOCK, 0.0);
        self.h.resize(rows * cols / BLOCK * 2, 0.0);
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn q(&self, row: usize) -> &[i8] {
        &self.q[row * self.cols..(row + 1) * self.cols]
    }

    pub fn d(&self, row: usize) -> &[f32] {
        let blocks = self.cols / BLOCK;
        &self.d[row * blocks..(row + 1) * blocks]
    }

    pub fn s(&self, row: usize) -> &[f32] {
        let blocks = self.cols / BLOCK;
        &self.s[row * blocks..(row + 1) * blocks]
    }

    pub fn h(&self, row: usize) -> &[f32] {
        let halves = self.cols / BLOCK * 2;
        &self.h[row * halves..(row + 1) * halves]
    }

    /// A writer for jobs whose chunks write different blocks.
    pub fn writer(&mut self) -> QuantizedWriter {
        QuantizedWriter {
            cols: self.cols,
            q: Disjoint::new(&mut self.q),
            d: Disjoint::new(&mut self.d),
            s: Disjoint::new(&mut self.s),
            h: Disjoint::new(&mut self.h),
        }
    }
}

/// Writes blocks of a [`Quantized`] from several threads.
#[derive(Clone, Copy)]
pub struct QuantizedWriter {
    cols: usize,
    q: Disjoint<i8>,
    d: Disjoint<f32>,
    s: Disjoint<f32>,
    h: Disjoint<f32>,
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
        assert!(col + values.len() <= self.cols);
        let at = row * self.cols + col;
        // SAFETY: guaranteed by the caller.
        let (q, d, s, h) = unsafe {
            (
                self.q.part(at, values.len()),
                self.d.part(at / BLOCK, values.len() / BLOCK),
                self.s.part(at / BLOCK, values.len() / BLOCK),
                self.h.part(at / BLOCK * 2, values.len() / BLOCK * 2),
            )
        };
        let isa = isa();
        let blocks = values.chunks_exact(BLOCK).zip(q.chunks_exact_mut(BLOCK));
        for (block, (values, q)) in blocks.enumerate() {
            let values = values.try_into().expect("a block");
            let q = q.try_into().expect("a block");
            let (scale, sums) = quantize(isa, values, q);
            d[block] = scale;
            s[block] = scale * (sums[0] + sums[1]) as f32;
            h[2 * block] = scale * sums[0] as f32;
            h[2 * block + 1] = scale * sums[1] as f32;
        }
    }
}

/// Quantizes one block. Returns the scale, and the sums of the quantized values of both halves.
pub(super) fn quantize(isa: Isa, values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::quantize(values, q),
        _ => quantize_block(values, q),
    }
}

/// The scalar version.
fn quantize_block(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    let mut lanes = [0f32; 8];
    for eight in values.chunks_exact(8) {
        for (lane, value) in lanes.iter_mut().zip(eight) {
            *lane = lane.max(value.abs());
        }
    }
    let largest = lanes.iter().fold(0f32, |a, &b| a.max(b));
    // A block of zeros, or of values too small to divide by, becomes all 0.
    let inverse = Some(127.0 / largest).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    let mut sums = [0i32; 2];
    let halves = q.chunks_exact_mut(BLOCK / 2).zip(values.chunks_exact(BLOCK / 2));
    for (sum, (q, values)) in sums.iter_mut().zip(halves) {
        for (q, value) in q.iter_mut().zip(values) {
            // Within ±127 by construction; NaN becomes 0 in the saturating cast.
            let rounded = (value * inverse).round_ties_even() as i32;
            *q = rounded as i8;
            *sum += rounded;
        }
    }
    (largest / 127.0, sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn plain_code_gives_the_same_bits() {
        if isa() != Isa::Avx2 {
            return;
        }
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, -1e-40, 0.0, -0.0, f32::MAX];
        for round in 0..2_000usize {
            let scale = [1.0, 1e-42, 1e-30, 1e30][round % 4];
            let values: [f32; BLOCK] =
                std::array::from_fn(|i| match round % 7 == 6 && i % 5 == 0 {
                    true => odd[(round / 7 + i) % odd.len()],
                    false => ((i * 7919 + round * 104_729) % 2_001) as f32 * scale / 1e3 - scale,
                });
            let (mut fast, mut plain) = ([0; BLOCK], [0; BLOCK]);
            let (a, b) = (avx2::quantize(&values, &mut fast), quantize_block(&values, &mut plain));
            assert_eq!((a.0.to_bits(), a.1, fast), (b.0.to_bits(), b.1, plain), "{values:?}");
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
            let d = quantized.d(1)[at / BLOCK];
            let back = d * f32::from(quantized.q(1)[at]);
            assert!((back - value).abs() <= d * 0.5001, "{back} is not {value}");
        }
        let sum: i32 = quantized.q(1)[..BLOCK].iter().map(|&q| i32::from(q)).sum();
        assert_eq!(quantized.s(1)[0], quantized.d(1)[0] * sum as f32);
        assert!(quantized.q(0).iter().all(|&q| q == 0));
    }
}
