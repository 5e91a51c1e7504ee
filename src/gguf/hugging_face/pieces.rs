//! SentencePiece BPE from a `tokenizer.json`: ranks of merges are converted to scores of tokens.

use super::ConvertError;
use super::bpe::{form_note, merges, model, normalizers, vocabulary};
use super::folder::{Object, TOKENIZER};
use super::tokenizer::{BYTE, Base, NORMAL, SPACE, Token, UNKNOWN};
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};

/// Reads the tokenizer. In `tokenizer.json` pairs merge by rank, in a GGUF by the score of the
/// merged token. If the tokenizer was converted from a SentencePiece file, both are equivalent.
pub(super) fn read(tokenizer: &Object, lacking: &mut Vec<String>) -> Result<Base, ConvertError> {
    let wrong = |reason: String| ConvertError::new(TOKENIZER, reason);
    let model = model(tokenizer)?;
    if model["byte_fallback"] != true {
        return Err(wrong(
            "it is neither byte-level BPE nor SentencePiece's BPE with `byte_fallback`, and a GGUF \
             knows no other"
                .into(),
        ));
    }
    let space_prefix = space_prefix(tokenizer, lacking).map_err(|what| {
        wrong(format!("{what} is not carried over for a tokenizer of SentencePiece"))
    })?;
    let listed = merges(model)?;
    let unknown = model["unk_token"].as_str().unwrap_or("<unk>");
    let mut scores: HashMap<String, f32> = HashMap::with_capacity(listed.len());
    for (rank, (a, b)) in listed.iter().enumerate() {
        scores.entry(format!("{a}{b}")).or_insert(-(rank as f32));
    }
    let last = -(listed.len() as f32) - 1.0;
    let vocabulary = vocabulary(model)?;
    let unlisted = {
        let texts: HashSet<&str> = vocabulary.values().map(String::as_str).collect();
        let added = tokenizer.get("added_tokens").and_then(Json::as_array).into_iter().flatten();
        let added: HashSet<&str> = added.filter_map(|token| token["content"].as_str()).collect();
        unlisted(&listed, &scores, &texts, &added)
    };
    if unlisted > 0 {
        lacking.push(format!(
            "{unlisted} merges are in no order that SentencePiece knows, so that some texts may be \
             tokenized otherwise; with the model's tokenizer.model in the folder they are not"
        ));
    }
    let token = |(id, text): (u64, String)| {
        let kind = match &text {
            text if *text == unknown => UNKNOWN,
            text if is_byte(text) => BYTE,
            _ => NORMAL,
        };
        let single = text.chars().count() < 2 || kind != NORMAL;
        let score = scores.get(&text).copied().unwrap_or(if single { 0.0 } else { last });
        (id, Token { text, kind, score })
    };
    let tokens = vocabulary.into_iter().map(token).collect();
    Ok(Base {
        model: "llama",
        pre: "default",
        tokens,
        scored: true,
        merges: Vec::new(),
        space_prefix: Some(space_prefix),
    })
}

/// Number of inconsistent merges: pairs of adjacent tokens that SentencePiece would merge although
/// they are not listed, or would merge in another order.
fn unlisted(
    listed: &[(&str, &str)],
    scores: &HashMap<String, f32>,
    texts: &HashSet<&str>,
    added: &HashSet<&str>,
) -> usize {
    let pairs: HashSet<(&str, &str)> = listed.iter().copied().collect();
    let special = |text: &&&str| is_byte(text) || added.contains(**text);
    let splits = |text: &&str| {
        let cuts = text.char_indices().skip(1);
        cuts.filter(|(at, _)| {
            let (a, b) = text.split_at(*at);
            texts.contains(a) && texts.contains(b) && !pairs.contains(&(a, b))
        })
        .count()
    };
    let missing: usize = texts.iter().filter(|text| !special(text)).map(splits).sum();
    let mut late = 0;
    let mut before = 0.0f32;
    for (a, b) in listed {
        let score = scores.get(&format!("{a}{b}")).copied().unwrap_or(0.0);
        // All merges that result in the same token must be consecutive.
        late += usize::from(score > before);
        before = before.min(score);
    }
    missing + late
}

/// `<0x0A>`
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Whether a text gets a space in front. An error describes an unsupported part.
fn space_prefix(tokenizer: &Object, lacking: &mut Vec<String>) -> Result<bool, String> {
    let mut prefix = false;
    for part in normalizers(tokenizer) {
        match part["type"].as_str().unwrap_or("") {
            "Prepend" if part["prepend"] == SPACE => prefix = true,
            "Replace" if part["pattern"]["String"] == " " && part["content"] == SPACE => {}
            form @ ("NFC" | "NFKC" | "NFD" | "NFKD") => lacking.push(form_note(form)),
            other => return Err(format!("the normalizer `{other}`")),
        }
    }
    let pre = tokenizer.get("pre_tokenizer").unwrap_or(&Json::Null);
    let parts = pre["pretokenizers"].as_array().map_or(vec![pre], |list| list.iter().collect());
    for part in parts.into_iter().filter(|part| !part.is_null()) {
        match part["type"].as_str().unwrap_or("") {
            "Metaspace" if part["replacement"] == SPACE => {
                let scheme = part["prepend_scheme"].as_str().unwrap_or("always");
                prefix |= scheme != "never" && part["add_prefix_space"] != false;
            }
            // Gemma's pre-tokenizer: no spaces are left when it runs, so it has no effect.
            "Split" if part["pattern"]["String"] == " " => {}
            other => return Err(format!("the pre-tokenizer `{other}`")),
        }
    }
    Ok(prefix)
}
