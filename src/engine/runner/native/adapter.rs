//! LoRA adapters, from llama.cpp's LoRA GGUF.

use super::super::{AdapterHandle, AdapterLoader, RunnerError};
use crate::gguf::{Covered, Gguf};
use crate::kernels::ops::LoraPair;
use std::path::Path;

/// The matrices of a layer that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Q,
    K,
    V,
    Output,
    Gate,
    Up,
    Down,
}

const TARGETS: [(Target, &str); 7] = [
    (Target::Q, "attn_q"),
    (Target::K, "attn_k"),
    (Target::V, "attn_v"),
    (Target::Output, "attn_output"),
    (Target::Gate, "ffn_gate"),
    (Target::Up, "ffn_up"),
    (Target::Down, "ffn_down"),
];

/// An adapter, ready for the kernels.
pub struct Adapter {
    layers: Vec<[Option<LoraPair>; TARGETS.len()]>,
    /// Of the output matrix.
    pub head: Option<LoraPair>,
}

impl Adapter {
    pub fn pair(&self, layer: usize, target: Target) -> Option<&LoraPair> {
        self.layers[layer][target as usize].as_ref()
    }

    /// Whether it changes a layer's gate or up matrix.
    pub fn gates(&self, layer: usize) -> bool {
        self.pair(layer, Target::Gate).is_some() || self.pair(layer, Target::Up).is_some()
    }

    fn read(path: &Path, scale: f32, shape: &Covered) -> Result<Self, String> {
        let file = Gguf::open(path).map_err(|error| error.to_string())?;
        let alpha = file.f32("adapter.lora.alpha").map_err(|error| error.to_string())?;
        let mut layers = Vec::new();
        layers.resize_with(shape.layers, Default::default);
        let mut adapter = Self { layers, head: None };
        for tensor in file.tensors() {
            let Some(base) = tensor.name().strip_suffix(".lora_a") else { continue };
            let pair = read_pair(&file, base, alpha, scale)?;
            let (place, rows, cols) = adapter.place(base, shape)?;
            if pair.shape() != (rows, cols) {
                return Err(format!("`{base}` does not fit a matrix of {rows} by {cols}"));
            }
            *place = Some(pair);
        }
        Ok(adapter)
    }

    /// Where the LoRA of the tensor `base` belongs, and rows and columns of that tensor.
    fn place(
        &mut self,
        base: &str,
        shape: &Covered,
    ) -> Result<(&mut Option<LoraPair>, usize, usize), String> {
        let refused = || format!("the native runner cannot adapt `{base}`");
        if base == "output.weight" {
            return Ok((&mut self.head, shape.vocab, shape.width));
        }
        let parts: Vec<_> = base.split('.').collect();
        let &["blk", layer, part, "weight"] = &parts[..] else { return Err(refused()) };
        let target = TARGETS.iter().find(|(_, name)| *name == part).ok_or_else(refused)?.0;
        let layer = layer.parse::<usize>().ok().and_then(|layer| self.layers.get_mut(layer));
        let place = &mut layer.ok_or_else(refused)?[target as usize];
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let (rows, cols) = match target {
            Target::Q => (q, shape.width),
            Target::K | Target::V => (kv, shape.width),
            Target::Output => (shape.width, q),
            Target::Gate | Target::Up => (shape.ff, shape.width),
            Target::Down => (shape.width, shape.ff),
        };
        Ok((place, rows, cols))
    }
}

fn read_pair(file: &Gguf, base: &str, alpha: Option<f32>, scale: f32) -> Result<LoraPair, String> {
    let read = |half: &str| {
        let values = file.to_f32(&format!("{base}.{half}"));
        values.map_err(|error| error.to_string())
    };
    let (a, b) = (read("lora_a")?, read("lora_b")?);
    let dims = file.tensor(&format!("{base}.lora_b")).map(|tensor| tensor.dims()[0]);
    let rank = dims.unwrap_or(0) as usize;
    if rank == 0 || !a.len().is_multiple_of(rank) || !b.len().is_multiple_of(rank) {
        return Err(format!("the LoRA of `{base}` has no rank"));
    }
    // As llama.cpp: without an alpha the scale stands alone.
    let alpha = alpha.filter(|alpha| *alpha != 0.0);
    let scale = alpha.map_or(scale, |alpha| scale * alpha / rank as f32);
    Ok(LoraPair::new(rank, &a, &b, scale))
}

/// Reads adapter files beside the step loop.
pub struct Loader {
    shape: Covered,
}

impl Loader {
    pub fn new(shape: &Covered) -> Self {
        Self { shape: shape.clone() }
    }
}

impl AdapterLoader for Loader {
    fn prepare(&self, path: &Path, scale: f32) -> Result<AdapterHandle, RunnerError> {
        let adapter = Adapter::read(path, scale, &self.shape);
        let adapter = adapter
            .map_err(|error| RunnerError(format!("the adapter {}: {error}", path.display())))?;
        Ok(AdapterHandle::Native(adapter))
    }
}
