//! LoRA adapters for the native runner, read from llama.cpp's LoRA GGUF.

use super::super::{AdapterHandle, AdapterLoader, RunnerError};
use crate::gguf::{Gguf, ModelConfig, PROJECTIONS, Projection, rows_of};
use crate::kernels::LoraPair;
use std::ops::Range;
use std::path::Path;

/// An adapter in the layout of the kernels.
pub struct Adapter {
    layers: Vec<[Option<LoraPair>; PROJECTIONS]>,
    /// LoRA of the output matrix.
    pub head: Option<LoraPair>,
}

impl Adapter {
    pub fn pair(&self, layer: usize, target: Projection) -> Option<&LoraPair> {
        self.layers[layer][target as usize].as_ref()
    }

    fn read(path: &Path, scale: f32, shape: &ModelConfig) -> Result<Self, String> {
        let file = Gguf::open(path).map_err(|error| error.to_string())?;
        let alpha = file.f32("adapter.lora.alpha").map_err(|error| error.to_string())?;
        let mut layers = Vec::new();
        layers.resize_with(shape.layers, Default::default);
        let mut adapter = Self { layers, head: None };
        for tensor in file.tensors() {
            let Some(base) = tensor.name().strip_suffix(".lora_a") else { continue };
            let factors = Factors::read(&file, base, alpha, scale)?;
            adapter.install(base, &factors, shape)?;
        }
        Ok(adapter)
    }

    /// Installs the LoRA of the tensor `base`; splits it if the tensor holds several matrices.
    fn install(
        &mut self,
        base: &str,
        factors: &Factors,
        shape: &ModelConfig,
    ) -> Result<(), String> {
        let refused = || format!("the native runner cannot adapt `{base}`");
        if base == "output.weight" {
            self.head = Some(factors.pair(base, 0..shape.vocab, shape.vocab, shape.width)?);
            return Ok(());
        }
        let parts: Vec<_> = base.split('.').collect();
        let &["blk", layer, part, "weight"] = &parts[..] else { return Err(refused()) };
        let layer = layer.parse::<usize>().ok().and_then(|layer| self.layers.get_mut(layer));
        let layer = layer.ok_or_else(refused)?;
        let targets = rows_of(part, shape);
        let total = targets.last().ok_or_else(refused)?.1.end;
        for (target, rows) in targets {
            let pair = factors.pair(base, rows, total, target.shape(shape).1)?;
            layer[target as usize] = Some(pair);
        }
        Ok(())
    }
}

/// The two matrices of a LoRA as stored in the file.
struct Factors {
    rank: usize,
    /// (rank, columns)
    a: Vec<f32>,
    /// (rows, rank)
    b: Vec<f32>,
    scale: f32,
}

impl Factors {
    fn read(file: &Gguf, base: &str, alpha: Option<f32>, scale: f32) -> Result<Self, String> {
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
        // As in llama.cpp: without an alpha the scale is used unchanged.
        let alpha = alpha.filter(|alpha| *alpha != 0.0);
        let scale = alpha.map_or(scale, |alpha| scale * alpha / rank as f32);
        Ok(Self { rank, a, b, scale })
    }

    /// The LoRA of some rows of a tensor of `total` rows and `cols` columns.
    fn pair(
        &self,
        base: &str,
        rows: Range<usize>,
        total: usize,
        cols: usize,
    ) -> Result<LoraPair, String> {
        let Self { rank, a, b, scale } = self;
        if (a.len() / rank, b.len() / rank) != (cols, total) {
            return Err(format!("`{base}` does not fit a matrix of {total} by {cols}"));
        }
        Ok(LoraPair::new(*rank, a, &b[rows.start * rank..rows.end * rank], *scale))
    }
}

/// Reads adapter files on a thread beside the step loop.
pub(super) struct Loader {
    shape: ModelConfig,
}

impl Loader {
    pub(super) fn new(shape: &ModelConfig) -> Self {
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
