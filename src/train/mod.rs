//! Training: the job process and its arithmetic. [`crate::job`] describes jobs without tensors.
//!
//! The data flow of a job is `process` → `recipes` → `data` → `model` (`ops`) → `loss` → `optim` →
//! `checkpoint` → `export`.
//!
//! | folder | content |
//! |---|---|
//! | `process/` | the job process (`ingot job FOLDER`): from its order to its outcome |
//! | `recipes/` | one file per kind of job |
//! | `rollout.rs` | the interface through which a policy's completions are sampled |
//! | `random_init.rs` | models with random weights |
//! | `tokenizer_training.rs` | tokenizers trained on data, or taken from a model |
//! | `data/` | tokens, packing, order; the formats of files are [`crate::dataset`] |
//! | `model/` | the decoders of `gguf::ModelConfig`, trainable; LoRA |
//! | `loss/` | losses of preferences and policies, as numbers and their gradients |
//! | `ops/` | operations with their backward passes, for the CPU and for other devices |
//! | `optim.rs` | AdamW and Muon |
//! | `checkpoint.rs` | checkpoint folders, written atomically |
//! | `export/` | PEFT folders, LoRA GGUF, models as GGUF and as Hugging Face folders |

pub mod checkpoint;
pub mod data;
pub mod export;
pub mod loss;
pub mod model;
pub mod ops;
pub mod optim;
pub mod process;
pub mod random_init;
pub mod recipes;
pub mod rollout;
pub mod tokenizer_training;
#[cfg(test)]
mod torch_tests;
