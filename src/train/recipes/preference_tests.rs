//! Tests of preference training: losses that are known beforehand, and preferences that must be
//! learned.

use super::preference::{Objective, PreferenceTrainer};
use super::{Event, Outcome};
use crate::gguf::Gguf;
use crate::gguf::fixture::TinyDecoder;
use crate::job::spec::{Dpo, DpoLoss, Lora, Resolved, Reward, Spec};
use crate::job::{Control, StepMetrics};
use crate::template::{CHATML, ChatTemplate};
use crate::tokenizer::{Tokenizer, Vocab};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Encoder, PreparedPairs, prepare_pairs};
use crate::train::model::{Model, SCORE, Training};
use candle_core::Device;
use std::path::Path;
use std::sync::Arc;

fn settings(kind: &str, more: &str) -> Resolved {
    let text = format!(
        r#"{{"kind": "{kind}", "model": "m", "data": {{"train": "f"}}, "train": {{"batch_size": 4,
            "max_length": 64, "learning_rate": 1e-2, "eval_every": 1000, "checkpoint_every": 3{more}}}}}"#
    );
    serde_json::from_str::<Spec>(&text).unwrap().resolve().unwrap()
}

fn model(folder: &Path, scored: bool) -> Model {
    let path = folder.join("model.gguf");
    if !path.exists() {
        TinyDecoder::new("llama").write(&path).unwrap();
    }
    let spec = r#"{"kind": "sft", "model": "m", "data": {"train": "f"}}"#;
    let adapter = serde_json::from_str::<Spec>(spec).unwrap().adapter.unwrap();
    let lora = Lora { rank: 4, ..adapter.lora(5).unwrap() };
    let file = Arc::new(Gguf::open(&path).unwrap());
    let model = Model::load(file, &Training::Lora(lora), 64, &Device::Cpu).unwrap();
    if !scored {
        return model;
    }
    let width = model.shape().width;
    let head = (0..width).map(|i| 0.1 * (i as f32).sin()).collect();
    model.with_head(SCORE, head).unwrap()
}

/// The completion with an `a` is the chosen one.
fn data(folder: &Path, name: &str, from: usize, count: usize) -> PreparedPairs {
    let line = |i: usize| {
        let (one, other) = (i % 7, i * 5 % 11);
        serde_json::json!({"prompt": format!("{one} {other} "), "chosen": format!("{other}a{one}"),
                           "rejected": format!("{other}b{one}")})
        .to_string()
    };
    let lines: Vec<_> = (from..from + count).map(line).collect();
    let source = folder.join(name);
    std::fs::write(&source, lines.join("\n")).unwrap();
    prepare_pairs(&source, &encoder(), 64, &folder.join(format!("{name}.cache"))).unwrap().0
}

/// A tokenizer with one token per byte, for the small vocabulary of the model.
struct Letters(Vocab);

impl Tokenizer for Letters {
    fn vocab(&self) -> &Vocab {
        &self.0
    }

    fn encode(&self, text: &str, _: bool, _: bool) -> Vec<u32> {
        text.bytes().map(|byte| u32::from(byte) % 59).collect()
    }
}

pub(super) fn encoder() -> Encoder {
    let mut vocab = Vocab::new((0..60u8).map(|byte| (vec![byte], false, false)));
    vocab.eos = Some(59);
    let template = ChatTemplate::compile(CHATML, None, "", "<|im_end|>").unwrap();
    Encoder::new(Arc::new(Letters(vocab)), Arc::new(template), 0, false)
}

struct Ran {
    steps: Vec<StepMetrics>,
    accuracy: Option<f64>,
    params: Vec<Vec<f32>>,
}

/// Runs training, interrupted after each of the steps in `stops`.
fn run(folder: &Path, objective: &dyn Objective, settings: &Resolved, stops: &[u64]) -> Ran {
    let scored = objective.outputs().values;
    let (train, held_out) = (data(folder, "train", 0, 40), data(folder, "held", 100, 16));
    let runs = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(runs.path(), 2).unwrap();
    let reference = runs.path().join("reference");
    let (mut steps, mut accuracy) = (Vec::new(), None);
    for stop_at in stops.iter().copied().chain([u64::MAX]) {
        let model = model(folder, scored);
        let pairs = PreferenceTrainer {
            model: &model,
            settings,
            objective,
            train: &train,
            validation: Some(&held_out),
            checkpoints: &checkpoints,
            shuffle: Some(1),
            reference: &reference,
        };
        let control = Control::default();
        let outcome = pairs.run(&control, |event| match event {
            Event::Step(progress) => {
                if progress.step == stop_at {
                    control.stop();
                }
                steps.push(progress);
            }
            Event::Evaluated(found) => accuracy = found.accuracy,
            _ => {}
        });
        if let Outcome::Done { tokens } = outcome.unwrap() {
            assert!(tokens > 0);
            let values = |param: &crate::train::optim::Param| {
                param.var.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            return Ran { steps, accuracy, params: model.params().iter().map(values).collect() };
        }
    }
    panic!("the run did not end");
}

#[test]
fn the_first_step_of_dpo_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings("dpo", r#", "max_steps": 1"#);
    for (loss, expected) in
        [(DpoLoss::Sigmoid, 2f64.ln()), (DpoLoss::Hinge, 1.0), (DpoLoss::Ipo, 25.0)]
    {
        let ran = run(folder.path(), &Dpo { loss, ..Dpo::default() }, &settings, &[]);
        let step = &ran.steps[0];
        assert!((step.loss - expected).abs() < 1e-5 * expected, "{loss:?}: {}", step.loss);
        assert!(step.grad_norm > 0.0 && step.metrics["reward_margin"].abs() < 1e-5);
        assert!(step.metrics["logps_chosen"] < 0.0);
    }
}

#[test]
fn preferences_are_learned() {
    let folder = tempfile::tempdir().unwrap();
    for objective in [
        &Dpo::default() as &dyn Objective,
        &Dpo { label_smoothing: 0.1, sft: 0.5, ..Dpo::default() },
        &Reward { margin: 0.0, centering: 0.01 },
    ] {
        let settings = settings("dpo", r#", "epochs": 6"#);
        let ran = run(folder.path(), objective, &settings, &[]);
        assert_eq!(ran.steps.len(), 60);
        let loss = |steps: &[StepMetrics]| {
            steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64
        };
        let (first, last) = (loss(&ran.steps[..5]), loss(&ran.steps[55..]));
        assert!(last < first * 0.8, "{objective:?}: {first}, {last}");
        assert!(ran.accuracy.unwrap() >= 0.9, "{objective:?}: {:?} held out", ran.accuracy);
    }
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for objective in [&Dpo::default() as &dyn Objective, &Reward::default()] {
        let settings = settings("dpo", r#", "max_steps": 9"#);
        let whole = run(folder.path(), objective, &settings, &[]);
        let broken = run(folder.path(), objective, &settings, &[2, 5, 7]);
        assert!(whole.params == broken.params, "{objective:?}");
        assert_eq!(whole.steps.len(), broken.steps.len());
        for (a, b) in whole.steps.iter().zip(&broken.steps) {
            assert_eq!((a.loss, &a.metrics), (b.loss, &b.metrics), "step {}", a.step);
        }
    }
}

#[test]
fn rows_and_recomputation_change_only_rounding() {
    let folder = tempfile::tempdir().unwrap();
    for objective in [&Dpo::default() as &dyn Objective, &Reward::default()] {
        let of = |more: &str| {
            let settings = settings("dpo", &format!(r#", "max_steps": 4{more}"#));
            run(folder.path(), objective, &settings, &[]).steps
        };
        let plain = of("");
        for more in [r#", "micro_batch": 4"#, r#", "activation_checkpointing": true"#] {
            for (a, b) in plain.iter().zip(of(more)) {
                assert!((a.loss - b.loss).abs() < 1e-4 * a.loss, "{more}: {} {}", a.loss, b.loss);
                assert!((a.grad_norm / b.grad_norm - 1.0).abs() < 1e-3, "{more}");
            }
        }
    }
}
