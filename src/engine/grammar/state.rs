//! A compiled grammar and the walks through it.

use super::keys::{self, QuoteTokens, UniqueKeys};
use super::{source, vocab};
use crate::ipc::{EngineError, Grammar, Token};
use llguidance::{Matcher, ParserFactory};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use toktrie::{SimpleVob, TokEnv};

/// A grammar whose first mask takes longer is refused.
const SLOW_START: Duration = Duration::from_millis(500);
/// A walk that takes longer for one step is ended: a step of the engine waits for all its masks.
/// Far above what [`source::limits`] allow on a machine that is not starved.
const SLOW_STEP: Duration = Duration::from_secs(2);

/// A grammar ready for use; cheap to clone. Its walks share the lexer's tables, which grow as text
/// is seen, so later requests find them warm.
#[derive(Clone)]
pub struct CompiledGrammar {
    inner: Arc<Compiled>,
}

struct Compiled {
    /// At the beginning of the grammar; cloned for every walk. A mutex because it is not `Sync`.
    fresh: Mutex<Matcher>,
    env: TokEnv,
    param: &'static str,
    /// Where a walk begins to follow the keys of objects; `None` for grammars without JSON.
    keys: Option<UniqueKeys>,
    quotes: Arc<QuoteTokens>,
    /// The shared tables are full or suspect: compile anew for the next request.
    worn: AtomicBool,
}

impl CompiledGrammar {
    /// Compiles; runs as long as [`source::limits`] let it, on the caller's stack.
    ///
    /// # Errors
    /// Invalid, where llguidance refuses the grammar or it exceeds a limit.
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
        // The first mask now: walks begin with it ready, and a grammar that cannot begin, or only
        // slowly, is refused before any stream starts.
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
                param: source::param(grammar),
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

    /// A walk from the beginning of the grammar.
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

    /// Whether both came from one compilation.
    #[cfg(test)]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether a walk has spoiled the tables that all walks share.
    pub(super) fn is_worn(&self) -> bool {
        self.inner.worn.load(Ordering::Relaxed)
    }
}

/// Where one sequence stands in a grammar.
pub struct GrammarState {
    matcher: Matcher,
    /// Of the current position; `None` until asked for.
    mask: Option<SimpleVob>,
    /// An error ends the walk and is given again on every later call.
    failed: Option<EngineError>,
    keys: Option<UniqueKeys>,
    compiled: Arc<Compiled>,
}

impl GrammarState {
    /// The tokens that may come next, a bit per token, low bits first; computed on the first call
    /// at a position and kept. End-of-generation tokens are among them only where the text so far
    /// is complete, and are all there is once nothing else may follow.
    ///
    /// # Errors
    /// Invalid where the grammar allows no token of this vocabulary here or is too complex to go
    /// on; internal where llguidance panics.
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

    /// Takes the tokens out of a mask that would give an object a key which it has.
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

    /// Follows the text that tokens write.
    fn follow_keys(&mut self, tokens: &[Token]) {
        if let Some(keys) = &mut self.keys {
            let trie = self.compiled.env.tok_trie();
            for &token in tokens {
                keys.push_all(keys::bytes(trie, token));
            }
        }
    }

    /// The tokens that come next for certain, as the mask would allow them one by one; nothing where
    /// the mask has been asked for already. What it computes, the mask then need not.
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

    /// Takes a token in, which the mask must have allowed.
    ///
    /// # Errors
    /// Internal where the grammar does not allow the token, invalid where it is too complex; the
    /// walk is over then.
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

    /// Takes text in whose tokens are not at hand, such as the rest of a trigger's token. False
    /// where the grammar does not allow it; the position is unchanged then.
    ///
    /// # Errors
    /// As [`mask`](Self::mask).
    pub fn accept_text(&mut self, text: &[u8]) -> Result<bool, EngineError> {
        match self.tokenize(text) {
            Some(tokens) => self.accept_all(&tokens),
            None => Ok(false),
        }
    }

    /// Takes all of these tokens in, or none of them. False where the grammar does not allow them.
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

    /// Nothing but an end-of-generation token may follow (or one has come).
    pub fn is_finished(&self) -> bool {
        self.failed.is_none() && self.matcher.is_stopped()
    }

    /// The text so far is complete, though more may follow.
    pub fn is_accepting(&mut self) -> bool {
        self.failed.is_none() && (self.matcher.is_stopped() || self.can_stop())
    }

    fn can_stop(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// Plain tokens for a text; `None` where the vocabulary cannot spell it.
    pub(super) fn tokenize(&self, text: &[u8]) -> Option<Vec<Token>> {
        let tokens = self.compiled.env.tokenize_bytes(text);
        vocab::spells(self.compiled.env.tok_trie(), &tokens, text).then_some(tokens)
    }

    /// The control token of this text.
    pub(super) fn special_token(&self, text: &str) -> Option<Token> {
        self.compiled.env.tok_trie().get_special_token(text)
    }

    fn is_eos(&self, token: Token) -> bool {
        self.compiled.env.tok_trie().eos_tokens().contains(&token)
    }

    /// Ends the walk after a panic outside of llguidance's own nets.
    pub(super) fn poison(&mut self) -> EngineError {
        self.compiled.worn.store(true, Ordering::Relaxed);
        let error = EngineError::internal("the grammar failed; its tables are discarded");
        self.failed = Some(error.clone());
        error
    }

    /// One operation of llguidance; its failure, or taking too long, ends the walk.
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

    /// Panics inside llguidance, which poisons the tables that all walks of the grammar share.
    #[cfg(test)]
    pub(super) fn break_tables(&mut self) -> Option<EngineError> {
        self.step(Matcher::test_trigger_lexer_error).err()
    }

    /// Words an error of llguidance. It keeps no kind of error, only text (`tokenparser.rs`).
    fn failure(&self, cause: &str) -> EngineError {
        if cause.contains("doesn't satisfy the grammar") || cause.contains("out of range") {
            return EngineError::internal("a token came that the grammar does not allow");
        }
        // Full tables fail every later walk, and a panic leaves a poisoned lock.
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
