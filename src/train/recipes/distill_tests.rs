//! Distillation of tiny models, in a job's folder as its process does.

use crate::gguf::fixture::TinyDecoder;
use crate::gguf::{Array, Gguf, GgufWriter, ModelConfig, Value};
use crate::job::spec::Spec;
use crate::job::{
    ArtifactKind, Control, Entry, Folder, Follower, JobEvent, Order, Outcome, StepMetrics,
};
use crate::train::process;
use std::fs;
use std::path::Path;

/// A job with the model `base.gguf`, and a teacher of the same kind with other weights.
fn job(folder: &Path, block: &str, more: &str) -> Folder {
    let path = |name: &str| folder.join(name);
    TinyDecoder::new("llama").write(&path("base.gguf")).unwrap();
    TinyDecoder { seed: 77, ..TinyDecoder::new("llama") }.write(&path("teacher.gguf")).unwrap();
    let line = |i: usize| {
        let (prompt, completion) = ("ab".repeat(i % 5 + 1), "cd".repeat(i % 3 + 1));
        format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{completion}\"}}\n")
    };
    fs::write(path("train.jsonl"), (0..24).map(line).collect::<String>()).unwrap();
    fs::write(path("valid.jsonl"), (0..5).map(line).collect::<String>()).unwrap();
    let text = format!(
        r#"{{"kind": "distill", "model": "tiny", "data": {{"train": "t"}}, "distill": {block},
            "train": {{"max_length": 48, "batch_size": 4, "epochs": 4, "eval_every": 6,
            "checkpoint_every": 3, "learning_rate": 0.01}}{more}}}"#
    );
    let spec: Spec = serde_json::from_str(&text).unwrap();
    let mut order = Order::new("ftjob-1".into(), spec, "student".into(), path("train.jsonl"));
    order.model = Some(path("base.gguf"));
    order.validation = Some(path("valid.jsonl"));
    if block.contains("teacher") {
        order.teacher = Some(path("teacher.gguf"));
    }
    let job = Folder::new(path("job"));
    job.create(&order.into()).unwrap();
    job
}

fn go(job: &Folder) -> Outcome {
    assert!(process::run(job, &Control::new(job)).unwrap());
    job.outcome().unwrap().unwrap()
}

fn succeeded(job: &Folder) {
    let outcome = go(job);
    assert!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
}

fn events(job: &Folder) -> Vec<Entry> {
    Follower::new(job.events(), 0).read().unwrap()
}

fn steps(job: &Folder) -> Vec<StepMetrics> {
    let steps = events(job).into_iter().filter_map(|entry| match entry.event {
        JobEvent::Step(step) => Some(step),
        _ => None,
    });
    steps.collect()
}

fn report(job: &Folder) -> serde_json::Value {
    let text = fs::read_to_string(job.artifacts().join("distillation.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_student_comes_closer_to_its_teacher() {
    for (block, more, metric) in [
        (r#"{"teacher": "t", "top_k": 8}"#, r#", "adapter": {"r": 4}"#, "divergence"),
        (
            r#"{"teacher": "t", "divergence": "reverse_kl", "temperature": 1.5}"#,
            r#", "adapter": null"#,
            "divergence",
        ),
        (r#"{"teacher": "t", "divergence": "jsd"}"#, r#", "adapter": null"#, "divergence"),
        // The teacher's weights are random: it does not predict the data's tokens.
        (r#"{"teacher": "t", "cross_entropy": 0.9}"#, r#", "adapter": null"#, "cross_entropy"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path(), block, more);
        succeeded(&job);
        let steps = steps(&job);
        let value = |step: &StepMetrics| step.metrics[metric];
        let (first, last) = (value(&steps[0]), value(steps.last().unwrap()));
        assert!(last < 0.7 * first, "{block}: {metric} {first} to {last}");
    }
}

#[test]
fn a_student_is_cut_from_its_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path(), r#"{"layers": 1}"#, "");
    let Outcome::Succeeded { artifacts, .. } = go(&job) else { panic!("{:?}", job.outcome()) };
    let model = artifacts.iter().find(|artifact| artifact.kind == ArtifactKind::Model).unwrap();
    let model = Gguf::open(job.path().join(&model.file)).unwrap();
    assert_eq!(ModelConfig::read(&model).unwrap().layers, 1);
    let messages: Vec<_> = events(&job).into_iter().map(|entry| entry.message).collect();
    let removed: Vec<_> = messages.iter().filter(|text| text.contains("is removed")).collect();
    assert_eq!(removed.len(), 2, "{messages:?}");
    assert!(removed[1].ends_with("1 layers are left."), "{messages:?}");
    let found = report(&job);
    let number = |key: &str| found[key].as_f64().unwrap_or_else(|| panic!("{key}: {found}"));
    assert!(number("student") < number("student_before"), "{found}");
    assert!(!job.fresh().exists(), "the student's first weights are deleted");
}

#[test]
fn a_job_that_was_stopped_goes_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, cut] = ["a", "b"].map(|name| {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        job(&folder, r#"{"layers": 1, "top_k": 5}"#, "")
    });
    succeeded(&whole);
    let stopped = Control::default();
    stopped.stop();
    assert!(!process::run(&cut, &stopped).unwrap());
    assert!(!cut.fresh().exists());
    for _ in 0..100 {
        let control = Control::default();
        let ended = std::thread::scope(|scope| {
            let running = scope.spawn(|| process::run(&cut, &control).unwrap());
            let before = steps(&cut).len();
            while !running.is_finished() && steps(&cut).len() < before + 5 {
                std::thread::yield_now();
            }
            control.stop();
            running.join().unwrap()
        });
        if ended {
            break;
        }
        assert!(cut.fresh().exists() && cut.cache().join("teacher.train").exists());
    }
    let weights = |job: &Folder| fs::read(job.artifacts().join("model.gguf")).unwrap();
    assert!(weights(&whole) == weights(&cut));
    assert_eq!(report(&whole), report(&cut));
}

#[test]
fn a_teacher_with_another_tokenizer_is_refused() {
    let failure = |job: &Folder| match go(job) {
        Outcome::Failed { failure, .. } => failure.message,
        other => panic!("{other:?}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let foreign = job(folder.path(), r#"{"teacher": "t"}"#, "");
    let path = folder.path().join("teacher.gguf");
    let teacher = Gguf::open(&path).unwrap();
    let mut writer = GgufWriter::new();
    writer.copy_metadata(&teacher, |_| true);
    let key = "tokenizer.ggml.tokens";
    let Some(Value::Array(Array::String(tokens))) = teacher.get(key) else { panic!("no tokens") };
    let mut tokens = tokens.clone();
    tokens[70] += "x";
    writer.set(key, Value::Array(Array::String(tokens)));
    for tensor in teacher.tensors() {
        let data = teacher.data(tensor.name()).unwrap();
        writer.tensor(tensor.name(), tensor.dims(), tensor.ty(), data).unwrap();
    }
    writer.write(&path).unwrap();
    let why = failure(&foreign);
    assert!(why.starts_with("distill.teacher: its tokenizer is not the student's"), "{why}");
    assert!(why.contains("token 70"), "{why}");
}
