//! The kinds of jobs: [`Task`], with the settings of each kind.
//!
//! A new kind is a line of the list below, a block of settings here in `spec/` that implements
//! [`TaskSettings`], and a file in `train/recipes/` that implements `Recipe` for the block.

use super::{Adapter, Data, Export, Resolved, Schedule, Spec, Train};
use crate::dataset::DatasetKind;
use crate::gguf::ModelConfig;
use crate::grade::Grader;
use serde::de::value::{Error, MapDeserializer};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

/// Which weights a kind of job trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// An adapter by default; all weights if `adapter` is `null`.
    Any,
    /// Only an adapter; the text says why.
    Adapter(&'static str),
    /// Always all weights; the text says why.
    All(&'static str),
}

/// What the gateway and the command line need to know of a kind of job.
pub trait TaskSettings {
    /// The kind of dataset that the job reads; `None` means plain text.
    fn dataset(&self) -> Option<DatasetKind>;

    /// Default learning rates: for an adapter, and for all weights.
    fn learning_rates(&self) -> [f64; 2];

    /// Which weights the job trains.
    fn weights(&self) -> Weights {
        Weights::Any
    }

    /// Fills in the defaults of the training settings, and checks the keys outside the block that
    /// are particular to this kind.
    ///
    /// # Errors
    /// The key that is wrong and the values it may have.
    fn resolve(&self, spec: &Spec) -> Result<Resolved, String> {
        resolve_tuning(self.learning_rates(), spec)
    }

    /// Checks the settings of the block.
    ///
    /// # Errors
    /// The key that is wrong and the values it may have.
    fn check(&self, settings: &Resolved) -> Result<(), String>;

    /// The grader of a kind that samples completions from the served model.
    fn grader(&self) -> Option<&Grader> {
        None
    }

    /// Whether the job samples completions from the served model.
    fn samples(&self) -> bool {
        self.grader().is_some()
    }

    /// The other served models that the job asks: the key of the block that names each, its name,
    /// and whether it must be a reward model.
    fn models(&self) -> Vec<(String, &str, bool)> {
        let models = self.grader().map(Grader::models).unwrap_or_default();
        models.into_iter().map(|(name, scores)| ("grader".into(), name, scores)).collect()
    }

    /// Whether the job evaluates validation data while it trains.
    fn is_evaluated(&self, spec: &Spec) -> bool {
        spec.data.validation.is_some()
    }

    /// Whether the job measures a judge on pairs labelled by people (`data.human`).
    fn takes_human_pairs(&self) -> bool {
        false
    }

    /// Whether the job also trains on pairs of completions that it samples.
    fn trains_on_pairs(&self) -> bool {
        false
    }

    /// The form of the completions of such a kind.
    fn response_format(&self) -> Option<&Value> {
        None
    }

    /// The model whose distributions are learned, for a kind that has one.
    fn teacher(&self) -> Option<&str> {
        None
    }

    /// The block of a kind that learns from a teacher.
    fn distillation(&self) -> Option<&super::Distill> {
        None
    }

    /// Checks the block against the model to train.
    ///
    /// # Errors
    /// As [`TaskSettings::check`].
    fn check_layers(&self, _model: &ModelConfig) -> Result<(), String> {
        Ok(())
    }

    /// Dimensions and tokenizer of the model that the job creates if the specification names no
    /// `model`, for a kind that can.
    fn new_model(&self) -> Option<&super::Pretrain> {
        None
    }
}

/// Defaults of kinds that train an existing model.
pub(super) fn resolve_tuning(
    [of_adapter, of_all]: [f64; 2],
    spec: &Spec,
) -> Result<Resolved, String> {
    if spec.model.is_none() {
        return Err(format!("model: a job of kind `{}` needs one", spec.task.name()));
    }
    if spec.name.is_some() {
        return Err("name: it is for `pretrain`; use `suffix`".into());
    }
    let train = &spec.train;
    let rate = if spec.adapter.is_none() { of_all } else { of_adapter };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Resolved {
        epochs: train.epochs.or(train.max_steps.is_none().then_some(1.0)),
        max_steps: train.max_steps,
        max_minutes: train.max_minutes,
        batch_size: train.batch_size.unwrap_or(8),
        micro_batch: train.micro_batch.unwrap_or(1),
        max_length: train.max_length.unwrap_or(1024),
        learning_rate: train.learning_rate.unwrap_or(rate),
        schedule: train.schedule.unwrap_or(Schedule::Cosine),
        warmup: train.warmup.unwrap_or(0.03),
        warmup_steps: train.warmup_steps,
        eval_every: train.eval_every.unwrap_or(50),
        checkpoint_every: train.checkpoint_every.unwrap_or(100),
        keep_checkpoints: train.keep_checkpoints.unwrap_or(3),
        load_best_model_at_end: train.load_best_model_at_end.unwrap_or(false),
        threads: train.threads.unwrap_or(cores),
        device: train.device.unwrap_or_default(),
        activation_checkpointing: train.activation_checkpointing.unwrap_or(false),
        optimizer: train.optimizer.clone().unwrap_or_default(),
    })
}

/// Reads a block that was not written: its defaults, or the key that must be given.
fn absent<'de, T: Deserialize<'de>>(name: &str) -> Result<T, String> {
    let empty = MapDeserializer::<_, Error>::new(std::iter::empty::<(&str, &str)>());
    T::deserialize(empty).map_err(|error| format!("{name}: {error}"))
}

/// Declares the kinds: the name in specifications, which is the name of the block too, and the
/// type of the block.
macro_rules! tasks {
    ($d:tt $($(#[cfg($cfg:meta)])? $name:ident: $kind:ident($block:ty)),* $(,)?) => {
        /// A kind of job and its settings.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Task {
            $($(#[cfg($cfg)])? $kind($block),)*
        }

        /// Evaluates an expression with the block of a [`Task`], whose type differs from kind to
        /// kind.
        macro_rules! for_task {
            ($d task:expr, $d block:ident => $d value:expr) => {
                match $d task {
                    $($(#[cfg($cfg)])? $crate::job::spec::Task::$kind($d block) => $d value,)*
                }
            };
        }
        pub(crate) use for_task;

        impl Task {
            /// The names of all kinds.
            pub const NAMES: &[&str] = &[$($(#[cfg($cfg)])? stringify!($name),)*];

            /// The name in specifications.
            pub fn name(&self) -> &'static str {
                match self {
                    $($(#[cfg($cfg)])? Self::$kind(_) => stringify!($name),)*
                }
            }
        }

        #[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Kind {
            $($(#[cfg($cfg)])? $kind,)*
        }

        /// A specification as it is written.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(super) struct Written {
            #[serde(default = "super::version")]
            pub(super) version: u32,
            kind: Kind,
            pub(super) model: Option<String>,
            pub(super) name: Option<String>,
            pub(super) suffix: Option<String>,
            #[serde(default)]
            pub(super) seed: u64,
            pub(super) data: Data,
            /// `Some(None)` means that `null` was written.
            #[serde(default, deserialize_with = "some")]
            pub(super) adapter: Option<Option<Adapter>>,
            #[serde(default)]
            pub(super) train: Train,
            #[serde(default)]
            pub(super) export: Export,
            $($(#[cfg($cfg)])? $name: Option<$block>,)*
        }

        impl Written {
            /// The kind with its block. A block of another kind is an error.
            pub(super) fn task(&mut self) -> Result<Task, String> {
                let kind = self.kind;
                $($(#[cfg($cfg)])? if kind != Kind::$kind && self.$name.is_some() {
                    return Err(format!("{0}: it is for jobs of kind `{0}`", stringify!($name)));
                })*
                match kind {
                    $($(#[cfg($cfg)])? Kind::$kind => match self.$name.take() {
                        Some(block) => Ok(Task::$kind(block)),
                        None => absent(stringify!($name)).map(Task::$kind),
                    },)*
                }
            }
        }

        /// Two keys: `kind`, and the block under the kind's name unless the kind has no settings.
        impl Serialize for Task {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                let mut map = to.serialize_map(None)?;
                map.serialize_entry("kind", self.name())?;
                match self {
                    $($(#[cfg($cfg)])? Self::$kind(block) if size_of::<$block>() > 0 => {
                        map.serialize_entry(stringify!($name), block)?;
                    })*
                    _ => {}
                }
                map.end()
            }
        }
    };
}

tasks! {
    $
    sft: Sft(super::Sft),
    pretrain: Pretrain(super::Pretrain),
    dpo: Dpo(super::Dpo),
    reward: Reward(super::Reward),
    distill: Distill(super::Distill),
    grpo: Grpo(super::Grpo),
    ppo: Ppo(super::Ppo),
    constitutional: Constitutional(super::Constitutional),
    #[cfg(test)]
    dummy: Dummy(crate::train::recipes::dummy::Dummy),
}

impl Task {
    /// The settings of the kind.
    pub fn settings(&self) -> &dyn TaskSettings {
        for_task!(self, block => block)
    }
}

fn some<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Option<Adapter>>, D::Error> {
    Option::deserialize(from).map(Some)
}
