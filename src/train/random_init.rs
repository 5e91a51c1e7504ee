//! Models with random weights for pretraining: Llama's architecture (Touvron et al. 2023,
//! arXiv:2302.13971), in F32.

use super::tokenizer_training::Vocabulary;
use crate::gguf::{GgufError, GgufWriter, TensorType};
use crate::job::spec::Shape;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::path::Path;

/// Standard deviation of weights, except for those that write to the residual stream (Radford et
/// al. 2019, GPT-2).
const DEVIATION: f64 = 0.02;
/// Numbers that are generated before they are written.
const CHUNK: usize = 1 << 14;
const EPSILON: f32 = 1e-5;

/// Writes a model of this shape with random weights from the seed. The same arguments give the same
/// file. Returns its size in bytes.
///
/// # Errors
/// If the file cannot be written; no incomplete file is left.
pub fn write(
    shape: &Shape,
    vocabulary: &Vocabulary,
    name: &str,
    seed: u64,
    path: &Path,
) -> Result<u64, GgufError> {
    let mut writer = GgufWriter::new();
    let head = (shape.width / shape.heads) as u32;
    writer
        .set("general.architecture", "llama")
        .set("general.type", "model")
        .set("general.name", name)
        // LLAMA_FTYPE_ALL_F32
        .set("general.file_type", 0u32)
        .set("llama.block_count", shape.layers as u32)
        .set("llama.context_length", shape.context as u32)
        .set("llama.embedding_length", shape.width as u32)
        .set("llama.feed_forward_length", shape.ffn as u32)
        .set("llama.attention.head_count", shape.heads as u32)
        .set("llama.attention.head_count_kv", shape.kv_heads as u32)
        .set("llama.attention.layer_norm_rms_epsilon", EPSILON)
        .set("llama.rope.freq_base", shape.rope_theta as f32)
        .set("llama.rope.dimension_count", head)
        .set("llama.vocab_size", vocabulary.len() as u32);
    for (key, value) in vocabulary.keys() {
        writer.set(key, value.clone());
    }
    let (width, kv) = (shape.width, shape.kv_heads * head as usize);
    // Each of the two residual additions of a layer increases the variance of the residual stream.
    let output = DEVIATION / (2.0 * shape.layers as f64).sqrt();
    matrix(&mut writer, "token_embd.weight", [width, vocabulary.len()], DEVIATION, seed)?;
    if !shape.tied {
        matrix(&mut writer, "output.weight", [width, vocabulary.len()], DEVIATION, seed)?;
    }
    norm(&mut writer, "output_norm.weight", width)?;
    for layer in 0..shape.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        for part in ["attn_norm", "ffn_norm"] {
            norm(&mut writer, &name(part), width)?;
        }
        for (part, dims, deviation) in [
            ("attn_q", [width, width], DEVIATION),
            ("attn_k", [width, kv], DEVIATION),
            ("attn_v", [width, kv], DEVIATION),
            ("attn_output", [width, width], output),
            ("ffn_gate", [width, shape.ffn], DEVIATION),
            ("ffn_up", [width, shape.ffn], DEVIATION),
            ("ffn_down", [shape.ffn, width], output),
        ] {
            matrix(&mut writer, &name(part), dims, deviation, seed)?;
        }
    }
    writer.write(path)
}

fn norm(writer: &mut GgufWriter, name: &str, width: usize) -> Result<(), GgufError> {
    writer.tensor_f32(name, &[width as u64], TensorType::F32, vec![1.0; width])?;
    Ok(())
}

/// (inputs, outputs) random numbers from the seed and the tensor's name, so that they do not depend
/// on other tensors.
fn matrix(
    writer: &mut GgufWriter,
    name: &str,
    [inputs, outputs]: [usize; 2],
    deviation: f64,
    seed: u64,
) -> Result<(), GgufError> {
    let mut hash = Sha256::new();
    hash.update("fresh");
    hash.update(seed.to_le_bytes());
    hash.update(name);
    let mut rng = StdRng::from_seed(hash.finalize().into());
    let dims = [inputs as u64, outputs as u64];
    writer.tensor_with(name, &dims, TensorType::F32, move |out| {
        normals(out, &mut rng, inputs * outputs, deviation)
    })?;
    Ok(())
}

/// A normally distributed number, by the Box–Muller transform.
pub fn normal(rng: &mut StdRng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// Writes normally distributed numbers, generated in pairs.
fn normals(out: &mut dyn Write, rng: &mut StdRng, count: usize, deviation: f64) -> io::Result<()> {
    let mut left = count;
    while left > 0 {
        let some = left.min(CHUNK);
        let mut bytes = Vec::with_capacity(4 * some + 4);
        while bytes.len() < 4 * some {
            let radius = deviation * (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
            let (sine, cosine) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
            bytes.extend(((radius * cosine) as f32).to_le_bytes());
            bytes.extend(((radius * sine) as f32).to_le_bytes());
        }
        out.write_all(&bytes[..4 * some])?;
        left -= some;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Gguf, ModelConfig};
    use crate::job::spec::Pretrain;

    fn made(text: &str, seed: u64, path: &Path) -> (Shape, Gguf) {
        let vocabulary = Vocabulary::bytes();
        let pretrain: Pretrain = serde_json::from_str(text).unwrap();
        let shape = pretrain.shape(vocabulary.len()).unwrap();
        write(&shape, &vocabulary, "tiny", seed, path).unwrap();
        (shape, Gguf::open(path).unwrap())
    }

    #[test]
    fn a_fresh_model_is_what_its_shape_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for text in [
            r#"{"depth": 2}"#,
            r#"{"width": 96, "layers": 3, "heads": 6, "kv_heads": 3, "ffn": 160, "tied": false}"#,
        ] {
            let (shape, file) = made(text, 1, &path("a"));
            let covered = ModelConfig::read(&file).unwrap();
            assert_eq!(
                (covered.layers, covered.width, covered.heads, covered.kv_heads, covered.ff),
                (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.ffn)
            );
            let numbers: u64 = file.tensors().iter().map(|tensor| tensor.elements()).sum();
            assert_eq!(numbers, shape.parameters() as u64);
            assert_eq!(file.tensor("output.weight").is_none(), shape.tied);
            let spread = |name: &str| {
                let values = file.to_f32(name).unwrap();
                let squares: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
                let within = values.iter().filter(|x| x.abs() < 0.02).count();
                let sum: f64 = values.iter().map(|x| f64::from(*x)).sum();
                let count = values.len() as f64;
                (sum / count, (squares / count).sqrt(), within as f64 / count)
            };
            let (mean, deviation, within) = spread("token_embd.weight");
            assert!(mean.abs() < 4e-4 && (deviation - 0.02).abs() < 4e-4, "{mean} {deviation}");
            // 68.3% of a normal distribution lie within one standard deviation.
            assert!((within - 0.683).abs() < 0.01, "{within}");
            let expected = 0.02 / (2.0 * shape.layers as f64).sqrt();
            for name in ["blk.1.attn_output.weight", "blk.0.ffn_down.weight"] {
                assert!((spread(name).1 / expected - 1.0).abs() < 0.03, "{name}");
            }
            assert!(file.to_f32("blk.1.ffn_norm.weight").unwrap().iter().all(|x| *x == 1.0));
        }
    }

    #[test]
    fn a_seed_is_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |seed: u64| {
            let path = folder.path().join("model");
            made(r#"{"depth": 1}"#, seed, &path);
            std::fs::read(&path).unwrap()
        };
        let first = bytes(1);
        assert!(first == bytes(1));
        assert!(first != bytes(2));
        let name = |name: &str| {
            Gguf::open(folder.path().join("model")).unwrap().to_f32(name).unwrap()[..8].to_vec()
        };
        assert_ne!(name("blk.0.attn_q.weight"), name("blk.0.attn_output.weight"));
        assert_ne!(name("blk.0.ffn_gate.weight"), name("blk.0.ffn_up.weight"));
    }
}
