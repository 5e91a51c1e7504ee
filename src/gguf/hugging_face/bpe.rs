//! Reader of byte-level BPE in `tokenizer.json`.

use super::ConvertError;
use super::folder::{Object, TOKENIZER};
use super::pre_tokenizer;
use super::tokenizer::{Base, NORMAL, Token};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// Whether tokens represent bytes as in GPT-2.
pub(super) fn is_byte_level(tokenizer: &Object) -> bool {
    let pre = tokenizer.get("pre_tokenizer").unwrap_or(&Json::Null);
    let bytes = |part: &Json| part["type"] == "ByteLevel";
    bytes(pre) || pre["pretokenizers"].as_array().is_some_and(|list| list.iter().any(bytes))
}

pub(super) fn read(tokenizer: &Object, lacking: &mut Vec<String>) -> Result<Base, ConvertError> {
    let wrong = |reason: String| ConvertError::new(TOKENIZER, reason);
    let model = model(tokenizer)?;
    let whole_words = model["ignore_merges"] == true;
    let pre = pre_tokenizer::name_of(&tokenizer["pre_tokenizer"], whole_words).map_err(|what| {
        wrong(format!("the pre-tokenizer {what} is not known: a GGUF has no name for it"))
    })?;
    for normalizer in normalizers(tokenizer) {
        match normalizer["type"].as_str().unwrap_or("") {
            form @ ("NFC" | "NFKC" | "NFD" | "NFKD") => lacking.push(form_note(form)),
            other => return Err(wrong(format!("the normalizer `{other}` is not carried over"))),
        }
    }
    let tokens = vocabulary(model)?;
    let tokens =
        tokens.into_iter().map(|(id, text)| (id, Token { text, kind: NORMAL, score: 0.0 }));
    let merges = merges(model)?.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
    let tokens = tokens.collect();
    Ok(Base { model: "gpt2", pre, tokens, scored: false, merges, space_prefix: None })
}

/// Note that a GGUF does not carry a Unicode normalization form.
pub(super) fn form_note(form: &str) -> String {
    format!("texts are not brought to the form {form} before they are tokenized")
}

/// The parts of `normalizer`.
pub(super) fn normalizers(tokenizer: &Object) -> Vec<&Json> {
    match tokenizer.get("normalizer") {
        None | Some(Json::Null) => Vec::new(),
        Some(one) => one["normalizers"].as_array().map_or(vec![one], |list| list.iter().collect()),
    }
}

/// The BPE model in a tokenizer.
pub(super) fn model(tokenizer: &Object) -> Result<&Json, ConvertError> {
    let model = tokenizer.get("model").unwrap_or(&Json::Null);
    let kind = model["type"].as_str().unwrap_or("BPE");
    let set = |key: &&str| model[*key].as_str().is_some_and(|text| !text.is_empty());
    let other =
        ["continuing_subword_prefix", "end_of_word_suffix"].into_iter().find(|key| set(key));
    match (kind, other) {
        ("BPE", None) => Ok(model),
        ("BPE", Some(key)) => {
            Err(ConvertError::new(TOKENIZER, format!("a BPE with `{key}` is not carried over")))
        }
        _ => Err(ConvertError::new(
            TOKENIZER,
            format!("the tokenizer is of type {kind}; only BPE is carried over"),
        )),
    }
}

/// Tokens by id.
pub(super) fn vocabulary(model: &Json) -> Result<BTreeMap<u64, String>, ConvertError> {
    let wrong = |reason: String| ConvertError::new(TOKENIZER, reason);
    let Some(listed) = model["vocab"].as_object().filter(|listed| !listed.is_empty()) else {
        return Err(wrong("its model has no object `vocab`".into()));
    };
    let mut tokens = BTreeMap::new();
    for (text, id) in listed {
        let Some(id) = id.as_u64() else {
            return Err(wrong(format!("the token `{text}` has the id {id}")));
        };
        if let Some(other) = tokens.insert(id, text.clone()) {
            return Err(wrong(format!("`{other}` and `{text}` are both the token {id}")));
        }
    }
    Ok(tokens)
}

/// Both sides of every merge, in order.
pub(super) fn merges(model: &Json) -> Result<Vec<(&str, &str)>, ConvertError> {
    let wrong = |reason: String| ConvertError::new(TOKENIZER, reason);
    let Some(listed) = model["merges"].as_array() else {
        return Err(wrong("its model has no list `merges`".into()));
    };
    let mut merges = Vec::with_capacity(listed.len());
    for merge in listed {
        let sides = match merge {
            // The older format: both sides in one string, separated by a space; a side contains no
            // space.
            Json::String(text) => text.split_once(' '),
            _ => match (merge[0].as_str(), merge[1].as_str()) {
                (Some(a), Some(b)) => Some((a, b)),
                _ => None,
            },
        };
        let whole = |side: &str| !side.is_empty() && !side.contains(' ');
        match sides.filter(|(a, b)| whole(a) && whole(b)) {
            Some(sides) => merges.push(sides),
            None => return Err(wrong(format!("{merge} is no merge of two parts without spaces"))),
        }
    }
    Ok(merges)
}
