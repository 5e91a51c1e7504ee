//! Cross-entropy of a model's output, and log-probabilities.

use super::fused::{Fused, View, plain};
use super::lanes;
use super::logits::{Logits, RowLoss, linear_loss, shape};
use crate::train::ops::{Head, Losses, Number, Targets};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::ops::Add;

pub(in crate::train::ops) fn linear_cross_entropy(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
) -> Result<Losses> {
    let (sum, found) = linear_loss(hidden, head, CrossEntropy(targets.clone()))?;
    Ok(Losses { sum, correct: found.correct })
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

/// The rule of [`linear_cross_entropy`].
struct CrossEntropy(Targets);

/// The loss of one row.
#[derive(Clone, Copy, Default)]
struct Found {
    loss: f64,
    correct: f64,
}

impl Add for Found {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { loss: self.loss + other.loss, correct: self.correct + other.correct }
    }
}

impl RowLoss for CrossEntropy {
    type Found = Found;

    const NAME: &'static str = "linear_cross_entropy";

    fn row<T: Number>(&self, row: usize, logits: &mut [T]) -> Found {
        let targets = &self.0;
        let (target, weight) = (targets.tokens[row] as usize, targets.weights[row]);
        if weight == 0.0 {
            logits.fill(T::ZERO);
            return Found::default();
        }
        let slopes = shape(logits, targets);
        let most = lanes::most(logits);
        let right = logits[target];
        let total = lanes::exp_from(logits, most);
        let loss = (most - right).wide() + total.wide().ln();
        let scale = T::of(f64::from(weight) / targets.temperature);
        let share = scale / total;
        logits.iter_mut().for_each(|x| *x *= share);
        logits[target] += -scale;
        if let Some(slopes) = slopes {
            logits.iter_mut().zip(slopes).for_each(|(x, slope)| *x *= slope);
        }
        let weight = f64::from(weight);
        Found { loss: loss * weight, correct: if right >= most { weight } else { 0.0 } }
    }

    fn loss(found: &Found) -> f64 {
        found.loss
    }
}
