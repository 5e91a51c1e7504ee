//! Tests of a draft model alone over the mock runner, which fails on a wrong position or slot.

use super::*;
use crate::engine::cost::Pace;
use crate::engine::runner::mock::Mock;
use crate::engine::runner::{
    AdapterHandle, AdapterLoader, Batch, ModelRunner, Ran, RunnerError, SeqSlot,
};
use crate::engine::sampler::Sampler;
use crate::ipc::{AdapterId, LoadSpec, ModelInfo, RunnerKind, SamplingParams};
use crate::tokenizer::Tokenizer;
use std::ops::Range;
use std::sync::Arc;

const EOS: Token = 257;

fn mock(pages: u32, max_sequences: u32) -> Mock {
    let spec = LoadSpec { kv_tokens: pages * 32, max_sequences, ..plain() };
    Mock::load(&spec)
}

fn plain() -> LoadSpec {
    LoadSpec::plain("mock", RunnerKind::Mock)
}

fn draft_model(pages: u32) -> DraftModel {
    DraftModel::new(Box::new(mock(pages, 8)), 258)
}

/// A sequence with all the state that the draft model needs.
struct Drafted {
    tokens: Vec<Token>,
    prompt: usize,
    sampler: Sampler,
    speculation: Speculation,
}

impl Drafted {
    fn new(tokens: Vec<Token>) -> Self {
        let params = SamplingParams { temperature: 0.0, ..Default::default() };
        let sampler = Sampler::new(&params, 0, 258, &|_| Vec::new());
        Self { prompt: tokens.len(), tokens, sampler, speculation: Speculation::default() }
    }

    fn give(&mut self, token: Token) {
        self.speculation.observe(token);
        self.sampler.accept(token);
        self.tokens.push(token);
    }

    fn draftee(&mut self, most: usize) -> DraftRequest<'_> {
        self.speculation.propose(&self.tokens, &[], most);
        DraftRequest {
            tokens: &self.tokens,
            tenant: 0,
            sampler: &self.sampler,
            speculation: &mut self.speculation,
            most,
            horizon: self.tokens.len() - self.prompt,
            ignores_eos: false,
        }
    }

    /// The next tokens according to the mock.
    fn oracle(&self, most: usize) -> Vec<Token> {
        let mut tokens = self.tokens.clone();
        let next = |_| {
            let token = Mock::next_greedy(&tokens, None);
            tokens.push(token);
            (token != EOS).then_some(token)
        };
        (0..most).map_while(next).collect()
    }
}

/// Noise, so that prompt lookup finds nothing.
fn prompt(of: Token, length: usize) -> Vec<Token> {
    let noise = |at: usize| {
        let x = (at as Token + 1000 * of + 1).wrapping_mul(0x9e37_79b1);
        (x ^ (x >> 15)).wrapping_mul(0x85eb_ca6b) >> 24
    };
    (0..length).map(noise).collect()
}

#[test]
fn what_it_says_is_drafted_whatever_came_instead() {
    let mut model = draft_model(64);
    let mut all: Vec<_> =
        (0..5).map(|of| Drafted::new(prompt(of, 20 + 30 * of as usize))).collect();
    let mut drafted = 0;
    for step in 0..120usize {
        // Each step drafts for some of the sequences, with varying limits.
        let most = 1 + step % 6;
        let asked = all.iter_mut().enumerate().filter(|(at, _)| (step + at) % 4 > 0);
        model.draft(asked.map(|(_, one)| one.draftee(most)).collect(), None, 40);
        for (at, one) in all.iter_mut().enumerate() {
            let oracle = one.oracle(most);
            if (step + at) % 4 > 0 && one.speculation.is_modelled() {
                assert!(oracle.starts_with(one.speculation.draft()), "{step}");
                drafted += one.speculation.draft().len();
            }
            // Accept a varying number of tokens and append a different one, or append only the
            // first token.
            let own = (step as Token * 13 + at as Token) % 256;
            let own = (step % 3 > 0 || oracle.len() < 2).then_some(own);
            let accepts = if own.is_some() { step % 5 } else { 1 };
            for token in oracle.into_iter().take(accepts).chain(own) {
                one.give(token);
            }
        }
    }
    assert!(drafted > 800, "{drafted} drafted");
    assert!(model.held_pages() > 0);
    drop(all);
    assert_eq!(model.held_pages(), 0);
    assert_eq!(model.free_pages(), 64);
}

#[test]
fn who_finds_no_pages_is_not_drafted_for() {
    let mut model = draft_model(6);
    let mut all: Vec<_> = (0..5).map(|of| Drafted::new(prompt(of, 60))).collect();
    for _ in 0..40 {
        let asked = all.iter_mut().map(|one| one.draftee(4)).collect();
        model.draft(asked, None, 100);
        let seat =
            |one: &&Drafted| one.speculation.seat.as_ref().is_some_and(|s| s.pages.is_some());
        let with = all.iter().filter(seat).count();
        assert!((1..=3).contains(&with), "{with} have two pages or three of the six");
        for one in &mut all {
            let next = one.oracle(1).pop().unwrap_or(97);
            one.give(next);
        }
    }
    // A sequence that must wait releases its pages.
    all[0].speculation.make_room();
    all.truncate(1);
    assert_eq!(model.held_pages(), 0);
    model.draft(vec![all[0].draftee(4)], None, 200);
    assert!(all[0].speculation.is_modelled());
}

#[test]
fn a_prefix_is_read_once_for_all() {
    let mut model = draft_model(64);
    let mut first = Drafted::new(prompt(1, 200));
    for _ in 0..5 {
        assert!(!first.speculation.is_modelled());
        model.draft(vec![first.draftee(4)], None, 40);
    }
    assert!(first.speculation.is_modelled());
    let mut second = Drafted::new(prompt(1, 200));
    model.draft(vec![second.draftee(4)], None, 40);
    assert!(second.speculation.is_modelled());
}

#[test]
fn tokens_that_it_does_not_know_are_left_to_others() {
    let mut model = draft_model(64);
    let mut strange = Drafted::new([prompt(1, 20), vec![300]].concat());
    let mut known = Drafted::new(prompt(5, 20));
    assert_eq!(known.oracle(4).len(), 4, "it does not end at once");
    for _ in 0..3 {
        model.draft(vec![strange.draftee(4), known.draftee(4)], None, 40);
        assert!(!strange.speculation.is_modelled() && known.speculation.is_modelled());
    }
    // The draft model does not know the forced token.
    let forced = known.draftee(4);
    forced.speculation.propose(forced.tokens, &[300], 4);
    model.draft(vec![forced], None, 40);
    assert_eq!(known.speculation.draft(), [300]);
}

/// A pass that takes a small fraction of the step, and one that takes twice the step's time.
#[test]
fn it_drafts_while_that_pays() {
    let pace = Pace { seconds: 0.05, tokens: 1.0, row: 0.002 };
    let run = |pass: f32, horizon: usize| {
        let mut runner = mock(64, 8);
        runner.take(std::time::Duration::from_secs_f32(pass));
        let mut model = DraftModel::new(Box::new(runner), 258);
        let mut one = Drafted::new(prompt(1, 8));
        let (mut drafted, mut first) = (0, None);
        for step in 0..60 {
            let draftee = one.draftee(8);
            let seconds = model.draft(vec![DraftRequest { horizon, ..draftee }], Some(pace), 40);
            assert_eq!(seconds > 0.0, one.speculation.is_modelled());
            if one.speculation.is_modelled() {
                first.get_or_insert(step);
                drafted += one.speculation.draft().len();
            }
            let next = one.oracle(1).pop().unwrap_or(97);
            one.give(next);
        }
        (drafted, first)
    };
    let (cheap, dear, short) = (run(0.002, 500), run(0.1, 500), run(0.002, 0));
    println!("drafted in 60 steps: {cheap:?}, dear {dear:?}, for short answers {short:?}");
    assert!(cheap.0 > 150, "{cheap:?}");
    assert_eq!(dear, (0, None));
    assert_eq!(short, (0, None));
}

/// A draft model that is always wrong is tried for a while, then hardly ever.
#[test]
fn one_that_is_never_right_is_left_alone() {
    let pace = Pace { seconds: 0.05, tokens: 1.0, row: 0.002 };
    let mut runner = mock(64, 8);
    runner.take(std::time::Duration::from_millis(10));
    let mut model = DraftModel::new(Box::new(runner), 258);
    let mut one = Drafted::new(prompt(1, 8));
    let mut asked = 0;
    for step in 0..400usize {
        let draftee = one.draftee(8);
        model.draft(vec![DraftRequest { horizon: 1000, ..draftee }], Some(pace), 40);
        asked += usize::from(one.speculation.is_modelled());
        one.give(((step * step * 7) % 251) as Token);
    }
    println!("asked in {asked} of 400 steps");
    assert!((3..40).contains(&asked), "{asked}");
}

/// A mock runner that fails after a number of steps.
struct Failing {
    mock: Mock,
    steps: usize,
}

impl ModelRunner for Failing {
    fn info(&self) -> &ModelInfo {
        self.mock.info()
    }

    fn tokenizer(&self) -> Arc<dyn Tokenizer> {
        self.mock.tokenizer()
    }

    fn adapter_loader(&self) -> Box<dyn AdapterLoader> {
        self.mock.adapter_loader()
    }

    fn slots(&self) -> u32 {
        self.mock.slots()
    }

    fn slots_hold_pages(&self) -> bool {
        true
    }

    fn run(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        self.steps = self.steps.checked_sub(1).ok_or(RunnerError("no more".into()))?;
        self.mock.run(batch, interrupt)
    }

    fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError> {
        self.mock.logits(row)
    }

    fn fork(&mut self, from: SeqSlot, to: SeqSlot, tokens: usize) {
        self.mock.fork(from, to, tokens);
    }

    fn truncate(&mut self, slot: SeqSlot, tokens: usize) {
        self.mock.truncate(slot, tokens);
    }

    fn release(&mut self, slot: SeqSlot) {
        self.mock.release(slot);
    }

    fn install_adapter(&mut self, _: AdapterId, _: AdapterHandle) {}

    fn remove_adapter(&mut self, _: AdapterId) {}

    fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        adapter: Option<AdapterId>,
    ) -> Result<Option<Vec<f32>>, RunnerError> {
        self.mock.pool(input, rows, adapter)
    }
}

#[test]
fn one_that_fails_is_not_asked_again() {
    let mut model = DraftModel::new(Box::new(Failing { mock: mock(64, 8), steps: 3 }), 258);
    let mut one = Drafted::new(prompt(1, 20));
    model.draft(vec![one.draftee(8)], None, 40);
    // The tokens drafted before the failure remain a valid draft.
    assert_eq!(one.speculation.draft(), one.oracle(3));
    one.give(97);
    model.draft(vec![one.draftee(8)], None, 40);
    assert!(!one.speculation.is_modelled());
    drop(one);
    assert_eq!(model.held_pages(), 0);
}
