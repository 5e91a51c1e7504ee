//! Tokenizes rendered examples.

use crate::dataset::{
    Chat, Example, Rendered, RenderedPiece, Rendering, prompt, render, render_all,
};
use crate::template::{ChatTemplate, ControlTokens};
use crate::tokenizer::Tokenizer;
use std::sync::Arc;

/// The tokens of an example, and which of them are trained, that is, predicted from the tokens
/// before them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    pub tokens: Vec<u32>,
    pub trained: Vec<bool>,
}

impl Encoded {
    /// Number of tokens that contribute to the loss: the trained ones, except for the first token,
    /// which nothing predicts.
    pub fn targets(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }

    /// The example as a reward model reads it: only the row of its last token counts. A trained token
    /// is appended, whose id nothing reads, because a row counts if the token after it is trained.
    pub fn scored(&self) -> Self {
        let mut trained = vec![false; self.tokens.len()];
        trained.push(true);
        Self { tokens: [&self.tokens[..], &[0]].concat(), trained }
    }

    /// Removes what a template puts after the last trained token, so that the end-of-turn token is
    /// last.
    pub fn end_at_the_answer(&mut self) {
        let end = self.trained.iter().rposition(|trained| *trained).map_or(0, |at| at + 1);
        self.tokens.truncate(end);
        self.trained.truncate(end);
    }
}

/// Encodes examples with the served model's own tokenizer and template.
#[derive(Clone)]
pub struct Encoder {
    pub tokenizer: Arc<dyn Tokenizer>,
    pub template: Arc<ChatTemplate>,
    /// Control tokens that are treated as plain text where user and tool messages spell them out.
    control: Option<Arc<ControlTokens>>,
    bos: Option<String>,
    /// The time that the template sees, the same for all data of a job.
    now: i64,
}

/// The sequences of an example, and statistics for the report.
#[derive(Debug, Default)]
pub(super) struct EncodedExample {
    pub(super) sequences: Vec<Encoded>,
    /// Number of completions of conversations.
    pub(super) answers: u64,
    /// Number of these completions that the template does not end with an end-of-turn token.
    pub(super) without_end: u64,
}

impl Encoder {
    /// An encoder whose templates see the time `now`, in seconds since 1970. With `parse_control`,
    /// control tokens that user and tool messages spell out are parsed.
    pub fn new(
        tokenizer: Arc<dyn Tokenizer>,
        template: Arc<ChatTemplate>,
        now: i64,
        parse_control: bool,
    ) -> Self {
        let vocab = tokenizer.vocab();
        let bos = vocab.bos.map(|bos| String::from_utf8_lossy(vocab.piece(bos)).into_owned());
        let control = (!parse_control).then(|| {
            let tokens = vocab.control_tokens();
            Arc::new(ControlTokens::new(tokens.iter().map(|(text, _)| text.as_str())))
        });
        Self { tokenizer, template, control, bos, now }
    }

    fn rendering(&self) -> Rendering<'_> {
        Rendering {
            template: &self.template,
            bos: self.bos.as_deref(),
            control: self.control.as_deref(),
            now: Some(self.now),
        }
    }

    /// Tokenizes all sequences of an example.
    ///
    /// # Errors
    /// What the template cannot render.
    pub(super) fn encode(&self, example: &Example) -> Result<EncodedExample, String> {
        let rendered = render_all(example, self.rendering())?;
        Ok(self.tokens(rendered))
    }

    /// Tokenizes an example that must be one sequence.
    ///
    /// # Errors
    /// What the template cannot render, or that there are several sequences.
    pub(super) fn encode_one(&self, example: &Example) -> Result<EncodedExample, String> {
        let rendered = render(example, self.rendering())?;
        Ok(self.tokens(vec![rendered]))
    }

    fn tokens(&self, rendered: Vec<Rendered>) -> EncodedExample {
        let vocab = self.tokenizer.vocab();
        let mut found = EncodedExample::default();
        for rendered in rendered {
            let sequence = self.sequence(&rendered);
            if !rendered.ends {
                // The last token of each completion.
                let trained = sequence.trained.iter().chain([&false]);
                let pairs = trained.clone().zip(trained.skip(1));
                let ends = pairs.enumerate().filter(|(_, pair)| *pair == (&true, &false));
                for (at, _) in ends {
                    let token = sequence.tokens[at];
                    let ends_turn = vocab.ends_generation(token) || vocab.eos == Some(token);
                    found.answers += 1;
                    found.without_end += u64::from(!ends_turn);
                }
            }
            found.sequences.push(sequence);
        }
        found
    }

    /// Tokenizes piece by piece: a completion has the tokens that follow the prompt when the model
    /// is served. No token spans the boundary between prompt and completion.
    fn sequence(&self, rendered: &Rendered) -> Encoded {
        let mut encoded = Encoded::default();
        let parse = rendered.parse_special;
        for (number, piece) in rendered.pieces.iter().enumerate() {
            let tokens = match number {
                0 if parse => {
                    let add_special = rendered.add_special;
                    self.tokenizer.encode_rendered(&piece.text, &piece.barriers, add_special)
                }
                0 => self.tokenizer.encode_prompt(&piece.text, rendered.add_special, false),
                // A completion gets no additional space prefix.
                _ if piece.trained => self.tokenizer.encode_continuation(&piece.text, parse, &[]),
                _ => self.context(piece, encoded.tokens.last().copied(), parse),
            };
            encoded.tokens.extend_from_slice(&tokens);
            encoded.trained.resize(encoded.tokens.len(), piece.trained);
        }
        if rendered.ends {
            encoded.tokens.extend(self.tokenizer.vocab().eos);
            encoded.trained.resize(encoded.tokens.len(), true);
        }
        encoded
    }

    /// Tokenizes the text between two completions as in the prompt of the second one when the model
    /// is served: in a prompt, SentencePiece adds a space after special tokens but not after text.
    fn context(&self, piece: &RenderedPiece, before: Option<u32>, parse_special: bool) -> Vec<u32> {
        let vocab = self.tokenizer.vocab();
        let RenderedPiece { text, barriers, .. } = piece;
        let tokens = match parse_special {
            true => self.tokenizer.encode_rendered(text, barriers, false),
            false => self.tokenizer.encode(text, false, false),
        };
        let special = |token: u32| vocab.is_control(token) || vocab.ends_generation(token);
        if before.is_none_or(special) {
            return tokens;
        }
        let exact = self.tokenizer.encode_continuation(text, parse_special, barriers);
        // Uses the tokens up to the first special token, which is the same in both.
        let first = |tokens: &[u32]| {
            tokens.iter().position(|&token| special(token)).unwrap_or(tokens.len())
        };
        let (in_exact, in_tokens) = (first(&exact), first(&tokens));
        exact[..in_exact].iter().chain(&tokens[in_tokens..]).copied().collect()
    }

    /// The tokens of a conversation up to the beginning of the assistant's turn, as the served
    /// model receives them.
    ///
    /// # Errors
    /// What the template cannot render.
    pub fn prompt(&self, chat: &Chat) -> Result<Vec<u32>, String> {
        let prompt = prompt(chat, self.rendering())?;
        let bos = self.bos.as_deref().filter(|bos| !bos.is_empty());
        let wrote_bos = bos.is_some_and(|bos| prompt.text.starts_with(bos));
        Ok(self.tokenizer.encode_rendered(&prompt.text, &prompt.barriers, !wrote_bos))
    }
}
