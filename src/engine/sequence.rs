//! A sequence: one choice of one request, from its prompt to its last token.

use super::grammar::TriggeredGrammar;
use super::kv::{CacheKey, SequencePages};
use super::sampler::Sampler;
use super::speculate::{DraftRequest, Speculation};
use super::text::TextAssembler;
use crate::ipc::{AdapterId, EngineError, Generate, RequestId, StopParams, Token, TokenLogprob};
use std::sync::Arc;
use std::time::Instant;

/// The immutable properties that all choices of a request share.
#[derive(Debug)]
pub(super) struct RequestFacts {
    pub id: RequestId,
    pub prompt_len: usize,
    pub cache_key: CacheKey,
    pub adapter: Option<AdapterId>,
    pub priority: i32,
    pub fair_key: u64,
    pub stop: StopParams,
    /// Most tokens that may be generated, limited by the context length.
    pub max_tokens: usize,
    pub logprobs: Option<u32>,
    pub echo: bool,
    /// For a rollout: the temperature at which logprobs are reported.
    pub rollout: Option<f32>,
    pub render_special: bool,
    /// Most tokens drafted for one step; 0 if speculation is off.
    pub max_drafted: usize,
    pub choices: u32,
    pub arrived: Instant,
}

/// A request that has been tokenized and validated; intake sends it to the step loop.
pub(super) struct ValidRequest {
    pub request: Generate,
    pub tokens: Vec<Token>,
    pub max_tokens: usize,
    /// At least one.
    pub choices: Vec<Choice>,
    pub arrived: Instant,
}

/// The state of one choice that the request's other choices do not share.
pub(super) struct Choice {
    pub choice: u32,
    pub sampler: Sampler,
    pub grammar: Option<TriggeredGrammar>,
}

/// Identifies a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SeqKey {
    pub request: RequestId,
    pub choice: u32,
}

pub(super) struct Sequence {
    pub key: SeqKey,
    pub facts: Arc<RequestFacts>,
    /// Prompt and output.
    pub tokens: Vec<Token>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// `None` while the sequence waits.
    pub pages: Option<SequencePages>,
    pub sampler: Sampler,
    pub grammar: Option<TriggeredGrammar>,
    /// `None` if nothing is drafted for this sequence.
    pub speculation: Option<Speculation>,
    pub text: TextAssembler,
    /// Logprobs of tokens whose text is held back.
    pub held_logprobs: Vec<TokenLogprob>,
    /// Logprobs of the prompt tokens computed so far, if the prompt is echoed.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// Choices to fork when the prompt has been computed; only the first choice has any.
    pub siblings: Vec<Choice>,
    /// The client reads slowly: the sequence gets no more rows.
    pub paused: bool,
    /// The error because of which no further token can be sampled.
    pub failed: Option<EngineError>,
}

impl Sequence {
    pub(super) fn output_len(&self) -> usize {
        self.tokens.len() - self.facts.prompt_len
    }

    /// Rows to compute before the next token can be sampled.
    pub(super) fn todo(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The first `count` tokens of this step's draft.
    pub(super) fn draft(&self, count: usize) -> &[Token] {
        self.speculation.as_ref().map_or(&[], |speculation| &speculation.draft()[..count])
    }

    /// Number of those tokens that a draft model proposed.
    pub(super) fn modelled(&self, count: usize) -> usize {
        self.speculation.as_ref().map_or(0, |speculation| speculation.modelled(count))
    }

    /// Most tokens of a draft: the row after the draft yields one more token.
    pub(super) fn draft_limit(&self) -> usize {
        let left = self.facts.max_tokens.saturating_sub(self.output_len());
        self.facts.max_drafted.min(left.saturating_sub(1))
    }

    /// The view of this sequence for a draft model that may draft `most` tokens. `None` if nothing
    /// is drafted.
    pub(super) fn draftee(&mut self, most: usize) -> Option<DraftRequest<'_>> {
        let most = most.min(self.draft_limit());
        let left = self.facts.max_tokens.saturating_sub(self.output_len());
        Some(DraftRequest {
            tokens: &self.tokens,
            tenant: self.facts.cache_key.tenant,
            sampler: &self.sampler,
            most,
            // The output so far is the best estimate of the output still to come.
            horizon: left.min(self.tokens.len() - self.facts.prompt_len),
            ignores_eos: self.facts.stop.ignore_eos,
            speculation: self.speculation.as_mut()?,
        })
    }

    pub(super) fn is_decoding(&self) -> bool {
        self.todo() == 1 && self.output_len() > 0
    }

    /// Whether the logits of all prompt rows are needed; then no prompt row may come from the
    /// cache.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.facts.echo && self.facts.logprobs.is_some() && self.output_len() == 0
    }

    /// Whether the sequence waits for its client. A prefill that has begun is completed up to the
    /// next token, because other sequences may be waiting for those pages.
    pub(super) fn is_stalled(&self) -> bool {
        self.paused && self.output_len() > 0 && (self.pages.is_none() || self.is_decoding())
    }

    /// Whether the scheduler may give this sequence rows now.
    pub(super) fn is_runnable(&self) -> bool {
        self.pages.is_some() && !self.is_stalled()
    }

    /// Slots that the sequence and its choices to be forked need.
    pub(super) fn slots(&self) -> usize {
        1 + self.siblings.len()
    }

    /// Creates a sequence before its first token. `tokens` are the prompt; `siblings` are forked
    /// later.
    pub(super) fn new(
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
