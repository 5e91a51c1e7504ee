//! One layer: `x += attention(norm(x))`, `x += feed_forward(norm(x))`.

use super::weight::{Builder, Weight};
use super::{Context, Counted};
use crate::gguf::{LayerKind, ModelConfig, PARTS, PROJECTIONS, Projection, rows_of};
use crate::train::ops::{self, Scope};
use candle_core::{Result, Tensor, bail};

/// One transformer layer. Parts that a model family does not have are `None`.
pub(super) struct Block {
    kind: LayerKind,
    attention_norm: Tensor,
    q: Weight,
    k: Weight,
    v: Weight,
    biases: Option<[Tensor; 3]>,
    /// Norms of each query head and each key head.
    qk_norm: Option<[Tensor; 2]>,
    output: Weight,
    attention_post_norm: Option<Tensor>,
    ff_norm: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
    ff_post_norm: Option<Tensor>,
}

impl Block {
    pub(super) fn load(builder: &mut Builder, shape: &ModelConfig, layer: usize) -> Result<Self> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut matrices = [const { None }; PROJECTIONS];
        let mut biases = Vec::new();
        for part in PARTS {
            if !builder.has(&name(&format!("{part}.weight"))) {
                continue;
            }
            let held = rows_of(part, shape);
            let shared = held.len() > 1;
            for (target, rows) in held {
                let own = shared.then(|| format!("{target:?}").to_lowercase());
                let weight = name(&format!("{part}.weight"));
                matrices[target as usize] =
                    Some(builder.matrix(&weight, own.as_deref(), target, rows)?);
            }
            let bias = name(&format!("{part}.bias"));
            if builder.has(&bias) {
                biases.push(builder.vector(&bias)?);
            }
        }
        let biases = match <[Tensor; 3]>::try_from(biases) {
            Ok(biases) => Some(biases),
            Err(none) if none.is_empty() => None,
            Err(_) => bail!("layer {layer} has biases on some of its projections only"),
        };
        let mut take = |target: Projection| {
            let missing = || candle_core::Error::msg(format!("layer {layer} has no {target:?}"));
            matrices[target as usize].take().ok_or_else(missing)
        };
        let [q, k, v] = [take(Projection::Q)?, take(Projection::K)?, take(Projection::V)?];
        let [gate, up, down] =
            [take(Projection::Gate)?, take(Projection::Up)?, take(Projection::Down)?];
        let output = take(Projection::O)?;
        let mut norm = |part: &str| match builder.has(&name(part)) {
            true => builder.vector(&name(part)).map(Some),
            false => Ok(None),
        };
        let qk_norm = norm("attn_q_norm.weight")?.zip(norm("attn_k_norm.weight")?);
        let needed = |norm: Option<Tensor>| {
            norm.ok_or_else(|| candle_core::Error::msg(format!("layer {layer} lacks a norm")))
        };
        Ok(Self {
            kind: shape.kinds[layer],
            attention_norm: needed(norm("attn_norm.weight")?)?,
            q,
            k,
            v,
            biases,
            qk_norm: qk_norm.map(|(q, k)| [q, k]),
            output,
            attention_post_norm: norm("post_attention_norm.weight")?,
            ff_norm: needed(norm("ffn_norm.weight")?)?,
            gate,
            up,
            down,
            ff_post_norm: norm("post_ffw_norm.weight")?,
        })
    }

    /// Output and `x`: (rows, width).
    pub(super) fn forward(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        self.run(x, context, None)
    }

    /// (counted rows, width) output for the rows with a weight other than 0. Of the others only keys
    /// and values are computed.
    pub(super) fn forward_counted(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        let count = context.counted.rows.len();
        match count == 0 || count == context.documents.rows() {
            true => context.select(&self.run(x, context, None)?),
            false => self.run(x, context, Some(&context.counted)),
        }
    }

    /// The output for the rows `only`; for all if `None`.
    fn run(&self, x: &Tensor, context: &Context, only: Option<&Counted>) -> Result<Tensor> {
        let epsilon = f64::from(context.shape.epsilon);
        let after = |y: Tensor, norm: &Option<Tensor>| match norm {
            Some(norm) => ops::rms_norm(&y, norm, epsilon),
            None => Ok(y),
        };
        let pass = context.pass;
        let normed = ops::rms_norm(x, &self.attention_norm, epsilon)?;
        let attended = self.output.forward(&self.attend(&normed, context, only)?, pass)?;
        let x = match only {
            Some(_) => context.select(x)?,
            None => x.clone(),
        };
        let x = ops::add(&x, &after(attended, &self.attention_post_norm)?)?;
        let normed = ops::rms_norm(&x, &self.ff_norm, epsilon)?;
        let (gate, up) = (self.gate.forward(&normed, pass)?, self.up.forward(&normed, pass)?);
        let hidden = ops::gated(&gate, &up, context.shape.gating)?;
        ops::add(&x, &after(self.down.forward(&hidden, pass)?, &self.ff_post_norm)?)
    }

    /// Output: (rows, heads * head_dim); the rows are `only` or all.
    fn attend(&self, x: &Tensor, context: &Context, only: Option<&Counted>) -> Result<Tensor> {
        let shape = context.shape;
        let project = |x: &Tensor, weight: &Weight, which: usize, heads: usize| -> Result<Tensor> {
            let mut y = weight.forward(x, context.pass)?;
            if let Some(biases) = &self.biases {
                y = ops::add_bias(&y, &biases[which])?;
            }
            ops::reshape(&y, (x.dim(0)?, heads, shape.head_dim))
        };
        let queries = match only {
            Some(_) => context.select(x)?,
            None => x.clone(),
        };
        let mut q = project(&queries, &self.q, 0, shape.heads)?;
        let mut k = project(x, &self.k, 1, shape.kv_heads)?;
        let v = project(x, &self.v, 2, shape.kv_heads)?;
        if let Some([of_q, of_k]) = &self.qk_norm {
            let epsilon = f64::from(shape.epsilon);
            q = ops::rms_norm(&q, of_q, epsilon)?;
            k = ops::rms_norm(&k, of_k, epsilon)?;
        }
        let rotation = &context.rotations[self.kind.rope];
        let of_queries = only.map_or(rotation, |only| &only.rotations[self.kind.rope]);
        let scope = Scope {
            documents: context.documents.clone(),
            queries: only.map(|only| only.rows.clone()),
            scale: f64::from(shape.attention_scale),
            window: self.kind.window,
            cap: shape.attention_cap.map(f64::from),
        };
        let out =
            ops::attention(&ops::rotate(&q, of_queries)?, &ops::rotate(&k, rotation)?, &v, &scope)?;
        ops::reshape(&out, (queries.dim(0)?, shape.heads * shape.head_dim))
    }
}
