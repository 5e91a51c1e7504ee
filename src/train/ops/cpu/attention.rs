//! Causal attention over packed documents. Only log-sum-exp is stored for the backward pass
//! (FlashAttention-2: Dao 2023, arXiv:2307.08691).

use super::fused::{Fused, View, apply};
use super::lanes;
use crate::kernels::gemm::{Mat, product_here};
use crate::kernels::real::Real;
use crate::train::ops::{Number, Scope};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Query or key rows that a thread processes at a time.
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
    /// (rows, heads) log-sum-exp: a `Vec<T>`.
    kept: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The dimensions of one call.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl Sizes {
    fn of<T>(args: &[View<T>]) -> Self {
        let (q, k) = (args[0].dims, args[1].dims);
        Self { rows: q[0], heads: q[1], kv_heads: k[1], dim: q[2] }
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

    /// Computes scaled and capped scores, without the mask.
    fn scores(&mut self, scope: &Scope, q: Mat<T>, k: Mat<T>, rows: usize, keys: usize) {
        self.weights.resize(rows * keys, T::ZERO);
        product_here(q, k.t(), &mut self.weights, keys, 0, false);
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

    /// Turns scores into attention weights with the log-sum-exp of each row; masked weights are 0.
    fn weigh(
        &mut self,
        scope: &Scope,
        rows: Range<usize>,
        keys: &Range<usize>,
        lse: impl Fn(usize) -> T,
    ) {
        for (row, weights) in rows.zip(self.weights.chunks_exact_mut(keys.len())) {
            let seen = clip(&scope.seen(row), keys);
            let lse = lse(row);
            weights[..seen.start].fill(T::ZERO);
            weights[seen.end..].fill(T::ZERO);
            weights[seen].iter_mut().for_each(|x| *x = Real::exp(*x - lse));
        }
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

/// The part of `range` within `span`, relative to the start of `span`.
fn clip(range: &Range<usize>, span: &Range<usize>) -> Range<usize> {
    let inside = |at: usize| at.clamp(span.start, span.end) - span.start;
    inside(range.start)..inside(range.end)
}

impl Fused for Attention {
    const NAME: &'static str = "attention";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [q, k, v] = [args[0], args[1], args[2]];
        let sizes = Sizes::of(args);
        let Sizes { rows, heads, dim, .. } = sizes;
        let width = heads * dim;
        let mut out = vec![T::ZERO; rows * width];
        let mut lse = vec![T::ZERO; rows * heads];
        let blocks = out.par_chunks_mut(ROWS * width).zip(lse.par_chunks_mut(ROWS * heads));
        blocks.enumerate().for_each_init(Tile::new, |tile, (block, (out, lse))| {
            let rows = block * ROWS..(block * ROWS + lse.len() / heads);
            let keys = self.scope.seen(rows.start).start..rows.end;
            for head in 0..heads {
                let (q, k) =
                    (sizes.head(q.data, rows.clone(), head), sizes.kv(k.data, keys.clone(), head));
                tile.scores(&self.scope, q, k, rows.len(), keys.len());
                for (at, row) in rows.clone().enumerate() {
                    let seen = clip(&self.scope.seen(row), &keys);
                    let scores = &mut tile.weights[at * keys.len()..][..keys.len()];
                    scores[..seen.start].fill(T::ZERO);
                    scores[seen.end..].fill(T::ZERO);
                    let scores = &mut scores[seen];
                    let most = lanes::most(scores);
                    let total = lanes::exp_from(scores, most);
                    let share = T::ONE / total;
                    scores.iter_mut().for_each(|x| *x *= share);
                    lse[at * heads + head] = most + Real::ln(total);
                }
                let weights = Mat::new(&tile.weights, rows.len(), keys.len());
                product_here(
                    weights,
                    sizes.kv(v.data, keys.clone(), head),
                    out,
                    width,
                    head * dim,
                    false,
                );
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
        let [q, k, v] = [args[0].data, args[1].data, args[2].data];
        let sizes = Sizes::of(args);
        let Sizes { rows: all, heads, kv_heads, dim } = sizes;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lse) = kept.as_ref().and_then(|kept| kept.downcast_ref::<Vec<T>>()) else {
            bail!("the forward pass was of another type");
        };
        let of_head = |head: usize| move |row: usize| lse[row * heads + head];
        // (rows, heads) dot products of output and gradient.
        let own: Vec<T> = result
            .data
            .par_chunks(dim)
            .zip(grad.data.par_chunks(dim))
            .map(|(out, grad)| lanes::dot(out, grad))
            .collect();
        let mut dq = vec![T::ZERO; q.len()];
        dq.par_chunks_mut(ROWS * heads * dim).enumerate().for_each_init(
            Tile::new,
            |tile, (block, dq)| {
                let rows = block * ROWS..block * ROWS + dq.len() / (heads * dim);
                let keys = self.scope.seen(rows.start).start..rows.end;
                for head in 0..heads {
                    let key = sizes.kv(k, keys.clone(), head);
                    tile.scores(
                        &self.scope,
                        sizes.head(q, rows.clone(), head),
                        key,
                        rows.len(),
                        keys.len(),
                    );
                    tile.weigh(&self.scope, rows.clone(), &keys, of_head(head));
                    tile.grads.resize(rows.len() * keys.len(), T::ZERO);
                    let (g, v) = (
                        sizes.head(grad.data, rows.clone(), head),
                        sizes.kv(v, keys.clone(), head),
                    );
                    product_here(g, v.t(), &mut tile.grads, keys.len(), 0, false);
                    tile.slope(&self.scope, keys.len(), |at| own[(rows.start + at) * heads + head]);
                    let grads = Mat::new(&tile.grads, rows.len(), keys.len());
                    product_here(grads, key, dq, heads * dim, head * dim, false);
                }
            },
        );
        let (mut dk, mut dv) = (vec![T::ZERO; k.len()], vec![T::ZERO; v.len()]);
        let width = kv_heads * dim;
        let blocks = dk.par_chunks_mut(ROWS * width).zip(dv.par_chunks_mut(ROWS * width));
        blocks.enumerate().for_each_init(Tile::new, |tile, (block, (dk, dv))| {
            let keys = block * ROWS..block * ROWS + dk.len() / width;
            let end = self.scope.audience(&keys, all);
            for from in (keys.start..end).step_by(ROWS) {
                let rows = from..(from + ROWS).min(end);
                for head in 0..heads {
                    let at = head / (heads / kv_heads) * dim;
                    let (query, key) =
                        (sizes.head(q, rows.clone(), head), sizes.kv(k, keys.clone(), head));
                    tile.scores(&self.scope, query, key, rows.len(), keys.len());
                    tile.weigh(&self.scope, rows.clone(), &keys, of_head(head));
                    let g = sizes.head(grad.data, rows.clone(), head);
                    let weights = Mat::new(&tile.weights, rows.len(), keys.len());
                    product_here(weights.t(), g, dv, width, at, true);
                    tile.grads.resize(rows.len() * keys.len(), T::ZERO);
                    product_here(
                        g,
                        sizes.kv(v, keys.clone(), head).t(),
                        &mut tile.grads,
                        keys.len(),
                        0,
                        false,
                    );
                    tile.slope(&self.scope, keys.len(), |at| own[(rows.start + at) * heads + head]);
                    let grads = Mat::new(&tile.grads, rows.len(), keys.len());
                    product_here(grads.t(), query, dk, width, at, true);
                }
            }
        });
        Ok(vec![Some(dq), Some(dk), Some(dv)])
    }
}
