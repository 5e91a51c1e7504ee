//! Preference training compared with TRL's trainers: `tests/train/trl.json`, written by
//! `scripts/trl_reference.py`.

use super::Event;
use super::preference::{Objective, PreferenceTrainer};
use crate::gguf::Gguf;
use crate::job::Control;
use crate::job::spec::{Dpo, DpoLoss, Lora, Reward, Spec};
use crate::template::{CHATML, ChatTemplate};
use crate::tokenizer::{Tokenizer, Vocab};
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Encoder, PreparedPairs, prepare_pairs};
use crate::train::model::torch_tests::{start, values, write};
use crate::train::model::{Model, SCORE, Training};
use crate::train::torch_tests::{Numbers, hashed, reference, weight};
use candle_core::Device;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

#[derive(Deserialize)]
struct Trl {
    learning_rate: f64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    kind: String,
    loss: Option<DpoLoss>,
    centering: Option<f64>,
    losses: Vec<f64>,
    #[serde(rename = "final")]
    last: BTreeMap<String, Numbers>,
}

/// A tokenizer with one token per character; the token id is the code point minus this number.
const FIRST: u32 = 0x4E00;

struct Characters(Vocab);

impl Tokenizer for Characters {
    fn vocab(&self) -> &Vocab {
        &self.0
    }

    fn encode(&self, text: &str, _: bool, _: bool) -> Vec<u32> {
        text.chars().map(|character| u32::from(character) - FIRST).collect()
    }
}

/// The pairs of twenty steps, two pairs per step.
fn pairs(folder: &Path, vocab: u32) -> PreparedPairs {
    let mut lines = Vec::new();
    for step in 0..20 {
        for (number, lengths) in [(5, 6, 3), (3, 2, 7)].into_iter().enumerate() {
            let text = |part: &str, count: usize| -> String {
                let name = format!("{part}.{}.{number}", step % 3);
                let token = |z: u32| char::from_u32(FIRST + z % (vocab - 1) + 1).unwrap();
                hashed(&name, count).map(token).collect()
            };
            let line = serde_json::json!({
                "prompt": text("prompt", lengths.0),
                "chosen": text("chosen", lengths.1),
                "rejected": text("rejected", lengths.2),
            });
            lines.push(line.to_string());
        }
    }
    let source = folder.join("pairs.jsonl");
    std::fs::write(&source, lines.join("\n")).unwrap();
    let pieces = (0..vocab).map(|token| (token.to_le_bytes().to_vec(), false, false));
    let encoder = Encoder::new(
        Arc::new(Characters(Vocab::new(pieces))),
        Arc::new(ChatTemplate::compile(CHATML, None, "", "").unwrap()),
        0,
        false,
    );
    prepare_pairs(&source, &encoder, 64, &folder.join("cache")).unwrap().0
}

#[test]
fn pairs_are_trained_as_in_trl() {
    let trl: Trl = serde_json::from_str(include_str!("../../../tests/train/trl.json")).unwrap();
    assert_eq!(trl.cases.len(), 5);
    let reference = reference();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write(&reference, "llama", &path);
    let train = pairs(folder.path(), reference.shape.vocab);
    for case in &trl.cases {
        let steps = case.losses.len();
        let text = format!(
            r#"{{"kind": "sft", "model": "m", "data": {{"train": "f"}}, "adapter": {{"r": 4, "alpha": 8}},
                "train": {{"batch_size": 2, "max_length": 64, "max_steps": {steps}, "warmup": 0,
                "schedule": "constant", "learning_rate": {},
                "optimizer": {{"name": "adamw", "weight_decay": 0.0}}}}}}"#,
            trl.learning_rate
        );
        let spec: Spec = serde_json::from_str(&text).unwrap();
        let lora = spec.adapter.as_ref().unwrap().lora(0).unwrap();
        let file = Arc::new(Gguf::open(&path).unwrap());
        let training = Training::Lora(Lora { rank: 4, ..lora });
        let mut model = Model::load(file, &training, 128, &Device::Cpu).unwrap();
        start(&model);
        let objective: Box<dyn Objective> = match (&case.kind[..], case.loss) {
            ("dpo", Some(loss)) => Box::new(Dpo { loss, ..Dpo::default() }),
            ("reward", None) => {
                let width = model.shape().width;
                model = model.with_head(SCORE, weight("score.weight", width, Some(width))).unwrap();
                let centering = case.centering.unwrap();
                Box::new(Reward { centering, ..Reward::default() })
            }
            other => panic!("{other:?}"),
        };
        let runs = tempfile::tempdir().unwrap();
        let run = PreferenceTrainer {
            model: &model,
            settings: &spec.resolve().unwrap(),
            objective: objective.as_ref(),
            train: &train,
            validation: None,
            checkpoints: &Checkpoints::new(runs.path(), 1).unwrap(),
            shuffle: None,
            reference: &runs.path().join("reference"),
        };
        let mut losses = Vec::new();
        run.run(&Control::default(), |event| {
            if let Event::Step(step) = event {
                losses.push(step.loss);
            }
        })
        .unwrap();
        assert_eq!(losses.len(), steps);
        for (step, (found, loss)) in losses.iter().zip(&case.losses).enumerate() {
            let off = (found - loss).abs() / loss.max(1.0);
            assert!(off < 1e-5, "{objective:?}, step {step}: {found}, TRL {loss}");
        }
        assert_eq!(model.params().len(), case.last.len());
        for param in model.params() {
            let off = case.last[&param.name].distance(&param.name, &values(&param.var));
            assert!(off < 1e-3, "{objective:?}, {} at the end: {off}", param.name);
        }
    }
}
