//! Training, as far as it is there: data, trainable models, optimizers, checkpoints, supervised
//! fine-tuning, exports. Nothing calls it yet: jobs, their process and their HTTP come next.
//!
//! | folder | what |
//! |---|---|
//! | `spec.rs` | what a job is asked to do, with every default |
//! | `recipes/` | what jobs do, a file each |
//! | `data/` | formats, masks, tokens, packing, order |
//! | `model/` | the decoders of `gguf::Covered`, trainable; LoRA |
//! | `ops/` | candle operations with backward passes by hand |
//! | `optim.rs` | AdamW and Muon |
//! | `schedule.rs` | learning rates |
//! | `checkpoint.rs` | folders that are there whole or not at all |
//! | `export.rs` | PEFT folders, LoRA GGUF, models as GGUF |

pub mod checkpoint;
pub mod data;
pub mod export;
pub mod model;
pub mod ops;
pub mod optim;
pub mod recipes;
pub mod schedule;
pub mod spec;

#[cfg(test)]
mod torch_tests;
