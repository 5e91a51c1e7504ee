//! The documents of a file as one stream of tokens on disk.

use crate::dataset::{DataError, Texts};
use crate::job::DataReport;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Maximum number of validation tokens at the end of a stream. One evaluation should take much less
/// time than the training between two evaluations, and determine the loss to a hundredth of a nat.
const HELD_OUT: u64 = 1 << 17;

/// The tokens of documents, concatenated, with an end-of-text token after each document.
#[derive(Debug, Clone)]
pub struct Stream {
    file: Arc<File>,
    /// Range of the file's tokens.
    tokens: Range<u64>,
}

impl Stream {
    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.tokens.end - self.tokens.start
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// (count) tokens starting at `start`.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn read(&self, start: u64, count: usize) -> io::Result<Vec<u32>> {
        let mut bytes = vec![0; 4 * count];
        self.file.read_exact_at(&mut bytes, 4 * (self.tokens.start + start))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// Splits the stream into training and validation data. Validation is the fraction `share` at
    /// the end, at most 131,072 tokens.
    pub fn hold_out(&self, share: f64) -> (Self, Self) {
        let held = ((self.len() as f64 * share) as u64).min(HELD_OUT);
        let seam = self.tokens.end - held;
        let part = |tokens| Self { file: self.file.clone(), tokens };
        (part(self.tokens.start..seam), part(seam..self.tokens.end))
    }
}

/// Reads `source`, tokenizes it on all cores, and writes the tokens to `cache`. `progress` receives
/// the number of bytes read.
///
/// # Errors
/// [`DataError`].
pub fn prepare_stream(
    source: &Path,
    tokenizer: &dyn Tokenizer,
    cache: &Path,
    mut progress: impl FnMut(u64),
) -> Result<(Stream, DataReport), DataError> {
    let mut texts = Texts::open(source)?;
    let mut out = BufWriter::with_capacity(1 << 20, File::create(cache)?);
    let (mut report, mut begun, mut document) = (DataReport::default(), false, 0);
    let end = tokenizer.vocab().eos;
    loop {
        let chunk = texts.next_chunk()?;
        if chunk.is_empty() {
            break;
        }
        progress(texts.bytes());
        // Text that spells a special token is tokenized as plain text.
        let encoded: Vec<_> =
            chunk.par_iter().map(|piece| tokenizer.encode(&piece.text, false, false)).collect();
        for (piece, mut tokens) in chunk.iter().zip(encoded) {
            report.examples += u64::from(!begun);
            report.bytes += piece.text.len() as u64;
            begun = !piece.ends;
            tokens.extend(end.filter(|_| piece.ends));
            for token in &tokens {
                out.write_all(&token.to_le_bytes())?;
            }
            report.tokens += tokens.len() as u64;
            document += tokens.len() as u64;
            if piece.ends {
                report.longest = report.longest.max(document);
                document = 0;
            }
        }
    }
    report.dropped = texts.empty;
    match report.tokens {
        0 => return Err(DataError::Empty),
        1 => return Err(DataError::Short { tokens: 1 }),
        tokens => report.trained_tokens = tokens - 1,
    }
    out.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    report.digest = texts.digest();
    Ok((Stream { file: Arc::new(File::open(cache)?), tokens: 0..report.tokens }, report))
}
