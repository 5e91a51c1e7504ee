//! The operations of a transformer over rows of activations; each is one job of the pool.
//!
//! The interface is safe: every function checks its lengths, and its chunks write disjoint parts.

use super::activation::{PANEL, Quantized, QuantizedWriter, Residuals};
use super::attention::{self, Head, Plan, Scratch};
use super::cache::{KvCache, PAGE};
use super::isa::isa;
use super::lora::{Adapted, add_second_halves, first_halves};
use super::matmul::{Input, multiply};
use super::pack::{BLOCK, LANES, Matrix};
use super::pool::{Disjoint, Pool};
use super::vector::{Rope, add, gelu_mul, rms_norm, rms_norm_in_place, silu_mul, soft_cap};
use crate::gguf::Gating;
use std::cell::RefCell;
use std::ops::Range;

/// Tokens whose feed-forward activations a chunk processes at once.
const TOKEN_TILE: usize = 6 * PANEL;
/// Groups of eight matrix rows in a chunk when many tokens use them: they stay in the L1 cache.
const CHUNK_GROUPS: usize = 8;
/// Groups that a kernel can multiply at once by a few tokens.
const TILE_GROUPS: usize = 4;
/// Number of groups whose results fill a block of activations.
const BLOCK_GROUPS: usize = BLOCK / LANES;

/// The rows of one sequence in a batch.
#[derive(Debug, Clone)]
pub struct Span {
    pub rows: Range<usize>,
    /// Position of the first row.
    pub position: usize,
    /// Pages of the sequence, including those of these rows.
    pub pages: Vec<u32>,
}

/// Rows of activations, in f32 and, where a matrix needs it, quantized.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    cols: usize,
    float: Vec<f32>,
    quantized: Quantized,
}

impl Activations {
    /// Resizes to (rows, columns), quantized without residuals if they are whole blocks; the contents
    /// become unspecified.
    pub fn resize(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols) = (rows, cols);
        self.float.resize(rows * cols, 0.0);
        let quantized = if cols.is_multiple_of(BLOCK) { cols } else { 0 };
        self.quantized.resize(rows, quantized, Residuals::None);
    }

    /// Prepares the forms that these matrices need; the contents become unspecified.
    pub fn prepare<const N: usize>(&mut self, matrices: [&Matrix; N], residuals: Residuals) {
        let needed = matrices.iter().any(|matrix| matrix.takes_quantized());
        self.quantized.resize(self.rows, if needed { self.cols } else { 0 }, residuals);
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// (columns) one row in f32.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.float[row * self.cols..(row + 1) * self.cols]
    }

    fn input(&self, matrix: &Matrix) -> Input<'_> {
        match matrix.takes_quantized() {
            true => Input::Quantized(&self.quantized),
            false => self.floats(),
        }
    }

    /// The rows in f32, and a writer of the quantized ones.
    fn writers(&mut self) -> (Disjoint<f32>, QuantizedWriter) {
        (Disjoint::new(&mut self.float), self.quantized.writer())
    }

    /// Writes the residuals of all rows.
    fn refine(&mut self, pool: &mut Pool) {
        /// Up to so many panels are refined by the calling thread: to wake the others takes time too.
        const FEW: usize = 2;
        if !self.quantized.has_residuals() {
            return;
        }
        let (float, cols) = (&self.float, self.cols);
        let row = |row: usize| &float[row * cols..(row + 1) * cols];
        let (writer, panels) = (self.quantized.writer(), self.rows.div_ceil(PANEL));
        // SAFETY: each panel is refined once, by one thread.
        let refine = |panel: usize| unsafe { writer.refine(panel, row) };
        match panels {
            0..=FEW => (0..panels).for_each(refine),
            _ => pool.run(panels, refine),
        }
    }

    pub(super) fn floats(&self) -> Input<'_> {
        Input::Float(&self.float, self.cols)
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }
}

/// Number of groups of a matrix in a chunk: for few rows a few large chunks, which stream from
/// memory; for many rows small ones.
fn groups_of_chunk(groups: usize, rows: usize, pool: &Pool) -> usize {
    match rows {
        0..8 => groups.div_ceil(4 * pool.threads()).next_multiple_of(TILE_GROUPS),
        _ => CHUNK_GROUPS,
    }
}

fn chunk_of(chunk: usize, each: usize, end: usize) -> Range<usize> {
    chunk * each..((chunk + 1) * each).min(end)
}

/// Normalizes the rows of `x` (rows, columns of `out`).
pub fn norm(pool: &mut Pool, x: &[f32], weight: &[f32], epsilon: f32, out: &mut Activations) {
    let (rows, cols) = (out.rows, out.cols);
    assert!(x.len() == rows * cols && weight.len() == cols);
    let (float, quantized) = out.writers();
    let each = rows.div_ceil(4 * pool.threads()).max(4);
    pool.run(rows.div_ceil(each), |chunk| {
        for row in chunk_of(chunk, each, rows) {
            let at = row * cols;
            // SAFETY: a row belongs to one chunk.
            unsafe {
                let out = float.part(at, cols);
                rms_norm(&x[at..at + cols], weight, epsilon, out);
                quantized.write(row, 0, out);
            }
        }
    });
    out.refine(pool);
}

/// One of several matrices that are multiplied by the same rows.
pub struct Product<'a> {
    pub matrix: &'a Matrix,
    /// A bias added to every row of the result.
    pub bias: Option<&'a [f32]>,
    pub adapted: Adapted<'a>,
    /// (rows, padded rows of the matrix)
    pub out: &'a mut [f32],
}

/// Multiplies the rows of `x` by each of the matrices, in one job; `low` is scratch.
pub fn products(pool: &mut Pool, x: &Activations, products: &mut [Product], low: &mut Vec<f32>) {
    let rows = x.rows;
    let adapted: Vec<_> = products.iter().map(|product| &product.adapted[..]).collect();
    let mut lows = first_halves(pool, x, &adapted, low).into_iter();
    let mut total = 0;
    let mut parts = Vec::with_capacity(products.len());
    for product in products.iter_mut() {
        let (groups, bias) = (product.matrix.groups(), product.bias);
        assert_eq!(product.out.len(), rows * groups * LANES);
        assert!(bias.is_none_or(|bias| bias.len() == groups * LANES));
        let low = lows.next().expect("one for each");
        let (columns, out) = (total..total + groups, Disjoint::new(product.out));
        parts.push((columns, product.matrix, bias, &product.adapted, low, out));
        total += groups;
    }
    let each = groups_of_chunk(total, rows, pool);
    pool.run(total.div_ceil(each), |chunk| {
        let chunk = chunk_of(chunk, each, total);
        for (part, matrix, bias, adapted, low, out) in &parts {
            let groups = chunk.start.max(part.start)..chunk.end.min(part.end);
            if groups.is_empty() {
                continue;
            }
            let groups = groups.start - part.start..groups.end - part.start;
            let (stride, at) = (matrix.groups() * LANES, groups.start * LANES);
            let count = groups.len() * LANES;
            // SAFETY: a chunk writes the columns of its own groups.
            unsafe {
                let input = x.input(matrix);
                multiply(isa(), matrix, groups.clone(), &input, 0..rows, *out, at, stride);
                if let Some(bias) = bias {
                    for row in 0..rows {
                        add(out.part(row * stride + at, count), &bias[at..at + count]);
                    }
                }
                add_second_halves(adapted, *low, groups, 0..rows, *out, at, stride);
            }
        }
    });
}

/// `x += matrix * y`, for `x` (rows, matrix rows, which must be a multiple of eight); `delta` and
/// `low` are scratch.
pub fn add_product(
    pool: &mut Pool,
    y: &Activations,
    matrix: &Matrix,
    adapted: &Adapted,
    x: &mut [f32],
    delta: &mut Vec<f32>,
    low: &mut Vec<f32>,
) {
    let (rows, stride, groups) = (y.rows, matrix.rows(), matrix.groups());
    assert!(x.len() == rows * stride && stride.is_multiple_of(LANES));
    let low = first_halves(pool, y, &[adapted], low)[0];
    delta.resize(x.len(), 0.0);
    let (x, delta) = (Disjoint::new(x), Disjoint::new(delta));
    let each = groups_of_chunk(groups, rows, pool);
    pool.run(groups.div_ceil(each), |chunk| {
        let groups = chunk_of(chunk, each, groups);
        let (at, count) = (groups.start * LANES, groups.len() * LANES);
        // SAFETY: a chunk writes the columns of its own groups.
        unsafe {
            let input = y.input(matrix);
            multiply(isa(), matrix, groups.clone(), &input, 0..rows, delta, at, stride);
            for row in 0..rows {
                let at = row * stride + at;
                add(x.part(at, count), delta.part(at, count));
            }
            add_second_halves(adapted, low, groups, 0..rows, x, at, stride);
        }
    });
}

/// Normalizes each row of `y` and adds it to that row of `x` (rows, columns); overwrites `y`.
pub fn add_norm(pool: &mut Pool, y: &mut [f32], weight: &[f32], epsilon: f32, x: &mut [f32]) {
    let cols = weight.len();
    assert!(x.len() == y.len() && x.len().is_multiple_of(cols));
    let (x, y, rows) = (Disjoint::new(x), Disjoint::new(y), x.len() / cols);
    let each = rows.div_ceil(4 * pool.threads()).max(4);
    pool.run(rows.div_ceil(each), |chunk| {
        for row in chunk_of(chunk, each, rows) {
            // SAFETY: a row belongs to one chunk.
            unsafe {
                let y = y.part(row * cols, cols);
                rms_norm_in_place(y, weight, epsilon);
                add(x.part(row * cols, cols), y);
            }
        }
    });
}

/// The two matrices of the first half of a feed-forward layer.
pub struct Gates<'a> {
    pub gate: &'a Matrix,
    pub up: &'a Matrix,
    pub act: Gating,
    /// The LoRAs of gate and up.
    pub adapted: [Adapted<'a>; 2],
}

/// `out = act(gate * x) * (up * x)`; `low` is scratch.
pub fn gated(
    pool: &mut Pool,
    x: &Activations,
    gates: &Gates,
    out: &mut Activations,
    low: &mut Vec<f32>,
) {
    match gates.act {
        Gating::Silu => gated_by(pool, x, gates, silu_mul, out, low),
        Gating::Gelu => gated_by(pool, x, gates, gelu_mul, out, low),
    }
}

/// Compiled separately for each activation function, which is inlined into the inner loops.
fn gated_by(
    pool: &mut Pool,
    x: &Activations,
    gates: &Gates,
    act: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
    out: &mut Activations,
    low: &mut Vec<f32>,
) {
    let halves = [(gates.gate, &gates.adapted[0]), (gates.up, &gates.adapted[1])];
    let (rows, cols, total) = (x.rows, out.cols, gates.gate.groups());
    assert!(out.rows == rows && halves.iter().all(|(matrix, _)| matrix.rows() == cols));
    let lows = first_halves(pool, x, &halves.map(|(_, adapted)| &adapted[..]), low);
    let (float, quantized) = out.writers();
    let each = groups_of_chunk(total, rows, pool).next_multiple_of(BLOCK_GROUPS);
    pool.run(total.div_ceil(each), |chunk| {
        let groups = chunk_of(chunk, each, total);
        let (at, count) = (groups.start * LANES, groups.len() * LANES);
        let size = TOKEN_TILE.min(rows) * count;
        let mut tile = vec![0f32; 2 * size];
        for from in (0..rows).step_by(TOKEN_TILE) {
            let tokens = from..(from + TOKEN_TILE).min(rows);
            let part = Disjoint::new(&mut tile);
            for (half, (matrix, adapted)) in halves.iter().enumerate() {
                let (groups, tokens) = (|| groups.clone(), || tokens.clone());
                let (at, input) = (half * size, x.input(matrix));
                // SAFETY: the tile belongs to this chunk alone.
                unsafe {
                    multiply(isa(), matrix, groups(), &input, tokens(), part, at, count);
                    add_second_halves(adapted, lows[half], groups(), tokens(), part, at, count);
                }
            }
            let (gates, ups) = tile.split_at(size);
            let pairs = gates.chunks_exact(count).zip(ups.chunks_exact(count));
            for (row, (gate, up)) in tokens.zip(pairs) {
                // SAFETY: a chunk writes the columns of its own groups.
                unsafe {
                    let out = float.part(row * cols + at, count);
                    act(gate, up, out);
                    quantized.write(row, at, out);
                }
            }
        }
    });
    out.refine(pool);
}

/// Queries, keys and values of the batch, before attention.
pub struct Heads<'a> {
    /// (rows, heads, head_dim)
    pub q: &'a mut [f32],
    /// (rows, kv_heads, head_dim)
    pub k: &'a mut [f32],
    pub v: &'a [f32],
    /// Scale of the queries.
    pub scale: f32,
    /// Norms applied to each query head and key head.
    pub norms: Option<&'a [Vec<f32>; 2]>,
    pub epsilon: f32,
    pub rope: &'a Rope,
    /// (rows) cosine and sine of each rotated pair.
    pub angles: &'a [Vec<(f32, f32)>],
}

/// Rotates and scales queries, rotates keys, and writes keys and values into their pages.
pub fn rotate(pool: &mut Pool, heads: Heads, spans: &[Span], cache: &mut KvCache, layer: usize) {
    let rows = spans.last().map_or(0, |span| span.rows.end);
    let (dim, kv_cols) = (cache.head_dim(), cache.kv_heads() * cache.head_dim());
    let q_cols = heads.q.len() / rows.max(1);
    assert!(heads.k.len() == rows * kv_cols && heads.v.len() == rows * kv_cols);
    assert!(heads.q.len() == rows * q_cols && heads.angles.len() >= rows);
    let (q, k, scale) = (Disjoint::new(heads.q), Disjoint::new(heads.k), heads.scale);
    let writer = cache.writer();
    pool.run(rows, |row| {
        let span = &spans[spans.partition_point(|span| span.rows.end <= row)];
        let (position, angles) = (span.position + row - span.rows.start, &heads.angles[row]);
        let (page, token) = (span.pages[position / PAGE], position % PAGE);
        // SAFETY: a row belongs to one chunk, and its token to no other row.
        unsafe {
            for head in q.part(row * q_cols, q_cols).chunks_exact_mut(dim) {
                if let Some([norm, _]) = heads.norms {
                    rms_norm_in_place(head, norm, heads.epsilon);
                }
                heads.rope.rotate(head, angles);
                head.iter_mut().for_each(|x| *x *= scale);
            }
            let keys = k.part(row * kv_cols, kv_cols).chunks_exact_mut(dim);
            let values = heads.v[row * kv_cols..(row + 1) * kv_cols].chunks_exact(dim);
            for (head, (key, value)) in keys.zip(values).enumerate() {
                if let Some([_, norm]) = heads.norms {
                    rms_norm_in_place(key, norm, heads.epsilon);
                }
                heads.rope.rotate(key, angles);
                writer.write(layer, page, head, token, key, value);
            }
        }
    });
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Computes attention for every query of `q` (rows, heads, head_dim) over the tokens that the plan
/// assigns; `kept` is scratch.
pub fn attend(
    pool: &mut Pool,
    q: &[f32],
    plan: &Plan,
    cache: &KvCache,
    layer: usize,
    out: &mut Activations,
    kept: &mut Vec<f32>,
) {
    let (rows, cols) = (out.rows, out.cols);
    assert!(q.len() == rows * cols && plan.queries.iter().all(|query| query.row < rows));
    let (kv_heads, dim) = (cache.kv_heads(), cache.head_dim());
    let width = cols / kv_heads;
    let head =
        |head| Head { isa: isa(), cache, layer, head, group: width / dim, cap: plan.scope.cap };
    let (float, quantized) = out.writers();
    let size = head(0).kept();
    kept.resize(plan.slots * kv_heads * size, 0.0);
    let keep = Disjoint::new(kept);
    // The sums of one head's runs are adjacent.
    let place = |head: usize, slot: usize| (head * plan.slots + slot) * size;
    // SAFETY: at every call, a row's heads belong to one chunk.
    let write = |row: usize, at: usize, result: &[f32]| unsafe {
        float.part(row * cols + at, width).copy_from_slice(result);
        quantized.write(row, at, result);
    };
    pool.run(plan.tiles.len() * kv_heads, |chunk| {
        let (tile, at) = (&plan.tiles[chunk / kv_heads], chunk % kv_heads);
        let (head, queries) = (head(at), &plan.queries[tile.queries.clone()]);
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.q.clear();
            for query in queries {
                scratch.q.extend_from_slice(&q[query.row * cols + at * width..][..width]);
            }
            if queries.iter().any(|query| query.slot.is_none()) {
                head.attend(queries, tile.runs.clone(), scratch);
            } else {
                head.sum_run(queries, tile.runs.start, scratch);
            }
            for (index, query) in queries.iter().enumerate() {
                let Some(slot) = query.slot else {
                    write(query.row, at * width, &scratch.out[index * width..][..width]);
                    continue;
                };
                let slot = slot + tile.runs.start - query.runs().start;
                // SAFETY: a head's slot belongs to one chunk.
                let kept = unsafe { keep.part(place(at, slot), size) };
                head.keep(scratch, index, kept);
            }
        });
    });
    let split: Vec<_> = plan.split().collect();
    let kept = &*kept;
    pool.run(split.len() * kv_heads, |chunk| {
        let (query, at) = (split[chunk / kv_heads], chunk % kv_heads);
        let from = place(at, query.slot.unwrap_or(0));
        let runs = &kept[from..from + query.runs().len() * size];
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.out.resize(width, 0.0);
            attention::merge_runs(runs, &mut scratch.out, dim);
            write(query.row, at * width, &scratch.out);
        });
    });
    out.refine(pool);
}

/// `x = cap * tanh(x / cap)`.
pub fn cap(pool: &mut Pool, x: &mut [f32], cap: f32) {
    const EACH: usize = 4096;
    let (len, x) = (x.len(), Disjoint::new(x));
    pool.run(len.div_ceil(EACH), |chunk| {
        let part = chunk_of(chunk, EACH, len);
        // SAFETY: chunks are disjoint.
        soft_cap(unsafe { x.part(part.start, part.len()) }, cap);
    });
}
