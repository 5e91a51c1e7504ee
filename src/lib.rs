pub mod engine;
pub mod gguf;
pub mod ipc;
