//! Tiny models with seeded random weights, for tests of the whole binary. Not part of the API.
//!
//! The models are complete for llama.cpp: they have the keys and tensors that
//! `src/models/{llama,bert}.cpp` and `src/llama-vocab.cpp` require.

mod decoder;
mod layers;

pub use decoder::TinyDecoder;
pub use layers::{CopiedLayer, with_layers};

use std::f32::consts::TAU;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};

use crate::gguf::{GgufError, GgufWriter, LoraError, ModelFacts, TensorType, Value};

/// ChatML, without tools.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Options of [`tiny_llama`].
#[derive(Clone, Debug)]
pub struct TinyLlama {
    /// Seed of the weights; the same seed gives the same file.
    pub seed: u64,
    /// Number of layers.
    pub n_layer: u32,
    /// Width of the hidden state.
    pub n_embd: u32,
    /// Query heads.
    pub n_head: u32,
    /// Key and value heads.
    pub n_head_kv: u32,
    /// Width of the feed-forward layer.
    pub n_ff: u32,
    /// Context length in tokens.
    pub n_ctx: u32,
    /// `tokenizer.chat_template`; `None` omits the key.
    pub chat_template: Option<String>,
    /// Further templates by name, such as `tool_use`.
    pub named_templates: Vec<(String, String)>,
    /// Whether the output matrix is the embedding. Such a model mostly repeats its last token.
    pub tied: bool,
    /// Type of the matrices: F32, F16 or BF16. Norms are always F32.
    pub ty: TensorType,
}

impl Default for TinyLlama {
    fn default() -> TinyLlama {
        TinyLlama {
            seed: 1,
            n_layer: 2,
            n_embd: 64,
            n_head: 4,
            n_head_kv: 2,
            n_ff: 128,
            n_ctx: 512,
            chat_template: Some(CHATML.to_owned()),
            named_templates: Vec::new(),
            tied: false,
            ty: TensorType::F32,
        }
    }
}

/// Special tokens of [`tiny_llama`], which have the first ids, and their types
/// (`enum llama_token_type`: 3 control; 4 user-defined, which is visible text as in Qwen 3).
pub const SPECIALS: &[(&str, i32)] = &[
    ("<|endoftext|>", 3),
    ("<|im_start|>", 3),
    ("<|im_end|>", 3),
    ("<think>", 4),
    ("</think>", 4),
    ("<tool_call>", 4),
    ("</tool_call>", 4),
];

/// Merges of the BPE vocabulary, in order; `Ġ` is a space.
const MERGES: &[(&str, &str)] =
    &[("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("l", "l"), ("Ġ", "a")];

/// The character that represents a byte in byte-level BPE (`bytes_to_unicode` of GPT-2): printable
/// Latin-1 represents itself, the other bytes use characters from U+0100 on.
fn byte_char(byte: u8) -> char {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !plain(b)).count() as u32;
    char::from_u32(0x100 + before).expect("U+0100 to U+0143 are characters")
}

/// Tokens and their types.
fn bpe_vocabulary() -> (Vec<String>, Vec<i32>) {
    let mut tokens: Vec<String> = SPECIALS.iter().map(|(text, _)| (*text).to_owned()).collect();
    let mut types: Vec<i32> = SPECIALS.iter().map(|&(_, ty)| ty).collect();
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    tokens.extend(MERGES.iter().map(|(a, b)| format!("{a}{b}")));
    types.resize(tokens.len(), 1);
    (tokens, types)
}

/// Writes a llama with a byte-level BPE vocabulary to `path`.
///
/// Greedy decoding generates printable ASCII and does not end by itself: the output rows of all
/// other tokens are zero (unless `tied`). A test that needs an end can bias the id of `<|im_end|>`,
/// 2.
///
/// # Errors
/// [`GgufError`], if the file cannot be written.
pub fn tiny_llama(path: &Path, options: &TinyLlama) -> Result<(), GgufError> {
    let o = options;
    let (tokens, types) = bpe_vocabulary();
    let mut rng = Rng(o.seed);
    let mut w = GgufWriter::new();
    llama_metadata(&mut w, o, &tokens, types);
    let (embd, ff) = (u64::from(o.n_embd), u64::from(o.n_ff));
    let kv = embd / u64::from(o.n_head) * u64::from(o.n_head_kv);
    let vocab = tokens.len() as u64;
    w.tensor_f32("token_embd.weight", &[embd, vocab], o.ty, rng.normal(embd * vocab, 1.0))?;
    for il in 0..o.n_layer {
        let blk = |name: &str| format!("blk.{il}.{name}.weight");
        w.tensor_f32(&blk("attn_norm"), &[embd], TensorType::F32, ones(embd))?;
        for (name, input, output) in [
            ("attn_q", embd, embd),
            ("attn_k", embd, kv),
            ("attn_v", embd, kv),
            ("attn_output", embd, embd),
        ] {
            w.tensor_f32(&blk(name), &[input, output], o.ty, rng.matrix(input, output))?;
        }
        w.tensor_f32(&blk("ffn_norm"), &[embd], TensorType::F32, ones(embd))?;
        for (name, input, output) in
            [("ffn_gate", embd, ff), ("ffn_up", embd, ff), ("ffn_down", ff, embd)]
        {
            w.tensor_f32(&blk(name), &[input, output], o.ty, rng.matrix(input, output))?;
        }
    }
    w.tensor_f32("output_norm.weight", &[embd], TensorType::F32, ones(embd))?;
    if !o.tied {
        let mut output = rng.matrix(embd, vocab);
        for (row, token) in output.chunks_exact_mut(embd as usize).zip(&tokens) {
            if SPECIALS.iter().any(|(text, _)| text == token) || !printable(token) {
                row.fill(0.0);
            }
        }
        w.tensor_f32("output.weight", &[embd, vocab], o.ty, output)?;
    }
    w.write(path)?;
    Ok(())
}

/// Sets the keys of dimensions, tokenizer and templates.
fn llama_metadata(w: &mut GgufWriter, o: &TinyLlama, tokens: &[String], types: Vec<i32>) {
    let head = o.n_embd / o.n_head;
    let file_type = match o.ty {
        TensorType::F16 => 1u32,
        TensorType::BF16 => 32,
        _ => 0,
    };
    w.set("general.architecture", "llama")
        .set("general.type", "model")
        .set("general.name", "Tiny Llama")
        .set("general.basename", "tiny-llama")
        .set("general.size_label", "100K")
        .set("general.file_type", file_type)
        .set("llama.block_count", o.n_layer)
        .set("llama.context_length", o.n_ctx)
        .set("llama.embedding_length", o.n_embd)
        .set("llama.feed_forward_length", o.n_ff)
        .set("llama.attention.head_count", o.n_head)
        .set("llama.attention.head_count_kv", o.n_head_kv)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("llama.rope.dimension_count", head)
        .set("llama.rope.freq_base", 10_000f32)
        .set("llama.vocab_size", tokens.len() as u32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "gpt-2")
        .set("tokenizer.ggml.tokens", tokens.to_vec())
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.merges", strings(MERGES.iter().map(|(a, b)| format!("{a} {b}"))))
        .set("tokenizer.ggml.bos_token_id", 1u32)
        .set("tokenizer.ggml.eos_token_id", 2u32)
        .set("tokenizer.ggml.unknown_token_id", 0u32)
        .set("tokenizer.ggml.padding_token_id", 0u32)
        .set("tokenizer.ggml.add_bos_token", false);
    if let Some(template) = &o.chat_template {
        w.set("tokenizer.chat_template", template.as_str());
    }
    for (name, template) in &o.named_templates {
        w.set(&format!("tokenizer.chat_template.{name}"), template.as_str());
    }
}

/// Whether a BPE token represents printable ASCII (`Ġ` is a space).
fn printable(token: &str) -> bool {
    token.chars().all(|c| c == 'Ġ' || c.is_ascii_graphic())
}

/// Width, feed-forward width and context length of [`tiny_bert`].
const EMBD: u64 = 32;
const FF: u64 = 64;
const CTX: u64 = 64;

/// Writes a BERT encoder (2 layers, 32 wide, context 64, mean pooling) with a WordPiece vocabulary
/// of letters, digits, punctuation and a few words to `path`.
///
/// # Errors
/// [`GgufError`], if the file cannot be written.
pub fn tiny_bert(path: &Path) -> Result<(), GgufError> {
    let (tokens, types) = word_pieces();
    let mut rng = Rng(7);
    let mut w = GgufWriter::new();
    bert_metadata(&mut w, &tokens, types);

    let f32 = TensorType::F32;
    let vocab = tokens.len() as u64;
    for (name, rows) in [("token_embd", vocab), ("token_types", 2), ("position_embd", CTX)] {
        w.tensor_f32(&format!("{name}.weight"), &[EMBD, rows], f32, rng.normal(EMBD * rows, 0.5))?;
    }
    w.tensor_f32("token_embd_norm.weight", &[EMBD], f32, ones(EMBD))?;
    w.tensor_f32("token_embd_norm.bias", &[EMBD], f32, rng.normal(EMBD, 0.1))?;
    for il in 0..2 {
        for (name, input, output) in [
            ("attn_q", EMBD, EMBD),
            ("attn_k", EMBD, EMBD),
            ("attn_v", EMBD, EMBD),
            ("attn_output", EMBD, EMBD),
            ("ffn_up", EMBD, FF),
            ("ffn_down", FF, EMBD),
        ] {
            let name = format!("blk.{il}.{name}");
            let weight = rng.matrix(input, output);
            w.tensor_f32(&format!("{name}.weight"), &[input, output], f32, weight)?;
            w.tensor_f32(&format!("{name}.bias"), &[output], f32, rng.normal(output, 0.1))?;
        }
        for name in ["attn_output_norm", "layer_output_norm"] {
            let name = format!("blk.{il}.{name}");
            w.tensor_f32(&format!("{name}.weight"), &[EMBD], f32, ones(EMBD))?;
            w.tensor_f32(&format!("{name}.bias"), &[EMBD], f32, rng.normal(EMBD, 0.1))?;
        }
    }
    w.write(path)?;
    Ok(())
}

/// Sets the keys of dimensions and tokenizer.
fn bert_metadata(w: &mut GgufWriter, tokens: &[String], types: Vec<i32>) {
    w.set("general.architecture", "bert")
        .set("general.type", "model")
        .set("general.name", "Tiny Bert")
        .set("general.file_type", 0u32)
        .set("bert.block_count", 2u32)
        .set("bert.context_length", CTX as u32)
        .set("bert.embedding_length", EMBD as u32)
        .set("bert.feed_forward_length", FF as u32)
        .set("bert.attention.head_count", 4u32)
        .set("bert.attention.layer_norm_epsilon", 1e-12f32)
        .set("bert.attention.causal", false)
        .set("bert.pooling_type", 1u32)
        .set("tokenizer.ggml.model", "bert")
        .set("tokenizer.ggml.token_type_count", 2u32)
        .set("tokenizer.ggml.tokens", tokens.to_vec())
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.padding_token_id", 0u32)
        .set("tokenizer.ggml.unknown_token_id", 1u32)
        .set("tokenizer.ggml.bos_token_id", 2u32)
        .set("tokenizer.ggml.cls_token_id", 2u32)
        .set("tokenizer.ggml.eos_token_id", 3u32)
        .set("tokenizer.ggml.seperator_token_id", 3u32)
        .set("tokenizer.ggml.mask_token_id", 4u32);
}

/// WordPiece tokens as llama.cpp stores them: `▁` starts a word, continuations lose their `##`.
fn word_pieces() -> (Vec<String>, Vec<i32>) {
    const WORDS: &[&str] = &["the", "a", "is", "cat", "dog", "sat", "on", "mat", "hello", "world"];
    const CONTROL: &[&str] = &["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let mut tokens: Vec<String> = CONTROL.iter().map(|&text| text.to_owned()).collect();
    let mut types = vec![3; tokens.len()];
    let alphabet = || ('a'..='z').chain('0'..='9');
    tokens.extend(alphabet().map(|c| format!("▁{c}")));
    tokens.extend(alphabet().map(String::from));
    tokens.extend(".,!?;:'\"()-/".chars().map(|c| format!("▁{c}")));
    // Single letters are in the alphabet already; llama.cpp aborts on duplicates.
    tokens.extend(WORDS.iter().filter(|word| word.len() > 1).map(|word| format!("▁{word}")));
    types.resize(tokens.len(), 1);
    (tokens, types)
}

/// Writes a PEFT folder with random factors for the attention matrices of every layer, large enough
/// to change greedy output. The base must have separate q, k and v (all families but Phi-3).
///
/// # Errors
/// [`LoraError`], if the folder cannot be written.
pub fn tiny_peft(folder: &Path, facts: &ModelFacts, rank: u32, seed: u64) -> Result<(), LoraError> {
    let io = |source| LoraError::Io { file: "the adapter folder", source };
    fs::create_dir_all(folder).map_err(io)?;
    let config = serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
    });
    fs::write(folder.join("adapter_config.json"), format!("{config:#}")).map_err(io)?;

    let mut rng = Rng(seed);
    let (embd, rank) = (u64::from(facts.n_embd), u64::from(rank));
    let q = u64::from(facts.n_head * facts.key_length);
    let mut tensors = Vec::new();
    for (il, &heads) in facts.n_head_kv.iter().enumerate() {
        let k = u64::from(heads * facts.key_length);
        let v = u64::from(heads * facts.value_length);
        let o = u64::from(facts.n_head * facts.value_length);
        for (name, input, output) in
            [("q", embd, q), ("k", embd, k), ("v", embd, v), ("o", o, embd)]
        {
            let name = format!("base_model.model.model.layers.{il}.self_attn.{name}_proj");
            let a = rng.matrix(input, rank);
            let b = rng.matrix(rank, output);
            tensors.push((format!("{name}.lora_A.weight"), [rank as usize, input as usize], a));
            tensors.push((format!("{name}.lora_B.weight"), [output as usize, rank as usize], b));
        }
    }
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
        (name.as_str(), view.expect("shape and bytes were made together"))
    });
    let file = serialize(views, None).map_err(|e| LoraError::Folder(e.to_string()))?;
    fs::write(folder.join("adapter_model.safetensors"), file).map_err(io)
}

fn strings(items: impl Iterator<Item = String>) -> Value {
    items.collect::<Vec<_>>().into()
}

fn ones(n: u64) -> Vec<f32> {
    vec![1.0; n as usize]
}

/// SplitMix64 (Steele, Lea, Flood 2014): sufficient for random weights, without a dependency.
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A uniformly distributed number in (0, 1].
    fn unit(&mut self) -> f32 {
        ((self.next() >> 40) + 1) as f32 / (1u64 << 24) as f32
    }

    /// `n` numbers of the normal distribution (Box and Muller).
    fn normal(&mut self, n: u64, std: f32) -> Vec<f32> {
        (0..n).map(|_| std * (-2.0 * self.unit().ln()).sqrt() * (TAU * self.unit()).cos()).collect()
    }

    /// A matrix that preserves the scale of its input: variance `1 / input`.
    fn matrix(&mut self, input: u64, output: u64) -> Vec<f32> {
        self.normal(input * output, 1.0 / (input as f32).sqrt())
    }
}
