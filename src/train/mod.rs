//! Training, as far as it is there: data, trainable models, optimizers, checkpoints, pretraining,
//! supervised fine-tuning, exports. Nothing calls it yet: jobs, their process and their HTTP come next.
//!
//! | folder | what |
//! |---|---|
//! | `spec.rs` | what a job is asked to do, with every default |
//! | `recipes/` | what jobs do, a file each |
//! | `fresh.rs` | models with random weights |
//! | `vocabulary.rs` | tokenizers trained on data, or taken from a model |
//! | `data/` | formats, masks, tokens, packing, order |
//! | `model/` | the decoders of `gguf::Covered`, trainable; LoRA |
//! | `ops/` | candle operations with backward passes by hand |
//! | `optim.rs` | AdamW and Muon |
//! | `schedule.rs` | learning rates |
//! | `checkpoint.rs` | folders that are there whole or not at all |
//! | `export/` | PEFT folders, LoRA GGUF, models as GGUF and as Hugging Face's folders |

pub mod checkpoint;
pub mod data;
pub mod export;
pub mod fresh;
pub mod model;
pub mod ops;
pub mod optim;
pub mod recipes;
pub mod schedule;
pub mod spec;
pub mod vocabulary;
