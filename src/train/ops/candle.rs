//! Operations composed of candle's differentiable operations, for devices other than the CPU.

use super::arguments::{GELU_CUBIC, GELU_ROOT};
use super::{
    Distillation, DistillationLosses, DistillationSums, Draw, Frozen, Head, LEAST_MASS, LogProbs,
    Losses, Rotation, Scope, Targets, cpu,
};
use crate::gguf::Gating;
use crate::job::spec::Divergence;
use candle_core::{D, DType, Result, Tensor};

pub(super) fn weighed(x: &Tensor, weights: &[f64]) -> Result<Tensor> {
    let weights = Tensor::new(weights, x.device())?.to_dtype(x.dtype())?;
    (x.flatten_all()? * weights)?.sum_all()
}

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?;
    x.broadcast_div(&mean.sqrt()?)?.broadcast_mul(weight)
}

pub(super) fn rotate(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let (rows, _, dims) = x.dims3()?;
    let of = |f: fn(&(f64, f64)) -> f64| {
        let values: Vec<f64> = rotation.angles.iter().map(f).collect();
        Tensor::from_vec(values, (rows, 1, rotation.pairs), x.device())?.to_dtype(x.dtype())
    };
    let (cos, sin) = (of(|angle| angle.0)?, of(|angle| angle.1)?);
    let column = |odd: bool| {
        let at = (0..rotation.pairs).map(|i| rotation.pair(i));
        let at: Vec<_> = at.map(|(a, b)| if odd { b as u32 } else { a as u32 }).collect();
        x.index_select(&Tensor::new(at, x.device())?, 2)
    };
    let (a, b) = (column(false)?, column(true)?);
    let ra = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let rb = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    let rotated = match rotation.halves {
        true => Tensor::cat(&[ra, rb], 2)?,
        false => Tensor::stack(&[ra, rb], 3)?.flatten(2, 3)?,
    };
    match dims - 2 * rotation.pairs {
        0 => Ok(rotated),
        rest => Tensor::cat(&[rotated, x.narrow(2, 2 * rotation.pairs, rest)?], 2),
    }
}

/// Both activations are `x (1 + tanh v) / 2`. The backward pass of candle's `gelu` has only six digits.
pub(super) fn gated(gate: &Tensor, up: &Tensor, act: Gating) -> Result<Tensor> {
    let v = match act {
        Gating::Silu => (gate * 0.5)?,
        Gating::Gelu => {
            let cubic = (gate.sqr()?.mul(gate)? * GELU_CUBIC)?;
            ((gate + cubic)? * GELU_ROOT)?
        }
    };
    (gate * ((v.tanh()? + 1.0)? * 0.5)?)?.mul(up)
}

pub(super) fn dropout(x: &Tensor, draw: Draw) -> Result<Tensor> {
    let mask = draw.applied(&vec![1f64; x.elem_count()]);
    x.mul(&Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?)
}

pub(super) fn embedding(table: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    table.index_select(&Tensor::new(tokens, table.device())?, 0)
}

/// Holds the scores of all pairs of rows at once.
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scope: &Scope) -> Result<Tensor> {
    let ((queries, heads, dim), (rows, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let group = heads / kv_heads;
    let spread = |x: &Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(2)?.broadcast_as((rows, kv_heads, group, dim))?;
        x.reshape((rows, heads, dim))?.transpose(0, 1)?.contiguous()
    };
    let q = q.transpose(0, 1)?.contiguous()?;
    let mut scores = (q.matmul(&spread(k)?.transpose(1, 2)?.contiguous()?)? * scope.scale)?;
    if let Some(cap) = scope.cap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let mut mask = vec![f32::NEG_INFINITY; queries * rows];
    for block in scope.query_blocks(1) {
        let mask = &mut mask[block.range.start * rows..][..rows];
        for seen in scope.documents.rows_at(&block, scope.seen(block.positions.0)) {
            mask[seen].fill(0.0);
        }
    }
    let mask = Tensor::from_vec(mask, (1, queries, rows), q.device())?.to_dtype(q.dtype())?;
    let scores = scores.broadcast_add(&mask)?;
    let most = scores.max_keepdim(2)?.detach();
    let weights = scores.broadcast_sub(&most)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(2)?)?;
    weights.matmul(&spread(v)?)?.transpose(0, 1)?.contiguous()
}

pub(super) fn frozen_linear(x: &Tensor, weights: &Frozen) -> Result<Tensor> {
    x.matmul(&weights.on_device_of(x)?.t()?)
}

pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

pub(super) fn lora_linear(
    x: &Tensor,
    weights: &Frozen,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let low = (linear(x, a)? * scale)?;
    frozen_linear(x, weights)? + linear(&low, b)?
}

/// Holds the logits of all rows at once.
fn logits(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Tensor> {
    let logits = match head {
        Head::Frozen(frozen) => frozen_linear(hidden, frozen)?,
        Head::Trained(head) => linear(hidden, head)?,
    };
    let logits = match targets.cap {
        Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        None => logits,
    };
    logits / targets.temperature
}

/// (rows, vocabulary) log-probabilities.
fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)
}

pub(super) fn linear_cross_entropy(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
) -> Result<Losses> {
    let logits = logits(hidden, head, targets)?;
    let tokens = Tensor::new(&targets.tokens[..], hidden.device())?;
    let said = log_softmax(&logits)?.gather(&tokens.unsqueeze(1)?, 1)?.squeeze(1)?;
    let weights = Tensor::new(&targets.weights[..], hidden.device())?.to_dtype(hidden.dtype())?;
    let sum = said.mul(&weights)?.sum_all()?.neg()?;
    let hits = logits.argmax(1)?.eq(&tokens)?.to_dtype(DType::F64)?;
    let correct = hits.mul(&weights.to_dtype(DType::F64)?)?.sum_all()?.to_scalar()?;
    Ok(Losses { sum, correct })
}

pub(super) fn log_probs(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<LogProbs> {
    let all = log_softmax(&logits(hidden, head, targets)?)?;
    let tokens = Tensor::new(&targets.tokens[..], hidden.device())?.unsqueeze(1)?;
    let of_targets = all.gather(&tokens, 1)?.squeeze(1)?;
    let all = all.detach();
    let entropies = (all.exp()? * &all)?.sum(1)?.neg()?.to_dtype(DType::F64)?.to_vec1()?;
    Ok(LogProbs { of_targets, entropies })
}

/// As in `cpu/distillation.rs`, where the events are explained.
pub(super) fn distillation(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
    distillation: &Distillation,
) -> Result<DistillationLosses> {
    let Distillation { teacher, divergence, beta, temperature, cross_entropy } = distillation;
    let logits = logits(hidden, head, targets)?;
    let (device, dtype) = (hidden.device(), hidden.dtype());
    let tokens = Tensor::new(&targets.tokens[..], device)?;
    let said = log_softmax(&logits)?.gather(&tokens.unsqueeze(1)?, 1)?.squeeze(1)?;
    let weights = Tensor::new(&targets.weights[..], device)?.to_dtype(dtype)?;
    let of_targets = said.mul(&weights)?.sum_all()?.neg()?;

    let rows = (targets.tokens.len(), teacher.top_k);
    let events = Tensor::from_slice(&teacher.tokens, rows, device)?;
    let log_p = Tensor::from_slice(&teacher.log_probs, rows, device)?.to_dtype(dtype)?;
    let log_q = log_softmax(&(&logits / *temperature)?)?.gather(&events, 1)?;
    let with_rest = |log: Tensor| -> Result<Tensor> {
        if teacher.top_k == logits.dim(1)? {
            return Ok(log);
        }
        let mass = log.exp()?.sum_keepdim(1)?;
        let rest = (mass.ones_like()? - mass)?.maximum(LEAST_MASS)?.log()?;
        Tensor::cat(&[log, rest], 1)
    };
    let (log_p, log_q) = (with_rest(log_p)?, with_rest(log_q)?);
    let (p, q) = (log_p.exp()?, log_q.exp()?);
    let events = match divergence {
        Divergence::ForwardKl => (p * (log_p - &log_q)?)?,
        Divergence::ReverseKl => (q * (log_q - log_p)?)?,
        Divergence::Jsd => {
            // Both probabilities of an event may round to 0.
            let mixture = ((&p * *beta)? + (&q * (1.0 - beta))?)?;
            let log_m = mixture.maximum(f64::from(f32::MIN_POSITIVE))?.log()?;
            let of_teacher = (p * (log_p - &log_m)?)? * *beta;
            let of_student = (q * (log_q - log_m)?)? * (1.0 - beta);
            (of_teacher? + of_student?)?
        }
    };
    let apart = events.sum(1)?.mul(&weights)?.sum_all()?;
    let by_divergence = (1.0 - cross_entropy) * temperature * temperature;
    let sum = ((&apart * by_divergence)? + (&of_targets * *cross_entropy)?)?;
    let number = |x: &Tensor| x.to_dtype(DType::F64)?.to_scalar::<f64>();
    let hits = logits.argmax(1)?.eq(&tokens)?.to_dtype(DType::F64)?;
    let sums = DistillationSums {
        divergence: number(&apart)?,
        cross_entropy: number(&of_targets)?,
        correct: hits.mul(&weights.to_dtype(DType::F64)?)?.sum_all()?.to_scalar()?,
    };
    Ok(DistillationLosses { sum, sums })
}

/// (rows, top_k, 2) tokens as numbers, and their log-probabilities.
pub(super) fn top_log_probs(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
    top_k: usize,
) -> Result<Tensor> {
    let all = log_softmax(&logits(&hidden.detach(), head, targets)?)?;
    let rows = all.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let pairs = |row: &Vec<f64>| {
        let highest = cpu::highest(row, top_k);
        highest.into_iter().flat_map(|token| [token as f64, row[token]]).collect::<Vec<_>>()
    };
    let found: Vec<f64> = rows.iter().flat_map(pairs).collect();
    Tensor::from_vec(found, (rows.len(), top_k, 2), hidden.device())
}

/// The gradients by candle's backward pass, from the result `out` and its gradient.
pub(super) fn backward(out: &Tensor, grad: &Tensor) -> Result<super::Grads> {
    let store = (out * grad)?.sum_all()?.backward()?;
    let grads = store.get_ids().filter_map(|&id| Some((id, store.get_id(id)?.clone())));
    Ok(grads.collect())
}
