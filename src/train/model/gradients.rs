//! Parameter gradients, accumulated over the micro-batches of a batch.

use crate::train::ops::Grads;
use crate::train::optim::Param;
use candle_core::{Result, Tensor, bail};

/// The accumulated gradient of each parameter; `None` before the first one.
#[derive(Default)]
pub struct Gradients {
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Adds the parameters' gradients of one backward pass.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn add(&mut self, params: &[Param], grads: &mut Grads) -> Result<()> {
        self.sums.resize(params.len(), None);
        for (sum, param) in self.sums.iter_mut().zip(params) {
            let Some(grad) = grads.remove(&param.var.as_tensor().id()) else { continue };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
        Ok(())
    }

    /// Takes all gradients.
    ///
    /// # Errors
    /// If a parameter has no gradient: an operation in the forward pass has cut the graph.
    pub fn take(&mut self, params: &[Param]) -> Result<Vec<Tensor>> {
        let sums = std::mem::take(&mut self.sums);
        if sums.len() != params.len() {
            bail!("no batch was computed");
        }
        let each = sums.into_iter().zip(params).map(|(sum, param)| match sum {
            Some(sum) => Ok(sum),
            None => bail!("`{}` has no gradient", param.name),
        });
        each.collect()
    }
}
