//! Causal attention over packed documents. Only log-sum-exp is stored for the backward pass
//! (FlashAttention-2: Dao 2023, arXiv:2307.08691).

use super::fused::{Fused, View, apply};
use super::lanes;
use crate::kernels::gemm::{Mat, product_here};
use crate::kernels::real::Real;
use crate::train::ops::documents::RowBlock;
use crate::train::ops::{Number, Scope};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Most query or key rows that a thread processes at a time. They are of one document, so that no
/// score between documents is computed.
const ROWS: usize = 64;

pub(in crate::train::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scope: &Scope,
) -> Result<Tensor> {
    apply(Attention { scope: scope.clone(), kept: Mutex::new(None) }, &[q, k, v])
}

struct Attention {
    scope: Scope,
    /// (queries, heads) log-sum-exp: a `Vec<T>`.
    kept: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The dimensions of one call.
#[derive(Clone, Copy)]
struct Sizes {
    queries: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl Sizes {
    fn of<T>(args: &[View<T>]) -> Self {
        let (q, k) = (args[0].dims, args[1].dims);
        Self { queries: q[0], heads: q[1], kv_heads: k[1], dim: q[2] }
    }

    /// (rows, head_dim) one head of some rows of the queries or of a tensor of the same shape.
    fn head<'a, T>(&self, x: &'a [T], rows: Range<usize>, head: usize) -> Mat<'a, T> {
        Mat::part(x, rows, head * self.dim..(head + 1) * self.dim, self.heads * self.dim)
    }

    /// The same for keys and values; `head` is the query head.
    fn kv<'a, T>(&self, x: &'a [T], rows: Range<usize>, head: usize) -> Mat<'a, T> {
        let head = head / (self.heads / self.kv_heads);
        Mat::part(x, rows, head * self.dim..(head + 1) * self.dim, self.kv_heads * self.dim)
    }
}

/// Scores, attention weights and gradients of one head, for a block of queries and a range of keys.
struct Tile<T> {
    weights: Vec<T>,
    /// Derivatives of the soft cap at the scores; empty without a cap.
    slopes: Vec<T>,
    grads: Vec<T>,
}

impl<T: Number> Tile<T> {
    fn new() -> Self {
        Self { weights: Vec::new(), slopes: Vec::new(), grads: Vec::new() }
    }

    /// Computes scaled and capped scores of `queries` (and their number), without the mask.
    fn scores<'a>(
        &mut self,
        scope: &Scope,
        queries: (Mat<'a, T>, usize),
        keys: &Keys,
        k: impl Fn(Range<usize>) -> Mat<'a, T>,
    ) {
        let (q, count) = queries;
        self.weights.resize(count * keys.count, T::ZERO);
        for (rows, at) in keys.parts() {
            product_here(q, k(rows).t(), &mut self.weights, keys.count, at, false);
        }
        let scale = T::of(scope.scale);
        self.weights.iter_mut().for_each(|x| *x *= scale);
        self.slopes.clear();
        if let Some(cap) = scope.cap.map(T::of) {
            for x in &mut self.weights {
                let t = Real::tanh(*x / cap);
                *x = cap * t;
                self.slopes.push(T::ONE - t * t);
            }
        }
    }

    /// Turns scores into attention weights with the log-sum-exp of each query; masked weights are 0.
    fn weigh(
        &mut self,
        keys: usize,
        seen: impl Fn(usize) -> Range<usize>,
        lse: impl Fn(usize) -> T,
    ) {
        for (at, weights) in self.weights.chunks_exact_mut(keys).enumerate() {
            let (seen, lse) = (seen(at), lse(at));
            weights[..seen.start].fill(T::ZERO);
            weights[seen.end..].fill(T::ZERO);
            weights[seen].iter_mut().for_each(|x| *x = Real::exp(*x - lse));
        }
    }

    /// (queries, columns) attention weights of some of the keys.
    fn weights_of(&self, columns: Range<usize>, keys: usize) -> Mat<'_, T> {
        Mat::part(&self.weights, 0..self.weights.len() / keys, columns, keys)
    }

    /// (queries, columns) gradients of the scores of some of the keys.
    fn grads_of(&self, columns: Range<usize>, keys: usize) -> Mat<'_, T> {
        Mat::part(&self.grads, 0..self.grads.len() / keys, columns, keys)
    }

    /// Turns the gradients of the weights into the gradients of the unscaled scores. `own` is the
    /// dot product of a row's output and its gradient.
    fn slope(&mut self, scope: &Scope, keys: usize, own: impl Fn(usize) -> T) {
        let scale = T::of(scope.scale);
        let rows = self.grads.chunks_exact_mut(keys).zip(self.weights.chunks_exact(keys));
        for (row, (grads, weights)) in rows.enumerate() {
            let own = own(row);
            for (grad, &weight) in grads.iter_mut().zip(weights) {
                *grad = weight * (*grad - own) * scale;
            }
        }
        self.grads.iter_mut().zip(&self.slopes).for_each(|(grad, &slope)| *grad *= slope);
    }
}

/// The keys that a block of queries attends to: consecutive positions of a sequence, the rows of
/// which are those of a prefix and those of the document itself.
struct Keys {
    rows: [Range<usize>; 2],
    first: usize,
    count: usize,
}

impl Keys {
    fn of(scope: &Scope, block: &RowBlock) -> Self {
        let (first, last) = block.positions;
        let positions = scope.seen(first).start..last + 1;
        let (first, count) = (positions.start, positions.len());
        Self { rows: scope.documents.rows_at(block, positions), first, count }
    }

    /// The rows, and which key is the first of them.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let [prefix, own] = self.rows.clone();
        let at = prefix.len();
        [(prefix, 0), (own, at)].into_iter().filter(|(rows, _)| !rows.is_empty())
    }
}

/// The part of `range` within `span`, relative to the start of `span`.
fn clip(range: &Range<usize>, span: &Range<usize>) -> Range<usize> {
    let inside = |at: usize| at.clamp(span.start, span.end) - span.start;
    inside(range.start)..inside(range.end)
}

/// The rows of each block; `width` numbers a row.
fn split<'a, T>(mut x: &'a mut [T], blocks: &[RowBlock], width: usize) -> Vec<&'a mut [T]> {
    let part = |block: &RowBlock| {
        let (part, rest) = std::mem::take(&mut x).split_at_mut(block.range.len() * width);
        x = rest;
        part
    };
    blocks.iter().map(part).collect()
}

impl Attention {
    /// The position of a query of a block.
    fn position(&self, block: &RowBlock, at: usize) -> usize {
        match &self.scope.queries {
            None => block.positions.0 + at,
            Some(queries) => {
                let row = |at: usize| queries[block.range.start + at] as usize;
                block.positions.0 + row(at) - row(0)
            }
        }
    }
}

impl Fused for Attention {
    const NAME: &'static str = "attention";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [q, k, v] = [args[0], args[1], args[2]];
        let sizes = Sizes::of(args);
        let Sizes { queries, heads, dim, .. } = sizes;
        let width = heads * dim;
        let mut out = vec![T::ZERO; queries * width];
        let mut lse = vec![T::ZERO; queries * heads];
        let blocks = self.scope.query_blocks(ROWS);
        let parts = split(&mut out, &blocks, width).into_par_iter();
        let parts = parts.zip(split(&mut lse, &blocks, heads)).zip(&blocks);
        parts.for_each_init(Tile::new, |tile, ((out, lse), block)| {
            let keys = Keys::of(&self.scope, block);
            for head in 0..heads {
                let queries = sizes.head(q.data, block.range.clone(), head);
                let k = |rows| sizes.kv(k.data, rows, head);
                tile.scores(&self.scope, (queries, block.range.len()), &keys, k);
                for (at, scores) in tile.weights.chunks_exact_mut(keys.count).enumerate() {
                    let seen = self.scope.seen(self.position(block, at));
                    let seen = clip(&seen, &(keys.first..keys.first + keys.count));
                    scores[..seen.start].fill(T::ZERO);
                    scores[seen.end..].fill(T::ZERO);
                    let scores = &mut scores[seen];
                    let most = lanes::most(scores);
                    let total = lanes::exp_from(scores, most);
                    let share = T::ONE / total;
                    scores.iter_mut().for_each(|x| *x *= share);
                    lse[at * heads + head] = most + Real::ln(total);
                }
                for (rows, at) in keys.parts() {
                    let weights = tile.weights_of(at..at + rows.len(), keys.count);
                    product_here(
                        weights,
                        sizes.kv(v.data, rows, head),
                        out,
                        width,
                        head * dim,
                        at > 0,
                    );
                }
            }
        });
        let kept: Box<dyn Any + Send> = Box::new(lse);
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        Ok((out, Shape::from(q.dims)))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        result: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lse) = kept.as_ref().and_then(|kept| kept.downcast_ref::<Vec<T>>()) else {
            bail!("the forward pass was of another type");
        };
        let dim = args[0].dims[2];
        let own = result.data.par_chunks(dim).zip(grad.data.par_chunks(dim));
        let own: Vec<T> = own.map(|(out, grad)| lanes::dot(out, grad)).collect();
        let pass = BackwardPass {
            attention: self,
            sizes: Sizes::of(args),
            q: args[0].data,
            k: args[1].data,
            v: args[2].data,
            grad: grad.data,
            lse,
            own: &own,
        };
        let [dk, dv] = pass.of_keys_and_values();
        Ok(vec![Some(pass.of_queries()), Some(dk), Some(dv)])
    }
}

struct BackwardPass<'a, T> {
    attention: &'a Attention,
    sizes: Sizes,
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    grad: &'a [T],
    /// (queries, heads) log-sum-exp.
    lse: &'a [T],
    /// (queries, heads) dot products of output and gradient.
    own: &'a [T],
}

impl<T: Number> BackwardPass<'_, T> {
    /// Computes the attention weights of a head and the gradients of its scores.
    fn fill(&self, tile: &mut Tile<T>, block: &RowBlock, keys: &Keys, head: usize) {
        let (scope, sizes) = (&self.attention.scope, &self.sizes);
        let at_query = |at: usize| (block.range.start + at) * sizes.heads + head;
        let queries = sizes.head(self.q, block.range.clone(), head);
        let k = |rows| sizes.kv(self.k, rows, head);
        tile.scores(scope, (queries, block.range.len()), keys, k);
        let span = keys.first..keys.first + keys.count;
        let seen = |at| clip(&scope.seen(self.attention.position(block, at)), &span);
        tile.weigh(keys.count, seen, |at| self.lse[at_query(at)]);
        tile.grads.resize(tile.weights.len(), T::ZERO);
        let grad = sizes.head(self.grad, block.range.clone(), head);
        for (rows, at) in keys.parts() {
            let v = sizes.kv(self.v, rows, head);
            product_here(grad, v.t(), &mut tile.grads, keys.count, at, false);
        }
        tile.slope(scope, keys.count, |at| self.own[at_query(at)]);
    }

    fn of_queries(&self) -> Vec<T> {
        let Sizes { heads, dim, .. } = self.sizes;
        let blocks = self.attention.scope.query_blocks(ROWS);
        let mut dq = vec![T::ZERO; self.q.len()];
        let parts = split(&mut dq, &blocks, heads * dim).into_par_iter().zip(&blocks);
        parts.for_each_init(Tile::new, |tile, (dq, block)| {
            let keys = Keys::of(&self.attention.scope, block);
            for head in 0..heads {
                self.fill(tile, block, &keys, head);
                for (rows, at) in keys.parts() {
                    let grads = tile.grads_of(at..at + rows.len(), keys.count);
                    let k = self.sizes.kv(self.k, rows, head);
                    product_here(grads, k, dq, heads * dim, head * dim, at > 0);
                }
            }
        });
        dq
    }

    fn of_keys_and_values(&self) -> [Vec<T>; 2] {
        let Sizes { heads, kv_heads, dim, .. } = self.sizes;
        let scope = &self.attention.scope;
        let (key_blocks, query_blocks) =
            (scope.documents.blocks(None, ROWS), scope.query_blocks(ROWS));
        let (mut dk, mut dv) = (vec![T::ZERO; self.k.len()], vec![T::ZERO; self.v.len()]);
        let width = kv_heads * dim;
        let parts = split(&mut dk, &key_blocks, width).into_par_iter();
        let parts = parts.zip(split(&mut dv, &key_blocks, width)).zip(&key_blocks);
        parts.for_each_init(Tile::new, |tile, ((dk, dv), block)| {
            let (first, last) = block.positions;
            let count = block.range.len();
            let keys = Keys { rows: [0..0, block.range.clone()], first, count };
            let reach = |queries: &&RowBlock| {
                scope.documents.reaches(queries, block)
                    && scope.seen(queries.positions.0).start <= last
            };
            for queries in query_blocks.iter().filter(reach) {
                for head in 0..heads {
                    let at = head / (heads / kv_heads) * dim;
                    self.fill(tile, queries, &keys, head);
                    let g = self.sizes.head(self.grad, queries.range.clone(), head);
                    product_here(tile.weights_of(0..count, count).t(), g, dv, width, at, true);
                    let q = self.sizes.head(self.q, queries.range.clone(), head);
                    product_here(tile.grads_of(0..count, count).t(), q, dk, width, at, true);
                }
            }
        });
        [dk, dv]
    }
}
