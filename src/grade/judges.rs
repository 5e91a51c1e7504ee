//! Graders that need a model.

use super::checks::named;
use super::fields::{Fields, template_at, wrong};
use super::template::{Context, LONGEST, Template};
use super::{Answer, Failed, Fault, Flag, GraderError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Maximum number of messages of a question.
const MOST_MESSAGES: usize = 64;
/// Maximum number of messages in a line of data before an answer that is scored.
const MOST_TURNS: usize = 1024;
const MOST_PARTS: usize = 64;
const ROLES: &[(&str, &str)] = &[
    ("user", "user"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("developer", "developer"),
];
const TEXT_PARTS: [&str; 3] = ["input_text", "output_text", "text"];

/// A question to a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub model: String,
    pub ask: Ask,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// A language model must write a number in the range.
    Number { messages: Vec<Message>, range: (f64, f64), sampling: Sampling },
    /// A reward model must score a conversation; the raw score is returned.
    Score { messages: Vec<Message> },
    /// A language model must answer with one of two words; the probability of the first one is
    /// returned, relative to both.
    Choice { messages: Vec<Message>, labels: [String; 2], reasoning: Option<Reasoning> },
}

/// Has a model reason before it chooses (chain of thought, Wei et al. 2022, arXiv:2201.11903).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reasoning {
    /// Maximum number of tokens of the reasoning.
    pub max_tokens: u32,
    /// The message after the reasoning, which asks for the answer.
    pub then: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `user`, `assistant`, `system` or `developer`; in a conversation of the data, any text.
    pub role: String,
    pub content: String,
}

/// Sampling parameters of the question; `None` uses the model's default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub seed: Option<i64>,
    pub max_completions_tokens: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Judge {
    Score { model: String, input: Vec<Turn>, range: (f64, f64), sampling: Sampling },
    Reward { model: String, input: Option<Vec<Turn>>, scale: Scale },
}

/// A message with templates, one for each part of its content.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Turn {
    role: &'static str,
    parts: Vec<Template>,
}

/// Scaling of a reward model's score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Raw,
    /// 1 / (1 + e^−score): from 0 to 1.
    Sigmoid,
}

const SCALES: &[(&str, Scale)] = &[("raw", Scale::Raw), ("sigmoid", Scale::Sigmoid)];

impl Judge {
    pub(super) fn score(fields: &mut Fields) -> Result<Self, GraderError> {
        Ok(Self::Score {
            model: fields.need_name("model")?,
            input: match turns(fields)? {
                Some(input) => input,
                None => return Err(fields.missing("input")),
            },
            range: range(fields)?,
            sampling: match fields.take("sampling_params") {
                None => Sampling::default(),
                Some(value) => Sampling::parse(Fields::of(fields.path("sampling_params"), value)?)?,
            },
        })
    }

    pub(super) fn reward(fields: &mut Fields) -> Result<Self, GraderError> {
        Ok(Self::Reward {
            model: fields.need_name("model")?,
            input: turns(fields)?,
            scale: fields.one_of("scale", SCALES)?.unwrap_or(Scale::Raw),
        })
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Score { .. } => "score_model",
            Self::Reward { .. } => "reward_model",
        }
    }

    /// The model's name, and whether it must be a reward model.
    pub(super) fn model(&self) -> (&str, bool) {
        match self {
            Self::Score { model, .. } => (model, false),
            Self::Reward { model, .. } => (model, true),
        }
    }

    /// Writes the keys of the normal form, except `type` and `name`.
    pub(super) fn write(&self, map: &mut Map<String, Value>) {
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        let turns = |input: &[Turn]| input.iter().map(Turn::value).collect::<Vec<_>>().into();
        put("model", self.model().0.into());
        match self {
            Self::Score { input, range, sampling, .. } => {
                put("input", turns(input));
                put("range", json!([range.0, range.1]));
                put("sampling_params", sampling.value());
            }
            Self::Reward { input, scale, .. } => {
                if let Some(input) = input {
                    put("input", turns(input));
                }
                put("scale", named(SCALES, *scale));
            }
        }
    }

    pub(super) fn question(&self, context: &Context<'_>) -> Result<Question, Fault> {
        let ask = match self {
            Self::Score { input, range, sampling, .. } => Ask::Number {
                messages: fill(input, context)?,
                range: *range,
                sampling: sampling.clone(),
            },
            Self::Reward { input: Some(input), .. } => {
                Ask::Score { messages: fill(input, context)? }
            }
            Self::Reward { input: None, .. } => Ask::Score { messages: conversation(context)? },
        };
        Ok(Question { model: self.model().0.to_owned(), ask })
    }

    /// The value of an answer; `None` is a missing answer.
    pub(super) fn read(&self, answer: Option<&Result<Answer, Failed>>) -> Result<f64, Fault> {
        let model = self.model().0;
        let answer = match answer {
            None => {
                return Err(Fault::new(Flag::Server, format!("the model {model} was not asked")));
            }
            Some(Err(failed)) => {
                let flag = if failed.refused { Flag::Refusal } else { Flag::Server };
                return Err(Fault::new(flag, failed.message.clone()));
            }
            Some(Ok(answer)) => answer,
        };
        let fault =
            |what: String| Fault::new(Flag::ModelParse, format!("the model {model} {what}"));
        let number = answer.number.filter(|number| number.is_finite());
        let number = number.ok_or_else(|| fault("did not answer with a number".to_owned()))?;
        match self {
            Self::Score { range, .. } if !(range.0..=range.1).contains(&number) => Err(fault(
                format!("answered {number}, which is not between {} and {}", range.0, range.1),
            )),
            Self::Score { .. } | Self::Reward { scale: Scale::Raw, .. } => Ok(number),
            Self::Reward { scale: Scale::Sigmoid, .. } => Ok(1.0 / (1.0 + (-number).exp())),
        }
    }
}

/// Takes `range`: two numbers, the second larger than the first.
fn range(fields: &mut Fields) -> Result<(f64, f64), GraderError> {
    let Some(value) = fields.take("range") else { return Ok((0.0, 1.0)) };
    let ends = match value.as_array().map(Vec::as_slice) {
        Some([low, high]) => low.as_f64().zip(high.as_f64()),
        _ => None,
    };
    // If the difference is not finite, the range cannot be scaled.
    ends.filter(|(low, high)| low < high && (high - low).is_finite()).ok_or_else(|| {
        let got = if value.is_array() { value.to_string() } else { String::new() };
        let short = got.len() <= 60 && value.is_array();
        let expected = "two numbers, the smaller one first";
        if short {
            fields.error("range", format!("must be {expected}, got {got}"))
        } else {
            wrong(&fields.path("range"), expected, &value)
        }
    })
}

impl Sampling {
    fn parse(mut fields: Fields) -> Result<Self, GraderError> {
        let sampling = Self {
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: fields.number("top_p", 0.0..=1.0)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            max_completions_tokens: fields
                .integer("max_completions_tokens", 1..=i64::from(u32::MAX))?
                .and_then(|most| u32::try_from(most).ok()),
        };
        // OpenAI's models have this setting; local models do not, so it is accepted without effect.
        let efforts = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
        fields.one_of("reasoning_effort", &efforts.map(|effort| (effort, ())))?;
        fields.finish()?;
        Ok(sampling)
    }

    fn value(&self) -> Value {
        let all = [
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("max_completions_tokens", self.max_completions_tokens.map(Value::from)),
        ];
        let given = all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Value::Object(given.collect())
    }
}

/// Takes `input`: messages.
fn turns(fields: &mut Fields) -> Result<Option<Vec<Turn>>, GraderError> {
    let Some(list) = fields.list("input", MOST_MESSAGES)? else { return Ok(None) };
    list.into_iter()
        .map(|(path, value)| Turn::parse(path, value))
        .collect::<Result<_, _>>()
        .map(Some)
}

impl Turn {
    fn parse(path: String, value: Value) -> Result<Self, GraderError> {
        let mut fields = Fields::of(path, value)?;
        fields.one_of("type", &[("message", ())])?;
        let role = fields.need_one_of("role", ROLES)?;
        let path = fields.path("content");
        let parts = match fields.need("content")? {
            Value::Array(list) if (1..=MOST_PARTS).contains(&list.len()) => {
                let each = list.into_iter().enumerate();
                each.map(|(index, value)| part(format!("{path}[{index}]"), value))
                    .collect::<Result<_, _>>()?
            }
            value @ Value::Array(_) => {
                return Err(wrong(&path, &format!("a list of 1 to {MOST_PARTS} elements"), &value));
            }
            value => vec![part(path, value)?],
        };
        fields.finish()?;
        Ok(Self { role, parts })
    }

    fn value(&self) -> Value {
        let content: Value = match self.parts.as_slice() {
            [part] => part.source().into(),
            parts => {
                let text = |part: &Template| json!({"type": "input_text", "text": part.source()});
                parts.iter().map(text).collect::<Vec<_>>().into()
            }
        };
        json!({"role": self.role, "content": content})
    }
}

/// A part of a message's content: a string, or an object that contains text.
fn part(path: String, value: Value) -> Result<Template, GraderError> {
    if value.is_string() {
        return template_at(&path, value);
    }
    let mut fields = Fields::of(path.clone(), value).map_err(|_| GraderError {
        message: format!("{path} must be a string or an object with a text"),
        param: path.clone(),
    })?;
    fields.need_one_of("type", &TEXT_PARTS.map(|kind| (kind, ())))?;
    let text = fields.template("text")?;
    fields.finish()?;
    Ok(text)
}

/// Renders the messages of a sample, together at most [`LONGEST`] bytes.
fn fill(input: &[Turn], context: &Context<'_>) -> Result<Vec<Message>, Fault> {
    let mut left = LONGEST;
    let mut messages = Vec::with_capacity(input.len());
    for turn in input {
        let mut content = Vec::new();
        for (index, part) in turn.parts.iter().enumerate() {
            if index > 0 {
                content.push(b'\n');
            }
            part.render_into(context, &mut content, left)?;
        }
        left = left.saturating_sub(content.len());
        let content = String::from_utf8(content)
            .map_err(|_| Fault::new(Flag::Other, "a filled template is no UTF-8"))?;
        messages.push(Message { role: turn.role.to_owned(), content });
    }
    Ok(messages)
}

/// The item's `messages`, followed by the sample as the assistant's answer.
fn conversation(context: &Context<'_>) -> Result<Vec<Message>, Fault> {
    let fault = |why: &str| Fault::new(Flag::Variable, why);
    let turns = context.item().get("messages").and_then(Value::as_array);
    let turns = turns.ok_or_else(|| fault("the item has no messages"))?;
    if turns.len() > MOST_TURNS {
        return Err(Fault::new(Flag::Other, format!("the item has over {MOST_TURNS} messages")));
    }
    let mut messages = Vec::with_capacity(turns.len() + 1);
    for turn in turns {
        let role = turn.get("role").and_then(Value::as_str).filter(|role| role.len() <= 64);
        let content = turn.get("content").and_then(text_of);
        let (role, content) = role
            .zip(content)
            .ok_or_else(|| fault("a message of the item lacks its role or its text"))?;
        messages.push(Message { role: role.to_owned(), content });
    }
    let answer = context.output_text().to_owned();
    messages.push(Message { role: "assistant".to_owned(), content: answer });
    if messages.iter().map(|message| message.content.len()).sum::<usize>() > LONGEST {
        let why = format!("the conversation is longer than {LONGEST} bytes");
        return Err(Fault::new(Flag::Other, why));
    }
    Ok(messages)
}

/// The text of a message's content: a string, or parts that contain texts.
fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let text = |part: &Value| {
                let kind = part.get("type")?.as_str()?;
                if !TEXT_PARTS.contains(&kind) {
                    return None;
                }
                part.get("text")?.as_str().map(str::to_owned)
            };
            parts.iter().map(text).collect::<Option<Vec<_>>>().map(|texts| texts.join("\n"))
        }
        _ => None,
    }
}
