//! Tiny models compared with training in transformers and PEFT: losses, gradients and trained
//! parameters.

use super::*;
use crate::gguf::{GgufWriter, Projection, TensorType};
use crate::job::spec::Lora;
use crate::job::spec::Optimizer;
use crate::train::optim::Optimization;
use crate::train::torch_tests::{Reference, Trained, hashed, reference, weight};
use std::path::Path;

/// Writes a GGUF with hashed weights.
pub(in crate::train) fn write(reference: &Reference, architecture: &str, path: &Path) {
    let s = &reference.shape;
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", architecture);
    for (key, value) in [
        ("block_count", s.layers),
        ("context_length", 128),
        ("embedding_length", s.width),
        ("feed_forward_length", s.ff),
        ("attention.head_count", s.heads),
        ("attention.head_count_kv", s.kv_heads),
        ("attention.key_length", s.head_dim),
        ("attention.value_length", s.head_dim),
        ("rope.dimension_count", s.head_dim),
    ] {
        writer.set(&format!("{architecture}.{key}"), value);
    }
    let gemma = architecture == "gemma3";
    if gemma {
        writer.set("gemma3.attention.sliding_window", reference.window);
        // The first of two layers has the sliding window.
        writer.set("gemma3.attention.sliding_window_pattern", 2u32);
    }
    writer.set(
        &format!("{architecture}.rope.freq_base"),
        if gemma { 1_000_000f32 } else { 10_000f32 },
    );
    writer.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-5f32);
    let (width, ff, head, vocab) = (s.width, s.ff, s.head_dim, s.vocab);
    let (q, kv) = (s.heads * head, s.kv_heads * head);
    let mut add = |name: String, dims: &[u32]| {
        let count = dims.iter().product::<u32>() as usize;
        let cols = (dims.len() > 1).then(|| dims[0] as usize);
        let dims: Vec<u64> = dims.iter().map(|dim| u64::from(*dim)).collect();
        let values = weight(&name, count, cols);
        writer.tensor_f32(&name, &dims, TensorType::F32, values).unwrap();
    };
    add("token_embd.weight".into(), &[width, vocab]);
    add("output_norm.weight".into(), &[width]);
    if architecture == "llama" {
        add("output.weight".into(), &[width, vocab]);
    }
    for layer in 0..s.layers {
        let mut add = |part: &str, dims: &[u32]| add(format!("blk.{layer}.{part}.weight"), dims);
        add("attn_norm", &[width]);
        add("ffn_norm", &[width]);
        if architecture != "llama" {
            add("attn_q_norm", &[head]);
            add("attn_k_norm", &[head]);
        }
        if gemma {
            add("post_attention_norm", &[width]);
            add("post_ffw_norm", &[width]);
        }
        add("attn_q", &[width, q]);
        add("attn_k", &[width, kv]);
        add("attn_v", &[width, kv]);
        add("attn_output", &[q, width]);
        add("ffn_gate", &[width, ff]);
        add("ffn_up", &[width, ff]);
        add("ffn_down", &[ff, width]);
    }
    writer.write(path).unwrap();
}

/// Two documents of hashed tokens; the third token of the first document has weight 0.
fn batch(step: usize, vocab: u32) -> Batch {
    let (mut tokens, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for (number, length) in [13, 9].into_iter().enumerate() {
        let own: Vec<u32> =
            hashed(&format!("tokens.{step}.{number}"), length).map(|z| z % vocab).collect();
        targets.extend(own[1..].iter().copied().chain([0]));
        let start = tokens.len();
        tokens.extend(own);
        weights.resize(tokens.len(), 1.0);
        weights[start + length - 1] = 0.0;
    }
    weights[2] = 0.0;
    Batch {
        tokens: Arc::new(tokens),
        documents: Arc::new(Documents::starting_at(&[0, 13], 22)),
        targets: Arc::new(targets),
        weights: Arc::new(weights),
    }
}

pub(in crate::train) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Sets PEFT's initial values. Here neither A nor B is zero, so that both have gradients.
pub(in crate::train) fn start(model: &Model) {
    for param in model.params().iter().filter(|param| param.name.contains(".lora_")) {
        let dims = param.var.dims();
        let start = weight(&param.name, dims[0] * dims[1], Some(dims[1]));
        let start: Vec<f32> = start.iter().map(|x| x * 0.5).collect();
        param.var.set(&Tensor::from_vec(start, dims, &Device::Cpu).unwrap()).unwrap();
    }
}

fn compare(reference: &Reference, right: &Trained, checkpoint: bool) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write(reference, &right.architecture, &path);
    let file = Arc::new(Gguf::open(&path).unwrap());
    use Projection::*;
    let targets = vec![Q, K, V, O, Gate, Up, Down];
    let training = match &right.training[..] {
        "full" => Training::Full,
        _ => Training::Lora(Lora {
            rank: 4,
            alpha: 8.0,
            targets,
            rank_stabilized: false,
            dropout: 0.0,
            seed: 0,
        }),
    };
    let model = Model::load(file, &training, 128, &Device::Cpu).unwrap();
    start(&model);
    let mut optimization = Optimization::new(Optimizer::default());
    let of = format!("{}, {}, {checkpoint}", right.architecture, right.training);
    for (step, (loss, norm)) in right.losses.iter().zip(&right.norms).enumerate() {
        let batch = batch(step % 3, reference.shape.vocab);
        let count: f32 = batch.weights.iter().sum();
        let mut gradients = Gradients::default();
        let found = model.train(&batch, Pass { checkpoint, number: 0 }, &mut gradients).unwrap();
        let found = f64::from(found.sum.to_scalar::<f32>().unwrap() / count);
        assert!((found - loss).abs() < 1e-5, "{of}, step {step}: {found}, PyTorch {loss}");
        let grads = gradients.take(model.params()).unwrap();
        if step == 0 {
            assert_eq!(grads.len(), right.grads.len(), "{of}");
            for (param, grad) in model.params().iter().zip(&grads) {
                let mean = values(&(grad / f64::from(count)).unwrap());
                let off = right.grads[&param.name].distance(&param.name, &mean);
                assert!(off < 5e-6, "{of}, {}'s gradient: {off}", param.name);
            }
        }
        let rate = right.learning_rate;
        let stepped = optimization.step(model.params(), &grads, count.into(), rate, 1.0).unwrap();
        assert!((stepped.grad_norm - norm).abs() < 1e-4 * norm, "{of}, step {step}'s norm");
    }
    for param in model.params() {
        let off = right.final_[&param.name].distance(&param.name, &values(&param.var));
        assert!(off < 1e-4, "{of}, {} at the end: {off}", param.name);
    }
}

#[test]
fn tiny_models_train_as_in_pytorch() {
    let reference = reference();
    assert_eq!(reference.models.len(), 6);
    for right in &reference.models {
        for checkpoint in [false, true] {
            compare(&reference, right, checkpoint);
        }
    }
}

/// The output of `scripts/torch_reference.py model` for a real model.
#[derive(serde::Deserialize)]
struct Run {
    rows: Vec<Vec<u32>>,
    documents: Vec<usize>,
    losses: Vec<f64>,
    /// Steps, and the mean loss of the validation rows, which follow the training rows.
    held_out: Vec<(usize, f64)>,
    rank: usize,
    alpha: f64,
    learning_rate: f64,
}

impl Run {
    fn batch(&self, step: usize) -> Batch {
        let tokens = &self.rows[step];
        let mut weights = vec![1.0; tokens.len()];
        let ends = self.documents[1..].iter().copied().chain([tokens.len()]);
        ends.for_each(|end| weights[end - 1] = 0.0);
        Batch {
            tokens: Arc::new(tokens.clone()),
            documents: Arc::new(Documents::starting_at(&self.documents, tokens.len())),
            targets: Arc::new(tokens[1..].iter().copied().chain([0]).collect()),
            weights: Arc::new(weights),
        }
    }
}

/// (rows, vocabulary) logits of one document.
fn logits(model: &Model, tokens: &[u32]) -> Tensor {
    let batch = Batch {
        tokens: Arc::new(tokens.to_vec()),
        documents: Arc::new(Documents::one(tokens.len())),
        targets: Arc::new(vec![0; tokens.len()]),
        weights: Arc::new(vec![1.0; tokens.len()]),
    };
    model.counted_logits(&batch).unwrap()
}

/// Needs a model of 1 GB of memory and PEFT's run on it; afterwards run `torch_reference.py
/// interop`.
#[test]
#[ignore = "needs TORCH_MODEL, and TORCH_FOLDER from scripts/torch_reference.py model"]
fn a_real_model_trains_as_in_peft() {
    let var = |name: &str| std::path::PathBuf::from(std::env::var_os(name).expect(name));
    let (file, folder) = (var("TORCH_MODEL"), var("TORCH_FOLDER"));
    let text = std::fs::read(folder.join("run.json")).unwrap();
    let run: Run = serde_json::from_slice(&text).unwrap();
    use Projection::*;
    let targets = vec![Q, K, V, O, Gate, Up, Down];
    let lora = Lora {
        rank: run.rank,
        alpha: run.alpha,
        targets,
        rank_stabilized: false,
        dropout: 0.0,
        seed: 0,
    };
    let file = Arc::new(Gguf::open(&file).unwrap());
    let model = Model::load(file, &Training::Lora(lora.clone()), 1024, &Device::Cpu).unwrap();
    let read = |name: &str| candle_core::safetensors::load(folder.join(name), &Device::Cpu);
    let (before, after) = (read("before.safetensors").unwrap(), read("after.safetensors").unwrap());
    for param in model.params() {
        param.var.set(&before[&param.name]).unwrap();
    }
    let mut optimization = Optimization::new(Optimizer::default());
    let mut worst = 0.0f64;
    let held_out = |step: usize| {
        let Some((_, right)) = run.held_out.iter().find(|(at, _)| *at == step) else { return 0.0 };
        let rows = run.losses.len()..run.rows.len();
        let count = rows.len() as f64;
        let loss = |row: usize| {
            let batch = run.batch(row);
            let counted: f32 = batch.weights.iter().sum();
            f64::from(model.losses(&batch).unwrap().sum.to_scalar::<f32>().unwrap() / counted)
        };
        let found = rows.map(loss).sum::<f64>() / count;
        println!("held out at step {step}: {found:.5}, PEFT {right:.5}");
        (found - right).abs()
    };
    for (step, right) in run.losses.iter().enumerate() {
        worst = worst.max(held_out(step));
        let batch = run.batch(step);
        let count: f32 = batch.weights.iter().sum();
        let mut gradients = Gradients::default();
        let found = model.train(&batch, Pass::default(), &mut gradients).unwrap();
        let found = f64::from(found.sum.to_scalar::<f32>().unwrap() / count);
        worst = worst.max((found - right).abs());
        println!("step {step}: {found:.5}, PEFT {right:.5}");
        let grads = gradients.take(model.params()).unwrap();
        let rate = run.learning_rate;
        optimization.step(model.params(), &grads, count.into(), rate, 1.0).unwrap();
    }
    worst = worst.max(held_out(run.losses.len()));
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let (mut off, mut moved) = (0.0f32, 0.0f32);
    for param in model.params() {
        let (found, right) = (param.var.as_tensor(), &after[&param.name]);
        off += norm((found - right).unwrap()).powi(2);
        moved += norm((right - &before[&param.name]).unwrap()).powi(2);
    }
    let off = (off / moved).sqrt();
    println!("losses at most {worst:.1e} apart; the adapters' ways {off:.1e} of their length");
    assert!(worst < 1e-3 && off < 0.05);
    crate::train::export::peft_folder(&model, &lora, "base", &folder.join("ours")).unwrap();
    let logits = logits(&model, &run.rows[0][..run.documents[1]]);
    let logits = std::collections::HashMap::from([("logits", logits)]);
    candle_core::safetensors::save(&logits, folder.join("logits.safetensors")).unwrap();
}
