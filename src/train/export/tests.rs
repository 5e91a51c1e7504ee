//! What is written, read back.

use super::*;
use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{Gguf, TensorType};
use crate::gguf::{ModelFacts, Target, peft_to_gguf};
use crate::train::model::{Batch, Lora, Model, Training};
use candle_core::{Device, Tensor};
use std::sync::Arc;

fn lora() -> Lora {
    use Target::*;
    let targets = vec![Q, K, V, Output, Gate, Up, Down];
    Lora { rank: 4, alpha: 6.0, targets, rank_stabilized: true, seed: 5 }
}

fn model(file: &Arc<Gguf>, training: &Training) -> Model {
    let model = Model::load(file.clone(), training, 64, &Device::Cpu).unwrap();
    for (i, param) in model.params().iter().enumerate() {
        let count = param.var.elem_count();
        let values: Vec<f32> =
            (0..count).map(|j| ((i * 7 + j * 13) % 23) as f32 / 200.0 - 0.05).collect();
        if param.name.ends_with("lora_b") {
            let moved = Tensor::from_vec(values, param.var.shape(), &Device::Cpu).unwrap();
            param.var.set(&moved).unwrap();
        }
    }
    model
}

fn loss(model: &Model) -> f64 {
    let example = crate::train::data::Encoded {
        tokens: (0..40).map(|i| i * 11 % TinyDecoder::vocab()).collect(),
        trained: vec![true; 40],
    };
    let sum = model.losses(&Batch::of([&example])).unwrap().sum;
    sum.to_dtype(candle_core::DType::F64).unwrap().to_scalar().unwrap()
}

#[test]
fn a_peft_folder_becomes_the_same_gguf() {
    for architecture in ["llama", "qwen2"] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        TinyDecoder { heads: 4, kv_heads: 2, ..TinyDecoder::new(architecture) }
            .write(&path("base.gguf"))
            .unwrap();
        let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
        let model = model(&base, &Training::Lora(lora()));
        lora_gguf(&model, &lora(), &[("general.name", "x".into())], &path("ours.gguf")).unwrap();
        peft_folder(&model, &lora(), "base", &path("peft")).unwrap();
        let facts = ModelFacts::read(&base).unwrap();
        peft_to_gguf(&path("peft"), &facts, &base, &path("theirs.gguf")).unwrap();
        let [ours, theirs] =
            ["ours.gguf", "theirs.gguf"].map(|name| Gguf::open(path(name)).unwrap());
        assert_eq!(ours.tensors().len(), theirs.tensors().len());
        for tensor in ours.tensors() {
            let name = tensor.name();
            let (a, b) = (ours.to_f32(name).unwrap(), theirs.to_f32(name).unwrap());
            assert_eq!(a, b, "{architecture}: {name}");
        }
        let alpha = |file: &Gguf| file.f32("adapter.lora.alpha").unwrap();
        assert_eq!(alpha(&ours), alpha(&theirs));
    }
}

#[test]
fn a_merged_model_has_the_adapters_loss() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("llama").write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let model = model(&base, &Training::Lora(lora()));
    model_gguf(&model, Some(&lora()), &base, TensorType::F32, &[], &path("merged.gguf")).unwrap();
    let merged = Arc::new(Gguf::open(path("merged.gguf")).unwrap());
    let whole = Model::load(merged.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    let (adapted, merged_loss) = (loss(&model), loss(&whole));
    assert!((adapted - merged_loss).abs() < 1e-4 * adapted, "{adapted}, {merged_loss}");
    // What was trained is what is written.
    model_gguf(&whole, None, &merged, TensorType::F32, &[], &path("again.gguf")).unwrap();
    let again = Gguf::open(path("again.gguf")).unwrap();
    for tensor in merged.tensors() {
        assert_eq!(merged.to_f32(tensor.name()).unwrap(), again.to_f32(tensor.name()).unwrap());
    }
}
