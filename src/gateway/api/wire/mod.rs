//! Parts of requests and responses that endpoints share. A value is validated here, once.
//!
//! | file | content |
//! |---|---|
//! | `fields.rs` | strict reader of JSON bodies |
//! | `form.rs` | multipart forms with size limits |
//! | `query.rs` | query parameters |
//! | `params/`, `format.rs`, `messages.rs`, `tools.rs` | parameters of generation |
//! | `logprobs.rs` | OpenAI's two formats of log-probabilities |

pub mod fields;
pub(super) mod form;
pub mod format;
pub(super) mod logprobs;
pub(super) mod messages;
pub(super) mod params;
pub mod query;
pub(super) mod tools;

/// Maximum length of a name or source, in bytes.
pub(super) const MAX_NAME: usize = 200;
