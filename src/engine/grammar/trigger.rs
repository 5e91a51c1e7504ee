//! A grammar that stays out of the way until its trigger appears in the output.

use super::state::{CompiledGrammar, GrammarState};
use crate::ipc::{EngineError, GrammarTrigger, Token};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One sequence's grammar, free until its trigger appears (from the start where it has none).
pub struct TriggeredGrammar {
    state: GrammarState,
    mode: Mode,
}

enum Mode {
    /// Looking for the trigger.
    Searching(Search),
    /// Every token is masked and checked.
    Constrained,
    /// The trigger can no longer come, or what followed it did not fit the grammar.
    Off,
}

impl TriggeredGrammar {
    /// Stands before the first token of the output. A trigger with an empty text acts at once; one
    /// without any text never does.
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

    /// Whether the output may end here, as far as the grammar is concerned.
    pub fn is_accepting(&mut self) -> bool {
        !self.needs_mask() || self.state.is_accepting()
    }

    /// The tokens that may come next (see [`GrammarState::mask`]); `None` where all may.
    ///
    /// # Errors
    /// As [`GrammarState::mask`].
    pub fn mask(&mut self) -> Result<Option<&[u32]>, EngineError> {
        match self.mode {
            Mode::Constrained => self.state.mask().map(Some),
            Mode::Searching(_) | Mode::Off => Ok(None),
        }
    }

    /// What will come next where the grammar leaves no choice; often nothing. A forecast: the masks
    /// decide.
    pub fn forced(&mut self) -> Vec<Token> {
        if !self.needs_mask() {
            return Vec::new();
        }
        let forced = catch_unwind(AssertUnwindSafe(|| self.state.forced()));
        forced.unwrap_or_else(|_| {
            // The next mask reports it.
            self.state.poison();
            Vec::new()
        })
    }

    /// Takes in a token of the output; `piece` is what it writes, for control tokens their text
    /// even where the client does not see it (a trigger may be one).
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

    /// Bytes and tokens held while searching.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        match &self.mode {
            Mode::Searching(search) => search.tail.len() + search.tokens.len(),
            Mode::Constrained | Mode::Off => 0,
        }
    }

    /// Ends the walk after a panic in another thread's hands.
    pub(super) fn poison(&mut self) -> EngineError {
        self.state.poison()
    }

    /// Enters the grammar with the text that has come since its beginning; stays unconstrained
    /// where that text does not fit.
    fn begin(&mut self, hit: &Hit) {
        let fits = hit.readings(&self.state).iter().any(|tokens| {
            // An error here is of the grammar; the next mask reports it.
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

/// Where the trigger was found.
struct Hit {
    inclusive: bool,
    trigger: String,
    /// What the trigger's last token wrote after it.
    after: Vec<u8>,
    /// The tokens that wrote trigger and rest, where the trigger began with one of them.
    tokens: Option<Vec<Token>>,
}

impl Hit {
    /// The ways to put what has come into tokens of the grammar, the most faithful first: the very
    /// tokens; the same text as plain tokens; the trigger as the control token of that text. White
    /// space that the last token happened to carry may be left out: JSON grammars begin without.
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

/// Looks for the first of several texts, byte by byte, so that the way in which the output is cut
/// into tokens makes no difference.
struct Search {
    texts: Vec<String>,
    longest: usize,
    at_start_only: bool,
    inclusive: bool,
    /// The end of the output: whole tokens that a trigger may still begin in.
    tail: Vec<u8>,
    /// The tokens of `tail`, each with where it begins.
    tokens: Vec<(Token, usize)>,
}

impl Search {
    /// `None` where one of the texts is empty: found already.
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

    /// Whether the output begins with a trigger, white space aside.
    fn match_start(&mut self) -> Found {
        let start = self.tail.len() - self.tail.trim_ascii_start().len();
        let output = &self.tail[start..];
        if output.is_empty() {
            self.tail.clear();
            self.tokens.clear();
            return Found::Not;
        }
        // The shortest is complete first.
        let first =
            self.texts.iter().filter(|t| output.starts_with(t.as_bytes())).min_by_key(|t| t.len());
        match first {
            Some(text) => Found::At(self.hit(start, text.clone())),
            None if self.texts.iter().any(|t| t.as_bytes().starts_with(output)) => Found::Not,
            None => Found::Never,
        }
    }

    /// Whether a trigger ends in the bytes from `seen` on: the earliest end, then the longest.
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
        // The token that holds the first byte needed begins at or before it.
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
