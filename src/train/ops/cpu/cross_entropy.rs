//! Cross-entropy of a model's output, without holding the logits of all rows at once.

use super::fused::{Fused, View, apply, plain};
use super::lanes;
use crate::kernels::gemm::{Mat, product};
use crate::train::ops::tape::tracked;
use crate::train::ops::{Frozen, Head, Losses, Number, Targets};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Logits that are held at a time: 64 MB of f32.
const LOGITS: usize = 1 << 24;

pub(in crate::train::ops) fn linear_cross_entropy(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
) -> Result<Losses> {
    let correct = Arc::new(OnceLock::new());
    let trained = matches!(head, Head::Trained(head) if tracked(head));
    let op = CrossEntropy {
        logits: Logits::new(head)?,
        targets: targets.clone(),
        wanted: [tracked(hidden), trained],
        correct: correct.clone(),
        grads: Mutex::new(None),
    };
    let sum = match head {
        Head::Frozen(_) => apply(op, &[hidden]),
        Head::Trained(head) => apply(op, &[hidden, head]),
    }?;
    Ok(Losses { sum, correct: correct.get().copied().unwrap_or_default() })
}

/// (rows, 2) log-probability of the target, and entropy.
pub(in crate::train::ops) fn log_probs(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
) -> Result<Tensor> {
    let op = Said { logits: Logits::new(head)?, targets: targets.clone() };
    match head {
        Head::Frozen(_) => plain(op, &[hidden]),
        Head::Trained(head) => plain(op, &[hidden, head]),
    }
}

/// Computes logits, a block of rows at a time.
struct Logits {
    /// `None`: the head is an argument of the operation.
    frozen: Option<Arc<Frozen>>,
    vocab: usize,
}

impl Logits {
    fn new(head: &Head) -> Result<Self> {
        let frozen = if let Head::Frozen(frozen) = head { Some(frozen.clone()) } else { None };
        Ok(Self { frozen, vocab: head.vocab()? })
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
