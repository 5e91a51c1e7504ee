//! Tests with two vocabularies: bytes only, and a synthetic one with merges and control tokens.

use super::*;
use crate::engine::sampler::{Sampler, Scratch};
use crate::ipc::{EngineError, EngineErrorKind, Grammar, GrammarSpec, GrammarTrigger};
use crate::ipc::{SamplingParams, Token};
use serde_json::Value;
use std::sync::Arc;

mod check;
mod hostile;
mod triggers;
mod walks;

/// A vocabulary and its grammar engine.
struct World {
    engine: GrammarEngine,
    pieces: Vec<Vec<u8>>,
    special: Vec<bool>,
    eos: Vec<Token>,
}

impl World {
    /// Every byte, and the control tokens `</s>`, `<tool_call>` and `</tool_call>`.
    fn bytes() -> Self {
        Self::new((0..=255u8).map(|b| vec![b]).collect(), &[])
    }

    /// Bytes, and pieces that span the borders between a grammar's terminals.
    fn merges() -> Self {
        let mut pieces: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        let merged = [
            "{\"", "\":", "\": \"", "\", \"", "\"}", "}}", "]}", "[[", "[\"", "\"]", "},", ", ",
            ": ", "  ", "\n", "\n\n", "\n  ", "true", "false", "null", "name", "na", "me\"", "age",
            "1", "12", "123", "0.", "-1", "e1", "red", "green", "\"red\"", "ab", "abc", "é", "ö\"",
            "日本", "</", "think", ">\n", ">\n\n", ">{", "<tool", "_call", ">", "the ", " a",
            "call",
        ];
        pieces.extend(merged.map(|piece| piece.as_bytes().to_vec()));
        // A duplicate, an empty token, a token that is too long, and one that looks special but is
        // not.
        let odd = [b"abc".to_vec(), vec![], vec![b' '; 5000], b"\xff<tool_call>".to_vec()];
        pieces.extend(odd);
        Self::new(pieces, &["<unused>"])
    }

    fn new(mut pieces: Vec<Vec<u8>>, more: &[&str]) -> Self {
        let mut special = vec![false; pieces.len()];
        for text in ["</s>", "<|im_end|>", "<tool_call>", "</tool_call>"].iter().chain(more) {
            pieces.push(text.as_bytes().to_vec());
            special.push(true);
        }
        let find = |text: &str| -> Token {
            let at = pieces.iter().zip(&special).position(|(p, s)| *s && p == text.as_bytes());
            at.expect("a control token") as Token
        };
        let eos = vec![find("</s>"), find("<|im_end|>")];
        let tokens = pieces.iter().zip(&special);
        let tokens = tokens.map(|(p, &s)| VocabToken { bytes: p.clone(), special: s }).collect();
        // Longest match first: a rough approximation of a real tokenizer.
        let plain: Vec<(Vec<u8>, Token)> = pieces
            .iter()
            .zip(0..)
            .filter(|(p, id)| !special[*id as usize] && !p.is_empty() && p.len() < 100)
            .map(|(p, id)| (p.clone(), id))
            .collect();
        let tokenize: Tokenize = Arc::new(move |mut text: &[u8]| {
            let mut out = Vec::new();
            while !text.is_empty() {
                let best = plain.iter().filter(|(p, _)| text.starts_with(p));
                let (piece, id) = best.max_by_key(|(p, _)| p.len()).expect("all bytes are tokens");
                out.push(*id);
                text = &text[piece.len()..];
            }
            out
        });
        let source = VocabSource { tokens, eos: eos.clone(), tokenize };
        let engine = GrammarEngine::new(source).expect("a usable vocabulary");
        Self { engine, pieces, special, eos }
    }

    fn token(&self, text: &str) -> Token {
        let at = self.pieces.iter().position(|piece| piece == text.as_bytes());
        at.expect("in the vocabulary") as Token
    }

    fn special(&self, text: &str) -> Token {
        let mut all = self.pieces.iter().zip(&self.special);
        all.position(|(p, s)| *s && p == text.as_bytes()).expect("a control token") as Token
    }

    fn compile(&self, grammar: Grammar) -> CompiledGrammar {
        self.engine.compile(&grammar).unwrap_or_else(|error| panic!("{grammar:?}: {error}"))
    }

    fn refuse(&self, grammar: Grammar) -> EngineError {
        match self.engine.compile(&grammar) {
            Err(error) => error,
            Ok(_) => panic!("accepted: {grammar:?}"),
        }
    }

    fn allowed(&self, state: &mut GrammarState) -> Vec<Token> {
        let mask = state.mask().expect("a mask");
        (0..self.pieces.len() as Token).filter(|t| bit(mask, *t)).collect()
    }

    /// Feeds text byte by byte; returns whether all of it is allowed.
    fn feed(&self, state: &mut GrammarState, text: &str) -> bool {
        text.bytes().all(|byte| {
            let token = Token::from(byte);
            let allowed = bit(state.mask().expect("a mask"), token);
            allowed && state.accept(token).is_ok()
        })
    }

    /// Whether the grammar accepts exactly this text.
    fn takes(&self, grammar: &CompiledGrammar, text: &str) -> bool {
        let mut state = grammar.matcher();
        // Feed the whole text at once: a mask may allow only one tokenization of it.
        state.accept_text(text.as_bytes()).expect("no failure") && state.is_accepting()
    }

    /// Generates random text under the mask until the grammar ends, and returns it. After `budget`
    /// tokens, tokens that lead to the end are preferred. A second state calls `forced` before
    /// every mask: the forced tokens must be those that the mask allows, and must not change the
    /// result.
    fn walk(&self, grammar: &CompiledGrammar, seed: u64, budget: usize) -> String {
        let (mut state, mut asking) = (grammar.matcher(), grammar.matcher());
        let params = SamplingParams { seed, ..SamplingParams::default() };
        let mut sampler = Sampler::new(&params, 0, self.pieces.len(), &|_| vec![]);
        let mut scratch = Scratch::default();
        let mut out = Vec::new();
        for step in 0..4000u64 {
            let mut logits = vec![0f32; self.pieces.len()];
            let hurry = step as usize >= budget;
            for &eos in &self.eos {
                logits[eos as usize] = if hurry { 9.0 } else { 1.0 };
            }
            // Prefer tokens that close what is open, and digits or letters over rare bytes.
            for byte in [b'"', b'}', b']'] {
                logits[usize::from(byte)] = if hurry { 8.0 } else { 2.0 };
            }
            for byte in b'a'..=b'z' {
                logits[usize::from(byte)] = 1.0;
            }
            let forced = asking.forced();
            let mask = state.mask().unwrap_or_else(|error| panic!("{error} after {out:?}"));
            assert!(asking.mask().is_ok_and(|same| same == mask), "after {out:?}");
            if let Some(&token) = forced.first() {
                let allowed: u32 = mask.iter().map(|word| word.count_ones()).sum();
                assert!(allowed == 1 && bit(mask, token), "{forced:?} after {out:?}");
            }
            let token = sampler.sample(&mut logits, Some(mask), step, &mut scratch);
            let token = token.expect("a grammar always leaves a way");
            state.accept(token).unwrap_or_else(|error| panic!("{error} after {out:?}"));
            asking.accept(token).unwrap_or_else(|error| panic!("{error} after {out:?}"));
            if self.eos.contains(&token) {
                assert!(state.is_finished());
                return String::from_utf8(out).expect("UTF-8");
            }
            out.extend_from_slice(&self.pieces[token as usize]);
        }
        panic!("no end: {}", String::from_utf8_lossy(&out));
    }
}

fn bit(mask: &[u32], token: Token) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}
