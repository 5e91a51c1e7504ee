//! One step of the transformer over a batch of rows.
//!
//! Eight jobs of the pool a layer. A row's numbers never depend on the other rows.

use super::adapter::{Adapter, Target};
use super::weights::{Layer, Weights};
use crate::gguf::Covered;
use crate::ipc::Token;
use crate::kernels::attention::Plan;
use crate::kernels::ops::{self, Activations, Heads, LoraPair, Product, Span};
use crate::kernels::{Cache, LANES, Pool};
use std::ops::Range;

/// What a step computes.
pub struct Rows<'a> {
    pub tokens: &'a [Token],
    /// The sequences' rows, one after another.
    pub spans: &'a [Span],
    /// Rows whose logits are wanted, in order.
    pub wanted: &'a [usize],
    /// Rows with an adapter, in order.
    pub adapted: &'a [(Range<usize>, &'a Adapter)],
}

impl<'a> Rows<'a> {
    /// The LoRA of each adapted range that changes a matrix.
    fn pairs(&self, layer: usize, target: Target) -> Vec<(Range<usize>, &'a LoraPair)> {
        let pair = |(rows, adapter): &(Range<usize>, &'a Adapter)| {
            Some((rows.clone(), adapter.pair(layer, target)?))
        };
        self.adapted.iter().filter_map(pair).collect()
    }

    /// The same for the output matrix, by place in `wanted`.
    fn head_pairs(&self) -> Vec<(Range<usize>, &'a LoraPair)> {
        let place = |row: usize| self.wanted.partition_point(|&wanted| wanted < row);
        let pair = |(rows, adapter): &(Range<usize>, &'a Adapter)| {
            Some((place(rows.start)..place(rows.end), adapter.head.as_ref()?))
        };
        self.adapted.iter().filter_map(pair).filter(|(rows, _)| !rows.is_empty()).collect()
    }
}

/// Buffers of a step, kept from one to the next.
#[derive(Default)]
pub struct Forward {
    /// (rows, width) the residual stream.
    x: Vec<f32>,
    normed: Activations,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Activations,
    hidden: Activations,
    /// Where adapters change them, (rows, ff) of the two halves of the feed-forward layer.
    gate: Vec<f32>,
    up: Vec<f32>,
    /// For scratch: what a sublayer adds, and what lies between the halves of a LoRA.
    delta: Vec<f32>,
    low: Vec<f32>,
    /// Sums of the attention's runs.
    kept: Vec<f32>,
    /// (rows) cosine and sine of each rotated pair.
    angles: Vec<Vec<(f32, f32)>>,
    /// (wanted rows, padded vocabulary)
    logits: Vec<f32>,
}

impl Forward {
    /// Computes the rows.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or its embedding cannot be read.
    pub fn run(
        &mut self,
        weights: &Weights,
        cache: &mut Cache,
        pool: &mut Pool,
        rows: &Rows,
    ) -> Result<(), String> {
        self.begin(weights, rows)?;
        let Covered { epsilon, heads, kv_heads, .. } = weights.shape;
        let plan = Plan::new(rows.spans, None, kv_heads, heads / kv_heads, pool.threads());
        for (number, layer) in weights.layers.iter().enumerate() {
            ops::norm(pool, &self.x, &layer.attention_norm, epsilon, &mut self.normed);
            self.project(pool, layer, number, rows);
            self.rotate(pool, weights, layer, rows.spans, cache, number);
            let (q, out) = (&self.q, &mut self.attended);
            ops::attend(pool, q, &plan, cache, number, out, &mut self.kept);
            let (x, delta, low) = (&mut self.x, &mut self.delta, &mut self.low);
            ops::add_product(pool, &self.attended, &layer.output, x, delta);
            ops::add_lora(pool, &self.attended, &rows.pairs(number, Target::Output), x, low);
            ops::norm(pool, x, &layer.ff_norm, epsilon, &mut self.normed);
            self.feed_forward(pool, layer, number, rows);
            let (x, delta, low) = (&mut self.x, &mut self.delta, &mut self.low);
            ops::add_product(pool, &self.hidden, &layer.down, x, delta);
            ops::add_lora(pool, &self.hidden, &rows.pairs(number, Target::Down), x, low);
        }
        self.finish(weights, pool, rows);
        Ok(())
    }

    /// (vocabulary) logits of the `index`-th wanted row.
    pub fn logits(&mut self, index: usize, vocab: usize) -> &mut [f32] {
        let at = index * vocab.next_multiple_of(LANES);
        &mut self.logits[at..at + vocab]
    }

    /// (width) the output norm's result for the `index`-th wanted row: what the head reads, and
    /// what embeddings are made of.
    pub fn hidden(&self, index: usize) -> &[f32] {
        self.normed.row(index)
    }

    fn begin(&mut self, weights: &Weights, batch: &Rows) -> Result<(), String> {
        let (rows, shape) = (batch.tokens.len(), &weights.shape);
        let (q_cols, kv_cols) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        self.x.resize(rows * shape.width, 0.0);
        self.normed.resize(rows, shape.width);
        self.q.resize(rows * q_cols, 0.0);
        self.k.resize(rows * kv_cols, 0.0);
        self.v.resize(rows * kv_cols, 0.0);
        self.attended.resize(rows, q_cols);
        self.hidden.resize(rows, shape.ff);
        self.angles.resize_with(rows.max(self.angles.len()), Vec::new);
        for (x, &token) in self.x.chunks_exact_mut(shape.width).zip(batch.tokens) {
            weights.embedding(token, x)?;
        }
        for span in batch.spans {
            for (offset, row) in span.rows.clone().enumerate() {
                weights.rope.angles(span.position + offset, &mut self.angles[row]);
            }
        }
        Ok(())
    }

    fn project(&mut self, pool: &mut Pool, layer: &Layer, number: usize, rows: &Rows) {
        let bias = |which: usize| layer.qkv_bias.as_ref().map(|bias| &bias[which][..]);
        let mut parts = [
            Product { matrix: &layer.q, bias: bias(0), out: &mut self.q },
            Product { matrix: &layer.k, bias: bias(1), out: &mut self.k },
            Product { matrix: &layer.v, bias: bias(2), out: &mut self.v },
        ];
        ops::products(pool, &self.normed, &mut parts);
        let outs = [&mut self.q, &mut self.k, &mut self.v];
        for (target, out) in [Target::Q, Target::K, Target::V].into_iter().zip(outs) {
            ops::add_lora(pool, &self.normed, &rows.pairs(number, target), out, &mut self.low);
        }
    }

    fn feed_forward(&mut self, pool: &mut Pool, layer: &Layer, number: usize, rows: &Rows) {
        if !rows.adapted.iter().any(|(_, adapter)| adapter.gates(number)) {
            ops::gated(pool, &self.normed, &layer.gate, &layer.up, &mut self.hidden);
            return;
        }
        let size = rows.tokens.len() * layer.gate.rows();
        self.gate.resize(size, 0.0);
        self.up.resize(size, 0.0);
        let mut parts = [
            Product { matrix: &layer.gate, bias: None, out: &mut self.gate },
            Product { matrix: &layer.up, bias: None, out: &mut self.up },
        ];
        ops::products(pool, &self.normed, &mut parts);
        for (target, out) in [(Target::Gate, &mut self.gate), (Target::Up, &mut self.up)] {
            ops::add_lora(pool, &self.normed, &rows.pairs(number, target), out, &mut self.low);
        }
        ops::silu_product(pool, &self.gate, &self.up, &mut self.hidden);
    }

    fn rotate(
        &mut self,
        pool: &mut Pool,
        weights: &Weights,
        layer: &Layer,
        spans: &[Span],
        cache: &mut Cache,
        number: usize,
    ) {
        let heads = Heads {
            q: &mut self.q,
            k: &mut self.k,
            v: &self.v,
            norms: layer.qk_norm.as_ref(),
            epsilon: weights.shape.epsilon,
            rope: &weights.rope,
            angles: &self.angles,
        };
        ops::rotate(pool, heads, spans, cache, number);
    }

    /// Logits of the wanted rows, and of no others.
    fn finish(&mut self, weights: &Weights, pool: &mut Pool, rows: &Rows) {
        let (width, head, wanted) = (weights.shape.width, &weights.head, rows.wanted);
        let last = wanted.iter().flat_map(|&row| &self.x[row * width..(row + 1) * width]);
        let last: Vec<f32> = last.copied().collect();
        self.normed.resize(wanted.len(), width);
        ops::norm(pool, &last, &weights.output_norm, weights.shape.epsilon, &mut self.normed);
        self.logits.resize(wanted.len() * head.groups() * LANES, 0.0);
        let product = Product { matrix: head, bias: None, out: &mut self.logits };
        ops::products(pool, &self.normed, &mut [product]);
        let (logits, low) = (&mut self.logits, &mut self.low);
        ops::add_lora(pool, &self.normed, &rows.head_pairs(), logits, low);
    }
}
