//! Constrained decoding: grammars compiled by llguidance, token masks, triggers.
//!
//! A [`GrammarEngine`] belongs to one loaded model. It compiles a request's grammar once
//! ([`CompiledGrammar`], kept in a small cache). Every choice of the request has its own position
//! in the grammar ([`GrammarState`], wrapped in a [`TriggeredGrammar`] that does not constrain the
//! output until its trigger appears). A [`MaskWorker`] computes masks while the forward pass runs.
//!
//! The order within a step: `submit` every sequence that
//! [`needs_mask`](TriggeredGrammar::needs_mask), run the batch, `collect`, sample under
//! [`mask`](TriggeredGrammar::mask), then [`observe`](TriggeredGrammar::observe) the token.

mod engine;
mod keys;
mod source;
mod state;
mod trigger;
mod vocab;
mod worker;

#[cfg(test)]
mod tests;

pub use engine::GrammarEngine;
pub use source::{JSON_WHITESPACE, MAX_DEPTH, MAX_GRAMMAR_BYTES};
pub use state::{CompiledGrammar, GrammarState};
pub use trigger::TriggeredGrammar;
pub use vocab::{Tokenize, VocabSource, VocabToken};
pub use worker::{MaskWorker, Masked, ready};
