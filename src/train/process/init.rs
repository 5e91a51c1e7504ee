//! Sets up the trained parameters and their initial values.

use crate::gguf::{Gguf, ModelFacts, check_lora_gguf, peft_to_gguf, score_head};
use crate::job::spec::{Lora, TrainDevice};
use crate::job::{Folder, Order};
use crate::job::{JobFailure, failed};
use crate::train::export::{begin_with, lora_of};
use crate::train::model::{Model, SCORE, Training};
use crate::train::random_init::normal;
use crate::train::recipes::Recipe;
use candle_core::Device;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::path::PathBuf;
use std::sync::Arc;

/// Separates the random numbers of the score head from others of the same seed.
const HEAD: u64 = 0x7363_6f72_6500;

/// The initial adapter as GGUF.
fn adapter_file(folder: &Folder, order: &Order) -> Option<PathBuf> {
    let init = order.init.as_ref()?;
    Some(if init.is_dir() { folder.cache().join("init.gguf") } else { init.clone() })
}

pub(super) fn training(
    folder: &Folder,
    order: &Order,
    base: &Gguf,
) -> Result<Training, JobFailure> {
    let spec = &order.spec;
    let Some(adapter) = &spec.adapter else { return Ok(Training::Full) };
    let invalid = |why: &dyn std::fmt::Display| {
        failed("invalid_spec", None, format!("adapter.init cannot be used: {why}"))
    };
    let Some(file) = adapter_file(folder, order) else {
        let lora = adapter.lora(spec.seed);
        return lora.map(Training::Lora).map_err(|why| failed("invalid_spec", None, why));
    };
    let info = match &order.init {
        Some(init) if init.is_dir() => {
            std::fs::create_dir_all(folder.cache())?;
            let facts = ModelFacts::read(base)?;
            peft_to_gguf(init, &facts, base, &file).map_err(|why| invalid(&why))?
        }
        _ => check_lora_gguf(&file, base).map_err(|why| invalid(&why))?,
    };
    let lora = lora_of(&info, spec.seed).map_err(|why| invalid(&why))?;
    Ok(Training::Lora(Lora { dropout: adapter.dropout, ..lora }))
}

/// The model with its initial weights.
pub(super) fn model(
    recipe: &impl Recipe,
    folder: &Folder,
    order: &Order,
    base: &Arc<Gguf>,
    training: &Training,
    max_length: usize,
    device: &Device,
) -> Result<Model, JobFailure> {
    let mut model = Model::load(base.clone(), training, max_length, device)?;
    if let Some(name) = recipe.head() {
        let width = model.shape().width;
        // A value head predicts nothing at first; a score head has to tell texts apart.
        let start = match name {
            SCORE => score_head_weights(folder, order, width)?,
            _ => vec![0.0; width],
        };
        model = model.with_head(name, start)?;
    }
    if let (Training::Lora(_), Some(adapter)) = (training, adapter_file(folder, order)) {
        begin_with(&model, &adapter)?;
    }
    Ok(model)
}

/// The device of the trained weights and of the arithmetic.
pub(super) fn device(wanted: TrainDevice) -> Result<Device, JobFailure> {
    let found = candle_core::utils::cuda_is_available();
    match wanted {
        TrainDevice::Cpu => Ok(Device::Cpu),
        TrainDevice::Auto if !found => Ok(Device::Cpu),
        TrainDevice::Auto | TrainDevice::Cuda => Device::new_cuda(0).map_err(|why| {
            let why = format!("train.device: the CUDA device cannot be used: {why}");
            failed("device_unavailable", Some("train.device"), why)
        }),
    }
}

/// Initial weights of a reward model's score head: those of the initial adapter, or small random
/// numbers from the seed (Stiennon et al. 2020, arXiv:2009.01325: normal with variance 1/(width +
/// 1)).
fn score_head_weights(
    folder: &Folder,
    order: &Order,
    width: usize,
) -> Result<Vec<f32>, JobFailure> {
    if let Some(file) = adapter_file(folder, order)
        && let Some(head) = score_head(&Gguf::open(&file)?)
    {
        return match head.len() == width {
            true => Ok(head),
            false => {
                Err(failed("invalid_spec", None, "adapter.init: its head is of another width"))
            }
        };
    }
    let mut rng = StdRng::seed_from_u64(order.spec.seed ^ HEAD);
    let deviation = 1.0 / (width as f64 + 1.0).sqrt();
    Ok((0..width).map(|_| (deviation * normal(&mut rng)) as f32).collect())
}
