//! From blocks as ggml stores them (`gguf::dequantize` lists the layouts) to ours.

use super::*;

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub fn f32_at(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// ggml keeps column `i` of a 4-bit block in the low half of byte `i`, column `16 + i` in its high
/// half.
fn nibble(qs: &[u8], column: usize) -> u8 {
    if column < 16 { qs[column] & 15 } else { qs[column - 16] >> 4 }
}

fn interleave_nibbles(rows: [&[u8]; LANES]) -> [u8; 128] {
    interleave(|lane, column| nibble(rows[lane], column))
}

/// Packs the low four bits of the 32 weights that `q` gives by lane and column.
fn interleave(q: impl Fn(usize, usize) -> u8) -> [u8; 128] {
    std::array::from_fn(|at| {
        let (j, lane, c) = (at / 32, at % 32 / 4, at % 4);
        (q(lane, 8 * j + c) & 15) | (q(lane, 8 * j + 4 + c) & 15) << 4
    })
}

/// Packs 32 single bits.
fn interleave_bits(bit: impl Fn(usize, usize) -> u8) -> [u8; 32] {
    std::array::from_fn(|at| {
        let (lane, c) = (at / 4, at % 4);
        (0..8).map(|part| (bit(lane, 4 * part + c) & 1) << part).sum()
    })
}

/// Packs 32 pairs of bits, 16 in each half.
fn interleave_pairs(pair: impl Fn(usize, usize) -> u8) -> [[u8; 32]; 2] {
    std::array::from_fn(|half| {
        std::array::from_fn(|at| {
            let (lane, c) = (at / 4, at % 4);
            (0..4).map(|part| (pair(lane, 16 * half + 4 * part + c) & 3) << (2 * part)).sum()
        })
    })
}

/// Bit `column` of a word, and those above it.
fn bit_at(word: &[u8], column: usize) -> u8 {
    word[column / 8] >> (column % 8)
}

pub fn q4_0(rows: [&[u8]; LANES]) -> BlockU4 {
    BlockU4 { d: rows.map(|row| u16_at(row, 0)), qs: interleave_nibbles(rows.map(|row| &row[2..])) }
}

pub fn q4_1(rows: [&[u8]; LANES]) -> BlockU4Min {
    BlockU4Min {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        qs: interleave_nibbles(rows.map(|row| &row[4..])),
    }
}

pub fn q5_0(rows: [&[u8]; LANES]) -> BlockU5 {
    BlockU5 {
        d: rows.map(|row| u16_at(row, 0)),
        high: interleave_bits(|lane, col| bit_at(&rows[lane][2..], col)),
        qs: interleave_nibbles(rows.map(|row| &row[6..])),
    }
}

pub fn q5_1(rows: [&[u8]; LANES]) -> BlockU5Min {
    BlockU5Min {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        high: interleave_bits(|lane, col| bit_at(&rows[lane][4..], col)),
        qs: interleave_nibbles(rows.map(|row| &row[8..])),
    }
}

/// Scale and minimum of sub-block `sub`: six bits each, in twelve bytes (`get_scale_min_k4` in
/// `ggml-quants.c` describes the layout).
fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    match sub {
        0..4 => (packed[sub] & 63, packed[sub + 4] & 63),
        _ => (
            packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4,
            packed[sub + 4] >> 4 | packed[sub] >> 6 << 4,
        ),
    }
}

/// Low four bits of a K block's weight: 64 columns share 32 bytes.
fn super_nibble(qs: &[u8], sub: usize, column: usize) -> u8 {
    qs[sub / 2 * 32 + column] >> (sub % 2 * 4) & 15
}

pub fn q4_k(rows: [&[u8]; LANES]) -> BlockU4K {
    let each = |sub: usize| rows.map(|row| scale_and_min(&row[4..16], sub));
    BlockU4K {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        sc: std::array::from_fn(|sub| each(sub).map(|(scale, _)| scale)),
        mn: std::array::from_fn(|sub| each(sub).map(|(_, min)| min)),
        qs: std::array::from_fn(|sub| {
            interleave(|lane, col| super_nibble(&rows[lane][16..], sub, col))
        }),
    }
}

pub fn q5_k(rows: [&[u8]; LANES]) -> BlockU5K {
    let each = |sub: usize| rows.map(|row| scale_and_min(&row[4..16], sub));
    BlockU5K {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        sc: std::array::from_fn(|sub| each(sub).map(|(scale, _)| scale)),
        mn: std::array::from_fn(|sub| each(sub).map(|(_, min)| min)),
        qs: std::array::from_fn(|sub| {
            interleave(|lane, col| super_nibble(&rows[lane][48..], sub, col))
        }),
        // Bit `sub` of byte `col`.
        high: std::array::from_fn(|sub| interleave_bits(|lane, col| rows[lane][16 + col] >> sub)),
    }
}

/// Weight `column` of sub-block `sub` of a Q6_K block: 128 columns share 64 bytes of low bits and 32
/// of high ones.
fn six_bits(row: &[u8], sub: usize, column: usize) -> u8 {
    let (half, quarter) = (sub / 4, sub % 4);
    let low = row[half * 64 + quarter % 2 * 32 + column] >> (quarter / 2 * 4) & 15;
    let high = row[128 + half * 32 + column] >> (2 * quarter) & 3;
    low | high << 4
}

pub fn q6_k(rows: [&[u8]; LANES]) -> BlockU6K {
    BlockU6K {
        d: rows.map(|row| u16_at(row, 208)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| row[192 + sixteen] as i8)),
        qs: std::array::from_fn(|sub| interleave(|lane, col| six_bits(rows[lane], sub, col))),
        high: std::array::from_fn(|sub| {
            interleave_pairs(|lane, col| six_bits(rows[lane], sub, col) >> 4)
        }),
    }
}

/// Bits `col` of the two-bit weights of a K block, and those above them: 128 columns share 32 bytes.
fn super_pair(qs: &[u8], sub: usize, col: usize) -> u8 {
    qs[sub / 4 * 32 + col] >> (2 * (sub % 4))
}

pub fn q2_k(rows: [&[u8]; LANES]) -> BlockU2K {
    BlockU2K {
        d: rows.map(|row| u16_at(row, 80)),
        m: rows.map(|row| u16_at(row, 82)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| row[sixteen])),
        qs: std::array::from_fn(|sub| {
            interleave_pairs(|lane, col| super_pair(&rows[lane][16..], sub, col))
        }),
    }
}

/// Scale `sixteen` of a Q3_K block: four bits, and two in the bytes after those of all.
fn three_bit_scale(packed: &[u8], sixteen: usize) -> i8 {
    let low = packed[sixteen % 8] >> (sixteen / 8 * 4) & 15;
    let high = packed[8 + sixteen % 4] >> (sixteen / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

pub fn q3_k(rows: [&[u8]; LANES]) -> BlockU3K {
    BlockU3K {
        d: rows.map(|row| u16_at(row, 108)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| three_bit_scale(&row[96..], sixteen))),
        qs: std::array::from_fn(|sub| {
            interleave_pairs(|lane, col| super_pair(&rows[lane][32..], sub, col))
        }),
        high: std::array::from_fn(|sub| interleave_bits(|lane, col| rows[lane][col] >> sub)),
    }
}

pub fn iq4_nl(rows: [&[u8]; LANES]) -> BlockT4 {
    BlockT4 { d: rows.map(|row| u16_at(row, 0)), qs: interleave_nibbles(rows.map(|row| &row[2..])) }
}

/// Scale `sub` of an IQ4_XS block: two bits, and four in the bytes after those of all.
fn table_scale(packed: &[u8], sub: usize) -> i8 {
    let high = packed[sub / 4] >> (2 * (sub % 4)) & 3;
    let low = packed[2 + sub / 2] >> (4 * (sub % 2)) & 15;
    (low | high << 4) as i8 - 32
}

pub fn iq4_xs(rows: [&[u8]; LANES]) -> BlockT4K {
    BlockT4K {
        d: rows.map(|row| u16_at(row, 0)),
        sc: std::array::from_fn(|sub| rows.map(|row| table_scale(&row[2..], sub))),
        qs: std::array::from_fn(|sub| interleave_nibbles(rows.map(|row| &row[8 + 16 * sub..]))),
    }
}

pub fn q8_0(rows: [&[u8]; LANES]) -> BlockI8 {
    let qs = std::array::from_fn(|at| {
        let (j, lane, c) = (at / 32, at % 32 / 4, at % 4);
        rows[lane][2 + 4 * j + c] as i8
    });
    BlockI8 { d: rows.map(|row| u16_at(row, 0)), qs }
}
