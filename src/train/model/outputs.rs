//! What losses other than a token's cross-entropy are made of, and their way back.
//!
//! Such a loss is some function of log-probabilities and values; its slopes by them are numbers once
//! they are known. A sum of log-probabilities with these slopes has the loss's own gradient, and goes
//! back without the logits of all rows at once ([`ops::linear_cross_entropy`]).

use super::{Batch, Gradients, Model, Pass};
use crate::train::ops::{self, Targets};
use crate::train::optim::Param;
use candle_core::{DType, Result, Tensor, Var, bail};
use std::sync::Arc;

/// The score's parameter.
pub const SCORE: &str = "score.weight";

/// What is wanted of the rows that count, which have a weight other than 0 in their batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    pub log_probs: bool,
    /// Of the score's head.
    pub values: bool,
    /// What logits are divided by.
    pub temperature: f64,
}

impl Wanted {
    pub const LOG_PROBS: Self = Self { log_probs: true, values: false, temperature: 1.0 };
    pub const VALUES: Self = Self { log_probs: false, values: true, temperature: 1.0 };
}

/// (rows that count) each; empty if not wanted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outputs {
    /// ln p(target)
    pub log_probs: Vec<f64>,
    /// -Σ p ln p, in nats
    pub entropies: Vec<f64>,
    pub values: Vec<f64>,
}

/// What a loss's slopes are by each of [`Outputs`]; empty for those that were not wanted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OutputGrads {
    pub log_probs: Vec<f64>,
    pub values: Vec<f64>,
}

impl Model {
    /// Gives the model a head of (width) numbers that says what a row is worth: a parameter.
    ///
    /// # Errors
    /// If there are not as many.
    pub fn with_score(mut self, start: Vec<f32>) -> Result<Self> {
        let var = Var::from_vec(start, (1, self.shape.width), &self.device)?;
        self.score = Some(var.as_tensor().clone());
        let name = SCORE.to_owned();
        self.params.push(Param { name, var, decays: false, hidden: false });
        Ok(self)
    }

    /// What is wanted of a batch, without a way back.
    ///
    /// # Errors
    /// As [`Model::losses`].
    pub fn outputs(&self, batch: &Batch, wanted: Wanted) -> Result<Outputs> {
        rayon::scope(|_| {
            ops::without_gradients(|| {
                let (normed, targets) = self.wanted(&self.forward(batch, None)?, batch, wanted)?;
                Ok(self.look(&normed, &targets, wanted)?.0)
            })
        })
    }

    /// The gradients of a loss whose slopes `loss` gives, added to `gradients`.
    ///
    /// # Errors
    /// As [`Model::losses`].
    pub fn train_with(
        &self,
        batch: &Batch,
        pass: Pass,
        wanted: Wanted,
        gradients: &mut Gradients,
        loss: impl FnOnce(&Outputs) -> OutputGrads + Send,
    ) -> Result<()> {
        self.back(batch, pass, gradients, |x| {
            let (normed, targets) = self.wanted(x, batch, wanted)?;
            let (outputs, values) = self.look(&normed, &targets, wanted)?;
            let slopes = loss(&outputs);
            let mut sum = None;
            if wanted.log_probs {
                // A loss of a token is minus its log-probability.
                let weights = slopes.log_probs.iter().map(|slope| -*slope as f32).collect();
                let targets = Targets { weights: Arc::new(weights), ..targets };
                sum = Some(ops::linear_cross_entropy(&normed, &self.head, &targets)?.sum);
            }
            if let Some(values) = values {
                let of_values = ops::weighed(&values, &Arc::new(slopes.values))?;
                sum = Some(match sum {
                    Some(sum) => ops::add(&sum, &of_values)?,
                    None => of_values,
                });
            }
            sum.ok_or_else(|| candle_core::Error::msg("nothing is wanted of the model"))
        })
    }

    fn wanted(&self, x: &Tensor, batch: &Batch, wanted: Wanted) -> Result<(Tensor, Targets)> {
        let (normed, targets) = self.counted(x, batch)?;
        Ok((normed, Targets { temperature: wanted.temperature, ..targets }))
    }

    /// The outputs, and the values with their way back.
    fn look(
        &self,
        normed: &Tensor,
        targets: &Targets,
        wanted: Wanted,
    ) -> Result<(Outputs, Option<Tensor>)> {
        let mut outputs = Outputs::default();
        if wanted.log_probs {
            let found = ops::log_probs(normed, &self.head, targets)?;
            (outputs.log_probs, outputs.entropies) = (found.of_targets, found.entropies);
        }
        let values = match (&self.score, wanted.values) {
            (_, false) => None,
            (Some(score), true) => Some(ops::linear(normed, score)?),
            (None, true) => bail!("the model has no head for scores"),
        };
        if let Some(values) = &values {
            outputs.values = values.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        }
        Ok((outputs, values))
    }
}
