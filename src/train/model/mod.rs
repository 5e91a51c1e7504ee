//! A model that can be trained: the decoders that [`ModelConfig`] describes, loaded from a GGUF.
//!
//! | file | content |
//! |---|---|
//! | `weight.rs` | weight matrices: frozen, frozen with LoRA, or trained |
//! | `block.rs` | one transformer layer |
//! | `gradients.rs` | parameter gradients, accumulated over a batch |
//! | `outputs.rs` | outputs for losses other than cross-entropy, and their backward pass |
//! | `logits.rs` | next-token logits |
//! | `distill.rs` | learning from a teacher, and the loss without some layers |

mod block;
mod distill;
mod gradients;
mod logits;
mod outputs;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(in crate::train) mod torch_tests;
mod weight;

pub use gradients::Gradients;
pub use outputs::{OutputGrads, Outputs, SCORE, VALUE, Wanted};
pub use weight::Training;

pub use crate::train::ops::Documents;

use crate::gguf::{Gguf, ModelConfig};
use crate::kernels::rope::rope;
use crate::kernels::vector::Rope;
use crate::train::ops::{self, Frozen, Grads, Head, Losses, Rotation, Targets};
use crate::train::optim::Param;
use block::Block;
use candle_core::{Device, Result, Tensor, Var, bail};
use std::sync::Arc;
use weight::Builder;

const EMBEDDING: &str = "token_embd.weight";

/// Documents packed into one row of tokens, with their prediction targets.
#[derive(Debug, Clone)]
pub struct Batch {
    pub tokens: Arc<Vec<u32>>,
    /// Which tokens attend to which.
    pub documents: Arc<Documents>,
    /// (tokens) the next token after each; arbitrary where the weight is 0.
    pub targets: Arc<Vec<u32>>,
    /// (tokens) loss weight of each token.
    pub weights: Arc<Vec<f32>>,
}

/// A model and its trained parameters.
pub struct Model {
    shape: ModelConfig,
    ropes: Vec<Rope>,
    embedding: Embedding,
    blocks: Vec<Block>,
    output_norm: Tensor,
    head: Head,
    /// (1, width) the head that maps a row to a value, if the model has one.
    value_head: Option<Tensor>,
    params: Vec<Param>,
    device: Device,
}

enum Embedding {
    Frozen(Arc<Frozen>),
    Trained(Tensor),
}

/// What all rows of a batch share.
struct Context<'a> {
    shape: &'a ModelConfig,
    documents: Arc<Documents>,
    /// One rotation per RoPE configuration.
    rotations: Vec<Rotation>,
    counted: Counted,
    /// Number of the training pass; `None` outside of training.
    pass: Option<u64>,
}

/// The rows with a weight other than 0. Nothing needs the last block's output for other rows.
struct Counted {
    rows: Arc<Vec<u32>>,
    /// Their rotations.
    rotations: Vec<Rotation>,
}

/// A forward and backward pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pass {
    /// A number that is unique within a run; it seeds dropout.
    pub number: u64,
    /// Activation checkpointing: the inner activations of a block are recomputed in the backward
    /// pass instead of stored (Chen et al. 2016, arXiv:1604.06174).
    pub checkpoint: bool,
}

impl Model {
    /// Loads a model for sequences of up to `context` tokens.
    ///
    /// # Errors
    /// If the model family is not supported, or memory cannot be allocated.
    pub fn load(
        file: Arc<Gguf>,
        training: &Training,
        context: usize,
        device: &Device,
    ) -> Result<Self> {
        let shape = ModelConfig::read(&file).map_err(candle_core::Error::wrap)?;
        let ropes = shape.ropes.iter().map(|facts| rope(&file, facts, context));
        let ropes =
            ropes.collect::<std::result::Result<_, _>>().map_err(candle_core::Error::msg)?;
        let mut builder = Builder::new(file.clone(), training, device);
        let tied = file.tensor("output.weight").is_none();
        let embedding = match training {
            Training::Full => Embedding::Trained(builder.trained(EMBEDDING, false)?),
            Training::Lora(_) => {
                Embedding::Frozen(Arc::new(Frozen::new(file.clone(), EMBEDDING, 0..shape.vocab)?))
            }
        };
        let blocks = (0..shape.layers).map(|layer| Block::load(&mut builder, &shape, layer));
        let blocks = blocks.collect::<Result<_>>()?;
        let output_norm = builder.vector("output_norm.weight")?;
        let head = match (&embedding, tied, training) {
            (Embedding::Trained(table), true, _) => Head::Trained(table.clone()),
            (Embedding::Frozen(table), true, _) => Head::Frozen(table.clone()),
            (_, _, Training::Full) => Head::Trained(builder.trained("output.weight", false)?),
            _ => Head::Frozen(Arc::new(Frozen::new(file, "output.weight", 0..shape.vocab)?)),
        };
        let (params, device) = (builder.params(), device.clone());
        let value_head = None;
        Ok(Self { shape, ropes, embedding, blocks, output_norm, head, value_head, params, device })
    }

    pub fn shape(&self) -> &ModelConfig {
        &self.shape
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The trained parameters, always in the same order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The losses of a batch.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or memory cannot be allocated.
    pub fn losses(&self, batch: &Batch) -> Result<Losses> {
        rayon::scope(|_| ops::without_gradients(|| self.finish(&self.forward(batch, None)?, batch)))
    }

    /// (counted rows, width) output of the last block for the rows with a weight other than 0.
    fn forward(&self, batch: &Batch, pass: Option<u64>) -> Result<Tensor> {
        let blocks: Vec<&Block> = self.blocks.iter().collect();
        self.counted_output(self.embed(batch)?, &blocks, &self.context(batch, pass))
    }

    /// (counted rows, width) output of the last of `blocks` for the rows with a weight other than 0.
    fn counted_output(&self, x: Tensor, blocks: &[&Block], context: &Context) -> Result<Tensor> {
        let Some((last, others)) = blocks.split_last() else { return context.select(&x) };
        let mut x = x;
        for block in others {
            x = block.forward(&x, context)?;
        }
        last.forward_counted(&x, context)
    }

    /// Computes the losses of a batch, and adds their gradients to `gradients`.
    ///
    /// # Errors
    /// As [`Model::losses`].
    pub fn train(&self, batch: &Batch, pass: Pass, gradients: &mut Gradients) -> Result<Losses> {
        let mut losses = None;
        self.back(batch, pass, gradients, |x| {
            let found = self.finish(x, batch)?;
            let sum = found.sum.clone();
            losses = Some(found);
            Ok(sum)
        })?;
        losses.ok_or_else(|| candle_core::Error::msg("nothing was computed"))
    }

    /// Runs the forward and the backward pass, and adds the gradients. `finish` computes a scalar
    /// from the output of the last block for the rows with a weight other than 0.
    fn back(
        &self,
        batch: &Batch,
        pass: Pass,
        gradients: &mut Gradients,
        finish: impl FnOnce(&Tensor) -> Result<Tensor> + Send,
    ) -> Result<()> {
        // Runs on a thread of the rayon pool: from another thread, each operation would wake the
        // pool and wait for it.
        rayon::scope(|_| match pass.checkpoint {
            false => {
                let found = ops::record(&[], || finish(&self.forward(batch, Some(pass.number))?))?;
                let (sum, tape) = found;
                gradients.add(&self.params, &mut tape.backward(&sum, None)?)
            }
            true => self.back_by_blocks(batch, pass.number, gradients, finish),
        })
    }

    fn back_by_blocks(
        &self,
        batch: &Batch,
        pass: u64,
        gradients: &mut Gradients,
        finish: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let context = self.context(batch, Some(pass));
        let mut inputs = Vec::with_capacity(self.blocks.len());
        let Some((last, others)) = self.blocks.split_last() else {
            bail!("a model without layers")
        };
        let x = ops::without_gradients(|| {
            let mut x = self.embed(batch)?.detach();
            for block in others {
                inputs.push(x.clone());
                x = block.forward(&x, &context)?.detach();
            }
            inputs.push(x.clone());
            start(&last.forward_counted(&x, &context)?.detach())
        })?;
        let (sum, tape) = ops::record(&[&x], || finish(&x))?;
        let mut grads = tape.backward(&sum, None)?;
        let mut grad = taken(&mut grads, &x)?;
        drop(x);
        gradients.add(&self.params, &mut grads)?;
        for (at, block) in self.blocks.iter().enumerate().rev() {
            let Some(input) = inputs.pop() else { bail!("a block's input is missing") };
            let input = start(&input)?;
            let (out, tape) = ops::record(&[&input], || match at == others.len() {
                true => block.forward_counted(&input, &context),
                false => block.forward(&input, &context),
            })?;
            let mut grads = tape.backward(&out, Some(&grad))?;
            grad = taken(&mut grads, &input)?;
            gradients.add(&self.params, &mut grads)?;
        }
        if let Embedding::Trained(_) = self.embedding {
            let (out, tape) = ops::record(&[], || self.embed(batch))?;
            gradients.add(&self.params, &mut tape.backward(&out, Some(&grad))?)?;
        }
        Ok(())
    }

    /// (tokens, width) token embeddings.
    fn embed(&self, batch: &Batch) -> Result<Tensor> {
        let x = match &self.embedding {
            Embedding::Trained(table) => ops::embedding(table, &batch.tokens)?,
            Embedding::Frozen(table) => {
                let mut values = Vec::with_capacity(batch.tokens.len() * self.shape.width);
                let mut row = Vec::<f32>::new();
                for &token in &*batch.tokens {
                    let token = token as usize;
                    if token >= self.shape.vocab {
                        bail!("token {token} is not in the vocabulary");
                    }
                    table.decode(token..token + 1, &mut row)?;
                    values.extend_from_slice(&row);
                }
                Tensor::from_vec(values, (batch.tokens.len(), self.shape.width), &self.device)?
            }
        };
        match self.shape.embedding_scale {
            1.0 => Ok(x),
            scale => ops::scale(&x, f64::from(scale)),
        }
    }

    /// The losses from the output of the last block for the rows with a weight other than 0.
    fn finish(&self, x: &Tensor, batch: &Batch) -> Result<Losses> {
        let (normed, targets) = self.normed(x, batch)?;
        ops::linear_cross_entropy(&normed, &self.head, &targets)
    }

    /// `x`, the output of the last block for the rows with a weight other than 0, after the output
    /// norm, and the targets of these rows.
    fn normed(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Targets)> {
        let counted: Vec<usize> = batch.counted().map(|row| row as usize).collect();
        let targets = Targets {
            tokens: Arc::new(counted.iter().map(|&row| batch.targets[row]).collect()),
            weights: Arc::new(counted.iter().map(|&row| batch.weights[row]).collect()),
            cap: self.shape.logit_cap.map(f64::from),
            temperature: 1.0,
        };
        let normed = ops::rms_norm(x, &self.output_norm, f64::from(self.shape.epsilon))?;
        Ok((normed, targets))
    }

    fn context(&self, batch: &Batch, pass: Option<u64>) -> Context<'_> {
        let positions = batch.documents.positions();
        let rotations: Vec<Rotation> =
            self.ropes.iter().map(|rope| Rotation::new(rope, &positions)).collect();
        let rows: Vec<u32> = batch.counted().collect();
        let of_counted = rotations.iter().map(|rotation| rotation.select(&rows)).collect();
        Context {
            shape: &self.shape,
            documents: batch.documents.clone(),
            rotations,
            counted: Counted { rows: Arc::new(rows), rotations: of_counted },
            pass,
        }
    }
}

impl Batch {
    /// The rows with a weight other than 0, in ascending order.
    fn counted(&self) -> impl Iterator<Item = u32> {
        let weights = (0..).zip(&*self.weights);
        weights.filter(|(_, weight)| **weight != 0.0).map(|(row, _)| row)
    }
}

impl Context<'_> {
    /// The rows of `x` with a weight other than 0.
    fn select(&self, x: &Tensor) -> Result<Tensor> {
        match self.counted.rows.len() == self.documents.rows() {
            true => Ok(x.clone()),
            false => ops::embedding(x, &self.counted.rows),
        }
    }
}

/// A tensor at which a backward pass ends. Where candle runs the backward pass, it needs a variable.
fn start(x: &Tensor) -> Result<Tensor> {
    match ops::uses_cpu_ops(x) {
        true => Ok(x.clone()),
        false => Ok(Var::from_tensor(x)?.into_inner()),
    }
}

fn taken(grads: &mut Grads, input: &Tensor) -> Result<Tensor> {
    match grads.remove(&input.id()) {
        Some(grad) => Ok(grad),
        None => bail!("a block's input has no gradient"),
    }
}
