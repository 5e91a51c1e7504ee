//! Tests of the whole step loop over the mock runner. The mock's logits depend only on the contents
//! of a slot: a request must produce the same output as it does alone, whatever other requests run.

use super::commands::{AdapterFacts, Command};
use super::input_processor::{InputProcessor, Job};
use super::runner::mock::Mock;
use super::runner::{AdapterHandle, ModelRunner, PAGE_TOKENS, load_draft};
use super::sequence::SeqKey;
use super::step::StepLoop;
use crate::ipc::{
    AdapterId, EngineErrorKind, Event, FinishReason, FromEngine, Generate, Grammar, GrammarSpec,
    LoadSpec, Progress, Prompt, Reply, RequestId, RunnerKind, SamplingParams, Speculate,
    StopParams, Token,
};
use crossbeam_channel::{Receiver, Sender, unbounded};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const EOS: Token = 257;
/// First token of prompts after which the mock repeats itself.
const FORGETS: Token = b'~' as Token;
const ADAPTERS: u64 = 2;
/// Timeout: long enough for every request in these tests to end.
const PATIENCE: Duration = Duration::from_secs(20);

fn load_spec(kv_pages: u32, max_sequences: u32, batch_tokens: u32) -> LoadSpec {
    LoadSpec {
        context_length: kv_pages * PAGE_TOKENS as u32,
        kv_tokens: kv_pages * PAGE_TOKENS as u32,
        max_sequences,
        batch_tokens,
        threads: 1,
        queue_limit: 1000,
        ..LoadSpec::plain("mock", RunnerKind::Mock)
    }
}

/// An engine without its own process.
struct Engine {
    jobs: Sender<Job>,
    commands: Sender<Command>,
    frames: Receiver<FromEngine>,
    steps: JoinHandle<()>,
}

impl Engine {
    fn start(spec: LoadSpec) -> Self {
        let (commands, to_do) = unbounded();
        let (jobs, to_check) = unbounded();
        let (to_gateway, frames) = unbounded();
        let (for_processor, loading) = (commands.clone(), commands.clone());
        let steps = std::thread::spawn(move || {
            let runner = Box::new(Mock::load(&spec));
            let draft = load_draft(&*runner, &spec).unwrap();
            let processor = InputProcessor::new(runner.tokenizer(), runner.info().clone());
            processor.open(&to_check, &for_processor, &to_gateway).unwrap();
            drop(for_processor);
            StepLoop::new(runner, draft, &spec, to_do, to_gateway).unwrap().run();
        });
        for id in 1..=ADAPTERS {
            let facts = AdapterFacts { digest: [id as u8; 32], head: None };
            let (adapter, handle) = (AdapterId(id), AdapterHandle::Mock);
            let _ = loading.send(Command::InstallAdapter { call: id, adapter, facts, handle });
        }
        Self { jobs, commands, frames, steps }
    }

    fn ask(&self, request: Generate) {
        let _ = self.jobs.send(Job::Generate(Box::new(request), Instant::now()));
    }

    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Receives events until the requests `ids` have ended.
    fn listen(&self, outcomes: &mut BTreeMap<u64, Outcome>, ids: &[u64]) {
        let deadline = Instant::now() + PATIENCE;
        let ended = |outcomes: &BTreeMap<u64, Outcome>, id| {
            outcomes.get(id).is_some_and(|outcome: &Outcome| outcome.ended)
        };
        while !ids.iter().all(|id| ended(outcomes, id)) {
            let frame = self.frames.recv_deadline(deadline).expect("every request ends");
            let FromEngine::Events(events) = frame else { continue };
            for (request, event) in events {
                outcomes.entry(request.0).or_default().take(event);
            }
        }
    }

    /// The outcomes of the requests 0 to `count`.
    fn outcomes(&self, count: usize) -> BTreeMap<u64, Outcome> {
        let mut outcomes = BTreeMap::new();
        self.listen(&mut outcomes, &(0..count as u64).collect::<Vec<_>>());
        outcomes
    }

    /// Waits for a step that is announced before it runs; returns the announced seconds. Receives
    /// the events that come before the announcement.
    fn announced(&self, outcomes: &mut BTreeMap<u64, Outcome>) -> f32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.frames.recv_deadline(deadline).expect("a step is announced") {
                FromEngine::Progress(progress) if progress.step_seconds > 1.0 => {
                    assert_eq!(progress.steps, 0, "it is announced before it runs");
                    return progress.step_seconds;
                }
                FromEngine::Events(events) => {
                    for (request, event) in events {
                        outcomes.entry(request.0).or_default().take(event);
                    }
                }
                _ => {}
            }
        }
    }

    /// The last progress snapshot, taken when the engine is idle.
    fn settle(self) -> Progress {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let frame = self.frames.recv_deadline(deadline).expect("the engine falls idle");
            if let FromEngine::Progress(progress) = frame
                && progress.running + progress.waiting == 0
                && self.frames.is_empty()
            {
                self.command(Command::Shutdown);
                self.steps.join().expect("the step loop does not panic");
                return progress;
            }
        }
    }
}

/// The events received for one request.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    choices: BTreeMap<u32, Choice>,
    accepted: bool,
    started: bool,
    prompt: Option<(String, usize)>,
    ended: bool,
    failed: Option<EngineErrorKind>,
}

#[derive(Debug, Default, PartialEq)]
struct Choice {
    text: String,
    logprobs: Vec<(Token, String)>,
    finish: Option<(FinishReason, u32)>,
}

impl Outcome {
    fn take(&mut self, event: Event) {
        assert!(!self.ended, "nothing comes after the end: {event:?}");
        let first = !self.accepted;
        match event {
            Event::Accepted { .. } => {
                assert!(first);
                self.accepted = true;
            }
            Event::Started { .. } => {
                assert!(self.accepted && !self.started);
                self.started = true;
            }
            Event::Prompt { text, logprobs } => {
                assert!(self.started && self.prompt.is_none() && self.choices.is_empty());
                self.prompt = Some((text, logprobs.len()));
            }
            Event::Delta { choice, text, logprobs, .. } => {
                assert!(self.started);
                let choice = self.choices.entry(choice).or_default();
                assert!(choice.finish.is_none());
                choice.text.push_str(&text);
                let entries = logprobs.into_iter();
                choice
                    .logprobs
                    .extend(entries.map(|entry| (entry.token, format!("{:?}", entry.logprob))));
            }
            Event::Finish { choice, reason, completion_tokens } => {
                let choice = self.choices.entry(choice).or_default();
                assert!(choice.finish.replace((reason, completion_tokens)).is_none());
            }
            Event::Done { .. } => {
                assert!(self.choices.values().all(|choice| choice.finish.is_some()));
                self.ended = true;
            }
            Event::Failed(error) => {
                self.failed = Some(error.kind);
                self.ended = true;
            }
        }
    }
}

fn request(id: u64, prompt: Vec<Token>) -> Generate {
    Generate {
        stop: StopParams { max_tokens: Some(8), ..Default::default() },
        ..Generate::plain(id, Prompt::Tokens(prompt))
    }
}

/// The expected greedy output, computed without an engine.
fn greedy(prompt: &[Token], adapter: Option<AdapterId>, stop: &StopParams) -> (String, usize) {
    let mut tokens = prompt.to_vec();
    let mut text = String::new();
    for count in 1..=stop.max_tokens.unwrap() as usize {
        let token = Mock::next_greedy(&tokens, adapter);
        tokens.push(token);
        if token == EOS && !stop.ignore_eos {
            return (text, count);
        }
        text.extend(u8::try_from(token).ok().map(char::from));
        if let Some(at) = stop.strings.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            text.truncate(at);
            return (text, count);
        }
    }
    (text, tokens.len() - prompt.len())
}

/// Prompts of two families that share prefixes; every request fits into seven pages.
fn any_request() -> impl Strategy<Value = Generate> {
    let own = prop::collection::vec(97..100 as Token, 1..40);
    let prompt = (0..2 as Token, 0..90usize, own, any::<bool>());
    let temperature = prop::sample::select(vec![0.0, 0.0, 0.1, 1.0f32]);
    let shape = (1..4u32, 0..70u32, 0..4u64, temperature, prop::bool::weighted(0.3));
    let extras = (0..4u32, prop::bool::weighted(0.2), 0..=ADAPTERS, 0..3u64, 0..2i32);
    let stops = prop::collection::vec("[a-z]{1,2}", 0..3);
    (prompt, shape, extras, stops).prop_map(
        |((family, shared, own, forgets), shape, extras, strings)| {
            let (logprobs, echo, adapter, key, priority) = extras;
            let (choices, max_tokens, seed, temperature, ignore_eos) = shape;
            let family = std::iter::repeat_n(110 + family, shared);
            let prompt = forgets.then_some(FORGETS).into_iter().chain(family).chain(own).collect();
            let mut sampling = SamplingParams { seed, temperature, ..Default::default() };
            match (seed, logprobs) {
                (3, _) => sampling.repetition_penalty = 1.3,
                (1, 0) => sampling.dry_multiplier = 0.8,
                (1, 1) => sampling.frequency_penalty = 0.2,
                _ => {}
            }
            Generate {
                choices,
                sampling,
                stop: StopParams {
                    max_tokens: Some(max_tokens),
                    strings,
                    ignore_eos,
                    ..Default::default()
                },
                logprobs: logprobs.checked_sub(1),
                echo,
                adapter: (adapter > 0).then_some(AdapterId(adapter)),
                tenant: key / 2,
                fair_key: key,
                priority,
                grammar: (seed == 2 && key == 0).then(|| GrammarSpec {
                    grammar: Grammar::Regex("[a-f]{3,30}".into()),
                    trigger: None,
                }),
                ..request(0, prompt)
            }
        },
    )
}

/// The action applied to one request while it runs.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Peace,
    Cancel,
    Pause,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![6 => Just(Fate::Peace), 1 => Just(Fate::Cancel), 1 => Just(Fate::Pause)]
}

/// Fixed seed: a run that passes once passes again.
fn config(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(1);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(config(150))]
    #[test]
    fn everyone_gets_what_they_get_alone(
        kv_pages in 7..14u32,
        max_sequences in 3..8u32,
        more_rows in 1..120u32,
        requests in prop::collection::vec((any_request(), fate(), 0..60u64), 1..24),
    ) {
        let spec = LoadSpec {
            mock_step_us: u64::from(more_rows % 2),
            speculate: [Speculate::Always, Speculate::Auto, Speculate::Off][more_rows as usize % 3],
            draft: (kv_pages % 2 == 0).then(|| "mock".into()),
            ..load_spec(kv_pages, max_sequences, max_sequences + more_rows)
        };
        let mut alone = BTreeMap::new();
        let solitary = Engine::start(load_spec(64, max_sequences, 999));
        for (id, (request, ..)) in requests.iter().enumerate() {
            solitary.ask(Generate { id: RequestId(id as u64), ..request.clone() });
            solitary.listen(&mut alone, &[id as u64]);
        }
        prop_assert_eq!(solitary.settle().preemptions, 0);

        let engine = Engine::start(spec);
        for (id, (request, fate, wait)) in requests.iter().enumerate() {
            let id = RequestId(id as u64);
            engine.ask(Generate { id, ..request.clone() });
            if *wait > 30 {
                std::thread::sleep(Duration::from_micros(*wait));
            }
            match fate {
                Fate::Peace => {}
                Fate::Cancel => engine.command(Command::Cancel(id)),
                Fate::Pause => engine.command(Command::Pause(id, true)),
            }
        }
        let ids = |wanted: fn(&Fate) -> bool| -> Vec<u64> {
            let fated = requests.iter().zip(0..).filter(|((_, fate, _), _)| wanted(fate));
            fated.map(|(_, id)| id).collect()
        };
        // Slow readers do not delay other requests.
        let mut together = BTreeMap::new();
        engine.listen(&mut together, &ids(|fate| matches!(fate, Fate::Peace)));
        for id in ids(|fate| matches!(fate, Fate::Pause)) {
            engine.command(Command::Pause(RequestId(id), false));
        }
        engine.listen(&mut together, &ids(|fate| !matches!(fate, Fate::Cancel)));
        for (id, outcome) in &together {
            if !matches!(requests[*id as usize].1, Fate::Cancel) {
                prop_assert_eq!(outcome, &alone[id], "request {}", id);
            }
        }
        let last = engine.settle();
        prop_assert_eq!(last.kv_pages_used, 0);
        prop_assert_eq!(last.kv_pages_total, kv_pages);
    }
}

proptest! {
    #![proptest_config(config(100))]
    #[test]
    fn greedy_output_is_the_models(
        kv_pages in 7..12u32,
        requests in prop::collection::vec(any_request(), 1..20),
    ) {
        let engine = Engine::start(load_spec(kv_pages, 4, 64));
        for (id, request) in requests.iter().enumerate() {
            engine.ask(Generate {
                id: RequestId(id as u64),
                sampling: SamplingParams { temperature: 0.0, ..Default::default() },
                grammar: None,
                ..request.clone()
            });
        }
        let outcomes = engine.outcomes(requests.len());
        for (id, request) in requests.iter().enumerate() {
            let Prompt::Tokens(prompt) = &request.prompt else { unreachable!() };
            let (text, tokens) = greedy(prompt, request.adapter, &request.stop);
            let outcome = &outcomes[&(id as u64)];
            prop_assert_eq!(outcome.choices.len(), request.choices as usize);
            for choice in outcome.choices.values() {
                prop_assert_eq!(&choice.text, &text);
                prop_assert_eq!(choice.finish.as_ref().unwrap().1 as usize, tokens);
            }
            let scored = request.echo.then(|| request.logprobs.map_or(0, |_| prompt.len()));
            prop_assert_eq!(outcome.prompt.as_ref().map(|(_, scores)| *scores), scored);
        }
        prop_assert_eq!(engine.settle().kv_pages_used, 0);
    }
}

/// A text that repeats itself takes fewer steps, and its output is unchanged.
#[test]
fn drafts_that_stand_save_steps() {
    let mut steps = Vec::new();
    let mut texts = Vec::new();
    for speculate in [Speculate::Off, Speculate::Always, Speculate::Auto] {
        // Long steps, so that interference from other processes does not look like the cost of a
        // row.
        let spec = LoadSpec { speculate, mock_step_us: 2000, ..load_spec(64, 4, 64) };
        let engine = Engine::start(spec);
        for id in 0..12 {
            let stop = StopParams { max_tokens: Some(100), ignore_eos: true, ..Default::default() };
            let max_drafted = (id == 0).then_some(0);
            let prompt = vec![FORGETS, 97 + id as Token];
            engine.ask(Generate { stop, max_drafted, ..request(id, prompt) });
        }
        texts.push(engine.outcomes(12));
        let progress = engine.settle();
        let (drafts, drafted) = (progress.drafts, progress.drafted_tokens);
        assert!(progress.accepted_tokens <= drafted && drafts <= drafted);
        assert_eq!(drafts == 0, speculate == Speculate::Off);
        steps.push(progress.steps);
    }
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[0], texts[2]);
    // `Auto` drafts while measured times say that it pays, which other load may hide.
    assert!(steps[1] * 4 < steps[0] * 3 && steps[2] <= steps[0], "{steps:?}");
}

/// A draft model that equals the model predicts every token: greedy, sampled, penalized, for
/// several choices. With an adapter the predictions differ, and the output is still unchanged.
#[test]
fn what_a_draft_model_foresees_saves_steps() {
    let mut texts = Vec::new();
    let mut steps = Vec::new();
    for (draft, adapter) in [(false, None), (true, None), (false, Some(1)), (true, Some(1))] {
        let spec = LoadSpec {
            speculate: if draft { Speculate::Always } else { Speculate::Off },
            draft: draft.then(|| "mock".into()),
            ..load_spec(64, 8, 128)
        };
        let engine = Engine::start(spec);
        for id in 0..12 {
            let temperature = [0.0, 1.0, 0.7][id as usize % 3];
            let mut sampling = SamplingParams { seed: id, temperature, ..Default::default() };
            match id {
                6 | 7 => sampling.dry_multiplier = 0.8,
                8 | 9 => sampling.frequency_penalty = 0.3,
                10 => (sampling.top_p, sampling.xtc_probability) = (0.9, 0.3),
                _ => {}
            }
            let stop = StopParams { max_tokens: Some(60), ignore_eos: true, ..Default::default() };
            let prompt = (0..40).map(|at| 97 + (at * at + id as Token) % 26).collect();
            let choices = 1 + (id % 2) as u32;
            let adapter = adapter.map(AdapterId);
            engine.ask(Generate { sampling, stop, choices, adapter, ..request(id, prompt) });
        }
        texts.push(engine.outcomes(12));
        let progress = engine.settle();
        let (drafted, stood) = (progress.draft_model_tokens, progress.draft_model_accepted);
        match (draft, adapter) {
            (false, _) => assert_eq!(drafted, 0),
            (true, None) => assert!(drafted > 600 && stood == drafted, "{stood} of {drafted}"),
            (true, Some(_)) => assert!(drafted > 100 && stood * 2 < drafted, "{stood}, {drafted}"),
        }
        steps.push(progress.steps);
    }
    assert!(texts[0] == texts[1] && texts[2] == texts[3]);
    assert!(steps[1] * 3 < steps[0], "{steps:?}");
}

#[test]
fn a_prompt_past_the_context_is_refused() {
    let engine = Engine::start(load_spec(4, 4, 64));
    for (id, max_tokens) in [(0, 0), (1, 1)] {
        let stop = StopParams { max_tokens: Some(max_tokens), ..Default::default() };
        engine.ask(Generate { stop, ..request(id, vec![97; 129]) });
    }
    engine.ask(request(2, vec![97; 120]));
    let outcomes = engine.outcomes(3);
    assert_eq!(outcomes[&0].failed, Some(EngineErrorKind::ContextLength));
    assert_eq!(outcomes[&1].failed, Some(EngineErrorKind::ContextLength));
    assert_eq!(outcomes[&2].failed, None);
    engine.settle();
}

/// Emitted text has its logprobs, even if a stop string holds text back.
#[test]
fn logprobs_go_with_their_text() {
    let engine = Engine::start(load_spec(16, 4, 64));
    for id in 0..200 {
        let prompt = vec![97 + id as Token % 26, 97 + id as Token / 26];
        let stop = StopParams { max_tokens: Some(40), ..Default::default() };
        let (text, _) = greedy(&prompt, None, &stop);
        // A stop string that is preceded by its own first character: "aab" in "aaab".
        let doubled = text.as_bytes().windows(2).position(|pair| pair[0] == pair[1]);
        let strings = doubled.map(|at| text[at..(at + 4).min(text.len())].to_owned());
        let strings = strings.into_iter().chain(["zq".to_owned()]).collect();
        let stop = StopParams { strings, ..stop };
        engine.ask(Generate { stop, logprobs: Some(0), ..request(id, prompt) });
    }
    for outcome in engine.outcomes(200).into_values() {
        let choice = &outcome.choices[&0];
        let text = choice.logprobs.iter().map(|&(token, _)| char::from(token as u8));
        assert_eq!(text.collect::<String>(), choice.text);
    }
    engine.settle();
}

#[test]
fn a_long_input_is_pooled_between_other_steps() {
    let spec = LoadSpec { mock_step_us: 500, ..load_spec(700, 4, 32) };
    let engine = Engine::start(spec);
    let inputs = vec![vec![5; 20_000]];
    engine.command(Command::Pool { call: 77, inputs, scored_by: None });
    let stop = StopParams { max_tokens: Some(40), ignore_eos: true, ..StopParams::default() };
    engine.ask(Generate { stop, ..request(0, vec![FORGETS, 1, 2]) });
    let deadline = Instant::now() + PATIENCE;
    let mut outcome = Outcome::default();
    loop {
        match engine.frames.recv_deadline(deadline).expect("the input is pooled") {
            FromEngine::Events(events) => events.into_iter().for_each(|(_, e)| outcome.take(e)),
            FromEngine::Reply { call: 77, result } => {
                let Ok(Reply::Embeddings { vectors, prompt_tokens: 20_000 }) = result else {
                    panic!("{result:?}");
                };
                // All 20,000 tokens contributed to one element.
                assert_eq!(vectors, [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]);
                break;
            }
            _ => {}
        }
    }
    assert!(outcome.ended, "forty steps are done before the 625 chunks of the input");
    engine.settle();
}

#[test]
fn a_step_ends_when_its_clients_are_gone() {
    let spec = LoadSpec { mock_step_us: 15_000_000, ..load_spec(64, 4, 512) };
    let engine = Engine::start(spec);
    engine.ask(request(0, vec![1; 300]));
    let mut outcomes = BTreeMap::new();
    engine.announced(&mut outcomes);
    assert!(outcomes[&0].accepted && outcomes[&0].started, "a client hears of it before the step");
    engine.command(Command::Cancel(RequestId(0)));
    // No step completed: the step of 15 s was abandoned.
    assert_eq!(engine.settle().steps, 0);
}

#[test]
fn a_step_goes_on_for_the_clients_that_stay() {
    let spec = LoadSpec { mock_step_us: 400_000, ..load_spec(64, 4, 512) };
    let engine = Engine::start(spec);
    let stop = StopParams { max_tokens: Some(1), ..StopParams::default() };
    engine.ask(Generate { stop: stop.clone(), ..request(0, vec![1; 20]) });
    engine.ask(Generate { stop, ..request(1, vec![2; 300]) });
    let mut outcomes = BTreeMap::new();
    engine.announced(&mut outcomes);
    engine.command(Command::Cancel(RequestId(0)));
    engine.listen(&mut outcomes, &[1]);
    assert_eq!(outcomes[&1].failed, None);
    engine.settle();
}

#[test]
fn a_slow_step_is_announced_to_the_watchdog() {
    let spec = LoadSpec { mock_step_us: 1_200_000, ..load_spec(64, 4, 512) };
    let engine = Engine::start(spec);
    let stop = StopParams { max_tokens: Some(1), ..StopParams::default() };
    engine.ask(Generate { stop, ..request(0, vec![1; 30]) });
    let announced = engine.announced(&mut BTreeMap::new());
    // Thirty rows, each at most as slow as the one-row step at load.
    assert!((36.0 - announced).abs() < 0.1, "{announced}");
    engine.settle();
}

#[test]
fn a_choice_can_be_ended_from_outside() {
    let spec = LoadSpec { mock_step_us: 1_000, ..load_spec(64, 4, 64) };
    let engine = Engine::start(spec);
    let stop = StopParams { max_tokens: Some(1500), ignore_eos: true, ..StopParams::default() };
    engine.ask(Generate { stop, choices: 2, ..request(0, vec![1, 2, 3]) });
    let deadline = Instant::now() + PATIENCE;
    let mut outcome = Outcome::default();
    while outcome.choices.len() < 2 {
        let frame = engine.frames.recv_deadline(deadline).expect("both choices begin");
        if let FromEngine::Events(events) = frame {
            events.into_iter().for_each(|(_, event)| outcome.take(event));
        }
    }
    for choice in [1, 0] {
        engine.command(Command::Finish(SeqKey { request: RequestId(0), choice }));
    }
    // Finishing an unknown or already finished sequence has no effect.
    engine.command(Command::Finish(SeqKey { request: RequestId(0), choice: 1 }));
    engine.command(Command::Finish(SeqKey { request: RequestId(9), choice: 0 }));
    let mut outcomes = BTreeMap::from([(0, outcome)]);
    engine.listen(&mut outcomes, &[0]);
    for choice in outcomes[&0].choices.values() {
        let (reason, tokens) = choice.finish.as_ref().unwrap();
        assert_eq!(*reason, FinishReason::Stop);
        assert!(*tokens < 1500);
    }
    engine.settle();
}
