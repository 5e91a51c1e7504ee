//! Log-probabilities in OpenAI's two formats.

use crate::ipc::TokenLogprob;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// Replaces minus infinity, which JSON cannot represent. OpenAI uses the same value.
const LEAST: f32 = -9999.0;

/// Format of chat completions.
#[derive(Debug, Default, Serialize)]
pub(in crate::gateway::api) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Likely,
    top_logprobs: Vec<Likely>,
}

#[derive(Debug, Serialize)]
struct Likely {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// Appends tokens in the order of the text.
    pub(in crate::gateway::api) fn extend(&mut self, tokens: Vec<TokenLogprob>) {
        self.content.extend(tokens.into_iter().map(|token| ChatToken {
            token: likely(&token.bytes, token.logprob.unwrap_or(0.0)),
            top_logprobs:
                token.top.iter().map(|(_, bytes, logprob)| likely(bytes, *logprob)).collect(),
        }));
    }
}

fn likely(bytes: &[u8], logprob: f32) -> Likely {
    Likely {
        token: String::from_utf8_lossy(bytes).into_owned(),
        logprob: finite(logprob),
        bytes: bytes.to_vec(),
    }
}

/// Format of text completions: parallel lists.
#[derive(Debug, Default, Serialize)]
pub(in crate::gateway::api) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopTokens>>,
    /// Start of each token in the text, in characters.
    text_offset: Vec<usize>,
}

/// Alternatives at one position, as a JSON object from token to log-probability.
#[derive(Debug)]
struct TopTokens(Vec<(String, f32)>);

impl Serialize for TopTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl TextLogprobs {
    /// Appends tokens in the order of the text. `offset` is the start of the first token in
    /// characters; it is advanced past the last token.
    pub(in crate::gateway::api) fn extend(
        &mut self,
        tokens: Vec<TokenLogprob>,
        offset: &mut usize,
    ) {
        for token in tokens {
            self.text_offset.push(*offset);
            // A character counts at its first byte, even if its bytes are spread over several
            // tokens.
            *offset += token.bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
            let name = text_token(&token.bytes);
            let logprob = token.logprob.map(finite);
            self.token_logprobs.push(logprob);
            self.top_logprobs.push(logprob.map(|logprob| {
                let mut top: Vec<(String, f32)> = Vec::with_capacity(token.top.len() + 1);
                for (_, bytes, logprob) in &token.top {
                    let name = text_token(bytes);
                    // Two tokens may have the same text; the more likely one comes first and is
                    // kept.
                    if top.iter().all(|(other, _)| *other != name) {
                        top.push((name, finite(*logprob)));
                    }
                }
                if top.iter().all(|(other, _)| *other != name) {
                    top.push((name.clone(), logprob));
                }
                TopTokens(top)
            }));
            self.tokens.push(name);
        }
    }

    /// Appends the log-probabilities of the next part of the same text.
    pub(in crate::gateway::api) fn append(&mut self, mut more: Self) {
        self.tokens.append(&mut more.tokens);
        self.token_logprobs.append(&mut more.token_logprobs);
        self.top_logprobs.append(&mut more.top_logprobs);
        self.text_offset.append(&mut more.text_offset);
    }

    pub(in crate::gateway::api) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// A token as text. A token that is not complete UTF-8 is written as `bytes:\xe2\x80`, as at
/// OpenAI.
fn text_token(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            let _ = std::fmt::Write::write_fmt(&mut text, format_args!("\\x{byte:02x}"));
            text
        }),
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(LEAST) } else { LEAST }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_bytes::ByteBuf;
    use serde_json::json;

    pub(crate) fn token(text: &[u8], logprob: Option<f32>, top: &[(&[u8], f32)]) -> TokenLogprob {
        let top = top.iter().map(|(text, logprob)| (9, ByteBuf::from(*text), *logprob)).collect();
        TokenLogprob { token: 7, bytes: ByteBuf::from(text), logprob, top }
    }

    #[test]
    fn chat_form() {
        let mut logprobs = ChatLogprobs::default();
        logprobs.extend(vec![token(
            b"hi",
            Some(-0.5),
            &[(b"hi", -0.5), (b"\xe2\x80", f32::NEG_INFINITY)],
        )]);
        assert_eq!(
            serde_json::to_value(&logprobs).unwrap(),
            json!({"refusal": null, "content": [{
                "token": "hi", "logprob": -0.5, "bytes": [104, 105],
                "top_logprobs": [
                    {"token": "hi", "logprob": -0.5, "bytes": [104, 105]},
                    {"token": "\u{fffd}", "logprob": -9999.0, "bytes": [226, 128]},
                ],
            }]})
        );
    }

    #[test]
    fn text_form_counts_characters() {
        let mut logprobs = TextLogprobs::default();
        let mut offset = 2;
        logprobs.extend(
            vec![
                token(b"a", None, &[]),
                token("é".as_bytes(), Some(-1.0), &[(b"x", -0.5), (b"x", -0.75)]),
                token(b"\xf0\x9f", Some(-2.0), &[]),
                token(b"\x98\x80", Some(-0.25), &[]),
                token(b"!", Some(-0.125), &[(b"!", -0.125)]),
            ],
            &mut offset,
        );
        assert_eq!(
            serde_json::to_value(&logprobs).unwrap(),
            json!({
                "tokens": ["a", "é", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"],
                "token_logprobs": [null, -1.0, -2.0, -0.25, -0.125],
                "top_logprobs": [
                    null, {"x": -0.5, "é": -1.0}, {"bytes:\\xf0\\x9f": -2.0},
                    {"bytes:\\x98\\x80": -0.25}, {"!": -0.125},
                ],
                "text_offset": [2, 3, 4, 5, 5],
            })
        );
        assert_eq!(offset, 6);
    }
}
