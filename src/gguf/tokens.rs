//! [`TokenizerFacts`]: special tokens, flags and chat templates, resolved as llama.cpp does it
//! (`llama_vocab::impl::load` in `src/llama-vocab.cpp`): a default by tokenizer model, then the key
//! if its id exists, then a search by text.

use serde::{Deserialize, Serialize};

use crate::gguf::{Gguf, GgufError};

/// A special token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialToken {
    /// Index into the vocabulary.
    pub id: u32,
    /// Text of the token in the file.
    pub text: String,
}

/// Properties of a tokenizer, from the header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerFacts {
    /// `tokenizer.ggml.model`: `llama` (SentencePiece), `gpt2` (BPE), `bert` (WordPiece), `t5`, …
    pub model: Option<String>,
    /// `tokenizer.ggml.pre`: the pre-tokenizer of a BPE vocabulary.
    pub pre: Option<String>,
    /// Number of tokens listed; 0 if none are.
    pub n_tokens: u32,
    /// Begin of sequence.
    pub bos: Option<SpecialToken>,
    /// End of sequence.
    pub eos: Option<SpecialToken>,
    /// End of turn.
    pub eot: Option<SpecialToken>,
    /// End of message, before a tool's result.
    pub eom: Option<SpecialToken>,
    /// Unknown.
    pub unk: Option<SpecialToken>,
    /// Separator.
    pub sep: Option<SpecialToken>,
    /// Padding.
    pub pad: Option<SpecialToken>,
    /// Mask.
    pub mask: Option<SpecialToken>,
    /// Fill in the middle: marks the text before the gap.
    pub fim_pre: Option<SpecialToken>,
    /// Fill in the middle: marks the text after the gap.
    pub fim_suf: Option<SpecialToken>,
    /// Fill in the middle: where generation starts.
    pub fim_mid: Option<SpecialToken>,
    /// Whether `bos` is prepended to a prompt.
    pub add_bos: bool,
    /// Whether `eos` is appended to a prompt.
    pub add_eos: bool,
    /// `tokenizer.chat_template` (Jinja).
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.NAME`, such as `tool_use`, by name.
    pub named_templates: Vec<(String, String)>,
}

/// Texts that mean "end of turn" if no key names the token, in order of preference. llama.cpp takes
/// any of them, in the order of a hash map; if only one of them is present both agree.
const EOT: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
const EOM: &[&str] = &["<|eom_id|>"];
const FIM_PRE: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
];
const FIM_SUF: &[&str] = &[
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
];
const FIM_MID: &[&str] = &[
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];

/// Default ids if no key sets them: bos, eos, unk, sep, pad, mask.
type Defaults = [Option<u32>; 6];

fn defaults(model: &str) -> Defaults {
    match model {
        "llama" => [Some(1), Some(2), Some(0), None, None, None],
        "bert" => [Some(101), None, Some(100), Some(102), Some(0), Some(103)],
        "gpt2" | "hybriddna" | "whitespace" => [Some(11), Some(11), None, None, None, None],
        "t5" => [None, Some(1), Some(2), None, Some(0), None],
        "plamo2" => [Some(1), Some(2), Some(0), None, Some(3), None],
        _ => [None; 6],
    }
}

/// Default of adding bos and eos to a prompt if no key sets it.
fn default_flags(model: &str, pre: &str) -> (bool, bool) {
    match model {
        "llama" | "bert" => (true, false),
        "t5" => (false, true),
        "gemma4" => (true, false),
        _ => {
            let llama3 = ["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"];
            let others = ["midm-2.0", "lfm2", "jina-v5-nano", "tekken", "chameleon"];
            (llama3.contains(&pre) || others.contains(&pre), false)
        }
    }
}

impl TokenizerFacts {
    /// Reads the `tokenizer.*` keys.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] if a key has a type that llama.cpp would refuse as well.
    pub fn read(gguf: &Gguf) -> Result<TokenizerFacts, GgufError> {
        let model = gguf.str("tokenizer.ggml.model")?.map(str::to_owned);
        let pre = gguf.str("tokenizer.ggml.pre")?.map(str::to_owned);
        let tokens = gguf.strings("tokenizer.ggml.tokens")?.unwrap_or(&[]);
        let [bos, eos, unk, sep, pad, mask] = defaults(model.as_deref().unwrap_or(""));
        let (add_bos, add_eos) =
            default_flags(model.as_deref().unwrap_or(""), pre.as_deref().unwrap_or(""));

        let by_id = |id: u64| -> Option<SpecialToken> {
            let text = tokens.get(usize::try_from(id).ok()?)?;
            Some(SpecialToken { id: u32::try_from(id).ok()?, text: text.clone() })
        };
        let by_key = |name: &str, default: Option<u32>| -> Result<_, GgufError> {
            // An id outside the vocabulary is ignored, as in llama.cpp: such files exist.
            let id = gguf.u64(&format!("tokenizer.ggml.{name}_token_id"))?;
            Ok(id.and_then(by_id).or_else(|| default.and_then(|id| by_id(id.into()))))
        };
        let by_text = |texts: &[&str]| -> Option<SpecialToken> {
            // One pass over the vocabulary; the earliest text in the list wins.
            let found = tokens.iter().enumerate().filter_map(|(id, token)| {
                let rank = texts.iter().position(|text| text == token)?;
                Some((rank, id))
            });
            found.min().and_then(|(_, id)| by_id(id as u64))
        };
        let fim = |new: &str, old: &str, texts: &[&str]| -> Result<_, GgufError> {
            Ok(by_key(old, None)?.or(by_key(new, None)?).or_else(|| by_text(texts)))
        };

        let mut named_templates = Vec::new();
        for (key, value) in gguf.metadata() {
            let Some(name) = key.strip_prefix("tokenizer.chat_template.") else {
                continue;
            };
            if let Some(text) = value.as_str() {
                named_templates.push((name.to_owned(), text.to_owned()));
            }
        }

        Ok(TokenizerFacts {
            n_tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
            bos: by_key("bos", bos)?,
            eos: by_key("eos", eos)?,
            eot: by_key("eot", None)?.or_else(|| by_text(EOT)),
            eom: by_key("eom", None)?.or_else(|| by_text(EOM)),
            unk: by_key("unknown", unk)?,
            // The format itself misspells this key.
            sep: by_key("seperator", sep)?,
            pad: by_key("padding", pad)?,
            mask: by_key("mask", mask)?,
            fim_pre: fim("fim_pre", "prefix", FIM_PRE)?,
            fim_suf: fim("fim_suf", "suffix", FIM_SUF)?,
            fim_mid: fim("fim_mid", "middle", FIM_MID)?,
            add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos),
            add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(add_eos),
            chat_template: gguf.str("tokenizer.chat_template")?.map(str::to_owned),
            named_templates,
            model,
            pre,
        })
    }

    /// Whether the three fill-in-the-middle tokens exist.
    pub fn supports_infill(&self) -> bool {
        self.fim_pre.is_some() && self.fim_suf.is_some() && self.fim_mid.is_some()
    }

    /// The template called `name` (such as `tool_use`), not the default one.
    pub fn named_template(&self, name: &str) -> Option<&str> {
        self.named_templates.iter().find(|(n, _)| n == name).map(|(_, text)| text.as_str())
    }
}
