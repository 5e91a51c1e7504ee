//! Next-token logits.

use super::{Batch, Model};
use crate::train::ops::{self, Documents, Head};
use candle_core::{Result, Tensor, bail};
use std::sync::Arc;

impl Model {
    /// (vocabulary) logits after the last of `tokens`, which form one document. No KV cache is kept
    /// between calls, so this is for inspecting a model in training, not for serving.
    ///
    /// # Errors
    /// If there is no token, a token is not in the vocabulary, or memory cannot be allocated.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let Some(last) = tokens.len().checked_sub(1) else { bail!("nothing to go on from") };
        let mut weights = vec![0.0; tokens.len()];
        weights[last] = 1.0;
        let batch = Batch {
            tokens: Arc::new(tokens.to_vec()),
            documents: Arc::new(Documents::one(tokens.len())),
            targets: Arc::new(vec![0; tokens.len()]),
            weights: Arc::new(weights),
        };
        let logits = ops::without_gradients(|| self.counted_logits(&batch))?;
        logits.flatten_all()?.to_vec1()
    }

    /// (counted rows, vocabulary) logits of the rows with a weight other than 0.
    pub(super) fn counted_logits(&self, batch: &Batch) -> Result<Tensor> {
        let (normed, _) = self.normed(&self.forward(batch, None)?, batch)?;
        let logits = match &self.head {
            Head::Frozen(head) => ops::frozen_linear(&normed, head)?,
            Head::Trained(head) => ops::linear(&normed, head)?,
        };
        match self.shape.logit_cap.map(f64::from) {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Batch, Model, Training};
    use super::Documents;
    use crate::gguf::Gguf;
    use crate::gguf::fixture::TinyDecoder;
    use candle_core::Device;
    use std::sync::Arc;

    #[test]
    fn logits_are_those_of_the_loss() {
        for architecture in ["llama", "gemma2"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            TinyDecoder::new(architecture).write(&path).unwrap();
            let file = Arc::new(Gguf::open(&path).unwrap());
            let model = Model::load(file, &Training::Full, 64, &Device::Cpu).unwrap();
            let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
            let logits = model.logits(&tokens).unwrap();
            let target = 7usize;
            let most = logits.iter().fold(f32::MIN, |most, x| most.max(*x));
            let total: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
            let found = total.ln() - f64::from(logits[target] - most);
            let mut weights = vec![0.0; tokens.len()];
            weights[tokens.len() - 1] = 1.0;
            let batch = Batch {
                tokens: Arc::new(tokens.to_vec()),
                documents: Arc::new(Documents::one(tokens.len())),
                targets: Arc::new(vec![target as u32; tokens.len()]),
                weights: Arc::new(weights),
            };
            let loss = f64::from(model.losses(&batch).unwrap().sum.to_scalar::<f32>().unwrap());
            assert!((found - loss).abs() < 1e-4, "{architecture}: {found}, {loss}");
        }
    }
}
