//! Attention over pages of 32 tokens.
//!
//! A page holds keys as `[head_dim][32]` and values as `[32][head_dim]`, in f16, so that both inner
//! loops read whole registers. A query's sum runs over fixed runs of 512 tokens by position, each
//! with a softmax of its own, merged in their order (Dao et al. 2022, arXiv:2205.14135, section
//! 3.1): who computes a run, and with which other queries, changes no bit.

#[cfg(target_arch = "x86_64")]
use super::avx2;
use super::matmul::Isa;
use super::pool::Disjoint;
use super::vector::{exp, soft_cap};
use half::f16;

/// Tokens of a page.
pub const PAGE: usize = 32;
/// Tokens of a run.
pub const RUN: usize = 512;
/// Query heads that the kernels take at once.
pub(super) const ROWS: usize = 4;

/// Keys and values of all layers, by page.
pub struct Cache {
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
    /// (layers, pages, kv_heads, head_dim, 32) bits of f16; resident only where written.
    k: Vec<u16>,
    /// (layers, pages, kv_heads, 32, head_dim)
    v: Vec<u16>,
}

impl Cache {
    pub fn new(layers: usize, pages: usize, kv_heads: usize, head_dim: usize) -> Self {
        let size = layers * pages * kv_heads * head_dim * PAGE;
        Self { pages, kv_heads, head_dim, k: vec![0; size], v: vec![0; size] }
    }

    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn at(&self, layer: usize, page: u32, head: usize) -> usize {
        assert!((page as usize) < self.pages && head < self.kv_heads, "the page exists");
        ((layer * self.pages + page as usize) * self.kv_heads + head) * self.head_dim * PAGE
    }

    /// The first `tokens` tokens' worth of a page, and perhaps more, become another's.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let size = self.kv_heads * self.head_dim * PAGE;
        let layers = self.k.len() / (self.pages * size).max(1);
        for layer in 0..layers {
            let (from, to) = (self.at(layer, from, 0), self.at(layer, to, 0));
            self.k.copy_within(from..from + size, to);
            self.v.copy_within(from..from + size, to);
        }
    }

    /// For chunks of a job that write different tokens' heads.
    pub fn writer(&mut self) -> CacheWriter {
        CacheWriter {
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
        assert!((page as usize) < self.pages && head < self.kv_heads && token < PAGE);
        assert!(k.len() == self.head_dim && v.len() == self.head_dim);
        let at = (layer * self.pages + page as usize) * self.kv_heads + head;
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

/// What a query sees of the tokens before it, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scope {
    /// Tokens that it sees, its own the last of them; `None`: all.
    pub window: Option<usize>,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub cap: Option<f32>,
}

/// Query heads of one token that share one head of the cache.
pub struct Attention<'a> {
    pub isa: Isa,
    pub cache: &'a Cache,
    pub layer: usize,
    /// Head of the cache.
    pub head: usize,
    /// The sequence's pages.
    pub pages: &'a [u32],
    /// Tokens up to the query's own.
    pub tokens: usize,
    pub scope: Scope,
}

/// Room for the scores of one run.
#[repr(align(64))]
pub struct Scratch {
    scores: [[f32; RUN]; ROWS],
    partial: Vec<f32>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { scores: [[0.0; RUN]; ROWS], partial: Vec::new() }
    }
}

/// What has been summed of a query so far.
#[derive(Clone, Copy)]
struct Sum {
    max: f32,
    total: f32,
}

impl Attention<'_> {
    /// `q` (heads, head_dim), already scaled; `out` likewise.
    pub fn attend(&self, q: &[f32], out: &mut [f32], scratch: &mut Scratch) {
        let dim = self.cache.head_dim;
        assert!(self.tokens > 0 && self.pages.len() * PAGE >= self.tokens, "the pages are there");
        assert!(q.len() == out.len() && q.len().is_multiple_of(dim));
        for (q, out) in q.chunks(ROWS * dim).zip(out.chunks_mut(ROWS * dim)) {
            self.attend_rows(q, out, scratch);
        }
    }

    fn attend_rows(&self, q: &[f32], out: &mut [f32], scratch: &mut Scratch) {
        let dim = self.cache.head_dim;
        let rows = q.len() / dim;
        let mut sums = [Sum { max: f32::NEG_INFINITY, total: 0.0 }; ROWS];
        out.fill(0.0);
        scratch.partial.resize(ROWS * dim, 0.0);
        let from = self.scope.window.map_or(0, |window| self.tokens.saturating_sub(window));
        for (run, pages) in self.pages.chunks(RUN / PAGE).enumerate().skip(from / RUN) {
            let tokens = self.tokens.saturating_sub(run * RUN).min(RUN);
            if tokens == 0 {
                break;
            }
            // Where the window begins in this run.
            let first = from.saturating_sub(run * RUN);
            let pages = &pages[..tokens.div_ceil(PAGE)];
            let partial = &mut scratch.partial[..rows * dim];
            partial.fill(0.0);
            for (at, &page) in pages.iter().enumerate().skip(first / PAGE) {
                let from = self.cache.at(self.layer, page, self.head);
                let keys = &self.cache.k[from..from + dim * PAGE];
                self.score(q, keys, &mut scratch.scores, at * PAGE);
            }
            let mut run_sums = [Sum { max: 0.0, total: 0.0 }; ROWS];
            for row in 0..rows {
                let scores = &mut scratch.scores[row][first..tokens];
                if let Some(cap) = self.scope.cap {
                    soft_cap(scores, cap);
                }
                run_sums[row] = softmax(scores);
            }
            for (at, &page) in pages.iter().enumerate().skip(first / PAGE) {
                let from = self.cache.at(self.layer, page, self.head);
                let values = &self.cache.v[from..from + dim * PAGE];
                let skipped = first.saturating_sub(at * PAGE);
                let values = &values[skipped * dim..(tokens - at * PAGE).min(PAGE) * dim];
                self.weigh(&scratch.scores, at * PAGE + skipped, values, partial);
            }
            for row in 0..rows {
                let at = row * dim..(row + 1) * dim;
                merge(&mut sums[row], &mut out[at.clone()], run_sums[row], &partial[at]);
            }
        }
        for (out, sum) in out.chunks_exact_mut(dim).zip(sums) {
            for x in out {
                *x /= sum.total;
            }
        }
    }

    /// `scores[row][at..at + 32] = q[row] · keys`.
    fn score(&self, q: &[f32], keys: &[u16], scores: &mut [[f32; RUN]; ROWS], at: usize) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::score(q, keys, scores, at),
            _ => score(q, keys, scores, at),
        }
    }

    /// `out[row] += scores[row][at + t] * values[t]`.
    fn weigh(&self, scores: &[[f32; RUN]; ROWS], at: usize, values: &[u16], out: &mut [f32]) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::weigh(scores, at, values, out, self.cache.head_dim),
            _ => weigh(scores, at, values, out, self.cache.head_dim),
        }
    }
}

fn score(q: &[f32], keys: &[u16], scores: &mut [[f32; RUN]; ROWS], at: usize) {
    let dim = keys.len() / PAGE;
    for (q, scores) in q.chunks_exact(dim).zip(scores) {
        for (t, score) in scores[at..at + PAGE].iter_mut().enumerate() {
            let mut sum = 0f32;
            for (d, q) in q.iter().enumerate() {
                sum = f16::from_bits(keys[d * PAGE + t]).to_f32().mul_add(*q, sum);
            }
            *score = sum;
        }
    }
}

fn weigh(scores: &[[f32; RUN]; ROWS], at: usize, values: &[u16], out: &mut [f32], dim: usize) {
    for (out, scores) in out.chunks_exact_mut(dim).zip(scores) {
        for (d, sum) in out.iter_mut().enumerate() {
            for (t, values) in values.chunks_exact(dim).enumerate() {
                *sum = f16::from_bits(values[d]).to_f32().mul_add(scores[at + t], *sum);
            }
        }
    }
}

/// Turns scores into e^(score - largest); returns the largest, and the sum in lanes of eight.
fn softmax(scores: &mut [f32]) -> Sum {
    let mut largest = [f32::NEG_INFINITY; 8];
    let (whole, rest) = scores.as_chunks::<8>();
    for eight in whole {
        for (largest, score) in largest.iter_mut().zip(eight) {
            *largest = largest.max(*score);
        }
    }
    let max = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut lanes = [0f32; 8];
    let (whole, rest) = scores.as_chunks_mut::<8>();
    for eight in whole {
        for (lane, score) in lanes.iter_mut().zip(eight) {
            *score = exp(*score - max);
            *lane += *score;
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score = exp(*score - max);
        *lane += *score;
    }
    Sum { max, total: lanes.iter().sum() }
}

/// Adds the next run of a query to what is there.
fn merge(sum: &mut Sum, out: &mut [f32], run: Sum, partial: &[f32]) {
    let max = sum.max.max(run.max);
    // The first run: e^-inf is 0.
    let (old, new) = (exp(sum.max - max), exp(run.max - max));
    for (out, partial) in out.iter_mut().zip(partial) {
        *out = out.mul_add(old, partial * new);
    }
    *sum = Sum { max, total: sum.total.mul_add(old, run.total * new) };
}

#[cfg(test)]
mod tests;
