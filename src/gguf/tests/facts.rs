//! Facts of the tiny models, and of headers with unusual keys.

use super::{folder, llama};
use crate::gguf::fixture::{TinyLlama, tiny_bert};
use crate::gguf::{
    Gguf, GgufError, GgufWriter, KvType, ModelFacts, PoolingType, TensorType, Value,
};

#[test]
fn facts_of_the_tiny_models() {
    let dir = folder();
    let gguf = llama(dir.path(), &TinyLlama::default());
    let facts = ModelFacts::read(&gguf).unwrap();
    assert_eq!((facts.architecture.as_str(), facts.quantization.as_str()), ("llama", "F32"));
    assert_eq!((facts.n_layer, facts.n_embd, facts.n_head), (2, 64, 4));
    assert_eq!((facts.n_head_kv.as_slice(), facts.key_length), (&[2, 2][..], 16));
    assert_eq!((facts.n_ctx_train, facts.n_vocab), (512, 270));
    assert_eq!(facts.tokenizer.eos.as_ref().unwrap().text, "<|im_end|>");
    assert_eq!(facts.tokenizer.eot, facts.tokenizer.eos);
    assert!(!facts.tokenizer.add_bos && !facts.tokenizer.supports_infill());
    assert!(facts.causal && !facts.is_encoder_only && facts.is_model());
    assert_eq!(facts.weights_bytes, facts.parameters * 4);
    // 2 layers, K and V, 2 heads of 16.
    assert_eq!(facts.kv_bytes_per_token(KvType::F16), 2 * 2 * 32 * 2);
    assert_eq!(facts.kv_bytes_per_token(KvType::Q8_0), 2 * 2 * 2 * (16 + 2));
    let header = Gguf::open_header(dir.path().join("llama.gguf")).unwrap();
    assert_eq!(ModelFacts::read(&header).unwrap(), facts);
    assert!(header.data("output.weight").is_err());

    let path = dir.path().join("bert.gguf");
    tiny_bert(&path).unwrap();
    let facts = ModelFacts::read(&Gguf::open(&path).unwrap()).unwrap();
    assert_eq!(facts.pooling_type, Some(PoolingType::Mean));
    assert!(facts.is_encoder_only && !facts.causal && facts.tokenizer.add_bos);
    assert_eq!(facts.kv_bytes_per_token(KvType::F16), 0);
}

/// Writes a file with these keys and one tensor, and reads its facts.
fn facts_of(keys: &[(&str, Value)]) -> Result<ModelFacts, GgufError> {
    let dir = folder();
    let path = dir.path().join("x.gguf");
    let mut writer = GgufWriter::new();
    for (key, value) in keys {
        writer.set(key, value.clone());
    }
    writer.tensor_f32("t", &[4], TensorType::F32, vec![0.0; 4])?;
    writer.write(&path)?;
    ModelFacts::read(&Gguf::open_header(&path)?)
}

fn hybrid_keys(arch: &str) -> Vec<(String, Value)> {
    let key = |name: &str| format!("{arch}.{name}");
    vec![
        ("general.architecture".to_owned(), arch.into()),
        (key("block_count"), 4u32.into()),
        (key("embedding_length"), 8u32.into()),
        (key("context_length"), 16u32.into()),
        (key("attention.head_count"), 2u32.into()),
    ]
}

#[test]
fn caches_of_unusual_architectures() {
    let read = |arch: &str, more: &[(&str, Value)]| {
        let mut keys = hybrid_keys(arch);
        keys.extend(more.iter().map(|(key, value)| (format!("{arch}.{key}"), value.clone())));
        let keys: Vec<_> = keys.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        facts_of(&keys)
    };
    let kv = "attention.head_count_kv";
    let jamba = read("jamba", &[(kv, vec![0u32, 1, 0, 1].into())]).unwrap();
    assert_eq!(jamba.kv_elements, [(0, 0), (4, 4), (0, 0), (4, 4)]);
    let qwen = read("qwen3next", &[(kv, 1u32.into())]).unwrap();
    assert_eq!(qwen.kv_elements, [(0, 0), (0, 0), (0, 0), (4, 4)]);
    let mla = [(kv, 1u32.into()), ("attention.key_length_mla", 3u32.into())];
    assert_eq!(read("deepseek2", &mla).unwrap().kv_elements, [(4, 0); 4]);
    let shared = [("attention.shared_kv_layers", 3u32.into())];
    assert_eq!(read("gemma4", &shared).unwrap().kv_elements[1], (0, 0));
    assert!(read("mamba", &[]).unwrap().is_recurrent);
    // Invalid values are refused before anything is allocated.
    assert!(read("llama", &[(kv, vec![1u32; 3].into())]).is_err());
    assert!(read("llama", &[("block_count", 513u32.into())]).is_err());
    assert!(read("llama", &[("embedding_length", u32::MAX.into())]).is_err());
    assert!(read("llama", &[("embedding_length", 0u32.into())]).is_err());
    let missing = facts_of(&[("general.architecture", "llama".into())]).unwrap_err();
    assert_eq!(missing.to_string(), "key 'llama.block_count' is missing");
}

#[test]
fn split_files_and_named_templates_are_told() {
    let mut keys: Vec<(String, Value)> = hybrid_keys("llama");
    keys.push(("split.count".into(), 3u16.into()));
    keys.push(("split.no".into(), 1u16.into()));
    keys.push(("tokenizer.chat_template".into(), "plain".into()));
    keys.push(("tokenizer.chat_template.tool_use".into(), "tools".into()));
    let keys: Vec<_> = keys.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    let facts = facts_of(&keys).unwrap();
    assert_eq!(facts.split.map(|s| (s.no, s.count)), Some((1, 3)));
    assert!(!facts.is_model());
    assert_eq!(facts.tokenizer.chat_template.as_deref(), Some("plain"));
    assert_eq!(facts.tokenizer.named_template("tool_use"), Some("tools"));
}
