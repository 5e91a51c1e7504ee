//! The kernels in plain code: the oracle of the others, to the bit, and what runs on a CPU without
//! them.

use super::activation::Row;
use super::matmul::Tile;
use super::pack::*;
use crate::gguf::IQ4_LEVELS;
use half::bf16;

/// A kernel for a tile of `groups` groups and any number of tokens.
pub(super) fn tile(kind: Kind, groups: usize) -> Tile {
    match groups {
        1 => of_kind::<1>(kind),
        2 => of_kind::<2>(kind),
        4 => of_kind::<4>(kind),
        _ => unreachable!("tiles are 1, 2 or 4 groups wide"),
    }
}

fn of_kind<const G: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::U4Min => quantized::<BlockU4Min, G>,
        Kind::U4 => quantized::<BlockU4, G>,
        Kind::U5Min => quantized::<BlockU5Min, G>,
        Kind::U5 => quantized::<BlockU5, G>,
        Kind::U4K => quantized::<BlockU4K, G>,
        Kind::U5K => quantized::<BlockU5K, G>,
        Kind::U2K => sixteens::<BlockU2K, G>,
        Kind::U3K => sixteens::<BlockU3K, G>,
        Kind::U6K => sixteens::<BlockU6K, G>,
        Kind::T4 => quantized::<BlockT4, G>,
        Kind::T4K => quantized::<BlockT4K, G>,
        Kind::I8 => quantized::<BlockI8, G>,
        Kind::F16 => float::<[u16; LANES], G>,
        Kind::BF16 => float::<[bf16; LANES], G>,
        Kind::F32 => float::<[f32; LANES], G>,
    }
}

/// A block's weights of one row: for every 32 columns a scale, a minimum where there is one, and the
/// integers.
trait Block: Copy {
    /// Blocks of 32 columns.
    const SUBS: usize = 1;
    fn scale(&self, lane: usize, sub: usize) -> f32;
    /// What is added to every weight of the row.
    fn min(&self, lane: usize, sub: usize) -> Option<f32>;
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32;
}

fn nibble(qs: &[u8; 128], lane: usize, column: usize) -> i32 {
    let (j, half, c) = (column / 8, column % 8 / 4, column % 4);
    i32::from(qs[32 * j + 4 * lane + c] >> (4 * half) & 15)
}

fn bit(high: &[u8; 32], lane: usize, column: usize) -> i32 {
    i32::from(high[4 * lane + column % 4] >> (column / 4) & 1)
}

fn pair(qs: &[[u8; 32]; 2], lane: usize, column: usize) -> i32 {
    let (half, part, c) = (column / 16, column % 16 / 4, column % 4);
    i32::from(qs[half][4 * lane + c] >> (2 * part) & 3)
}

fn level(qs: &[u8; 128], lane: usize, column: usize) -> i32 {
    i32::from(IQ4_LEVELS[nibble(qs, lane, column) as usize])
}

impl Block for BlockU4Min {
    fn scale(&self, lane: usize, _: usize) -> f32 {
        wide(self.d[lane])
    }
    fn min(&self, lane: usize, _: usize) -> Option<f32> {
        Some(wide(self.m[lane]))
    }
    fn q(&self, lane: usize, _: usize, column: usize) -> i32 {
        nibble(&self.qs, lane, column)
    }
}

impl Block for BlockU4 {
    fn scale(&self, lane: usize, _: usize) -> f32 {
        wide(self.d[lane])
    }
    fn min(&self, lane: usize, _: usize) -> Option<f32> {
        Some(wide(self.d[lane]) * -8.0)
    }
    fn q(&self, lane: usize, _: usize, column: usize) -> i32 {
        nibble(&self.qs, lane, column)
    }
}

impl Block for BlockU5Min {
    fn scale(&self, lane: usize, _: usize) -> f32 {
        wide(self.d[lane])
    }
    fn min(&self, lane: usize, _: usize) -> Option<f32> {
        Some(wide(self.m[lane]))
    }
    fn q(&self, lane: usize, _: usize, column: usize) -> i32 {
        nibble(&self.qs, lane, column) | bit(&self.high, lane, column) << 4
    }
}

impl Block for BlockU5 {
    fn scale(&self, lane: usize, _: usize) -> f32 {
        wide(self.d[lane])
    }
    fn min(&self, lane: usize, _: usize) -> Option<f32> {
        Some(wide(self.d[lane]) * -16.0)
    }
    fn q(&self, lane: usize, _: usize, column: usize) -> i32 {
        nibble(&self.qs, lane, column) | bit(&self.high, lane, column) << 4
    }
}

impl Block for BlockU4K {
    const SUBS: usize = SUBS;
    fn scale(&self, lane: usize, sub: usize) -> f32 {
        wide(self.d[lane]) * f32::from(self.sc[sub][lane])
    }
    fn min(&self, lane: usize, sub: usize) -> Option<f32> {
        Some(-(wide(self.m[lane]) * f32::from(self.mn[sub][lane])))
    }
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32 {
        nibble(&self.qs[sub], lane, column)
    }
}

impl Block for BlockU5K {
    const SUBS: usize = SUBS;
    fn scale(&self, lane: usize, sub: usize) -> f32 {
        wide(self.d[lane]) * f32::from(self.sc[sub][lane])
    }
    fn min(&self, lane: usize, sub: usize) -> Option<f32> {
        Some(-(wide(self.m[lane]) * f32::from(self.mn[sub][lane])))
    }
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32 {
        nibble(&self.qs[sub], lane, column) | bit(&self.high[sub], lane, column) << 4
    }
}

impl Block for BlockI8 {
    fn scale(&self, lane: usize, _: usize) -> f32 {
        wide(self.d[lane])
    }
    fn min(&self, _: usize, _: usize) -> Option<f32> {
        None
    }
    fn q(&self, lane: usize, _: usize, column: usize) -> i32 {
        i32::from(self.qs[32 * (column / 4) + 4 * lane + column % 4])
    }
}

impl Block for BlockT4 {
    fn scale(&self, lane: usize, _: usize) -> f32 {
        wide(self.d[lane])
    }
    fn min(&self, _: usize, _: usize) -> Option<f32> {
        None
    }
    fn q(&self, lane: usize, _: usize, column: usize) -> i32 {
        level(&self.qs, lane, column)
    }
}

impl Block for BlockT4K {
    const SUBS: usize = SUBS;
    fn scale(&self, lane: usize, sub: usize) -> f32 {
        wide(self.d[lane]) * f32::from(self.sc[sub][lane])
    }
    fn min(&self, _: usize, _: usize) -> Option<f32> {
        None
    }
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32 {
        level(&self.qs[sub], lane, column)
    }
}

/// # Safety
/// As [`Tile`] says: `G` groups of `blocks` blocks, rows of `x` as long, `out` large enough.
unsafe fn quantized<B: Block, const G: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    for group in 0..G {
        for (t, row) in x.iter().enumerate() {
            for lane in 0..LANES {
                let mut sum = 0f32;
                for at in 0..blocks * B::SUBS {
                    let (block, sub) = (at / B::SUBS, at % B::SUBS);
                    // SAFETY: the caller's promise.
                    let (block, xq, xd, xs) = unsafe {
                        (
                            weights.cast::<B>().add(group * blocks + block).read_unaligned(),
                            std::slice::from_raw_parts(row.q.add(at * BLOCK), BLOCK),
                            *row.d.add(at),
                            *row.s.add(at),
                        )
                    };
                    let products = xq.iter().enumerate();
                    let total: i32 =
                        products.map(|(c, &x)| block.q(lane, sub, c) * i32::from(x)).sum();
                    sum = (block.scale(lane, sub) * xd).mul_add(total as f32, sum);
                    if let Some(min) = block.min(lane, sub) {
                        sum = min.mul_add(xs, sum);
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { *out.add(t * stride + group * LANES + lane) = sum };
            }
        }
    }
}

/// A block's weights of one row, with whole scales and minima for every 16 columns.
trait Sixteens: Copy {
    fn d(&self, lane: usize) -> f32;
    fn scale(&self, lane: usize, sixteen: usize) -> i32;
    fn min(&self, lane: usize, sixteen: usize) -> f32;
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32;
}

impl Sixteens for BlockU2K {
    fn d(&self, lane: usize) -> f32 {
        wide(self.d[lane])
    }
    fn scale(&self, lane: usize, sixteen: usize) -> i32 {
        i32::from(self.sc[sixteen][lane] & 15)
    }
    fn min(&self, lane: usize, sixteen: usize) -> f32 {
        -(wide(self.m[lane]) * f32::from(self.sc[sixteen][lane] >> 4))
    }
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32 {
        pair(&self.qs[sub], lane, column)
    }
}

impl Sixteens for BlockU3K {
    fn d(&self, lane: usize) -> f32 {
        wide(self.d[lane])
    }
    fn scale(&self, lane: usize, sixteen: usize) -> i32 {
        i32::from(self.sc[sixteen][lane])
    }
    fn min(&self, lane: usize, sixteen: usize) -> f32 {
        wide(self.d[lane]) * f32::from(self.sc[sixteen][lane]) * -4.0
    }
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32 {
        pair(&self.qs[sub], lane, column) | bit(&self.high[sub], lane, column) << 2
    }
}

impl Sixteens for BlockU6K {
    fn d(&self, lane: usize) -> f32 {
        wide(self.d[lane])
    }
    fn scale(&self, lane: usize, sixteen: usize) -> i32 {
        i32::from(self.sc[sixteen][lane])
    }
    fn min(&self, lane: usize, sixteen: usize) -> f32 {
        wide(self.d[lane]) * f32::from(self.sc[sixteen][lane]) * -32.0
    }
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32 {
        nibble(&self.qs[sub], lane, column) | pair(&self.high[sub], lane, column) << 4
    }
}

/// A scale for every 16 columns.
///
/// # Safety
/// As [`quantized`].
unsafe fn sixteens<B: Sixteens, const G: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    for group in 0..G {
        for (t, row) in x.iter().enumerate() {
            for lane in 0..LANES {
                let mut sum = 0f32;
                for at in 0..blocks * SUBS {
                    let (place, sub) = (group * blocks + at / SUBS, at % SUBS);
                    // SAFETY: the caller's promise.
                    let (block, xq, xd, xh) = unsafe {
                        (
                            weights.cast::<B>().add(place).read_unaligned(),
                            std::slice::from_raw_parts(row.q.add(at * BLOCK), BLOCK),
                            *row.d.add(at),
                            std::slice::from_raw_parts(row.h.add(2 * at), 2),
                        )
                    };
                    let products = xq.iter().enumerate().map(|(column, &x)| {
                        let scale = block.scale(lane, 2 * sub + column / 16);
                        scale * block.q(lane, sub, column) * i32::from(x)
                    });
                    let total: i32 = products.sum();
                    sum = (block.d(lane) * xd).mul_add(total as f32, sum);
                    for half in 0..2 {
                        sum = block.min(lane, 2 * sub + half).mul_add(xh[half], sum);
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { *out.add(t * stride + group * LANES + lane) = sum };
            }
        }
    }
}

trait Number: Copy {
    fn lane(&self, lane: usize) -> f32;
}

impl Number for [u16; LANES] {
    fn lane(&self, lane: usize) -> f32 {
        wide(self[lane])
    }
}

impl Number for [bf16; LANES] {
    fn lane(&self, lane: usize) -> f32 {
        self[lane].to_f32()
    }
}

impl Number for [f32; LANES] {
    fn lane(&self, lane: usize) -> f32 {
        self[lane]
    }
}

/// # Safety
/// As [`quantized`], with columns for blocks.
unsafe fn float<N: Number, const G: usize>(
    weights: *const u8,
    cols: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    for group in 0..G {
        for (t, row) in x.iter().enumerate() {
            for lane in 0..LANES {
                let mut sum = 0f32;
                for at in 0..cols {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let weight = weights.cast::<N>().add(group * cols + at).read_unaligned();
                        sum = weight.lane(lane).mul_add(*row.f.add(at), sum);
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { *out.add(t * stride + group * LANES + lane) = sum };
            }
        }
    }
}
