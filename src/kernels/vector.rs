//! Element-wise operations between the matrix products: norms, rotary positions, activation
//! functions.
//!
//! Scalar code in lanes of eight, which the compiler vectorizes and which is bit-identical on every
//! machine with FMA.

const LANES: usize = 8;

/// Sums in lanes of eight, then over the lanes in pairs.
pub fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for eight in whole {
        for (lane, x) in lanes.iter_mut().zip(eight) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(*x, *lane);
    }
    sum_lanes(lanes)
}

fn sum_lanes(l: [f32; LANES]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

/// `out = x / rms(x) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467).
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + epsilon).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// As [`rms_norm`], in place; used for the norms of single heads.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + epsilon).sqrt();
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// e^x to about one unit in the last place; 0 below -87, which is negligible in a softmax. The
/// polynomial is that of Cephes' `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let f = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, clamped));
    let mut y = 1.987_569_1e-4f32;
    y = y.mul_add(f, 1.398_2e-3);
    y = y.mul_add(f, 8.333_452e-3);
    y = y.mul_add(f, 4.166_579_6e-2);
    y = y.mul_add(f, 1.666_666_5e-1);
    y = y.mul_add(f, 0.5);
    y = y.mul_add(f * f, f + 1.0);
    // SAFETY: `n` is an integer between -126 and 127.
    let power = unsafe { n.to_int_unchecked::<i32>() };
    let scaled = y * f32::from_bits(((power + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { scaled }
}

/// `out = silu(gate) * up`, silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv:2002.05202).
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// `out = gelu(gate) * up`, with the tanh approximation of gelu: x / (1 + e^(-2u)), u = √(2/π) (x +
/// 0.044715 x³) (Hendrycks and Gimpel 2016, arXiv:1606.08415).
pub fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    const DOUBLE: f32 = 2.0 * 0.797_884_6;
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        let u = DOUBLE * gate * (0.044_715 * gate).mul_add(gate, 1.0);
        *out = gate / (1.0 + exp(-u)) * up;
    }
}

/// `x = cap * tanh(x / cap)` (Gemma 2).
pub fn soft_cap(x: &mut [f32], cap: f32) {
    let double = 2.0 / cap;
    for x in x {
        *x = cap * (1.0 - 2.0 / (exp(*x * double) + 1.0));
    }
}

/// The positions of a rotated pair's two elements in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// Adjacent elements: 2i and 2i + 1 (GGUF's llama).
    Adjacent,
    /// Elements i and i + half (NeoX; GGUF's qwen).
    Halves,
}

/// Cosines and sines of the rotary position embedding (Su et al. 2021, arXiv:2104.09864).
#[derive(Debug)]
pub struct Rope {
    pairs: RopePairs,
    /// (rotated elements / 2) angle per position; the elements after the rotated ones are
    /// unchanged.
    frequencies: Vec<f32>,
    /// Factor of cosines and sines.
    magnitude: f32,
}

impl Rope {
    pub fn new(pairs: RopePairs, frequencies: Vec<f32>, magnitude: f32) -> Self {
        Self { pairs, frequencies, magnitude }
    }

    /// Number of elements of a head that are rotated.
    pub fn rotated(&self) -> usize {
        2 * self.frequencies.len()
    }

    pub fn pairs(&self) -> RopePairs {
        self.pairs
    }

    /// (pairs) cosine and sine of each pair at a position.
    pub fn angles(&self, position: usize, out: &mut Vec<(f32, f32)>) {
        out.clear();
        out.extend(self.frequencies.iter().map(|frequency| {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            (cos * self.magnitude, sin * self.magnitude)
        }));
    }

    /// Rotates one head by the angles of its position.
    pub fn rotate(&self, head: &mut [f32], angles: &[(f32, f32)]) {
        let half = self.frequencies.len();
        match self.pairs {
            RopePairs::Adjacent => {
                for (pair, &(cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                    let [a, b] = *pair;
                    *pair = [a * cos - b * sin, a * sin + b * cos];
                }
            }
            RopePairs::Halves => {
                let (low, high) = head[..2 * half].split_at_mut(half);
                for ((a, b), &(cos, sin)) in low.iter_mut().zip(high).zip(angles) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let (got, right) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - right).abs() <= right * 3e-7, "e^{x} is {right}, not {got}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn gelu_and_cap_are_what_tanh_makes_them() {
        for i in -400..400 {
            let x = i as f32 * 0.1;
            let (wide, mut got) = (f64::from(x), [0.0, x]);
            gelu_mul(&[x], &[2.0], &mut got[..1]);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            assert!((f64::from(got[0]) - wide * (1.0 + inner.tanh())).abs() < 1e-5, "gelu({x})");
            soft_cap(&mut got[1..], 30.0);
            assert!((f64::from(got[1]) - 30.0 * (wide / 30.0).tanh()).abs() < 1e-5, "cap({x})");
        }
    }

    #[test]
    fn rotation_keeps_lengths_and_undoes_itself() {
        for pairs in [RopePairs::Adjacent, RopePairs::Halves] {
            let rope = Rope::new(pairs, vec![1.0, 0.1, 0.01, 0.001], 1.0);
            let mut angles = Vec::new();
            rope.angles(0, &mut angles);
            let mut head = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
            rope.rotate(&mut head, &angles);
            assert_eq!(head, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]);
            rope.angles(5, &mut angles);
            rope.rotate(&mut head, &angles);
            assert!((sum_of_squares(&head) - 385.0).abs() < 1e-3);
            assert_eq!(head[8..], [9.0, 10.0]);
            assert!((head[0] - 1.0).abs() > 0.1);
        }
    }

    #[test]
    fn norm_scales_to_one() {
        let x: Vec<f32> = (0..40).map(|i| i as f32 - 17.5).collect();
        let mut out = vec![0.0; 40];
        rms_norm(&x, &[2.0; 40], 0.0, &mut out);
        assert!((sum_of_squares(&out) / 40.0 - 4.0).abs() < 1e-5);
    }
}
