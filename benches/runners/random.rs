//! A model with random weights and the dimensions of Llama-3.2-1B, for rates only.

use half::f16;
use ingot::gguf::{GgufWriter, TensorType};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use std::io::Write;
use std::path::Path;

const LAYERS: u32 = 16;
const WIDTH: u64 = 2048;
const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const FF: u64 = 8192;
const VOCAB: u64 = 128_256;

/// Types as llama.cpp's presets of these names choose them: most matrices have the first, the more
/// sensitive ones (half of `attn_v` and `ffn_down`, and the embedding) the second.
pub(crate) fn preset(name: &str) -> Option<(TensorType, TensorType)> {
    use TensorType::{F16, IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0};
    Some(match name {
        "Q4_K_M" => (Q4_K, Q6_K),
        "Q5_K_M" => (Q5_K, Q6_K),
        "Q6_K" => (Q6_K, Q6_K),
        "Q8_0" => (Q8_0, Q8_0),
        "Q4_0" => (Q4_0, Q6_K),
        "Q4_1" => (Q4_1, Q6_K),
        "Q5_0" => (Q5_0, Q6_K),
        "Q2_K" => (Q2_K, Q4_K),
        "Q3_K_M" => (Q3_K, Q5_K),
        "IQ4_NL" => (IQ4_NL, Q5_K),
        "IQ4_XS" => (IQ4_XS, Q5_K),
        "F16" => (F16, F16),
        _ => return None,
    })
}

pub(crate) fn write(path: &Path, (most, sensitive): (TensorType, TensorType)) {
    let mut w = GgufWriter::new();
    metadata(&mut w);
    let kv = WIDTH / u64::from(HEADS) * u64::from(KV_HEADS);
    let norm = vec![1.0; WIDTH as usize];
    let f32 = TensorType::F32;
    matrix(&mut w, "token_embd.weight".into(), sensitive, WIDTH, VOCAB);
    w.tensor_f32("output_norm.weight", &[WIDTH], f32, norm.clone()).expect("a vector");
    for layer in 0..LAYERS {
        let eighth = LAYERS / 8;
        let more = layer < eighth || layer >= 7 * eighth || (layer - eighth) % 3 == 2;
        let often = if more { sensitive } else { most };
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        for part in ["attn_norm", "ffn_norm"] {
            w.tensor_f32(&name(part), &[WIDTH], f32, norm.clone()).expect("a vector");
        }
        for (part, ty, input, output) in [
            ("attn_q", most, WIDTH, WIDTH),
            ("attn_k", most, WIDTH, kv),
            ("attn_v", often, WIDTH, kv),
            ("attn_output", most, WIDTH, WIDTH),
            ("ffn_gate", most, WIDTH, FF),
            ("ffn_up", most, WIDTH, FF),
            ("ffn_down", often, FF, WIDTH),
        ] {
            matrix(&mut w, name(part), ty, input, output);
        }
    }
    w.write(path).expect("there is room for the model");
}

fn metadata(w: &mut GgufWriter) {
    let mut tokens: Vec<String> = ["<|end|>", "a", "b", "ab"].map(String::from).to_vec();
    tokens.extend((tokens.len() as u64..VOCAB).map(|n| format!("t{n}")));
    let mut types = vec![1i32; tokens.len()];
    types[0] = 3;
    w.set("general.architecture", "llama")
        .set("llama.block_count", LAYERS)
        .set("llama.context_length", 131_072u32)
        .set("llama.embedding_length", WIDTH as u32)
        .set("llama.feed_forward_length", FF as u32)
        .set("llama.attention.head_count", HEADS)
        .set("llama.attention.head_count_kv", KV_HEADS)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("llama.rope.dimension_count", WIDTH as u32 / HEADS)
        .set("llama.rope.freq_base", 500_000f32)
        .set("llama.vocab_size", VOCAB as u32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "llama-bpe")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.merges", vec!["a b".to_string()])
        .set("tokenizer.ggml.bos_token_id", 0u32)
        .set("tokenizer.ggml.eos_token_id", 0u32);
}

/// Random blocks whose scales keep the size of what is multiplied.
fn matrix(w: &mut GgufWriter, name: String, ty: TensorType, input: u64, output: u64) {
    // Bytes of a block's scales in f16, and the largest weight without them.
    let (scales, largest): (&'static [usize], f32) = match ty {
        TensorType::Q2_K => (&[80, 82], 15.0 * 4.0),
        TensorType::Q3_K => (&[108], 32.0 * 4.0),
        TensorType::IQ4_NL => (&[0], 127.0),
        TensorType::IQ4_XS => (&[0], 32.0 * 127.0),
        TensorType::Q4_K | TensorType::Q5_K => (&[0, 2], 63.0 * 16.0),
        TensorType::Q6_K => (&[208], 127.0 * 32.0),
        TensorType::Q4_1 => (&[0, 2], 16.0),
        TensorType::Q4_0 | TensorType::Q5_0 => (&[0], 16.0),
        TensorType::Q8_0 => (&[0], 127.0),
        TensorType::F16 => (&[], 1.0),
        _ => unreachable!("a preset's type"),
    };
    let scale = f16::from_f32(3.0 / (input as f32).sqrt() / largest).to_le_bytes();
    let (elements, block) = (input * output, ty.block_bytes() as usize);
    let blocks = elements / ty.block_size();
    let seed = elements ^ name.len() as u64;
    let produce = move |out: &mut dyn Write| {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = vec![0; block * 64];
        for from in (0..blocks).step_by(64) {
            rng.fill_bytes(&mut bytes);
            for one in bytes.chunks_exact_mut(block) {
                for &at in scales {
                    one[at..at + 2].copy_from_slice(&scale);
                }
                if scales.is_empty() {
                    // Between 2^-7 and 2^-3, of either sign.
                    one[1] = (one[1] & 0x8f) | 0x20;
                }
            }
            out.write_all(&bytes[..block * 64.min((blocks - from) as usize)])?;
        }
        Ok(())
    };
    w.tensor_with(&name, &[input, output], ty, produce).expect("its blocks are whole");
}
