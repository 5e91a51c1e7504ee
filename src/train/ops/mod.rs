//! Operations of a trainable model, with their backward passes.
//!
//! Each operation has two implementations. `cpu/` computes on slices in parallel with a fixed
//! partition of the work, so that results are bit-identical for any number of threads; its backward
//! passes are written by hand and recorded on a tape ([`record`]). `candle.rs` composes the same
//! operation of candle's differentiable operations, for other devices; candle runs the backward
//! pass. (candle's fused norms, rotations and softmax silently cut the gradient, so they are not
//! used.) The tests run both implementations on the CPU and compare values and gradients with each
//! other, with finite differences in f64 (`tests.rs`) and with PyTorch (`torch_tests.rs`). No test
//! has run on a GPU.
//!
//! | file | content |
//! |---|---|
//! | `arguments.rs` | arguments and results other than tensors |
//! | `documents.rs` | which rows attend to which |
//! | `frozen.rs` | weights that are not trained, in the file's type |
//! | `draw.rs` | random numbers of dropout |
//! | `tape.rs` | the backward pass |
//! | `cpu/` | on slices |
//! | `candle.rs` | composed of candle's operations |

mod arguments;
mod candle;
mod cpu;
mod documents;
mod draw;
mod frozen;
mod tape;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod torch_tests;

pub use arguments::{
    Distillation, DistillationLosses, DistillationSums, Head, LogProbs, Losses, Rotation, Scope,
    Targets, TeacherRows,
};
pub use documents::Documents;
pub use draw::{Draw, mixed};
pub use frozen::Frozen;
pub use tape::{Grads, Tape, record, without_gradients};
#[cfg(test)]
pub(in crate::train) use tests::composed;

use crate::gguf::Gating;
use crate::kernels::real::Real;
use candle_core::{DType, Device, Result, Shape, Tensor, WithDType, bail};
use std::sync::Arc;

/// The number types that operations support.
pub trait Number: Real + WithDType {}
impl Number for f32 {}
impl Number for f64 {}

/// Whether `cpu/` computes on this tensor; otherwise `candle.rs` does.
pub(in crate::train) fn uses_cpu_ops(x: &Tensor) -> bool {
    #[cfg(test)]
    if tests::is_composed() {
        return false;
    }
    matches!(x.device(), Device::Cpu) && matches!(x.dtype(), DType::F32 | DType::F64)
}

/// Runs one of the implementations. Outside of a recording the result of `candle.rs` is detached, so
/// that its arguments are not kept for a backward pass.
fn dispatch(
    x: &Tensor,
    cpu: impl FnOnce() -> Result<Tensor>,
    candle: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    match (uses_cpu_ops(x), tape::recording()) {
        (true, _) => cpu(),
        (false, true) => candle(),
        (false, false) => Ok(candle()?.detach()),
    }
}

/// `x + y`, for tensors of the same shape.
///
/// # Errors
/// If the shapes differ.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims() != y.dims() {
        bail!("{:?} and {:?} cannot be added", x.dims(), y.dims());
    }
    dispatch(x, || cpu::add(x, y), || x + y)
}

/// The tensor with another shape.
///
/// # Errors
/// If the number of elements differs.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    dispatch(x, || cpu::reshape(x, shape.clone()), || x.reshape(shape.clone()))
}

/// The scalar `Σ weights x`.
///
/// # Errors
/// If the numbers of elements differ.
pub fn weighed(x: &Tensor, weights: &Arc<Vec<f64>>) -> Result<Tensor> {
    if x.elem_count() != weights.len() {
        bail!("{} numbers and {} weights", x.elem_count(), weights.len());
    }
    dispatch(x, || cpu::weighed(x, weights), || candle::weighed(x, weights))
}

/// Adds `bias` (columns) to every row of `x` (rows, columns).
///
/// # Errors
/// If the shapes do not fit.
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    dispatch(x, || cpu::add_bias(x, bias), || x.broadcast_add(bias))
}

/// `x` times a number.
///
/// # Errors
/// If memory cannot be allocated.
pub fn scale(x: &Tensor, by: f64) -> Result<Tensor> {
    dispatch(x, || cpu::scale(x, by), || x * by)
}

/// `x / rms(x) * weight`, row by row; `x` (…, columns), `weight` (columns) (Zhang and Sennrich 2019,
/// arXiv:1910.07467).
///
/// # Errors
/// If the shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    dispatch(x, || cpu::rms_norm(x, weight, epsilon), || candle::rms_norm(x, weight, epsilon))
}

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864): rotates the first `2 * pairs`
/// dimensions of every head of `x` (rows, heads, head_dim).
///
/// # Errors
/// If the shapes do not fit.
pub fn rotate(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    dispatch(x, || cpu::rotate(x, rotation), || candle::rotate(x, rotation))
}

/// `act(gate) * up`, element by element: SwiGLU and GeGLU (Shazeer 2020, arXiv:2002.05202).
///
/// # Errors
/// If the shapes differ.
pub fn gated(gate: &Tensor, up: &Tensor, act: Gating) -> Result<Tensor> {
    dispatch(gate, || cpu::gated(gate, up, act), || candle::gated(gate, up, act))
}

/// `x` with some of its numbers dropped and the others scaled up (Srivastava et al. 2014, JMLR 15).
///
/// # Errors
/// If memory cannot be allocated.
pub fn dropout(x: &Tensor, draw: Draw) -> Result<Tensor> {
    dispatch(x, || cpu::dropout(x, draw), || candle::dropout(x, draw))
}

/// (tokens, width) rows of `table` (vocabulary, width).
///
/// # Errors
/// If a token is not in the table.
pub fn embedding(table: &Tensor, tokens: &Arc<Vec<u32>>) -> Result<Tensor> {
    let vocab = table.dim(0)?;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        bail!("token {token} is not below {vocab}");
    }
    dispatch(table, || cpu::embedding(table, tokens), || candle::embedding(table, tokens))
}

/// (queries, heads, head_dim) causal attention over packed documents of `q` (queries, heads,
/// head_dim), `k` and `v` (rows, kv_heads, head_dim).
///
/// # Errors
/// If the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scope: &Scope) -> Result<Tensor> {
    let ((queries, heads, dim), (rows, kv_heads, key_dim)) = (q.dims3()?, k.dims3()?);
    if key_dim != dim || k.dims() != v.dims() || !heads.is_multiple_of(kv_heads) {
        bail!("queries {:?}, keys {:?}, values {:?}", q.dims(), k.dims(), v.dims());
    }
    if queries != scope.query_rows() || rows != scope.documents.rows() {
        bail!(
            "{queries} queries and {rows} keys for {} and {} rows",
            scope.query_rows(),
            scope.documents.rows()
        );
    }
    dispatch(q, || cpu::attention(q, k, v, scope), || candle::attention(q, k, v, scope))
}

/// (rows, outputs) product of `x` (rows, inputs) and frozen weights.
///
/// # Errors
/// If the shapes do not fit, or the file cannot be read.
pub fn frozen_linear(x: &Tensor, weights: &Arc<Frozen>) -> Result<Tensor> {
    dispatch(x, || cpu::frozen_linear(x, weights), || candle::frozen_linear(x, weights))
}

/// (rows, outputs) product of `x` (rows, inputs) and the trained `weight` (outputs, inputs).
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    dispatch(x, || cpu::linear(x, weight), || candle::linear(x, weight))
}

/// `x W + scale (x A) B`: (rows, outputs) of `x` (rows, inputs), `a` (rank, inputs), `b` (outputs,
/// rank) (Hu et al. 2021, arXiv:2106.09685).
///
/// # Errors
/// As of [`frozen_linear`].
pub fn lora_linear(
    x: &Tensor,
    weights: &Arc<Frozen>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    dispatch(
        x,
        || cpu::lora_linear(x, weights, a, b, scale),
        || candle::lora_linear(x, weights, a, b, scale),
    )
}

/// The losses of `hidden` (rows, width). `cpu/` computes the gradient in the forward pass, while the
/// logits are in memory. Weights may be negative.
///
/// # Errors
/// If the shapes do not fit, a target is not in the vocabulary, or the head cannot be read.
pub fn linear_cross_entropy(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Losses> {
    targets.check(hidden.dim(0)?, head.vocab()?)?;
    match uses_cpu_ops(hidden) {
        true => cpu::linear_cross_entropy(hidden, head, targets),
        false => candle::linear_cross_entropy(hidden, head, targets),
    }
}

/// The log-probabilities of the targets of `hidden` (rows, width), whatever their weights.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn log_probs(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<LogProbs> {
    targets.check(hidden.dim(0)?, head.vocab()?)?;
    match uses_cpu_ops(hidden) {
        true => cpu::log_probs(hidden, head, targets),
        false => candle::log_probs(hidden, head, targets),
    }
}

/// Least probability of the tokens that are not among the teacher's `top_k`, so that logarithms are
/// finite.
const LEAST_MASS: f64 = 1e-9;

/// The losses of a student, `hidden` (rows, width), which learns from a teacher. The temperature of
/// `targets` is 1. Gradients are computed as by [`linear_cross_entropy`].
///
/// # Errors
/// As [`linear_cross_entropy`], and if the teacher's rows do not fit.
pub fn distillation(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
    distillation: &Distillation,
) -> Result<DistillationLosses> {
    let (rows, vocab) = (hidden.dim(0)?, head.vocab()?);
    targets.check(rows, vocab)?;
    distillation.check(rows, vocab)?;
    match uses_cpu_ops(hidden) {
        true => cpu::distillation(hidden, head, targets, distillation),
        false => candle::distillation(hidden, head, targets, distillation),
    }
}

/// The `top_k` most probable tokens of each row of `hidden` (rows, width), without a backward pass.
/// Of equally probable ones the first count.
///
/// # Errors
/// As [`linear_cross_entropy`], and if `top_k` is 0 or more than the vocabulary.
pub fn top_log_probs(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
    top_k: usize,
) -> Result<TeacherRows> {
    let (rows, vocab) = (hidden.dim(0)?, head.vocab()?);
    targets.check(rows, vocab)?;
    if !(1..=vocab).contains(&top_k) {
        bail!("{top_k} tokens of a vocabulary of {vocab}");
    }
    let found = match uses_cpu_ops(hidden) {
        true => cpu::top_log_probs(hidden, head, targets, top_k)?,
        false => candle::top_log_probs(hidden, head, targets, top_k)?,
    };
    let found = found.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let tokens = found.iter().step_by(2).map(|&token| token as u32).collect();
    let log_probs = found.iter().skip(1).step_by(2).copied().collect();
    Ok(TeacherRows { top_k, tokens, log_probs })
}
