//! The KV cache: keys and values in pages of 32 tokens, in f16 or q8_0.

use super::isa::isa;
use super::pack::BLOCK;
use super::pool::Disjoint;
use crate::gguf::KvType;
use half::f16;

/// Tokens per page.
pub const PAGE: usize = 32;

/// Keys and values of all layers, by page.
///
/// All layers of a page are adjacent, so the operating system allocates memory one page at a time.
/// With a layer-major layout it allocated memory for 5,000 tokens at once, whenever a sequence
/// touched a new huge page in every layer.
pub struct KvCache {
    shape: Shape,
    /// Memory is resident only where it has been written.
    store: Store,
}

/// All pages. For every layer and head of a page, the keys come first, then the values.
enum Store {
    /// (pages, layers, kv_heads, 2, 32 * head_dim) bits of f16.
    F16(Vec<u16>),
    /// `q` with the layout of `F16`; `d` (pages, layers, kv_heads, 2, blocks of a head, 32) bits of
    /// f16.
    Q8 { q: Vec<i8>, d: Vec<u16> },
}

/// The keys (head_dim, 32) or values (32, head_dim) of one head of a page.
#[derive(Debug, Clone, Copy)]
pub(super) enum Numbers<'a> {
    /// Bits of f16.
    F16(&'a [u16]),
    /// `q * d`; `d` (blocks, 32) in bits of f16, one scale for every 32 dimensions of a token
    /// (fewer in the last block). A scale belongs to one token: later tokens do not change existing
    /// data.
    Q8 { q: &'a [i8], d: &'a [u16] },
    /// Either of them, converted to f32; the scales as in `Q8`.
    Wide { x: &'a [f32], d: Option<&'a [u16]> },
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    layers: usize,
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    /// Index of a head's keys among all keys and values; the index of its values is the next one.
    fn at(&self, layer: usize, page: u32, head: usize) -> usize {
        assert!((page as usize) < self.pages && layer < self.layers, "the page exists");
        assert!(head < self.kv_heads, "the head exists");
        ((page as usize * self.layers + layer) * self.kv_heads + head) * 2
    }

    /// Number of key and value arrays of a page, over all heads and layers.
    fn of_page(&self) -> usize {
        self.layers * self.kv_heads * 2
    }

    /// Numbers in one head's keys or values.
    fn numbers(&self) -> usize {
        self.head_dim * PAGE
    }

    /// Scales of one head's keys or values.
    fn scales(&self) -> usize {
        self.head_dim.div_ceil(BLOCK) * PAGE
    }
}

impl KvCache {
    pub fn new(ty: KvType, layers: usize, pages: usize, kv_heads: usize, head_dim: usize) -> Self {
        let shape = Shape { layers, pages, kv_heads, head_dim };
        let (count, numbers) = (pages * shape.of_page(), shape.numbers());
        let store = match ty {
            KvType::F16 => Store::F16(vec![0; count * numbers]),
            KvType::Q8_0 => {
                Store::Q8 { q: vec![0; count * numbers], d: vec![0; count * shape.scales()] }
            }
        };
        Self { shape, store }
    }

    pub fn kv_heads(&self) -> usize {
        self.shape.kv_heads
    }

    pub fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::F16(numbers) => size_of_val(&numbers[..]),
            Store::Q8 { q, d } => size_of_val(&q[..]) + size_of_val(&d[..]),
        }
    }

    /// (head_dim, 32)
    pub(super) fn keys(&self, layer: usize, page: u32, head: usize) -> Numbers<'_> {
        self.numbers(self.shape.at(layer, page, head))
    }

    /// (32, head_dim)
    pub(super) fn values(&self, layer: usize, page: u32, head: usize) -> Numbers<'_> {
        self.numbers(self.shape.at(layer, page, head) + 1)
    }

    fn numbers(&self, at: usize) -> Numbers<'_> {
        let (size, scales) = (self.shape.numbers(), self.shape.scales());
        match &self.store {
            Store::F16(numbers) => Numbers::F16(&numbers[at * size..][..size]),
            Store::Q8 { q, d } => {
                Numbers::Q8 { q: &q[at * size..][..size], d: &d[at * scales..][..scales] }
            }
        }
    }

    /// Copies the first `tokens` tokens of a page, and possibly more, to another page.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        fn copy<T: Copy>(of: &mut [T], page: usize, from: u32, to: u32) {
            let from = from as usize * page;
            of.copy_within(from..from + page, to as usize * page);
        }
        let (numbers, scales) = (self.shape.numbers(), self.shape.scales());
        let count = self.shape.of_page();
        match &mut self.store {
            Store::F16(all) => copy(all, count * numbers, from, to),
            Store::Q8 { q, d } => {
                copy(q, count * numbers, from, to);
                copy(d, count * scales, from, to);
            }
        }
    }

    /// A writer for jobs whose chunks write different tokens' heads.
    pub fn writer(&mut self) -> CacheWriter {
        let store = match &mut self.store {
            Store::F16(numbers) => Writers::F16(Disjoint::new(numbers)),
            Store::Q8 { q, d } => Writers::Q8 { q: Disjoint::new(q), d: Disjoint::new(d) },
        };
        CacheWriter { shape: self.shape, store }
    }
}

/// Writes keys and values from several threads.
#[derive(Clone, Copy)]
pub struct CacheWriter {
    shape: Shape,
    store: Writers,
}

#[derive(Clone, Copy)]
enum Writers {
    F16(Disjoint<u16>),
    Q8 { q: Disjoint<i8>, d: Disjoint<u16> },
}

impl CacheWriter {
    /// Writes one token's key and value of one head, at index `token` of the page.
    ///
    /// # Safety
    /// The cache must still be borrowed, and no other thread may access this token's head.
    pub unsafe fn write(
        &self,
        layer: usize,
        page: u32,
        head: usize,
        token: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let (at, dim) = (self.shape.at(layer, page, head), self.shape.head_dim);
        assert!(token < PAGE && k.len() == dim && v.len() == dim);
        let (numbers, scales) = (self.shape.numbers(), self.shape.scales());
        let (keys, values) = (at * numbers + token, (at + 1) * numbers + token * dim);
        match self.store {
            Writers::F16(to) => {
                for (d, &x) in k.iter().enumerate() {
                    // SAFETY: guaranteed by the caller.
                    let place = unsafe { to.part(keys + d * PAGE, 1) };
                    place[0] = f16::from_f32(x).to_bits();
                }
                // SAFETY: guaranteed by the caller.
                let row = unsafe { to.part(values, dim) };
                for (place, &x) in row.iter_mut().zip(v) {
                    *place = f16::from_f32(x).to_bits();
                }
            }
            Writers::Q8 { q: to, d: scale_of } => {
                for (block, (k, v)) in k.chunks(BLOCK).zip(v.chunks(BLOCK)).enumerate() {
                    let (first, scale) = (block * BLOCK, at * scales + block * PAGE + token);
                    // SAFETY: guaranteed by the caller.
                    unsafe {
                        let (quants, d) = q8_0(k);
                        scale_of.part(scale, 1)[0] = d;
                        for (c, q) in quants[..k.len()].iter().enumerate() {
                            to.part(keys + (first + c) * PAGE, 1)[0] = *q;
                        }
                        let (quants, d) = q8_0(v);
                        scale_of.part(scale + scales, 1)[0] = d;
                        to.part(values + first, v.len()).copy_from_slice(&quants[..v.len()]);
                    }
                }
            }
        }
    }
}

/// Quantizes a block of at most 32 numbers as ggml does for q8_0. Returns the integers and the
/// scale, which is the largest magnitude divided by 127, in bits of f16.
fn q8_0(numbers: &[f32]) -> ([i8; BLOCK], u16) {
    let (mut block, mut quants) = ([0f32; BLOCK], [0i8; BLOCK]);
    block[..numbers.len()].copy_from_slice(numbers);
    let (scale, _) = (isa().kernels().quantize)(&block, &mut quants);
    (quants, f16::from_f32(scale).to_bits())
}

#[cfg(test)]
impl Numbers<'_> {
    /// The number at index `at`, which is dimension `d` of a token.
    pub(super) fn number(self, at: usize, token: usize, d: usize) -> f32 {
        use super::pack::f16_to_f32;
        match self {
            Self::F16(bits) => f16_to_f32(bits[at]),
            Self::Q8 { q, d: scales } => {
                f32::from(q[at]) * f16_to_f32(scales[d / BLOCK * PAGE + token])
            }
            Self::Wide { x, d: scales } => {
                x[at] * scales.map_or(1.0, |scales| f16_to_f32(scales[d / BLOCK * PAGE + token]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last q8_0 block is half filled.
    const DIM: usize = 80;

    /// Reads a token's key and value of the second head of the second layer.
    fn read(cache: &KvCache, page: u32, token: usize) -> [Vec<f32>; 2] {
        let (keys, values) = (cache.keys(1, page, 1), cache.values(1, page, 1));
        [
            (0..DIM).map(|d| keys.number(d * PAGE + token, token, d)).collect(),
            (0..DIM).map(|d| values.number(token * DIM + d, token, d)).collect(),
        ]
    }

    fn assert_close(numbers: &[f32], back: &[f32]) {
        for (block, back) in numbers.chunks(BLOCK).zip(back.chunks(BLOCK)) {
            let largest = block.iter().fold(0f32, |a, b| a.max(b.abs()));
            for (x, back) in block.iter().zip(back) {
                // Half a quantization step, and the rounding of the scale.
                assert!((x - back).abs() <= largest * (0.501 / 127.0 + 5e-4), "{x}, {back}");
            }
        }
    }

    #[test]
    fn numbers_come_back_within_half_a_step_and_later_tokens_change_nothing() {
        for ty in [KvType::F16, KvType::Q8_0] {
            let mut cache = KvCache::new(ty, 2, 3, 2, DIM);
            assert_eq!(cache.bytes() as u64, 2 * 2 * 3 * 32 * 2 * ty.row_bytes(80, 80));
            let mut kept = Vec::new();
            for token in 0..PAGE {
                let number = |i: usize| {
                    // Small values in the last block of the key.
                    let size = if i >= 64 { 0.01 } else { 1.0 + token as f32 };
                    ((i * 37 + token * 101) % 201) as f32 * size / 100.0 - size
                };
                let k: Vec<f32> = (0..DIM).map(number).collect();
                let v: Vec<f32> = (0..DIM).rev().map(number).collect();
                // SAFETY: there is only one thread.
                unsafe { cache.writer().write(1, 2, 1, token, &k, &v) };
                let back = read(&cache, 2, token);
                assert_close(&k, &back[0]);
                assert_close(&v, &back[1]);
                kept.push(back);
                cache.copy_page(2, 0);
                for (token, kept) in kept.iter().enumerate() {
                    assert_eq!(read(&cache, 2, token), *kept);
                    assert_eq!(read(&cache, 0, token), *kept);
                }
            }
        }
    }
}
