//! Products of quantized and floating-point weights.

use crate::gguf::IQ4_LEVELS;
use crate::kernels::activation::Row;
use crate::kernels::matmul::Tile;
use crate::kernels::pack::*;
use half::bf16;
use std::ops::Range;

/// The kernel for a tile of `groups` groups and any number of tokens.
pub(super) fn tile(kind: Kind, groups: usize) -> Tile {
    match groups {
        1 => of_kind::<1>(kind),
        _ => unreachable!("no tile has {groups} groups"),
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
        Kind::U2K => quantized::<BlockU2K, G>,
        Kind::U3K => quantized::<BlockU3K, G>,
        Kind::U6K => quantized::<BlockU6K, G>,
        Kind::T4 => quantized::<BlockT4, G>,
        Kind::T4K => quantized::<BlockT4K, G>,
        Kind::I8 => quantized::<BlockI8, G>,
        Kind::F16 => float::<[u16; LANES], G>,
        Kind::BF16 => float::<[bf16; LANES], G>,
        Kind::F32 => float::<[f32; LANES], G>,
    }
}

/// One row's weights in a block, `SUBS` times 32 columns: the integers, and a scale and a minimum
/// for the block, or for every 32 or 16 columns. With several sub-blocks, scales and minima are
/// integers multiplied by one float.
trait Block: Copy {
    const SUBS: usize = 1;
    const SIXTEENS: bool = false;
    fn q(&self, lane: usize, sub: usize, column: usize) -> i32;
    /// The scale, or the factor of the integer scales.
    fn d(&self, lane: usize) -> f32;
    fn scale(&self, _lane: usize, _i: usize) -> i32 {
        1
    }
    /// The addend of the weights, or its integer.
    fn min(&self, lane: usize, i: usize) -> Option<f32>;
    /// The factor of the integer minima.
    fn m(&self, _lane: usize) -> f32 {
        1.0
    }
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

/// Implements a block from the results of its methods.
macro_rules! block {
    (
        $block:ty, |$b:ident, $lane:ident, $sub:ident, $column:ident| $q:expr;
        $(subs: $subs:expr, sixteens: $sixteens:expr;)?
        min: |$i:ident| $min:expr
        $(; scale: $scale:expr; m: $m:expr)?
    ) => {
        impl Block for $block {
            $(const SUBS: usize = $subs;
            const SIXTEENS: bool = $sixteens;)?
            fn q(&self, $lane: usize, $sub: usize, $column: usize) -> i32 {
                let ($b, _) = (self, $sub);
                $q
            }
            fn d(&self, lane: usize) -> f32 {
                f16_to_f32(self.d[lane])
            }
            fn min(&self, $lane: usize, $i: usize) -> Option<f32> {
                let ($b, _, _) = (self, $lane, $i);
                let _ = $b;
                $min
            }
            $(fn scale(&self, $lane: usize, $i: usize) -> i32 {
                let $b = self;
                i32::from($scale)
            }
            fn m(&self, $lane: usize) -> f32 {
                let ($b, _) = (self, $lane);
                let _ = $b;
                $m
            })?
        }
    };
}

block!(BlockU4Min, |b, lane, sub, column| nibble(&b.qs, lane, column);
    min: |i| Some(f16_to_f32(b.m[lane])));
block!(BlockU4, |b, lane, sub, column| nibble(&b.qs, lane, column);
    min: |i| Some(f16_to_f32(b.d[lane]) * -8.0));
block!(BlockU5Min, |b, lane, sub, column| nibble(&b.qs, lane, column)
    | bit(&b.high, lane, column) << 4;
    min: |i| Some(f16_to_f32(b.m[lane])));
block!(BlockU5, |b, lane, sub, column| nibble(&b.qs, lane, column)
    | bit(&b.high, lane, column) << 4;
    min: |i| Some(f16_to_f32(b.d[lane]) * -16.0));
block!(BlockT4, |b, lane, sub, column| level(&b.qs, lane, column); min: |i| None);
block!(BlockI8, |b, lane, sub, column|
    i32::from(b.qs[32 * (column / 4) + 4 * lane + column % 4]); min: |i| None);
block!(BlockU4K, |b, lane, sub, column| nibble(&b.qs[sub], lane, column);
    subs: SUBS, sixteens: false;
    min: |i| Some(b.mn[i][lane].into()); scale: b.sc[i][lane]; m: -f16_to_f32(b.m[lane]));
block!(BlockU5K, |b, lane, sub, column| nibble(&b.qs[sub], lane, column)
    | bit(&b.high[sub], lane, column) << 4;
    subs: SUBS, sixteens: false;
    min: |i| Some(b.mn[i][lane].into()); scale: b.sc[i][lane]; m: -f16_to_f32(b.m[lane]));
block!(BlockT4K, |b, lane, sub, column| level(&b.qs[sub], lane, column);
    subs: SUBS, sixteens: false;
    min: |i| None; scale: b.sc[i][lane]; m: 0.0);
block!(BlockU2K, |b, lane, sub, column| pair(&b.qs[sub], lane, column);
    subs: SUBS, sixteens: true;
    min: |i| Some((b.sc[i][lane] >> 4).into()); scale: b.sc[i][lane] & 15; m: -f16_to_f32(b.m[lane]));
block!(BlockU3K, |b, lane, sub, column| pair(&b.qs[sub], lane, column)
    | bit(&b.high[sub], lane, column) << 2;
    subs: SUBS, sixteens: true;
    min: |i| Some(b.sc[i][lane].into()); scale: b.sc[i][lane]; m: f16_to_f32(b.d[lane]) * -4.0);
block!(BlockU6K, |b, lane, sub, column| nibble(&b.qs[sub], lane, column)
    | pair(&b.high[sub], lane, column) << 4;
    subs: SUBS, sixteens: true;
    min: |i| Some(b.sc[i][lane].into()); scale: b.sc[i][lane]; m: f16_to_f32(b.d[lane]) * -32.0);

/// # Safety
/// As for [`Tile`]: `G` groups of `blocks` blocks, rows of `x` of the same length, and `out` large
/// enough.
unsafe fn quantized<B: Block, const G: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: guaranteed by the caller.
    let block = |group: usize, at: usize| unsafe {
        weights.cast::<B>().add(group * blocks + at).read_unaligned()
    };
    for group in 0..G {
        for (t, row) in x.iter().enumerate() {
            for lane in 0..LANES {
                let mut sum = 0f32;
                for at in 0..blocks {
                    // SAFETY: guaranteed by the caller.
                    sum = unsafe {
                        let block = block(group, at);
                        plus_subs(sum, &block, lane, 0..B::SUBS, at * B::SUBS, row)
                    };
                }
                // SAFETY: guaranteed by the caller.
                let refined = unsafe { row.refined() };
                for (i, &refined) in refined.iter().enumerate() {
                    let (at, sub) = (refined as usize / B::SUBS, refined as usize % B::SUBS);
                    let (block, place) = (block(group, at), blocks * B::SUBS + i);
                    // SAFETY: the residuals follow the row's blocks.
                    sum = unsafe { plus_subs(sum, &block, lane, sub..sub + 1, place, row) };
                }
                // SAFETY: guaranteed by the caller.
                unsafe { *out.add(t * stride + group * LANES + lane) = sum };
            }
        }
    }
}

/// Adds the contribution of one lane of some sub-blocks of a block to `sum`; block `at` of the row
/// belongs to the first of them.
///
/// # Safety
/// The row must have these blocks.
unsafe fn plus_subs<B: Block>(
    sum: f32,
    block: &B,
    lane: usize,
    subs: Range<usize>,
    at: usize,
    row: &Row,
) -> f32 {
    let each = if B::SIXTEENS { 2 } else { 1 };
    let place = |sub: usize| (at + sub - subs.start) * row.step;
    // SAFETY: guaranteed by the caller.
    let xd = |sub: usize| unsafe { *row.d.add(place(sub)) };
    // SAFETY: as above.
    let xs = |i: usize| unsafe {
        match B::SIXTEENS {
            true => *row.h.add(2 * place(i / 2) + i % 2),
            false => *row.s.add(place(i)),
        }
    };
    let total = |sub: usize| -> i32 {
        // SAFETY: as above.
        let q = unsafe { std::slice::from_raw_parts(row.q.add(BLOCK * place(sub)), BLOCK) };
        let q = q.iter().enumerate();
        q.map(|(column, &x)| {
            let scale = block.scale(lane, sub * each + column * each / BLOCK);
            scale * block.q(lane, sub, column) * i32::from(x)
        })
        .sum()
    };
    let d = block.d(lane);
    if B::SUBS == 1 {
        let sum = (d * xd(0)).mul_add(total(0) as f32, sum);
        return block.min(lane, 0).map_or(sum, |min| min.mul_add(xs(0), sum));
    }
    let products = subs.clone().fold(0f32, |sum, sub| xd(sub).mul_add(total(sub) as f32, sum));
    let sum = d.mul_add(products, sum);
    if block.min(lane, 0).is_none() {
        return sum;
    }
    let min = |i: usize| block.min(lane, i).unwrap_or(0.0);
    let mut mins = [0f32; 2];
    for i in subs.start * each..subs.end * each {
        mins[i % 2] = min(i).mul_add(xs(i), mins[i % 2]);
    }
    block.m(lane).mul_add(mins[0] + mins[1], sum)
}

trait Number: Copy {
    fn lane(&self, lane: usize) -> f32;
}

impl Number for [u16; LANES] {
    fn lane(&self, lane: usize) -> f32 {
        f16_to_f32(self[lane])
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
/// As for [`quantized`], with columns instead of blocks.
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
                    // SAFETY: guaranteed by the caller.
                    unsafe {
                        let weight = weights.cast::<N>().add(group * cols + at).read_unaligned();
                        sum = weight.lane(lane).mul_add(*row.f.add(at), sum);
                    }
                }
                // SAFETY: guaranteed by the caller.
                unsafe { *out.add(t * stride + group * LANES + lane) = sum };
            }
        }
    }
}
