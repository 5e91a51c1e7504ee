use super::run::{BatchSource, LossSums, Run, StepCount};
use super::sft::SftTrainer;
use super::*;
use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{Gguf, Projection};
use crate::job::spec::{Lora, Resolved, Spec};
use crate::job::{Control, Metrics, REWARD};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Prepared, prepare_tokens};
use crate::train::model::{Batch, Model, Training};
use candle_core::Device;
use std::path::Path;
use std::sync::Arc;

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
        let outcome = sft.run(&Control::default(), |event| match event {
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
                let (control, at) = (Control::default(), stops.next());
                let outcome = sft.run(&control, |event| {
                    if matches!(event, Event::Step(progress) if Some(progress.step) == at) {
                        control.stop();
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
    let error = sft.run(&Control::default(), |_| {}).unwrap_err().to_string();
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
    let error = sft.run(&Control::default(), |_| {}).unwrap_err().to_string();
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
        let (control, mut steps) = (Control::default(), 0);
        let outcome = sft.run(&control, |event| {
            steps += u64::from(matches!(event, Event::Step(_)));
            if stops && steps == 2 {
                control.stop();
            }
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
    let done = sft.run(&Control::default(), |event| again.push(event)).unwrap();
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
    let outcome = run.run(&mut gaps, &Control::default(), &mut |event| {
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

/// A run whose validation reward at step `n` is `rewards[n - 1]`.
struct Scripted {
    batch: Batch,
    rewards: Vec<f64>,
    evaluated: std::cell::Cell<usize>,
}

impl BatchSource for Scripted {
    type MicroBatch = Batch;

    fn extent(&self) -> StepCount {
        StepCount::new(8, &settings(r#", "epochs": 2"#))
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Batch>, TrainError> {
        cursor.taken += count as u64;
        self.evaluated.set(cursor.taken as usize / count);
        Ok(vec![self.batch.clone()])
    }

    fn examine(&self) -> Result<Option<Metrics>, TrainError> {
        let reward = self.rewards[self.evaluated.get() - 1];
        Ok(Some([(REWARD.to_owned(), reward)].into_iter().collect()))
    }
}

#[test]
fn the_weights_of_the_best_validation_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let encoded = data(folder.path(), "t", 1).get(0).unwrap();
    let file = tiny(folder.path());
    // The weights after a run that keeps the best ones or does not, and what it said.
    let weights = |name: &str, rewards: &[f64], keep: bool, stop_at: u64| {
        let checkpoints = Checkpoints::new(&folder.path().join(name), 1).unwrap();
        let mut settings = settings(r#", "epochs": 2, "checkpoint_every": 2"#);
        settings.eval_every = 1;
        settings.load_best_model_at_end = keep;
        let mut notes = Vec::new();
        for stop_at in [stop_at, u64::MAX] {
            let model = Model::load(file.clone(), &lora(), 64, &Device::Cpu).unwrap();
            let run = Run { model: &model, settings: &settings, checkpoints: &checkpoints };
            let (batch, rewards) = (Batch::of([&encoded]), rewards.to_vec());
            let mut source = Scripted { batch, rewards, evaluated: Default::default() };
            let control = Control::default();
            let outcome = run.run(&mut source, &control, &mut |event| match event {
                Event::Step(step) if step.step == stop_at => control.stop(),
                Event::Note { text } => notes.push(text),
                _ => {}
            });
            if let Outcome::Done { .. } = outcome.unwrap() {
                let values = |param: &crate::train::optim::Param| {
                    param.var.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                };
                let params: Vec<_> = model.params().iter().map(values).collect();
                let kept = std::fs::read_dir(folder.path().join(name)).unwrap().flatten();
                let names = kept.map(|entry| entry.file_name().into_string().unwrap());
                let best: Vec<_> = names.filter(|name| name.starts_with("best-")).collect();
                return (params, notes, best);
            }
        }
        unreachable!("the second run is not stopped")
    };
    let at = [1, 2, 3, 4].map(|best| {
        let mut rewards = [0.1; 4];
        rewards[best - 1] = 0.9;
        let name = format!("at-{best}");
        let found = weights(&name, &rewards, true, u64::MAX);
        assert_eq!(found.2, [format!("best-{best}")]);
        assert_eq!(found.1.len(), usize::from(best < 4), "{:?}", found.1);
        if best < 4 {
            assert!(found.1[0].contains(&format!("step {best} ")), "{:?}", found.1);
            assert!(found.1[0].contains("0.9000"), "{:?}", found.1);
        }
        // A run that was stopped ends with the same weights.
        for stop_at in [1, 2, 3] {
            let stopped = weights(&format!("{name}-{stop_at}"), &rewards, true, stop_at);
            assert_eq!(stopped.0, found.0, "best {best}, stopped at {stop_at}");
        }
        found.0
    });
    assert!((1..4).all(|n| at[n - 1] != at[n]));
    let last = weights("last", &[0.9, 0.1, 0.1, 0.1], false, u64::MAX);
    assert_eq!((last.0, last.2.len()), (at[3].clone(), 0));
    // Of equal rewards the latest is the best; NaN never is.
    assert_eq!(weights("equal", &[0.5, 0.5, f64::NAN, 0.5], true, u64::MAX).0, at[3]);
    assert_eq!(weights("nan", &[0.5, 0.7, f64::NAN, f64::NAN], true, u64::MAX).0, at[1]);
}
