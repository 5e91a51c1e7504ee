//! Pieces of text to tokens.

use super::format::{Chat, Example};
use super::turns::{prompt, render};
use crate::engine::tokenizer::Tokenizer;
use crate::template::ChatTemplate;
use std::sync::Arc;

/// The tokens of an example, and which of them are trained: predicted from those before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    pub tokens: Vec<u32>,
    pub trained: Vec<bool>,
}

impl Encoded {
    /// Tokens that a loss has: trained ones, but for the first token, which nothing predicts.
    pub fn targets(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }

    /// Takes away what a template puts behind the last answer: the last token is then its end of turn.
    pub fn end_at_the_answer(&mut self) {
        let end = self.trained.iter().rposition(|trained| *trained).map_or(0, |at| at + 1);
        self.tokens.truncate(end);
        self.trained.truncate(end);
    }
}

/// The served model's own tokenizer and template.
#[derive(Clone)]
pub struct Encoder {
    pub tokenizer: Arc<dyn Tokenizer>,
    pub template: Arc<ChatTemplate>,
}

impl Encoder {
    /// Tokenizes an example piece by piece: an answer's tokens are those that follow a prompt when the
    /// model is served, never one that reaches over the seam.
    ///
    /// # Errors
    /// What the template does not render, in words.
    pub fn encode(&self, example: &Example) -> Result<Encoded, String> {
        let vocab = self.tokenizer.vocab();
        let bos = vocab.bos.map(|bos| String::from_utf8_lossy(vocab.piece(bos)).into_owned());
        let rendered = render(example, &self.template, bos.as_deref())?;
        let mut encoded = Encoded::default();
        let mut push = |tokens: &[u32], trained: bool| {
            encoded.tokens.extend_from_slice(tokens);
            encoded.trained.resize(encoded.tokens.len(), trained);
        };
        for (number, piece) in rendered.pieces.iter().enumerate() {
            let add_special = rendered.add_special && number == 0;
            let parse = rendered.parse_special;
            push(&self.tokenizer.encode(&piece.text, add_special, parse), piece.trained);
        }
        if rendered.ends {
            push(vocab.eos.as_slice(), true);
        }
        Ok(encoded)
    }

    /// The tokens of a conversation up to where the assistant's turn begins: as the served model is
    /// given it.
    ///
    /// # Errors
    /// What the template does not render, in words.
    pub fn prompt(&self, chat: &Chat) -> Result<Vec<u32>, String> {
        let vocab = self.tokenizer.vocab();
        let text = prompt(chat, &self.template)?;
        let bos = vocab.bos.map(|bos| vocab.piece(bos)).filter(|bos| !bos.is_empty());
        let wrote_bos = bos.is_some_and(|bos| text.as_bytes().starts_with(bos));
        Ok(self.tokenizer.encode(&text, !wrote_bos, true))
    }
}
