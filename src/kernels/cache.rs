//! Keys and values in pages of 32 tokens.

use super::pool::Disjoint;
use half::f16;

/// Tokens of a page.
pub const PAGE: usize = 32;

/// Keys and values of all layers, by page.
///
/// A page's layers lie together: memory that the system has to find first comes a page at a time. By
/// layers it came for 5,000 tokens at once, wherever a sequence began a huge page of every layer.
pub struct Cache {
    layers: usize,
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
    /// (pages, layers, kv_heads, head_dim, 32) bits of f16; resident only where written.
    k: Vec<u16>,
    /// (pages, layers, kv_heads, 32, head_dim)
    v: Vec<u16>,
}

impl Cache {
    pub fn new(layers: usize, pages: usize, kv_heads: usize, head_dim: usize) -> Self {
        let size = layers * pages * kv_heads * head_dim * PAGE;
        Self { layers, pages, kv_heads, head_dim, k: vec![0; size], v: vec![0; size] }
    }

    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// (head_dim, 32) keys of one head in f16.
    pub(super) fn keys(&self, layer: usize, page: u32, head: usize) -> &[u16] {
        let from = self.at(layer, page, head);
        &self.k[from..from + self.head_dim * PAGE]
    }

    /// (32, head_dim) values of one head in f16.
    pub(super) fn values(&self, layer: usize, page: u32, head: usize) -> &[u16] {
        let from = self.at(layer, page, head);
        &self.v[from..from + self.head_dim * PAGE]
    }

    fn at(&self, layer: usize, page: u32, head: usize) -> usize {
        assert!((page as usize) < self.pages && layer < self.layers, "the page exists");
        assert!(head < self.kv_heads, "the head exists");
        ((page as usize * self.layers + layer) * self.kv_heads + head) * self.head_dim * PAGE
    }

    /// The first `tokens` tokens' worth of a page, and perhaps more, become another's.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let size = self.layers * self.kv_heads * self.head_dim * PAGE;
        let (from, to) = (self.at(0, from, 0), self.at(0, to, 0));
        self.k.copy_within(from..from + size, to);
        self.v.copy_within(from..from + size, to);
    }

    /// For chunks of a job that write different tokens' heads.
    pub fn writer(&mut self) -> CacheWriter {
        CacheWriter {
            layers: self.layers,
            pages: self.pages,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            k: Disjoint::new(&mut self.k),
            v: Disjoint::new(&mut self.v),
        }
    }
}

/// Writes keys and values from several threads.
#[derive(Clone, Copy)]
pub struct CacheWriter {
    layers: usize,
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
    k: Disjoint<u16>,
    v: Disjoint<u16>,
}

impl CacheWriter {
    /// One token's key and value of one head, at place `token` of the page.
    ///
    /// # Safety
    /// The cache is still borrowed, and nobody else uses this token's head.
    pub unsafe fn write(
        &self,
        layer: usize,
        page: u32,
        head: usize,
        token: usize,
        k: &[f32],
        v: &[f32],
    ) {
        assert!((page as usize) < self.pages && layer < self.layers);
        assert!(head < self.kv_heads && token < PAGE);
        assert!(k.len() == self.head_dim && v.len() == self.head_dim);
        let at = (page as usize * self.layers + layer) * self.kv_heads + head;
        let at = at * self.head_dim * PAGE;
        for (d, &x) in k.iter().enumerate() {
            // SAFETY: the caller's promise.
            let place = unsafe { self.k.part(at + d * PAGE + token, 1) };
            place[0] = f16::from_f32(x).to_bits();
        }
        // SAFETY: the caller's promise.
        let row = unsafe { self.v.part(at + token * self.head_dim, self.head_dim) };
        for (place, &x) in row.iter_mut().zip(v) {
            *place = f16::from_f32(x).to_bits();
        }
    }
}
