//! Tests on folders written by Ingot's own export: complete, sharded and damaged.

use super::*;
use crate::gguf::fixture::{CHATML, TinyDecoder};
use crate::gguf::{Array, Gguf, ModelConfig, ModelFacts, TensorType, Value};
use crate::tokenizer::Tokenizer as _;
use crate::tokenizer::native::NativeTokenizer;
use crate::train::export::hf_folder;
use crate::train::model::{Model, Training};
use candle_core::Device;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value as Json, json};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

const TEXT: &str = "In the inn: he'll tell 1597 thin lies,  don't WE?\r\n\r\n\t éà 文字 \u{1f600} \
                    x=3.14*(2+7) <|im_end|>\n";

/// An exported folder, and the model from which it was made.
struct Made {
    _folder: TempDir,
    base: Arc<Gguf>,
    hf: PathBuf,
    out: PathBuf,
}

fn made(tiny: &TinyDecoder, ty: TensorType) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    tiny.write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let model = Model::load(base.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    hf_folder(&model, None, &base, ty, None, &path("hf")).unwrap();
    Made { base, hf: path("hf"), out: path("out.gguf"), _folder: folder }
}

impl Made {
    fn convert(&self) -> Result<(Gguf, Vec<String>), String> {
        let lacking = convert(&self.hf, &self.out, &[]).map_err(|error| error.to_string())?;
        Ok((Gguf::open(&self.out).unwrap(), lacking))
    }

    /// The error after a file was damaged. No file may be left behind.
    fn refused(&self, why: &str) -> String {
        let error = self.convert().map(drop).expect_err(why);
        assert!(!self.out.exists(), "{why}");
        let left = fs::read_dir(self.out.parent().unwrap()).unwrap().count();
        assert_eq!(left, 2, "{why}: a temporary file is left");
        error
    }

    fn json(&self, file: &str) -> Json {
        serde_json::from_slice(&fs::read(self.hf.join(file)).unwrap()).unwrap()
    }

    fn put(&self, file: &str, json: &Json) {
        fs::write(self.hf.join(file), json.to_string()).unwrap();
    }

    /// Changes a file while `try_it` runs.
    fn with<T>(&self, file: &str, change: impl FnOnce(&mut Json), try_it: impl FnOnce() -> T) -> T {
        let path = self.hf.join(file);
        let before = fs::read(&path).unwrap();
        let mut json = self.json(file);
        change(&mut json);
        self.put(file, &json);
        let result = try_it();
        fs::write(path, before).unwrap();
        result
    }

    /// Rewrites the tensors into the files chosen by `place`, with an index if there are several
    /// files.
    fn rewrite(&self, files: &[&str], place: impl Fn(&str) -> Option<usize>) {
        let bytes = fs::read(self.hf.join("model.safetensors")).unwrap();
        fs::remove_file(self.hf.join("model.safetensors")).unwrap();
        let read = SafeTensors::deserialize(&bytes).unwrap();
        let mut index = serde_json::Map::new();
        for (number, file) in files.iter().enumerate() {
            let here = read.iter().filter(|(name, _)| place(name) == Some(number));
            let here: Vec<_> = here.collect();
            index.extend(here.iter().map(|(name, _)| ((*name).to_owned(), json!(file))));
            serialize_to_file(here, None, &self.hf.join(file)).unwrap();
        }
        if files.len() > 1 {
            self.put("model.safetensors.index.json", &json!({"weight_map": index}));
        }
    }
}

fn assert_same(ours: &Gguf, base: &Gguf, what: &str) {
    let mut names: Vec<_> = base.tensors().iter().map(|tensor| tensor.name()).collect();
    let mut found: Vec<_> = ours.tensors().iter().map(|tensor| tensor.name()).collect();
    names.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, names, "{what}");
    for tensor in base.tensors() {
        let name = tensor.name();
        assert_eq!(ours.tensor(name).unwrap().dims(), tensor.dims(), "{what}: {name}");
        assert_eq!(ours.tensor(name).unwrap().ty(), tensor.ty(), "{what}: {name}");
        assert!(ours.data(name).unwrap() == base.data(name).unwrap(), "{what}: {name}");
    }
    // Everything that determines the computation.
    assert_eq!(ModelConfig::read(ours).unwrap(), ModelConfig::read(base).unwrap(), "{what}");
    let context = format!("{}.context_length", base.str("general.architecture").unwrap().unwrap());
    assert_eq!(ours.u32(&context).unwrap(), base.u32(&context).unwrap(), "{what}");
}

/// One model of each family, with its special settings.
fn families() -> Vec<TinyDecoder> {
    let scaled = TinyDecoder::new("qwen3").key("rope.scaling.type", "linear");
    vec![
        TinyDecoder::new("llama"),
        TinyDecoder { tied: true, heads: 8, kv_heads: 2, ..TinyDecoder::new("llama") },
        TinyDecoder::new("qwen2").key("rope.freq_base", 1e6f32),
        TinyDecoder { tied: true, ..scaled.key("rope.scaling.factor", 4f32) },
        TinyDecoder::new("gemma2")
            .key("attention.sliding_window", 9u32)
            .key("attn_logit_softcapping", 20f32)
            .key("final_logit_softcapping", 0f32),
        TinyDecoder { layers: 7, ..TinyDecoder::new("gemma3") }
            .key("attention.sliding_window", 9u32)
            .key("rope.freq_base", 1e6f32),
        TinyDecoder::new("gemma3")
            .key("attention.sliding_window", 12u32)
            .key("attention.sliding_window_pattern", 2u32)
            .key("rope.freq_base", 3e5f32)
            .key("rope.freq_base_swa", 2e4f32),
        TinyDecoder::new("phi3").key("attention.sliding_window", 30u32),
    ]
}

#[test]
fn what_we_wrote_comes_back_bit_for_bit() {
    for tiny in families() {
        for ty in [TensorType::F32, TensorType::F16, TensorType::BF16] {
            let tiny = TinyDecoder { ty, ..tiny.clone() };
            let made = made(&tiny, TensorType::F32);
            let what = format!("{} {ty}", tiny.architecture);
            // Matrices keep their type, vectors are exact.
            if ty != TensorType::F32 {
                halve(&made, ty);
            }
            let (ours, lacking) = made.convert().unwrap();
            assert_same(&ours, &made.base, &what);
            assert_eq!(lacking, [""; 0], "{what}");
            let file_type = ours.u32("general.file_type").unwrap();
            let expected = match ty {
                TensorType::F32 => 0,
                TensorType::F16 => 1,
                _ => 32,
            };
            assert_eq!(file_type, Some(expected), "{what}");
            assert_eq!(ours.str("general.name").unwrap(), Some("hf"));
            let (ours, theirs) = (
                NativeTokenizer::from_gguf(&ours).unwrap(),
                NativeTokenizer::from_gguf(&made.base).unwrap(),
            );
            assert_eq!(theirs.vocab().difference(ours.vocab()), None);
            assert_eq!(theirs.vocab().end_tokens(), ours.vocab().end_tokens());
            for (special, parse) in [(false, false), (true, true)] {
                let ids = theirs.encode(TEXT, special, parse);
                assert_eq!(ours.encode(TEXT, special, parse), ids, "{what}");
            }
        }
    }
}

/// Converts the folder's matrices to the given type.
fn halve(made: &Made, ty: TensorType) {
    let path = made.hf.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let dtype = if ty == TensorType::F16 { Dtype::F16 } else { Dtype::BF16 };
    let halves: Vec<(String, Vec<usize>, Vec<u8>, Dtype)> = read
        .iter()
        .map(|(name, view)| {
            let shape = view.shape().to_vec();
            if shape.len() < 2 {
                return (name.to_owned(), shape, view.data().to_vec(), Dtype::F32);
            }
            let values = view.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
            let mut out = Vec::new();
            crate::gguf::write_f32(&mut out, ty, values).unwrap();
            (name.to_owned(), shape, out, dtype)
        })
        .collect();
    let views = halves.iter().map(|(name, shape, data, dtype)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn roles_and_templates_come_along() {
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    let jinja = made.hf.join("chat_template.jinja");
    fs::write(&jinja, CHATML).unwrap();
    let named =
        json!([{"name": "default", "template": "old"}, {"name": "tool_use", "template": "t"}]);
    made.with(
        "tokenizer_config.json",
        |json| json["chat_template"] = named,
        || {
            let facts = ModelFacts::read(&made.convert().unwrap().0).unwrap().tokenizer;
            assert_eq!(facts.chat_template.as_deref(), Some(CHATML));
            assert_eq!(facts.named_template("tool_use"), Some("t"));
            assert_eq!((facts.bos.unwrap().id, facts.eos.unwrap().id), (1, 2));
            assert!(!facts.add_bos);
        },
    );
    // A second end token, and a post-processor that adds the first token.
    made.put("generation_config.json", &json!({"eos_token_id": [2, 0]}));
    let start = json!({"SpecialToken": {"id": "<|im_start|>", "type_id": 0}});
    let post = json!({"type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A"}}]});
    let all = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, post]});
    made.with(
        "tokenizer.json",
        |json| json["post_processor"] = all,
        || {
            let facts = ModelFacts::read(&made.convert().unwrap().0).unwrap().tokenizer;
            assert_eq!(facts.eot.unwrap().id, 0);
            assert!(facts.add_bos && !facts.add_eos);
        },
    );
}

#[test]
fn all_ends_are_kept_or_named() {
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    for (ends, eot, eom, named) in [
        (json!(2), None, None, false),
        (json!([2, 0]), Some(0), None, false),
        (json!([2, 5, 0, 5]), Some(0), Some(5), false),
        (json!([7, 2, 5, 6]), Some(5), Some(6), true),
    ] {
        made.put("generation_config.json", &json!({ "eos_token_id": ends }));
        let (file, lacking) = made.convert().unwrap();
        let id = |key: &str| file.u32(&format!("tokenizer.ggml.{key}_token_id")).unwrap();
        assert_eq!((id("eos"), id("eot"), id("eom")), (Some(2), eot, eom), "{ends}");
        let said =
            lacking.iter().any(|what| what.contains("[7]") && what.contains("stop_token_ids"));
        assert_eq!(said, named, "{ends}: {lacking:?}");
    }
}

#[test]
fn what_is_not_looked_at_is_said() {
    let tiny = TinyDecoder { tied: true, ..TinyDecoder::new("qwen2") };
    let made = made(&tiny, TensorType::F32);
    assert_eq!(made.convert().unwrap().1, [""; 0]);
    // An older pickled file is not reported, a newer one is.
    let pickled = made.hf.join("pytorch_model.bin");
    fs::write(&pickled, "x").unwrap();
    let time = |path: &Path, seconds: u64| {
        let file = fs::File::options().append(true).open(path).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).unwrap();
    };
    time(&made.hf.join("model.safetensors"), 2_000_000_000);
    for (at, newer) in [(1_900_000_000, false), (2_000_000_000, false), (2_100_000_000, true)] {
        time(&pickled, at);
        let (_, lacking) = made.convert().unwrap();
        assert_eq!(lacking.iter().any(|what| what.contains("pytorch_model.bin is newer")), newer);
    }
    // A separate head in a model whose configuration says that it has none.
    let untied = self::made(&TinyDecoder::new("llama"), TensorType::F32);
    let names_head =
        |lacking: &[String]| lacking.iter().any(|what| what.contains("`lm_head.weight`"));
    assert!(!names_head(&untied.convert().unwrap().1));
    let tie = |json: &mut Json| json["tie_word_embeddings"] = json!(true);
    let (file, lacking) = untied.with("config.json", tie, || untied.convert()).unwrap();
    assert!(names_head(&lacking) && file.tensor("output.weight").is_none(), "{lacking:?}");
    // Later loads of the file report the notes too.
    let kept = file.get(LACKING).and_then(Value::as_array);
    assert!(matches!(kept, Some(Array::String(kept)) if *kept == lacking), "{kept:?}");
}

#[test]
fn shards_are_one_model() {
    let tiny = TinyDecoder::new("qwen2");
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let sharded = made(&tiny, TensorType::F32);
    sharded.rewrite(&files, |name| Some(usize::from(name.contains("layers.1"))));
    let (ours, _) = sharded.convert().unwrap();
    assert_same(&ours, &sharded.base, "sharded");
    drop(ours);
    fs::remove_file(&sharded.out).unwrap();
    let index = "model.safetensors.index.json";
    for (file, said) in
        [("../evil.safetensors", "beside"), ("x.bin", "beside"), (files[0], "torn|should be in")]
    {
        let change = |json: &mut Json| {
            json["weight_map"]["model.layers.1.mlp.up_proj.weight"] = json!(file);
        };
        let error = sharded.with(index, change, || sharded.refused(file));
        assert!(
            said.split('|').any(|said| error.contains(said)) && error.contains(index),
            "{error}"
        );
    }
    let error =
        sharded.with(index, |json| json["weight_map"] = json!(3), || sharded.refused("map"));
    assert!(error.contains("weight_map"), "{error}");
    fs::remove_file(sharded.hf.join(files[1])).unwrap();
    let error = sharded.refused("a shard is missing");
    assert!(error.contains(files[1]), "{error}");
}

#[test]
fn spoiled_configurations_are_refused_by_name() {
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    for (key, value, said) in [
        ("model_type", json!("mamba"), "model_type"),
        ("model_type", json!(7), "model_type"),
        ("hidden_size", json!(-64), "hidden_size"),
        ("hidden_size", json!(65), "shape"),
        ("hidden_size", Json::Null, "missing"),
        ("num_hidden_layers", json!(4), "no tensor"),
        ("num_hidden_layers", json!(2), "left out"),
        ("num_hidden_layers", json!(1u64 << 31), "num_hidden_layers"),
        ("num_hidden_layers", json!(100_000), "layers"),
        ("num_attention_heads", json!(3), "heads"),
        ("num_key_value_heads", json!(4), "shape"),
        ("vocab_size", json!(1_999_999_999u64), "shape"),
        ("intermediate_size", json!("big"), "intermediate_size"),
        ("hidden_act", json!("relu"), "activation"),
        ("rms_norm_eps", json!(0), "rms_norm_eps"),
        ("rope_parameters", json!([1]), "rope_parameters"),
        ("rope_parameters", json!({"rope_type": "longrope"}), "longrope"),
        ("rope_parameters", json!({"rope_type": "llama3"}), "factor"),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 2, "truncate": false}),
            "truncate",
        ),
        ("quantization_config", json!({"quant_method": "gptq"}), "gptq"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ("head_dim", json!(17), "share"),
    ] {
        let change = |json: &mut Json| json[key] = value.clone();
        let error = made.with("config.json", change, || made.refused(key));
        let file = error.contains("config.json");
        assert!(error.contains(said) && file, "{key} {value}: {error}");
    }
    fs::write(made.hf.join("config.json"), "{").unwrap();
    assert!(made.refused("no JSON").contains("config.json"));
    fs::remove_file(made.hf.join("config.json")).unwrap();
    assert!(made.refused("none").contains("config.json"));
    assert!(convert(&made.hf.join("nowhere"), &made.out, &[]).is_err());
}

#[test]
fn spoiled_weights_are_refused_by_name() {
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    let path = made.hf.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = made.refused("torn");
        assert!(error.contains("model.safetensors: it is torn"), "{error}");
    }
    // Each of the first 300 bytes is inverted: an error or the same model, never a panic.
    for at in 0..300 {
        let mut spoiled = whole.clone();
        spoiled[at] ^= 0x15;
        fs::write(&path, &spoiled).unwrap();
        let _ = made.convert();
        let _ = fs::remove_file(&made.out);
    }
    fs::write(&path, &whole).unwrap();
    let read = SafeTensors::deserialize(&whole).unwrap();
    type Change<'a> = &'a dyn Fn(&str) -> Option<(Dtype, Vec<usize>)>;
    let save = |change: Change| {
        let views: Vec<(String, Dtype, Vec<usize>, &[u8])> = read
            .iter()
            .map(|(name, view)| {
                let (dtype, shape) = change(name).unwrap_or((view.dtype(), view.shape().to_vec()));
                (name.to_owned(), dtype, shape, view.data())
            })
            .collect();
        let views = views.iter().map(|(name, dtype, shape, data)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    let norm = "model.norm.weight";
    for (dtype, shape, said) in [
        (Dtype::I32, vec![64], "I32"),
        (Dtype::F64, vec![32], "F64"),
        (Dtype::F32, vec![8, 8], "shape"),
        (Dtype::BF16, vec![128], "shape"),
    ] {
        save(&|name| (name == norm).then(|| (dtype, shape.clone())));
        let error = made.refused(said);
        assert!(error.contains(said) && error.contains(norm), "{error}");
    }
    fs::remove_file(&path).unwrap();
    assert!(made.refused("none").contains("model.safetensors"));
    fs::write(made.hf.join("pytorch_model.bin"), "x").unwrap();
    assert!(made.refused("pickled").contains("convert them to safetensors"));
}

#[test]
fn spoiled_tokenizers_are_refused_by_name() {
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    let rows = TinyDecoder::vocab();
    type Spoil = fn(&mut Json);
    let spoils: [(Spoil, &str); 13] = [
        (|json| json["model"]["type"] = json!("Unigram"), "Unigram"),
        (|json| json["model"]["vocab"] = json!([]), "vocab"),
        (|json| json["model"]["vocab"]["x"] = json!(-1), "`x`"),
        (|json| json["model"]["vocab"]["zz"] = json!(9), "both the token 9"),
        (|json| json["model"]["vocab"]["zz"] = json!(99_999), "resize"),
        (|json| json["model"]["merges"] = json!(null), "merges"),
        (|json| json["model"]["merges"][1] = json!("nospace"), "nospace"),
        (|json| json["model"]["merges"][1] = json!(["a b", "c"]), "merge"),
        (|json| json["model"]["end_of_word_suffix"] = json!("</w>"), "end_of_word_suffix"),
        (|json| json["normalizer"] = json!({"type": "Lowercase"}), "Lowercase"),
        (|json| json["pre_tokenizer"] = json!({"type": "Whitespace"}), "byte"),
        (
            |json| {
                json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated"},
                    {"type": "ByteLevel", "use_regex": false},
                ]});
            },
            "[aeiou]",
        ),
        (|json| json["added_tokens"][0] = json!({"id": "first"}), "added token"),
    ];
    for (spoil, said) in spoils {
        let error = made.with("tokenizer.json", spoil, || made.refused(said));
        assert!(error.contains(said) && error.contains("tokenizer.json"), "{said}: {error}");
    }
    let twice = |json: &mut Json| json["added_tokens"][0]["content"] = json!("<|im_end|>");
    let error = made.with("tokenizer.json", twice, || made.refused("twice"));
    assert!(error.contains("both"), "{error}");
    // Rows without a token get the name that llama.cpp gives them.
    let fewer = |json: &mut Json| {
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        vocab.retain(|_, id| id.as_u64().unwrap() != u64::from(rows) - 1);
        json["model"]["merges"].as_array_mut().unwrap().pop();
    };
    made.with("tokenizer.json", fewer, || {
        let (ours, _) = made.convert().unwrap();
        let tokens = ours.strings("tokenizer.ggml.tokens").unwrap().unwrap();
        assert_eq!(tokens.last().unwrap(), &format!("[PAD{}]", rows - 1));
        assert_eq!(ours.u64s("tokenizer.ggml.token_type").unwrap().unwrap().last(), Some(&5));
    });
    fs::remove_file(&made.out).unwrap();
    fs::remove_file(made.hf.join("tokenizer.json")).unwrap();
    assert!(made.refused("none").contains("save_pretrained"));
}

#[test]
fn every_row_of_the_table_has_a_native_pre_tokenizer() {
    // Both conversions use the table, so it must agree with the native tokenizer.
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    let whole = made.json("tokenizer.json");
    for name in ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"] {
        let (pre, whole_words) = pre_tokenizer(name).unwrap();
        assert_eq!(super::pre_tokenizer::name_of(&pre, whole_words), Ok(name));
        let mut json = whole.clone();
        json["pre_tokenizer"] = pre;
        json["model"]["ignore_merges"] = json!(whole_words);
        made.put("tokenizer.json", &json);
        let (ours, _) = made.convert().unwrap();
        assert_eq!(ours.str("tokenizer.ggml.pre").unwrap(), Some(name));
        let ours = NativeTokenizer::from_gguf(&ours).unwrap();
        let theirs: tokenizers::Tokenizer = serde_json::from_value(json).unwrap();
        let ids = theirs.encode(TEXT, false).unwrap();
        assert_eq!(ours.encode(TEXT, false, true), ids.get_ids(), "{name}");
    }
}

/// SentencePiece BPE: letters, bytes, a few words; in the format of the crate `tokenizers`.
fn pieces() -> Json {
    let mut vocab = serde_json::Map::new();
    let mut add = |text: String| {
        let id = vocab.len();
        vocab.entry(text).or_insert(json!(id));
    };
    ["<unk>", "<s>", "</s>"].into_iter().for_each(|text| add(text.to_owned()));
    // Only the bytes that the texts need, so that the tiny embedding has rows for all tokens.
    [10].into_iter().chain(128..=255).for_each(|byte| add(format!("<0x{byte:02X}>")));
    "▁abcdefghijklmnopqrstuvwxyz'.,".chars().for_each(|c| add(c.to_string()));
    let merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("i", "n"),
        ("▁", "▁"),
        ("l", "l"),
        ("▁", "a"),
        ("▁", "he"),
        ("▁he", "ll"),
        ("▁▁", "▁▁"),
    ];
    merges.iter().for_each(|(a, b)| add(format!("{a}{b}")));
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    json!({
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": merges.map(|(a, b)| json!([a, b])),
        },
    })
}

/// The same tokenizer as a `tokenizer.model`.
fn proto(json: &Json) -> Vec<u8> {
    let message = |field: u8, body: &[u8]| {
        let mut out = vec![field << 3 | 2, body.len() as u8 & 0x7f | 0x80, (body.len() >> 7) as u8];
        out.extend(body);
        out
    };
    let merges = json["model"]["merges"].as_array().unwrap();
    let rank = |text: &str| {
        let made =
            |merge: &Json| format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
        merges.iter().position(|merge| made(merge) == text).map_or(0.0, |at| -(at as f32))
    };
    let mut out = Vec::new();
    for text in json["model"]["vocab"].as_object().unwrap().keys() {
        let mut piece = message(1, text.as_bytes());
        piece.push(2 << 3 | 5);
        piece.extend(rank(text).to_le_bytes());
        let kind = match &text[..] {
            "<unk>" => 2,
            "<s>" | "</s>" => 3,
            text if text.starts_with("<0x") => 6,
            _ => 1,
        };
        piece.extend([3 << 3, kind]);
        out.extend(message(1, &piece));
    }
    out.extend(message(2, &[3 << 3, 2]));
    out.extend(message(3, &[3 << 3, 1]));
    out
}

#[test]
fn sentencepiece_comes_from_either_file() {
    let made = made(&TinyDecoder::new("llama"), TensorType::F32);
    let json = pieces();
    let theirs: tokenizers::Tokenizer = serde_json::from_value(json.clone()).unwrap();
    for files in
        [&["tokenizer.json"][..], &["tokenizer.model"], &["tokenizer.json", "tokenizer.model"]]
    {
        for name in ["tokenizer.json", "tokenizer.model"] {
            let _ = fs::remove_file(made.hf.join(name));
        }
        made.put(
            "tokenizer_config.json",
            &json!({"bos_token": "<s>", "eos_token": "</s>",
            "unk_token": {"content": "<unk>"}, "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": true}),
        );
        for name in files {
            match *name {
                "tokenizer.json" => made.put(name, &json),
                name => fs::write(made.hf.join(name), proto(&json)).unwrap(),
            }
        }
        let shrink = |config: &mut Json| config["eos_token_id"] = json!(2);
        let (ours, lacking) = made.with("config.json", shrink, || made.convert()).unwrap();
        assert!(lacking.iter().all(|what| !what.contains("merges")), "{lacking:?}");
        assert_eq!(ours.str("tokenizer.ggml.model").unwrap(), Some("llama"));
        let ours = NativeTokenizer::from_gguf(&ours).unwrap();
        for text in ["the hell in  a    then, the all.", "", " he", "Été 文\n"] {
            let ids = theirs.encode(text, false).unwrap();
            assert_eq!(ours.encode(text, false, false), ids.get_ids(), "{files:?} {text:?}");
        }
        assert_eq!(ours.encode("a", true, false)[0], 1);
    }
    fs::remove_file(&made.out).unwrap();
    fs::remove_file(made.hf.join("tokenizer.json")).unwrap();
    let whole = proto(&json);
    for length in [0, 1, 3, 50, whole.len() - 1] {
        fs::write(made.hf.join("tokenizer.model"), &whole[..length]).unwrap();
        assert!(made.refused("torn").contains("tokenizer.model"), "{length}");
    }
    // A unigram model merges by another algorithm.
    let mut unigram = whole.clone();
    let at = whole.len() - 6;
    assert_eq!(unigram[at], 2);
    unigram[at] = 1;
    fs::write(made.hf.join("tokenizer.model"), unigram).unwrap();
    assert!(made.refused("unigram").contains("BPE"));
}

#[test]
fn a_changed_folder_has_another_fingerprint() {
    let made = made(&TinyDecoder::new("qwen3"), TensorType::F16);
    assert!(is_hugging_face(&made.hf) && !is_hugging_face(&made.out));
    let before = fingerprint(&made.hf).unwrap();
    assert_eq!(fingerprint(&made.hf).unwrap(), before);
    fs::write(made.hf.join("chat_template.jinja"), "x").unwrap();
    assert_ne!(fingerprint(&made.hf).unwrap(), before);
}
