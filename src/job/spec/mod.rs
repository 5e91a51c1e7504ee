//! Job specifications: as users write them ([`Spec`]), and with every default filled in
//! ([`Resolved`]).

mod adapter;
mod constitutional;
mod device;
mod distill;
mod dpo;
mod grpo;
mod optimizer;
mod policy_loss;
mod ppo;
mod pretrain;
mod reward;
mod reward_source;
mod schedule;
mod sft;
mod task;

pub use adapter::{Adapter, Lora, Targets};
pub use constitutional::{
    Constitution, Constitutional, PairSource, PreferenceMethod, Principle, RevisionExample, Stage,
};
pub use device::TrainDevice;
pub use distill::{Distill, Divergence};
pub use dpo::{Dpo, DpoLoss};
pub use grpo::Grpo;
pub use optimizer::Optimizer;
pub use policy_loss::{Correction, GrpoLoss, PolicyLoss, PpoLoss};
pub use ppo::Ppo;
pub use pretrain::{BYTES, Pretrain, Shape, Tokenizer, TokenizerPlan};
pub use reward::Reward;
pub use reward_source::{Rank, RewardSource};
pub use schedule::Schedule;
pub use sft::Sft;
pub(crate) use task::for_task;
pub use task::{Task, TaskSettings, Weights};

use serde::{Deserialize, Serialize};
use task::Written;

/// Version of the [`Spec`] format. A newer Ingot either reads this version or rejects it with an
/// error.
pub const VERSION: u32 = 1;

/// The specification of a job, in JSON or TOML. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct Spec {
    /// Version of the specification format, [`VERSION`].
    pub version: u32,
    #[serde(flatten)]
    pub task: Task,
    /// The model to continue training from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Name of the new model if it is trained from random weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Part of the new model's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    pub seed: u64,
    pub data: Data,
    /// `null` trains all weights. Some kinds train only an adapter, or always all weights.
    pub adapter: Option<Adapter>,
    pub train: Train,
    #[serde(default)]
    pub export: Export,
}

/// Files written at the end of the job in addition to the adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Storage type of the model's matrices; F16 by default.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub ty: Option<WeightType>,
    /// Also writes the base model with the adapter merged into it, as a separate model.
    pub merged: bool,
    /// Also writes a folder that transformers can load. Pretraining always writes one.
    pub hugging_face: bool,
}

/// Storage type of matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightType {
    F32,
    F16,
    BF16,
    /// llama.cpp's Q8_0: blocks of 32 weights that share a scale. Transformers cannot load this
    /// type, so a Hugging Face folder is then stored as F16.
    #[serde(rename = "Q8_0")]
    Q8,
}

impl TryFrom<Written> for Spec {
    type Error = String;

    fn try_from(mut written: Written) -> Result<Self, String> {
        let task = written.task()?;
        let Written { version, model, name, suffix, seed, data, train, export, .. } = written;
        if version != VERSION {
            return Err(format!("version: this is {version}, and this Ingot knows {VERSION}"));
        }
        let adapter = match (task.settings().weights(), written.adapter) {
            (Weights::All(why), Some(Some(_))) | (Weights::Adapter(why), Some(None)) => {
                return Err(format!("adapter: {why}; leave it out"));
            }
            (Weights::All(_), _) => None,
            (_, None) => Adapter::usual(),
            (_, Some(adapter)) => adapter,
        };
        Ok(Self { version, task, model, name, suffix, seed, data, adapter, train, export })
    }
}

/// Sources of the examples: ids of uploaded files, or paths on the command line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub train: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
    /// Preference pairs labelled by people, on which the judge of a constitutional job is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub human: Option<String>,
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Parses control tokens that are spelled out in the text of user and tool messages as control
    /// tokens. By default they are tokenized as plain text.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parse_control_tokens: bool,
}

/// Training settings. The defaults of missing ones depend on the other settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Ends training after this number of minutes. The learning-rate schedule is not shortened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_minutes: Option<f64>,
    /// Examples per optimizer step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,
    /// Packed rows per forward and backward pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// Maximum number of tokens in a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Fraction of the steps in which the learning rate rises.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<f64>,
    /// The same as a number of steps, in place of `warmup`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u64>,
    /// Number of checkpoints to keep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_checkpoints: Option<usize>,
    /// Keeps the weights whose validation was the best, in place of the last ones. By default
    /// policies with validation data do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_best_model_at_end: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<TrainDevice>,
    /// Recomputes the inner activations of each layer in the backward pass instead of storing them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_checkpointing: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
}

fn version() -> u32 {
    VERSION
}
fn yes() -> bool {
    true
}
/// Training settings with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// Passes over the data; `None`: as many as `max_steps` needs.
    pub epochs: Option<f64>,
    pub max_steps: Option<u64>,
    pub max_minutes: Option<f64>,
    pub batch_size: usize,
    pub micro_batch: usize,
    pub max_length: usize,
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup: f64,
    /// Takes precedence over `warmup`.
    pub warmup_steps: Option<u64>,
    pub eval_every: u64,
    pub checkpoint_every: u64,
    pub keep_checkpoints: usize,
    pub load_best_model_at_end: bool,
    pub threads: usize,
    pub device: TrainDevice,
    pub activation_checkpointing: bool,
    pub optimizer: Optimizer,
}

impl Spec {
    /// The specification with every default filled in, as a record of the settings that a job used.
    pub fn filled(&self, settings: &Resolved) -> Self {
        let settings = settings.clone();
        let train = Train {
            epochs: settings.epochs,
            max_steps: settings.max_steps,
            max_minutes: settings.max_minutes,
            batch_size: Some(settings.batch_size),
            micro_batch: Some(settings.micro_batch),
            max_length: Some(settings.max_length),
            learning_rate: Some(settings.learning_rate),
            schedule: Some(settings.schedule),
            warmup: settings.warmup_steps.is_none().then_some(settings.warmup),
            warmup_steps: settings.warmup_steps,
            eval_every: Some(settings.eval_every),
            checkpoint_every: Some(settings.checkpoint_every),
            keep_checkpoints: Some(settings.keep_checkpoints),
            load_best_model_at_end: Some(settings.load_best_model_at_end),
            threads: Some(settings.threads),
            device: Some(settings.device),
            activation_checkpointing: Some(settings.activation_checkpointing),
            optimizer: Some(settings.optimizer),
        };
        Self { train, ..self.clone() }
    }

    /// Whether a folder for transformers is written: if asked for, and by kinds that create models.
    pub fn writes_hugging_face(&self) -> bool {
        self.export.hugging_face || self.task.settings().new_model().is_some()
    }

    /// The model whose tokenizer a new model takes.
    pub fn tokenizer_from(&self) -> Option<&String> {
        self.task.settings().new_model()?.tokenizer.as_ref()?.from.as_ref()
    }

    /// Fills in the defaults, and checks everything that needs neither the model nor the data.
    ///
    /// # Errors
    /// The key that is wrong and the values it may have.
    pub fn resolve(&self) -> Result<Resolved, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let fits = |text: &str| (1..=64).contains(&text.len()) && text.chars().all(plain);
        if self.suffix.as_ref().is_some_and(|suffix| !fits(suffix)) {
            return Err(
                "suffix: it has 1 to 64 letters, digits, dots, dashes or underscores".into()
            );
        }
        if let Some(adapter) = &self.adapter {
            within("adapter.r", adapter.r as f64, 1.0, 8192.0)?;
            within("adapter.alpha", adapter.alpha, f64::MIN_POSITIVE, 1e6)?;
            within("adapter.dropout", adapter.dropout, 0.0, 0.95)?;
            adapter.lora(self.seed)?;
        }
        if self.train.warmup.is_some() && self.train.warmup_steps.is_some() {
            return Err("train.warmup_steps: `train.warmup` is given already".into());
        }
        let task = self.task.settings();
        if self.data.human.is_some() && !task.takes_human_pairs() {
            return Err("data.human: it is for jobs of kind `constitutional`".into());
        }
        let mut resolved = task.resolve(self)?;
        if self.train.load_best_model_at_end.is_none() {
            // The reward of a policy often falls again after its highest value.
            resolved.load_best_model_at_end = task.grader().is_some() && task.is_evaluated(self);
        }
        if resolved.load_best_model_at_end && !task.is_evaluated(self) {
            return Err(
                "train.load_best_model_at_end: it needs validation data, and a kind of job \
                        that evaluates them while it trains"
                    .into(),
            );
        }
        resolved.check()?;
        task.check(&resolved)?;
        Ok(resolved)
    }
}

impl Resolved {
    fn check(&self) -> Result<(), String> {
        within("train.epochs", self.epochs.unwrap_or(1.0), f64::MIN_POSITIVE, 1e4)?;
        within("train.max_steps", self.max_steps.unwrap_or(1) as f64, 1.0, 1e9)?;
        let minutes = self.max_minutes.unwrap_or(1.0);
        within("train.max_minutes", minutes, f64::MIN_POSITIVE, 1e6)?;
        within("train.batch_size", self.batch_size as f64, 1.0, 65_536.0)?;
        within("train.micro_batch", self.micro_batch as f64, 1.0, 65_536.0)?;
        within("train.max_length", self.max_length as f64, 2.0, f64::from(1 << 20))?;
        within("train.learning_rate", self.learning_rate, f64::MIN_POSITIVE, 10.0)?;
        within("train.warmup", self.warmup, 0.0, 1.0)?;
        within("train.warmup_steps", self.warmup_steps.unwrap_or(0) as f64, 0.0, 1e9)?;
        within("train.eval_every", self.eval_every as f64, 1.0, 1e9)?;
        within("train.checkpoint_every", self.checkpoint_every as f64, 1.0, 1e9)?;
        within("train.keep_checkpoints", self.keep_checkpoints as f64, 1.0, 1000.0)?;
        within("train.threads", self.threads as f64, 1.0, 1024.0)?;
        self.device.check()?;
        let key = |name: &str| format!("train.optimizer.{name}");
        let (betas, eps, weight_decay, clip) = match &self.optimizer {
            Optimizer::AdamW { betas, eps, weight_decay, clip } => (betas, eps, weight_decay, clip),
            Optimizer::Muon { learning_rate, momentum, betas, eps, weight_decay, clip } => {
                within(&key("learning_rate"), *learning_rate, f64::MIN_POSITIVE, 10.0)?;
                within(&key("momentum"), *momentum, 0.0, 0.9999)?;
                (betas, eps, weight_decay, clip)
            }
        };
        for beta in betas {
            within(&key("betas"), *beta, 0.0, 0.999_999)?;
        }
        within(&key("eps"), *eps, f64::MIN_POSITIVE, 1.0)?;
        within(&key("weight_decay"), *weight_decay, 0.0, 10.0)?;
        within(&key("clip"), *clip, 0.0, 1e9)
    }
}

fn within(key: &str, value: f64, least: f64, most: f64) -> Result<(), String> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false if least == f64::MIN_POSITIVE => {
            Err(format!("{key}: {value} is not above 0, or above {most}"))
        }
        false => Err(format!("{key}: {value} is not between {least} and {most}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Projection;

    fn spec(text: &str) -> Result<(Spec, Resolved), String> {
        let spec: Spec = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let resolved = spec.resolve()?;
        Ok((spec, resolved))
    }

    #[test]
    fn defaults_are_those_of_the_method() {
        let (spec, resolved) =
            spec(r#"{"kind": "sft", "model": "m", "data": {"train": "file-1"}}"#).unwrap();
        let lora = spec.adapter.unwrap().lora(0).unwrap();
        assert_eq!((lora.rank, lora.alpha, lora.targets.len()), (16, 32.0, 7));
        assert_eq!(
            (resolved.learning_rate, resolved.warmup, resolved.max_length),
            (2e-4, 0.03, 1024)
        );
        let (_, full) = self::spec(
            r#"{"kind": "sft", "model": "m", "data": {"train": "file-1"}, "adapter": null}"#,
        )
        .unwrap();
        assert_eq!(full.learning_rate, 2e-5);
    }

    #[test]
    fn the_example_of_the_documents_is_read() {
        let text = r#"{"kind": "sft", "model": "smollm2:135m", "suffix": "maths", "seed": 1,
            "data": {"train": "file-a", "validation": "file-b"},
            "adapter": {"r": 16, "alpha": 32, "targets": "all-linear"},
            "train": {"epochs": 1, "max_steps": 200, "batch_size": 8, "micro_batch": 1,
                "max_length": 512, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.03,
                "eval_every": 50, "checkpoint_every": 100, "threads": 2}}"#;
        let (read, resolved) = spec(text).unwrap();
        assert_eq!((resolved.max_steps, resolved.threads), (Some(200), 2));
        assert_eq!(read.filled(&resolved).resolve().unwrap(), resolved);
        let (read, resolved) = spec(
            r#"{"kind": "sft", "model": "m", "data": {"train": "f"}, "train": {"warmup_steps": 7}}"#,
        )
        .unwrap();
        assert_eq!(resolved.warmup_steps, Some(7));
        assert_eq!(read.filled(&resolved).resolve().unwrap(), resolved);
        let (read, _) = spec(text).unwrap();
        let again: Spec = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
        assert_eq!(read, again);
        let toml: Spec = toml::from_str(
            "kind = \"sft\"\nmodel = \"m\"\n[data]\ntrain = \"a.jsonl\"\n[adapter]\ntargets = [\"q_proj\"]",
        )
        .unwrap();
        assert_eq!(toml.adapter.unwrap().lora(0).unwrap().targets, [Projection::Q]);
        let one: Adapter = serde_json::from_str(r#"{"targets": "q_proj"}"#).unwrap();
        assert_eq!(one.lora(0).unwrap().targets, [Projection::Q]);
    }

    #[test]
    fn mistakes_are_named() {
        let with = |more: &str| {
            spec(&format!(r#"{{"kind": "sft", "model": "m", "data": {{"train": "f"}}, {more}}}"#))
                .unwrap_err()
        };
        for (more, why) in [
            (r#""adaptor": {}"#, "adaptor"),
            (r#""adapter": {"rank": 4}"#, "rank"),
            (r#""adapter": {"r": 0}"#, "adapter.r"),
            (r#""adapter": {"targets": ["w"]}"#, "q_proj"),
            (r#""adapter": {"dropout": 1.0}"#, "adapter.dropout"),
            (r#""version": 2"#, "version"),
            (r#""adapter": {"targets": []}"#, "adapter.targets"),
            (r#""adapter": {"targets": "all"}"#, "`all` is none of"),
            (r#""adapter": {"targets": 3}"#, "all-linear"),
            (r#""train": {"optimizer": {"name": "adamw", "eps": 0}}"#, "train.optimizer.eps"),
            (
                r#""train": {"optimizer": {"name": "adamw", "betas": [0.9, 1]}}"#,
                "train.optimizer.betas",
            ),
            (r#""train": {"optimizer": {"name": "adamw", "clip": -1}}"#, "train.optimizer.clip"),
            (r#""train": {"optimizer": {"name": "muon", "momentum": 1}}"#, "optimizer.momentum"),
            (r#""train": {"optimizer": {"name": "muon", "weight_decay": -1}}"#, "weight_decay"),
            (r#""adapter": {"targets": [3]}"#, "a string"),
            (r#""train": {"learning_rate": 0}"#, "train.learning_rate"),
            (r#""train": {"batch_size": 0}"#, "train.batch_size"),
            (r#""train": {"warmup": 2}"#, "train.warmup"),
            (r#""train": {"warmup": 0.1, "warmup_steps": 3}"#, "train.warmup_steps"),
            (r#""train": {"warmup_steps": 2000000000}"#, "train.warmup_steps"),
            (r#""train": {"warmup_steps": -1}"#, "u64"),
            (r#""train": {"schedule": "up"}"#, "up"),
            (r#""train": {"optimizer": {"name": "sgd"}}"#, "sgd"),
            (r#""name": "x""#, "name"),
            (r#""suffix": """#, "suffix"),
            (r#""suffix": "a b""#, "suffix"),
            (r#""dpo": {}"#, "dpo: it is for jobs of kind `dpo`"),
            (r#""pretrain": {}"#, "pretrain"),
            (r#""reward": {"centring": 1}"#, "centering"),
        ] {
            let error = with(more);
            assert!(error.contains(why), "{more}: {error}");
        }
        let error = spec(r#"{"kind": "sft", "data": {"train": "f"}}"#).unwrap_err();
        assert!(error.contains("model"), "{error}");
    }
}
