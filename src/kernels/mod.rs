//! The arithmetic of the native runner and of training: the only home of SIMD instructions, and the
//! thread pool.
//!
//! Every kernel exists twice: in plain code, which is the oracle, and for AVX2. The runner's give the
//! same bits both ways ([`gemm`], training's, rounds once less with FMA), and a token's result never depends on what else is computed with it: sums run in one order,
//! whatever the tile. AVX-512 VNNI and NEON would be modules beside `avx2`, and arms of
//! [`matmul::Isa`].

// An index is a row, lane or token of several arrays at once; a tile has that many sides.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

pub mod activation;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
pub mod cache;
pub mod gemm;
pub mod lora;
pub mod matmul;
pub mod ops;
pub mod pack;
pub mod pool;
pub mod real;
pub mod rope;
mod scalar;
pub mod vector;

pub use activation::{Quantized, QuantizedWriter};
pub use attention::Scope;
pub use cache::Cache;
pub use lora::{Adapted, LoraPair};
pub use matmul::{Input, Isa, isa, multiply};
pub use pack::{BLOCK, LANES, Matrix, can_pack};
pub use pool::{Disjoint, Pool};
