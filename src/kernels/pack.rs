//! Weights as the kernels read them: eight rows side by side, block by block.
//!
//! A vector register then holds the same columns of eight rows, and a row's sum stays in its lane
//! from the first block to the last. Rows are padded with zeros to a multiple of eight.

use crate::gguf::{KERNEL_TYPES, TensorType};
use half::f16;

/// Rows of a group.
pub const LANES: usize = 8;
/// Columns of a block of quantized weights or activations.
pub const BLOCK: usize = 32;

/// Eight rows by 32 columns of 4-bit weights, value `d * q + m`.
///
/// Byte `32 * j + 4 * row + c` has column `8 * j + c` in its low half and `8 * j + 4 + c` in its
/// high half.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU4Min {
    pub d: [u16; LANES],
    pub m: [u16; LANES],
    pub qs: [u8; 128],
}

/// As [`BlockU4Min`], value `d * (q - 8)`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU4 {
    pub d: [u16; LANES],
    pub qs: [u8; 128],
}

/// As [`BlockU4Min`] with a fifth bit, value `d * q + m`: bit `2 * j + half` of byte `4 * row + c`
/// of `high` belongs to column `8 * j + 4 * half + c`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU5Min {
    pub d: [u16; LANES],
    pub m: [u16; LANES],
    pub qs: [u8; 128],
    pub high: [u8; 32],
}

/// As [`BlockU5Min`], value `d * (q - 16)`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU5 {
    pub d: [u16; LANES],
    pub qs: [u8; 128],
    pub high: [u8; 32],
}

/// Columns of a block of the K types.
pub const SUPER: usize = 256;
/// Blocks of 32 in it.
pub const SUBS: usize = SUPER / BLOCK;

/// Eight rows by 256 columns of 4-bit weights with 6-bit scales and minima for every 32, value
/// `d * sc * q - m * mn`; the bits as in [`BlockU4Min`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU4K {
    pub d: [u16; LANES],
    pub m: [u16; LANES],
    pub sc: [[u8; LANES]; SUBS],
    pub mn: [[u8; LANES]; SUBS],
    pub qs: [[u8; 128]; SUBS],
}

/// As [`BlockU4K`] with a fifth bit, as in [`BlockU5Min`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU5K {
    pub d: [u16; LANES],
    pub m: [u16; LANES],
    pub sc: [[u8; LANES]; SUBS],
    pub mn: [[u8; LANES]; SUBS],
    pub qs: [[u8; 128]; SUBS],
    pub high: [[u8; 32]; SUBS],
}

/// Eight rows by 256 columns of 6-bit weights with 8-bit scales for every 16, value
/// `d * sc * (q - 32)`. Low bits as in [`BlockU4Min`]; bits `2 * (j % 2 * 2 + half)` and one more of
/// byte `4 * row + c` of `high[sub][j / 2]` belong to column `8 * j + 4 * half + c`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU6K {
    pub d: [u16; LANES],
    pub sc: [[i8; LANES]; 2 * SUBS],
    pub qs: [[u8; 128]; SUBS],
    pub high: [[[u8; 32]; 2]; SUBS],
}

/// Eight rows by 32 columns of 8-bit weights, value `d * q`; byte `32 * j + 4 * row + c` is column
/// `4 * j + c`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockI8 {
    pub d: [u16; LANES],
    pub qs: [i8; 256],
}

/// Groups of eight rows, one after another; of a group all blocks, or all columns.
#[derive(Debug, Clone)]
pub enum Packed {
    U4Min(Vec<BlockU4Min>),
    U4(Vec<BlockU4>),
    U5Min(Vec<BlockU5Min>),
    U5(Vec<BlockU5>),
    U4K(Vec<BlockU4K>),
    U5K(Vec<BlockU5K>),
    U6K(Vec<BlockU6K>),
    I8(Vec<BlockI8>),
    /// (groups, columns, 8) bits of f16.
    F16(Vec<[u16; LANES]>),
    /// (groups, columns, 8)
    F32(Vec<[f32; LANES]>),
}

/// A matrix ready for the kernels.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    packed: Packed,
}

/// Why a tensor cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    #[error("tensor type {0} has no kernel yet")]
    Type(&'static str),
    #[error("{got} bytes are not {rows} rows of {cols} columns of {ty}")]
    Size { ty: &'static str, rows: usize, cols: usize, got: usize },
}

/// Whether [`Matrix::pack`] knows the type.
pub fn can_pack(ty: TensorType) -> bool {
    KERNEL_TYPES.contains(&ty)
}

impl Matrix {
    /// Packs `rows` rows of `cols` columns, stored as ggml stores type `ty`, row by row.
    pub fn pack(ty: TensorType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Self, PackError> {
        let (block, size) = (ty.block_size() as usize, ty.block_bytes() as usize);
        if !can_pack(ty) {
            return Err(PackError::Type(ty.name()));
        }
        let expected = (cols / block).checked_mul(size).and_then(|row| row.checked_mul(rows));
        if !cols.is_multiple_of(block) || expected != Some(bytes.len()) {
            return Err(PackError::Size { ty: ty.name(), rows, cols, got: bytes.len() });
        }
        let source = Source { rows, blocks: cols / block, size, bytes };
        let packed = match ty {
            TensorType::Q4_0 => Packed::U4(source.pack(pack_q4_0)),
            TensorType::Q4_1 => Packed::U4Min(source.pack(pack_q4_1)),
            TensorType::Q5_0 => Packed::U5(source.pack(pack_q5_0)),
            TensorType::Q5_1 => Packed::U5Min(source.pack(pack_q5_1)),
            TensorType::Q4_K => Packed::U4K(source.pack(pack_q4_k)),
            TensorType::Q5_K => Packed::U5K(source.pack(pack_q5_k)),
            TensorType::Q6_K => Packed::U6K(source.pack(pack_q6_k)),
            TensorType::Q8_0 => Packed::I8(source.pack(pack_q8_0)),
            TensorType::F16 => Packed::F16(source.pack(|rows| rows.map(|x| u16_at(x, 0)))),
            TensorType::BF16 => {
                let wide = |x: &[u8]| f32::from_bits(u32::from(u16_at(x, 0)) << 16);
                Packed::F32(source.pack(|rows| rows.map(wide)))
            }
            _ => Packed::F32(source.pack(|rows| rows.map(f32_at))),
        };
        Ok(Self { rows, cols, packed })
    }

    /// (rows, columns) numbers, each times 2^`shift`, kept in f16.
    pub fn in_f16(rows: usize, cols: usize, values: &[f32], shift: i32) -> Self {
        assert_eq!(values.len(), rows * cols);
        let scale = f32::powi(2.0, shift);
        let at = |group: usize, col: usize, lane: usize| match group * LANES + lane {
            row if row < rows => f16::from_f32(values[row * cols + col] * scale).to_bits(),
            _ => 0,
        };
        let lanes = |group: usize, col: usize| std::array::from_fn(|lane| at(group, col, lane));
        let groups = 0..rows.div_ceil(LANES);
        let packed = groups.flat_map(|group| (0..cols).map(move |col| lanes(group, col))).collect();
        Self { rows, cols, packed: Packed::F16(packed) }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Groups of eight rows.
    pub fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    pub fn packed(&self) -> &Packed {
        &self.packed
    }

    /// Whether the kernels want the activations quantized.
    pub fn takes_quantized(&self) -> bool {
        !matches!(self.packed, Packed::F16(_) | Packed::F32(_))
    }

    /// The packed weights, as they lie in memory.
    pub fn bytes(&self) -> &[u8] {
        fn of<B>(blocks: &[B]) -> &[u8] {
            // SAFETY: any initialized bytes are bytes, and blocks have no padding.
            unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), size_of_val(blocks)) }
        }
        match &self.packed {
            Packed::U4Min(blocks) => of(blocks),
            Packed::U4(blocks) => of(blocks),
            Packed::U5Min(blocks) => of(blocks),
            Packed::U5(blocks) => of(blocks),
            Packed::U4K(blocks) => of(blocks),
            Packed::U5K(blocks) => of(blocks),
            Packed::U6K(blocks) => of(blocks),
            Packed::I8(blocks) => of(blocks),
            Packed::F16(lanes) => of(lanes),
            Packed::F32(lanes) => of(lanes),
        }
    }
}

/// Rows of blocks as they lie in the file.
struct Source<'a> {
    rows: usize,
    blocks: usize,
    /// Bytes of a block.
    size: usize,
    bytes: &'a [u8],
}

impl Source<'_> {
    /// Calls `pack` with one block of each row of a group, for every block of every group.
    fn pack<B>(&self, pack: impl Fn([&[u8]; LANES]) -> B) -> Vec<B> {
        // A row past the end: all zeros is a valid block of every type, of value zero (with a
        // scale of zero).
        let nothing = vec![0; self.size];
        let mut packed = Vec::with_capacity(self.rows.div_ceil(LANES) * self.blocks);
        for group in 0..self.rows.div_ceil(LANES) {
            for block in 0..self.blocks {
                packed.push(pack(std::array::from_fn(|lane| {
                    let row = group * LANES + lane;
                    let from = (row * self.blocks + block) * self.size;
                    if row < self.rows { &self.bytes[from..from + self.size] } else { &nothing }
                })));
            }
        }
        packed
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn f32_at(bytes: &[u8]) -> f32 {
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

/// Packs their fifth bits.
fn interleave_fifth(q: impl Fn(usize, usize) -> u8) -> [u8; 32] {
    std::array::from_fn(|at| {
        let (lane, c) = (at / 4, at % 4);
        (0..8).map(|bit| (q(lane, 4 * bit + c) >> 4 & 1) << bit).sum()
    })
}

/// Packs their fifth and sixth bits.
fn interleave_sixth(q: impl Fn(usize, usize) -> u8) -> [[u8; 32]; 2] {
    std::array::from_fn(|part| {
        std::array::from_fn(|at| {
            let (lane, c) = (at / 4, at % 4);
            (0..4).map(|pair| (q(lane, 16 * part + 4 * pair + c) >> 4 & 3) << (2 * pair)).sum()
        })
    })
}

/// Weight `column` of a block with a word of fifth bits before its low ones.
fn five_bits(high: &[u8], qs: &[u8], column: usize) -> u8 {
    nibble(qs, column) | (high[column / 8] >> (column % 8) & 1) << 4
}

fn pack_q4_0(rows: [&[u8]; LANES]) -> BlockU4 {
    BlockU4 { d: rows.map(|row| u16_at(row, 0)), qs: interleave_nibbles(rows.map(|row| &row[2..])) }
}

fn pack_q4_1(rows: [&[u8]; LANES]) -> BlockU4Min {
    BlockU4Min {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        qs: interleave_nibbles(rows.map(|row| &row[4..])),
    }
}

fn pack_q5_0(rows: [&[u8]; LANES]) -> BlockU5 {
    BlockU5 {
        d: rows.map(|row| u16_at(row, 0)),
        high: interleave_fifth(|lane, col| five_bits(&rows[lane][2..], &rows[lane][6..], col)),
        qs: interleave_nibbles(rows.map(|row| &row[6..])),
    }
}

fn pack_q5_1(rows: [&[u8]; LANES]) -> BlockU5Min {
    BlockU5Min {
        d: rows.map(|row| u16_at(row, 0)),
        m: rows.map(|row| u16_at(row, 2)),
        high: interleave_fifth(|lane, col| five_bits(&rows[lane][4..], &rows[lane][8..], col)),
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

fn pack_q4_k(rows: [&[u8]; LANES]) -> BlockU4K {
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

fn pack_q5_k(rows: [&[u8]; LANES]) -> BlockU5K {
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
        high: std::array::from_fn(|sub| {
            interleave_fifth(|lane, col| (rows[lane][16 + col] >> sub & 1) << 4)
        }),
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

fn pack_q6_k(rows: [&[u8]; LANES]) -> BlockU6K {
    BlockU6K {
        d: rows.map(|row| u16_at(row, 208)),
        sc: std::array::from_fn(|sixteen| rows.map(|row| row[192 + sixteen] as i8)),
        qs: std::array::from_fn(|sub| interleave(|lane, col| six_bits(rows[lane], sub, col))),
        high: std::array::from_fn(|sub| {
            interleave_sixth(|lane, col| six_bits(rows[lane], sub, col))
        }),
    }
}

fn pack_q8_0(rows: [&[u8]; LANES]) -> BlockI8 {
    let qs = std::array::from_fn(|at| {
        let (j, lane, c) = (at / 32, at % 32 / 4, at % 4);
        rows[lane][2 + 4 * j + c] as i8
    });
    BlockI8 { d: rows.map(|row| u16_at(row, 0)), qs }
}

/// The number that the bits stand for.
pub fn wide(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}
