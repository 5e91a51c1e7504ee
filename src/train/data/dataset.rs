//! [`Dataset`]: the forms in which recipes read a training file.

use super::encode::Encoder;
use super::prepare::{
    Prepared, PreparedPairs, PreparedPrompts, prepare, prepare_pairs, prepare_prompts,
};
use super::stream::{Stream, prepare_stream};
use crate::dataset::DataError;
use crate::job::DataReport;
use crate::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::Arc;

/// A training file in the form that a recipe reads, tokenized on disk.
pub trait Dataset: Sized {
    /// What tokenizes a file.
    type Encoder;

    /// The encoder of this form. `chat` makes the encoder for files that are rendered with the
    /// model's chat template; forms that need no template do not call it, so that a model with a
    /// broken template can be trained on plain text.
    ///
    /// # Errors
    /// Those of `chat`.
    fn encoder<E>(
        tokenizer: Arc<dyn Tokenizer>,
        chat: impl FnOnce(Arc<dyn Tokenizer>) -> Result<Encoder, E>,
    ) -> Result<Self::Encoder, E>;

    /// Reads `file`, checks and tokenizes all of it, and writes the tokens to `cache`. `max_length`
    /// is the maximum number of tokens of an example.
    ///
    /// # Errors
    /// [`DataError`].
    fn prepare(
        file: &Path,
        encoder: &Self::Encoder,
        max_length: usize,
        cache: &Path,
    ) -> Result<(Self, DataReport), DataError>;

    /// Splits off a fraction at the end for validation, and returns it with its number of tokens.
    /// `None` for forms whose validation data must be given.
    fn hold_out(&mut self, _share: f64) -> Option<(Self, u64)> {
        None
    }
}

/// Implements [`Dataset`] for a form that is rendered with the chat template.
macro_rules! rendered {
    ($($form:ty: $prepare:ident),*) => {
        $(impl Dataset for $form {
            type Encoder = Encoder;

            fn encoder<E>(
                tokenizer: Arc<dyn Tokenizer>,
                chat: impl FnOnce(Arc<dyn Tokenizer>) -> Result<Encoder, E>,
            ) -> Result<Encoder, E> {
                chat(tokenizer)
            }

            fn prepare(
                file: &Path,
                encoder: &Encoder,
                max_length: usize,
                cache: &Path,
            ) -> Result<(Self, DataReport), DataError> {
                $prepare(file, encoder, max_length, cache)
            }
        })*
    };
}

rendered! { Prepared: prepare, PreparedPairs: prepare_pairs, PreparedPrompts: prepare_prompts }

impl Dataset for Stream {
    type Encoder = Arc<dyn Tokenizer>;

    fn encoder<E>(
        tokenizer: Arc<dyn Tokenizer>,
        _: impl FnOnce(Arc<dyn Tokenizer>) -> Result<Encoder, E>,
    ) -> Result<Self::Encoder, E> {
        Ok(tokenizer)
    }

    fn prepare(
        file: &Path,
        tokenizer: &Self::Encoder,
        _: usize,
        cache: &Path,
    ) -> Result<(Self, DataReport), DataError> {
        prepare_stream(file, tokenizer.as_ref(), cache, |_| {})
    }

    fn hold_out(&mut self, share: f64) -> Option<(Self, u64)> {
        let (train, held_out) = Stream::hold_out(self, share);
        *self = train;
        let tokens = held_out.len();
        Some((held_out, tokens))
    }
}
