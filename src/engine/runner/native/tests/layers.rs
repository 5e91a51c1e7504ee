//! Compares single layers with llama.cpp's, each given llama.cpp's own input.

use super::families::{random_tokens, write};
use super::*;
use crate::engine::runner::native::forward::plans;
use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{GgufWriter, TensorType};
use std::path::Path;

/// Tolerance of a layer's contribution to the residual stream, relative in the Euclidean norm over
/// some sixty rows. With F32 weights only f16 roundings remain: of keys and values in both runners,
/// of queries, softmax weights and GELU's argument in llama.cpp (2^-11 = 5e-4 each).
const EXACT: f64 = 1e-3;

/// Computes chunks of `tokens` layer by layer; returns the largest distance of any layer.
fn distance(path: &Path, tokens: &[Token]) -> f64 {
    let mut native = Native::load(&spec(path.into(), RunnerKind::Native)).unwrap();
    let mut oracle = llama_cpp::Watched::load(&spec(path.into(), RunnerKind::LlamaCpp)).unwrap();
    let (mut worst, pages) = (0f64, (0..64).collect::<Vec<u32>>());
    for (piece, tokens) in tokens.chunks(60).enumerate() {
        let (position, rows) = (60 * piece, tokens.len());
        let sequences = vec![part(0..rows, position, 0, Wants::AllLogits)];
        let batch = Batch { tokens: tokens.to_vec(), sequences, adapter: None };
        let theirs = oracle.layers(&batch).unwrap();
        let span = Span { rows: 0..rows, position, pages: pages.clone() };
        let spans = [span];
        let rows = Rows { tokens, spans: &spans, wanted: &[], adapted: &[] };
        let Native { forward, weights, cache, pool, .. } = &mut native;
        let pool = &mut *pool.borrow_mut();
        assert_eq!(theirs.len(), weights.layers.len(), "every layer was seen");
        forward.begin(weights, &rows).unwrap();
        let plans = plans(weights, &spans, pool.threads());
        for (number, theirs) in theirs.into_iter().enumerate() {
            let input = forward.x.clone();
            forward.layer(weights, cache, pool, &rows, &plans, number);
            let norm = |x: &[f32], y: &[f32]| {
                let squares = x.iter().zip(y).map(|(a, b)| f64::from(a - b) * f64::from(a - b));
                squares.sum::<f64>().sqrt()
            };
            worst = worst.max(norm(&forward.x, &theirs) / norm(&theirs, &input));
            forward.x = theirs;
        }
    }
    worst
}

fn check(name: &str, path: &Path, tokens: &[Token], bound: f64) {
    let worst = distance(path, tokens);
    println!("{name}: {worst:.1e}");
    assert!(worst < bound, "{name}: a layer is {worst} off");
}

#[test]
fn of_every_family() {
    for architecture in ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"] {
        let model = TinyDecoder { layers: 7, ..TinyDecoder::new(architecture) };
        let window = if architecture.starts_with("gemma") { 70u32 } else { 0 };
        let (_folder, path) = write(&model.key("attention.sliding_window", window));
        check(architecture, &path, &random_tokens(140), EXACT);
    }
}

/// Writes a model's first layers with their matrices in F32; embedding and head stay as they are.
fn exact_layers(model: &Path, layers: u32, to: &Path) {
    let file = Gguf::open(model).unwrap();
    let mut w = GgufWriter::new();
    let count = format!("{}.block_count", file.str("general.architecture").unwrap().unwrap());
    w.copy_metadata(&file, |key| key != count).set(&count, layers);
    for tensor in file.tensors() {
        let name = tensor.name();
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
        match layer.map(|layer| layer.parse::<u32>().unwrap()) {
            Some(layer) if layer < layers => {
                let values = file.to_f32(name).unwrap();
                w.tensor_f32(name, tensor.dims(), TensorType::F32, values).unwrap();
            }
            Some(_) => {}
            None => {
                let data = file.data(name).unwrap();
                w.tensor(name, tensor.dims(), tensor.ty(), data).unwrap();
            }
        }
    }
    w.write(to).unwrap();
}

/// Checks the layers in F32 and as stored. With quantized weights both runners round the
/// activations to 8 bits, with different methods: an error of about a hundredth for each of a
/// layer's four products.
fn check_model(name: &str, model: &Path, layers: u32, count: usize, stored: f64) {
    let native = Native::load(&spec(model.into(), RunnerKind::Native)).unwrap();
    let tokens = native.tokenizer().encode(TEXT, false, false);
    let tokens: Vec<_> = tokens.into_iter().cycle().take(count).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("exact.gguf");
    exact_layers(model, layers, &path);
    check(&format!("{name} in F32"), &path, &tokens, EXACT);
    check(&format!("{name} as stored"), model, &tokens, stored);
}

#[test]
fn of_smollm2() {
    let Some(model) = model() else { return };
    check_model("SmolLM2", &model, 4, 120, 3e-2);
}

/// Gemma 3 270M, if `INGOT_TEST_GEMMA` names its file; beyond its window of 512 tokens. As stored
/// its error is five times that of SmolLM2, but not in F32. The cause is not known: possibly that
/// two of its matrices are K types, for which llama.cpp rounds 256 activations with one scale.
#[test]
fn of_gemma3() {
    let Some(model) = std::env::var_os("INGOT_TEST_GEMMA") else {
        println!("skipped: INGOT_TEST_GEMMA is not set");
        return;
    };
    check_model("Gemma 3 270M", Path::new(&model), 6, 640, 8e-2);
}
