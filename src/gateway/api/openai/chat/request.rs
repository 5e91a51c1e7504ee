//! The request of `POST /v1/chat/completions`, validated.

use super::constraint::Constraint;
use crate::gateway::api::openai::template;
use crate::gateway::api::wire::fields::{Fields, wrong};
use crate::gateway::api::wire::format::take_response_format;
use crate::gateway::api::wire::messages::{MAX_NAME, take_messages};
use crate::gateway::api::wire::params::{Common, MAX_CHOICES, MAX_TOP_LOGPROBS, take_max_tokens};
use crate::gateway::api::wire::tools::{Tools, take_tools};
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{Model, Served};
use crate::ipc::{Generate, Grammar, ModelInfo, Prompt, RequestId};
use crate::template::{RenderInput, RenderedPrompt};
use serde_json::{Map, Value, json};

/// A validated request.
#[derive(Debug)]
pub(in crate::gateway::api) struct ChatRequest {
    pub common: Common,
    pub messages: Vec<Value>,
    pub tools: Option<Tools>,
    pub format: Option<Grammar>,
    /// Number of alternatives per position; `None` if no log-probabilities are requested.
    pub logprobs: Option<u32>,
    template_kwargs: Map<String, Value>,
    reasoning_effort: Option<String>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    /// The best of the generated choices are returned.
    pub(super) best: Option<BestOf>,
}

/// Best-of-n sampling with a reward model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BestOf {
    pub(super) reward_model: String,
    /// Number of choices to return.
    pub(super) keep: usize,
}

impl ChatRequest {
    /// A request of the gateway itself, with the defaults of all parameters.
    pub(in crate::gateway::api) fn plain(model: &str, messages: Vec<Value>) -> Self {
        Self {
            common: Common::plain(model),
            messages,
            tools: None,
            format: None,
            logprobs: None,
            template_kwargs: Map::new(),
            reasoning_effort: None,
            add_generation_prompt: true,
            continue_final_message: false,
            best: None,
        }
    }

    /// Asks models whose reasoning can be switched off to answer at once.
    pub(in crate::gateway::api) fn without_reasoning(&mut self) {
        self.template_kwargs.insert("enable_thinking".into(), json!(false));
    }

    pub(in crate::gateway::api) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        refuse_media(&mut fields)?;
        let best = take_best_of(&mut fields)?;
        let mut common = Common::take(&mut fields)?;
        let best = best.map(|best| best.apply(&mut common)).transpose()?;
        common.stop.max_tokens = take_max_tokens(&mut fields, 1)?;
        let messages = take_messages(&mut fields)?;
        let tools = take_tools(&mut fields)?;
        if best.is_some() && tools.is_some() {
            let message = "reward_model cannot be combined with tools: it scores texts.";
            return Err(ApiError::invalid("reward_model", message));
        }
        let format = take_response_format(&mut fields)?;
        let logprobs = take_logprobs(&mut fields)?;
        let mut template_kwargs =
            fields.object("chat_template_kwargs")?.map(Fields::into_map).unwrap_or_default();
        // Qwen's servers take `enable_thinking` beside the messages.
        if let Some(thinking) = fields.boolean("enable_thinking")? {
            let thinking = json!(thinking);
            if template_kwargs.get("enable_thinking").is_some_and(|inner| *inner != thinking) {
                let message = "enable_thinking contradicts chat_template_kwargs.enable_thinking";
                return Err(ApiError::invalid("enable_thinking", message));
            }
            template_kwargs.insert("enable_thinking".into(), thinking);
        }
        // Parameters of text completions: in a chat the template writes the initial tokens.
        for key in ["echo", "add_special_tokens"] {
            fields.only_neutral(key, &[json!(false)])?;
        }
        let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt =
            fields.boolean("add_generation_prompt")?.unwrap_or(!continue_final_message);
        if continue_final_message && add_generation_prompt {
            let message = "add_generation_prompt cannot be combined with continue_final_message";
            return Err(ApiError::invalid("add_generation_prompt", message));
        }
        let reasoning_effort = take_effort(&mut fields)?;
        fields.finish()?;
        if best.is_some() && !add_generation_prompt {
            let message = "reward_model cannot be combined with continue_final_message or with \
                           add_generation_prompt: false: it scores whole answers.";
            return Err(ApiError::invalid("reward_model", message));
        }
        Ok(Self {
            common,
            messages,
            tools,
            format,
            logprobs,
            template_kwargs,
            reasoning_effort,
            add_generation_prompt,
            continue_final_message,
            best,
        })
    }

    /// Checks the parameters that depend on the model.
    pub(super) fn check(&self, info: &ModelInfo) -> Result<(), ApiError> {
        if !info.can_generate {
            let message = "This model computes embeddings only; it does not chat.";
            return Err(ApiError::invalid("model", message));
        }
        self.common.check_model(info)
    }

    /// Passes `reasoning_effort` to the template, if the template has a variable for it.
    pub(super) fn map_effort(&mut self, model: &Model) -> Result<(), ApiError> {
        let Some(effort) = self.reasoning_effort.take() else { return Ok(()) };
        let source = model.facts.tokenizer.chat_template.as_deref().unwrap_or_default();
        let off = effort == "none";
        let mut taken = false;
        for (variable, value) in
            [("reasoning_effort", json!(effort)), ("enable_thinking", json!(!off))]
        {
            if source.contains(variable) {
                self.template_kwargs.entry(variable).or_insert(value);
                taken = true;
            }
        }
        // Without a template variable, only the model's fixed behaviour can be requested.
        let thinks = template(model)?.caps().thinking;
        let neutral = effort == "medium" || (!thinks && (off || effort == "minimal"));
        if taken || neutral {
            return Ok(());
        }
        let message = format!("reasoning_effort \"{effort}\" is not supported by this model");
        Err(ApiError::invalid("reasoning_effort", message).with_code("unsupported_parameter"))
    }

    pub(super) fn render_input(&mut self) -> RenderInput {
        RenderInput {
            messages: std::mem::take(&mut self.messages),
            tools: self.tools.as_ref().map(|tools| tools.definitions.clone()),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            chat_template_kwargs: std::mem::take(&mut self.template_kwargs),
            now: None,
        }
    }

    pub(super) fn into_generate(
        self,
        served: &Served,
        identity: Identity,
        prompt: RenderedPrompt,
        constraint: Constraint,
    ) -> Generate {
        let bos = served.model.facts.tokenizer.bos.as_ref();
        let wrote_bos =
            bos.is_some_and(|bos| !bos.text.is_empty() && prompt.text.starts_with(&bos.text));
        let tenant = self.common.tenant(identity);
        Generate {
            id: RequestId(0),
            prompt: Prompt::Rendered {
                text: prompt.text,
                barriers: prompt.barriers,
                add_special: !wrote_bos,
            },
            choices: self.common.choices,
            sampling: self.common.sampling,
            stop: self.common.stop,
            logprobs: self.logprobs,
            echo: false,
            // Markers of tool calls and reasoning are control tokens in some models.
            render_special: self.common.render_special
                || self.tools.is_some()
                || constraint.reasoning.is_some(),
            grammar: constraint.grammar,
            adapter: served.adapter.as_ref().map(|adapter| adapter.id),
            tenant,
            priority: self.common.priority,
            max_drafted: self.common.max_drafted,
            fair_key: identity.key,
            rollout: false,
        }
    }
}

/// `reward_model` and `best_of` as they are written.
struct WrittenBestOf {
    reward_model: String,
    best_of: u32,
}

/// Takes `best_of` if there is a `reward_model`. Otherwise `best_of` has no meaning in a chat.
fn take_best_of(fields: &mut Fields) -> Result<Option<WrittenBestOf>, ApiError> {
    let Some(reward_model) = fields.string("reward_model", MAX_NAME)? else {
        return Ok(None);
    };
    let best_of = fields.count("best_of", 2, MAX_CHOICES)?.ok_or_else(|| {
        ApiError::invalid(
            "best_of",
            "best_of is needed with reward_model: how many answers it scores.",
        )
    })?;
    Ok(Some(WrittenBestOf { reward_model, best_of }))
}

impl WrittenBestOf {
    /// Generates `best_of` choices in place of `n`.
    fn apply(self, common: &mut Common) -> Result<BestOf, ApiError> {
        let keep = common.choices as usize;
        if common.choices > self.best_of {
            let message = format!("best_of is {}, less than n ({keep}).", self.best_of);
            return Err(ApiError::invalid("best_of", message));
        }
        if common.stream.is_some() {
            let message =
                "best_of cannot be streamed: all answers are needed before the best is known.";
            return Err(ApiError::invalid("stream", message));
        }
        common.choices = self.best_of;
        Ok(BestOf { reward_model: self.reward_model, keep })
    }
}

/// Takes `logprobs` (whether) and `top_logprobs` (number of alternatives).
fn take_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    match top {
        Some(1..) if !wanted => Err(ApiError::invalid(
            "top_logprobs",
            "top_logprobs is only allowed when logprobs is true",
        )),
        _ => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

fn take_effort(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    const KNOWN: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];
    match fields.string("reasoning_effort", 64)? {
        Some(effort) if !KNOWN.contains(&effort.as_str()) => {
            let expected = "one of none, minimal, low, medium, high and xhigh";
            Err(wrong("reasoning_effort", expected, &json!(effort)))
        }
        effort => Ok(effort),
    }
}

/// Refuses parameters that only multimodal or hosted models support.
fn refuse_media(fields: &mut Fields) -> Result<(), ApiError> {
    fields.only_neutral("modalities", &[json!(["text"])])?;
    fields.only_neutral("verbosity", &[json!("medium")])?;
    for key in ["audio", "prediction", "web_search_options"] {
        // Even an empty object enables these features.
        if fields.take(key).is_some() {
            let message =
                format!("Unsupported parameter: '{key}' is not supported by this server.");
            return Err(ApiError::invalid(key, message).with_code("unsupported_parameter"));
        }
    }
    Ok(())
}
