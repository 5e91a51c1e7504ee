//! Ingot: one binary that carries a language model through its whole life on one machine.
//!
//! This page is the map. What is here today serves any GGUF model through an OpenAI-compatible
//! API, pretrains and fine-tunes models, makes them prefer one answer to another, trains reward
//! models, and serves what it made. The rest of alignment, and compression, have their rooms reserved
//! in the design and join the same walks.
//!
//! # Processes
//!
//! | role | started by | holds |
//! |---|---|---|
//! | gateway (`ingot serve`) | the user | HTTP, keys, validation, chat templates, store, registry, supervisor, metrics; no model code |
//! | engine (`ingot engine`, hidden) | the gateway, one per loaded model | weights, tokenizer, scheduler, cache, sampler, grammars, adapters |
//! | job (`ingot job`, hidden) | the gateway or `ingot train`, one per running job | data, trainable weights, optimizer |
//!
//! An engine may die at any time: its requests fail with a clear error, it is restarted, and the
//! gateway stays. Frames of [`ipc`] over a socket pair are all that crosses. A job shares nothing but
//! its folder ([`job`]): if either process dies, the other finds the whole state there, and the job
//! resumes from its last checkpoint with a bit-identical result.
//!
//! # A request walks
//!
//! [`gateway::api`] (validated once) → [`template`] (rendered) → [`gateway::registry`]
//! (model and adapter by name) → [`gateway::supervisor`] → [`ipc`] → [`engine`]: intake
//! (tokenized by [`tokenizer`], found to fit) → scheduler → [`engine::kv`] → [`engine::runner`] → [`kernels`] →
//! [`engine::sampler`] → outbox → [`ipc`] → [`gateway::stream`].
//!
//! Types narrow on the way: JSON → `ChatRequest` → [`ipc::Generate`] → `Admissible` → `Sequence` →
//! [`engine::runner::Batch`] → logits → [`ipc::Event`]. Nothing is checked twice, and no step
//! calls back up the walk; `tests/it/layers.rs` holds the table of allowed edges.
//!
//! # A job walks
//!
//! [`gateway::api`] or [`cli`] → [`gateway::jobs`] (admitted, queued) → [`gateway::store`] → a process:
//! [`train::process`] → [`train::recipes`] → [`train::data`] → [`train::model`] ([`train::ops`]) →
//! [`train::loss`] → [`train::optim`] → [`train::checkpoint`] → [`train::export`] → [`gateway::jobs`] (tried) →
//! [`gateway::registry`] (served).
//!
//! Types narrow here too: `Spec` → `Resolved` → [`job::Order`] → `Batch` → gradients →
//! checkpoint → [`job::Outcome`].
//!
//! # Invariants
//!
//! - Pages: free + cached + held = total, after every operation ([`engine::kv`]).
//! - Every request ends with exactly one `Done` or `Failed`, whatever happens to the engine.
//! - A job's status changes in one statement; what it made is listed in the transaction that says so.
//! - What a client sends is an id or a name, never a path.
//! - Everything is bounded: queues, bodies, grammars, templates, time. Overflow is an answer.
//! - `unsafe` lives in `kernels/`, `engine/runner/llama_cpp/` and `gguf/` (mmap) only.
//! - With the native runner a request gives the same bits alone and in any batch, cached or not,
//!   drafted or not ([`engine`], `speculate`).
//!
//! # Rooms
//!
//! | folder | what |
//! |---|---|
//! | [`cli`] | one file per verb |
//! | [`config`] | raw options → resolved → immutable |
//! | [`gateway`] | the HTTP side |
//! | [`ipc`] | frames |
//! | [`engine`] | the model side; [`engine::verify`] measures its rounding against F32 arithmetic |
//! | [`kernels`] | SIMD arithmetic of the native runner and of training, the thread pool |
//! | [`template`] | chat templates, and what models write back |
//! | [`job`] | what a job is: specification, order, folder, events, outcome; no tensors |
//! | [`dataset`] | formats of training files |
//! | [`tokenizer`] | text to tokens and back |
//! | [`train`] | the process of a job: data, trainable models, optimizers, checkpoints, exports |
//! | [`grade`] | graders: what an answer is worth |
//! | [`gguf`] | reading and writing GGUF, LoRA adapters; Hugging Face's folders made into GGUF |

pub mod build_info;
pub mod cli;
pub mod config;
pub mod dataset;
pub mod engine;
pub mod gateway;
pub mod gguf;
pub mod grade;
pub mod ipc;
pub mod job;
pub mod kernels;
pub mod template;
pub mod tokenizer;
pub mod train;
