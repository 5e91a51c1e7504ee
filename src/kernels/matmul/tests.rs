use super::*;
use crate::gguf::{KERNEL_TYPES as TYPES, TensorType, dequantize};
use crate::kernels::Pool;
use crate::kernels::activation::Residuals;
use crate::kernels::isa::isa;
use crate::kernels::pack::BLOCK;
use half::f16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Random rows in ggml's format, and their values.
fn weights(ty: TensorType, rows: usize, cols: usize, rng: &mut StdRng) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    let number = |rng: &mut StdRng| rng.random_range(-1.0f32..1.0);
    for _ in 0..rows * cols / ty.block_size() as usize {
        match ty {
            TensorType::F32 => {
                values.push(number(rng));
                bytes.extend(values.last().unwrap().to_le_bytes());
            }
            TensorType::F16 => {
                let x = f16::from_f32(number(rng));
                values.push(x.to_f32());
                bytes.extend(x.to_le_bytes());
            }
            TensorType::BF16 => {
                let x = half::bf16::from_f32(number(rng));
                values.push(x.to_f32());
                bytes.extend(x.to_le_bytes());
            }
            TensorType::IQ4_NL => random_block::<32>(ty, &[0], rng, &mut bytes, &mut values),
            TensorType::Q2_K => random_block::<256>(ty, &[80, 82], rng, &mut bytes, &mut values),
            TensorType::Q3_K => random_block::<256>(ty, &[108], rng, &mut bytes, &mut values),
            TensorType::Q4_K | TensorType::Q5_K => {
                random_block::<256>(ty, &[0, 2], rng, &mut bytes, &mut values);
            }
            TensorType::Q6_K => random_block::<256>(ty, &[208], rng, &mut bytes, &mut values),
            TensorType::IQ4_XS => random_block::<256>(ty, &[0], rng, &mut bytes, &mut values),
            _ => quantized_block(ty, rng, &mut bytes, &mut values),
        }
    }
    (bytes, values)
}

/// A random block. In these types any bytes are valid, except that the numbers at `scales` must be
/// finite; `gguf::dequantize` gives the values.
fn random_block<const N: usize>(
    ty: TensorType,
    scales: &[usize],
    rng: &mut StdRng,
    bytes: &mut Vec<u8>,
    values: &mut Vec<f32>,
) {
    let mut block: Vec<u8> = (0..ty.block_bytes()).map(|_| rng.random()).collect();
    for &at in scales {
        let number = f16::from_f32(rng.random_range(-0.02f32..0.02));
        block[at..at + 2].copy_from_slice(&number.to_le_bytes());
    }
    let mut out = [0f32; N];
    dequantize(ty, &block, &mut out).unwrap();
    bytes.extend(block);
    values.extend(out);
}

/// An independent implementation of the formats of `ggml-common.h`.
fn quantized_block(ty: TensorType, rng: &mut StdRng, bytes: &mut Vec<u8>, values: &mut Vec<f32>) {
    let bits = match ty {
        TensorType::Q8_0 => 8,
        TensorType::Q5_0 | TensorType::Q5_1 => 5,
        _ => 4,
    };
    let d = f16::from_f32(rng.random_range(-0.1f32..0.1));
    let m = f16::from_f32(rng.random_range(-1.0f32..1.0));
    let q: [u8; BLOCK] = std::array::from_fn(|_| rng.random_range(0..=((1u32 << bits) - 1) as u8));
    bytes.extend(d.to_le_bytes());
    if ty == TensorType::Q8_0 {
        bytes.extend(q);
        values.extend(q.map(|q| d.to_f32() * f32::from(q as i8)));
        return;
    }
    let has_min = matches!(ty, TensorType::Q4_1 | TensorType::Q5_1);
    if has_min {
        bytes.extend(m.to_le_bytes());
    }
    if bits == 5 {
        let high: u32 = q.iter().enumerate().map(|(i, q)| u32::from(q >> 4) << i).sum();
        bytes.extend(high.to_le_bytes());
    }
    bytes.extend((0..16).map(|i| q[i] & 15 | (q[16 + i] & 15) << 4));
    let zero = f32::from(1u8 << (bits - 1));
    values.extend(q.map(|q| match has_min {
        true => d.to_f32() * f32::from(q) + m.to_f32(),
        false => d.to_f32() * (f32::from(q) - zero),
    }));
}

struct Case {
    matrix: Matrix,
    values: Vec<f32>,
    x: Vec<f32>,
    quantized: Quantized,
}

/// More than two panels.
const TOKENS_OF_CASE: usize = 27;

fn case(ty: TensorType, rows: usize, cols: usize) -> Case {
    let mut rng = StdRng::seed_from_u64(ty as u64);
    let (bytes, values) = weights(ty, rows, cols, &mut rng);
    let matrix = Matrix::pack(ty, rows, cols, &bytes, &mut Pool::new(2).unwrap()).unwrap();
    let x: Vec<f32> = (0..TOKENS_OF_CASE * cols).map(|_| rng.random_range(-3.0f32..3.0)).collect();
    let mut quantized = Quantized::default();
    quantized.resize(TOKENS_OF_CASE, cols, Residuals::None);
    for (row, x) in x.chunks(cols).enumerate() {
        // SAFETY: there is only one thread.
        unsafe { quantized.writer().write(row, 0, x) };
    }
    Case { matrix, values, x, quantized }
}

impl Case {
    fn input(&self) -> Input<'_> {
        match self.matrix.takes_quantized() {
            true => Input::Quantized(&self.quantized),
            false => Input::Float(&self.x, self.matrix.cols()),
        }
    }

    /// (tokens, padded rows)
    fn run(&self, isa: Isa, tokens: Range<usize>) -> Vec<f32> {
        let stride = self.matrix.groups() * LANES;
        let mut out = vec![f32::NAN; tokens.len() * stride];
        let part = Disjoint::new(&mut out);
        let groups = 0..self.matrix.groups();
        // SAFETY: there is only one thread.
        unsafe { multiply(isa, &self.matrix, groups, &self.input(), tokens, part, 0, stride) };
        out
    }

    /// The expected result, computed in f64 from the values themselves.
    fn expected(&self, token: usize, row: usize) -> (f64, f64) {
        let cols = self.matrix.cols();
        let mut sums = (0.0, 0.0);
        for col in 0..cols {
            let x = match self.matrix.takes_quantized() {
                true => {
                    let (q, d) = self.quantized.value(token, col);
                    f64::from(d) * f64::from(q)
                }
                false => f64::from(self.x[token * cols + col]),
            };
            let product = f64::from(self.values[row * cols + col]) * x;
            sums = (sums.0 + product, sums.1 + product.abs());
        }
        sums
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products_are_right() {
    for ty in TYPES {
        let case = case(ty, 21, 512);
        let out = case.run(isa(), 0..TOKENS_OF_CASE);
        for token in 0..TOKENS_OF_CASE {
            for row in 0..21 {
                let (right, size) = case.expected(token, row);
                let got = f64::from(out[token * 24 + row]);
                assert!((got - right).abs() <= size * 1e-5, "{ty:?}: {got} is not {right}");
            }
            assert_eq!(out[token * 24 + 21..(token + 1) * 24], [0.0; 3], "rows of padding");
        }
    }
}

#[test]
fn plain_code_gives_the_same_bits() {
    for ty in TYPES {
        // The last tiles have 4, 2 and 1 groups.
        let case = case(ty, 8 * 15, 512);
        let slow = case.run(Isa::Scalar, 0..TOKENS_OF_CASE);
        for isa in Isa::available() {
            let fast = case.run(isa, 0..TOKENS_OF_CASE);
            assert_eq!(bits(&fast), bits(&slow), "{ty:?}, {isa}");
        }
    }
}

#[test]
fn a_token_is_the_same_in_any_company() {
    for ty in TYPES {
        let case = case(ty, 72, 256);
        for isa in Isa::available().filter(|isa| *isa != Isa::Scalar) {
            let all = case.run(isa, 0..TOKENS_OF_CASE);
            for from in 0..TOKENS_OF_CASE {
                for to in from + 1..=TOKENS_OF_CASE {
                    let some = bits(&case.run(isa, from..to));
                    assert_eq!(some, bits(&all[from * 72..to * 72]), "{ty:?} {from}..{to} {isa}");
                }
            }
        }
    }
}

/// With residuals the error is 1/200 of that of 8 bits, where every block has one; where some have
/// one, it is bounded by the blocks without. The bits are the same on every instruction set and in
/// any company.
#[test]
fn residuals_make_products_exact_to_sixteen_bits() {
    const OUTLIERS: [usize; 3] = [3, 100, 255];
    for ty in TYPES.into_iter().filter(|ty| ty.block_size() > 1) {
        let mut case = case(ty, 24, 256);
        // Values far above the others: in the same column of many rows, and in other columns of some.
        for (row, x) in case.x.chunks_mut(256).enumerate() {
            for (i, column) in OUTLIERS.into_iter().enumerate() {
                if row % (i + 1) == 0 {
                    x[(column + i * row) % 256] *= 40.0;
                }
            }
        }
        for (residuals, times) in [(Residuals::All, 0.0), (Residuals::Above(4.0), 4.0)] {
            let mut x = Quantized::default();
            x.resize(TOKENS_OF_CASE, 256, residuals);
            let rows = |row: usize| &case.x[row * 256..(row + 1) * 256];
            let writer = x.writer();
            for row in 0..TOKENS_OF_CASE {
                // SAFETY: there is only one thread.
                unsafe { writer.write(row, 0, rows(row)) };
            }
            for panel in 0..TOKENS_OF_CASE.div_ceil(PANEL) {
                // SAFETY: as above, and all blocks have been written.
                unsafe { writer.refine(panel, rows) };
            }
            let share = x.refined_share();
            assert!(residuals == Residuals::All && share == 1.0 || share > 0.1 && share < 0.9);
            let run = |isa: Isa, tokens: Range<usize>| {
                let mut out = vec![f32::NAN; tokens.len() * 24];
                let (part, input) = (Disjoint::new(&mut out), Input::Quantized(&x));
                // SAFETY: there is only one thread.
                unsafe { multiply(isa, &case.matrix, 0..3, &input, tokens, part, 0, 24) };
                out
            };
            let slow = run(Isa::Scalar, 0..TOKENS_OF_CASE);
            for isa in Isa::available() {
                let fast = bits(&run(isa, 0..TOKENS_OF_CASE));
                assert_eq!(fast, bits(&slow), "{ty:?}, {isa}, {residuals:?}");
                for token in 0..TOKENS_OF_CASE {
                    let alone = bits(&run(isa, token..token + 1));
                    assert_eq!(alone, bits(&slow[token * 24..][..24]), "{ty:?}, {isa}");
                }
            }
            for (token, row) in (0..TOKENS_OF_CASE).flat_map(|t| (0..24).map(move |r| (t, r))) {
                let (weights, x) = (&case.values[row * 256..], &case.x[token * 256..]);
                let terms = weights.iter().zip(x).take(256);
                let terms = terms.map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (right, size) = terms.fold((0.0, 0.0), |(a, b), x| (a + x, b + x.abs()));
                let error = (f64::from(slow[token * 24 + row]) - right).abs();
                // What the blocks without a residual may lose, and what those with one do.
                let squares: f64 = x[..256].iter().map(|x| f64::from(*x).powi(2)).sum();
                let weights: f64 = weights[..256].iter().map(|w| f64::from(w.abs())).sum();
                let bound = weights * times / 254.0 * (squares / 256.0).sqrt() + size * 1e-4;
                assert!(error <= bound, "{ty:?}, {residuals:?}: {error} of {size}, {bound}");
            }
        }
    }
}

/// What a row's residuals are does not depend on the other rows of its panel.
#[test]
fn residuals_of_a_row_are_the_same_in_any_company() {
    for ty in [TensorType::Q4_0, TensorType::Q4_K, TensorType::Q6_K] {
        let case = case(ty, 24, 256);
        let product = |rows: Range<usize>, row: usize| {
            let mut x = Quantized::default();
            x.resize(rows.len(), 256, Residuals::Above(2.0));
            let value = |i: usize| &case.x[(rows.start + i) * 256..][..256];
            for i in 0..rows.len() {
                // SAFETY: there is only one thread.
                unsafe { x.writer().write(i, 0, value(i)) };
            }
            for panel in 0..rows.len().div_ceil(PANEL) {
                // SAFETY: as above, and all blocks have been written.
                unsafe { x.writer().refine(panel, value) };
            }
            let mut out = vec![f32::NAN; 24];
            let (part, input, at) =
                (Disjoint::new(&mut out), Input::Quantized(&x), row - rows.start);
            // SAFETY: there is only one thread.
            unsafe { multiply(isa(), &case.matrix, 0..3, &input, at..at + 1, part, 0, 24) };
            bits(&out)
        };
        for row in 0..TOKENS_OF_CASE {
            let alone = product(row..row + 1, row);
            for from in 0..=row {
                assert_eq!(product(from..TOKENS_OF_CASE, row), alone, "{ty:?}, {row}, {from}");
            }
        }
    }
}

/// The 16-bit sums at their largest; all weights of a block are equal.
#[test]
fn extreme_weights_do_not_overflow() {
    let one = [0u8, 60];
    let cases = [
        (TensorType::Q4_0, [&one[..], &[0xff; 16]].concat(), 7.0),
        (TensorType::Q5_0, [&one[..], &[0xff; 20]].concat(), 15.0),
        (TensorType::Q8_0, [&one[..], &[0x80; 32]].concat(), -128.0),
        (TensorType::IQ4_NL, [&one[..], &[0x00; 16]].concat(), -127.0),
        (TensorType::IQ4_NL, [&one[..], &[0xff; 16]].concat(), 113.0),
        (TensorType::IQ4_XS, [&one[..], &[0x00; 6], &[0x00; 128]].concat(), 32.0 * 127.0),
        (TensorType::IQ4_XS, [&one[..], &[0xff; 6], &[0x00; 128]].concat(), -31.0 * 127.0),
        (TensorType::Q2_K, [&[0x0f; 16][..], &[0xff; 64], &one, &one].concat(), 45.0),
        (TensorType::Q3_K, [&[0xff; 32][..], &[0xff; 64], &[0x00; 12], &one].concat(), -96.0),
        (TensorType::Q3_K, [&[0x00; 32][..], &[0x00; 64], &[0xff; 12], &one].concat(), -124.0),
        (TensorType::Q6_K, [&[0xff; 128][..], &[0xff; 64], &[0x80; 16], &one].concat(), -3968.0),
        (TensorType::Q6_K, [&[0x00; 128][..], &[0x00; 64], &[0x80; 16], &one].concat(), 4096.0),
    ];
    for (ty, block, weight) in cases {
        let cols = ty.block_size() as usize;
        let matrix = Matrix::pack(ty, 1, cols, &block, &mut Pool::new(1).unwrap()).unwrap();
        let mut quantized = Quantized::default();
        quantized.resize(1, cols, Residuals::None);
        // SAFETY: there is only one thread.
        unsafe { quantized.writer().write(0, 0, &vec![-127.0; cols]) };
        for isa in Isa::available() {
            let mut out = [0f32; 8];
            let part = Disjoint::new(&mut out);
            let input = Input::Quantized(&quantized);
            // SAFETY: there is only one thread.
            unsafe { multiply(isa, &matrix, 0..1, &input, 0..1, part, 0, 8) };
            assert_eq!(out[0], weight * -127.0 * cols as f32, "{ty:?}, {isa:?}");
        }
    }
}

/// Packed weights take as few bytes as in the file, except for scales, which are unpacked to bytes.
#[test]
fn packed_weights_stay_small() {
    let mut pool = Pool::new(1).unwrap();
    for ty in TYPES {
        let bytes = ty.bytes_for(8 * 512).unwrap();
        let bytes_of_file = vec![0; bytes as usize];
        let matrix = Matrix::pack(ty, 8, 512, &bytes_of_file, &mut pool).unwrap();
        let ratio = matrix.bytes().len() as f64 / bytes as f64;
        assert!((1.0..1.04).contains(&ratio), "{ty:?}: {ratio} times the file's");
    }
}
