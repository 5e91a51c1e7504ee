//! The pipeline on a tiny model: a property that the judge prefers is learned, and a run that is
//! interrupted anywhere ends with the same weights. The completions come from the model in training
//! itself, and the judge looks at the first letter.

use super::super::preference_tests::encoder;
use super::super::{Event, Job, Making, Outcome, Policy, Recipe, TrainError};
use crate::gguf::Gguf;
use crate::gguf::fixture::TinyDecoder;
use crate::grade::{Answer, Ask, Failed, Question};
use crate::job::rollout::{CallError, Rollout, RolloutRequest};
use crate::job::spec::{Constitutional, Lora, Spec, Task};
use crate::job::{Control, Metrics, StepMetrics};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{PreparedPrompts, prepare_prompts};
use crate::train::model::{Model, Training};
use crate::train::rollout::RolloutClient;
use candle_core::Device;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Tokens of a prompt that the model reads: those of a short conversation.
const READ: usize = 60;

/// The letter whose token in the test's tokenizer is this one.
fn letter(token: u32) -> char {
    char::from(64 + (token as u8 + 59 - 5) % 59)
}

/// The property that the judge prefers; the model has it in about a fifth of its first answers.
fn is_good(answer: &str) -> bool {
    answer.starts_with(|first| ('a'..='l').contains(&first))
}

/// Samples from the model in training, and judges.
struct InProcess {
    model: Rc<Model>,
    judge: Judge,
    /// Number of calls after which `stop` is set.
    calls_left: Rc<Cell<u64>>,
    control: Rc<Control>,
}

#[derive(Clone, Copy, PartialEq)]
enum Judge {
    /// It prefers the property.
    Works,
    /// It prefers the answer that it reads first.
    Biased,
    /// It is not available.
    Down,
}

impl InProcess {
    fn count_call(&self) {
        self.calls_left.set(self.calls_left.get().saturating_sub(1));
        if self.calls_left.get() == 0 {
            self.control.stop();
        }
    }

    fn sample(&self, prompt: &[u32], key: (u64, u32), what: &RolloutRequest) -> Rollout {
        let mut rng = StdRng::seed_from_u64(key.0 ^ (u64::from(key.1) << 48));
        let mut completion = Rollout { ended: true, ..Rollout::default() };
        let prompt = &prompt[prompt.len().saturating_sub(READ)..];
        for _ in 0..2 {
            let logits = self.model.logits(&[prompt, &completion.tokens].concat()).unwrap();
            // The last token of the vocabulary has no letter.
            let scaled = logits[..59].iter().map(|x| f64::from(*x) / f64::from(what.temperature));
            let weights: Vec<f64> = scaled.map(f64::exp).collect();
            let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
            let token = weights.iter().position(|weight| {
                left -= weight;
                left < 0.0
            });
            let token = token.unwrap_or(0) as u32;
            completion.tokens.push(token);
            completion.log_probs.push(0.0);
            completion.text.push(letter(token));
        }
        completion
    }

    fn judged(&self, text: &str) -> f64 {
        if text.contains("Reply with Yes or No only") {
            return 0.9;
        }
        let (_, rest) = text.split_once("Answer A: ").unwrap();
        let (a, rest) = rest.split_once("\n\nAnswer B: ").unwrap();
        let (b, _) = rest.split_once("\n\n").unwrap();
        match (self.judge, is_good(a), is_good(b)) {
            (Judge::Biased, ..) | (_, true, false) => 0.9,
            (_, false, true) => 0.1,
            _ => 0.5,
        }
    }
}

impl RolloutClient for InProcess {
    fn load_policy(&mut self, _: &Path) -> Result<(), CallError> {
        Ok(())
    }

    fn start(&mut self, _: &RolloutRequest) -> Result<(), CallError> {
        Ok(())
    }

    fn collect(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, CallError> {
        self.count_call();
        let group = |(prompt, seed): (&Vec<u32>, &u64)| {
            (0..what.answers).map(|choice| self.sample(prompt, (*seed, choice), what)).collect()
        };
        Ok(what.prompts.iter().zip(&what.seeds).map(group).collect())
    }

    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, CallError> {
        self.count_call();
        let answer = |question: &Question| {
            let Ask::Choice { messages, reasoning, .. } = &question.ask else {
                panic!("{question:?}")
            };
            let text = &messages[0].content;
            assert_eq!(reasoning.is_none(), text.contains(" only."), "{text}");
            if self.judge == Judge::Down {
                return Err(Failed {
                    refused: false,
                    permanent: false,
                    message: "it is not loaded".into(),
                });
            }
            let number = Some(self.judged(text));
            let reasoning = reasoning.as_ref().map(|asked| {
                assert_eq!(asked.then, "Reply with A or B only.");
                format!("at most {} tokens", asked.max_tokens)
            });
            Ok(Answer { number, prompt_tokens: 1, completion_tokens: 1, reasoning })
        };
        Ok(questions.iter().map(answer).collect())
    }
}

fn spec(block: &str) -> Spec {
    let text = format!(
        r#"{{"kind": "constitutional", "model": "m", "data": {{"train": "f"}},
            "constitutional": {{"max_tokens": 8, "preference_epochs": 6,
                "preference_learning_rate": 1e-2, "constitution": {{"principles": [
                    {{"name": "low", "critique": "c", "revision": "r", "comparison": "q"}},
                    {{"name": "other", "critique": "c", "revision": "r", "comparison": "q"}}]}},
                "graders": {{"low": {{"type": "regex", "name": "g", "pattern": "^[a-l]"}}}}{block}}},
            "train": {{"batch_size": 8, "max_length": 96, "eval_every": 1000, "epochs": 6,
                "checkpoint_every": 3, "learning_rate": 1e-2}}}}"#
    );
    serde_json::from_str(&text).unwrap()
}

/// Every fourth prompt is helpful.
fn prompts(folder: &Path, name: &str, from: usize, count: usize) -> PreparedPrompts {
    let line = |i: usize| {
        let helpful = i.is_multiple_of(4);
        let messages = [serde_json::json!({"role": "user", "content": format!("{i}")})];
        serde_json::json!({"messages": messages, "helpful": helpful}).to_string()
    };
    let lines: Vec<_> = (from..from + count).map(line).collect();
    let source = folder.join(name);
    std::fs::write(&source, lines.join("\n")).unwrap();
    prepare_prompts(&source, &encoder(), 88, &folder.join(format!("{name}.cache"))).unwrap().0
}

#[derive(Debug)]
struct Ran {
    steps: Vec<StepMetrics>,
    notes: Vec<String>,
    metrics: Metrics,
    params: Vec<Vec<f32>>,
    /// Number of processes.
    processes: usize,
}

/// Runs the job in a folder, stopped after `calls` calls in each process.
fn run(folder: &Path, spec: &Spec, judge: Judge, calls: u64) -> Result<Ran, TrainError> {
    let (path, human) = (folder.join("model.gguf"), folder.join("human.jsonl"));
    TinyDecoder::new("llama").write(&path).unwrap();
    let Task::Constitutional(block) = &spec.task else { panic!("{spec:?}") };
    let settings = spec.resolve().unwrap();
    let adapter = spec.adapter.clone().unwrap();
    let lora = Lora { rank: 4, ..adapter.lora(5).unwrap() };
    let (train, held_out) = (prompts(folder, "train", 0, 48), prompts(folder, "held", 100, 48));
    // People prefer the property in two of three pairs.
    let pair = |i: usize| {
        let (good, bad) = (format!("a{i}"), format!("z{i}"));
        let [chosen, rejected] = if i.is_multiple_of(3) { [bad, good] } else { [good, bad] };
        serde_json::json!({"prompt": format!("{i}"), "chosen": chosen, "rejected": rejected})
            .to_string()
    };
    let pairs: Vec<_> = (0..60).map(pair).collect();
    std::fs::write(&human, pairs.join("\n")).unwrap();
    let mut ran = Ran {
        steps: Vec::new(),
        notes: Vec::new(),
        metrics: Metrics::new(),
        params: Vec::new(),
        processes: 0,
    };
    let tokenizer = encoder().tokenizer;
    loop {
        ran.processes += 1;
        assert!(ran.processes < 100, "the run does not end");
        let file = Arc::new(Gguf::open(&path).unwrap());
        let model = Model::load(file, &Training::Lora(lora.clone()), 96, &Device::Cpu).unwrap();
        let (model, control) = (Rc::new(model), Rc::new(Control::default()));
        let calls_left = Rc::new(Cell::new(calls));
        let client = RefCell::new(InProcess {
            model: model.clone(),
            judge,
            calls_left: calls_left.clone(),
            control: control.clone(),
        });
        let policy =
            Policy { client: &client, export: &|_| Ok(()), adapter: Path::new("in memory") };
        let checkpoints = Checkpoints::new(&folder.join("checkpoints"), 2).unwrap();
        let job = Job {
            model: &model,
            settings: &settings,
            train: &train,
            validation: Some(&held_out),
            checkpoints: &checkpoints,
            tokenizer: tokenizer.as_ref(),
            seed: 3,
            shuffle: Some(3),
            reference: &folder.join("reference"),
            teacher: None,
            policy: Some(policy),
            making: Making {
                encoder: &encoder(),
                model_name: "m",
                context: 4096,
                folder: &folder.join("made"),
                cache: folder,
                human: Some(&human),
            },
        };
        let outcome = Constitutional::run(block, &job, &control, &mut |event| match event {
            Event::Step(step) => {
                // Training is interrupted too.
                calls_left.set(calls_left.get().saturating_sub(1));
                if calls_left.get() == 0 {
                    control.stop();
                }
                ran.steps.push(step);
            }
            Event::Note { text } => ran.notes.push(text),
            Event::Evaluated(found) => ran.metrics = found.metrics,
            _ => {}
        });
        if let Outcome::Done { .. } = outcome? {
            let values = |param: &crate::train::optim::Param| {
                param.var.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            ran.params = model.params().iter().map(values).collect();
            return Ok(ran);
        }
    }
}

#[test]
fn a_principle_is_learned() {
    // The share of answers with the property is 0.22 at first.
    for (stages, pairs, least) in [
        (r#"["revise", "compare"]"#, "sampled", 0.55),
        (r#"["revise", "compare"]"#, "revised", 0.4),
        (r#"["revise"]"#, "sampled", 0.3),
        (r#"["compare"]"#, "sampled", 0.4),
        (r#"["revise", "compare"], "preference_method": "rank""#, "sampled", 0.55),
        (r#"["compare"], "preference_method": "rank""#, "sampled", 0.5),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec(&format!(r#", "stages": {stages}, "pairs": "{pairs}""#));
        let ran = run(folder.path(), &spec, Judge::Works, u64::MAX).unwrap();
        let of = |name: &str| ran.metrics[name];
        assert!(of("low_before_principled") < 0.25, "{stages}: {:?}", ran.metrics);
        assert!(of("low_after_principled") > least, "{stages}, {pairs}: {:?}", ran.metrics);
        assert!(of("win_rate_principled") > 0.55, "{stages}, {pairs}: {:?}", ran.metrics);
        assert!((of("judge_accuracy") - 2.0 / 3.0).abs() < 1e-9);
        assert!(of("kl_all") > 0.0, "{:?}", ran.metrics);
        // Steps are counted through both stages.
        let numbers: Vec<u64> = ran.steps.iter().map(|step| step.step).collect();
        assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
        let page = std::fs::read_to_string(folder.path().join("made/constitutional.html")).unwrap();
        assert!(page.contains("67%") && page.contains("<circle"), "{page}");
        let report = std::fs::read(folder.path().join("made/constitutional.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        let group = &report["groups"]["principled"];
        assert_eq!(group["win_rate"]["value"], of("win_rate_principled"));
        assert_eq!(report["groups"]["helpful"]["win_rate"]["count"], 12);
    }
}

#[test]
fn a_judge_that_reasons_gives_careful_labels() {
    let folder = tempfile::tempdir().unwrap();
    let block =
        r#", "stages": ["compare"], "chain_of_thought": true, "chain_of_thought_tokens": 9"#;
    let ran = run(folder.path(), &spec(block), Judge::Works, u64::MAX).unwrap();
    assert!(ran.metrics["low_after_principled"] > ran.metrics["low_before_principled"]);
    let rows = |name: &str| {
        let text = std::fs::read_to_string(folder.path().join("made").join(name)).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
        rows.collect::<Vec<serde_json::Value>>()
    };
    // The probabilities are kept as the judge gave them, with its reasoning.
    let judged = rows("comparisons.jsonl");
    let judged: Vec<_> = judged.iter().filter_map(|row| row["judgements"].get(0)).collect();
    assert!(judged.iter().any(|found| found["shown_first"] == 0.9), "{judged:?}");
    let said = "at most 9 tokens";
    assert!(judged.iter().all(|found| found["reasoning"] == serde_json::json!([said, said])));
    let labels: Vec<_> = rows("preferences.jsonl").iter().map(|row| row["label"].clone()).collect();
    assert!(!labels.is_empty() && labels.iter().all(|label| *label == 0.6), "{labels:?}");
}

#[test]
fn an_interrupted_run_ends_with_the_same_weights() {
    interrupted("", &["revisions", "sft", "comparisons", "preferences", "evaluation", "judge"]);
    let rank = r#", "preference_method": "rank", "num_generations": 3"#;
    interrupted(rank, &["revisions", "sft", "evaluation", "judge"]);
}

/// Compares a run that is stopped again and again with a whole one, and the files that they make.
fn interrupted(block: &str, files: &[&str]) {
    let spec = spec(block);
    let whole = tempfile::tempdir().unwrap();
    let right = run(whole.path(), &spec, Judge::Works, u64::MAX).unwrap();
    for calls in [3, 7] {
        let folder = tempfile::tempdir().unwrap();
        let ran = run(folder.path(), &spec, Judge::Works, calls).unwrap();
        assert!(ran.processes > 5, "{}", ran.processes);
        assert_eq!(ran.params, right.params, "stopped after {calls} calls");
        assert_eq!(ran.metrics, right.metrics);
        for name in files {
            let of = |folder: &Path| {
                std::fs::read_to_string(folder.join(format!("made/{name}.jsonl"))).unwrap()
            };
            assert_eq!(of(folder.path()), of(whole.path()), "{name}");
        }
    }
}

#[test]
fn a_judge_that_prefers_a_place_labels_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let ran = run(folder.path(), &spec(""), Judge::Biased, u64::MAX).unwrap();
    assert_eq!(ran.metrics["judge_accuracy"], 0.5);
    assert!(ran.notes.iter().any(|note| note.contains("no better than chance")), "{:?}", ran.notes);
    assert!(ran.notes.iter().any(|note| note.contains("No pair was kept")), "{:?}", ran.notes);
    // All comparisons are ties.
    assert_eq!(ran.metrics["win_rate_all"], 0.5);
    let page = std::fs::read_to_string(folder.path().join("made/constitutional.html")).unwrap();
    assert!(page.contains("no better than chance"));
    let rows = std::fs::read_to_string(folder.path().join("made/comparisons.jsonl")).unwrap();
    assert!(rows.lines().all(|row| !row.contains(r#""dropped":null"#)));
}

#[test]
fn a_job_waits_for_its_judge() {
    let folder = tempfile::tempdir().unwrap();
    let error = run(folder.path(), &spec(""), Judge::Down, u64::MAX).unwrap_err();
    assert_eq!(error.waits_for(), Some("grader_unavailable"), "{error}");
    run(folder.path(), &spec(""), Judge::Works, u64::MAX).unwrap();
}
