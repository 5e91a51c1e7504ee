//! Log-probabilities of tokens, with a backward pass.

use super::fused::{Fused, View, apply};
use super::lanes;
use super::logits::{Logits, shape};
use crate::kernels::gemm::{Mat, product};
use crate::train::ops::tape::tracked;
use crate::train::ops::{Head, LogProbs, Number, Targets};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub(in crate::train::ops) fn log_probs(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
) -> Result<LogProbs> {
    let entropies = Arc::new(OnceLock::new());
    let op = LogProbabilities {
        logits: Logits::new(head)?,
        targets: targets.clone(),
        tracked: tracked(hidden),
        entropies: entropies.clone(),
        slopes: Mutex::new(None),
    };
    let of_targets = match head {
        Head::Frozen(_) => apply(op, &[hidden]),
        Head::Trained(head) => apply(op, &[hidden, head]),
    }?;
    Ok(LogProbs { of_targets, entropies: entropies.get().cloned().unwrap_or_default() })
}

/// (rows) log-probabilities of the targets.
struct LogProbabilities {
    logits: Logits,
    targets: Targets,
    /// Whether the gradients of the rows are needed.
    tracked: bool,
    entropies: Arc<OnceLock<Vec<f64>>>,
    /// (rows, width) the gradients of each row's log-probability, a `Vec<T>`. With a frozen head they
    /// are computed in the forward pass, while the logits are in memory. With a trained head the
    /// logits are computed again, because its gradient depends on how much each row counts.
    slopes: Mutex<Option<Box<dyn Any + Send>>>,
}

impl LogProbabilities {
    /// Replaces shaped logits by the gradients of `by` times the target's log-probability.
    fn slope<T: Number>(&self, row: usize, logits: &mut [T], cap: Option<Vec<T>>, by: T) {
        let scale = by * T::of(1.0 / self.targets.temperature);
        let most = lanes::most(logits);
        let share = -scale / lanes::exp_from(logits, most);
        logits.iter_mut().for_each(|x| *x *= share);
        logits[self.targets.tokens[row] as usize] += scale;
        if let Some(cap) = cap {
            logits.iter_mut().zip(cap).for_each(|(x, slope)| *x *= slope);
        }
    }
}

impl Fused for LogProbabilities {
    const NAME: &'static str = "log_probs";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let ((rows, width), vocab) = (args[0].rows(), self.logits.vocab);
        let slopes_now = self.tracked && args.len() == 1;
        let (mut said, mut entropies) = (vec![T::ZERO; rows], vec![0.0; rows]);
        let mut slopes = vec![T::ZERO; if slopes_now { rows * width } else { 0 }];
        self.logits.blocks(args, |block, logits| {
            let said = said[block.clone()].par_iter_mut();
            let entropies = entropies[block.clone()].par_iter_mut();
            let each = logits.par_chunks_mut(vocab).zip(said).zip(entropies).enumerate();
            each.for_each(|(row, ((logits, said), entropy))| {
                let row = block.start + row;
                let cap = shape(logits, &self.targets);
                let most = lanes::most(logits);
                let right = logits[self.targets.tokens[row] as usize];
                let (total, moment) = lanes::exp_moment(logits, most);
                let normal = total.wide().ln();
                *said = T::of((right - most).wide() - normal);
                *entropy = normal - moment.wide() / total.wide();
                if slopes_now {
                    self.slope(row, logits, cap, T::ONE);
                }
            });
            match slopes_now {
                true => {
                    let grad = Mat::new(logits, block.len(), vocab);
                    let out = &mut slopes[block.start * width..block.end * width];
                    self.logits.times_head(args, grad, false, out)
                }
                false => Ok(()),
            }
        })?;
        let _ = self.entropies.set(entropies);
        if slopes_now {
            let slopes: Box<dyn Any + Send> = Box::new(slopes);
            *self.slopes.lock().unwrap_or_else(PoisonError::into_inner) = Some(slopes);
        }
        Ok((said, Shape::from(rows)))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        wanted: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let ((rows, width), vocab) = (args[0].rows(), self.logits.vocab);
        if args.len() == 1 {
            let slopes = self.slopes.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(slopes) = slopes.and_then(|slopes| slopes.downcast::<Vec<T>>().ok()) else {
                bail!("the gradients of log-probabilities can be had once");
            };
            let mut slopes = *slopes;
            let each = slopes.par_chunks_mut(width).zip(grad.data);
            each.for_each(|(slopes, &by)| slopes.iter_mut().for_each(|x| *x *= by));
            return Ok(vec![Some(slopes)]);
        }
        let hidden = Mat::new(args[0].data, rows, width);
        let mut dhidden = vec![T::ZERO; if wanted[0] { rows * width } else { 0 }];
        let mut dhead = vec![T::ZERO; if wanted[1] { vocab * width } else { 0 }];
        self.logits.blocks(args, |block, logits| {
            logits.par_chunks_mut(vocab).enumerate().for_each(|(row, logits)| {
                let row = block.start + row;
                let cap = shape(logits, &self.targets);
                self.slope(row, logits, cap, grad.data[row]);
            });
            let grad = Mat::new(logits, block.len(), vocab);
            if wanted[0] {
                let out = &mut dhidden[block.start * width..block.end * width];
                self.logits.times_head(args, grad, false, out)?;
            }
            if wanted[1] {
                let further = block.start > 0;
                product(grad.t(), hidden.rows(block), &mut dhead, width, 0, further);
            }
            Ok(())
        })?;
        Ok(vec![wanted[0].then_some(dhidden), wanted[1].then_some(dhead)])
    }
}
