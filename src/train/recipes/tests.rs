use super::run::{BatchSource, LossSums, Run, StepCount};
use super::sft::SftTrainer;
use super::*;
use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{Gguf, Projection};
use crate::job::spec::{Lora, Resolved, Spec};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Prepared, prepare_tokens};
use crate::train::model::{Batch, Model, Training};
use candle_core::Device;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn settings(more: &str) -> Resolved {
    let more = match more.contains("checkpoint_every") {
        true => more.to_owned(),
        false => format!(r#", "checkpoint_every": 4 {more}"#),
    };
    let text = format!(
        r#"{{"kind": "sft", "model": "m", "data": {{"train": "f"}}, "train": {{"batch_size": 4,
           "max_length": 48, "learning_rate": 0.01, "eval_every": 5 {more}}}}}"#
    );
    serde_json::from_str::<Spec>(&text).unwrap().resolve().unwrap()
}

fn tiny(folder: &Path) -> Arc<Gguf> {
    let path = folder.join("model.gguf");
    TinyDecoder::new("llama").write(&path).unwrap();
    Arc::new(Gguf::open(&path).unwrap())
}

fn lora() -> Training {
    let targets = vec![Projection::Q, Projection::V, Projection::Down];
    Training::Lora(Lora {
        rank: 4,
        alpha: 8.0,
        targets,
        rank_stabilized: false,
        dropout: 0.0,
        seed: 3,
    })
}

/// Examples that count upwards from different numbers.
fn data(folder: &Path, name: &str, count: u32) -> Prepared {
    let example = |i: u32| {
        let length = 6 + i % 20;
        (0..length).map(|at| ((i * 5 + at) % 60, at > 2)).collect::<Vec<_>>()
    };
    prepare_tokens((0..count).map(example), &folder.join(name)).unwrap()
}

fn weights(model: &Model) -> Vec<Vec<f32>> {
    let flat =
        |param: &crate::train::optim::Param| param.var.flatten_all().unwrap().to_vec1().unwrap();
    model.params().iter().map(flat).collect()
}

#[test]
fn losses_fall_and_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny(folder.path());
    let (train, validation) = (data(folder.path(), "t", 40), data(folder.path(), "v", 8));
    for training in [Training::Full, lora()] {
        let model = Model::load(file.clone(), &training, 64, &Device::Cpu).unwrap();
        let runs = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(runs.path(), 2).unwrap();
        let settings = settings(r#", "epochs": 3"#);
        let sft = SftTrainer {
            model: &model,
            settings: &settings,
            train: &train,
            validation: Some(&validation),
            checkpoints: &checkpoints,
            shuffle: Some(1),
        };
        let extent = StepCount::new(sft.train.len(), &settings);
        assert_eq!((extent.examples, extent.steps), (120, 30));
        let (mut steps, mut evaluated, mut saved) = (Vec::new(), Vec::new(), Vec::new());
        let outcome = sft.run(&AtomicBool::new(false), |event| match event {
            Event::Step(progress) => steps.push(progress),
            Event::Evaluated(found) => evaluated.push(found),
            Event::Checkpoint { step } => saved.push(step),
            _ => {}
        });
        assert!(matches!(outcome.unwrap(), Outcome::Done { .. }));
        assert_eq!(steps.len(), 30);
        assert_eq!(saved, [4, 8, 12, 16, 20, 24, 28, 30]);
        assert_eq!(
            evaluated.iter().map(|found| found.step).collect::<Vec<_>>(),
            [5, 10, 15, 20, 25, 30]
        );
        let loss = |at: usize| evaluated[at].loss.unwrap();
        assert!(loss(5) < 0.8 * loss(0), "{evaluated:?}");
        assert!(steps[29].epoch > 2.99 && steps[29].learning_rate < 1e-3, "{:?}", steps[29]);
    }
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny(folder.path());
    let train = data(folder.path(), "t", 30);
    for training in [Training::Full, lora()] {
        let run = |stops: &[u64]| {
            let runs = tempfile::tempdir().unwrap();
            let checkpoints = Checkpoints::new(runs.path(), 2).unwrap();
            let settings = settings(r#", "epochs": 2"#);
            let mut stops = stops.iter().copied();
            loop {
                // Loads everything again, as a new process does.
                let model = Model::load(file.clone(), &training, 64, &Device::Cpu).unwrap();
                let sft = SftTrainer {
                    model: &model,
                    settings: &settings,
                    train: &train,
                    validation: None,
                    checkpoints: &checkpoints,
                    shuffle: Some(1),
                };
                let (stop, at) = (AtomicBool::new(false), stops.next());
                let outcome = sft.run(&stop, |event| {
                    if matches!(event, Event::Step(progress) if Some(progress.step) == at) {
                        stop.store(true, Ordering::Relaxed);
                    }
                });
                if let Outcome::Done { .. } = outcome.unwrap() {
                    return weights(&model);
                }
            }
        };
        assert_eq!(run(&[]), run(&[1, 3, 4, 11]));
    }
}

#[test]
fn a_loss_that_is_no_number_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny(folder.path());
    let train = data(folder.path(), "t", 30);
    let model = Model::load(file, &Training::Full, 64, &Device::Cpu).unwrap();
    let runs = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(runs.path(), 2).unwrap();
    let settings = settings("");
    let sft = SftTrainer {
        model: &model,
        settings: &settings,
        train: &train,
        validation: None,
        checkpoints: &checkpoints,
        shuffle: None,
    };
    let norm = &model.params()[1].var;
    norm.set(&(norm.as_tensor() * f64::NAN).unwrap()).unwrap();
    let error = sft.run(&AtomicBool::new(false), |_| {}).unwrap_err().to_string();
    assert!(error.contains("step 1") && error.contains("learning rate"), "{error}");
    assert!(checkpoints.steps().unwrap().is_empty());
}

#[test]
fn gradients_that_are_no_numbers_end_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny(folder.path());
    let train = data(folder.path(), "t", 30);
    let model = Model::load(file, &Training::Full, 64, &Device::Cpu).unwrap();
    let runs = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(runs.path(), 2).unwrap();
    let settings = settings("");
    let sft = SftTrainer {
        model: &model,
        settings: &settings,
        train: &train,
        validation: None,
        checkpoints: &checkpoints,
        shuffle: None,
    };
    // The norm is so small and the matrices are so large that the output is ordinary, but the
    // gradient of the norm overflows.
    for (name, by) in [("attn_norm", 1e-42), ("attn_v", 1e22), ("attn_output", 1e20)] {
        let name = format!("blk.0.{name}.weight");
        let var = &model.params().iter().find(|param| param.name == name).unwrap().var;
        var.set(&(var.as_tensor() * by).unwrap()).unwrap();
    }
    let error = sft.run(&AtomicBool::new(false), |_| {}).unwrap_err().to_string();
    assert!(error.contains("step 1: the gradients are not finite"), "{error}");
    assert!(checkpoints.steps().unwrap().is_empty());
}

#[test]
fn time_ends_a_run_over_interruptions_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny(folder.path());
    let (train, validation) = (data(folder.path(), "t", 40), data(folder.path(), "v", 8));
    let runs = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(runs.path(), 2).unwrap();
    // A limit of 0.6 seconds.
    let settings = settings(r#", "epochs": 10000, "max_minutes": 0.01, "checkpoint_every": 1"#);
    let started = std::time::Instant::now();
    let mut events = Vec::new();
    let mut outcome = |stops: bool| {
        let model = Model::load(file.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
        let sft = SftTrainer {
            model: &model,
            settings: &settings,
            train: &train,
            validation: Some(&validation),
            checkpoints: &checkpoints,
            shuffle: Some(1),
        };
        let (stop, mut steps) = (AtomicBool::new(false), 0);
        let outcome = sft.run(&stop, |event| {
            steps += u64::from(matches!(event, Event::Step(_)));
            stop.store(stops && steps == 2, Ordering::Relaxed);
            events.push(event);
        });
        outcome.unwrap()
    };
    assert_eq!(outcome(true), Outcome::Stopped);
    assert!(matches!(outcome(false), Outcome::Done { .. }));
    assert!(started.elapsed().as_secs_f64() > 0.5);
    let count = events.len();
    assert!(matches!(events[count - 2], Event::Evaluated(_)), "{:?}", events[count - 2]);
    assert!(matches!(events[count - 1], Event::Checkpoint { .. }));
    let mut again = Vec::new();
    let model = Model::load(file.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
    let sft = SftTrainer {
        model: &model,
        settings: &settings,
        train: &train,
        validation: None,
        checkpoints: &checkpoints,
        shuffle: Some(1),
    };
    let done = sft.run(&AtomicBool::new(false), |event| again.push(event)).unwrap();
    assert!(matches!(done, Outcome::Done { tokens: 1.. }), "those of before count: {done:?}");
    assert_eq!(again.len(), 1, "the time is up: {again:?}");
}

/// Steps of which every second one has nothing to compute, as when all completions of a policy's
/// batch were truncated.
struct Gaps {
    batch: Batch,
    step: u64,
}

impl BatchSource for Gaps {
    type MicroBatch = Batch;

    fn extent(&self) -> StepCount {
        StepCount::new(8, &settings(r#", "epochs": 2"#))
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Batch>, TrainError> {
        cursor.taken += count as u64;
        self.step += 1;
        Ok(if self.step.is_multiple_of(2) { Vec::new() } else { vec![self.batch.clone()] })
    }

    fn extra_losses(&self) -> LossSums {
        let mut sums = LossSums::default();
        sums.measure_all("masked_ratio", 3.0, 4.0);
        sums
    }
}

#[test]
fn a_step_without_anything_to_compute_has_no_loss_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::load(tiny(folder.path()), &lora(), 64, &Device::Cpu).unwrap();
    let encoded = data(folder.path(), "t", 1).get(0).unwrap();
    let mut gaps = Gaps { batch: Batch::of([&encoded]), step: 0 };
    let checkpoints = Checkpoints::new(&folder.path().join("c"), 2).unwrap();
    let settings = settings(r#", "epochs": 2"#);
    let run = Run { model: &model, settings: &settings, checkpoints: &checkpoints };
    let mut steps = Vec::new();
    let outcome = run.run(&mut gaps, &AtomicBool::new(false), &mut |event| {
        if let Event::Step(step) = event {
            steps.push(step);
        }
    });
    assert!(matches!(outcome.unwrap(), Outcome::Done { .. }));
    let losses: Vec<bool> = steps.iter().map(|step| step.loss == 0.0).collect();
    assert_eq!(losses, [false, true, false, true]);
    assert!(steps.iter().all(|step| step.grad_norm.is_finite()), "{steps:?}");
    assert!(steps.iter().all(|step| step.metrics["masked_ratio"] == 0.75), "{steps:?}");
}
