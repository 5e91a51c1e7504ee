//! llama.cpp itself as the oracle: it loads tiny models that carry the vocabularies.

use super::{NAMES, corpus, folder, vocabularies};
use crate::engine::runner;
use crate::engine::tokenizer::Tokenizer;
use crate::engine::tokenizer::native::NativeTokenizer;
use crate::gguf::{Gguf, GgufWriter, TensorType};
use crate::ipc::{KvCacheType, KvLayout, LoadSpec, RunnerKind, Token};
use std::path::Path;
use std::sync::Arc;

/// llama.cpp's expressions recurse.
const STACK: usize = 256 << 20;
const EMBD: u32 = 32;

/// A model of one small block with the vocabulary of `from`, by the name of another pre-tokenizer
/// if one is given.
fn write_model(path: &Path, from: &Gguf, pre: Option<&str>) {
    let tokens = from.strings("tokenizer.ggml.tokens").expect("strings").expect("tokens").len();
    let mut w = GgufWriter::new();
    w.copy_metadata(from, |key| key.starts_with("tokenizer.") || key == "general.name")
        .set("general.architecture", "llama")
        .set("llama.block_count", 1u32)
        .set("llama.context_length", 64u32)
        .set("llama.embedding_length", EMBD)
        .set("llama.feed_forward_length", EMBD)
        .set("llama.attention.head_count", 1u32)
        .set("llama.attention.head_count_kv", 1u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("llama.vocab_size", tokens as u32);
    if let Some(pre) = pre {
        // Gemma's model would bring its own.
        w.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", pre);
    }
    let embd = u64::from(EMBD);
    let mut tensor = |name: &str, dims: &[u64], ty| {
        let zeros = vec![0.0; dims.iter().product::<u64>() as usize];
        w.tensor_f32(&format!("{name}.weight"), dims, ty, zeros).expect("a tensor");
    };
    tensor("token_embd", &[embd, tokens as u64], TensorType::F16);
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
        tensor(name, &[embd], TensorType::F32);
    }
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        tensor(&format!("blk.0.{name}"), &[embd, embd], TensorType::F32);
    }
    w.write(path).expect("written");
}

fn oracle(path: &Path) -> Arc<dyn Tokenizer> {
    let spec = LoadSpec {
        model: path.to_owned(),
        runner: RunnerKind::LlamaCpp,
        context_length: 64,
        kv_tokens: 64,
        max_sequences: 1,
        batch_tokens: 32,
        kv_type: KvCacheType::F16,
        flash_attention: false,
        kv_layout: KvLayout::Unified,
        threads: 1,
        gpu_layers: 0,
        mmap: true,
        target_step_ms: 100,
        queue_limit: 1,
        mock_step_us: 0,
    };
    runner::load(&spec).expect("llama.cpp loads it").tokenizer()
}

/// Everything that a tokenizer answers.
fn compare(what: &str, native: &NativeTokenizer, oracle: &dyn Tokenizer, texts: &[String]) {
    let (ours, theirs) = (native.vocab(), oracle.vocab());
    assert_eq!(ours.len(), theirs.len(), "{what}");
    assert_eq!(
        (ours.bos, ours.eos, ours.infill),
        (theirs.bos, theirs.eos, theirs.infill),
        "{what}"
    );
    for token in 0..ours.len() as Token {
        let facts = |v: &crate::engine::tokenizer::Vocab| {
            let piece = String::from_utf8_lossy(v.piece(token)).into_owned();
            (piece, v.is_control(token), v.ends_generation(token))
        };
        assert_eq!(facts(ours), facts(theirs), "{what}: token {token}");
    }
    for text in texts {
        for (add, parse) in [(false, false), (true, true), (false, true)] {
            let (found, expected) =
                (native.encode(text, add, parse), oracle.encode(text, add, parse));
            assert_eq!(found, expected, "{what}: {text:?}, add {add}, parse {parse}");
        }
    }
}

/// Runs on a stack that holds llama.cpp's recursion.
fn with_stack(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(work);
    if let Err(panic) = thread.expect("a thread").join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_vocabulary_agrees_with_llama_cpp() {
    let Some(folder) = folder() else { return };
    with_stack(move || {
        let texts = corpus::texts(60_000);
        let place = tempfile::tempdir().expect("a folder");
        for (name, gguf) in vocabularies(&folder) {
            let Ok(native) = NativeTokenizer::from_gguf(&gguf) else { continue };
            let path = place.path().join("model.gguf");
            write_model(&path, &gguf, None);
            compare(&name, &native, &*oracle(&path), &texts);
        }
    });
}

/// All pre-tokenizers by name, on vocabularies that are not theirs.
#[test]
fn every_pre_tokenizer_agrees_with_llama_cpp() {
    let Some(folder) = folder() else { return };
    with_stack(move || {
        let texts = corpus::texts(30_000);
        let place = tempfile::tempdir().expect("a folder");
        let vocabularies = vocabularies(&folder);
        let find = |wanted| vocabularies.iter().find(|(name, _)| name == wanted).expect("is there");
        for pre in NAMES {
            let raw = ["gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe"].contains(pre);
            let (_, gguf) = find(if raw { "gemma-4" } else { "gpt-2" });
            let path = place.path().join("model.gguf");
            write_model(&path, gguf, Some(pre));
            let native = NativeTokenizer::from_gguf(&Gguf::open_header(&path).expect("a file"));
            compare(pre, &native.expect("covered"), &*oracle(&path), &texts);
        }
    });
}
