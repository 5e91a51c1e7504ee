//! One choice of one request, from its prompt to its last token.

use super::grammar::TriggeredGrammar;
use super::kv::{CacheKey, SequencePages};
use super::sampler::Sampler;
use super::speculate::{Draftee, Speculation};
use super::text::TextAssembler;
use crate::ipc::{AdapterId, EngineError, Generate, RequestId, StopParams, Token, TokenLogprob};
use std::sync::Arc;
use std::time::Instant;

/// What all choices of a request have in common; never changes.
#[derive(Debug)]
pub struct RequestFacts {
    pub id: RequestId,
    pub prompt_len: usize,
    pub cache_key: CacheKey,
    pub adapter: Option<AdapterId>,
    pub priority: i32,
    pub fair_key: u64,
    pub stop: StopParams,
    /// Tokens that may be generated, the context's end considered.
    pub max_tokens: usize,
    pub logprobs: Option<u32>,
    pub echo: bool,
    /// Of a rollout: the temperature that log-probabilities are of.
    pub rollout: Option<f32>,
    pub render_special: bool,
    /// Tokens drafted for one step, at most; 0 where nothing is.
    pub max_drafted: usize,
    pub choices: u32,
    pub arrived: Instant,
}

/// A request that has been tokenized and found to fit; what intake hands to the step loop.
pub struct Admissible {
    pub request: Generate,
    pub tokens: Vec<Token>,
    pub max_tokens: usize,
    /// At least one.
    pub choices: Vec<Choice>,
    pub arrived: Instant,
}

/// What one of a request's choices has to itself.
pub struct Choice {
    pub choice: u32,
    pub sampler: Sampler,
    pub grammar: Option<TriggeredGrammar>,
}

/// Names a sequence among all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqKey {
    pub request: RequestId,
    pub choice: u32,
}

pub struct Sequence {
    pub key: SeqKey,
    pub facts: Arc<RequestFacts>,
    /// Prompt and output.
    pub tokens: Vec<Token>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// `None` while waiting.
    pub pages: Option<SequencePages>,
    pub sampler: Sampler,
    pub grammar: Option<TriggeredGrammar>,
    /// `None` where nothing is drafted.
    pub speculation: Option<Speculation>,
    pub text: TextAssembler,
    /// Logprobs of tokens whose text is held back.
    pub held_logprobs: Vec<TokenLogprob>,
    /// Logprobs of the prompt so far, where echoed.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// Choices that will split off when the prompt is computed; the first choice's only.
    pub siblings: Vec<Choice>,
    /// The client reads slowly: no more rows.
    pub paused: bool,
    /// Why it cannot be given another token.
    pub failed: Option<EngineError>,
}

impl Sequence {
    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.facts.prompt_len
    }

    /// Rows until the next token can be sampled.
    pub fn todo(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The first tokens of the draft of this step.
    pub fn draft(&self, count: usize) -> &[Token] {
        self.speculation.as_ref().map_or(&[], |speculation| &speculation.draft()[..count])
    }

    /// How many of those a draft model came up with.
    pub fn modelled(&self, count: usize) -> usize {
        self.speculation.as_ref().map_or(0, |speculation| speculation.modelled(count))
    }

    /// Tokens that a draft may have: one more comes from the row after it.
    pub fn draft_limit(&self) -> usize {
        let left = self.facts.max_tokens.saturating_sub(self.output_len());
        self.facts.max_drafted.min(left.saturating_sub(1))
    }

    /// For a draft model, which may draft `most` tokens. `None` where nothing is drafted.
    pub fn draftee(&mut self, most: usize) -> Option<Draftee<'_>> {
        let most = most.min(self.draft_limit());
        let left = self.facts.max_tokens.saturating_sub(self.output_len());
        Some(Draftee {
            tokens: &self.tokens,
            tenant: self.facts.cache_key.tenant,
            sampler: &self.sampler,
            most,
            // What has come is the best guess of what is to come.
            horizon: left.min(self.tokens.len() - self.facts.prompt_len),
            ignores_eos: self.facts.stop.ignore_eos,
            speculation: self.speculation.as_mut()?,
        })
    }

    pub fn is_decoding(&self) -> bool {
        self.todo() == 1 && self.output_len() > 0
    }

    /// Whether the logits of all rows of the prompt are wanted: none may come from the cache.
    pub fn wants_prompt_logits(&self) -> bool {
        self.facts.echo && self.facts.logprobs.is_some() && self.output_len() == 0
    }

    /// Whether it has to wait for its client. What has been begun is computed to the next token,
    /// for others may be waiting for those pages.
    pub fn is_stalled(&self) -> bool {
        self.paused && self.output_len() > 0 && (self.pages.is_none() || self.is_decoding())
    }

    /// Whether the scheduler may give it rows now.
    pub fn is_runnable(&self) -> bool {
        self.pages.is_some() && !self.is_stalled()
    }

    /// Slots that it and the choices to come need.
    pub fn slots(&self) -> usize {
        1 + self.siblings.len()
    }

    /// Before its first token. `tokens` are the prompt's; further choices split off later.
    pub fn new(
        facts: Arc<RequestFacts>,
        tokens: Vec<Token>,
        mine: Choice,
        siblings: Vec<Choice>,
    ) -> Self {
        let mut sampler = mine.sampler;
        sampler.accept_prompt(&tokens);
        Self {
            key: SeqKey { request: facts.id, choice: mine.choice },
            text: TextAssembler::new(&facts.stop.strings),
            speculation: (facts.max_drafted > 0).then(Speculation::default),
            facts,
            tokens,
            computed: 0,
            pages: None,
            sampler,
            grammar: mine.grammar,
            held_logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            siblings,
            paused: false,
            failed: None,
        }
    }
}
