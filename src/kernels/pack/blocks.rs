//! Layouts of packed blocks: eight rows interleaved.

use super::{BLOCK, LANES};

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

/// As [`BlockU4`], value `d * IQ4_LEVELS[q]`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockT4 {
    pub d: [u16; LANES],
    pub qs: [u8; 128],
}

/// Columns per block of the K types.
pub const SUPER: usize = 256;
/// Blocks of 32 columns in it.
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

/// As [`BlockT4`] with 6-bit scales for every 32, value `d * sc * IQ4_LEVELS[q]`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockT4K {
    pub d: [u16; LANES],
    pub sc: [[i8; LANES]; SUBS],
    pub qs: [[u8; 128]; SUBS],
}

/// Eight rows by 256 columns of 2-bit weights with 4-bit scales and minima for every 16 (the low
/// and the high half of a byte of `sc`), value `d * scale * q - m * minimum`. Bits `2 * part` and
/// `2 * part + 1` of byte `4 * row + c` of `qs[sub][half]` are column `16 * half + 4 * part + c`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU2K {
    pub d: [u16; LANES],
    pub m: [u16; LANES],
    pub sc: [[u8; LANES]; 2 * SUBS],
    pub qs: [[[u8; 32]; 2]; SUBS],
}

/// Eight rows by 256 columns of 3-bit weights with 6-bit scales for every 16, value
/// `d * sc * (q - 4)`: low bits as in [`BlockU2K`], the third as the fifth in [`BlockU5Min`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BlockU3K {
    pub d: [u16; LANES],
    pub sc: [[i8; LANES]; 2 * SUBS],
    pub qs: [[[u8; 32]; 2]; SUBS],
    pub high: [[u8; 32]; SUBS],
}

/// Eight rows by 256 columns of 6-bit weights with 8-bit scales for every 16, value
/// `d * sc * (q - 32)`: low bits as in [`BlockU4Min`], the fifth and sixth as the bits of
/// [`BlockU2K`].
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
