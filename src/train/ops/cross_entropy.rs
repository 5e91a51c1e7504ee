//! Cross-entropy of a model's output, without holding the logits of all rows at once.

use super::fused::{Fused, Number, View, apply, has_cpu_kernel, plain};
use super::lanes;
use super::linear::Frozen;
use super::tape::tracked;
use crate::kernels::gemm::{Mat, product};
use candle_core::{DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Logits that are held at a time: 64 MB of f32.
const LOGITS: usize = 1 << 24;

/// The output matrix: (vocabulary, width).
#[derive(Clone)]
pub enum Head {
    Frozen(Arc<Frozen>),
    Trained(Tensor),
}

/// The targets that rows should predict.
#[derive(Debug, Clone)]
pub struct Targets {
    /// (rows) target tokens.
    pub tokens: Arc<Vec<u32>>,
    /// (rows) loss weight of each row.
    pub weights: Arc<Vec<f32>>,
    /// Soft cap: logits are `cap tanh(logit / cap)`.
    pub cap: Option<f64>,
    /// Divisor of the logits, applied after the cap.
    pub temperature: f64,
}

/// Log-probabilities of some rows' targets, and entropies.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogProbs {
    /// (rows) ln p(target).
    pub of_targets: Vec<f64>,
    /// (rows) -Σ p ln p, in nats.
    pub entropies: Vec<f64>,
}

/// The losses of some rows.
pub struct Losses {
    /// A scalar: the sum of the rows' losses in nats, times their weights.
    pub sum: Tensor,
    /// Weighted number of rows whose target is the most likely token.
    pub correct: f64,
}

impl Head {
    fn vocab(&self) -> Result<usize> {
        match self {
            Self::Frozen(frozen) => Ok(frozen.outputs()),
            Self::Trained(tensor) => tensor.dim(0),
        }
    }

    /// Applies an operation to the rows, and to the head if it is a tensor.
    fn apply<F: Fused>(
        &self,
        op: F,
        hidden: &Tensor,
        by: impl Fn(F, &[&Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self {
            Self::Frozen(_) => by(op, &[hidden]),
            Self::Trained(head) => by(op, &[hidden, head]),
        }
    }
}

impl Targets {
    fn check(&self, rows: usize, vocab: usize) -> Result<()> {
        if self.tokens.len() != rows || self.weights.len() != rows {
            bail!("{rows} rows, {} targets, {} weights", self.tokens.len(), self.weights.len());
        }
        match self.tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => bail!("target {token} is not below {vocab}"),
            None => Ok(()),
        }
    }
}

/// The losses of `hidden` (rows, width). The gradient is computed in the forward pass, while the
/// logits are in memory. Weights may be negative: a weighted sum of log-probabilities is a weighted
/// sum of losses, which gives the losses of `train/loss` their backward pass.
///
/// # Errors
/// If the shapes do not fit, a target is not in the vocabulary, or the head cannot be read.
pub fn linear_cross_entropy(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Losses> {
    let vocab = head.vocab()?;
    targets.check(hidden.dim(0)?, vocab)?;
    if !has_cpu_kernel(hidden) {
        return candle_fallback(hidden, head, targets);
    }
    let correct = Arc::new(OnceLock::new());
    let trained = matches!(head, Head::Trained(head) if tracked(head));
    let op = CrossEntropy {
        logits: Logits::new(head, vocab),
        targets: targets.clone(),
        wanted: [tracked(hidden), trained],
        correct: correct.clone(),
        grads: Mutex::new(None),
    };
    let sum = head.apply(op, hidden, apply)?;
    Ok(Losses { sum, correct: correct.get().copied().unwrap_or_default() })
}

/// The log-probabilities of the targets of `hidden` (rows, width), whatever their weights, without
/// a backward pass.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn log_probs(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<LogProbs> {
    let vocab = head.vocab()?;
    targets.check(hidden.dim(0)?, vocab)?;
    let found = match has_cpu_kernel(hidden) {
        true => {
            let op = Said { logits: Logits::new(head, vocab), targets: targets.clone() };
            head.apply(op, hidden, plain)?
        }
        false => {
            let logits = composed_logits(&hidden.detach(), head, targets)?;
            let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
            let all = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
            let tokens = Tensor::new(&targets.tokens[..], hidden.device())?.unsqueeze(1)?;
            let entropies = (all.exp()? * &all)?.sum_keepdim(1)?.neg()?;
            Tensor::cat(&[all.gather(&tokens, 1)?, entropies], 1)?
        }
    };
    let found = found.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let of_targets = found.iter().step_by(2).copied().collect();
    Ok(LogProbs { of_targets, entropies: found.iter().skip(1).step_by(2).copied().collect() })
}

fn composed_logits(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Tensor> {
    let logits = match head {
        Head::Frozen(frozen) => super::linear::frozen_linear(hidden, frozen)?,
        Head::Trained(head) => hidden.matmul(&head.t()?)?,
    };
    let logits = match targets.cap {
        Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        None => logits,
    };
    logits / targets.temperature
}

fn candle_fallback(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Losses> {
    let logits = composed_logits(hidden, head, targets)?;
    let device = hidden.device();
    let most = logits.max_keepdim(1)?.detach();
    let shifted = logits.broadcast_sub(&most)?;
    let normal = shifted.exp()?.sum_keepdim(1)?.log()?;
    let tokens = Tensor::new(&targets.tokens[..], device)?;
    let right = shifted.gather(&tokens.unsqueeze(1)?, 1)?;
    let weights = Tensor::new(&targets.weights[..], device)?.to_dtype(hidden.dtype())?;
    let sum = (normal - right)?.squeeze(1)?.mul(&weights)?.sum_all()?;
    let hits = logits.argmax(1)?.eq(&tokens)?.to_dtype(hidden.dtype())?.mul(&weights)?.sum_all()?;
    let correct = hits.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    Ok(Losses { sum, correct })
}

/// Computes logits, a block of rows at a time.
struct Logits {
    /// `None`: the head is an argument of the operation.
    frozen: Option<Arc<Frozen>>,
    vocab: usize,
}

impl Logits {
    fn new(head: &Head, vocab: usize) -> Self {
        let frozen = if let Head::Frozen(frozen) = head { Some(frozen.clone()) } else { None };
        Self { frozen, vocab }
    }

    /// Passes a buffer for the logits of each block of rows to `each`, until all rows are done.
    fn blocks<T: Number>(
        &self,
        args: &[View<T>],
        mut each: impl FnMut(Range<usize>, &mut [T]) -> Result<()>,
    ) -> Result<()> {
        let (rows, width) = args[0].rows();
        let hidden = Mat::new(args[0].data, rows, width);
        let count = (LOGITS / self.vocab).clamp(16, 512).min(rows.max(1));
        let mut logits = vec![T::ZERO; count * self.vocab];
        for from in (0..rows).step_by(count) {
            let block = from..(from + count).min(rows);
            let logits = &mut logits[..block.len() * self.vocab];
            self.times_head(args, hidden.rows(block.clone()), true, logits)?;
            each(block, logits)?;
        }
        Ok(())
    }

    /// `out = left head`, or the product with the head's transpose; panel by panel if the head is
    /// frozen.
    fn times_head<T: Number>(
        &self,
        args: &[View<T>],
        left: Mat<T>,
        transposed: bool,
        out: &mut [T],
    ) -> Result<()> {
        let width = args[0].rows().1;
        if let Some(head) = args.get(1) {
            let head = Mat::new(head.data, self.vocab, width);
            match transposed {
                true => product(left, head.t(), out, self.vocab, 0, false),
                false => product(left, head, out, width, 0, false),
            }
            return Ok(());
        }
        let Some(frozen) = &self.frozen else { bail!("there is no head") };
        match transposed {
            true => product(left, frozen.turned(), out, self.vocab, 0, false),
            false => product(left, &**frozen, out, width, 0, false),
        }
        Ok(())
    }
}

/// Applies the soft cap, then the temperature. Returns the derivatives of the cap.
fn shape<T: Number>(logits: &mut [T], targets: &Targets) -> Option<Vec<T>> {
    let slopes = targets.cap.map(T::of).map(|cap| {
        logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        logits.iter().map(|&x| T::ONE - (x / cap) * (x / cap)).collect()
    });
    if targets.temperature != 1.0 {
        let scale = T::of(1.0 / targets.temperature);
        logits.iter_mut().for_each(|x| *x *= scale);
    }
    slopes
}

/// The operation of [`log_probs`]: (rows, 2) log-probability of the target, and entropy.
struct Said {
    logits: Logits,
    targets: Targets,
}

impl Fused for Said {
    const NAME: &'static str = "log_probs";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let rows = args[0].rows().0;
        let mut found = vec![T::ZERO; 2 * rows];
        self.logits.blocks(args, |block, logits| {
            let of = &mut found[2 * block.start..2 * block.end];
            let rows = logits.par_chunks_mut(self.logits.vocab).zip(of.par_chunks_mut(2));
            rows.enumerate().for_each(|(row, (logits, found))| {
                shape(logits, &self.targets);
                let most = lanes::most(logits);
                let right = logits[self.targets.tokens[block.start + row] as usize];
                let (total, moment) = lanes::exp_moment(logits, most);
                let normal = total.wide().ln();
                found[0] = T::of((right - most).wide() - normal);
                found[1] = T::of(normal - moment.wide() / total.wide());
            });
            Ok(())
        })?;
        Ok((found, Shape::from((rows, 2))))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        _: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        bail!("{} has no way back", Self::NAME)
    }
}

struct CrossEntropy {
    logits: Logits,
    targets: Targets,
    /// Whether the gradients of the rows and of the head are needed.
    wanted: [bool; 2],
    correct: Arc<OnceLock<f64>>,
    /// The gradients, computed in the forward pass: `[Vec<T>; 2]`.
    grads: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The loss of one row.
#[derive(Clone, Copy, Default)]
struct RowLoss {
    loss: f64,
    correct: f64,
}

impl CrossEntropy {
    /// Replaces the logits of a row by their gradients.
    fn row<T: Number>(&self, row: usize, logits: &mut [T]) -> RowLoss {
        let (target, weight) = (self.targets.tokens[row] as usize, self.targets.weights[row]);
        if weight == 0.0 {
            logits.fill(T::ZERO);
            return RowLoss::default();
        }
        let slopes = shape(logits, &self.targets);
        let most = lanes::most(logits);
        let right = logits[target];
        let total = lanes::exp_from(logits, most);
        let loss = (most - right).wide() + total.wide().ln();
        let scale = T::of(f64::from(weight) / self.targets.temperature);
        let share = scale / total;
        logits.iter_mut().for_each(|x| *x *= share);
        logits[target] += -scale;
        if let Some(slopes) = slopes {
            logits.iter_mut().zip(slopes).for_each(|(x, slope)| *x *= slope);
        }
        let weight = f64::from(weight);
        RowLoss { loss: loss * weight, correct: if right >= most { weight } else { 0.0 } }
    }
}

impl Fused for CrossEntropy {
    const NAME: &'static str = "linear_cross_entropy";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let (rows, width) = args[0].rows();
        let (hidden, vocab) = (Mat::new(args[0].data, rows, width), self.logits.vocab);
        let mut dhidden = vec![T::ZERO; if self.wanted[0] { rows * width } else { 0 }];
        let mut dhead = vec![T::ZERO; if self.wanted[1] { vocab * width } else { 0 }];
        let mut total = RowLoss::default();
        self.logits.blocks(args, |block, logits| {
            let losses: Vec<RowLoss> = logits
                .par_chunks_mut(vocab)
                .enumerate()
                .map(|(row, logits)| self.row(block.start + row, logits))
                .collect();
            for row in losses {
                total.loss += row.loss;
                total.correct += row.correct;
            }
            let grad = Mat::new(logits, block.len(), vocab);
            if self.wanted[0] {
                let out = &mut dhidden[block.start * width..block.end * width];
                self.logits.times_head(args, grad, false, out)?;
            }
            if self.wanted[1] {
                let further = block.start > 0;
                product(grad.t(), hidden.rows(block), &mut dhead, width, 0, further);
            }
            Ok(())
        })?;
        let _ = self.correct.set(total.correct);
        let grads: Box<dyn Any + Send> = Box::new([dhidden, dhead]);
        *self.grads.lock().unwrap_or_else(PoisonError::into_inner) = Some(grads);
        Ok((vec![T::of(total.loss)], Shape::from(())))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        wanted: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let kept = self.grads.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(kept) = kept.and_then(|kept| kept.downcast::<[Vec<T>; 2]>().ok()) else {
            bail!("the gradients of a loss can be had once");
        };
        let by = grad.data[0];
        let scaled = |mut grads: Vec<T>| {
            grads.par_chunks_mut(1 << 14).for_each(|part| part.iter_mut().for_each(|x| *x *= by));
            grads
        };
        let each =
            kept.into_iter().zip(wanted).map(|(grads, wanted)| wanted.then(|| scaled(grads)));
        Ok(each.take(args.len()).collect())
    }
}
