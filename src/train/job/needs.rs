//! What a job will take, from the model's header and the settings.

use crate::gguf::{Covered, Gguf};
use crate::train::spec::{Resolved, Spec};

/// Code, thread stacks, tokenizer and buffers of the process.
const PROCESS: u64 = 160 << 20;
/// An f32 weight, its gradient and both moments.
const TRAINED_BYTES: u64 = 16;
/// A weight and both moments.
const CHECKPOINT_BYTES: u64 = 12;
/// Rows of logits that are held at once, forth and back (`ops::linear_cross_entropy`).
const LOGIT_ROWS: u64 = 2 * 128;

/// Bytes of memory and disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    pub memory: u64,
    /// Two checkpoints and what is made of them at the end.
    pub disk: u64,
    /// Numbers that are trained.
    pub trained: u64,
}

impl Needs {
    /// An estimate, rather too high than too low.
    ///
    /// # Errors
    /// If the model's family cannot be trained, or the adapter's targets are unknown.
    pub fn of(model: &Gguf, spec: &Spec, settings: &Resolved) -> Result<Self, String> {
        let shape =
            Covered::read(model).map_err(|error| format!("it cannot be trained: {error}"))?;
        let all: u64 = model.tensors().iter().map(|tensor| tensor.elements()).sum();
        let layers = shape.layers as u64;
        let trained = match &spec.adapter {
            None => all,
            Some(adapter) => {
                let lora = adapter.lora(spec.seed)?;
                let sides = lora.targets.iter().map(|target| target.shape(&shape));
                let sum: usize = sides.map(|(rows, cols)| rows + cols).sum();
                layers * lora.rank as u64 * sum as u64
            }
        };
        // What a layer keeps of a token for the way back, as `block.rs` computes it.
        let query = (shape.heads * shape.head_dim) as u64;
        let kv = (shape.kv_heads * shape.head_dim) as u64;
        let (width, ff) = (shape.width as u64, shape.ff as u64);
        let layer = 5 * width + 3 * query + 4 * kv + 4 * ff;
        let kept = match settings.activation_checkpointing {
            true => layers * width + 2 * layer,
            false => (layers + 1) * layer,
        };
        let tokens = settings.micro_batch as u64 * settings.max_length as u64;
        let logits = LOGIT_ROWS * shape.vocab as u64;
        let memory =
            PROCESS + model.file_size() + trained * TRAINED_BYTES + 4 * (tokens * kept + logits);
        let exported = if spec.adapter.is_some() { trained * 8 } else { trained * 4 };
        let disk = 2 * trained * CHECKPOINT_BYTES + exported;
        Ok(Self { memory, disk, trained })
    }
}
