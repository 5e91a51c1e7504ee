//! Tests of the configurations that the native runner reads from headers.

use super::folder;
use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{Gguf, GgufWriter, ModelConfig, RopeFactors, UnsupportedModel, Value};

fn read(model: &TinyDecoder) -> Result<ModelConfig, UnsupportedModel> {
    let dir = folder();
    let path = dir.path().join("model.gguf");
    model.write(&path).unwrap();
    ModelConfig::read(&Gguf::open_header(&path).unwrap())
}

fn gemma(layers: u32) -> TinyDecoder {
    let gemma = TinyDecoder { layers, ..TinyDecoder::new("gemma3") };
    gemma.key("attention.sliding_window", 512u32).key("rope.freq_base", 1e6f32)
}

fn windowed(model: &ModelConfig) -> String {
    model.kinds.iter().map(|kind| if kind.window.is_some() { 'w' } else { '.' }).collect()
}

#[test]
fn gemma_has_windows_in_most_layers() {
    let model = read(&gemma(8).key("rope.scaling.factor", 8f32)).unwrap();
    assert_eq!(windowed(&model), "wwwww.ww");
    assert_eq!((model.kinds[0].window, model.kinds[0].rope), (Some(512), 1));
    assert_eq!((model.kinds[5].window, model.kinds[5].rope), (None, 0));
    let ropes: Vec<_> = model.ropes.iter().map(|rope| (rope.base, rope.scale)).collect();
    assert_eq!(ropes, [(1e6, 0.125), (1e4, 1.0)]);
    assert_eq!((model.embedding_scale, model.attention_scale), (8.0, 0.25));
    let of = |pattern: Value| {
        read(&gemma(4).key("attention.sliding_window_pattern", pattern)).map(|m| windowed(&m))
    };
    assert_eq!(of(2u32.into()).unwrap(), "w.w.");
    assert_eq!(of(0u32.into()).unwrap(), "wwww");
    assert_eq!(of(vec![false, true, true, false].into()).unwrap(), ".ww.");
    assert!(of(vec![true, true].into()).is_err());
    assert!(of(vec![1f32; 4].into()).is_err());
    let none = read(&TinyDecoder::new("gemma3")).unwrap();
    assert_eq!((windowed(&none).as_str(), none.ropes.len()), ("...", 1));
    // The 27B model, by its number of layers: queries are scaled by the width over the heads.
    let large = TinyDecoder { width: 96, ff: 32, ..gemma(62) };
    assert_eq!(read(&large).unwrap().attention_scale, 1.0 / 24f32.sqrt());
    let second = read(&TinyDecoder { layers: 4, ..TinyDecoder::new("gemma2") }).unwrap();
    assert_eq!(windowed(&second), "w.w.");
    assert_eq!((second.kinds[0].window, second.attention_cap), (Some(4096), Some(50.0)));
}

#[test]
fn long_rope_has_two_sets() {
    let phi = TinyDecoder::new("phi3").key("rope.scaling.original_context_length", 4096u32);
    let factors = read(&phi).unwrap().ropes[0].factors;
    assert_eq!(factors, RopeFactors::ByContext { original: 4096 });
    assert_eq!(factors.tensor(4096), Some("rope_factors_short.weight"));
    assert_eq!(factors.tensor(4097), Some("rope_factors_long.weight"));
}

#[test]
fn what_the_kernels_would_leave_out_is_not_covered() {
    let llama = || TinyDecoder::new("llama");
    let refused = |model: TinyDecoder, why: &str| {
        let error = read(&model).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    assert!(read(&llama()).is_ok());
    refused(TinyDecoder::new("bloom"), "`bloom`");
    refused(llama().key("expert_count", 4u32), "experts");
    refused(llama().key("attention.causal", false), "later tokens");
    refused(llama().key("pooling_type", 1u32), "last token");
    refused(llama().key("attention.head_count", 1u32 << 31), "dimensions");
    refused(llama().key("rope.scaling.type", "dynamic"), "`dynamic`");
    refused(llama().key("rope.scaling.factor", -1f32), "factor -1");
    refused(llama().key("rope.dimension_count", 48u32), "48 rotated");
    refused(llama().key("block_count", 4_000_000_000u32), "fewer tensors");
    refused(llama().vector("blk.0.attn_sinks.weight", vec![0.0; 4]), "attn_sinks");
    refused(llama().vector("blk.0.attn_q_norm.weight", vec![0.0; 16]), "attn_q_norm");
    refused(TinyDecoder::new("qwen2").vector("rope_freqs.weight", vec![1.0; 8]), "rope_freqs");
    let yarn = llama().key("rope.scaling.type", "yarn");
    refused(yarn.key("rope.scaling.yarn_beta_slow", 0f32), "beta_slow 0");
}

#[test]
fn a_family_needs_its_norms() {
    let dir = folder();
    let (whole, part) = (dir.path().join("whole.gguf"), dir.path().join("part.gguf"));
    TinyDecoder::new("qwen3").write(&whole).unwrap();
    let file = Gguf::open(&whole).unwrap();
    let mut w = GgufWriter::new();
    w.copy_metadata(&file, |_| true);
    for tensor in file.tensors().iter().filter(|t| t.name() != "blk.1.attn_k_norm.weight") {
        let data = file.data(tensor.name()).unwrap();
        w.tensor(tensor.name(), tensor.dims(), tensor.ty(), data).unwrap();
    }
    w.write(&part).unwrap();
    let error =
        ModelConfig::read(&Gguf::open_header(&part).unwrap()).expect_err("a norm is missing");
    assert!(error.to_string().contains("blk.1.attn_k_norm"), "{error}");
}
