//! A compiled grammar and the positions of sequences in it.

use super::keys::{self, QuoteTokens, UniqueKeys};
use super::{source, vocab};
use crate::ipc::{EngineError, Grammar, Token};
use llguidance::{Matcher, ParserFactory};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use toktrie::{SimpleVob, TokEnv};

/// A grammar whose first mask takes longer than this is refused.
const SLOW_START: Duration = Duration::from_millis(500);
/// A sequence whose grammar takes longer than this in one step is failed: a step waits for all its
/// masks. Far above what [`source::limits`] allow, unless the machine is overloaded.
const SLOW_STEP: Duration = Duration::from_secs(2);

/// A compiled grammar; cheap to clone. All its states share the lexer's tables, which grow with the
/// text seen, so later requests benefit from them.
#[derive(Clone)]
pub struct CompiledGrammar {
    inner: Arc<Compiled>,
}

struct Compiled {
    /// The matcher at the beginning of the grammar; cloned for every state. In a mutex because it
    /// is not `Sync`.
    fresh: Mutex<Matcher>,
    env: TokEnv,
    param: &'static str,
    /// The initial key tracker of every state; `None` for grammars without JSON.
    keys: Option<UniqueKeys>,
    quotes: Arc<QuoteTokens>,
    /// The shared tables are full or may be corrupt: compile again for the next request.
    worn: AtomicBool,
}

impl CompiledGrammar {
    /// Compiles a grammar on the caller's stack; [`source::limits`] bound the time.
    ///
    /// # Errors
    /// An invalid-request error if llguidance refuses the grammar or the grammar exceeds a limit.
    pub(super) fn new(
        factory: &ParserFactory,
        quotes: &Arc<QuoteTokens>,
        grammar: &Grammar,
    ) -> Result<Self, EngineError> {
        let top_level = source::top_level(grammar)?;
        // llguidance catches its own panics here and in the matcher.
        let parser = factory
            .create_parser(top_level)
            .map_err(|error| source::refusal(grammar, &format!("{error:#}")))?;
        let mut fresh = Matcher::new(Ok(parser));
        // Compute the first mask now: states start with it, and a grammar that cannot begin, or is
        // slow to begin, is refused before any stream starts.
        let start = Instant::now();
        fresh
            .compute_mask_or_eos()
            .map_err(|error| source::refusal(grammar, &error.to_string()))?;
        if start.elapsed() > SLOW_START {
            return Err(source::refusal(grammar, "it is too slow to follow"));
        }
        Ok(Self {
            inner: Arc::new(Compiled {
                fresh: Mutex::new(fresh),
                env: factory.tok_env().clone(),
                param: grammar.param(),
                keys: match grammar {
                    Grammar::JsonSchema(_)
                    | Grammar::LenientJsonSchema(_)
                    | Grammar::JsonObject => Some(UniqueKeys::default()),
                    Grammar::JsonLark { reasoning, .. } => {
                        Some(UniqueKeys::after(reasoning.as_ref()))
                    }
                    Grammar::Regex(_) | Grammar::Lark(_) => None,
                },
                quotes: quotes.clone(),
                worn: AtomicBool::new(false),
            }),
        })
    }

    /// A new state at the beginning of the grammar.
    pub fn matcher(&self) -> GrammarState {
        let fresh = self.inner.fresh.lock().unwrap_or_else(PoisonError::into_inner).clone();
        GrammarState {
            matcher: fresh,
            mask: None,
            failed: None,
            keys: self.inner.keys.clone(),
            compiled: self.inner.clone(),
        }
    }

    /// Whether both come from the same compilation.
    #[cfg(test)]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether a state has corrupted the tables that all states share.
    pub(super) fn is_worn(&self) -> bool {
        self.inner.worn.load(Ordering::Relaxed)
    }
}

/// The position of one sequence in a grammar.
pub struct GrammarState {
    matcher: Matcher,
    /// The mask at the current position; `None` until requested.
    mask: Option<SimpleVob>,
    /// An error is final: every later call returns it again.
    failed: Option<EngineError>,
    keys: Option<UniqueKeys>,
    compiled: Arc<Compiled>,
}

impl GrammarState {
    /// The tokens that may come next, one bit per token, low bits first. The mask is computed on
    /// the first call at a position and cached. End-of-generation tokens are allowed only if the
    /// text so far is complete; they are the only allowed tokens once nothing else can follow.
    ///
    /// # Errors
    /// An invalid-request error if the grammar allows no token of this vocabulary here or is too
    /// complex to continue; an internal error if llguidance panics.
    pub fn mask(&mut self) -> Result<&[u32], EngineError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.mask.is_none() {
            let mut mask = self.step(Matcher::compute_mask_or_eos)?;
            self.forbid_repeated_keys(&mut mask)?;
            self.mask = Some(mask);
        }
        Ok(self.mask.as_ref().map_or(&[], SimpleVob::as_slice))
    }

    /// Removes the tokens from a mask that would repeat a key of the current object.
    fn forbid_repeated_keys(&mut self, mask: &mut SimpleVob) -> Result<(), EngineError> {
        let Some(keys) = &self.keys else { return Ok(()) };
        let compiled = &self.compiled;
        let repeats: Vec<Token> = keys
            .repeats(compiled.env.tok_trie(), &compiled.quotes, |token| mask.is_allowed(token))
            .collect();
        if repeats.is_empty() {
            return Ok(());
        }
        repeats.into_iter().for_each(|token| mask.disallow_token(token));
        if !mask.is_zero() {
            return Ok(());
        }
        let error = EngineError::invalid(
            compiled.param,
            "the schema asks for more properties of an object than it allows different keys; lower \
             minProperties, or list the keys under properties",
        );
        self.failed = Some(error.clone());
        Err(error)
    }

    /// Updates the key tracker with the text of these tokens.
    fn follow_keys(&mut self, tokens: &[Token]) {
        if let Some(keys) = &mut self.keys {
            let trie = self.compiled.env.tok_trie();
            for &token in tokens {
                keys.push_all(keys::bytes(trie, token));
            }
        }
    }

    /// The tokens that must come next, as the masks would allow them one by one; empty if the mask
    /// has already been requested. The mask reuses work done here.
    pub fn forced(&mut self) -> Vec<Token> {
        if self.failed.is_some() || self.mask.is_some() || self.matcher.is_stopped() {
            return Vec::new();
        }
        let mut forced = self.matcher.compute_ff_tokens();
        if let Some(mut unique) = self.keys.clone() {
            let trie = self.compiled.env.tok_trie();
            let repeats = |token: &Token| !unique.push_all(keys::bytes(trie, *token));
            let fine = forced.iter().position(repeats).unwrap_or(forced.len());
            forced.truncate(fine);
        }
        forced
    }

    /// Advances by a token, which the mask must have allowed.
    ///
    /// # Errors
    /// An internal error if the grammar does not allow the token, an invalid-request error if the
    /// grammar is too complex. Either is final.
    pub fn accept(&mut self, token: Token) -> Result<(), EngineError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.matcher.is_stopped() {
            return match self.is_eos(token) {
                true => Ok(()),
                false => Err(EngineError::internal("a token came after the end of the grammar")),
            };
        }
        self.mask = None;
        self.step(|matcher| matcher.consume_token(token))?;
        self.follow_keys(&[token]);
        Ok(())
    }

    /// Advances by text whose tokens are not known, such as the rest of a trigger's token. Returns
    /// false if the grammar does not allow the text; the position is then unchanged.
    ///
    /// # Errors
    /// As [`mask`](Self::mask).
    pub fn accept_text(&mut self, text: &[u8]) -> Result<bool, EngineError> {
        match self.tokenize(text) {
            Some(tokens) => self.accept_all(&tokens),
            None => Ok(false),
        }
    }

    /// Advances by all of these tokens, or by none. Returns false if the grammar does not allow
    /// them.
    ///
    /// # Errors
    /// As [`mask`](Self::mask).
    pub fn accept_all(&mut self, tokens: &[Token]) -> Result<bool, EngineError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if tokens.is_empty() {
            return Ok(true);
        }
        let size = self.compiled.env.tok_trie().vocab_size();
        if tokens.iter().any(|&token| token as usize >= size) {
            return Ok(false);
        }
        if self.step(|matcher| matcher.validate_tokens(tokens))? < tokens.len() {
            return Ok(false);
        }
        self.mask = None;
        self.step(|matcher| matcher.consume_tokens(tokens))?;
        self.follow_keys(tokens);
        Ok(true)
    }

    /// Whether only an end-of-generation token may follow, or has already come.
    pub fn is_finished(&self) -> bool {
        self.failed.is_none() && self.matcher.is_stopped()
    }

    /// Whether the text so far is complete; more may follow.
    pub fn is_accepting(&mut self) -> bool {
        self.failed.is_none() && (self.matcher.is_stopped() || self.can_stop())
    }

    fn can_stop(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// Tokenizes a text without control tokens; `None` if the vocabulary cannot represent it.
    pub(super) fn tokenize(&self, text: &[u8]) -> Option<Vec<Token>> {
        let tokens = self.compiled.env.tokenize_bytes(text);
        vocab::spells(self.compiled.env.tok_trie(), &tokens, text).then_some(tokens)
    }

    /// The control token with this text.
    pub(super) fn special_token(&self, text: &str) -> Option<Token> {
        self.compiled.env.tok_trie().get_special_token(text)
    }

    fn is_eos(&self, token: Token) -> bool {
        self.compiled.env.tok_trie().eos_tokens().contains(&token)
    }

    /// Fails the state after a panic that llguidance did not catch.
    pub(super) fn poison(&mut self) -> EngineError {
        self.compiled.worn.store(true, Ordering::Relaxed);
        let error = EngineError::internal("the grammar failed; its tables are discarded");
        self.failed = Some(error.clone());
        error
    }

    /// Runs one operation of llguidance. If it fails or takes too long, the state fails.
    fn step<T, E: ToString>(
        &mut self,
        operation: impl FnOnce(&mut Matcher) -> Result<T, E>,
    ) -> Result<T, EngineError> {
        let start = Instant::now();
        let error = match operation(&mut self.matcher) {
            Ok(_) if start.elapsed() > SLOW_STEP => self.too_complex(),
            Ok(value) => return Ok(value),
            Err(error) => self.failure(&error.to_string()),
        };
        self.failed = Some(error.clone());
        Err(error)
    }

    /// Panics inside llguidance, which corrupts the tables shared by all states of the grammar.
    #[cfg(test)]
    pub(super) fn break_tables(&mut self) -> Option<EngineError> {
        self.step(Matcher::test_trigger_lexer_error).err()
    }

    /// The error message for a llguidance error. llguidance has no error kinds, only text
    /// (`tokenparser.rs`).
    fn failure(&self, cause: &str) -> EngineError {
        if cause.contains("doesn't satisfy the grammar") || cause.contains("out of range") {
            return EngineError::internal("a token came that the grammar does not allow");
        }
        // Full tables make every later state fail, and a panic leaves a poisoned lock.
        self.compiled.worn.store(true, Ordering::Relaxed);
        if cause.contains("NoExtension") {
            return EngineError::invalid(
                self.compiled.param,
                "the grammar leads to a point where no token of this model fits; allow more text \
                 there",
            );
        }
        let complex = ["lexer error", "parser error", "max is", "Too many items", "too complex"];
        match complex.iter().any(|part| cause.contains(part)) && !cause.contains("panic") {
            true => self.too_complex(),
            false => EngineError::internal("the grammar engine failed on this output"),
        }
    }

    fn too_complex(&self) -> EngineError {
        EngineError::invalid(
            self.compiled.param,
            "the grammar became too complex to follow at this point of the output; use smaller \
             repetition counts and fewer alternatives",
        )
    }
}
