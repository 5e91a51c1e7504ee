//! The arithmetic of the native runner and of training; all SIMD code and the thread pool are here.
//!
//! Every kernel exists in scalar code, which is the oracle, and for the instruction sets of [`crate::isa`].
//! The runner's kernels give bit-identical results in all versions ([`gemm`], for training, rounds
//! once less with FMA). A token's result never depends on other rows of the batch: sums run in one
//! order, whatever the tile.

#![allow(unsafe_code)]
// An index selects a row, lane or token in several arrays at once, and a tile has many parameters.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

pub mod activation;
pub mod attention;
pub mod cache;
pub mod gemm;
mod isa;
pub mod lora;
pub mod matmul;
pub mod ops;
pub mod pack;
pub mod pool;
pub mod real;
pub mod rope;
pub mod vector;

pub use activation::{Quantized, QuantizedWriter, Residuals};
pub use attention::Scope;
pub use cache::KvCache;
pub use lora::{Adapted, LoraPair};
pub use matmul::{Input, multiply};
pub use pack::{BLOCK, LANES, Matrix, can_pack};
pub use pool::{Disjoint, Pool};
