//! Training recipes, one for each kind of job: the implementations of [`Recipe`] for the blocks of
//! [`Task`](crate::job::spec::Task).
//!
//! | file | content |
//! |---|---|
//! | `sft.rs` | supervised fine-tuning |
//! | `pretrain.rs` | pretraining; `sample.rs`: the texts that it samples |
//! | `dpo.rs`, `reward.rs` | objectives of preference pairs; `preference.rs`: what they share |
//! | `distill.rs` | distillation; `teacher.rs`: its teacher; `on_policy.rs`: completions of the student |
//! | `grpo.rs`, `ppo.rs` | policies; `sampler.rs`: how their completions are sampled and graded |
//! | `constitutional/` | critiques and revisions, and preferences of a judge |
//! | `judge.rs` | a served model that compares answers |
//! | `calls.rs` | calls to the served model |
//! | `run.rs` | the training loop shared by all recipes |

mod calls;
mod constitutional;
mod distill;
#[cfg(test)]
mod distill_tests;
mod dpo;
#[cfg(test)]
pub mod dummy;
mod grpo;
mod judge;
mod on_policy;
#[cfg(test)]
mod policy_tests;
mod ppo;
mod preference;
#[cfg(test)]
mod preference_tests;
mod pretrain;
#[cfg(test)]
mod pretrain_tests;
mod reward;
mod run;
mod sample;
mod sampler;
mod sft;
mod teacher;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trl_tests;

pub use run::{Event, Outcome, TrainError};

use crate::gguf::Gguf;
use crate::job::spec::Resolved;
use crate::job::{Control, Order};
use crate::tokenizer::Tokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::Dataset;
use crate::train::model::Model;
use crate::train::rollout::RolloutClient;
use candle_core::Device;
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

/// How a kind of job trains.
pub trait Recipe {
    /// The form in which the recipe reads its files.
    type Data: Dataset;

    /// Maximum number of tokens of an example.
    fn max_length(&self, settings: &Resolved) -> usize {
        settings.max_length
    }

    /// Fraction of the training data that is held out if the job has no validation data.
    fn held_out(&self) -> f64 {
        0.0
    }

    /// Writes the model to train to `path` if the order names none. If the file exists, an earlier
    /// process of the job wrote it.
    ///
    /// # Errors
    /// [`TrainError`].
    fn create_model(&self, _order: &Order, _path: &Path) -> Result<(), TrainError> {
        Err(TrainError::Spec("model: a job of this kind needs one".into()))
    }

    /// Writes the model to train in place of the order's, to [`Student::path`]. `false`: the order's
    /// own is trained.
    ///
    /// # Errors
    /// [`TrainError`].
    fn student(&self, _student: Student<'_, Self::Data>) -> Result<bool, TrainError> {
        Ok(false)
    }

    /// Name of the parameter of the head that maps a row to a value, for recipes that train one.
    fn head(&self) -> Option<&'static str> {
        None
    }

    /// Trains from the newest checkpoint to the last step, or until `control` stops it.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint is kept.
    fn run(
        &self,
        job: &Job<'_, Self::Data>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError>;
}

/// From what a recipe makes the model to train.
pub struct Student<'a, D: Dataset> {
    /// The order's model.
    pub base: &'a Arc<Gguf>,
    pub settings: &'a Resolved,
    pub device: &'a Device,
    pub data: &'a D,
    /// The file to write. If it exists, an earlier process of the job wrote it.
    pub path: &'a Path,
    pub control: &'a Control,
    pub event: &'a mut dyn FnMut(Event),
}

/// What a recipe runs on.
pub struct Job<'a, D: Dataset> {
    /// The model with its initial weights.
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub train: &'a D,
    pub validation: Option<&'a D>,
    pub checkpoints: &'a Checkpoints,
    /// The model's tokenizer.
    pub tokenizer: &'a dyn Tokenizer,
    pub seed: u64,
    /// Shuffle seed; `None` keeps the file's order.
    pub shuffle: Option<u64>,
    /// File of the reference log-probabilities, those of the initial model.
    pub reference: &'a Path,
    /// The model whose distributions are learned.
    pub teacher: Option<&'a Path>,
    /// For kinds that sample: the served model that is trained.
    pub policy: Option<Policy<'a>>,
    /// For recipes that make examples.
    pub making: Making<'a, D>,
}

/// What recipes need that make examples.
pub struct Making<'a, D: Dataset> {
    pub encoder: &'a D::Encoder,
    /// The name under which the base model is served.
    pub model_name: &'a str,
    /// The model's context length in tokens.
    pub context: usize,
    /// Folder of the files that the recipe makes, which become artifacts.
    pub folder: &'a Path,
    /// Folder of tokenized data.
    pub cache: &'a Path,
    /// Preference pairs labelled by people.
    pub human: Option<&'a Path>,
}

// Not derived: that would ask for data that can be copied.
impl<D: Dataset> Clone for Making<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Dataset> Copy for Making<'_, D> {}

/// The served model whose completions are sampled while it is trained.
#[derive(Clone, Copy)]
pub struct Policy<'a> {
    pub client: &'a RefCell<dyn RolloutClient>,
    /// Writes the adapter in the engine's format (GGUF).
    pub export: &'a dyn Fn(&Path) -> Result<(), TrainError>,
    /// Path that `export` writes to, preferably on a memory file system.
    pub adapter: &'a Path,
}
