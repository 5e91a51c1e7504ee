//! The forward pass of one step: the transformer over a batch of rows.
//!
//! Each layer takes eight jobs of the thread pool, ten with Gemma's norms after each half. A row's
//! numbers never depend on the other rows.

use super::super::Ran;
use super::adapter::Adapter;
use super::weights::{Layer, Weights};
use crate::gguf::Projection;
use crate::ipc::Token;
use crate::kernels::attention::Plan;
use crate::kernels::ops::{self, Activations, Gates, Heads, Product, Span};
use crate::kernels::{Adapted, KvCache, LANES, Pool, Scope};
use std::ops::Range;

/// The input of a step.
pub(super) struct Rows<'a> {
    pub tokens: &'a [Token],
    /// The rows of each sequence, one sequence after another.
    pub spans: &'a [Span],
    /// Rows whose logits are needed, in order.
    pub wanted: &'a [usize],
    /// Rows with an adapter, in order.
    pub adapted: &'a [(Range<usize>, &'a Adapter)],
}

impl<'a> Rows<'a> {
    /// The LoRA pair of each adapted row range for one matrix, where its adapter has one.
    fn pairs(&self, layer: usize, target: Projection) -> Adapted<'a> {
        let pair = |(rows, adapter): &(Range<usize>, &'a Adapter)| {
            Some((rows.clone(), adapter.pair(layer, target)?))
        };
        self.adapted.iter().filter_map(pair).collect()
    }

    /// The LoRA pairs of the output matrix; row ranges are indices into `wanted`.
    fn head_pairs(&self) -> Adapted<'a> {
        let place = |row: usize| self.wanted.partition_point(|&wanted| wanted < row);
        let pair = |(rows, adapter): &(Range<usize>, &'a Adapter)| {
            Some((place(rows.start)..place(rows.end), adapter.head.as_ref()?))
        };
        self.adapted.iter().filter_map(pair).filter(|(rows, _)| !rows.is_empty()).collect()
    }
}

/// Buffers of a step, reused from step to step.
#[derive(Default)]
pub(super) struct Forward {
    /// (rows, width) the residual stream.
    pub(super) x: Vec<f32>,
    normed: Activations,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Activations,
    hidden: Activations,
    /// Scratch: the output of a sublayer, and the intermediate result of a LoRA.
    delta: Vec<f32>,
    low: Vec<f32>,
    /// Partial sums of attention, one per run of positions.
    kept: Vec<f32>,
    /// (ropes, rows) cosine and sine of each rotated pair.
    angles: Vec<Vec<Vec<(f32, f32)>>>,
    /// (wanted rows, padded vocabulary)
    logits: Vec<f32>,
}

impl Forward {
    /// Computes the rows. `interrupt` is called before each layer; if it returns true, the step is
    /// abandoned.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or if its embedding cannot be read.
    pub(super) fn run(
        &mut self,
        weights: &Weights,
        cache: &mut KvCache,
        pool: &mut Pool,
        rows: &Rows,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, String> {
        self.begin(weights, rows)?;
        let plans = plans(weights, rows.spans, pool.threads());
        for number in 0..weights.layers.len() {
            if interrupt() {
                return Ok(Ran::Interrupted);
            }
            self.layer(weights, cache, pool, rows, &plans, number);
        }
        self.finish(weights, pool, rows);
        Ok(Ran::Complete)
    }

    /// One layer: `x += attention(norm(x))`, `x += feed_forward(norm(x))`.
    pub(super) fn layer(
        &mut self,
        weights: &Weights,
        cache: &mut KvCache,
        pool: &mut Pool,
        rows: &Rows,
        plans: &[Plan],
        number: usize,
    ) {
        let (layer, shape) = (&weights.layers[number], &weights.shape);
        let plan = plans.iter().find(|plan| plan.scope.window == layer.kind.window);
        let plan = plan.expect("there is one for every kind of layer");
        let following = weights.layers.get(number + 1).map_or(&weights.head, |next| &next.q);
        let residuals = layer.residuals;
        self.normed.prepare([&layer.q, &layer.k, &layer.v], residuals.attention);
        ops::norm(pool, &self.x, &layer.attention_norm, shape.epsilon, &mut self.normed);
        self.project(pool, layer, number, rows);
        pool.prefetch_next(layer.output.bytes());
        self.rotate(pool, weights, layer, rows.spans, cache, number);
        let (q, attended) = (&self.q, &mut self.attended);
        attended.prepare([&layer.output], residuals.output);
        ops::attend(pool, q, plan, cache, number, attended, &mut self.kept);
        pool.prefetch_next(layer.gate.bytes());
        self.add(pool, weights, number, rows, Projection::O);
        self.normed.prepare([&layer.gate, &layer.up], residuals.feed_forward);
        self.hidden.prepare([&layer.down], residuals.down);
        ops::norm(pool, &self.x, &layer.ff_norm, shape.epsilon, &mut self.normed);
        pool.prefetch_next(layer.down.bytes());
        self.feed_forward(pool, weights, number, rows);
        pool.prefetch_next(following.bytes());
        self.add(pool, weights, number, rows, Projection::Down);
    }

    /// (vocabulary) logits of the `index`-th wanted row.
    pub(super) fn logits(&mut self, index: usize, vocab: usize) -> &mut [f32] {
        let at = index * vocab.next_multiple_of(LANES);
        &mut self.logits[at..at + vocab]
    }

    /// (width) the output norm's result for the `index`-th wanted row: the input of the head, and
    /// the basis of embeddings.
    pub(super) fn hidden(&self, index: usize) -> &[f32] {
        self.normed.row(index)
    }

    pub(super) fn begin(&mut self, weights: &Weights, batch: &Rows) -> Result<(), String> {
        let (rows, shape) = (batch.tokens.len(), &weights.shape);
        let (q_cols, kv_cols) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        self.x.resize(rows * shape.width, 0.0);
        self.normed.resize(rows, shape.width);
        self.q.resize(rows * q_cols, 0.0);
        self.k.resize(rows * kv_cols, 0.0);
        self.v.resize(rows * kv_cols, 0.0);
        self.attended.resize(rows, q_cols);
        self.hidden.resize(rows, shape.ff);
        for (x, &token) in self.x.chunks_exact_mut(shape.width).zip(batch.tokens) {
            weights.embedding(token, x)?;
        }
        self.angles.resize_with(weights.ropes.len(), Vec::new);
        for (rope, angles) in weights.ropes.iter().zip(&mut self.angles) {
            angles.resize_with(rows.max(angles.len()), Vec::new);
            for span in batch.spans {
                for (offset, row) in span.rows.clone().enumerate() {
                    rope.angles(span.position + offset, &mut angles[row]);
                }
            }
        }
        Ok(())
    }

    fn project(&mut self, pool: &mut Pool, layer: &Layer, number: usize, rows: &Rows) {
        let bias = |which: usize| layer.qkv_bias.as_ref().map(|bias| &bias[which][..]);
        let adapted = |target| rows.pairs(number, target);
        let (q, k, v) = (&mut self.q, &mut self.k, &mut self.v);
        let mut parts = [
            Product { matrix: &layer.q, bias: bias(0), adapted: adapted(Projection::Q), out: q },
            Product { matrix: &layer.k, bias: bias(1), adapted: adapted(Projection::K), out: k },
            Product { matrix: &layer.v, bias: bias(2), adapted: adapted(Projection::V), out: v },
        ];
        ops::products(pool, &self.normed, &mut parts, &mut self.low);
    }

    fn feed_forward(&mut self, pool: &mut Pool, weights: &Weights, number: usize, rows: &Rows) {
        let layer = &weights.layers[number];
        let gates = Gates {
            gate: &layer.gate,
            up: &layer.up,
            act: weights.shape.gating,
            adapted: [Projection::Gate, Projection::Up].map(|target| rows.pairs(number, target)),
        };
        ops::gated(pool, &self.normed, &gates, &mut self.hidden, &mut self.low);
    }

    /// Adds the output of attention (`Output`) or of the feed-forward half (`Down`) to the residual
    /// stream, after the post-norm if there is one.
    fn add(
        &mut self,
        pool: &mut Pool,
        weights: &Weights,
        number: usize,
        rows: &Rows,
        target: Projection,
    ) {
        let layer = &weights.layers[number];
        let (y, matrix, norm) = match target {
            Projection::O => (&self.attended, &layer.output, &layer.attention_post_norm),
            _ => (&self.hidden, &layer.down, &layer.ff_post_norm),
        };
        let adapted = rows.pairs(number, target);
        let (x, delta, low) = (&mut self.x, &mut self.delta, &mut self.low);
        let Some(norm) = norm else {
            ops::add_product(pool, y, matrix, &adapted, x, delta, low);
            return;
        };
        delta.resize(x.len(), 0.0);
        ops::products(pool, y, &mut [Product { matrix, bias: None, adapted, out: delta }], low);
        ops::add_norm(pool, delta, norm, weights.shape.epsilon, x);
    }

    fn rotate(
        &mut self,
        pool: &mut Pool,
        weights: &Weights,
        layer: &Layer,
        spans: &[Span],
        cache: &mut KvCache,
        number: usize,
    ) {
        let heads = Heads {
            q: &mut self.q,
            k: &mut self.k,
            v: &self.v,
            scale: weights.shape.attention_scale,
            norms: layer.qk_norm.as_ref(),
            epsilon: weights.shape.epsilon,
            rope: &weights.ropes[layer.kind.rope],
            angles: &self.angles[layer.kind.rope],
        };
        ops::rotate(pool, heads, spans, cache, number);
    }

    /// Computes the logits of the wanted rows only.
    fn finish(&mut self, weights: &Weights, pool: &mut Pool, rows: &Rows) {
        let (width, head, wanted) = (weights.shape.width, &weights.head, rows.wanted);
        let last = wanted.iter().flat_map(|&row| &self.x[row * width..(row + 1) * width]);
        let last: Vec<f32> = last.copied().collect();
        self.normed.resize(wanted.len(), width);
        self.normed.prepare([head], weights.head_residuals);
        ops::norm(pool, &last, &weights.output_norm, weights.shape.epsilon, &mut self.normed);
        self.logits.resize(wanted.len() * head.groups() * LANES, 0.0);
        let (adapted, logits) = (rows.head_pairs(), &mut self.logits);
        let product = Product { matrix: head, bias: None, adapted, out: logits };
        ops::products(pool, &self.normed, &mut [product], &mut self.low);
        if let Some(cap) = weights.shape.logit_cap {
            ops::cap(pool, &mut self.logits, cap);
        }
    }
}

/// The attention plans of a step, one for each kind of layer.
pub(super) fn plans<'a>(weights: &Weights, spans: &'a [Span], threads: usize) -> Vec<Plan<'a>> {
    let shape = &weights.shape;
    let mut plans: Vec<Plan> = Vec::new();
    for window in weights.layers.iter().map(|layer| layer.kind.window) {
        if plans.iter().all(|plan| plan.scope.window != window) {
            let scope = Scope { window, cap: shape.attention_cap };
            let group = shape.heads / shape.kv_heads;
            plans.push(Plan::new(spans, scope, shape.kv_heads, group, threads));
        }
    }
    plans
}
