//! Cross-entropy of a model's output, without the logits of all rows at once.

use super::fused::{Fused, Number, View, apply};
use super::lanes;
use super::linear::Frozen;
use super::tape::tracked;
use crate::kernels::gemm::{Mat, product};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Logits that are held at a time: 64 MB of f32.
const LOGITS: usize = 1 << 24;

/// The matrix that makes logits: (vocabulary, width).
#[derive(Clone)]
pub enum Head {
    Frozen(Arc<Frozen>),
    Trained(Tensor),
}

/// What the rows should have predicted.
#[derive(Debug, Clone)]
pub struct Targets {
    /// (rows)
    pub tokens: Arc<Vec<u32>>,
    /// (rows) what a row counts.
    pub weights: Arc<Vec<f32>>,
    /// Logits are `cap tanh(logit / cap)`.
    pub cap: Option<f64>,
}

/// The loss of some rows.
pub struct Losses {
    /// A number: the sum of the rows' losses in nats, times their weights.
    pub sum: Tensor,
    /// Rows whose target is the most likely token, times their weights.
    pub correct: f64,
}

/// `hidden` (rows, width) to losses. The gradient is computed together with the loss, as long as the
/// logits are there.
///
/// # Errors
/// If the shapes do not fit, a target is no token, or the head cannot be read.
pub fn linear_cross_entropy(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Losses> {
    let vocab = match head {
        Head::Frozen(frozen) => frozen.outputs(),
        Head::Trained(tensor) => tensor.dim(0)?,
    };
    let rows = hidden.dim(0)?;
    if targets.tokens.len() != rows || targets.weights.len() != rows {
        bail!("{rows} rows, {} targets, {} weights", targets.tokens.len(), targets.weights.len());
    }
    if let Some(token) = targets.tokens.iter().find(|token| **token as usize >= vocab) {
        bail!("target {token} is not below {vocab}");
    }
    if !super::fused::covers(hidden) {
        return composed(hidden, head, targets);
    }
    let correct = Arc::new(OnceLock::new());
    let trained = matches!(head, Head::Trained(head) if tracked(head));
    let op = CrossEntropy {
        frozen: if let Head::Frozen(frozen) = head { Some(frozen.clone()) } else { None },
        targets: targets.clone(),
        vocab,
        wanted: [tracked(hidden), trained],
        correct: correct.clone(),
        grads: Mutex::new(None),
    };
    let sum = match head {
        Head::Frozen(_) => apply(op, &[hidden])?,
        Head::Trained(head) => apply(op, &[hidden, head])?,
    };
    Ok(Losses { sum, correct: correct.get().copied().unwrap_or_default() })
}

fn composed(hidden: &Tensor, head: &Head, targets: &Targets) -> Result<Losses> {
    let logits = match head {
        Head::Frozen(frozen) => super::linear::frozen_linear(hidden, frozen)?,
        Head::Trained(head) => hidden.matmul(&head.t()?)?,
    };
    let logits = match targets.cap {
        Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        None => logits,
    };
    let device = hidden.device();
    let most = logits.max_keepdim(1)?.detach();
    let shifted = logits.broadcast_sub(&most)?;
    let normal = shifted.exp()?.sum_keepdim(1)?.log()?;
    let tokens = Tensor::new(&targets.tokens[..], device)?;
    let right = shifted.gather(&tokens.unsqueeze(1)?, 1)?;
    let weights = Tensor::new(&targets.weights[..], device)?.to_dtype(hidden.dtype())?;
    let sum = (normal - right)?.squeeze(1)?.mul(&weights)?.sum_all()?;
    let hits = logits.argmax(1)?.eq(&tokens)?.to_dtype(hidden.dtype())?.mul(&weights)?.sum_all()?;
    let correct = hits.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
    Ok(Losses { sum, correct })
}

struct CrossEntropy {
    frozen: Option<Arc<Frozen>>,
    targets: Targets,
    vocab: usize,
    /// Of the rows, and of the head.
    wanted: [bool; 2],
    correct: Arc<OnceLock<f64>>,
    /// What the forward pass found: `[Vec<T>; 2]`.
    grads: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What a row adds to the loss.
#[derive(Clone, Copy, Default)]
struct RowLoss {
    loss: f64,
    correct: f64,
}

impl CrossEntropy {
    /// Logits become their gradients.
    fn row<T: Number>(&self, row: usize, logits: &mut [T]) -> RowLoss {
        let (target, weight) = (self.targets.tokens[row] as usize, self.targets.weights[row]);
        if weight == 0.0 {
            logits.fill(T::ZERO);
            return RowLoss::default();
        }
        if let Some(cap) = self.targets.cap.map(T::of) {
            logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        let most = lanes::most(logits);
        let right = logits[target];
        // What the cap leaves of a slope, before logits are overwritten.
        let slope = |x: T, cap: T| T::ONE - (x / cap) * (x / cap);
        let cap = self.targets.cap.map(T::of);
        let slopes: Option<Vec<T>> = cap.map(|cap| logits.iter().map(|&x| slope(x, cap)).collect());
        let total = lanes::exp_from(logits, most);
        let loss = (most - right).wide() + total.wide().ln();
        let scale = T::of_f32(weight);
        let share = scale / total;
        logits.iter_mut().for_each(|x| *x *= share);
        logits[target] += -scale;
        if let Some(slopes) = slopes {
            logits.iter_mut().zip(slopes).for_each(|(x, slope)| *x *= slope);
        }
        let weight = f64::from(weight);
        RowLoss { loss: loss * weight, correct: if right >= most { weight } else { 0.0 } }
    }

    /// `out (+)= left head`, or with the head's transpose; panel by panel if it is frozen.
    fn times_head<T: Number>(
        &self,
        left: Mat<T>,
        head: Option<Mat<T>>,
        width: usize,
        transposed: bool,
        out: &mut [T],
    ) -> Result<()> {
        if let Some(head) = head {
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

impl Fused for CrossEntropy {
    const NAME: &'static str = "linear_cross_entropy";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let (rows, width) = args[0].rows();
        let hidden = Mat::new(args[0].data, rows, width);
        let head = args.get(1).map(|head| Mat::new(head.data, self.vocab, width));
        let mut dhidden = vec![T::ZERO; if self.wanted[0] { rows * width } else { 0 }];
        let mut dhead = vec![T::ZERO; if self.wanted[1] { self.vocab * width } else { 0 }];
        let each = (LOGITS / self.vocab).clamp(16, 512).min(rows.max(1));
        let mut logits = vec![T::ZERO; each * self.vocab];
        let mut total = RowLoss::default();
        for from in (0..rows).step_by(each) {
            let block = from..(from + each).min(rows);
            let logits = &mut logits[..block.len() * self.vocab];
            self.times_head(hidden.rows(block.clone()), head, width, true, logits)?;
            let losses: Vec<RowLoss> = logits
                .par_chunks_mut(self.vocab)
                .enumerate()
                .map(|(row, logits)| self.row(from + row, logits))
                .collect();
            for row in losses {
                total.loss += row.loss;
                total.correct += row.correct;
            }
            let grad = Mat::new(logits, block.len(), self.vocab);
            if self.wanted[0] {
                let out = &mut dhidden[from * width..block.end * width];
                self.times_head(grad, head, width, false, out)?;
            }
            if self.wanted[1] {
                product(grad.t(), hidden.rows(block), &mut dhead, width, 0, from > 0);
            }
        }
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
