//! Exports a GGUF's tokenizer as the files of the `tokenizers` crate, which transformers also
//! reads.

use crate::gguf::{Gguf, ModelFacts, SpecialToken, pre_tokenizer};
use serde_json::{Map, Value, json};

/// `enum llama_token_type`
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// `tokenizer.json`.
///
/// # Errors
/// What part of the tokenizer cannot be represented in this format.
pub(super) fn tokenizer_json(model: &Gguf) -> Result<Value, String> {
    let text = |error: crate::gguf::GgufError| error.to_string();
    let facts = ModelFacts::read(model).map_err(text)?.tokenizer;
    if facts.model.as_deref() != Some("gpt2") {
        let name = facts.model.unwrap_or_default();
        return Err(format!("the tokenizer model `{name}` is not written as `tokenizer.json`"));
    }
    let pre = facts.pre.as_deref().unwrap_or("");
    let (pre_tokenizer, whole_words) = pre_tokenizer(pre)
        .ok_or_else(|| format!("the pre-tokenizer `{pre}` is not written as `tokenizer.json`"))?;
    let tokens = model.strings("tokenizer.ggml.tokens").map_err(text)?.unwrap_or(&[]);
    let merges = model.strings("tokenizer.ggml.merges").map_err(text)?.unwrap_or(&[]);
    let merges: Vec<_> = merges.iter().filter_map(|merge| merge.split_once(' ')).collect();
    let kinds = model.u64s("tokenizer.ggml.token_type").map_err(text)?.unwrap_or_default();
    let kind = |id: usize| kinds.get(id).copied().unwrap_or(1);
    let added: Vec<_> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| matches!(kind(*id), CONTROL | USER_DEFINED))
        .map(|(id, token)| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": kind(id) == CONTROL,
            })
        })
        .collect();
    let vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let post_processor = match &facts.bos {
        Some(bos) if facts.add_bos => with_bos(bos),
        _ => json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": false,
            "use_regex": true,
        }),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": whole_words,
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

fn with_bos(bos: &SpecialToken) -> Value {
    let token = json!({"SpecialToken": {"id": bos.text, "type_id": 0}});
    let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [token, sequence("A")],
        "pair": [token, sequence("A"), token, sequence("B")],
        "special_tokens": {&bos.text: {"id": bos.text, "ids": [bos.id], "tokens": [bos.text]}},
    })
}

/// `tokenizer_config.json`.
///
/// # Errors
/// If the header contradicts itself.
pub(super) fn tokenizer_config(
    model: &Gguf,
    context: usize,
) -> Result<Value, crate::gguf::GgufError> {
    let facts = ModelFacts::read(model)?.tokenizer;
    let text = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.text.clone());
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": false,
        "add_bos_token": facts.add_bos,
        "add_eos_token": facts.add_eos,
        "bos_token": text(&facts.bos),
        "eos_token": text(&facts.eos),
    });
    if let Some(pad) = text(&facts.pad) {
        config["pad_token"] = json!(pad);
    }
    if let Some(template) = facts.chat_template {
        config["chat_template"] = json!(template);
    }
    Ok(config)
}
