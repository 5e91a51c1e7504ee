//! Compares converted adapters with direct computation, and tests adapters that must be refused.

use std::fs;
use std::path::Path;

use super::{folder, llama};
use crate::gguf::fixture::{TinyLlama, tiny_peft};
use crate::gguf::{
    Gguf, GgufWriter, LoraError, ModelFacts, TensorType, check_lora_gguf, peft_to_gguf, score_head,
};

/// Row-major `[rows, inner] x [inner, cols]`.
fn matmul(a: &[f32], b: &[f32], rows: usize, inner: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    for r in 0..rows {
        for i in 0..inner {
            for c in 0..cols {
                out[r * cols + c] += a[r * inner + i] * b[i * cols + c];
            }
        }
    }
    out
}

/// Rotates one head at `position`; `pair(i)` returns the two rows that rotate together.
fn rotate(head: &mut [f32], position: f32, pair: impl Fn(usize) -> (usize, usize)) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = position * 10_000f32.powf(-(i as f32) / half as f32);
        let (x, y) = pair(i);
        let (a, b) = (head[x], head[y]);
        head[x] = a * angle.cos() - b * angle.sin();
        head[y] = a * angle.sin() + b * angle.cos();
    }
}

fn read_peft(dir: &Path, name: &str) -> Vec<f32> {
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = format!("base_model.model.model.layers.0.self_attn.{name}.weight");
    let data = file.tensor(&name).unwrap().data();
    data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Attention scores of the update alone must agree between Hugging Face's convention (halves
/// rotate), computed from the PEFT folder, and llama.cpp's (adjacent rows rotate), computed from
/// the GGUF. They agree exactly if the reordering of rows is right. Plain tensors must be
/// unchanged.
#[test]
fn converted_q_and_k_score_like_the_originals() {
    let dir = folder();
    let base = llama(dir.path(), &TinyLlama::default());
    let facts = ModelFacts::read(&base).unwrap();
    let (peft, out) = (dir.path().join("peft"), dir.path().join("lora.gguf"));
    tiny_peft(&peft, &facts, 3, 5).unwrap();
    let info = peft_to_gguf(&peft, &facts, &base, &out).unwrap();
    assert_eq!((info.rank, info.alpha, info.tensors), (3, 6.0, 8));
    assert_eq!(info.targets, ["attn_k", "attn_output", "attn_q", "attn_v"]);
    assert_eq!(check_lora_gguf(&out, &base).unwrap(), info);

    let lora = Gguf::open(&out).unwrap();
    let gguf = |name: &str| lora.to_f32(&format!("blk.0.{name}")).unwrap();
    for (hf, ours) in [("v_proj", "attn_v"), ("o_proj", "attn_output")] {
        assert_eq!(
            read_peft(&peft, &format!("{hf}.lora_A")),
            gguf(&format!("{ours}.weight.lora_a"))
        );
        assert_eq!(
            read_peft(&peft, &format!("{hf}.lora_B")),
            gguf(&format!("{ours}.weight.lora_b"))
        );
    }

    let x: Vec<f32> = (0..64).map(|i| (i as f32 * 0.37).sin()).collect();
    let apply = |a: &[f32], b: &[f32], rows| matmul(b, &matmul(a, &x, 3, 64, 1), rows, 3, 1);
    let hf = |n: &str, rows| {
        let (a, b) = (format!("{n}_proj.lora_A"), format!("{n}_proj.lora_B"));
        apply(&read_peft(&peft, &a), &read_peft(&peft, &b), rows)
    };
    let ours = |n: &str, rows| {
        let name = |half: &str| format!("attn_{n}.weight.lora_{half}");
        apply(&gguf(&name("a")), &gguf(&name("b")), rows)
    };
    let (q_hf, k_hf, q_our, k_our) = (hf("q", 64), hf("k", 32), ours("q", 64), ours("k", 32));
    let score =
        |q: &[f32], k: &[f32], head: usize, pair: &dyn Fn(usize) -> (usize, usize)| -> f32 {
            let mut q = q[head * 16..][..16].to_vec();
            let mut k = k[head / 2 * 16..][..16].to_vec();
            rotate(&mut q, 11.0, pair);
            rotate(&mut k, 4.0, pair);
            q.iter().zip(&k).map(|(a, b)| a * b).sum()
        };
    for head in 0..4 {
        let theirs = score(&q_hf, &k_hf, head, &|i| (i, i + 8));
        let mine = score(&q_our, &k_our, head, &|i| (2 * i, 2 * i + 1));
        assert!((theirs - mine).abs() < 1e-4 * theirs.abs().max(1.0), "{theirs} {mine}");
        assert!(theirs.abs() > 1e-3, "a score of zero would prove nothing");
    }
}

/// `permute` of `conversion/llama.py`, as a reshape to (head, 2, width / 2, col) with the middle
/// axes swapped.
fn permute(w: &[f32], heads: usize, rows: usize, cols: usize) -> Vec<f32> {
    let half = rows / heads / 2;
    let mut out = Vec::new();
    for h in 0..heads {
        for i in 0..half {
            for part in 0..2 {
                let row = (h * 2 + part) * half + i;
                out.extend(&w[row * cols..][..cols]);
            }
        }
    }
    out
}

#[test]
fn permuted_factors_make_the_permuted_update() {
    let dir = folder();
    let base = llama(dir.path(), &TinyLlama::default());
    let facts = ModelFacts::read(&base).unwrap();
    let (peft, out) = (dir.path().join("peft"), dir.path().join("lora.gguf"));
    tiny_peft(&peft, &facts, 2, 9).unwrap();
    peft_to_gguf(&peft, &facts, &base, &out).unwrap();
    let lora = Gguf::open(&out).unwrap();
    for (hf, ours, heads, rows) in [("q_proj", "attn_q", 4, 64), ("k_proj", "attn_k", 2, 32)] {
        let a = read_peft(&peft, &format!("{hf}.lora_A"));
        let b = read_peft(&peft, &format!("{hf}.lora_B"));
        let update = permute(&matmul(&b, &a, rows, 2, 64), heads, rows, 64);
        let a = lora.to_f32(&format!("blk.0.{ours}.weight.lora_a")).unwrap();
        let b = lora.to_f32(&format!("blk.0.{ours}.weight.lora_b")).unwrap();
        assert_eq!(matmul(&b, &a, rows, 2, 64), update);
    }
}

/// Writes a PEFT folder with these F32 tensors, all of one value.
fn peft_folder(dir: &Path, tensors: &[(&str, [usize; 2])], value: f32) {
    let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":4}"#;
    fs::write(dir.join("adapter_config.json"), config).unwrap();
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, [r, c])| value.to_le_bytes().repeat(r * c)).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes);
        (format!("base_model.model.{name}"), view.unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let dir = folder();
    let base = llama(dir.path(), &TinyLlama::default());
    let facts = ModelFacts::read(&base).unwrap();
    let out = dir.path().join("lora.gguf");
    let try_with = |tensors: &[(&str, [usize; 2])], value: f32| -> Result<_, LoraError> {
        peft_folder(dir.path(), tensors, value);
        peft_to_gguf(dir.path(), &facts, &base, &out)
    };
    let (a, b) =
        ("model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.up_proj.lora_B.weight");
    let good = [(a, [2, 64]), (b, [128, 2])];
    try_with(&good, 1.0).unwrap();
    fs::remove_file(&out).unwrap();
    for (tensors, value, expected) in [
        (&good[..1], 1.0, "lora_B is missing"),
        (&good[..], f32::NAN, "not finite"),
        (&good[..], f32::INFINITY, "not finite"),
        (
            &[(a, [2, 63]), (b, [128, 2])],
            1.0,
            "[128, 63], but 'blk.0.ffn_up.weight' of the base is [128, 64]",
        ),
        (&[(a, [3, 64]), (b, [128, 3])], 1.0, "its rank is 3, but adapter_config.json has r 2"),
        (&[(a, [2, 64]), (b, [128, 3])], 1.0, "A is [2, 64] but B is [128, 3]"),
        (&[("model.norm.weight", [1, 64])], 1.0, "not part of a LoRA"),
        (&[], 1.0, "no LoRA tensors"),
        (
            &[
                ("model.layers.7.mlp.up_proj.lora_A.weight", [2, 64]),
                ("model.layers.7.mlp.up_proj.lora_B.weight", [128, 2]),
            ],
            1.0,
            "no layer 7",
        ),
    ] {
        let message = try_with(tensors, value).unwrap_err().to_string();
        assert!(message.contains(expected), "'{message}' does not say '{expected}'");
        assert!(!out.exists());
    }
    fs::write(dir.path().join("adapter_model.safetensors"), [9; 40]).unwrap();
    assert!(matches!(peft_to_gguf(dir.path(), &facts, &base, &out), Err(LoraError::Folder(_))));
}

#[test]
fn a_reward_models_head_comes_along() {
    let dir = folder();
    let base = llama(dir.path(), &TinyLlama::default());
    let facts = ModelFacts::read(&base).unwrap();
    let out = dir.path().join("lora.gguf");
    let try_with = |score: &[(&str, [usize; 2])], value: f32| {
        let up = "model.layers.0.mlp.up_proj";
        let (a, b) = (format!("{up}.lora_A.weight"), format!("{up}.lora_B.weight"));
        let pair = [(a.as_str(), [2, 64]), (b.as_str(), [128, 2])];
        peft_folder(dir.path(), &[&pair[..], score].concat(), value);
        let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"modules_to_save":["score"]}"#;
        fs::write(dir.path().join("adapter_config.json"), config).unwrap();
        peft_to_gguf(dir.path(), &facts, &base, &out)
    };
    let info = try_with(&[("score.weight", [1, 64])], 0.5).unwrap();
    assert!(info.reward_model);
    assert_eq!(check_lora_gguf(&out, &base).unwrap(), info);
    assert_eq!(score_head(&Gguf::open(&out).unwrap()), Some(vec![0.5; 64]));
    for (score, value, expected) in [
        (&[][..], 1.0, "score.weight"),
        (&[("score.weight", [2, 64])][..], 1.0, "a reward model's is [1, 64]"),
        (&[("score.weight", [1, 63])][..], 1.0, "a reward model's is [1, 64]"),
        (&[("score.weight", [1, 64])][..], f32::NAN, "not finite"),
    ] {
        let message = try_with(score, value).unwrap_err().to_string();
        assert!(message.contains(expected), "'{message}' does not say '{expected}'");
    }
}

#[test]
fn embeddings_are_flipped_and_tied_ones_refused() {
    let dir = folder();
    let untied = llama(dir.path(), &TinyLlama::default());
    let facts = ModelFacts::read(&untied).unwrap();
    let out = dir.path().join("lora.gguf");
    let vocab = facts.n_vocab as usize;
    let tensors = [
        ("model.embed_tokens.lora_embedding_A", [2, vocab]),
        ("model.embed_tokens.lora_embedding_B", [64, 2]),
        ("lm_head.lora_A.weight", [2, 64]),
        ("lm_head.lora_B.weight", [vocab, 2]),
    ];
    peft_folder(dir.path(), &tensors, 0.5);
    let info = peft_to_gguf(dir.path(), &facts, &untied, &out).unwrap();
    assert_eq!(info.targets, ["output", "token_embd"]);
    assert_eq!(check_lora_gguf(&out, &untied).unwrap(), info);
    let lora = Gguf::open(&out).unwrap();
    assert_eq!(lora.tensor("token_embd.weight.lora_a").unwrap().dims(), [2, vocab as u64]);

    let other = folder();
    let tied = llama(other.path(), &TinyLlama { tied: true, ..Default::default() });
    for kept in [&tensors[..2], &tensors[2..]] {
        peft_folder(dir.path(), kept, 0.5);
        let error = peft_to_gguf(dir.path(), &facts, &tied, &out).unwrap_err().to_string();
        assert!(error.contains("tie"), "{error}");
    }
    assert!(check_lora_gguf(&out, &tied).is_err(), "the check knows it too");
}

#[test]
#[allow(clippy::too_many_lines)] // a table of cases
fn a_lora_gguf_is_checked_before_llama_cpp_sees_it() {
    let dir = folder();
    let base = llama(dir.path(), &TinyLlama::default());
    let path = dir.path().join("lora.gguf");
    type Edit = fn(&mut GgufWriter);
    let check = |edit: Edit, a: [u64; 2], b: [u64; 2], value: f32| {
        let mut w = GgufWriter::new();
        w.set("general.type", "adapter").set("general.architecture", "llama");
        w.set("adapter.type", "lora").set("adapter.lora.alpha", 4f32);
        for (half, dims) in [("a", a), ("b", b)] {
            let data = vec![value; dims.iter().product::<u64>() as usize];
            let name = format!("blk.1.attn_v.weight.lora_{half}");
            w.tensor_f32(&name, &dims, TensorType::F16, data).unwrap();
        }
        edit(&mut w);
        w.write(&path).unwrap();
        check_lora_gguf(&path, &base)
    };
    let nothing: Edit = |_| ();
    let info = check(nothing, [64, 4], [4, 32], 1.0).unwrap();
    assert_eq!((info.rank, info.tensors, info.targets[0].as_str()), (4, 1, "attn_v"));
    assert!(check(nothing, [64, 4], [5, 32], 1.0).is_err(), "ranks differ");
    assert!(check(nothing, [63, 4], [4, 32], 1.0).is_err(), "another width");
    assert!(check(nothing, [64, 4], [4, 32], f32::NAN).is_err(), "not finite");
    let edits: [(Edit, &str); 7] = [
        (
            |w| {
                w.set("general.type", "model");
            },
            "'general.type'",
        ),
        (
            |w| {
                w.set("adapter.type", 1u32);
            },
            "'adapter.type'",
        ),
        (
            |w| {
                w.set("general.architecture", "qwen2");
            },
            "must be 'llama'",
        ),
        (
            |w| {
                w.set("adapter.lora.alpha", 4u32);
            },
            "finite f32",
        ),
        (
            |w| {
                w.set("adapter.lora.alpha", f32::NAN);
            },
            "finite f32",
        ),
        (|w| drop(w.tensor("x.lora_a", &[1], TensorType::I8, vec![1])), "missing"),
        (|w| drop(w.tensor("x", &[1], TensorType::I8, vec![1])), "ends in neither"),
    ];
    for (edit, expected) in edits {
        let message = check(edit, [64, 4], [4, 32], 1.0).unwrap_err().to_string();
        assert!(message.contains(expected), "'{message}' does not say '{expected}'");
    }
}
