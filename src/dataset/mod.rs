//! Formats of training files: from a line of JSON to an example, and from an example to pieces of
//! text with the parts that are trained. This module needs no tokenizer and no tensors, so that the
//! gateway can check a file.
//!
//! | file | content |
//! |---|---|
//! | `format.rs` | a line to an [`Example`]: OpenAI's chats, prompts and completions, Alpaca, ShareGPT, text |
//! | `messages.rs` | lists of messages to a [`Chat`] |
//! | `keys.rs` | the keys that a line may have |
//! | `lines.rs` | the lines of a file, and which of them are bad |
//! | `pairs.rs` | preference pairs: OpenAI's, TRL's, hh-rlhf's transcripts |
//! | `prompts.rs` | prompts without completions: OpenAI's lines for reinforcement fine-tuning |
//! | `text.rs` | a pretraining file to pieces of documents |
//! | `turns.rs` | an example, rendered with the chat template, to pieces of text, and which of them are trained |
//! | `check.rs` | checks all lines of a file before a job is queued |
//! | `error.rs` | [`DataError`] |

mod check;
mod error;
mod format;
mod keys;
mod lines;
mod messages;
mod pairs;
mod prompts;
mod text;
mod turns;

pub use check::check;
pub use error::DataError;
pub use format::{Chat, DatasetKind, Example, Format, Line, Pair, PairFacts, parse};
pub use lines::{BadLines, Lines, OneFormat, hex};
pub use prompts::Prompt;
pub use text::{Piece, Texts};
pub use turns::{Piece as RenderedPiece, Rendered, Rendering, prompt, render, render_all};
