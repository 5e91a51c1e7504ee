//! The tokenizer's keys: kind of the tokenizer, added tokens, special tokens, chat templates.

use super::folder::{Object, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_MODEL, bytes, object};
use super::{ConvertError, bpe, pieces, sentencepiece};
use crate::gguf::{GgufWriter, Value};
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// `enum llama_token_type`
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// SentencePiece writes a space as this character.
pub(super) const SPACE: &str = "\u{2581}";
/// Score of added tokens and padding in llama.cpp's files.
const ADDED_SCORE: f32 = -1000.0;

/// A tokenizer without its added tokens.
pub(super) struct Base {
    /// `tokenizer.ggml.model`
    pub model: &'static str,
    pub pre: &'static str,
    pub tokens: BTreeMap<u64, Token>,
    /// Whether tokens have scores; otherwise there are merges.
    pub scored: bool,
    pub merges: Vec<String>,
    /// Whether a text gets a space in front; only SentencePiece uses it.
    pub space_prefix: Option<bool>,
}

/// An entry of the vocabulary.
pub(super) struct Token {
    pub text: String,
    pub kind: i32,
    pub score: f32,
}

/// The files of a tokenizer.
struct Files<'a> {
    folder: &'a Path,
    config: &'a Object,
    tokenizer: Option<Object>,
    settings: Object,
    specials: Object,
}

/// Sets the `tokenizer.*` keys for an embedding with `rows` rows.
pub(super) fn write(
    folder: &Path,
    config: &Object,
    rows: u64,
    writer: &mut GgufWriter,
    lacking: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let files = Files {
        folder,
        config,
        tokenizer: object(folder, TOKENIZER)?,
        settings: object(folder, TOKENIZER_CONFIG)?.unwrap_or_default(),
        specials: object(folder, "special_tokens_map.json")?.unwrap_or_default(),
    };
    let mut base = files.base(lacking)?;
    files.add_tokens(&mut base, lacking)?;
    if let Some((id, token)) = base.tokens.last_key_value().filter(|(id, _)| **id >= rows) {
        let reason = format!(
            "the token `{}` has the id {id}, but the embedding has {rows} rows; resize it \
             (`model.resize_token_embeddings(len(tokenizer))`)",
            token.text
        );
        return Err(ConvertError::new(files.file(), reason));
    }
    let ids = ids(&base, files.file())?;
    let (mut texts, mut kinds, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for id in 0..rows {
        let padding = || Token { text: format!("[PAD{id}]"), kind: UNUSED, score: ADDED_SCORE };
        let token = base.tokens.remove(&id).unwrap_or_else(padding);
        texts.push(token.text);
        kinds.push(token.kind);
        scores.push(token.score);
    }
    writer.set("tokenizer.ggml.model", base.model).set("tokenizer.ggml.pre", base.pre);
    writer.set("tokenizer.ggml.tokens", texts).set("tokenizer.ggml.token_type", kinds);
    match base.scored {
        true => writer.set("tokenizer.ggml.scores", scores),
        false => writer.set("tokenizer.ggml.merges", base.merges),
    };
    if let Some(prefix) = base.space_prefix {
        writer.set("tokenizer.ggml.add_space_prefix", prefix);
    }
    files.set_roles(&ids, rows, writer, lacking)?;
    files.set_templates(writer)
}

/// Ids by text. A duplicate text is an error, because its second token could never be found.
fn ids(base: &Base, file: &str) -> Result<HashMap<String, u64>, ConvertError> {
    let mut ids = HashMap::with_capacity(base.tokens.len());
    for (id, token) in &base.tokens {
        if let Some(other) = ids.insert(token.text.clone(), *id) {
            let text = &token.text;
            let reason = format!("the ids {other} and {id} are both the token `{text}`");
            return Err(ConvertError::new(file, reason));
        }
    }
    Ok(ids)
}

impl Files<'_> {
    /// The file with the vocabulary, for messages.
    fn file(&self) -> &'static str {
        if self.tokenizer.is_some() { TOKENIZER } else { TOKENIZER_MODEL }
    }

    fn base(&self, lacking: &mut Vec<String>) -> Result<Base, ConvertError> {
        let model = || bytes(self.folder, TOKENIZER_MODEL);
        let Some(tokenizer) = &self.tokenizer else {
            return match model()? {
                Some(model) => sentencepiece::read(&model),
                None => Err(ConvertError::new(
                    TOKENIZER,
                    format!(
                        "there is no such file, and no {TOKENIZER_MODEL}; make one with \
                         `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
                    ),
                )),
            };
        };
        if bpe::is_byte_level(tokenizer) {
            return bpe::read(tokenizer, lacking);
        }
        // Preferred, because it has the scores from which `tokenizer.json` was made.
        match model()? {
            Some(model) => sentencepiece::read(&model),
            None => pieces::read(tokenizer, lacking),
        }
    }

    /// Adds the added tokens, which replace tokens of the same id.
    fn add_tokens(&self, base: &mut Base, lacking: &mut Vec<String>) -> Result<(), ConvertError> {
        let mut added: BTreeMap<u64, (String, bool)> = BTreeMap::new();
        let mut stripping = Vec::new();
        let mut add =
            |id: Option<u64>, about: &Json, file: &str| match (id, about["content"].as_str()) {
                (Some(id), Some(text)) => {
                    let takes = |key: &str| about[key] == true;
                    if added.insert(id, (text.to_owned(), takes("special"))).is_none()
                        && (takes("lstrip") || takes("rstrip") || takes("single_word"))
                    {
                        stripping.push(text.to_owned());
                    }
                    Ok(())
                }
                _ => Err(ConvertError::new(file, format!("an added token is {about}"))),
            };
        let listed = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.get("added_tokens"));
        for about in listed.and_then(Json::as_array).into_iter().flatten() {
            add(about["id"].as_u64(), about, TOKENIZER)?;
        }
        let listed = self.settings.get("added_tokens_decoder").and_then(Json::as_object);
        for (id, about) in listed.into_iter().flatten() {
            add(id.parse().ok(), about, TOKENIZER_CONFIG)?;
        }
        for (text, id) in object(self.folder, "added_tokens.json")?.unwrap_or_default() {
            let id = id.as_u64();
            if let Some(id) = id {
                added.entry(id).or_insert((text, false));
            }
        }
        for (id, (text, special)) in added {
            let was = base.tokens.get(&id).map(|token| token.kind);
            let kind = match special || looks_special(&text) {
                // The unknown token has no other mark in the folder, so its type is kept.
                true if was == Some(UNKNOWN) => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            let text = if kind == USER_DEFINED { text.replace(SPACE, " ") } else { text };
            base.tokens.insert(id, Token { text, kind, score: ADDED_SCORE });
        }
        // llama.cpp recognizes Phi-3 by the model's name and strips for it.
        let phi = self.config.get("model_type").is_some_and(|kind| kind == "phi3")
            && super::folder::name(self.folder).to_lowercase().contains("phi-3");
        if let Some(first) = stripping.first().filter(|_| !phi) {
            lacking.push(format!(
                "white space beside `{first}` ({} tokens) is not taken away with it: a GGUF cannot \
                 say `lstrip`, `rstrip` and `single_word`",
                stripping.len()
            ));
        }
        Ok(())
    }

    /// The text of a role, such as `eos`.
    fn text_of(&self, role: &str) -> Option<&str> {
        let key = format!("{role}_token");
        [&self.settings, &self.specials].into_iter().find_map(|from| {
            let said = from.get(&key)?;
            said.as_str().or_else(|| said["content"].as_str())
        })
    }

    fn set_roles(
        &self,
        ids: &HashMap<String, u64>,
        rows: u64,
        writer: &mut GgufWriter,
        lacking: &mut Vec<String>,
    ) -> Result<(), ConvertError> {
        let numbers = |from: &Object, key: &str| -> Vec<u64> {
            let value = from.get(key);
            let one = value.and_then(Json::as_u64);
            let list = value.and_then(Json::as_array).into_iter().flatten();
            let all = one.into_iter().chain(list.filter_map(Json::as_u64));
            all.filter(|id| *id < rows).collect()
        };
        let generation = object(self.folder, "generation_config.json")?.unwrap_or_default();
        let role = |role: &str| {
            let by_text = self.text_of(role).and_then(|text| ids.get(text)).copied();
            let key = format!("{role}_token_id");
            by_text.or_else(|| numbers(self.config, &key).first().copied())
        };
        let [bos, eos] = ["bos", "eos"].map(role);
        for (name, id) in
            [("bos", bos), ("eos", eos), ("unknown", role("unk")), ("padding", role("pad"))]
        {
            if let Some(id) = id {
                writer.set(&format!("tokenizer.ggml.{name}_token_id"), id as u32);
            }
        }
        if eos.is_none() {
            lacking.push("a token that ends a text: no `eos_token` is said".to_owned());
        }
        // Chat models end a turn with a separate token.
        let ends = [&generation, self.config].map(|from| numbers(from, "eos_token_id"));
        let mut ends = ends.into_iter().find(|ends| !ends.is_empty()).unwrap_or_default();
        ends.retain(|end| Some(*end) != eos);
        ends.sort_unstable();
        ends.dedup();
        for (key, end) in ["eot", "eom"].into_iter().zip(&ends) {
            writer.set(&format!("tokenizer.ggml.{key}_token_id"), *end as u32);
        }
        if let Some(more) = ends.get(2..).filter(|more| !more.is_empty()) {
            lacking.push(format!(
                "tokens {more:?} as ends of an answer (eos_token_id): a GGUF holds three of them; \
                 send them as stop_token_ids"
            ));
        }
        let (starts, stops) = self.template();
        let said = |key: &str| self.settings.get(key).and_then(Json::as_bool);
        let class = self.settings.get("tokenizer_class").and_then(Json::as_str).unwrap_or("");
        // These classes add the token themselves, whatever `tokenizer.json` says.
        let own = ["Llama", "CodeLlama", "Gemma"].iter().any(|name| class.starts_with(name));
        let around = |said: Option<bool>, found: Option<bool>| match own {
            true => said.or(found),
            false => found.or(said),
        };
        let usual = self.tokenizer.is_none();
        let add_bos = around(said("add_bos_token"), starts).unwrap_or(usual);
        writer.set("tokenizer.ggml.add_bos_token", add_bos && bos.is_some());
        let add_eos = around(said("add_eos_token"), stops).unwrap_or(false);
        writer.set("tokenizer.ggml.add_eos_token", add_eos && eos.is_some());
        Ok(())
    }

    /// Whether `tokenizer.json` adds a token before and after a text; `None` if it does not say.
    fn template(&self) -> (Option<bool>, Option<bool>) {
        let Some(Json::Object(post)) =
            self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.get("post_processor"))
        else {
            return (None, None);
        };
        let all = match post.get("processors").and_then(Json::as_array) {
            Some(list) => list.iter().filter_map(Json::as_object).collect(),
            None => vec![post],
        };
        let template = all.into_iter().find_map(|one| one.get("single")?.as_array());
        let is = |part: Option<&Json>| part.is_some_and(|part| part.get("SpecialToken").is_some());
        (template.map(|parts| is(parts.first())), template.map(|parts| is(parts.last())))
    }

    fn set_templates(&self, writer: &mut GgufWriter) -> Result<(), ConvertError> {
        let key = "chat_template";
        let mut named: BTreeMap<String, String> = BTreeMap::new();
        match self.settings.get(key) {
            Some(Json::String(template)) => {
                named.insert("default".into(), template.clone());
            }
            Some(Json::Array(list)) => {
                for one in list {
                    if let (Some(name), Some(text)) =
                        (one["name"].as_str(), one["template"].as_str())
                    {
                        named.insert(name.into(), text.into());
                    }
                }
            }
            _ => {}
        }
        let whole = object(self.folder, "chat_template.json")?.unwrap_or_default();
        if let Some(Json::String(template)) = whole.get(key) {
            named.insert("default".into(), template.clone());
        }
        if let Some(template) = bytes(self.folder, "chat_template.jinja")? {
            let template = String::from_utf8(template)
                .map_err(|_| ConvertError::new("chat_template.jinja", "it is not UTF-8"))?;
            named.insert("default".into(), template);
        }
        if let Some(template) = named.remove("default") {
            writer.set("tokenizer.chat_template", template);
        }
        for (name, template) in named {
            writer.set(&format!("tokenizer.chat_template.{name}"), Value::String(template));
        }
        Ok(())
    }
}

/// Whether llama.cpp takes a text for a control token, whatever the folder says.
fn looks_special(text: &str) -> bool {
    let between = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}
