//! Training: jobs and what they are made of.
//!
//! A job walks `job` → `recipes` → `data` → `model` (`ops`) → `loss` → `optim` → `checkpoint` → `export`.
//!
//! | folder | what |
//! |---|---|
//! | `spec.rs` | what a job is asked to do, with every default |
//! | `job/` | the folder and the process of a job |
//! | `recipes/` | what jobs do, a file each |
//! | `actor.rs` | who answers prompts while a policy is trained |
//! | `fresh.rs` | models with random weights |
//! | `vocabulary.rs` | tokenizers trained on data, or taken from a model |
//! | `data/` | formats, masks, tokens, packing, order |
//! | `model/` | the decoders of `gguf::Covered`, trainable; LoRA |
//! | `loss/` | losses of preferences and policies, as numbers and their slopes |
//! | `ops/` | candle operations with backward passes by hand |
//! | `optim.rs` | AdamW and Muon |
//! | `schedule.rs` | learning rates |
//! | `checkpoint.rs` | folders that are there whole or not at all |
//! | `export/` | PEFT folders, LoRA GGUF, models as GGUF and as Hugging Face's folders |

pub mod actor;
pub mod checkpoint;
pub mod data;
pub mod export;
pub mod fresh;
pub mod job;
pub mod loss;
pub mod model;
pub mod ops;
pub mod optim;
pub mod recipes;
pub mod schedule;
pub mod spec;
#[cfg(test)]
mod torch_tests;
pub mod vocabulary;
