//! From files to batches.
//!
//! A file is read once, line by line, checked and tokenized on all cores into a cache on disk; steps
//! read examples from there, in an order that the seed and the epoch give. Nothing grows with the file
//! but eight bytes a line.
//!
//! | file | what |
//! |---|---|
//! | `format.rs` | a line to an [`Example`]: OpenAI's chats, prompts and completions, Alpaca, ShareGPT, text |
//! | `messages.rs` | lists of messages to a [`Chat`] |
//! | `keys.rs` | the keys that a line may have |
//! | `lines.rs` | a file to its lines, and which of them are bad |
//! | `pairs.rs` | the same of pairs of answers: OpenAI's, TRL's, hh-rlhf's transcripts |
//! | `prompts.rs` | what is to be answered: OpenAI's lines for reinforcement |
//! | `turns.rs` | an example to pieces of text, and which of them are trained |
//! | `encode.rs` | pieces to tokens |
//! | `prepare.rs` | a file to a [`Prepared`] cache, with a [`Report`] |
//! | `check.rs` | a file's lines, read before a job is queued |
//! | `pack.rs` | examples to rows of tokens, best fit first |
//! | `order.rs` | which example comes when, and where a run stands |
//! | `text.rs` | a file for pretraining to pieces of documents |
//! | `stream.rs` | those to a [`Stream`] of tokens on disk |
//! | `windows.rs` | a stream to batches |

mod check;
mod encode;
mod format;
mod keys;
mod lines;
mod messages;
mod order;
mod pack;
mod pairs;
mod prepare;
mod prompts;
mod stream;
#[cfg(test)]
mod tests;
mod text;
mod turns;
mod windows;

pub use check::check;
pub use encode::{Encoded, Encoder};
pub use format::{Chat, Example, Format, PairFacts, Purpose};
pub use order::{Cursor, Order};
pub use pack::{Row, pack};
pub use prepare::{
    DataError, EncodedPair, EncodedPrompt, Prepared, PreparedPairs, PreparedPrompts, Report,
    prepare, prepare_pairs, prepare_prompts, prepare_tokens,
};
pub use stream::{Stream, prepare_stream};
pub use text::{Piece, Texts};
pub use turns::{Piece as RenderedPiece, Rendered, Rendering, render};
pub use windows::Windows;
