//! Evaluations of tiny models, and of the default one.

use super::*;
use crate::gguf::TensorType;
use crate::gguf::fixture::{TinyLlama, tiny_bert, tiny_llama};
use crate::grade::Grader;
use crate::job::{
    Control, EVAL_CONTEXT, Entry, EvalTask, EvaluateOrder, EvaluateSpec, Folder, Follower,
    GenerationSettings, JobEvent, JobOrder, Outcome, TaskReport,
};
use std::fs;

fn tiny(folder: &Path, name: &str, ty: TensorType, seed: u64) -> EvalModel {
    let file = folder.join(format!("{name}.gguf"));
    tiny_llama(&file, &TinyLlama { ty, seed, ..TinyLlama::default() }).unwrap();
    EvalModel { name: name.into(), file, adapter: None, ..EvalModel::default() }
}

fn plan(folder: &Path, models: Vec<EvalModel>) -> EvalPlan {
    EvalPlan {
        models,
        text: Some(verify::SAMPLE.to_owned()),
        context: 32,
        chunks: Some(6),
        reference: None,
        save_logits: None,
        tasks: Vec::new(),
        gates: Vec::new(),
        llama_cpp: false,
        threads: 2,
        folder: folder.to_owned(),
    }
}

fn settings(grader: Option<&str>) -> GenerationSettings {
    let grader = grader.map(|text| Grader::parse(serde_json::from_str(text).unwrap()).unwrap());
    GenerationSettings { grader, max_tokens: 6, stop: Vec::new() }
}

fn run(plan: &EvalPlan) -> EvalReport {
    evaluate(plan, &mut |_| ()).unwrap()
}

fn refused(plan: &EvalPlan) -> String {
    evaluate(plan, &mut |_| ()).unwrap_err().to_string()
}

#[test]
fn a_model_is_compared_with_a_reference() {
    let folder = tempfile::tempdir().unwrap();
    let exact = tiny(folder.path(), "exact", TensorType::F32, 1);
    let rounded = tiny(folder.path(), "rounded", TensorType::BF16, 1);
    let other = tiny(folder.path(), "other", TensorType::F32, 2);
    let models = vec![exact.clone(), rounded, other];
    let files = fs::read_dir(folder.path()).unwrap().count();
    let mut plan = plan(folder.path(), models);
    plan.reference = Some(EvalReference::Model(exact));
    plan.gates = vec![Gate::MaxKl(0.01), Gate::MaxPerplexity(1e6)];
    let mut seen = Vec::new();
    let report = evaluate(&plan, &mut |progress| seen.push(progress)).unwrap();
    assert_eq!(report.text, Some(TextFacts { context: 32, chunks: 6, counted: 6 * 15 }));
    let of = |number: usize| report.models[number].divergence.as_ref().unwrap();
    // The file rounds log-probabilities to 16 nats / 65535.
    assert!(of(0).mean_kl.value.abs() < 1e-6, "{:?}", of(0));
    assert_eq!((of(0).top1_agreement.value, of(0).top1_agreement.count), (1.0, 90));
    assert!(of(0).log_perplexity_ratio.value.abs() < 1e-4);
    let rounded = of(1);
    assert!((1e-7..1e-2).contains(&rounded.mean_kl.value), "{rounded:?}");
    assert!(
        rounded.mean_kl.low < rounded.mean_kl.value && rounded.mean_kl.value < rounded.mean_kl.high
    );
    assert!(rounded.median_kl <= rounded.p99_kl && rounded.p999_kl <= rounded.max_kl);
    assert!(of(2).mean_kl.value > 10.0 * rounded.mean_kl.value, "{:?}", of(2));
    assert!(
        (of(2).reference_perplexity / report.models[0].perplexity.unwrap().value - 1.0).abs()
            < 1e-4
    );
    // Two gates for three models; the model with other weights is too far away.
    let failed: Vec<_> = report.gates.iter().filter(|gate| !gate.passed).collect();
    assert_eq!((report.gates.len(), failed.len(), failed[0].model.as_str()), (6, 1, "other"));
    assert!(!report.passed());
    assert!(seen.contains(&EvalProgress::Loading("other".into())), "{seen:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), files, "nothing is left behind");
    let page = report.html().unwrap();
    assert_eq!(page.matches("<svg").count(), 2);
    assert!(page.contains("failed") && page.contains("same top token"), "{page}");
}

#[test]
fn saved_log_probabilities_take_the_place_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let exact = tiny(folder.path(), "exact", TensorType::F32, 1);
    let rounded = tiny(folder.path(), "rounded", TensorType::BF16, 1);
    let mut plan = plan(folder.path(), vec![rounded]);
    let saved = folder.path().join("base.logits");
    plan.reference = Some(EvalReference::Model(exact));
    plan.save_logits = Some(saved.clone());
    let first = run(&plan);
    let later = EvalPlan {
        text: None,
        context: EVAL_CONTEXT,
        chunks: None,
        reference: Some(EvalReference::BaseLogits(saved.clone())),
        save_logits: None,
        ..plan.clone()
    };
    let second = run(&later);
    let kl = |report: &EvalReport| report.models[0].divergence.as_ref().unwrap().mean_kl;
    assert_eq!(kl(&first), kl(&second));
    assert_eq!(first.text, second.text);
    assert!(saved.exists());
    // llama.cpp computes the same, up to the rounding of activations.
    let peer = run(&EvalPlan { llama_cpp: true, ..later.clone() });
    let perplexity = |report: &EvalReport| report.models[0].perplexity.unwrap().value;
    assert!((perplexity(&peer) / perplexity(&second) - 1.0).abs() < 1e-2);
    // A model that reads less than a chunk cannot be compared.
    let file = folder.path().join("short.gguf");
    tiny_llama(&file, &TinyLlama { n_ctx: 16, ..TinyLlama::default() }).unwrap();
    let short = EvalModel { name: "short".into(), file, adapter: None, ..EvalModel::default() };
    let error = refused(&EvalPlan { models: vec![short], ..later });
    assert!(error.contains("short") && error.contains("vocabulary"), "{error}");
}

#[test]
fn a_perplexity_is_that_of_single_predictions() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), "m", TensorType::F32, 1);
    let plan = plan(folder.path(), vec![model.clone()]);
    let report = run(&plan);
    // One prediction after another, each from an empty cache.
    let mut scorer = Scorer::load(&model, 64, false, 1).unwrap();
    let header = perplexity::cut(&scorer, verify::SAMPLE, 32, Some(6)).unwrap();
    let vocabulary = scorer.vocabulary();
    let (mut sum, mut bytes) = (0.0, 0);
    let tokenizer = scorer.tokenizer();
    for chunk in header.tokens.chunks(32) {
        let mut inputs = chunk.to_vec();
        if let (Some(bos), Some(&first)) =
            (tokenizer.vocab().bos, tokenizer.encode_prompt("a", true, false).first())
            && bos == first
        {
            inputs[0] = bos;
        }
        for at in 16..31 {
            let mut row = Vec::new();
            let mut fresh = Scorer::load(&model, 64, false, 1).unwrap();
            fresh
                .read(&inputs[..=at], at..at + 1, &mut |_, logits| {
                    row = logits.to_vec();
                    Ok(())
                })
                .unwrap();
            assert_eq!(row.len(), vocabulary);
            sum += perplexity::nll(&row, chunk[at + 1]);
            bytes += tokenizer.vocab().piece(chunk[at + 1]).len();
        }
    }
    let found = &report.models[0];
    let right = (sum / 90.0).exp();
    assert!((found.perplexity.unwrap().value / right - 1.0).abs() < 1e-6, "{found:?}, not {right}");
    let bits = sum / std::f64::consts::LN_2 / bytes as f64;
    assert!((found.bits_per_byte.unwrap().value / bits - 1.0).abs() < 1e-6);
    // Tokens that are in the cache already change nothing.
    let read = |scorer: &mut Scorer, from: usize| {
        let mut rows = Vec::new();
        let mut each = |_: usize, logits: &[f32]| {
            rows.extend_from_slice(logits);
            Ok(())
        };
        scorer.read(&header.tokens[..32], from..31, &mut each).unwrap();
        rows
    };
    let first = read(&mut scorer, 20);
    assert_eq!(read(&mut scorer, 20), first);
    assert_eq!(read(&mut scorer, 10)[10 * vocabulary..], first);
}

#[test]
fn an_answer_has_the_probability_of_its_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), "m", TensorType::F32, 1);
    let line = |answer: usize| {
        format!(
            r#"{{"prompt": "Which one?", "choices": ["a", "some words", "b"], "answer": {answer}}}"#
        )
    };
    let accuracy = |lines: &[usize], shots: usize| {
        let text: Vec<_> = lines.iter().map(|answer| line(*answer)).collect();
        let mut plan = plan(folder.path(), vec![model.clone()]);
        plan.text = None;
        plan.tasks = vec![EvalTask::parse("t", &text.join("\n"), shots, settings(None)).unwrap()];
        plan.gates = vec![Gate::MinAccuracy { task: "t".into(), least: 0.5 }];
        let report = run(&plan);
        (report.models[0].tasks["t"].clone(), report.passed())
    };
    // The model prefers one of three: it is right for one of the three possible answers.
    let (found, passed) = accuracy(&[0, 1, 2], 0);
    let TaskReport::MultipleChoice { accuracy: right, normalized_accuracy } = found else {
        panic!("{found:?}")
    };
    assert_eq!((right.count, passed), (3, false));
    assert!((right.value - 1.0 / 3.0).abs() < 1e-9);
    assert!((normalized_accuracy.value - 1.0 / 3.0).abs() < 1e-9);
    assert_eq!(accuracy(&[0, 1, 2], 2).0.questions(), 1);
}

#[test]
fn written_answers_are_graded() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), "m", TensorType::F32, 1);
    // What the model writes, read one prediction after another.
    let mut scorer = Scorer::load(&model, 64, false, 1).unwrap();
    let tokenizer = scorer.tokenizer();
    let mut tokens = tokenizer.encode_prompt("Say something:", true, false);
    let asked = tokens.len();
    while tokens.len() < asked + 6 {
        let (last, mut best) = (tokens.len() - 1, 0);
        let mut each = |_: usize, logits: &[f32]| {
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            best = logits.iter().position(|x| *x == largest).unwrap() as u32;
            Ok(())
        };
        scorer.read(&tokens, last..last + 1, &mut each).unwrap();
        if tokenizer.vocab().ends_generation(best) {
            break;
        }
        tokens.push(best);
    }
    let bytes: Vec<u8> =
        tokens[asked..].iter().flat_map(|token| tokenizer.vocab().piece(*token).to_vec()).collect();
    let right = String::from_utf8_lossy(&bytes).into_owned();
    let line = |answer: &str| {
        serde_json::json!({"prompt": "Say something: ", "answer": answer}).to_string()
    };
    let grader = r#"{"type": "string_check", "name": "s", "operation": "eq",
        "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}"#;
    let mut plan = plan(folder.path(), vec![model]);
    plan.text = None;
    let lines = [line(&right), line("other")].join("\n");
    let mut task = EvalTask::parse("t", &lines, 0, settings(Some(grader))).unwrap();
    plan.tasks = vec![task.clone()];
    plan.gates = vec![Gate::MinAccuracy { task: "t".into(), least: 0.5 }];
    let report = run(&plan);
    let TaskReport::Generation { questions, reward, samples, .. } = &report.models[0].tasks["t"]
    else {
        panic!("{report:?}")
    };
    assert_eq!((*questions, reward.value, report.passed()), (2, 0.5, true));
    assert_eq!((samples[0].answer.as_str(), samples[0].reward), (right.as_str(), 1.0));
    assert!(report.html().unwrap().contains("Say something:"));
    // An answer ends before a stop text.
    let Questions::Generation(generation) = &mut task.questions else { panic!("{task:?}") };
    let stop: String = right.chars().skip(1).take(2).collect();
    generation.stop = vec![stop.clone()];
    plan.tasks = vec![task];
    let report = run(&plan);
    let TaskReport::Generation { samples, ended, .. } = &report.models[0].tasks["t"] else {
        panic!("{report:?}")
    };
    assert_eq!(samples[0].answer, right[..right.find(&stop).unwrap()]);
    assert_eq!(ended.value, 1.0);
}

#[test]
fn what_cannot_be_measured_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), "m", TensorType::F32, 1);
    let good = plan(folder.path(), vec![model.clone()]);
    let short = EvalPlan { text: Some("a b".into()), ..good.clone() };
    assert!(refused(&short).contains("two chunks of 32"), "{}", refused(&short));
    let gate = |gate| refused(&EvalPlan { gates: vec![gate], ..good.clone() });
    assert!(gate(Gate::MaxKl(1.0)).contains("--max-kl"));
    assert!(gate(Gate::MinAccuracy { task: "t".into(), least: 0.1 }).contains("`t`"));
    let file = folder.path().join("bert.gguf");
    tiny_bert(&file).unwrap();
    let bert = EvalModel { name: "bert".into(), file, adapter: None, ..EvalModel::default() };
    assert!(refused(&plan(folder.path(), vec![bert])).contains("bert: this model cannot generate"));
    let file = folder.path().join("cut.gguf");
    let bytes = fs::read(&model.file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let cut = EvalModel { name: "cut".into(), file, adapter: None, ..EvalModel::default() };
    assert!(refused(&plan(folder.path(), vec![cut])).starts_with("cut: "));
    let long =
        format!(r#"{{"prompt": "{}", "choices": ["a", "b"], "answer": 0}}"#, "word ".repeat(4000));
    let tasks = vec![EvalTask::parse("t", &long, 0, settings(None)).unwrap()];
    let error = refused(&EvalPlan { tasks, ..good.clone() });
    assert!(error.contains("task t, question 1"), "{error}");
}

/// Needs the default model's file, which CI provides.
#[test]
fn the_default_model_has_llama_cpps_perplexity() {
    let model = std::env::var_os("INGOT_TEST_MODEL").map(PathBuf::from);
    assert!(model.is_some() || std::env::var_os("CI").is_none(), "CI sets INGOT_TEST_MODEL");
    let Some(file) = model else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = EvalModel { name: "smollm2".into(), file, adapter: None, ..EvalModel::default() };
    let mut plan = plan(folder.path(), vec![model]);
    (plan.context, plan.chunks) = (256, Some(3));
    let perplexity = |llama_cpp| {
        let report = run(&EvalPlan { llama_cpp, ..plan.clone() });
        report.models[0].perplexity.unwrap().value
    };
    let (ours, theirs) = (perplexity(false), perplexity(true));
    assert!((2.0..100.0).contains(&ours), "{ours}");
    // Both round activations, each in its own way.
    assert!((ours / theirs - 1.0).abs() < 0.02, "{ours} and {theirs}");
}

#[test]
fn a_job_evaluates_and_fails_if_a_bound_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let [exact, rounded] = [("exact", TensorType::F32), ("rounded", TensorType::BF16)]
        .map(|(name, ty)| tiny(folder.path(), name, ty, 1));
    let path = |name: &str| folder.path().join(name);
    fs::write(path("text.txt"), verify::SAMPLE).unwrap();
    fs::write(
        path("task.jsonl"),
        "{\"prompt\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 0}\n",
    )
    .unwrap();
    let run_job = |name: &str, more: &str| {
        let spec = format!(
            r#"{{"kind": "evaluate", "evaluate": {{"models": ["rounded"], "reference": "exact",
                "text": "file-1", "context": 32, "chunks": 4,
                "tasks": [{{"name": "t", "file": "file-2"}}]{more}}}}}"#
        );
        let spec: EvaluateSpec = serde_json::from_str(&spec).unwrap();
        assert_eq!(spec.check(), Ok(()));
        let order = EvaluateOrder {
            version: 1,
            id: name.into(),
            name: spec.new_name(),
            spec,
            models: vec![rounded.clone()],
            reference: Some(exact.clone()),
            text: Some(path("text.txt")),
            tasks: vec![path("task.jsonl")],
        };
        let job = Folder::new(path(name));
        job.create(&JobOrder::Evaluate(order)).unwrap();
        let done = crate::job::run(&job, &Control::default(), |order, work| match order {
            JobOrder::Evaluate(order) => super::job::carry_out(order, work),
            other => panic!("{other:?}"),
        });
        assert!(done.unwrap());
        assert!(!job.cache().exists(), "the log-probabilities of the reference are deleted");
        let report = fs::read_to_string(job.artifacts().join(EvaluateOrder::JSON)).ok();
        let events = Follower::new(job.events(), 0).read().unwrap();
        (job.outcome().unwrap().unwrap(), report, events)
    };
    let (outcome, report, events) = run_job("good", r#", "max_kl": 0.1"#);
    let Outcome::Succeeded { artifacts, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(artifacts.len(), 2);
    let report: serde_json::Value = serde_json::from_str(&report.unwrap()).unwrap();
    let found = &report["report"]["models"][0];
    assert!(found["divergence"]["mean_kl"]["value"].as_f64().unwrap() > 0.0, "{found}");
    assert_eq!(found["tasks"]["t"]["accuracy"]["count"], 1);
    let worked = |entry: &Entry| matches!(entry.event, JobEvent::Progress { .. });
    assert!(events.iter().any(worked), "{events:?}");

    // The report of a model that misses a bound is there all the same.
    let (outcome, report, _) = run_job("missed", r#", "max_kl": 0"#);
    let Outcome::Failed { failure, artifacts } = outcome else { panic!("{outcome:?}") };
    assert_eq!((failure.code.as_str(), artifacts.len()), ("gate_missed", 2));
    assert!(failure.message.contains("rounded: mean KL"), "{failure:?}");
    assert!(report.is_some());

    fs::write(path("task.jsonl"), "{}\n").unwrap();
    let (outcome, report, _) = run_job("bad", "");
    let Outcome::Failed { failure, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(failure.param.as_deref(), Some("evaluate.tasks[0]"), "{failure:?}");
    assert!(report.is_none());
}
