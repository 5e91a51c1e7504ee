//! Compiles grammars for one model and caches the recent ones.

use super::keys::QuoteTokens;
use super::source;
use super::state::CompiledGrammar;
use super::trigger::TriggeredGrammar;
use super::vocab::{VocabSource, token_env};
use crate::ipc::{EngineError, Grammar, GrammarSpec};
use llguidance::ParserFactory;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

/// Number of cached grammars. Each may grow to tens of megabytes; most stay under one.
const CACHE_ENTRIES: usize = 32;
/// Stack size of the compiling thread. llguidance's parsers recurse with the grammar's nesting, and
/// a stack overflow cannot be caught; untouched pages cost nothing.
const COMPILE_STACK: usize = 512 << 20;

/// Compiles the grammars of one model; shared by reference between threads.
pub struct GrammarEngine {
    factory: ParserFactory,
    quotes: Arc<QuoteTokens>,
    /// Most recently used first.
    cache: Mutex<Vec<Cached>>,
    hasher: RandomState,
}

struct Cached {
    hash: u64,
    grammar: Grammar,
    compiled: CompiledGrammar,
}

impl GrammarEngine {
    /// Builds the token trie; takes some 100 ms for 128k tokens.
    ///
    /// # Errors
    /// An internal error if the vocabulary cannot be used for grammars.
    pub fn new(vocab: VocabSource) -> Result<Self, EngineError> {
        let env = token_env(vocab)?;
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| {
            EngineError::internal(format!("the vocabulary cannot be used for grammars: {error}"))
        })?;
        factory.quiet();
        *factory.limits_mut() = source::limits();
        let quotes = Arc::new(QuoteTokens::of(env.tok_trie()));
        Ok(Self { factory, quotes, cache: Mutex::new(Vec::new()), hasher: RandomState::new() })
    }

    /// Compiles a grammar, or returns it from the cache. Usually takes milliseconds, at most some
    /// seconds for a grammar built to be slow: do not call it on the step loop's thread.
    ///
    /// # Errors
    /// An invalid-request error that names `response_format` or `grammar` and what to change.
    pub fn compile(&self, grammar: &Grammar) -> Result<CompiledGrammar, EngineError> {
        let hash = self.hash(grammar);
        if let Some(compiled) = self.cached(hash, grammar) {
            return Ok(compiled);
        }
        let compiled = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("grammar".into())
                .stack_size(COMPILE_STACK)
                .spawn_scoped(scope, || CompiledGrammar::new(&self.factory, &self.quotes, grammar))
                .map_err(|error| {
                    EngineError::internal(format!("no thread to compile on: {error}"))
                })?
                .join()
                .unwrap_or_else(|_| Err(source::refusal(grammar, "")))
        })?;
        self.keep(Cached { hash, grammar: grammar.clone(), compiled: compiled.clone() });
        Ok(compiled)
    }

    /// Compiles a request's grammar and returns its state before the first token.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn start(&self, spec: &GrammarSpec) -> Result<TriggeredGrammar, EngineError> {
        Ok(TriggeredGrammar::new(&self.compile(&spec.grammar)?, spec.trigger.as_ref()))
    }

    fn hash(&self, grammar: &Grammar) -> u64 {
        let (kind, text) = match grammar {
            Grammar::JsonSchema(text) => (0u8, text.as_str()),
            Grammar::JsonObject => (1, ""),
            Grammar::Regex(text) => (2, text.as_str()),
            Grammar::Lark(text) => (3, text.as_str()),
            Grammar::JsonLark { lark, .. } => (4, lark.as_str()),
            Grammar::LenientJsonSchema(text) => (5, text.as_str()),
        };
        self.hasher.hash_one((kind, text))
    }

    fn cached(&self, hash: u64, grammar: &Grammar) -> Option<CompiledGrammar> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cache.iter().position(|c| c.hash == hash && c.grammar == *grammar)?;
        let entry = cache.remove(at);
        if entry.compiled.is_worn() {
            return None;
        }
        let compiled = entry.compiled.clone();
        cache.insert(0, entry);
        Some(compiled)
    }

    fn keep(&self, entry: Cached) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|c| c.hash != entry.hash || c.grammar != entry.grammar);
        cache.insert(0, entry);
        cache.truncate(CACHE_ENTRIES);
    }
}
