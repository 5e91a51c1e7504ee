//! From training files, whose formats are in [`crate::dataset`], to batches.
//!
//! A file is read once, line by line, checked, and tokenized on all cores into a cache on disk.
//! Steps read examples from the cache, in an order given by the seed and the epoch. Memory grows
//! with the file only by eight bytes per line.
//!
//! | file | content |
//! |---|---|
//! | `dataset.rs` | [`Dataset`]: the forms in which recipes read a file |
//! | `encode.rs` | tokenizes rendered examples |
//! | `prepare.rs` | a file to a [`Prepared`] cache, with a [`DataReport`](crate::job::DataReport) |
//! | `pack.rs` | packs examples into rows of tokens, best fit first |
//! | `order.rs` | the order of the examples, and the position of a run |
//! | `stream.rs` | a pretraining file to a [`Stream`] of tokens on disk |
//! | `windows.rs` | a stream to batches |

mod dataset;
mod encode;
mod order;
mod pack;
mod prepare;
mod stream;
#[cfg(test)]
mod tests;
mod windows;

pub use dataset::Dataset;
pub use encode::{Encoded, Encoder};
pub use order::{Cursor, Order};
pub use pack::{PackedGroups, Row, pack, pack_groups};
pub use prepare::{
    EncodedPair, EncodedPrompt, Prepared, PreparedPairs, PreparedPrompts, prepare, prepare_pairs,
    prepare_prompts, prepare_tokens,
};
pub use stream::{Stream, prepare_stream};
pub use windows::Windows;
