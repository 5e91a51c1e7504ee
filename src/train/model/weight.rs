//! Weight matrices: frozen, frozen with LoRA, or trained.

use crate::gguf::{Gguf, Projection};
use crate::job::spec::Lora;
use crate::train::ops::{self, Draw, Frozen};
use crate::train::optim::Param;
use candle_core::{Device, Result, Tensor, Var, bail};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::sync::Arc;

/// Which parameters of a model are trained.
#[derive(Debug, Clone)]
pub enum Training {
    /// All weights, in f32.
    Full,
    /// LoRA matrices; the model's own weights are frozen.
    Lora(Lora),
}

/// A matrix (outputs, inputs).
pub(super) enum Weight {
    Frozen(Arc<Frozen>),
    Lora { base: Arc<Frozen>, a: Tensor, b: Tensor, scale: f64, dropout: Draw },
    Trained(Tensor),
}

impl Weight {
    /// (rows, outputs) of `x` (rows, inputs). `pass` is the number of the training pass and seeds
    /// dropout; without it nothing is dropped.
    pub(super) fn forward(&self, x: &Tensor, pass: Option<u64>) -> Result<Tensor> {
        match (self, pass) {
            (Self::Frozen(base), _) => ops::frozen_linear(x, base),
            (Self::Lora { base, a, b, scale, dropout }, Some(pass)) if dropout.rate > 0.0 => {
                let draw = Draw { key: ops::mixed(dropout.key, pass), ..*dropout };
                let low = ops::linear(&ops::dropout(x, draw)?, a)?;
                let beside = ops::linear(&ops::scale(&low, *scale)?, b)?;
                ops::add(&ops::frozen_linear(x, base)?, &beside)
            }
            (Self::Lora { base, a, b, scale, .. }, _) => ops::lora_linear(x, base, a, b, *scale),
            (Self::Trained(weight), _) => ops::linear(x, weight),
        }
    }
}

/// Creates weights from the tensors of a file, and collects the parameters.
pub(super) struct Builder<'a> {
    file: Arc<Gguf>,
    training: &'a Training,
    device: &'a Device,
    params: Vec<Param>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(file: Arc<Gguf>, training: &'a Training, device: &'a Device) -> Self {
        Self { file, training, device, params: Vec::new() }
    }

    pub(super) fn params(self) -> Vec<Param> {
        self.params
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// Some rows of a tensor as a matrix. `part` names the rows if the tensor also contains other
    /// matrices.
    pub(super) fn matrix(
        &mut self,
        name: &str,
        part: Option<&str>,
        target: Projection,
        rows: Range<usize>,
    ) -> Result<Weight> {
        let base = Frozen::new(self.file.clone(), name, rows)?;
        let own = part.map_or(name.to_owned(), |part| format!("{name}:{part}"));
        match self.training {
            Training::Full => {
                let mut values = Vec::<f32>::new();
                base.decode(0..base.outputs(), &mut values)?;
                let shape = (base.outputs(), base.inputs());
                let weight = Tensor::from_vec(values, shape, self.device)?;
                Ok(Weight::Trained(self.param(own, &weight, true, true)?))
            }
            Training::Lora(lora) if lora.targets.contains(&target) => {
                let (inputs, outputs, scale) = (base.inputs(), base.outputs(), lora.scale());
                let a = initial_a(lora, &own, inputs, self.device)?;
                let b = Tensor::zeros((outputs, lora.rank), candle_core::DType::F32, self.device)?;
                let a = self.param(format!("{own}.lora_a"), &a, true, true)?;
                let b = self.param(format!("{own}.lora_b"), &b, true, true)?;
                let (key, rate) = (drawn(lora, &own, "dropout").next_u64(), lora.dropout);
                let (base, dropout) = (Arc::new(base), Draw { key, rate });
                Ok(Weight::Lora { base, a, b, scale, dropout })
            }
            Training::Lora(_) => Ok(Weight::Frozen(Arc::new(base))),
        }
    }

    /// A norm's weights or a bias: trained if all weights are trained.
    pub(super) fn vector(&mut self, name: &str) -> Result<Tensor> {
        let values = self.file.to_f32(name).map_err(candle_core::Error::wrap)?;
        let len = values.len();
        let vector = Tensor::from_vec(values, len, self.device)?;
        match self.training {
            Training::Full => self.param(name.to_owned(), &vector, false, false),
            Training::Lora(_) => Ok(vector),
        }
    }

    /// A whole matrix that is trained.
    pub(super) fn trained(&mut self, name: &str, hidden: bool) -> Result<Tensor> {
        let Some(tensor) = self.file.tensor(name) else { bail!("the file has no tensor `{name}`") };
        let &[cols, rows] = tensor.dims() else { bail!("`{name}` is not a matrix") };
        let values = self.file.to_f32(name).map_err(candle_core::Error::wrap)?;
        let weight = Tensor::from_vec(values, (rows as usize, cols as usize), self.device)?;
        self.param(name.to_owned(), &weight, true, hidden)
    }

    fn param(
        &mut self,
        name: String,
        start: &Tensor,
        decays: bool,
        hidden: bool,
    ) -> Result<Tensor> {
        let var = Var::from_tensor(start)?;
        let tensor = var.as_tensor().clone();
        self.params.push(Param { name, var, decays, hidden });
        Ok(tensor)
    }
}

/// A random generator seeded by the seed, the tensor's name and the purpose `what`, so that it does
/// not depend on other tensors.
fn drawn(lora: &Lora, name: &str, what: &str) -> StdRng {
    let mut hash = Sha256::new();
    hash.update(lora.seed.to_le_bytes());
    hash.update(name);
    hash.update(what);
    StdRng::from_seed(hash.finalize().into())
}

/// (rank, inputs) uniform within ±1/√inputs, as in PEFT's Kaiming initialization with a = √5.
fn initial_a(lora: &Lora, name: &str, inputs: usize, device: &Device) -> Result<Tensor> {
    let mut rng = drawn(lora, name, "");
    let bound = 1.0 / (inputs as f32).sqrt();
    let values: Vec<f32> =
        (0..lora.rank * inputs).map(|_| rng.random_range(-bound..bound)).collect();
    Tensor::from_vec(values, (lora.rank, inputs), device)
}
