//! A grammar that does not constrain the output until its trigger appears.

use super::state::{CompiledGrammar, GrammarState};
use crate::ipc::{EngineError, GrammarTrigger, Token};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The grammar of one sequence; unconstrained until its trigger appears. Without a trigger it
/// constrains the output from the start.
pub struct TriggeredGrammar {
    state: GrammarState,
    mode: Mode,
}

enum Mode {
    /// Searching the output for the trigger.
    Searching(Search),
    /// Every token is masked and checked.
    Constrained,
    /// The trigger can no longer appear, or the text after it did not fit the grammar.
    Off,
}

impl TriggeredGrammar {
    /// The state before the first token of the output. A trigger with an empty text acts at once; a
    /// trigger without texts never acts.
    pub fn new(grammar: &CompiledGrammar, trigger: Option<&GrammarTrigger>) -> Self {
        let mode = match trigger {
            None => Mode::Constrained,
            Some(trigger) => Search::new(trigger).map_or(Mode::Constrained, Mode::Searching),
        };
        Self { state: grammar.matcher(), mode }
    }

    /// Whether the next token must be sampled under [`mask`](Self::mask).
    pub fn needs_mask(&self) -> bool {
        matches!(self.mode, Mode::Constrained)
    }

    /// Whether only an end-of-generation token may follow.
    pub fn is_finished(&self) -> bool {
        self.needs_mask() && self.state.is_finished()
    }

    /// Whether the grammar allows the output to end here.
    pub fn is_accepting(&mut self) -> bool {
        !self.needs_mask() || self.state.is_accepting()
    }

    /// The tokens that may come next (see [`GrammarState::mask`]); `None` if all may.
    ///
    /// # Errors
    /// As [`GrammarState::mask`].
    pub fn mask(&mut self) -> Result<Option<&[u32]>, EngineError> {
        match self.mode {
            Mode::Constrained => self.state.mask().map(Some),
            Mode::Searching(_) | Mode::Off => Ok(None),
        }
    }

    /// The tokens that the grammar forces next; often empty. Only a prediction: the masks decide.
    pub fn forced(&mut self) -> Vec<Token> {
        if !self.needs_mask() {
            return Vec::new();
        }
        let forced = catch_unwind(AssertUnwindSafe(|| self.state.forced()));
        forced.unwrap_or_else(|_| {
            // The next mask reports the error.
            self.state.poison();
            Vec::new()
        })
    }

    /// Advances by a token of the output. `piece` is the token's text; for control tokens too, even
    /// if the client does not see it (a trigger may be a control token).
    ///
    /// # Errors
    /// As [`GrammarState::accept`]; never while unconstrained.
    pub fn observe(&mut self, token: Token, piece: &[u8]) -> Result<(), EngineError> {
        match &mut self.mode {
            Mode::Constrained => self.state.accept(token),
            Mode::Off => Ok(()),
            Mode::Searching(search) => {
                match search.feed(token, piece) {
                    Found::Not => {}
                    Found::Never => self.mode = Mode::Off,
                    Found::At(hit) => self.begin(&hit),
                }
                Ok(())
            }
        }
    }

    /// Bytes and tokens stored while searching.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        match &self.mode {
            Mode::Searching(search) => search.tail.len() + search.tokens.len(),
            Mode::Constrained | Mode::Off => 0,
        }
    }

    /// Fails the state after a panic in another thread.
    pub(super) fn poison(&mut self) -> EngineError {
        self.state.poison()
    }

    /// Enters the grammar with the text since the trigger; stays unconstrained if that text does
    /// not fit.
    fn begin(&mut self, hit: &Hit) {
        let fits = hit.readings(&self.state).iter().any(|tokens| {
            // An error here is the grammar's own; the next mask reports it.
            self.state.accept_all(tokens).unwrap_or(false)
        });
        self.mode = if fits { Mode::Constrained } else { Mode::Off };
        if !fits {
            tracing::warn!(
                trigger = hit.trigger.len(),
                after = hit.after.len(),
                "text around a grammar's trigger does not fit the grammar; not constrained"
            );
        }
    }
}

enum Found {
    Not,
    Never,
    At(Hit),
}

/// A trigger found in the output.
struct Hit {
    inclusive: bool,
    trigger: String,
    /// The text that the trigger's last token wrote after it.
    after: Vec<u8>,
    /// The tokens that wrote the trigger and the text after it, if the trigger began at a token
    /// boundary.
    tokens: Option<Vec<Token>>,
}

impl Hit {
    /// The possible tokenizations of the trigger and the text after it, most exact first: the
    /// sampled tokens; the same text as plain tokens; the trigger as the control token with that
    /// text. Leading white space of the text after the trigger may be omitted: JSON grammars begin
    /// without it.
    fn readings(&self, state: &GrammarState) -> Vec<Vec<Token>> {
        let trimmed = self.after.trim_ascii_start();
        let rests = if trimmed == self.after { vec![trimmed] } else { vec![&self.after, trimmed] };
        if !self.inclusive {
            return rests.into_iter().filter_map(|rest| state.tokenize(rest)).collect();
        }
        let mut readings: Vec<Vec<Token>> = self.tokens.iter().cloned().collect();
        for rest in rests {
            readings.extend(state.tokenize(&[self.trigger.as_bytes(), rest].concat()));
            if let Some(special) = state.special_token(&self.trigger)
                && let Some(tokens) = state.tokenize(rest)
            {
                readings.push(std::iter::once(special).chain(tokens).collect());
            }
        }
        readings
    }
}

/// Searches for the first of several texts, byte by byte, so that the tokenization of the output
/// does not matter.
struct Search {
    texts: Vec<String>,
    longest: usize,
    at_start_only: bool,
    inclusive: bool,
    /// The end of the output: whole tokens in which a trigger may still begin.
    tail: Vec<u8>,
    /// The tokens of `tail`, each with its start offset.
    tokens: Vec<(Token, usize)>,
}

impl Search {
    /// `None` if one of the texts is empty: it matches at once.
    fn new(trigger: &GrammarTrigger) -> Option<Self> {
        let texts: Vec<String> = match trigger.at_start_only {
            true => trigger.texts.iter().map(|text| text.trim_start().to_owned()).collect(),
            false => trigger.texts.clone(),
        };
        if texts.iter().any(String::is_empty) {
            return None;
        }
        Some(Self {
            longest: texts.iter().map(String::len).max().unwrap_or(0),
            texts,
            at_start_only: trigger.at_start_only,
            inclusive: trigger.inclusive,
            tail: Vec::new(),
            tokens: Vec::new(),
        })
    }

    fn feed(&mut self, token: Token, piece: &[u8]) -> Found {
        if self.texts.is_empty() {
            return Found::Never;
        }
        if piece.is_empty() {
            return Found::Not;
        }
        let seen = self.tail.len();
        self.tokens.push((token, seen));
        self.tail.extend_from_slice(piece);
        if self.at_start_only { self.match_start() } else { self.match_anywhere(seen) }
    }

    /// Checks whether the output begins with a trigger, after white space.
    fn match_start(&mut self) -> Found {
        let start = self.tail.len() - self.tail.trim_ascii_start().len();
        let output = &self.tail[start..];
        if output.is_empty() {
            self.tail.clear();
            self.tokens.clear();
            return Found::Not;
        }
        // The shortest text is complete first.
        let first =
            self.texts.iter().filter(|t| output.starts_with(t.as_bytes())).min_by_key(|t| t.len());
        match first {
            Some(text) => Found::At(self.hit(start, text.clone())),
            None if self.texts.iter().any(|t| t.as_bytes().starts_with(output)) => Found::Not,
            None => Found::Never,
        }
    }

    /// Searches for a trigger that ends in the bytes from `seen` on: the earliest end, then the
    /// longest.
    fn match_anywhere(&mut self, seen: usize) -> Found {
        for end in seen + 1..=self.tail.len() {
            let upto = &self.tail[..end];
            let ends = self.texts.iter().filter(|text| upto.ends_with(text.as_bytes()));
            if let Some(text) = ends.max_by_key(|text| text.len()) {
                return Found::At(self.hit(end - text.len(), text.clone()));
            }
        }
        self.forget();
        Found::Not
    }

    fn hit(&self, start: usize, trigger: String) -> Hit {
        let first = self.tokens.iter().position(|&(_, at)| at == start);
        Hit {
            inclusive: self.inclusive,
            after: self.tail[start + trigger.len()..].to_vec(),
            trigger,
            tokens: first.map(|i| self.tokens[i..].iter().map(|&(token, _)| token).collect()),
        }
    }

    /// Drops whole tokens in which no trigger can begin any more.
    fn forget(&mut self) {
        let needed = self.tail.len().saturating_sub(self.longest - 1);
        let keep = self.tokens.partition_point(|&(_, at)| at < needed);
        // The token that contains the first needed byte begins at or before it.
        let keep = match self.tokens.get(keep) {
            Some(&(_, at)) if at == needed => keep,
            _ => keep.saturating_sub(1),
        };
        if needed == self.tail.len() {
            self.tail.clear();
            self.tokens.clear();
        } else if let Some(&(_, from)) = self.tokens.get(keep) {
            self.tail.drain(..from);
            self.tokens.drain(..keep);
            for (_, at) in &mut self.tokens {
                *at -= from;
            }
        }
    }
}
