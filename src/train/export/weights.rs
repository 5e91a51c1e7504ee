//! A model's current tensors: trained ones, ones with the adapter merged, or the base's.

use super::ExportError;
use super::adapter::{Pair, pairs};
use crate::gguf::{Gguf, can_dequantize};
use crate::job::spec::Lora;
use crate::kernels::gemm::{Mat, product};
use crate::train::model::Model;
use crate::train::optim::Param;
use candle_core::Device;
use std::collections::HashMap;

/// Tensors of a model over its base. A tensor is computed when it is requested.
pub(super) struct Weights<'a> {
    base: &'a Gguf,
    /// Parameters by the tensor to which they belong, in the order of their rows.
    trained: HashMap<&'a str, Vec<&'a Param>>,
    adapted: HashMap<String, Pair<'a>>,
    /// Factor of an adapter's product.
    scale: f32,
}

impl<'a> Weights<'a> {
    pub(super) fn new(
        model: &'a Model,
        lora: Option<&Lora>,
        base: &'a Gguf,
    ) -> Result<Self, ExportError> {
        let mut trained: HashMap<&str, Vec<&Param>> = HashMap::new();
        for param in model.params() {
            let name = param.name.split_once(':').map_or(&param.name[..], |(name, _)| name);
            trained.entry(name).or_default().push(param);
        }
        let of_lora = lora.map(|lora| pairs(model, lora)).transpose()?.unwrap_or_default();
        let named = |pair: Pair<'a>| (format!("{}.weight", pair.tensor), pair);
        let adapted = of_lora.into_iter().map(named).collect();
        let weights =
            Self { base, trained, adapted, scale: lora.map_or(0.0, |lora| lora.scale() as f32) };
        // Checks every tensor first, so that the export does not fail half-way.
        for tensor in base.tensors() {
            if !can_dequantize(tensor.ty()) && !weights.trained.contains_key(tensor.name()) {
                let (name, ty) = (tensor.name(), tensor.ty());
                return Err(ExportError::Other(format!(
                    "`{name}` is of type {ty}, which cannot be read"
                )));
            }
        }
        Ok(weights)
    }

    /// The values of a tensor of the base model, in the base's order.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>, ExportError> {
        let mut values = Vec::new();
        match self.trained.get(name) {
            Some(parts) => {
                for part in parts {
                    let part = part.var.to_device(&Device::Cpu)?;
                    values.extend(part.flatten_all()?.to_vec1::<f32>()?);
                }
            }
            None => values = self.base.to_f32(name)?,
        }
        let expected = self.base.tensor(name).map_or(0, |tensor| tensor.elements());
        if values.len() as u64 != expected {
            return Err(ExportError::Other(format!("`{name}` is not trained as a whole")));
        }
        if let Some(pair) = self.adapted.get(name) {
            let rank = pair.a.len() / pair.inputs;
            let b: Vec<f32> = pair.b.iter().map(|x| x * self.scale).collect();
            let b = Mat::new(&b, pair.outputs, rank);
            let a = Mat::new(&pair.a, rank, pair.inputs);
            product(b, a, &mut values, pair.inputs, 0, true);
        }
        Ok(values)
    }
}
