use super::pretrain::{PretrainTrainer, init_pretrain};
use super::*;
use crate::gguf::{Gguf, TensorType};
use crate::job::Control;
use crate::job::spec::{Resolved, Spec};
use crate::tokenizer::native::NativeTokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Stream, prepare_stream};
use crate::train::export::model_gguf;
use crate::train::model::{Model, Training};
use candle_core::Device;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// Lines of five letters out of eight, each written twice.
fn twice(lines: u32) -> String {
    let mut state = 1u32;
    let mut letter = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (state >> 29) as u8)
    };
    let mut line = || {
        let word: String = (0..5).map(|_| letter()).collect();
        format!("{word}{word}\n")
    };
    (0..lines).map(|_| line()).collect()
}

/// The folder of a test job: data, the initial model, and the token streams.
struct Job {
    folder: TempDir,
    spec: Spec,
    settings: Resolved,
    file: Arc<Gguf>,
    tokenizer: NativeTokenizer,
    train: Stream,
    validation: Stream,
}

fn job(text: &str, block: &str, train: &str, parent: Option<&Path>) -> Job {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("data"), text).unwrap();
    let who = match parent {
        Some(_) => r#""model": "parent""#,
        None => r#""name": "fresh""#,
    };
    let spec = format!(
        r#"{{"kind": "pretrain", {who}, "seed": 1, "data": {{"train": "data"}},
            "pretrain": {{{block}}}, "train": {{{train}}}}}"#
    );
    let spec: Spec = serde_json::from_str(&spec).unwrap();
    let settings = spec.resolve().unwrap();
    let block = spec.task.settings().new_model().unwrap().clone();
    let begin = parent.map_or(path("start.gguf"), Path::to_owned);
    init_pretrain(&block, None, &path("data"), "fresh", spec.seed, &begin).unwrap();
    let file = Arc::new(Gguf::open(&begin).unwrap());
    let tokenizer = NativeTokenizer::from_gguf(&file).unwrap();
    let (all, _) = prepare_stream(&path("data"), &tokenizer, &path("tokens"), |_| {}).unwrap();
    let (train, validation) = all.hold_out(block.held_out());
    Job { folder, spec, settings, file, tokenizer, train, validation }
}

impl Job {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn model(&self) -> Model {
        let context = self.settings.max_length;
        Model::load(self.file.clone(), &Training::Full, context, &Device::Cpu).unwrap()
    }

    fn with<T>(&self, model: &Model, folder: &str, then: impl FnOnce(&PretrainTrainer) -> T) -> T {
        let checkpoints = Checkpoints::new(&self.path(folder), 2).unwrap();
        then(&PretrainTrainer {
            model,
            settings: &self.settings,
            train: &self.train,
            validation: Some(&self.validation),
            checkpoints: &checkpoints,
            tokenizer: &self.tokenizer,
            seed: self.spec.seed,
            shuffle: Some(self.spec.seed),
            prompt: None,
        })
    }
}

fn weights(model: &Model) -> Vec<Vec<f32>> {
    let flat =
        |param: &crate::train::optim::Param| param.var.flatten_all().unwrap().to_vec1().unwrap();
    model.params().iter().map(flat).collect()
}

const BLOCK: &str = r#""width": 64, "layers": 2, "heads": 2, "context": 44, "held_out": 0.01,
    "tokenizer": {"vocab_size": 256}"#;

#[test]
fn what_was_said_before_is_learned() {
    // Of eleven letters, five are random: ln 8 each, which is 0.945 nats per letter, and somewhat
    // more because windows begin in the middle of a line. A model that does not attend to the first
    // copy of the line has ten random letters: 1.89 nats per letter.
    let train = r#""max_steps": 200, "batch_size": 16, "learning_rate": 0.003, "eval_every": 100,
        "checkpoint_every": 200"#;
    let job = job(&twice(20_000), BLOCK, train, None);
    let model = job.model();
    let (mut evaluated, mut samples) = (Vec::new(), Vec::new());
    let outcome = job.with(&model, "runs", |pretrain| {
        pretrain.run(&Control::default(), |event| match event {
            Event::Evaluated(found) => evaluated.push(found),
            Event::Sample { text, .. } => samples.push(text),
            _ => {}
        })
    });
    assert!(matches!(outcome.unwrap(), Outcome::Done { .. }));
    assert_eq!((evaluated.len(), samples.len()), (2, 2));
    assert!(evaluated[1].loss.unwrap() < 1.4, "{evaluated:?}");
    let of_the_kind = |text: &str| text.chars().all(|c| matches!(c, 'a'..='h' | '\n'));
    assert!(samples[1].len() > 90 && of_the_kind(&samples[1]), "{samples:?}");
    // Each token is one byte, except for the end-of-text token.
    let bits = evaluated[1].loss.unwrap() / std::f64::consts::LN_2;
    let targets = (job.validation.len() - 1) as f64;
    let expected = bits * targets / (targets - 1.0);
    let found = evaluated[1].bits_per_byte.unwrap();
    assert!((found - expected).abs() < 1e-9, "{found}, {expected}");

    // The exported model equals the trained one, and training can continue from it.
    let path = job.path("model.gguf");
    model_gguf(&model, None, &job.file, TensorType::F32, &[], &path).unwrap();
    let train = r#""max_steps": 1, "max_length": 44, "learning_rate": 1e-5"#;
    let again = self::job(&twice(20_000), r#""held_out": 0.01"#, train, Some(&path));
    let model = again.model();
    let begun = again
        .with(&model, "runs", |pretrain| pretrain.loops().evaluate(&pretrain.source(), 0))
        .unwrap()
        .unwrap();
    // Equal except for the order of summation.
    assert!((begun.loss.unwrap() - evaluated[1].loss.unwrap()).abs() < 1e-6, "{begun:?}");
    let mut losses = Vec::new();
    let outcome = again.with(&model, "runs", |pretrain| {
        pretrain.run(&Control::default(), |event| {
            if let Event::Step(progress) = event {
                losses.push(progress.loss);
            }
        })
    });
    assert!(matches!(outcome.unwrap(), Outcome::Done { .. }));
    assert!(losses.len() == 1 && losses[0] < 1.4, "{losses:?}");
}

#[test]
fn an_interrupted_pretraining_ends_with_the_same_bits() {
    // Documents of a few tokens, three epochs, an incomplete last batch, both optimizers.
    let line = |i: u32| format!("{{\"text\": \"{} and {}\"}}\n", i * 7919 % 1000, i % 13);
    let text: String = (0..160).map(line).collect();
    for optimizer in ["adamw", "muon"] {
        let train = format!(
            r#""epochs": 3, "batch_size": 7, "micro_batch": 2, "max_length": 24, "eval_every": 9,
                "checkpoint_every": 4, "optimizer": {{"name": "{optimizer}"}}"#
        );
        let block = r#""width": 32, "layers": 1, "heads": 1, "context": 32,
            "tokenizer": {"vocab_size": 280}"#;
        let job = job(&text, block, &train, None);
        let run = |folder: &str, stops: &[u64]| {
            let (mut stops, mut losses) = (stops.iter().copied(), Vec::new());
            loop {
                // Loads everything again, as a new process does.
                let (model, at) = (job.model(), stops.next());
                let control = Control::default();
                let outcome = job.with(&model, folder, |pretrain| {
                    pretrain.run(&control, |event| {
                        let Event::Step(progress) = event else { return };
                        losses.push(progress.loss);
                        if Some(progress.step) == at {
                            control.stop();
                        }
                    })
                });
                if let Outcome::Done { .. } = outcome.unwrap() {
                    return (losses, weights(&model));
                }
            }
        };
        let whole = run("whole", &[]);
        assert!(whole.0.len() > 14, "{:?}", whole.0);
        assert_eq!(run("parts", &[1, 4, 5, 13]), whole);
    }
}

#[test]
fn a_tokenizer_can_be_taken_from_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("data"), "some text, some more text".repeat(20)).unwrap();
    let block = |text: &str| serde_json::from_str::<crate::job::spec::Pretrain>(text).unwrap();
    let trained = block(r#"{"depth": 1, "tokenizer": {"vocab_size": 270}}"#);
    init_pretrain(&trained, None, &path("data"), "a", 1, &path("a.gguf")).unwrap();
    let parent = Gguf::open(path("a.gguf")).unwrap();
    let taken = block(r#"{"depth": 2, "tokenizer": {"from": "a"}}"#);
    init_pretrain(&taken, Some(&parent), &path("none"), "b", 1, &path("b.gguf")).unwrap();
    let made = Gguf::open(path("b.gguf")).unwrap();
    for key in ["tokens", "merges", "token_type", "pre", "eos_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        assert_eq!(made.get(&key), parent.get(&key), "{key}");
    }
    assert_eq!(made.tensor("token_embd.weight").unwrap().dims(), [128, 270]);
    let error = init_pretrain(&taken, None, &path("data"), "c", 1, &path("c.gguf")).unwrap_err();
    assert!(error.to_string().contains("`a` is not open"), "{error}");
}
