//! Losses of a model's output, without holding the logits of all rows at once.

use super::fused::{Fused, View, apply};
use crate::kernels::gemm::{Mat, product};
use crate::train::ops::tape::tracked;
use crate::train::ops::{Frozen, Head, Number, Targets};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::ops::{Add, Range};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Logits that are held at a time: 64 MB of f32.
const LOGITS: usize = 1 << 24;

/// A loss that is a sum over rows of logits.
pub(super) trait RowLoss: Send + Sync + 'static {
    /// What is found for a row, and the sum of it.
    type Found: Add<Output = Self::Found> + Clone + Copy + Default + Send + Sync;

    const NAME: &'static str;

    /// Replaces the logits of a row by their gradients.
    fn row<T: Number>(&self, row: usize, logits: &mut [T]) -> Self::Found;

    /// The loss.
    fn loss(found: &Self::Found) -> f64;
}

/// The loss of `hidden` (rows, width) as a scalar tensor, and what the rule found.
pub(super) fn linear_loss<L: RowLoss>(
    hidden: &Tensor,
    head: &Head,
    rule: L,
) -> Result<(Tensor, L::Found)> {
    let found = Arc::new(OnceLock::new());
    let trained = matches!(head, Head::Trained(head) if tracked(head));
    let op = LinearLoss {
        logits: Logits::new(head)?,
        rule,
        wanted: [tracked(hidden), trained],
        found: found.clone(),
        grads: Mutex::new(None),
    };
    let sum = match head {
        Head::Frozen(_) => apply(op, &[hidden]),
        Head::Trained(head) => apply(op, &[hidden, head]),
    }?;
    Ok((sum, found.get().copied().unwrap_or_default()))
}

/// Computes logits, a block of rows at a time.
pub(super) struct Logits {
    /// `None`: the head is an argument of the operation.
    frozen: Option<Arc<Frozen>>,
    pub(super) vocab: usize,
}

impl Logits {
    pub(super) fn new(head: &Head) -> Result<Self> {
        let frozen = if let Head::Frozen(frozen) = head { Some(frozen.clone()) } else { None };
        Ok(Self { frozen, vocab: head.vocab()? })
    }

    /// Passes a buffer for the logits of each block of rows to `each`, until all rows are done.
    pub(super) fn blocks<T: Number>(
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
    pub(super) fn times_head<T: Number>(
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
pub(super) fn shape<T: Number>(logits: &mut [T], targets: &Targets) -> Option<Vec<T>> {
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

struct LinearLoss<L: RowLoss> {
    logits: Logits,
    rule: L,
    /// Whether the gradients of the rows and of the head are needed.
    wanted: [bool; 2],
    found: Arc<OnceLock<L::Found>>,
    /// The gradients, computed in the forward pass: `[Vec<T>; 2]`.
    grads: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<L: RowLoss> Fused for LinearLoss<L> {
    const NAME: &'static str = L::NAME;

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let (rows, width) = args[0].rows();
        let (hidden, vocab) = (Mat::new(args[0].data, rows, width), self.logits.vocab);
        let mut dhidden = vec![T::ZERO; if self.wanted[0] { rows * width } else { 0 }];
        let mut dhead = vec![T::ZERO; if self.wanted[1] { vocab * width } else { 0 }];
        let mut total = L::Found::default();
        self.logits.blocks(args, |block, logits| {
            let losses: Vec<L::Found> = logits
                .par_chunks_mut(vocab)
                .enumerate()
                .map(|(row, logits)| self.rule.row(block.start + row, logits))
                .collect();
            // In the order of the rows, whatever the number of threads.
            total = losses.into_iter().fold(total, Add::add);
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
        let _ = self.found.set(total);
        let grads: Box<dyn Any + Send> = Box::new([dhidden, dhead]);
        *self.grads.lock().unwrap_or_else(PoisonError::into_inner) = Some(grads);
        Ok((vec![T::of(L::loss(&total))], Shape::from(())))
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
