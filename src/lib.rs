//! Ingot: one binary that carries a language model through its whole life on one machine.
//!
//! This page is the map of the source. `docs/architecture.md` follows a request and a job step by step,
//! and says where to add an endpoint, a kind of job, an architecture or a kernel.
//!
//! # Processes
//!
//! | role | started by | holds |
//! |---|---|---|
//! | gateway (`ingot serve`) | the user | HTTP, keys, validation, chat templates, store, registry, supervisor, metrics; no model code |
//! | engine (`ingot engine`, hidden) | the gateway, one per loaded model | weights, tokenizer, scheduler, KV cache, sampler, grammars, adapters |
//! | job (`ingot job`, hidden) | the gateway or `ingot train`, one per running job | data, trainable weights, optimizer |
//!
//! An engine may die at any time: its requests fail with a clear error, the engine is restarted, and the
//! gateway stays. Gateway and engine exchange frames of [`ipc`] over a socket pair, and nothing else. A
//! job and its starter share the job's folder ([`job`]): if either process dies, the other finds the
//! whole state there, and the job resumes from its last checkpoint with a bit-identical result. A job
//! that trains a policy also asks the gateway for completions, in frames too ([`job::rollout`]).
//!
//! # The path of a request
//!
//! [`gateway::api`] (validated once) → [`template`] (rendered) → [`gateway::registry`]
//! (model and adapter by name) → [`gateway::generate`] → [`gateway::supervisor`] → [`ipc`] → [`engine`]: input processor
//! (tokenized by [`tokenizer`], checked against the limits) → scheduler → [`engine::kv`] →
//! [`engine::runner`] → [`kernels`] → [`engine::sampler`] → output processor → [`ipc`] →
//! [`gateway::stream`].
//!
//! Types narrow on the way: JSON → `ChatRequest` → [`ipc::Generate`] → `ValidRequest` → `Sequence` →
//! [`engine::runner::Batch`] → logits → [`ipc::Event`]. Nothing is checked twice, and no step calls a
//! step before it; `tests/it/layers.rs` holds the table of allowed imports.
//!
//! # The path of a job
//!
//! [`gateway::api`] or [`cli`] → [`job::ResolvedJob`] → [`gateway::jobs`] (queued) →
//! [`gateway::store`] → a process: [`job::main`] → [`train::process`] → [`train::recipes`] → [`train::data`] →
//! [`train::model`] ([`train::ops`]) → [`train::loss`] → [`train::optim`] → [`train::checkpoint`] →
//! [`train::export`] → [`gateway::jobs`] (loaded on trial) → [`gateway::registry`] (served).
//!
//! Types narrow here too: `Spec` → `ResolvedJob` → [`job::Order`] → `Batch` → gradients → checkpoint →
//! [`job::Outcome`].
//!
//! # Invariants
//!
//! - Pages: free + cached + held = total, after every operation ([`engine::kv`]).
//! - Every request ends with exactly one `Done` or `Failed`, whatever happens to the engine.
//! - A job's status changes in one statement; the files that it made are listed in the same transaction.
//! - What a client sends is an id or a name, never a path.
//! - Everything is bounded: queues, bodies, grammars, templates, time. Overflow is an answer.
//! - `unsafe` stands in `kernels/`, `engine/runner/llama_cpp/`, `compress/`, `llama_log.rs` and `gguf/` (mmap)
//!   only.
//! - With the native runner a request gives the same bits alone and in any batch, cached or not, with
//!   drafts or without ([`engine`], `speculate`).
//!
//! # Modules
//!
//! | folder | what |
//! |---|---|
//! | [`cli`] | one file per verb |
//! | [`config`] | raw options → resolved → immutable |
//! | [`gateway`] | the HTTP side |
//! | [`ipc`] | frames between processes |
//! | [`engine`] | the model side |
//! | [`isa`] | the instruction sets of the kernels, and which of them is used |
//! | [`kernels`] | SIMD arithmetic of the native runner and of training, the thread pool |
//! | [`llama_log`] | llama.cpp's log |
//! | [`tokenizer`] | text to tokens and back |
//! | [`template`] | chat templates, and parsers of tool calls and reasoning |
//! | [`job`] | what a job is: specification, order, folder, events, outcome; no tensors |
//! | [`dataset`] | formats of training files |
//! | [`train`] | the process of a job: data, trainable models, optimizers, checkpoints, exports |
//! | [`compress`] | quantization |
//! | [`evaluate`] | perplexity, KL divergence, accuracy of models; rounding against F32 arithmetic |
//! | [`grade`] | graders, which score completions |
//! | [`gguf`] | reading and writing GGUF, LoRA adapters; conversion of Hugging Face folders |

pub mod build_info;
pub mod cli;
pub mod compress;
pub mod config;
pub mod dataset;
pub mod engine;
pub mod evaluate;
pub mod gateway;
pub mod gguf;
pub mod grade;
pub mod ipc;
pub mod isa;
pub mod job;
pub mod kernels;
pub mod llama_log;
pub mod template;
pub mod tokenizer;
pub mod train;
