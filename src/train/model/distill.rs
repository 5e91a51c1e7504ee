//! Learning from a teacher, and the loss without some layers.

use super::block::Block;
use super::{Batch, Gradients, Model, Pass};
use crate::train::ops::{self, Distillation, DistillationSums, Targets, TeacherRows};
use candle_core::{Result, Tensor, bail};

impl Model {
    /// The most probable next tokens after each token with a weight other than 0.
    ///
    /// # Errors
    /// As [`Model::losses`].
    pub fn teacher_rows(
        &self,
        batch: &Batch,
        temperature: f64,
        top_k: usize,
    ) -> Result<TeacherRows> {
        rayon::scope(|_| {
            ops::without_gradients(|| {
                let (normed, targets) = self.normed(&self.forward(batch, None)?, batch)?;
                let targets = Targets { temperature, ..targets };
                ops::top_log_probs(&normed, &self.head, &targets, top_k)
            })
        })
    }

    /// Computes the losses of a student, and adds their gradients to `gradients`. Returns the loss
    /// and its parts.
    ///
    /// # Errors
    /// As [`Model::losses`].
    pub fn distill(
        &self,
        batch: &Batch,
        pass: Pass,
        distillation: &Distillation,
        gradients: &mut Gradients,
    ) -> Result<(f64, DistillationSums)> {
        let mut found = None;
        self.back(batch, pass, gradients, |x| {
            let (normed, targets) = self.normed(x, batch)?;
            let losses = ops::distillation(&normed, &self.head, &targets, distillation)?;
            found = Some((number(&losses.sum)?, losses.sums));
            Ok(losses.sum)
        })?;
        found.ok_or_else(|| candle_core::Error::msg("nothing was computed"))
    }

    /// The same without gradients.
    ///
    /// # Errors
    /// As [`Model::losses`].
    pub fn distillation(
        &self,
        batch: &Batch,
        distillation: &Distillation,
    ) -> Result<(f64, DistillationSums)> {
        rayon::scope(|_| {
            ops::without_gradients(|| {
                let (normed, targets) = self.normed(&self.forward(batch, None)?, batch)?;
                let losses = ops::distillation(&normed, &self.head, &targets, distillation)?;
                Ok((number(&losses.sum)?, losses.sums))
            })
        })
    }

    /// For each of the layers `kept` the loss of the batch (the sum over its tokens) by the model
    /// that has the others of them.
    ///
    /// # Errors
    /// As [`Model::losses`], and if there is no such layer.
    pub fn losses_without_each(&self, batch: &Batch, kept: &[usize]) -> Result<Vec<f64>> {
        if kept.iter().any(|&layer| layer >= self.blocks.len()) {
            bail!("{kept:?} of {} layers", self.blocks.len());
        }
        rayon::scope(|_| {
            ops::without_gradients(|| {
                let context = self.context(batch, None);
                let mut losses = Vec::with_capacity(kept.len());
                // What goes into the layer that is left out.
                let mut before = self.embed(batch)?;
                for (at, &layer) in kept.iter().enumerate() {
                    let later: Vec<&Block> =
                        kept[at + 1..].iter().map(|&later| &self.blocks[later]).collect();
                    let x = self.counted_output(before.clone(), &later, &context)?;
                    losses.push(number(&self.finish(&x, batch)?.sum)?);
                    before = self.blocks[layer].forward(&before, &context)?;
                }
                Ok(losses)
            })
        })
    }
}

fn number(x: &Tensor) -> Result<f64> {
    x.to_dtype(candle_core::DType::F64)?.to_scalar()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::fixture::TinyDecoder;
    use crate::gguf::{Gguf, ModelConfig, keep_layers};
    use crate::train::model::Training;
    use crate::train::ops::Documents;
    use candle_core::Device;
    use std::sync::Arc;

    /// Leaving a layer out gives the loss of a model that was written without it.
    #[test]
    fn layers_are_left_out_as_if_they_were_not_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let [whole, cut] = ["whole.gguf", "cut.gguf"].map(|name| folder.path().join(name));
        TinyDecoder::new("llama").write(&whole).unwrap();
        let file = Arc::new(Gguf::open(&whole).unwrap());
        let load = |file: &Arc<Gguf>| {
            Model::load(file.clone(), &Training::Full, 64, &Device::Cpu).unwrap()
        };
        let tokens = vec![3, 1, 4, 1, 5, 9, 2, 6];
        let batch = Batch {
            targets: Arc::new(tokens[1..].iter().copied().chain([0]).collect()),
            weights: Arc::new(vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
            documents: Arc::new(Documents::one(8)),
            tokens: Arc::new(tokens),
        };
        let layers = ModelConfig::read(&file).unwrap().layers;
        let all: Vec<usize> = (0..layers).collect();
        let found = load(&file).losses_without_each(&batch, &all).unwrap();
        for (layer, found) in found.into_iter().enumerate() {
            let kept: Vec<usize> = all.iter().copied().filter(|&other| other != layer).collect();
            keep_layers(&file, &kept, &cut).unwrap();
            let model = load(&Arc::new(Gguf::open(&cut).unwrap()));
            let right = number(&model.losses(&batch).unwrap().sum).unwrap();
            assert_eq!(found, right, "without layer {layer}");
        }
        assert!(load(&file).losses_without_each(&batch, &[layers]).is_err());
    }
}
