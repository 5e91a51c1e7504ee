//! `config.json`: the architecture, the GGUF metadata, and the tensors that the model must have.

use super::ConvertError;
use super::folder::{CONFIG, Object};
use super::names::hugging_face_name;
use super::rope::{Rope, rope};
use super::weights::Weights;
use crate::gguf::{Array, Value, is_interleaved};
use serde_json::Value as Json;

/// A key without the prefix of the architecture's name.
pub(super) type Key = &'static str;

/// Everything that is written except the tokenizer.
pub(super) struct Plan {
    pub architecture: &'static str,
    pub keys: Vec<(Key, Value)>,
    /// Rows of the embedding.
    pub vocab: u64,
    pub tensors: Vec<Wanted>,
    /// Vectors that are computed from the configuration.
    pub computed: Vec<(&'static str, Vec<f32>)>,
}

/// A tensor of the GGUF, and its source.
pub(super) struct Wanted {
    pub name: String,
    pub from: String,
    /// In ggml's order: the number of columns first.
    pub dims: Vec<u64>,
    pub change: Change,
}

/// Change of a tensor during conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// Rows in halves are reordered to adjacent rows, within each of this many heads.
    Neighbours(u64),
    /// 1 is added, for Gemma's norms.
    PlusOne,
}

/// An object of the configuration; its errors name the object.
#[derive(Clone, Copy)]
pub(super) struct Config<'a>(pub &'a Object);

/// Maximum of token counts and similar numbers.
const MAX_NUMBER: u64 = 1 << 31;
/// Limits far above any model, because memory is allocated by these numbers.
const MAX_LAYERS: u64 = 4096;
const MAX_HEAD: u64 = 1 << 16;

impl<'a> Config<'a> {
    pub(super) fn wrong(&self, reason: impl Into<String>) -> ConvertError {
        ConvertError::new(CONFIG, reason)
    }

    /// A value that is present and not null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Json> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Config<'a>>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::Object(object)) => Ok(Some(Config(object))),
            Some(other) => Err(self.wrong(format!("`{key}` is {other}, not an object"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(format!("`{key}` is {other}, not a text"))),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(format!("`{key}` is {other}, not true or false"))),
        }
    }

    /// A whole number of at least 1.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|number| (1..MAX_NUMBER).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(format!("`{key}` is {value}, not a whole number from 1 on"))),
        }
    }

    /// A number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| (*number as f32).is_finite() && *number > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(format!("`{key}` is {value}, not a number above 0"))),
        }
    }

    pub(super) fn needed(&self, key: &str) -> Result<f64, ConvertError> {
        self.positive(key)?.ok_or_else(|| self.wrong(format!("`{key}` is missing")))
    }

    /// A whole number, or the default of the family's configuration class.
    fn number_or(&self, key: &str, default: Option<u64>) -> Result<u64, ConvertError> {
        match self.number(key)?.or(default) {
            Some(number) => Ok(number),
            None => Err(self.wrong(format!("`{key}` is missing"))),
        }
    }
}

/// The architectures: `model_type` in transformers, and the name in a GGUF.
const ARCHITECTURES: [(&str, &str); 8] = [
    ("llama", "llama"),
    ("mistral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("gemma3_text", "gemma3"),
    ("gemma3", "gemma3"),
    ("phi3", "phi3"),
];

/// Dimensions of a model.
struct Shape {
    architecture: &'static str,
    layers: u64,
    width: u64,
    ff: u64,
    heads: u64,
    kv_heads: u64,
    head: u64,
    vocab: u64,
    context: u64,
}

impl Shape {
    fn gemma(&self) -> bool {
        self.architecture.starts_with("gemma")
    }
}

/// Reads the configuration. Settings that a GGUF cannot represent are added to `lacking`.
pub(super) fn plan(
    config: &Object,
    weights: &Weights,
    lacking: &mut Vec<String>,
) -> Result<Plan, ConvertError> {
    let config = Config(config);
    let shape = shape(&config)?;
    refuse(&config, &shape)?;
    let rotated = rotated(&config, &shape)?;
    let Rope { keys: of_rope, tensors: computed } =
        rope(&config, shape.architecture, rotated, lacking)?;
    let number = |number: u64| Value::U32(number as u32);
    let epsilon = config.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    let mut keys = vec![
        ("vocab_size", number(shape.vocab)),
        ("block_count", number(shape.layers)),
        ("context_length", number(shape.context)),
        ("embedding_length", number(shape.width)),
        ("feed_forward_length", number(shape.ff)),
        ("attention.head_count", number(shape.heads)),
        ("attention.head_count_kv", number(shape.kv_heads)),
        ("attention.key_length", number(shape.head)),
        ("attention.value_length", number(shape.head)),
        ("attention.layer_norm_rms_epsilon", epsilon.into()),
    ];
    keys.extend(of_rope);
    match shape.architecture {
        "phi3" => {
            // llama.cpp distinguishes Phi-4 from Phi-3 by a window of zero.
            let window = config.number("sliding_window")?.unwrap_or(0);
            keys.push(("attention.sliding_window", number(window)));
        }
        "gemma2" | "gemma3" => gemma(&config, &shape, &mut keys)?,
        _ => windowless(&config, &shape, lacking)?,
    }
    let tied = tied(&config, &shape, weights)?;
    let tensors = tensors(&shape, weights, tied);
    let (architecture, vocab) = (shape.architecture, shape.vocab);
    Ok(Plan { architecture, keys, vocab, tensors, computed })
}

fn shape(config: &Config) -> Result<Shape, ConvertError> {
    let kind = config.text("model_type")?.unwrap_or("");
    let Some((_, architecture)) = ARCHITECTURES.iter().find(|(theirs, _)| *theirs == kind) else {
        let known: Vec<_> = ARCHITECTURES.iter().map(|(theirs, _)| *theirs).collect();
        return Err(config.wrong(format!(
            "the `model_type` is `{kind}`; what can be read is {}",
            known.join(", ")
        )));
    };
    // Gemma's first configurations omit values that are defaults of the class.
    let gemma = |number: u64| (*architecture == "gemma3").then_some(number);
    let (width, heads) = (
        config.number_or("hidden_size", None)?,
        config.number_or("num_attention_heads", gemma(8))?,
    );
    let head = match config.number("head_dim")? {
        Some(head) => head,
        None if architecture.starts_with("gemma") => 256,
        None if !width.is_multiple_of(heads) => {
            return Err(config.wrong(format!(
                "`hidden_size` {width} is not a multiple of `num_attention_heads` {heads}; say \
                 `head_dim`"
            )));
        }
        None => width / heads,
    };
    let kv_heads = config.number_or("num_key_value_heads", Some(gemma(4).unwrap_or(heads)))?;
    if !heads.is_multiple_of(kv_heads) || !head.is_multiple_of(2) {
        return Err(config.wrong(format!(
            "{heads} query heads of {head} do not share {kv_heads} heads of keys"
        )));
    }
    let layers = config.number_or("num_hidden_layers", None)?;
    if layers > MAX_LAYERS || head > MAX_HEAD {
        return Err(config.wrong(format!("{layers} layers with heads of {head} are no model")));
    }
    Ok(Shape {
        architecture,
        layers,
        width,
        ff: config.number_or("intermediate_size", None)?,
        heads,
        kv_heads,
        head,
        vocab: config.number_or("vocab_size", gemma(262_208))?,
        context: config.number_or("max_position_embeddings", gemma(131_072))?,
    })
}

/// Refuses settings that would make another model.
fn refuse(config: &Config, shape: &Shape) -> Result<(), ConvertError> {
    if let Some(quantized) = config.object("quantization_config")? {
        let how = quantized.text("quant_method")?.unwrap_or("somehow");
        return Err(config.wrong(format!(
            "the weights are quantized ({how}); name the folder of the model that they were made from"
        )));
    }
    let activation = config.text("hidden_activation")?.or(config.text("hidden_act")?);
    let known: &[&str] = match shape.gemma() {
        // Older configurations say `gelu` but mean its tanh approximation.
        true => &["gelu_pytorch_tanh", "gelu"],
        false => &["silu", "swish"],
    };
    if let Some(other) = activation.filter(|activation| !known.contains(activation)) {
        let (architecture, known) = (shape.architecture, known[0]);
        return Err(config.wrong(format!(
            "the activation `{other}` is not carried over: a GGUF of a `{architecture}` means {known}"
        )));
    }
    if config.flag("use_bidirectional_attention")? == Some(true) {
        return Err(config.wrong("attention to later tokens is not carried over"));
    }
    Ok(())
}

/// Number of rotated elements of a head.
fn rotated(config: &Config, shape: &Shape) -> Result<u64, ConvertError> {
    let outer = config.positive("partial_rotary_factor")?;
    let inner = match config.object("rope_parameters")? {
        Some(parameters) => parameters.positive("partial_rotary_factor")?,
        None => None,
    };
    let share = inner.or(outer).unwrap_or(1.0);
    let dims = (shape.head as f64 * share) as u64;
    match (shape.architecture, dims == shape.head) {
        (_, true) => Ok(dims),
        ("phi3", false) if dims > 0 && dims < shape.head && dims.is_multiple_of(2) => Ok(dims),
        _ => Err(config.wrong(format!("`partial_rotary_factor` {share} is not carried over"))),
    }
}

/// Notes a sliding window in families whose GGUF cannot represent one.
fn windowless(
    config: &Config,
    shape: &Shape,
    lacking: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let used = shape.architecture == "llama" || config.flag("use_sliding_window")? == Some(true);
    let window = config.number("sliding_window")?.filter(|_| used);
    if let Some(window) = window.filter(|window| *window < shape.context) {
        lacking.push(format!(
            "the sliding window of {window} tokens: a GGUF of a `{}` has none, and a token sees all \
             before it",
            shape.architecture
        ));
    }
    Ok(())
}

/// Sets windows and caps, and checks the attention scale, which a GGUF derives from the head width.
fn gemma(config: &Config, shape: &Shape, keys: &mut Vec<(Key, Value)>) -> Result<(), ConvertError> {
    let caps = ["attn_logit_softcapping", "final_logit_softcapping"];
    let [attention, last] = caps.map(|cap| config.positive(cap));
    let (attention, last) = (attention?, last?);
    if shape.architecture == "gemma2" {
        // Null means no cap; a missing key would mean Gemma's default.
        let usual = |key: &str, cap: Option<f64>, usual: f32| match config.0.contains_key(key) {
            true => cap.map_or(0.0, |cap| cap as f32),
            false => usual,
        };
        keys.push((caps[0], usual(caps[0], attention, 50.0).into()));
        keys.push((caps[1], usual(caps[1], last, 30.0).into()));
    } else if attention.is_some() {
        return Err(config.wrong(format!("`{}` is not carried over for Gemma 3", caps[0])));
    } else if let Some(cap) = last {
        keys.push((caps[1], (cap as f32).into()));
    }
    let (deepest, period) = if shape.architecture == "gemma2" { (46, 2) } else { (62, 6) };
    let wide = if shape.layers == deepest { shape.width / shape.heads } else { shape.head };
    let scale = config.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    if scale != wide as f64 {
        return Err(config.wrong(format!(
            "`query_pre_attn_scalar` is {scale}, but a GGUF of this model means {wide}"
        )));
    }
    let Some(window) = config.number("sliding_window")? else {
        return Err(config.wrong("`sliding_window` is missing"));
    };
    keys.push(("attention.sliding_window", (window as u32).into()));
    let windowed = windowed(config, shape, period)?;
    let of_period = |period: u64| {
        let expected = |layer: usize| period == 0 || layer as u64 % period < period - 1;
        windowed.iter().enumerate().all(|(layer, windowed)| *windowed == expected(layer))
    };
    // A pattern that every reader assumes is not written.
    if !of_period(period) {
        let found = (0..=shape.layers).find(|period| of_period(*period));
        let pattern = match found {
            Some(period) => Value::U32(period as u32),
            None => Value::Array(Array::Bool(windowed)),
        };
        keys.push(("attention.sliding_window_pattern", pattern));
    }
    Ok(())
}

/// For each layer, whether it has the window.
fn windowed(config: &Config, shape: &Shape, period: u64) -> Result<Vec<bool>, ConvertError> {
    let Some(listed) = config.get("layer_types") else {
        let period = config
            .number("sliding_window_pattern")?
            .or(config.number("_sliding_window_pattern")?)
            .unwrap_or(period);
        return Ok((0..shape.layers).map(|layer| (layer + 1) % period != 0).collect());
    };
    let kind = |kind: &Json| match kind.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let kinds =
        listed.as_array().and_then(|list| list.iter().map(kind).collect::<Option<Vec<_>>>());
    kinds.filter(|kinds| kinds.len() as u64 == shape.layers).ok_or_else(|| {
        config.wrong("`layer_types` must list sliding_attention or full_attention for every layer")
    })
}

/// Whether the output matrix is the embedding.
fn tied(config: &Config, shape: &Shape, weights: &Weights) -> Result<bool, ConvertError> {
    let tied = config.flag("tie_word_embeddings")?.unwrap_or(shape.gemma());
    match tied || weights.has("lm_head.weight") {
        true => Ok(tied),
        false => Err(config.wrong(
            "the weights have no `lm_head.weight`; if its place is taken by the embedding, set \
             `tie_word_embeddings` to true",
        )),
    }
}

/// All tensors of the model.
fn tensors(shape: &Shape, weights: &Weights, tied: bool) -> Vec<Wanted> {
    let mut wanted = Vec::new();
    let interleaved = is_interleaved(shape.architecture);
    let mut add = |name: String, dims: &[u64]| {
        let from = hugging_face_name(&name, shape.architecture).unwrap_or_else(|| name.clone());
        let change = match name.split('.').nth(2) {
            Some("attn_q") if interleaved => Change::Neighbours(shape.heads),
            Some("attn_k") if interleaved => Change::Neighbours(shape.kv_heads),
            _ if shape.gemma() && name.contains("norm") => Change::PlusOne,
            _ => Change::None,
        };
        wanted.push(Wanted { name, from, dims: dims.to_vec(), change });
    };
    let (width, ff, head) = (shape.width, shape.ff, shape.head);
    let (q, kv) = (shape.heads * head, shape.kv_heads * head);
    add("token_embd.weight".into(), &[width, shape.vocab]);
    for layer in 0..shape.layers {
        let mut weight = |part: &str, dims: &[u64]| add(format!("blk.{layer}.{part}.weight"), dims);
        weight("attn_norm", &[width]);
        if matches!(shape.architecture, "qwen3" | "gemma3") {
            weight("attn_q_norm", &[head]);
            weight("attn_k_norm", &[head]);
        }
        if shape.architecture == "phi3" {
            weight("attn_qkv", &[width, q + 2 * kv]);
        } else {
            weight("attn_q", &[width, q]);
            weight("attn_k", &[width, kv]);
            weight("attn_v", &[width, kv]);
        }
        weight("attn_output", &[q, width]);
        if shape.gemma() {
            weight("post_attention_norm", &[width]);
            weight("post_ffw_norm", &[width]);
        }
        weight("ffn_norm", &[width]);
        if shape.architecture == "phi3" {
            weight("ffn_up", &[width, 2 * ff]);
        } else {
            weight("ffn_gate", &[width, ff]);
            weight("ffn_up", &[width, ff]);
        }
        weight("ffn_down", &[ff, width]);
        for (part, rows) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
            let name = format!("blk.{layer}.{part}.bias");
            let from = hugging_face_name(&name, shape.architecture).unwrap_or_default();
            if shape.architecture == "qwen2" || weights.has(&from) {
                add(name, &[rows]);
            }
        }
    }
    add("output_norm.weight".into(), &[width]);
    if !tied {
        add("output.weight".into(), &[width, shape.vocab]);
    }
    wanted
}
