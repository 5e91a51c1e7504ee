//! Each operation compared with PyTorch's result and gradients on the same numbers.

use super::tests::values_and_gradients;
use super::*;
use crate::gguf::{Gating, Gguf, GgufWriter, TensorType};
use crate::train::torch_tests::{Operation, reference, uniform, weight};
use candle_core::{DType, Device, Result, Tensor};
use std::sync::Arc;

fn tensor(name: &str, dims: &[usize], scale: f64) -> Tensor {
    let values = uniform(name, dims.iter().product());
    let values: Vec<f64> = values.iter().map(|x| x * scale).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn close(name: &str, found: &Tensor, right: &[f64], bound: f64) {
    let found = found.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    let found = found.to_vec1::<f64>().unwrap();
    assert_eq!(found.len(), right.len(), "{name}");
    let size = right.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    for (at, (found, right)) in found.iter().zip(right).enumerate() {
        assert!((found - right).abs() <= bound * size, "{name}, {at}: {found}, PyTorch {right}");
    }
}

/// Compares in f64, to the digits that the file has, and in f32.
fn check(name: &str, right: &Operation, args: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    for (ty, bound) in [(DType::F64, 1e-8), (DType::F32, 2e-6)] {
        let args: Vec<Tensor> = args.iter().map(|arg| arg.to_dtype(ty).unwrap()).collect();
        let grad_of =
            |out: &Tensor| tensor(&format!("{name}.grad"), out.dims(), 1.0).to_dtype(ty).unwrap();
        let (out, grads) = values_and_gradients(&args, &f, grad_of);
        close(name, &out, &right.out, bound);
        assert_eq!(grads.len(), right.grads.len(), "{name}");
        for (at, (grad, right)) in grads.iter().zip(&right.grads).enumerate() {
            close(&format!("{name}, argument {at}"), grad, right, bound);
        }
    }
}

/// The frozen matrix of the reference: (10, 32).
fn base() -> Arc<Frozen> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.gguf");
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", "llama");
    let values = weight("lora.base", 320, Some(32));
    writer.tensor_f32("w", &[32, 10], TensorType::F32, values).unwrap();
    writer.write(&path).unwrap();
    Arc::new(Frozen::new(Arc::new(Gguf::open(&path).unwrap()), "w", 0..10).unwrap())
}

fn turned(halves: bool) -> Rotation {
    let angle = |row: usize, pair: usize| row as f64 * 10_000f64.powf(-(pair as f64) / 4.0);
    let angles = (0..28).map(|i| angle(i / 4, i % 4)).map(|x| (x.cos(), x.sin())).collect();
    Rotation { angles: Arc::new(angles), pairs: 4, halves }
}

#[test]
fn operations_are_pytorchs() {
    let all = reference().operations;
    let base = base();
    for (name, right) in &all {
        let check = |args: &[Tensor], f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            check(name, right, args, f);
        };
        match &name[..] {
            "rms_norm" => {
                check(&[tensor("norm.x", &[5, 24], 1.0), tensor("norm.w", &[24], 1.0)], &|a| {
                    rms_norm(&a[0], &a[1], 1e-5)
                })
            }
            "rope.halves" | "rope.neighbours" => {
                let rotation = turned(name == "rope.halves");
                check(&[tensor("rope.x", &[7, 3, 8], 1.0)], &|a| rotate(&a[0], &rotation));
            }
            "swiglu" | "geglu" => {
                let act = if name == "swiglu" { Gating::Silu } else { Gating::Gelu };
                let args = [tensor("gate", &[4, 20], 4.0), tensor("up", &[4, 20], 1.0)];
                check(&args, &|a| gated(&a[0], &a[1], act));
            }
            "attention.documents" | "attention.window" | "attention.cap" => {
                let documents = match right.documents.is_empty() {
                    true => Documents::one(70),
                    false => Documents::starting_at(&right.documents, 70),
                };
                let (window, cap) = (right.window, right.cap);
                let documents = Arc::new(documents);
                let scope = Scope { documents, queries: None, scale: 0.6, window, cap };
                let args = [("q", 2), ("k", 1), ("v", 1)];
                let args = args.map(|(which, heads)| {
                    tensor(&format!("attention.{which}"), &[70, heads, 4], 1.0)
                });
                check(&args, &|a| attention(&a[0], &a[1], &a[2], &scope));
            }
            "linear" => check(
                &[tensor("linear.x", &[6, 32], 1.0), tensor("linear.w", &[10, 32], 1.0)],
                &|a| linear(&a[0], &a[1]),
            ),
            "lora_linear" => {
                let x = tensor("linear.x", &[6, 32], 1.0);
                let args = [x, tensor("lora.a", &[3, 32], 1.0), tensor("lora.b", &[10, 3], 1.0)];
                check(&args, &|a| lora_linear(&a[0], &base, &a[1], &a[2], 0.7));
            }
            "embedding" => {
                let tokens = Arc::new(right.tokens.clone());
                check(&[tensor("embedding.table", &[9, 6], 1.0)], &|a| embedding(&a[0], &tokens));
            }
            "cross_entropy" | "cross_entropy.cap" => {
                let targets = Targets {
                    tokens: Arc::new((0..12).map(|i| i * 5 % 17).collect()),
                    weights: Arc::new((0..12).map(|i| [0.0, 1.0, 0.5][i % 3]).collect()),
                    cap: right.cap,
                    temperature: 1.0,
                };
                let args =
                    [tensor("loss.hidden", &[12, 32], 1.0), tensor("loss.head", &[17, 32], 1.0)];
                check(&args, &|a| {
                    let head = Head::Trained(a[1].clone());
                    linear_cross_entropy(&a[0], &head, &targets).map(|losses| losses.sum)
                });
            }
            other => panic!("`{other}` is in the file, and nothing compares it"),
        }
    }
    assert_eq!(all.len(), 13);
}
