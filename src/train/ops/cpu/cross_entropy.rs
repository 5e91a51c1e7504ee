//! Cross-entropy of a model's output.

use super::lanes;
use super::logits::{RowLoss, linear_loss, shape};
use crate::train::ops::{Head, Losses, Number, Targets};
use candle_core::{Result, Tensor};
use std::ops::Add;

pub(in crate::train::ops) fn linear_cross_entropy(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
) -> Result<Losses> {
    let (sum, found) = linear_loss(hidden, head, CrossEntropy(targets.clone()))?;
    Ok(Losses { sum, correct: found.correct })
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
