//! Tests that read exported files back.

use super::*;
use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{Gguf, ModelFacts, Projection, TensorType, peft_to_gguf};
use crate::job::spec::Lora;
use crate::train::model::{Batch, Model, Training};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

fn lora() -> Lora {
    use Projection::*;
    let targets = vec![Q, K, V, O, Gate, Up, Down];
    Lora { rank: 4, alpha: 6.0, targets, rank_stabilized: true, dropout: 0.0, seed: 5 }
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
    // The written weights are the trained ones.
    model_gguf(&whole, None, &merged, TensorType::F32, &[], &path("again.gguf")).unwrap();
    let again = Gguf::open(path("again.gguf")).unwrap();
    for tensor in merged.tensors() {
        assert_eq!(merged.to_f32(tensor.name()).unwrap(), again.to_f32(tensor.name()).unwrap());
    }
}

/// Reads an F32 safetensors file: shape and numbers by name.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| {
        data.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
    };
    let tensors = read.iter();
    tensors.map(|(name, at)| (name.into(), (at.shape().to_vec(), values(at.data())))).collect()
}

/// Exports a model as an F32 folder.
fn folder_of(tiny: TinyDecoder, folder: &Path) -> (Gguf, serde_json::Value) {
    tiny.write(&folder.join("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(folder.join("base.gguf")).unwrap());
    let model = Model::load(base.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    hf_folder(&model, None, &base, TensorType::F32, None, &folder.join("hf")).unwrap();
    let text = std::fs::read(folder.join("hf/config.json")).unwrap();
    drop(model);
    (Arc::into_inner(base).unwrap(), serde_json::from_slice(&text).unwrap())
}

#[test]
fn a_llama_folder_has_its_rows_in_halves() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyDecoder { heads: 4, kv_heads: 2, ..TinyDecoder::new("llama") };
    let (base, config) = folder_of(tiny, folder.path());
    let found = tensors(&folder.path().join("hf/model.safetensors"));
    assert_eq!(config["tie_word_embeddings"], base.tensor("output.weight").is_none());
    assert_eq!(found.contains_key("lm_head.weight"), base.tensor("output.weight").is_some());
    assert_eq!(found.len(), base.tensors().len());
    // llama.cpp's conversion interleaves rows 0, 1, … of a head with rows h, h + 1, …
    for (theirs, ours, heads) in [("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)] {
        let (shape, rows) = &found[&format!("model.layers.0.self_attn.{theirs}.weight")];
        let (dim, cols) = (shape[0] / heads, shape[1]);
        let mut expected = Vec::new();
        for head in 0..heads {
            for pair in 0..dim / 2 {
                for half in 0..2 {
                    let row = head * dim + half * dim / 2 + pair;
                    expected.extend_from_slice(&rows[row * cols..(row + 1) * cols]);
                }
            }
        }
        let stored = base.to_f32(&format!("blk.0.{ours}.weight")).unwrap();
        assert_eq!(stored, expected, "{theirs}");
        assert_ne!(&stored, rows);
    }
    let plain = &found["model.layers.1.mlp.down_proj.weight"].1;
    assert_eq!(*plain, base.to_f32("blk.1.ffn_down.weight").unwrap());
    assert_eq!(config["rope_theta"], config["rope_parameters"]["rope_theta"]);
}

#[test]
fn gemmas_norms_lose_their_one() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyDecoder::new("gemma3").key("attention.sliding_window", 9u32);
    let (base, config) = folder_of(tiny, folder.path());
    let found = tensors(&folder.path().join("hf/model.safetensors"));
    for (theirs, ours) in [
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
    ] {
        let less: Vec<f32> = base.to_f32(ours).unwrap().iter().map(|x| x - 1.0).collect();
        assert_eq!(found[theirs].1, less, "{theirs}");
    }
    assert_eq!(config["tie_word_embeddings"], true);
    assert!(!found.contains_key("lm_head.weight"), "tied tables are written once");
    assert_eq!(config["sliding_window"], 9);
    assert_eq!(config["layer_types"][0], "sliding_attention");
}

#[test]
fn halves_of_floats_are_rounded_to_the_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("qwen2").write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let model = Model::load(base.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    let values = base.to_f32("blk.0.ffn_up.weight").unwrap();
    for (ty, dtype) in [(TensorType::F16, "float16"), (TensorType::BF16, "bfloat16")] {
        hf_folder(&model, None, &base, ty, None, &path("hf")).unwrap();
        let config = std::fs::read_to_string(path("hf/config.json")).unwrap();
        assert!(config.contains(dtype), "{config}");
        let bytes = std::fs::read(path("hf/model.safetensors")).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let found = read.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
        let expected = |x: &f32| match ty {
            TensorType::F16 => half::f16::from_f32(*x).to_le_bytes(),
            _ => half::bf16::from_f32(*x).to_le_bytes(),
        };
        let expected: Vec<u8> = values.iter().flat_map(expected).collect();
        assert_eq!(found.data(), expected);
    }
}

#[test]
fn a_parents_rope_is_kept_and_one_that_is_not_told_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("llama").write(&path("plain.gguf")).unwrap();
    let plain = Gguf::open(path("plain.gguf")).unwrap();
    let mut writer = crate::gguf::GgufWriter::new();
    writer.copy_metadata(&plain, |_| true);
    for tensor in plain.tensors() {
        let data = plain.data(tensor.name()).unwrap();
        writer.tensor(tensor.name(), tensor.dims(), tensor.ty(), data).unwrap();
    }
    let pairs = crate::gguf::ModelConfig::read(&plain).unwrap().head_dim / 2;
    let factors = vec![2.0f32; pairs];
    writer.tensor_f32("rope_freqs.weight", &[pairs as u64], TensorType::F32, factors).unwrap();
    writer.write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let model = Model::load(base.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    let write = |parent: Option<&Path>| {
        hf_folder(&model, None, &base, TensorType::F32, parent, &path("hf"))
    };
    let error = write(None).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    std::fs::create_dir(path("parent")).unwrap();
    let config = r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "vocab_size": 1}"#;
    std::fs::write(path("parent/config.json"), config).unwrap();
    write(Some(&path("parent"))).unwrap();
    let text = std::fs::read(path("hf/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(config["rope_scaling"]["factor"], 8.0);
    assert_ne!(config["vocab_size"], 1);
    let found = tensors(&path("hf/model.safetensors"));
    assert!(!found.keys().any(|name| name.contains("rope")));
}

#[test]
fn matrices_that_share_a_tensor_are_written_as_they_were_trained() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("phi3").write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let model = Model::load(base.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    for param in model.params().iter().filter(|param| param.name.contains(':')) {
        param.var.set(&(param.var.as_tensor() * 1.5).unwrap()).unwrap();
    }
    model_gguf(&model, None, &base, TensorType::F32, &[], &path("out.gguf")).unwrap();
    let again = Arc::new(Gguf::open(path("out.gguf")).unwrap());
    let other = Model::load(again, &Training::Full, 64, &Device::Cpu).unwrap();
    assert_eq!(loss(&model), loss(&other));
}

#[test]
fn tokenizer_json_gives_the_same_ids() {
    use crate::tokenizer::Tokenizer as _;
    use crate::tokenizer::native::NativeTokenizer;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = "ROMEO:\nBut, soft! what light through yonder window breaks?  It's 1597, isn't it? \
                I'LL go;\r\n\r\n  éà 文字 \u{1f600} x=3.14*(2+7)\t\t#end \n";
    std::fs::write(path("data"), text.repeat(40)).unwrap();
    let block = r#"{"depth": 1, "tokenizer": {"vocab_size": 400}}"#;
    let vocabulary =
        crate::train::tokenizer_training::Vocabulary::train(&path("data"), 400).unwrap();
    let shape = serde_json::from_str::<crate::job::spec::Pretrain>(block).unwrap();
    let shape = shape.shape(vocabulary.len()).unwrap();
    crate::train::random_init::write(&shape, &vocabulary, "x", 1, &path("trained.gguf")).unwrap();
    let mut files = vec![path("trained.gguf")];
    // The tables of llama.cpp, if they were fetched by `scripts/vocabs.sh`.
    if let Some(tables) = std::env::var_os("INGOT_TEST_VOCABS") {
        let tables = Path::new(&tables);
        files.extend(
            ["gpt-2", "llama-bpe", "qwen2"].map(|n| tables.join(format!("ggml-vocab-{n}.gguf"))),
        );
    }
    for file in files {
        let gguf = Gguf::open_header(&file).unwrap();
        let json = super::tokenizer::tokenizer_json(&gguf).unwrap();
        let theirs: tokenizers::Tokenizer = serde_json::from_value(json).unwrap();
        let ours = NativeTokenizer::from_gguf(&gguf).unwrap();
        for special in [false, true] {
            let found = theirs.encode(text, special).unwrap();
            assert_eq!(found.get_ids(), ours.encode(text, special, false), "{}", file.display());
        }
        let ids = theirs.encode(text, false).unwrap();
        assert_eq!(theirs.decode(ids.get_ids(), false).unwrap(), text, "{}", file.display());
    }
}

#[test]
fn quantized_models_keep_their_vectors_and_odd_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("llama").write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let model = Model::load(base.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    model_gguf(&model, None, &base, TensorType::Q8_0, &[], &path("out.gguf")).unwrap();
    let out = Arc::new(Gguf::open(path("out.gguf")).unwrap());
    assert_eq!(out.u32("general.file_type").unwrap(), Some(7));
    for tensor in out.tensors() {
        let values = base.to_f32(tensor.name()).unwrap();
        if tensor.dims().len() == 1 {
            assert_eq!(tensor.ty(), TensorType::F32);
            assert_eq!(out.to_f32(tensor.name()).unwrap(), values);
        } else {
            assert_eq!(tensor.ty(), TensorType::Q8_0);
            let expected = crate::gguf::quantize_q8_0(&values);
            assert!(out.data(tensor.name()).unwrap() == expected, "{}", tensor.name());
        }
    }
    let quantized = Model::load(out, &Training::Full, 64, &Device::Cpu).unwrap();
    let (exact, found) = (loss(&model), loss(&quantized));
    assert!((exact - found).abs() < 2e-2 * exact, "{exact}, {found}");
}

#[test]
fn adapters_are_exported_from_folders_with_their_scale_and_their_head() {
    use crate::job::{ExportAdapter, ExportFormat, ExportPlan};
    use crate::train::model::SCORE;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("llama").write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let adapted = model(&base, &Training::Lora(lora()));
    std::fs::create_dir(path("upload")).unwrap();
    lora_gguf(&adapted, &lora(), &[], &path("upload/adapter.gguf")).unwrap();
    peft_folder(&adapted, &lora(), "base", &path("peft")).unwrap();
    let made = |from: &str, scale: f32, format: ExportFormat, to: &str| {
        let adapter = ExportAdapter { path: path(from), scale, work_file: path("work.gguf") };
        let plan = ExportPlan {
            base: path("base.gguf"),
            base_name: "base".into(),
            adapter: Some(adapter),
            parent: None,
            format,
            output: path(to),
        };
        let outcome = export(&plan).map_err(|error| error.to_string());
        assert!(!path("work.gguf").exists());
        outcome
    };
    let alpha =
        |name: &str| Gguf::open(path(name)).unwrap().f32("adapter.lora.alpha").unwrap().unwrap();
    for (from, scale) in [("upload", 1.0), ("upload", 0.5), ("peft", 0.5), ("peft", -2.0)] {
        made(from, scale, ExportFormat::LoraGguf, "out.gguf").unwrap();
        let right = alpha("upload/adapter.gguf") * scale;
        assert!((alpha("out.gguf") - right).abs() < 1e-5, "{from}, {scale}");
    }
    // Merged with a scale of -1, the adapter is taken away from the model to which it was added.
    made("upload", 1.0, ExportFormat::Gguf, "plus.gguf").unwrap();
    made("peft", -1.0, ExportFormat::Gguf, "minus.gguf").unwrap();
    let [plus, minus] = ["plus.gguf", "minus.gguf"].map(|name| Gguf::open(path(name)).unwrap());
    let name = "blk.1.attn_q.weight";
    let values = |file: &Gguf| file.to_f32(name).unwrap();
    for ((plus, minus), base) in values(&plus).iter().zip(values(&minus)).zip(values(&base)) {
        assert!(((plus + minus) / 2.0 - base).abs() < 2e-3 * (1.0 + base.abs()), "{plus}, {base}");
    }
    assert!(values(&plus) != values(&minus));
    assert!(made("upload", 0.0, ExportFormat::Gguf, "no").unwrap_err().contains("scale is 0"));

    let head = vec![0.5; adapted.shape().width];
    let reward = adapted.with_head(SCORE, head).unwrap();
    lora_gguf(&reward, &lora(), &[], &path("reward.gguf")).unwrap();
    for format in [ExportFormat::Gguf, ExportFormat::HuggingFace] {
        let why = made("reward.gguf", 1.0, format, "no").unwrap_err();
        assert!(why.contains("score head") && why.contains("--format peft"), "{why}");
    }
    made("reward.gguf", 0.5, ExportFormat::LoraGguf, "scaled.gguf").unwrap();
    assert!(crate::gguf::score_head(&Gguf::open(path("scaled.gguf")).unwrap()).is_some());
    made("reward.gguf", 1.0, ExportFormat::Peft, "reward").unwrap();
    let config = std::fs::read_to_string(path("reward/adapter_config.json")).unwrap();
    assert!(config.contains("SEQ_CLS"), "{config}");
}
