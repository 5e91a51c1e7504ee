//! Converts blocks from ggml's layouts (listed in `gguf::dequantize`) to ours.
//!
//! Weights are moved four columns at a time, one byte each, in 32-bit words; surplus bits of a word
//! are masked when it is placed.

use super::*;

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn f32_at(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[inline(always)]
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The same byte four times.
const fn each(byte: u8) -> u32 {
    u32::from_le_bytes([byte; 4])
}

/// Four weights of a 4-bit block. ggml stores column `i` in the low half of byte `i`, column `16 +
/// i` in its high half.
#[inline(always)]
fn nibbles(qs: &[u8], column: usize) -> u32 {
    u32_at(qs, column % 16) >> (column / 16 * 4)
}

fn interleave_nibbles(rows: [&[u8]; LANES]) -> [u8; 128] {
    interleave(|lane, column| nibbles(rows[lane], column))
}

/// Writes words in groups of eight, one word of each row.
#[inline(always)]
fn place<const N: usize>(word: impl Fn(usize, usize) -> u32) -> [u8; N] {
    let mut placed = [0; N];
    for (at, four) in placed.chunks_exact_mut(4).enumerate() {
        four.copy_from_slice(&word(at / LANES, at % LANES).to_le_bytes());
    }
    placed
}

/// Packs the low four bits of 32 weights per row. `q` returns four weights of a row from a column
/// on.
#[inline(always)]
fn interleave(q: impl Fn(usize, usize) -> u32) -> [u8; 128] {
    place(|j, lane| {
        let nibbles = |column| q(lane, column) & each(15);
        nibbles(8 * j) | nibbles(8 * j + 4) << 4
    })
}

/// Packs 32 single bits per row.
#[inline(always)]
fn interleave_bits(q: impl Fn(usize, usize) -> u32) -> [u8; 32] {
    place(|_, lane| (0..8).map(|part| (q(lane, 4 * part) & each(1)) << part).sum())
}

/// Packs 32 two-bit values per row, 16 in each half.
#[inline(always)]
fn interleave_pairs(q: impl Fn(usize, usize) -> u32) -> [[u8; 32]; 2] {
    std::array::from_fn(|half| {
        place(|_, lane| {
            let pairs = |part: usize| (q(lane, 16 * half + 4 * part) & each(3)) << (2 * part);
            (0..4).map(pairs).sum()
        })
    })
}

/// Four bits of a row's bit field, from `column` on, each in its own byte.
#[inline(always)]
fn bits_at(bits: &[u8], column: usize) -> u32 {
    let four = bits[column / 8] >> (column % 8) & 15;
    // Copy the four bits once per byte, shifted so that each byte's own bit is its lowest.
    (u32::from(four) * 0x0020_4081) & each(1)
}

pub(super) fn q4_0(rows: [&[u8]; LANES]) -> BlockU4 {
    BlockU4 { d: rows.map(|row| u16_at(row, 0)), qs: interleave_nibbles(rows.map(|row| &row[2..])) }
}

pub(super) fn q4_1(rows: [&[u8]; LANES]) -> BlockU4Min {
    BlockU4Min {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        qs: interleave_nibbles(rows.map(|row| &row[4..])),
    }
}

pub(super) fn q5_0(rows: [&[u8]; LANES]) -> BlockU5 {
    BlockU5 {
        d: rows.map(|row| u16_at(row, 0)),
        high: interleave_bits(|lane, col| bits_at(&rows[lane][2..], col)),
        qs: interleave_nibbles(rows.map(|row| &row[6..])),
    }
}

pub(super) fn q5_1(rows: [&[u8]; LANES]) -> BlockU5Min {
    BlockU5Min {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        high: interleave_bits(|lane, col| bits_at(&rows[lane][4..], col)),
        qs: interleave_nibbles(rows.map(|row| &row[8..])),
    }
}

/// Scale and minimum of sub-block `sub`: six bits each, packed in twelve bytes (`get_scale_min_k4`
/// in `ggml-quants.c` describes the layout).
fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    match sub {
        0..4 => (packed[sub] & 63, packed[sub + 4] & 63),
        _ => (
            packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4,
            packed[sub + 4] >> 4 | packed[sub] >> 6 << 4,
        ),
    }
}

/// Low four bits of a K block's weights: 64 columns share 32 bytes.
#[inline(always)]
fn super_nibbles(qs: &[u8], sub: usize, column: usize) -> u32 {
    u32_at(qs, sub / 2 * 32 + column) >> (sub % 2 * 4)
}

pub(super) fn q4_k(rows: [&[u8]; LANES]) -> BlockU4K {
    let each = |sub: usize| rows.map(|row| scale_and_min(&row[4..16], sub));
    BlockU4K {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        sc: std::array::from_fn(|sub| each(sub).map(|(scale, _)| scale)),
        mn: std::array::from_fn(|sub| each(sub).map(|(_, min)| min)),
        qs: std::array::from_fn(|sub| {
            interleave(|lane, col| super_nibbles(&rows[lane][16..], sub, col))
        }),
    }
}

pub(super) fn q5_k(rows: [&[u8]; LANES]) -> BlockU5K {
    let each = |sub: usize| rows.map(|row| scale_and_min(&row[4..16], sub));
    BlockU5K {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        sc: std::array::from_fn(|sub| each(sub).map(|(scale, _)| scale)),
        mn: std::array::from_fn(|sub| each(sub).map(|(_, min)| min)),
        qs: std::array::from_fn(|sub| {
            interleave(|lane, col| super_nibbles(&rows[lane][48..], sub, col))
        }),
        // Bit `sub` of byte `col`.
        high: std::array::from_fn(|sub| {
            interleave_bits(|lane, col| u32_at(rows[lane], 16 + col) >> sub)
        }),
    }
}

/// Low four bits of a Q6_K block's weights: 128 columns share 64 bytes.
#[inline(always)]
fn six_low(row: &[u8], sub: usize, column: usize) -> u32 {
    u32_at(row, sub / 4 * 64 + sub % 2 * 32 + column) >> (sub % 4 / 2 * 4)
}

pub(super) fn q6_k(rows: [&[u8]; LANES]) -> BlockU6K {
    BlockU6K {
        d: rows.map(|row| u16_at(row, 208)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| row[192 + sixteen] as i8)),
        qs: std::array::from_fn(|sub| interleave(|lane, col| six_low(rows[lane], sub, col))),
        high: std::array::from_fn(|sub| {
            interleave_pairs(|lane, col| super_pairs(&rows[lane][128..], sub, col))
        }),
    }
}

/// Two bits of a K block's weights: 128 columns share 32 bytes.
#[inline(always)]
fn super_pairs(qs: &[u8], sub: usize, column: usize) -> u32 {
    u32_at(qs, sub / 4 * 32 + column) >> (2 * (sub % 4))
}

pub(super) fn q2_k(rows: [&[u8]; LANES]) -> BlockU2K {
    BlockU2K {
        d: rows.map(|row| u16_at(row, 80)),
        m: rows.map(|row| u16_at(row, 82)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| row[sixteen])),
        qs: std::array::from_fn(|sub| {
            interleave_pairs(|lane, col| super_pairs(&rows[lane][16..], sub, col))
        }),
    }
}

/// Scale number `sixteen` of a Q3_K block: the four low bits, and two high bits stored after all
/// low bits.
fn three_bit_scale(packed: &[u8], sixteen: usize) -> i8 {
    let low = packed[sixteen % 8] >> (sixteen / 8 * 4) & 15;
    let high = packed[8 + sixteen % 4] >> (sixteen / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

pub(super) fn q3_k(rows: [&[u8]; LANES]) -> BlockU3K {
    BlockU3K {
        d: rows.map(|row| u16_at(row, 108)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| three_bit_scale(&row[96..], sixteen))),
        qs: std::array::from_fn(|sub| {
            interleave_pairs(|lane, col| super_pairs(&rows[lane][32..], sub, col))
        }),
        high: std::array::from_fn(|sub| {
            interleave_bits(|lane, col| u32_at(rows[lane], col) >> sub)
        }),
    }
}

pub(super) fn iq4_nl(rows: [&[u8]; LANES]) -> BlockT4 {
    BlockT4 { d: rows.map(|row| u16_at(row, 0)), qs: interleave_nibbles(rows.map(|row| &row[2..])) }
}

/// Scale `sub` of an IQ4_XS block: two high bits, and four low bits stored after all high bits.
fn table_scale(packed: &[u8], sub: usize) -> i8 {
    let high = packed[sub / 4] >> (2 * (sub % 4)) & 3;
    let low = packed[2 + sub / 2] >> (4 * (sub % 2)) & 15;
    (low | high << 4) as i8 - 32
}

pub(super) fn iq4_xs(rows: [&[u8]; LANES]) -> BlockT4K {
    BlockT4K {
        d: rows.map(|row| u16_at(row, 0)),
        sc: std::array::from_fn(|sub| rows.map(|row| table_scale(&row[2..], sub))),
        qs: std::array::from_fn(|sub| interleave_nibbles(rows.map(|row| &row[8 + 16 * sub..]))),
    }
}

pub(super) fn q8_0(rows: [&[u8]; LANES]) -> BlockI8 {
    let qs = place::<256>(|j, lane| u32_at(rows[lane], 2 + 4 * j));
    BlockI8 { d: rows.map(|row| u16_at(row, 0)), qs: qs.map(|byte| byte as i8) }
}
