//! [`dequantize`]: decodes stored tensors to `f32`, bit for bit as ggml's `to_float`.
//!
//! This is the slow, simple decoder that tests compare faster ones with. Layouts: the `block_*`
//! comments of `ggml/src/ggml-common.h` and the OCP Microscaling formats 1.0 (E2M1, E8M0). All
//! numbers are little-endian, `d` and `m` are f16, and a code is a small unsigned integer:
//!
//! | type | content of a block, in this order | value |
//! |---|---|---|
//! | `Q1_0` | d, 128 × 1 bit | ±d |
//! | `Q2_0` | d, 64 × 2 bits | d (code − 1) |
//! | `Q4_0` | d, 32 × 4 bits | d (code − 8) |
//! | `Q4_1` | d, m, 32 × 4 bits | d code + m |
//! | `Q5_0` | d, 32 high bits, 32 × 4 bits | d (code − 16) |
//! | `Q5_1` | d, m, 32 high bits, 32 × 4 bits | d code + m |
//! | `Q8_0` | d, 32 × i8 | d code |
//! | `Q2_K` | 16 × (4-bit s, 4-bit t), 256 × 2 bits, d, m | d s code − m t |
//! | `Q3_K` | 256 high bits, 256 × 2 bits, 16 × 6-bit s, d | d (s − 32) (code − 4) |
//! | `Q4_K` | d, m, 8 × (6-bit s, 6-bit t), 256 × 4 bits | d s code − m t |
//! | `Q5_K` | d, m, 8 × (6-bit s, 6-bit t), 256 high bits, 256 × 4 bits | d s code − m t |
//! | `Q6_K` | 256 × 4 bits, 256 × 2 high bits, 16 × i8 s, d | d s (code − 32) |
//! | `IQ4_NL` | d, 32 × 4 bits | d table\[code\] |
//! | `IQ4_XS` | d, 8 × 6-bit s, 256 × 4 bits | d (s − 32) table\[code\] |
//! | `MXFP4` | E8M0 d, 32 × E2M1 | d code |
//! | `NVFP4` | 4 × E4M3 d, 64 × E2M1 | d code |
//! | `TQ1_0` | 240 base-3 digits, 5 in a byte, then 16, 4 in a byte, d | d (code − 1) |
//! | `TQ2_0` | 256 × 2 bits, d | d (code − 1) |
//!
//! `F32`, `F16` and `BF16` are plain numbers. Seven of the types that ggml can decode are refused:
//! `IQ1_S`, `IQ1_M`, `IQ2_XXS`, `IQ2_XS`, `IQ2_S`, `IQ3_XXS` and `IQ3_S`. Their codes index tables
//! of 256 to 2048 lattice points that were chosen by trial, so no formula gives them. `Q8_1` and
//! `Q8_K` exist only inside ggml's products; `I8` to `I64` and `F64` are not weight types, and ggml
//! has no decoder for them.
//!
//! Each product and sum is rounded separately. Where ggml's compiler fuses them the bits are the
//! same: an f16 times a scale of 6 bits times a code of 5 bits fits the 24 bits of an f32 exactly.

use half::{bf16, f16};

use super::types::TensorType;

/// Reason why bytes could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DequantizeError {
    /// The type has no decoder in this module.
    #[error("type {0} cannot be converted to f32")]
    Unsupported(TensorType),
    /// Input and output do not describe the same number of whole blocks.
    #[error("{bytes} bytes of {ty} are not {elements} elements")]
    Length {
        /// The type of the input.
        ty: TensorType,
        /// Length of the input in bytes.
        bytes: usize,
        /// Length of the output in elements.
        elements: usize,
    },
}

/// Decodes `bytes`, whole blocks of `ty`, into `out`, in the same order of elements.
///
/// The scale that NVFP4 models store in a second tensor must be applied by the caller, as in ggml.
///
/// # Errors
/// [`DequantizeError`]; `out` is then unchanged.
pub fn dequantize(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<(), DequantizeError> {
    let decode = decoder(ty).ok_or(DequantizeError::Unsupported(ty))?;
    if ty.bytes_for(out.len() as u64) != Some(bytes.len() as u64) {
        return Err(DequantizeError::Length { ty, bytes: bytes.len(), elements: out.len() });
    }
    decode(bytes, out);
    Ok(())
}

/// Whether [`dequantize`] supports `ty`.
pub fn can_dequantize(ty: TensorType) -> bool {
    decoder(ty).is_some()
}

/// Decodes whole blocks.
type Decoder = fn(&[u8], &mut [f32]);

fn decoder(ty: TensorType) -> Option<Decoder> {
    let decode: Decoder = match ty {
        TensorType::F32 => |bytes, out| each(bytes, out, |b, y| *y = [f32::from_le_bytes(*b)]),
        TensorType::F16 => |bytes, out| each(bytes, out, |b: &[u8; 2], y| *y = [f16_at(b, 0)]),
        TensorType::BF16 => {
            |bytes, out| each(bytes, out, |b, y| *y = [bf16::from_le_bytes(*b).to_f32()])
        }
        TensorType::Q1_0 => |bytes, out| each(bytes, out, q1_0),
        TensorType::Q2_0 => |bytes, out| each(bytes, out, q2_0),
        TensorType::Q4_0 => |bytes, out| each(bytes, out, q4_0),
        TensorType::Q4_1 => |bytes, out| each(bytes, out, q4_1),
        TensorType::Q5_0 => |bytes, out| each(bytes, out, q5_0),
        TensorType::Q5_1 => |bytes, out| each(bytes, out, q5_1),
        TensorType::Q8_0 => |bytes, out| each(bytes, out, q8_0),
        TensorType::Q2_K => |bytes, out| each(bytes, out, q2_k),
        TensorType::Q3_K => |bytes, out| each(bytes, out, q3_k),
        TensorType::Q4_K => |bytes, out| each(bytes, out, q4_k),
        TensorType::Q5_K => |bytes, out| each(bytes, out, q5_k),
        TensorType::Q6_K => |bytes, out| each(bytes, out, q6_k),
        TensorType::IQ4_NL => |bytes, out| each(bytes, out, iq4_nl),
        TensorType::IQ4_XS => |bytes, out| each(bytes, out, iq4_xs),
        TensorType::MXFP4 => |bytes, out| each(bytes, out, mxfp4),
        TensorType::NVFP4 => |bytes, out| each(bytes, out, nvfp4),
        TensorType::TQ1_0 => |bytes, out| each(bytes, out, tq1_0),
        TensorType::TQ2_0 => |bytes, out| each(bytes, out, tq2_0),
        _ => return None,
    };
    Some(decode)
}

/// Decodes consecutive blocks of `BYTES` bytes and `N` elements.
fn each<const BYTES: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; N]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

fn q1_0(block: &[u8; 18], out: &mut [f32; 128]) {
    let codes: [u8; 128] = unpack::<1, _>(&block[2..], 1);
    looked_up(&codes, &[-1, 1], f16_at(block, 0), out);
}

fn q2_0(block: &[u8; 18], out: &mut [f32; 64]) {
    let codes: [u8; 64] = unpack::<2, _>(&block[2..], 1);
    scaled(&codes, 1, f16_at(block, 0), out);
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let codes: [u8; 32] = unpack::<4, _>(&block[2..], 16);
    scaled(&codes, 8, f16_at(block, 0), out);
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let codes: [u8; 32] = unpack::<4, _>(&block[4..], 16);
    shifted(&codes, f16_at(block, 0), f16_at(block, 2), out);
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let codes: [u8; 32] =
        with_high_bits(unpack::<4, _>(&block[6..], 16), 4, unpack::<1, _>(&block[2..6], 1));
    scaled(&codes, 16, f16_at(block, 0), out);
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let codes: [u8; 32] =
        with_high_bits(unpack::<4, _>(&block[8..], 16), 4, unpack::<1, _>(&block[4..8], 1));
    shifted(&codes, f16_at(block, 0), f16_at(block, 2), out);
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = f16_at(block, 0);
    for (y, code) in out.iter_mut().zip(&block[2..]) {
        *y = scale * f32::from(code.cast_signed());
    }
}

fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scale, min) = (f16_at(block, 80), f16_at(block, 82));
    let codes: [u8; 256] = unpack::<2, _>(&block[16..80], 32);
    for (both, (codes, out)) in block[..16].iter().zip(groups::<16>(&codes, out)) {
        let (s, t) = (f32::from(both & 15), f32::from(both >> 4));
        shifted(codes, scale * s, -(min * t), out);
    }
}

fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let scale = f16_at(block, 108);
    let scales: [u8; 16] =
        with_high_bits(unpack::<4, _>(&block[96..104], 8), 4, unpack::<2, _>(&block[104..108], 4));
    let codes: [u8; 256] =
        with_high_bits(unpack::<2, _>(&block[32..96], 32), 2, unpack::<1, _>(&block[..32], 32));
    for (s, (codes, out)) in scales.into_iter().zip(groups::<16>(&codes, out)) {
        scaled(codes, 4, scale * (f32::from(s) - 32.0), out);
    }
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (head, quants) = block.split_first_chunk().expect("longer than its head");
    shifted_groups(head, &unpack::<4, _>(quants, 32), out);
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (head, quants) = block.split_first_chunk().expect("longer than its head");
    let (high, low) = quants.split_at(32);
    shifted_groups(
        head,
        &with_high_bits(unpack::<4, _>(low, 32), 4, unpack::<1, _>(high, 32)),
        out,
    );
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = f16_at(block, 208);
    let codes: [u8; 256] =
        with_high_bits(unpack::<4, _>(&block[..128], 64), 4, unpack::<2, _>(&block[128..192], 32));
    for (s, (codes, out)) in block[192..208].iter().zip(groups::<16>(&codes, out)) {
        scaled(codes, 32, scale * f32::from(s.cast_signed()), out);
    }
}

/// The levels of `IQ4_NL` and `IQ4_XS`: dense around zero, where most weights are.
pub const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let codes: [u8; 32] = unpack::<4, _>(&block[2..], 16);
    looked_up(&codes, &IQ4_LEVELS, f16_at(block, 0), out);
}

fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let scale = f16_at(block, 0);
    let scales: [u8; 8] =
        with_high_bits(unpack::<4, _>(&block[4..8], 1), 4, unpack::<2, _>(&block[2..4], 1));
    let codes: [u8; 256] = unpack::<4, _>(&block[8..], 16);
    for (s, (codes, out)) in scales.into_iter().zip(groups::<32>(&codes, out)) {
        looked_up(codes, &IQ4_LEVELS, scale * (f32::from(s) - 32.0), out);
    }
}

/// Twice the values of E2M1 (sign, two bits of exponent, one of mantissa), so that they are
/// integers. The scales are halved accordingly. Minus zero counts as zero, as in ggml.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    let codes: [u8; 32] = unpack::<4, _>(&block[1..], 16);
    looked_up(&codes, &E2M1_DOUBLED, half_of_e8m0(block[0]), out);
}

fn nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    let codes: [u8; 64] = unpack::<4, _>(&block[4..], 8);
    for (&scale, (codes, out)) in block[..4].iter().zip(groups::<16>(&codes, out)) {
        looked_up(codes, &E2M1_DOUBLED, half_of_e4m3(scale), out);
    }
}

fn tq1_0(block: &[u8; 54], out: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack_base_3(&block[..32], &mut codes[..160]);
    unpack_base_3(&block[32..48], &mut codes[160..240]);
    unpack_base_3(&block[48..52], &mut codes[240..]);
    scaled(&codes, 1, f16_at(block, 52), out);
}

fn tq2_0(block: &[u8; 66], out: &mut [f32; 256]) {
    let codes: [u8; 256] = unpack::<2, _>(&block[..64], 32);
    scaled(&codes, 1, f16_at(block, 64), out);
}

/// Common part of `Q4_K` and `Q5_K`: `head` holds d, m and the packed scales of eight groups of 32.
fn shifted_groups(head: &[u8; 16], codes: &[u8; 256], out: &mut [f32; 256]) {
    let (scale, min) = (f16_at(head, 0), f16_at(head, 2));
    for ((s, t), (codes, out)) in scales_and_mins(head).into_iter().zip(groups::<32>(codes, out)) {
        shifted(codes, scale * f32::from(s), -(min * f32::from(t)), out);
    }
}

/// Eight 6-bit scales and eight 6-bit minima from three words of four bytes, which follow d and m.
/// The low six bits of the first word are scales 0 to 3, those of the second are minima 0 to 3. The
/// third word holds the low four bits of scales (low nibble) and minima (high nibble) 4 to 7; their
/// high two bits are the remaining bits of the first and the second word.
fn scales_and_mins(head: &[u8; 16]) -> [(u8, u8); 8] {
    std::array::from_fn(|i| {
        let (first, second, third) = (head[4 + i % 4], head[8 + i % 4], head[12 + i % 4]);
        if i < 4 {
            (first & 63, second & 63)
        } else {
            ((third & 15) | ((first >> 6) << 4), (third >> 4) | ((second >> 6) << 4))
        }
    })
}

/// Unpacks `N` codes of `BITS` bits. In each run of `run` bytes the lowest bits are the first `run`
/// codes, the next higher bits the following `run` codes, and so on. With runs of one byte, the
/// codes are consecutive bits.
#[inline(always)] // with `run` known the loops become vectors
fn unpack<const BITS: usize, const N: usize>(packed: &[u8], run: usize) -> [u8; N] {
    assert_eq!(packed.len() * 8, N * BITS, "every code is there, and no more");
    let mask = (1 << BITS) - 1;
    let mut codes = [0; N];
    let runs = packed.chunks_exact(run).zip(codes.chunks_exact_mut(run * 8 / BITS));
    for (run_bytes, codes) in runs {
        for (plane, codes) in codes.chunks_exact_mut(run).enumerate() {
            for (code, byte) in codes.iter_mut().zip(run_bytes) {
                *code = (byte >> (plane * BITS)) & mask;
            }
        }
    }
    codes
}

/// Unpacks base-3 digits, the most significant first: the first digit of all bytes, then the second
/// of all bytes, and so on. A byte is a fraction of 256, so its next digit is the integer part of
/// three times that fraction.
fn unpack_base_3(packed: &[u8], codes: &mut [u8]) {
    let mut power = 1u8;
    for codes in codes.chunks_exact_mut(packed.len()) {
        for (code, byte) in codes.iter_mut().zip(packed) {
            *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
        power = power.wrapping_mul(3);
    }
}

/// Codes whose low `bits` bits and high bits are stored separately.
#[inline(always)]
fn with_high_bits<const N: usize>(mut low: [u8; N], bits: u32, high: [u8; N]) -> [u8; N] {
    for (low, high) in low.iter_mut().zip(high) {
        *low |= high << bits;
    }
    low
}

/// Codes and their outputs in groups of `G`, which share a scale.
fn groups<'a, const G: usize>(
    codes: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; G], &'a mut [f32; G])> {
    codes.as_chunks().0.iter().zip(out.as_chunks_mut().0)
}

/// `scale (code - zero)`.
fn scaled(codes: &[u8], zero: i16, scale: f32, out: &mut [f32]) {
    for (y, &code) in out.iter_mut().zip(codes) {
        *y = scale * f32::from(i16::from(code) - zero);
    }
}

/// `scale code + offset`.
fn shifted(codes: &[u8], scale: f32, offset: f32, out: &mut [f32]) {
    for (y, &code) in out.iter_mut().zip(codes) {
        *y = scale * f32::from(code) + offset;
    }
}

/// `scale table[code]`; the table has an entry for every code.
fn looked_up(codes: &[u8], table: &[i8], scale: f32, out: &mut [f32]) {
    for (y, &code) in out.iter_mut().zip(codes) {
        *y = scale * f32::from(table[usize::from(code)]);
    }
}

/// The f16 in the bytes `at` and `at + 1`.
fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 2^(e - 128), half of an E8M0 scale. The two smallest are subnormal; 255, a NaN in the standard,
/// is a number in ggml.
fn half_of_e8m0(e: u8) -> f32 {
    f32::from_bits(match e {
        0 | 1 => 1 << (21 + e),
        _ => (u32::from(e) - 1) << 23,
    })
}

/// Half of an E4M3 scale (four bits of exponent with bias 7, three of mantissa) without its sign.
/// 127, a NaN in the standard, is zero in ggml; 255 is not.
fn half_of_e4m3(scale: u8) -> f32 {
    if scale == 0x7f {
        return 0.0;
    }
    let (exponent, mantissa) = ((scale >> 3) & 15, u32::from(scale & 7));
    // In units of 2^-11 every value is an integer of at most 24 bits; exponent 0 has no hidden bit.
    let units = match exponent {
        0 => mantissa << 1,
        _ => (8 | mantissa) << exponent,
    };
    units as f32 / 2048.0
}
