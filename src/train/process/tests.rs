use super::*;
use crate::gguf::fixture::TinyDecoder;
use crate::job::spec::Spec;
use crate::job::{
    Artifact, ArtifactKind, Control, Entry, EventLog, Folder, Follower, JobEvent, Level, Order,
    Outcome, StepMetrics, plot,
};
use std::fs;
use std::path::Path;

/// A job in its own folder: a tiny model, with prompts and completions made of its bytes.
fn job(folder: &Path, more: &str) -> Folder {
    TinyDecoder::new("llama").write(&folder.join("base.gguf")).unwrap();
    let line = |i: usize| {
        format!(
            "{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n",
            "ab".repeat(i % 5 + 1),
            "cd".repeat(i % 3 + 1)
        )
    };
    fs::write(folder.join("train.jsonl"), (0..24).map(line).collect::<String>()).unwrap();
    fs::write(folder.join("valid.jsonl"), (0..5).map(line).collect::<String>()).unwrap();
    let text = format!(
        r#"{{"kind": "sft", "model": "tiny", "data": {{"train": "t"}},
            "train": {{"max_length": 48, "batch_size": 4, "epochs": 2, "eval_every": 4,
            "checkpoint_every": 3, "learning_rate": 0.01}}{more}}}"#
    );
    let spec: Spec = serde_json::from_str(&text).unwrap();
    let name = "ft:tiny:ingot::1".to_owned();
    let mut order = Order::new("ftjob-1".into(), spec, name, folder.join("train.jsonl"));
    order.model = Some(folder.join("base.gguf"));
    order.validation = Some(folder.join("valid.jsonl"));
    let job = Folder::new(folder.join("job"));
    job.create(&order.into()).unwrap();
    job
}

fn go(job: &Folder) -> bool {
    run(job, &Control::default()).unwrap()
}

fn succeeded(job: &Folder) -> (u64, Vec<Artifact>) {
    match job.outcome().unwrap() {
        Some(Outcome::Succeeded { trained_tokens, artifacts }) => (trained_tokens, artifacts),
        other => panic!("{other:?}"),
    }
}

fn weights(job: &Folder) -> Vec<u8> {
    fs::read(job.path().join("artifacts/peft/adapter_model.safetensors")).unwrap()
}

#[test]
fn an_order_becomes_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path(), "");
    assert!(go(&job));
    let (tokens, artifacts) = succeeded(&job);
    assert!(tokens > 100);
    let kinds: Vec<_> = artifacts.iter().map(|artifact| artifact.kind).collect();
    use ArtifactKind::{Adapter, Peft, Provenance, Results};
    assert_eq!(kinds, [Adapter, Peft, Peft, Results, Provenance]);
    for artifact in &artifacts {
        let file = job.path().join(&artifact.file);
        assert_eq!(fs::metadata(file).unwrap().len(), artifact.bytes);
        assert_eq!(artifact.sha256.len(), 64);
    }
    let csv = fs::read_to_string(job.path().join("artifacts/results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 13, "{csv}");
    assert_eq!(csv.lines().nth(4).unwrap().split(',').filter(|cell| !cell.is_empty()).count(), 5);
    let entries = Follower::new(job.events(), 0).read().unwrap();
    assert!(matches!(entries[0].event, JobEvent::Data { .. }), "{entries:?}");
    let steps = |entries: &[Entry]| {
        let is_step = |entry: &&Entry| matches!(entry.event, JobEvent::Step(_));
        entries.iter().filter(is_step).count()
    };
    assert_eq!(steps(&entries), 12);
    let svg = plot(&entries, "a job").unwrap();
    assert!(svg.contains("validation") && svg.contains("learning rate"), "{svg}");
    assert!(!svg.contains("reward") && !svg.contains("accuracy"), "{svg}");
    let head = csv.lines().next().unwrap();
    assert_eq!(head, "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy");
    assert!(job.checkpoint_adapter(12).exists());
    // A second run of an ended job does nothing.
    assert!(go(&job));
    assert_eq!(Follower::new(job.events(), 0).read().unwrap(), entries);
}

#[test]
fn a_job_that_was_stopped_goes_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, cut] = ["a", "b"].map(|name| {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        job(&folder, r#", "suffix": "x""#)
    });
    assert!(go(&whole));
    for _ in 0..4 {
        let control = Control::default();
        let ended = std::thread::scope(|scope| {
            let running = scope.spawn(|| run(&cut, &control).unwrap());
            let before = Follower::new(cut.events(), 0).read().unwrap().len();
            while !running.is_finished()
                && Follower::new(cut.events(), 0).read().unwrap().len() < before + 3
            {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            control.stop();
            running.join().unwrap()
        });
        if ended {
            break;
        }
    }
    assert!(go(&cut));
    assert_eq!(weights(&whole), weights(&cut));
    let steps = |job: &Folder| -> Vec<_> {
        let entries = Follower::new(job.events(), 0).read().unwrap();
        let step = |entry: Entry| match entry.event {
            JobEvent::Step(step) => Some((step.step, step.loss.to_bits(), step.tokens)),
            _ => None,
        };
        entries.into_iter().filter_map(step).collect()
    };
    assert_eq!(steps(&whole), steps(&cut));
    assert_eq!(succeeded(&whole).0, succeeded(&cut).0);
}

#[test]
fn a_job_that_was_asked_to_finish_keeps_what_it_has_learned() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path(), "");
    let events = || Follower::new(job.events(), 0).read().unwrap();
    let steps = || {
        let step = |entry: &Entry| match &entry.event {
            JobEvent::Step(step) => Some(step.step),
            _ => None,
        };
        events().iter().filter_map(step).collect::<Vec<_>>()
    };
    let ended = std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&job, &Control::new(&job)).unwrap());
        while steps().len() < 2 && !running.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        job.ask_to_finish().unwrap();
        running.join().unwrap()
    });
    assert!(ended);
    let (_, artifacts) = succeeded(&job);
    assert!(artifacts.iter().any(|artifact| artifact.kind == ArtifactKind::Adapter));
    let last = *steps().last().unwrap();
    assert!((2..=12).contains(&last));
    // The last weights are evaluated and written.
    let events = events();
    let validated = events
        .iter()
        .any(|entry| matches!(&entry.event, JobEvent::Validation(found) if found.step == last));
    let written = events
        .iter()
        .any(|entry| matches!(entry.event, JobEvent::Checkpoint { step } if step == last));
    assert!(validated && written, "{events:?}");
}

#[test]
fn a_paused_job_that_is_asked_to_finish_ends_at_its_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path(), "");
    let control = Control::new(&job);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| run(&job, &control).unwrap());
        while Follower::new(job.events(), 0).read().unwrap().len() < 4 && !running.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        control.stop();
        running.join().unwrap()
    });
    job.ask_to_finish().unwrap();
    assert!(run(&job, &Control::new(&job)).unwrap());
    succeeded(&job);
}

#[test]
fn an_adapter_is_trained_further() {
    let folder = tempfile::tempdir().unwrap();
    let first = job(folder.path(), "");
    assert!(go(&first));
    for init in ["artifacts/adapter.gguf", "artifacts/peft"] {
        let folder = tempfile::tempdir().unwrap();
        let second = job(folder.path(), r#", "adapter": {"init": "ft:tiny:ingot::1"}"#);
        let mut order = second.order().unwrap().training().unwrap().clone();
        order.init = Some(first.path().join(init));
        order.spec.train.learning_rate = Some(1e-12);
        second.create(&order.into()).unwrap();
        assert!(go(&second));
        let last = |job: &Folder| {
            let entries = Follower::new(job.events(), 0).read().unwrap();
            let losses = entries.iter().filter_map(|entry| match &entry.event {
                JobEvent::Validation(found) => found.loss,
                _ => None,
            });
            losses.collect::<Vec<_>>()
        };
        // Training resumed from the end of the first run, so the loss has hardly changed.
        let (before, after) = (*last(&first).last().unwrap(), last(&second)[0]);
        assert!((before - after).abs() < 1e-5 * before, "{init}: {before}, {after}");
    }
}

#[test]
fn what_is_wrong_is_the_outcome() {
    let failure = |job: &Folder| match job.outcome().unwrap() {
        Some(Outcome::Failed { failure, .. }) => failure,
        other => panic!("{other:?}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let bad = job(folder.path(), "");
    fs::write(folder.path().join("train.jsonl"), "{\"prompt\": 1}\n").unwrap();
    assert!(go(&bad));
    let found = failure(&bad);
    assert_eq!(found.code, "invalid_training_file");
    assert_eq!(found.param.as_deref(), Some("training_file"));
    assert!(found.message.contains("line 1"), "{found:?}");

    let folder = tempfile::tempdir().unwrap();
    let diverges = job(folder.path(), "");
    let mut order = diverges.order().unwrap().training().unwrap().clone();
    order.spec.train.learning_rate = Some(10.0);
    order.spec.train.epochs = Some(400.0);
    order.spec.adapter = None;
    diverges.create(&order.into()).unwrap();
    assert!(go(&diverges));
    if let Some(Outcome::Failed { failure, .. }) = diverges.outcome().unwrap() {
        assert!(failure.message.contains("learning rate"), "{failure:?}");
        assert!(!diverges.artifacts().exists());
    }
}

#[test]
fn followers_see_every_line_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let mut follower = Follower::new(path.clone(), 0);
    assert!(follower.read().unwrap().is_empty());
    let mut log = EventLog::open(&path).unwrap();
    let checkpoint = |step| JobEvent::Checkpoint { step };
    log.say(Level::Info, "begin").unwrap();
    for step in 1..=5 {
        log.add(checkpoint(step), "c").unwrap();
    }
    assert_eq!(follower.read().unwrap().len(), 6);
    drop(log);
    // An incomplete line, as a crash leaves it.
    fs::write(&path, [&fs::read(&path).unwrap()[..], b"{\"seq\": 9"].concat()).unwrap();
    let mut log = EventLog::cut(&path, 2).unwrap();
    assert!(follower.read().unwrap().is_empty());
    log.add(checkpoint(3), "again").unwrap();
    let found = follower.read().unwrap();
    assert_eq!((found.len(), found[0].seq, &found[0].message[..]), (1, 7, "again"));
    let all = Follower::new(path, 0).read().unwrap();
    let steps: Vec<_> = all.iter().filter_map(|entry| entry.event.step()).collect();
    assert_eq!(steps, [1, 2, 3]);
}

/// Steps of a policy with these metrics, or of preference pairs.
fn entries(steps: u64, metrics: &[(&str, f64)], accuracy: Option<f64>) -> Vec<Entry> {
    let step = |number: u64| StepMetrics {
        last: false,
        step: number,
        total_steps: steps,
        epoch: 1.0,
        loss: -0.5,
        accuracy,
        learning_rate: 1e-4,
        grad_norm: 1.0,
        tokens: number,
        tokens_per_second: 1.0,
        eta_seconds: 0.0,
        memory_bytes: 0,
        metrics: metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
    };
    let entry = |number| Entry {
        seq: number,
        at: 0.0,
        message: String::new(),
        event: JobEvent::Step(step(number)),
    };
    (1..=steps).map(entry).collect()
}

#[test]
fn plots_show_what_the_kind_of_job_measures() {
    for (metrics, accuracy, shown, hidden) in [
        (&[("reward_mean", 0.5), ("kl", 0.1)][..], None, &["reward", "KL"][..], &["accuracy"][..]),
        (&[("reward_mean", -0.5)], None, &["reward"], &["KL", "accuracy"]),
        (&[("reward_margin", 0.2)], Some(0.7), &["loss", "accuracy", "reward margin"], &["KL"]),
        (&[], Some(0.7), &["loss"], &["accuracy", "reward"]),
    ] {
        let svg = plot(&entries(4, metrics, accuracy), "a job").unwrap();
        for word in shown {
            assert!(svg.contains(word), "{metrics:?}: {word}\n{svg}");
        }
        for word in hidden {
            assert!(!svg.contains(word), "{metrics:?}: {word}\n{svg}");
        }
        if metrics.is_empty() {
            assert!(svg.contains("-0.5"), "losses may be below 0: {svg}");
        }
    }
    plot(&[], "nothing yet").unwrap();
    plot(&entries(1, &[], None), "one step").unwrap();
}
