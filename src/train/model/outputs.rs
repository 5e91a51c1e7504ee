//! Model outputs for losses other than cross-entropy, and their backward pass.
//!
//! Such a loss is a function of log-probabilities and values, and its gradient with respect to them
//! consists of numbers. The sum of the outputs weighted by these numbers has the same parameter
//! gradients as the loss.

use super::{Batch, Gradients, Model, Pass};
use crate::train::ops::{self, Targets};
use crate::train::optim::Param;
use candle_core::{DType, Result, Tensor, Var, bail};
use std::sync::Arc;

/// Name of a head's parameter: the head of a reward model, which scores texts.
pub const SCORE: &str = "score.weight";
/// Name of a head's parameter: the head that predicts rewards while a policy is trained.
pub const VALUE: &str = "value.weight";

/// The outputs to compute for the rows with a weight other than 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    pub log_probs: bool,
    /// Values of the head.
    pub values: bool,
    /// Divisor of the logits.
    pub temperature: f64,
}

impl Wanted {
    pub const LOG_PROBS: Self = Self { log_probs: true, values: false, temperature: 1.0 };
    pub const VALUES: Self = Self { log_probs: false, values: true, temperature: 1.0 };
}

/// The outputs, one number for each row with a weight other than 0; empty if not requested.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outputs {
    /// ln p(target).
    pub log_probs: Vec<f64>,
    /// -Σ p ln p, in nats.
    pub entropies: Vec<f64>,
    pub values: Vec<f64>,
}

/// The gradient of a loss with respect to each of [`Outputs`]; empty for outputs that were not
/// requested.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OutputGrads {
    pub log_probs: Vec<f64>,
    pub values: Vec<f64>,
}

impl Model {
    /// Adds a head with the initial weights `start` (width) as a parameter called `name`. The head
    /// maps a row to a value.
    ///
    /// # Errors
    /// If `start` has another length.
    pub fn with_head(mut self, name: &str, start: Vec<f32>) -> Result<Self> {
        let var = Var::from_vec(start, (1, self.shape.width), &self.device)?;
        self.value_head = Some(var.as_tensor().clone());
        let name = name.to_owned();
        self.params.push(Param { name, var, decays: false, hidden: false });
        Ok(self)
    }

    /// The requested outputs of a batch, without a backward pass.
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

    /// Computes the outputs, calls `loss` for its gradient with respect to them, and adds the
    /// parameter gradients to `gradients`.
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
            let (outputs, tensors) = self.look(&normed, &targets, wanted)?;
            let slopes = loss(&outputs);
            let of_each = tensors.into_iter().zip([slopes.log_probs, slopes.values]);
            let sums = of_each.filter_map(|(tensor, slopes)| Some((tensor?, slopes)));
            let sums = sums.map(|(tensor, slopes)| ops::weighed(&tensor, &Arc::new(slopes)));
            let sum = sums.reduce(|one, other| ops::add(&one?, &other?));
            sum.unwrap_or_else(|| bail!("nothing is wanted of the model"))
        })
    }

    fn wanted(&self, x: &Tensor, batch: &Batch, wanted: Wanted) -> Result<(Tensor, Targets)> {
        let (normed, targets) = self.normed(x, batch)?;
        Ok((normed, Targets { temperature: wanted.temperature, ..targets }))
    }

    /// The outputs, and log-probabilities and values as tensors for the backward pass.
    fn look(
        &self,
        normed: &Tensor,
        targets: &Targets,
        wanted: Wanted,
    ) -> Result<(Outputs, [Option<Tensor>; 2])> {
        let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (mut outputs, mut tensors) = (Outputs::default(), [None, None]);
        if wanted.log_probs {
            let found = ops::log_probs(normed, &self.head, targets)?;
            outputs.log_probs = numbers(&found.of_targets)?;
            outputs.entropies = found.entropies;
            tensors[0] = Some(found.of_targets);
        }
        if wanted.values {
            let Some(head) = &self.value_head else { bail!("the model has no head for values") };
            let values = ops::linear(normed, head)?;
            outputs.values = numbers(&values)?;
            tensors[1] = Some(values);
        }
        Ok((outputs, tensors))
    }
}
