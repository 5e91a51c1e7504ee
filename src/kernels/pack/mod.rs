//! Weights in the layout of the kernels: eight rows interleaved, block by block.
//!
//! A vector register then holds the same columns of eight rows, and a row's sum stays in its lane
//! from the first block to the last. Rows are padded with zeros to a multiple of eight.

mod blocks;
mod ggml;

pub use blocks::*;

use super::pool::{Disjoint, Pool};
use crate::gguf::{KERNEL_TYPES, TensorType};
use ggml::{f32_at, u16_at};
use half::{bf16, f16};

/// Rows per group.
pub const LANES: usize = 8;
/// Columns per block of quantized weights or activations.
pub const BLOCK: usize = 32;

/// Groups of eight rows, one after another; each group holds all its blocks, or all its columns.
#[derive(Debug, Clone)]
pub enum Packed {
    U4Min(Vec<BlockU4Min>),
    U4(Vec<BlockU4>),
    U5Min(Vec<BlockU5Min>),
    U5(Vec<BlockU5>),
    U4K(Vec<BlockU4K>),
    U5K(Vec<BlockU5K>),
    U2K(Vec<BlockU2K>),
    U3K(Vec<BlockU3K>),
    U6K(Vec<BlockU6K>),
    T4(Vec<BlockT4>),
    T4K(Vec<BlockT4K>),
    I8(Vec<BlockI8>),
    /// (groups, columns, 8) bits of f16.
    F16(Vec<[u16; LANES]>),
    /// (groups, columns, 8)
    BF16(Vec<[bf16; LANES]>),
    /// (groups, columns, 8)
    F32(Vec<[f32; LANES]>),
}

/// The type of a matrix's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    U4Min,
    U4,
    U5Min,
    U5,
    U4K,
    U5K,
    U2K,
    U3K,
    U6K,
    T4,
    T4K,
    I8,
    F16,
    BF16,
    F32,
}

impl Kind {
    /// Whether the weights are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32)
    }
}

/// Blocks (or columns) without their static type.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    pub kind: Kind,
    pub data: *const u8,
    pub len: usize,
    /// Size of one block in bytes.
    pub size: usize,
}

impl Packed {
    fn raw(&self) -> Raw {
        fn raw<B>(kind: Kind, blocks: &[B]) -> Raw {
            Raw { kind, data: blocks.as_ptr().cast(), len: blocks.len(), size: size_of::<B>() }
        }
        match self {
            Self::U4Min(blocks) => raw(Kind::U4Min, blocks),
            Self::U4(blocks) => raw(Kind::U4, blocks),
            Self::U5Min(blocks) => raw(Kind::U5Min, blocks),
            Self::U5(blocks) => raw(Kind::U5, blocks),
            Self::U4K(blocks) => raw(Kind::U4K, blocks),
            Self::U5K(blocks) => raw(Kind::U5K, blocks),
            Self::U2K(blocks) => raw(Kind::U2K, blocks),
            Self::U3K(blocks) => raw(Kind::U3K, blocks),
            Self::U6K(blocks) => raw(Kind::U6K, blocks),
            Self::T4(blocks) => raw(Kind::T4, blocks),
            Self::T4K(blocks) => raw(Kind::T4K, blocks),
            Self::I8(blocks) => raw(Kind::I8, blocks),
            Self::F16(lanes) => raw(Kind::F16, lanes),
            Self::BF16(lanes) => raw(Kind::BF16, lanes),
            Self::F32(lanes) => raw(Kind::F32, lanes),
        }
    }
}

/// A packed matrix, ready for the kernels.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    packed: Packed,
}

/// The reason why a tensor cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    #[error("tensor type {0} has no kernel yet")]
    Type(&'static str),
    #[error("{got} bytes are not {rows} rows of {cols} columns of {ty}")]
    Size { ty: &'static str, rows: usize, cols: usize, got: usize },
}

/// Whether [`Matrix::pack`] supports the type.
pub fn can_pack(ty: TensorType) -> bool {
    KERNEL_TYPES.contains(&ty)
}

impl Matrix {
    /// Packs `rows` rows of `cols` columns, stored row by row in ggml's format `ty`.
    pub fn pack(
        ty: TensorType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        pool: &mut Pool,
    ) -> Result<Self, PackError> {
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
            TensorType::Q4_0 => Packed::U4(source.pack(pool, ggml::q4_0)),
            TensorType::Q4_1 => Packed::U4Min(source.pack(pool, ggml::q4_1)),
            TensorType::Q5_0 => Packed::U5(source.pack(pool, ggml::q5_0)),
            TensorType::Q5_1 => Packed::U5Min(source.pack(pool, ggml::q5_1)),
            TensorType::Q4_K => Packed::U4K(source.pack(pool, ggml::q4_k)),
            TensorType::Q5_K => Packed::U5K(source.pack(pool, ggml::q5_k)),
            TensorType::Q2_K => Packed::U2K(source.pack(pool, ggml::q2_k)),
            TensorType::Q3_K => Packed::U3K(source.pack(pool, ggml::q3_k)),
            TensorType::Q6_K => Packed::U6K(source.pack(pool, ggml::q6_k)),
            TensorType::IQ4_NL => Packed::T4(source.pack(pool, ggml::iq4_nl)),
            TensorType::IQ4_XS => Packed::T4K(source.pack(pool, ggml::iq4_xs)),
            TensorType::Q8_0 => Packed::I8(source.pack(pool, ggml::q8_0)),
            TensorType::F16 => Packed::F16(source.pack(pool, |rows| rows.map(|x| u16_at(x, 0)))),
            TensorType::BF16 => {
                Packed::BF16(source.pack(pool, |rows| rows.map(|x| bf16::from_bits(u16_at(x, 0)))))
            }
            _ => Packed::F32(source.pack(pool, |rows| rows.map(f32_at))),
        };
        Ok(Self { rows, cols, packed })
    }

    /// Packs (rows, columns) numbers, each multiplied by 2^`shift`, in f16.
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

    /// Number of groups of eight rows.
    pub fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The blocks of all groups, one group after another.
    pub fn raw(&self) -> Raw {
        self.packed.raw()
    }

    /// Whether the kernels need quantized activations.
    pub fn takes_quantized(&self) -> bool {
        !self.raw().kind.is_float()
    }

    /// The packed weights as bytes.
    pub fn bytes(&self) -> &[u8] {
        let raw = self.raw();
        // SAFETY: the bytes are borrowed with `self`, and blocks have no padding.
        unsafe { std::slice::from_raw_parts(raw.data, raw.len * raw.size) }
    }
}

/// Rows of blocks as stored in the file.
struct Source<'a> {
    rows: usize,
    blocks: usize,
    /// Size of a block in bytes.
    size: usize,
    bytes: &'a [u8],
}

impl Source<'_> {
    /// Calls `pack` with one block of each row of a group, for every block of every group.
    fn pack<B: Send>(&self, pool: &mut Pool, pack: impl Fn([&[u8]; LANES]) -> B + Sync) -> Vec<B> {
        // A row beyond the end: all zeros is a valid block of value zero in every type (the scale
        // is zero).
        let nothing = vec![0; self.size];
        let groups = self.rows.div_ceil(LANES);
        let mut packed = Vec::with_capacity(groups * self.blocks);
        let all = Disjoint::new(packed.spare_capacity_mut());
        pool.run(groups, |group| {
            // SAFETY: every group has its own blocks.
            let blocks = unsafe { all.part(group * self.blocks, self.blocks) };
            for (block, packed) in blocks.iter_mut().enumerate() {
                packed.write(pack(std::array::from_fn(|lane| {
                    let row = group * LANES + lane;
                    let from = (row * self.blocks + block) * self.size;
                    if row < self.rows { &self.bytes[from..from + self.size] } else { &nothing }
                })));
            }
        });
        // SAFETY: the blocks of all groups have been written.
        unsafe { packed.set_len(groups * self.blocks) };
        packed
    }
}

/// Converts the bits of an f16 to f32.
pub fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}
