//! Tests of policies: a reward that is sampled, learned, and resumed. The completions come from the
//! model in training itself, in place of an engine.

use super::preference_tests::encoder;
use super::{Event, Job, Making, Outcome, Policy, Recipe, TrainError};
use crate::gguf::Gguf;
use crate::gguf::fixture::TinyDecoder;
use crate::grade::{Answer, Failed, Question};
use crate::job::rollout::{CallCause, CallError, Rollout, RolloutRequest};
use crate::job::spec::{Distill, Grpo, Lora, Ppo, Resolved, Spec, Task};
use crate::job::{Control, StepMetrics, Validation};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::native::NativeTokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Dataset, Encoder, Prepared, PreparedPrompts, prepare, prepare_prompts};
use crate::train::model::{Model, Training};
use crate::train::optim::Param;
use crate::train::rollout::RolloutClient;
use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Samples from the model in training. A token's text is one of four letters.
struct InProcess {
    model: Rc<Model>,
    judge: Rc<Cell<Judge>>,
    /// The weights of the adapter that was loaded last.
    loaded: Vec<Tensor>,
    /// Completions that were not collected yet.
    started: Option<Vec<Vec<Rollout>>>,
}

/// Writes the weights of a model to a file, which stands for its adapter.
fn export(model: &Model, path: &Path) -> Result<(), TrainError> {
    let values = |param: &Param| param.var.flatten_all()?.to_vec1::<f32>();
    let weights: Vec<_> = model.params().iter().map(values).collect::<Result<_, _>>()?;
    std::fs::write(path, rmp_serde::to_vec(&weights).unwrap())?;
    Ok(())
}

fn set(model: &Model, weights: &[Tensor]) {
    for (param, weights) in model.params().iter().zip(weights) {
        param.var.set(weights).unwrap();
    }
}

/// What the grader's model does.
#[derive(Clone, Copy, PartialEq)]
enum Judge {
    /// It scores every answer.
    Works,
    /// It is not available.
    Down,
    /// It fails for every fifth answer.
    Sometimes,
    /// The server has ended, and the judge with it.
    Gone,
    /// It works up to this step, and is then not available, or gone.
    DownAfter(u64),
    GoneAfter(u64),
}

impl InProcess {
    fn sample(&self, prompt: &[u32], key: (u64, u32), what: &RolloutRequest) -> Rollout {
        let mut rng = StdRng::seed_from_u64(key.0 ^ (u64::from(key.1) << 48));
        let mut completion = Rollout { ended: true, ..Rollout::default() };
        for _ in 0..what.max_tokens {
            let logits = self.model.logits(&[prompt, &completion.tokens].concat()).unwrap();
            let scaled = logits.iter().map(|x| f64::from(*x) / f64::from(what.temperature));
            let weights: Vec<f64> = scaled.map(f64::exp).collect();
            let sum: f64 = weights.iter().sum();
            let mut left = rng.random::<f64>() * sum;
            let token = weights.iter().position(|weight| {
                left -= weight;
                left < 0.0
            });
            let token = token.unwrap_or(weights.len() - 1);
            completion.tokens.push(token as u32);
            completion.log_probs.push((weights[token] / sum).ln() as f32);
            completion.text.push(['a', 'b', 'c', 'd'][token % 4]);
        }
        completion
    }
}

impl RolloutClient for InProcess {
    fn load_policy(&mut self, adapter: &Path) -> Result<(), CallError> {
        let saved: Vec<Vec<f32>> = rmp_serde::from_slice(&std::fs::read(adapter).unwrap()).unwrap();
        let tensor = |(param, values): (&Param, Vec<f32>)| {
            Tensor::from_vec(values, param.var.shape(), &Device::Cpu).unwrap()
        };
        self.loaded = self.model.params().iter().zip(saved).map(tensor).collect();
        Ok(())
    }

    /// Samples at once, with the weights that were loaded.
    fn start(&mut self, what: &RolloutRequest) -> Result<(), CallError> {
        assert!(self.started.is_none(), "the completions before were not collected");
        if self.judge.get() == Judge::Gone {
            let message = "the connection was lost".into();
            return Err(CallError { cause: CallCause::Disconnected, message });
        }
        let group = |(prompt, seed): (&Vec<u32>, &u64)| {
            (0..what.answers).map(|choice| self.sample(prompt, (*seed, choice), what)).collect()
        };
        let params = self.model.params().iter();
        let now: Vec<Tensor> = params.map(|param| param.var.as_tensor().copy().unwrap()).collect();
        set(&self.model, &self.loaded);
        let sampled = what.prompts.iter().zip(&what.seeds).map(group).collect();
        set(&self.model, &now);
        self.started = Some(sampled);
        Ok(())
    }

    fn collect(&mut self, _: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, CallError> {
        Ok(self.started.take().expect("completions were started"))
    }

    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, CallError> {
        assert!(self.started.is_none(), "the completions before were not collected");
        let down =
            Failed { refused: false, permanent: false, message: "the judge is not loaded".into() };
        let answer = |(number, _)| match self.judge.get() {
            Judge::Down => Err(down.clone()),
            Judge::Sometimes if number % 5 == 4 => Err(down.clone()),
            _ => Ok(Answer {
                number: Some(1.0),
                prompt_tokens: 1,
                completion_tokens: 1,
                reasoning: None,
            }),
        };
        Ok(questions.iter().enumerate().map(answer).collect())
    }
}

fn spec(kind: &str, block: &str, train: &str) -> Spec {
    let text = format!(
        r#"{{"kind": "{kind}", "model": "m", "data": {{"train": "f"}},
            "{kind}": {{"max_tokens": 2, "num_generations": 8, {block}
                "grader": {{"type": "regex", "name": "g", "pattern": "^a"}}}},
            "train": {{"batch_size": 4, "max_length": 64, "eval_every": 1000,
                "checkpoint_every": 1000, "learning_rate": 1e-2{train}}}}}"#
    );
    serde_json::from_str(&text).unwrap()
}

fn prompts(folder: &Path, name: &str, count: usize) -> PreparedPrompts {
    let line = |i: usize| format!(r#"{{"messages": [{{"role": "user", "content": "{i}"}}]}}"#);
    let lines: Vec<_> = (0..count).map(line).collect();
    let source = folder.join(name);
    std::fs::write(&source, lines.join("\n")).unwrap();
    prepare_prompts(&source, &encoder(), 60, &folder.join(format!("{name}.cache"))).unwrap().0
}

struct Ran {
    steps: Vec<StepMetrics>,
    validation: Option<Validation>,
    params: Vec<Vec<f32>>,
}

/// Runs training, interrupted after each of the steps in `stops`.
fn run(folder: &Path, spec: &Spec, stops: &[u64]) -> Ran {
    try_run(folder, spec, stops, &Rc::new(Cell::new(Judge::Works)), folder).unwrap()
}

/// As [`run`], with checkpoints in `runs`.
fn try_run(
    folder: &Path,
    spec: &Spec,
    stops: &[u64],
    judge: &Rc<Cell<Judge>>,
    runs: &Path,
) -> Result<Ran, TrainError> {
    let settings = spec.resolve().unwrap();
    let data = || [prompts(folder, "train", 12), prompts(folder, "held", 4)];
    match &spec.task {
        Task::Grpo(block) => {
            run_recipe::<Grpo>(folder, block, &settings, &data(), stops, judge, runs)
        }
        Task::Ppo(block) => {
            run_recipe::<Ppo>(folder, block, &settings, &data(), stops, judge, runs)
        }
        Task::Distill(block) => {
            let data = [examples(folder, "train", 12), examples(folder, "held", 4)];
            run_recipe::<Distill>(folder, block, &settings, &data, stops, judge, runs)
        }
        other => panic!("{other:?}"),
    }
}

/// Prompts with a completion.
fn examples(folder: &Path, name: &str, count: usize) -> Prepared {
    let line = |i: usize| format!(r#"{{"prompt": "{i} {}", "completion": "ab"}}"#, i % 5);
    let lines: Vec<_> = (0..count).map(line).collect();
    let source = folder.join(format!("{name}.jsonl"));
    std::fs::write(&source, lines.join("\n")).unwrap();
    prepare(&source, &encoder(), 60, &folder.join(format!("{name}.examples"))).unwrap().0
}

fn run_recipe<R: Recipe>(
    folder: &Path,
    recipe: &R,
    settings: &Resolved,
    [train, held_out]: &[R::Data; 2],
    stops: &[u64],
    judge: &Rc<Cell<Judge>>,
    runs: &Path,
) -> Result<Ran, TrainError>
where
    R::Data: Dataset<Encoder = Encoder>,
{
    let path = folder.join("model.gguf");
    TinyDecoder::new("llama").write(&path).unwrap();
    let adapter = r#"{"kind": "sft", "model": "m", "data": {"train": "f"}}"#;
    let adapter = serde_json::from_str::<Spec>(adapter).unwrap().adapter.unwrap();
    let lora = Lora { rank: 4, ..adapter.lora(5).unwrap() };
    // Runs in the folder itself begin anew.
    let fresh = tempfile::tempdir().unwrap();
    let runs = if runs == folder { fresh.path() } else { runs };
    let checkpoints = Checkpoints::new(runs, 2).unwrap();
    // A teacher's tokenizer is compared with that of the model's file.
    let teacher = folder.join("teacher.gguf");
    let tokenizer: Arc<dyn Tokenizer> = match Gguf::open(&teacher) {
        Ok(file) => Arc::new(NativeTokenizer::from_gguf(&file).unwrap()),
        Err(_) => encoder().tokenizer,
    };
    let (mut steps, mut validation) = (Vec::new(), None);
    for stop_at in stops.iter().copied().chain([u64::MAX]) {
        if judge.get() == Judge::Gone {
            judge.set(Judge::Works);
        }
        let file = Arc::new(Gguf::open(&path).unwrap());
        let training = Training::Lora(lora.clone());
        let mut model = Model::load(file, &training, 64, &Device::Cpu).unwrap();
        if let Some(name) = recipe.head() {
            let width = model.shape().width;
            model = model.with_head(name, vec![0.0; width]).unwrap();
        }
        let model = Rc::new(model);
        let client = RefCell::new(InProcess {
            model: model.clone(),
            judge: judge.clone(),
            loaded: Vec::new(),
            started: None,
        });
        let policy = Policy {
            client: &client,
            export: &|path| export(&model, path),
            adapter: &runs.join("policy"),
        };
        let job = Job {
            model: &model,
            settings,
            train,
            validation: Some(held_out),
            checkpoints: &checkpoints,
            tokenizer: tokenizer.as_ref(),
            seed: 3,
            shuffle: Some(3),
            reference: &runs.join("reference"),
            teacher: Some(&teacher),
            policy: Some(policy),
            making: Making {
                encoder: &encoder(),
                model_name: "m",
                context: 64,
                folder: runs,
                cache: runs,
                human: None,
            },
        };
        let control = Control::default();
        let outcome = recipe.run(&job, &control, &mut |event| match event {
            Event::Step(step) => {
                if step.step == stop_at {
                    control.stop();
                }
                match judge.get() {
                    Judge::DownAfter(last) if last == step.step => judge.set(Judge::Down),
                    Judge::GoneAfter(last) if last == step.step => judge.set(Judge::Gone),
                    _ => {}
                }
                steps.push(step);
            }
            Event::Evaluated(found) => validation = Some(found),
            _ => {}
        });
        if let Outcome::Done { .. } = outcome? {
            let values = |param: &Param| param.var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let params = model.params().iter().map(values).collect();
            return Ok(Ran { steps, validation, params });
        }
    }
    panic!("the run did not end");
}

#[test]
fn rewards_are_learned() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, block, steps) in
        [("grpo", "", 12), ("ppo", r#""num_iterations": 2, "beta": 0.01,"#, 48)]
    {
        let spec = spec(kind, block, &format!(r#", "max_steps": {steps}"#));
        let ran = run(folder.path(), &spec, &[]);
        assert_eq!(ran.steps.len(), steps);
        let reward = |step: &StepMetrics| step.reward().unwrap();
        assert!(reward(&ran.steps[0]) < 0.5, "{kind}: {:?}", ran.steps[0]);
        assert!(reward(&ran.steps[steps - 1]) > 0.8, "{kind}: {:?}", ran.steps[steps - 1]);
        assert!(ran.validation.unwrap().reward().unwrap() > 0.7, "{kind}");
    }
}

#[test]
fn training_ends_at_the_target() {
    let folder = tempfile::tempdir().unwrap();
    for kind in ["grpo", "ppo"] {
        let of = |target: f64| {
            let block = format!(r#""num_iterations": 2, "target_reward": {target},"#);
            let spec = spec(kind, &block, r#", "max_steps": 12"#);
            run(folder.path(), &spec, &[]).steps
        };
        // Every batch is at this target; each has two steps, and the first step of the third ends.
        let steps = of(0.0);
        assert_eq!(steps.len(), 5, "{kind}");
        assert!(steps[4].last && !steps[3].last, "{kind}");
        assert_eq!(of(1.5).len(), 12, "{kind}");
        // An interrupted run counts the batches of before, and one that has ended stays so.
        let spec =
            spec(kind, r#""num_iterations": 2, "target_reward": 0,"#, r#", "max_steps": 12"#);
        assert_eq!(run(folder.path(), &spec, &[3]).steps.len(), 5, "{kind}");
    }
}

#[test]
fn a_job_waits_for_its_grader_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    for kind in ["grpo", "ppo"] {
        let grader = r#"{"type": "score_model", "name": "j", "model": "judge", "range": [0, 1],
            "input": [{"role": "user", "content": "{{sample.output_text}}"}]}"#;
        let text = format!(
            r#"{{"kind": "{kind}", "model": "m", "data": {{"train": "f"}},
                "{kind}": {{"max_tokens": 2, "num_generations": 3, "grader": {grader}}},
                "train": {{"batch_size": 4, "max_length": 64, "max_steps": 3}}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).unwrap();
        let runs = tempfile::tempdir().unwrap();
        let judge = Rc::new(Cell::new(Judge::Down));
        let attempt = || try_run(folder.path(), &spec, &[], &judge, runs.path());
        let Err(error) = attempt() else { panic!("{kind}: nobody graded") };
        assert_eq!(error.waits_for(), Some("grader_unavailable"), "{error}");
        assert!(error.to_string().contains("12 of 12 answers: "), "{error}");
        assert!(error.to_string().contains("the judge is not loaded"), "{error}");
        // A few failures are counted, and the answers left out.
        judge.set(Judge::Sometimes);
        let ran = attempt().unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(ran.steps.len(), 3);
        for step in &ran.steps {
            assert!((step.metrics["grader_errors"] - 1.0 / 6.0).abs() < 1e-9, "{step:?}");
            assert_eq!(step.metrics["reward_mean"], 1.0, "{kind}");
        }
    }
}

#[test]
fn an_interrupted_evaluation_is_made_up_for() {
    let folder = tempfile::tempdir().unwrap();
    let grader = r#"{"type": "score_model", "name": "j", "model": "judge", "range": [0, 1],
        "input": [{"role": "user", "content": "{{sample.output_text}}"}]}"#;
    let ahead = r#""async_rollouts": true,"#;
    for (kind, more) in [("grpo", ""), ("ppo", ""), ("grpo", ahead)] {
        let text = format!(
            r#"{{"kind": "{kind}", "model": "m", "data": {{"train": "f"}},
                "{kind}": {{{more} "max_tokens": 2, "num_generations": 3, "grader": {grader}}},
                "train": {{"batch_size": 4, "max_length": 64, "max_steps": 6, "eval_every": 2,
                    "checkpoint_every": 100}}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).unwrap();
        let whole = run(folder.path(), &spec, &[]);
        for judge in [Judge::DownAfter(2), Judge::GoneAfter(3), Judge::GoneAfter(4)] {
            let runs = tempfile::tempdir().unwrap();
            let waits = judge == Judge::DownAfter(2);
            let judge = Rc::new(Cell::new(judge));
            let attempt = || try_run(folder.path(), &spec, &[u64::MAX], &judge, runs.path());
            if waits {
                let Err(error) = attempt() else { panic!("{kind}: nobody graded") };
                assert!(error.to_string().contains("4 of 4 answers"), "{error}");
                judge.set(Judge::Works);
            }
            let broken = attempt().unwrap_or_else(|error| panic!("{kind}: {error}"));
            assert!(whole.params == broken.params, "{kind}");
            assert_eq!(broken.validation.unwrap().step, 6);
            // No step is repeated.
            let steps: Vec<u64> = broken.steps.iter().map(|step| step.step).collect();
            let expected: Vec<u64> = if waits { (3..=6).collect() } else { (1..=6).collect() };
            assert_eq!(steps, expected, "{kind}");
        }
    }
}

#[test]
fn ppo_measures_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let ran = run(folder.path(), &spec("ppo", "", r#", "max_steps": 8"#), &[]);
    let metric = |step: usize, name: &str| ran.steps[step].metrics[name];
    // Before the first update the policy is the reference, and the value head predicts 0.
    for name in ["kl", "value_mean", "clip_ratio", "value_clip_ratio"] {
        assert!(metric(0, name).abs() < 1e-6, "{name}: {}", metric(0, name));
    }
    // Whitened advantages have the mean 0, and all ratios are 1: the policy's loss is 0. The value
    // loss is ½ (R − 0)², and R is the reward at both of the tokens (γ = 1) up to λ.
    assert!(metric(0, "policy_loss").abs() < 1e-5, "{}", metric(0, "policy_loss"));
    let reward = ran.steps[0].reward().unwrap();
    let value_loss = 0.5 * reward * (1.0 + 0.95f64.powi(2)) / 2.0;
    assert!((metric(0, "value_loss") - value_loss).abs() < 1e-5, "{}", metric(0, "value_loss"));
    // The updates on one batch have the same samples; then the policy has moved.
    assert_eq!(metric(0, "reward_mean"), metric(3, "reward_mean"));
    assert!(metric(4, "kl") > 0.0 && metric(4, "value_mean") > 0.0);
    assert!(metric(0, "sampling_logp_difference") < 1e-3);
    assert!((ran.steps[0].loss - 0.1 * value_loss).abs() < 1e-5, "{}", ran.steps[0].loss);
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let ahead = r#""async_rollouts": true,"#;
    for (kind, more) in [("grpo", ""), ("ppo", ""), ("grpo", ahead)] {
        let block = format!(r#""num_iterations": 3, "beta": 0.1,{more}"#);
        let spec = spec(kind, &block, r#", "max_steps": 9"#);
        let whole = run(folder.path(), &spec, &[]);
        let broken = run(folder.path(), &spec, &[1, 4, 6]);
        assert!(whole.params == broken.params, "{kind}");
        for (a, b) in whole.steps.iter().zip(&broken.steps) {
            assert_eq!((a.step, a.loss), (b.step, b.loss), "{kind}");
            assert_eq!(a.metrics["reward_mean"], b.metrics["reward_mean"], "{kind}");
        }
    }
}

#[test]
fn a_batch_that_is_sampled_ahead_is_one_update_old() {
    let folder = tempfile::tempdir().unwrap();
    let of = |more: &str, steps: u64| {
        let spec = spec("grpo", more, &format!(r#", "max_steps": {steps}"#));
        run(folder.path(), &spec, &[])
    };
    let (now, ahead) = (of("", 2), of(r#""async_rollouts": true,"#, 2));
    // The first two batches are sampled by the initial weights, but the second one is trained with
    // the weights after the first update: the trainer's log-probabilities differ from the engine's.
    let gap = |ran: &Ran, step: usize| ran.steps[step].metrics["sampling_logp_difference"];
    assert_eq!(now.steps[0].loss, ahead.steps[0].loss);
    assert!(gap(&now, 1) < 1e-3 && gap(&ahead, 1) > 1e-2, "{} {}", gap(&now, 1), gap(&ahead, 1));
    let weight = ahead.steps[1].metrics["importance_sampling_ratio"];
    assert!((weight - 1.0).abs() > 1e-4, "{weight}");
    let learned = of(r#""async_rollouts": true,"#, 14).steps[13].reward().unwrap();
    assert!(learned > 0.8, "{learned}");
}

fn on_policy(share: f64, more: &str) -> Spec {
    let text = format!(
        r#"{{"kind": "distill", "model": "m", "data": {{"train": "f"}},
            "distill": {{"teacher": "t", "on_policy": {share}, "max_tokens": 3,
                "divergence": "reverse_kl"}},
            "train": {{"batch_size": 4, "max_length": 32, "eval_every": 1000,
                "checkpoint_every": 1000, "learning_rate": 1e-2{more}}}}}"#
    );
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_student_learns_on_its_own_completions() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = folder.path().join("teacher.gguf");
    TinyDecoder { seed: 77, ..TinyDecoder::new("llama") }.write(&teacher).unwrap();
    let spec = on_policy(1.0, r#", "max_steps": 40"#);
    let ran = run(folder.path(), &spec, &[]);
    let mean = |steps: &[StepMetrics]| {
        steps.iter().map(|step| step.metrics["divergence"]).sum::<f64>() / steps.len() as f64
    };
    let (first, last) = (mean(&ran.steps[..5]), mean(&ran.steps[35..]));
    assert!(last < 0.7 * first, "{first}, {last}");
    assert!(ran.steps.iter().all(|step| step.metrics["completion_length"] == 3.0));
    // Stopped anywhere, it ends with the same bits.
    let spec = on_policy(0.5, r#", "max_steps": 8"#);
    let whole = run(folder.path(), &spec, &[]);
    let broken = run(folder.path(), &spec, &[2, 5, 7]);
    assert!(whole.params == broken.params);
    let sampled = |step: &&StepMetrics| step.metrics.contains_key("completion_length");
    let count = whole.steps.iter().filter(sampled).count();
    assert!((4..=8).contains(&count), "{count} of 8 steps have sampled");
    let divergences = |ran: &Ran| -> Vec<f64> {
        ran.steps.iter().map(|step| step.metrics["divergence"]).collect()
    };
    assert_eq!(divergences(&whole), divergences(&broken));
}
