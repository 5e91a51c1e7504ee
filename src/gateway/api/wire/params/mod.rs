//! Parameters that chat and text completions share, and their bounds.
//!
//! Every bound is stated here. A value out of bounds is a 400 that names the parameter; so is an
//! unknown parameter (see [`Fields::finish`]).

use super::fields::{Fields, wrong};
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::ipc::{ModelInfo, SamplingParams, StopParams, Token};
use serde_json::{Value, json};

/// Maximum number of completions of one prompt.
pub(in crate::gateway::api) const MAX_CHOICES: u32 = 16;
/// Maximum number of alternatives per position.
pub(in crate::gateway::api) const MAX_TOP_LOGPROBS: u32 = 20;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_LOGIT_BIAS: usize = 1024;
/// Maximum look-back window, in tokens.
const MAX_WINDOW: u32 = 1 << 20;
const MAX_TOKENS: u32 = i32::MAX as u32;
/// Upper bound of the draft length; the engine's own bound is lower.
const MAX_DRAFTED: u32 = 1024;
/// Maximum length of names and other short strings, in bytes.
const MAX_NAME: usize = 512;

/// The parameters that chat and text completions share, validated.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::gateway::api) struct Common {
    /// Name as the client wrote it; the registry resolves it.
    pub model: String,
    /// OpenAI's `n`.
    pub choices: u32,
    pub sampling: SamplingParams,
    /// Stop parameters without `max_tokens`, which the endpoint sets.
    pub stop: StopParams,
    /// Requests with a higher priority are scheduled earlier.
    pub priority: i32,
    /// Maximum number of drafted tokens per step; 0 disables drafting, `None` uses the server's
    /// value.
    pub max_drafted: Option<u32>,
    /// Whether control tokens are written to the output, except those that end it.
    pub render_special: bool,
    /// Whether cached prefixes may be used, and later requests may use the prefixes of this one.
    pub share_prefix: bool,
    pub stream: Option<StreamOptions>,
    /// What the client says of its user or conversation: requests with the same key get the same
    /// model of a published name.
    pub sticky: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::gateway::api) struct StreamOptions {
    /// Whether a last chunk carries the token counts.
    pub include_usage: bool,
}

impl Common {
    /// The default of every parameter; the seed is random.
    pub(in crate::gateway::api) fn plain(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            choices: 1,
            sampling: SamplingParams { seed: rand::random(), ..SamplingParams::default() },
            stop: StopParams::default(),
            priority: 0,
            max_drafted: None,
            render_special: false,
            share_prefix: true,
            stream: None,
            sticky: None,
        }
    }

    /// Takes all shared parameters. Also takes parameters that have no effect, and refuses
    /// parameters of other servers that are not supported.
    pub(in crate::gateway::api) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let model = take_model(fields)?.ok_or_else(|| fields.missing("model"))?;
        let choices = fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1);
        let mut common = Self {
            model,
            choices,
            sampling: take_sampling(fields)?,
            stop: take_stop(fields)?,
            priority: fields
                .integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?
                .and_then(|priority| i32::try_from(priority).ok())
                .unwrap_or(0),
            // The name in llama-server, including the dot.
            max_drafted: fields.count("speculative.n_max", 0, MAX_DRAFTED)?,
            render_special: !fields.boolean("skip_special_tokens")?.unwrap_or(true),
            share_prefix: fields.boolean("cache_prompt")?.unwrap_or(true),
            stream: take_stream(fields)?,
            sticky: None,
        };
        common.sticky = take_bookkeeping(fields)?;
        fields.only_neutral("best_of", &[json!(1), json!(choices)])?;
        for (key, neutral) in neutral_elsewhere() {
            fields.only_neutral(key, &[neutral])?;
        }
        Ok(common)
    }

    /// Tenant whose cached prefixes a request may use. Without sharing, it is a random new tenant.
    pub(in crate::gateway::api) fn tenant(&self, identity: Identity) -> u64 {
        if self.share_prefix { identity.tenant } else { rand::random() }
    }

    /// Checks what depends on the model: token ids lie in its vocabulary, and drafting is
    /// supported.
    pub(in crate::gateway::api) fn check_model(&self, info: &ModelInfo) -> Result<(), ApiError> {
        if self.max_drafted.is_some_and(|most| most > 0) && !info.speculates {
            let message = "speculative.n_max must be 0 for this model: the server was started with \
                           --speculate off, or llama.cpp runs the model, whose numbers depend on \
                           what is computed together, so that drafts would change the output.";
            return Err(
                ApiError::invalid("speculative.n_max", message).with_code("unsupported_parameter")
            );
        }
        let biased = self.sampling.logit_bias.iter().map(|(token, _)| token);
        check_tokens("logit_bias", biased, info)?;
        check_tokens("stop_token_ids", &self.stop.token_ids, info)
    }
}

/// Checks that every token id lies in the model's vocabulary.
pub(in crate::gateway::api) fn check_tokens<'a>(
    param: &str,
    tokens: impl IntoIterator<Item = &'a Token>,
    info: &ModelInfo,
) -> Result<(), ApiError> {
    match tokens.into_iter().find(|token| **token >= info.vocab_size) {
        None => Ok(()),
        Some(token) => Err(ApiError::invalid(
            param,
            format!(
                "{param} holds the token id {token}, but the model's vocabulary ends at {}",
                info.vocab_size.saturating_sub(1)
            ),
        )),
    }
}

/// Takes the model's name, if there is one.
pub(in crate::gateway::api) fn take_model(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    Ok(fields.string("model", MAX_NAME)?.filter(|name| !name.is_empty()))
}

/// Takes fields that official clients send for bookkeeping: type-checked, without effect but for the
/// first one that identifies a user or a conversation, which is returned.
pub(in crate::gateway::api) fn take_bookkeeping(
    fields: &mut Fields,
) -> Result<Option<String>, ApiError> {
    fields.boolean("store")?;
    fields.object("metadata")?;
    for key in ["service_tier", "prompt_cache_retention"] {
        fields.string(key, MAX_NAME)?;
    }
    let mut sticky = None;
    for key in ["user", "safety_identifier", "prompt_cache_key"] {
        let found = fields.string(key, MAX_NAME)?.filter(|found| !found.is_empty());
        sticky = sticky.or(found);
    }
    Ok(sticky)
}

/// Unsupported parameters of other servers, each with the value that has no effect.
fn neutral_elsewhere() -> [(&'static str, Value); 27] {
    [
        ("use_beam_search", json!(false)),
        ("length_penalty", json!(1)),
        ("early_stopping", json!(false)),
        ("min_tokens", json!(0)),
        ("spaces_between_special_tokens", json!(true)),
        ("include_stop_str_in_output", json!(false)),
        ("truncate_prompt_tokens", json!(-1)),
        ("prompt_logprobs", json!(null)),
        ("mirostat", json!(0)),
        ("tfs_z", json!(1)),
        ("detokenize", json!(true)),
        ("return_token_ids", json!(false)),
        ("return_tokens", json!(false)),
        ("return_tokens_as_token_ids", json!(false)),
        ("return_progress", json!(false)),
        ("return_hidden_states", json!(false)),
        ("return_prompt_token_ids", json!(false)),
        ("return_text_in_logprobs", json!(false)),
        ("timings_per_token", json!(false)),
        ("post_sampling_probs", json!(false)),
        ("separate_reasoning", json!(true)),
        ("stream_reasoning", json!(true)),
        ("include_reasoning", json!(true)),
        ("no_stop_trim", json!(false)),
        ("parse_tool_calls", json!(true)),
        ("dynatemp_range", json!(0)),
        ("top_n_sigma", json!(-1)),
    ]
}

fn take_sampling(fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let mut sampling = SamplingParams::default();
    let numbers = [
        ("temperature", 0.0..=2.0, &mut sampling.temperature),
        ("top_p", 0.0..=1.0, &mut sampling.top_p),
        ("min_p", 0.0..=1.0, &mut sampling.min_p),
        ("typical_p", 0.0..=1.0, &mut sampling.typical_p),
        ("presence_penalty", -2.0..=2.0, &mut sampling.presence_penalty),
        ("frequency_penalty", -2.0..=2.0, &mut sampling.frequency_penalty),
        ("repetition_penalty", 0.01..=10.0, &mut sampling.repetition_penalty),
        ("dry_multiplier", 0.0..=100.0, &mut sampling.dry_multiplier),
        ("dry_base", 1.0..=100.0, &mut sampling.dry_base),
        ("xtc_probability", 0.0..=1.0, &mut sampling.xtc_probability),
        ("xtc_threshold", 0.0..=1.0, &mut sampling.xtc_threshold),
    ];
    let warm = fields.has("temperature");
    for (key, range, slot) in numbers {
        if let Some(number) = fields.number(key, range)? {
            *slot = number;
        }
    }
    // transformers' parameter for greedy decoding.
    if fields.boolean("do_sample")? == Some(false) {
        if warm && sampling.temperature > 0.0 {
            let message = "do_sample is false, which is temperature 0: leave one of them out";
            return Err(ApiError::invalid("do_sample", message));
        }
        sampling.temperature = 0.0;
    }
    // "All tokens" is -1 in vLLM and 0 in llama.cpp.
    if let Some(top_k) = fields.integer("top_k", -1..=i64::from(MAX_TOKENS))? {
        sampling.top_k = u32::try_from(top_k).unwrap_or(0);
    }
    let counts = [
        ("penalty_window", &mut sampling.penalty_window),
        ("dry_allowed_length", &mut sampling.dry_allowed_length),
        ("dry_penalty_last_n", &mut sampling.dry_penalty_last_n),
    ];
    for (key, slot) in counts {
        if let Some(count) = fields.count(key, 0, MAX_WINDOW)? {
            *slot = count;
        }
    }
    if let Some(breakers) = fields.strings("dry_sequence_breakers", 64, 64)? {
        sampling.dry_sequence_breakers = breakers;
    }
    sampling.logit_bias = take_logit_bias(fields)?;
    sampling.seed = take_seed(fields)?;
    Ok(sampling)
}

/// Takes the seed (any 64-bit integer), or chooses a random one.
fn take_seed(fields: &mut Fields) -> Result<u64, ApiError> {
    match fields.take("seed") {
        None => Ok(rand::random()),
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Ok(seed),
            (None, Some(seed)) => Ok(seed.cast_unsigned()),
            (None, None) => Err(fields.wrong("seed", "a 64-bit integer", &value)),
        },
    }
}

fn take_logit_bias(fields: &mut Fields) -> Result<Vec<(Token, f32)>, ApiError> {
    let Some(bias) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let bias = bias.into_map();
    if bias.len() > MAX_LOGIT_BIAS {
        let message =
            format!("logit_bias may have at most {MAX_LOGIT_BIAS} entries, got {}", bias.len());
        return Err(ApiError::invalid("logit_bias", message));
    }
    let entries = bias.into_iter().map(|(key, value)| {
        let digits = key.bytes().all(|byte| byte.is_ascii_digit());
        let token = key.parse::<u32>().ok().filter(|_| digits).filter(|token| *token <= MAX_TOKENS);
        let token = token.ok_or_else(|| wrong("logit_bias", "keyed by token ids", &json!(key)))?;
        match value.as_f64() {
            Some(number) if (-100.0..=100.0).contains(&number) => Ok((token, number as f32)),
            _ => {
                Err(wrong(&format!("logit_bias.{token}"), "a number between -100 and 100", &value))
            }
        }
    });
    entries.collect()
}

fn take_stop(fields: &mut Fields) -> Result<StopParams, ApiError> {
    let strings = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(text)) if text.is_empty() => Vec::new(),
        Some(Value::String(text)) if text.len() <= MAX_STOP_BYTES => vec![text],
        Some(list @ Value::Array(_)) => {
            let mut one = Fields::of(String::new(), json!({ "stop": list }))?;
            one.strings("stop", MAX_STOPS, MAX_STOP_BYTES)?.unwrap_or_default()
        }
        Some(other) => {
            let expected =
                format!("a string or a list of strings, each of 1 to {MAX_STOP_BYTES} bytes");
            return Err(fields.wrong("stop", &expected, &other));
        }
    };
    Ok(StopParams {
        max_tokens: None,
        strings,
        token_ids: fields.tokens("stop_token_ids", MAX_STOPS)?.unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    })
}

fn take_stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let mut options = StreamOptions::default();
    if let Some(mut object) = fields.object("stream_options")? {
        if !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options is only allowed when stream is true",
            ));
        }
        options.include_usage = object.boolean("include_usage")?.unwrap_or(false);
        // Padding against traffic analysis. This server sends none, so both values are accepted.
        object.boolean("include_obfuscation")?;
        object.finish()?;
    }
    Ok(stream.then_some(options))
}

/// Takes `max_tokens` or its newer name in chat; both are accepted only if they agree.
pub(in crate::gateway::api) fn take_max_tokens(
    fields: &mut Fields,
    least: u32,
) -> Result<Option<u32>, ApiError> {
    let old = fields.count("max_tokens", least, MAX_TOKENS)?;
    let new = fields.count("max_completion_tokens", least, MAX_TOKENS)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::invalid(
            "max_tokens",
            "max_tokens is the old name of max_completion_tokens: send one of them",
        )),
        _ => Ok(new.or(old)),
    }
}

#[cfg(test)]
mod tests;
