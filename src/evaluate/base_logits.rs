//! Files of log-probabilities in the format of llama-perplexity (`--kl-divergence-base`;
//! tools/perplexity/perplexity.cpp).
//!
//! Little-endian: `_logits_`; the tokens of a chunk, the vocabulary and the number of chunks (u32
//! each); the tokens of all chunks (i32); then for each chunk a row for each prediction that counts.
//! A row is a scale and the lowest log-probability (f32 each), and a u16 for each token of the
//! vocabulary, of which the number is rounded up to an even one. The log-probability of a token is
//! scale · u16 + lowest; what is more than 16 nats below the most probable token is stored as if it
//! were 16 below.

use crate::ipc::Token;
use crate::job::EvalError;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"_logits_";
/// Log-probabilities are stored down to this much below the highest one.
const DEPTH: f32 = 16.0;
/// Bounds on what a file may claim.
const MOST_CONTEXT: u32 = 1 << 20;
const MOST_VOCABULARY: u32 = 1 << 22;

/// What the file is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Tokens of a chunk.
    pub context: usize,
    pub vocabulary: usize,
    /// (chunks · context)
    pub tokens: Vec<Token>,
}

impl Header {
    pub(super) fn chunks(&self) -> usize {
        self.tokens.len() / self.context
    }

    /// The first position of a chunk whose prediction counts.
    pub(super) fn first(&self) -> usize {
        self.context / 2
    }

    /// Predictions of a chunk that count.
    pub(super) fn rows(&self) -> usize {
        self.context - 1 - self.first()
    }

    /// (u16) length of a row.
    pub(super) fn row_length(&self) -> usize {
        self.vocabulary.next_multiple_of(2) + 4
    }

    /// Bytes of the file.
    pub(super) fn file_bytes(&self) -> u64 {
        let rows = (self.chunks() * self.rows()) as u64;
        20 + 4 * self.tokens.len() as u64 + 2 * rows * self.row_length() as u64
    }
}

/// Compresses the logits of one prediction. Returns the negative log-likelihood of `target`.
///
/// The arithmetic is llama-perplexity's, so that the files are the same for the same logits.
pub(super) fn compress(logits: &[f32], target: Token, row: &mut [u16]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = logits.iter().copied().fold(f32::INFINITY, f32::min).max(most - DEPTH);
    let sum: f64 = logits.iter().map(|x| f64::from((x - most).exp())).sum();
    let log_sum = sum.ln() as f32;
    let scale = (most - least) / 65535.0;
    let (head, body) = row.split_at_mut(4);
    for (to, value) in head.chunks_exact_mut(2).zip([scale, least - most - log_sum]) {
        let bits = value.to_bits();
        to.copy_from_slice(&[bits as u16, (bits >> 16) as u16]);
    }
    body.fill(0);
    if scale > 0.0 {
        let inverse = 1.0 / scale;
        for (to, x) in body.iter_mut().zip(logits) {
            if *x > least {
                *to = (inverse * (x - least)).round_ties_even() as u16;
            }
        }
    }
    f64::from(most + log_sum - logits[target as usize])
}

/// A compressed row.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    scale: f32,
    least: f32,
    codes: &'a [u16],
}

impl<'a> Row<'a> {
    /// `row` has the length [`Header::row_length`].
    pub(super) fn of(row: &'a [u16], vocabulary: usize) -> Self {
        let float = |at: usize| f32::from_bits(u32::from(row[at]) | u32::from(row[at + 1]) << 16);
        Self { scale: float(0), least: float(2), codes: &row[4..4 + vocabulary] }
    }

    pub(super) fn log_p(self, token: usize) -> f32 {
        self.scale * f32::from(self.codes[token]) + self.least
    }

    pub(super) fn len(self) -> usize {
        self.codes.len()
    }
}

/// Writes a file; it has its name once it is complete.
pub(super) struct Writer {
    path: PathBuf,
    part: PathBuf,
    file: BufWriter<File>,
}

impl Writer {
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn create(path: &Path, header: &Header) -> Result<Self, EvalError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let part = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let file = File::create(&part).map_err(at(path))?;
        let mut writer = Self { path: path.to_owned(), part, file: BufWriter::new(file) };
        let mut head = MAGIC.to_vec();
        for number in [header.context, header.vocabulary, header.chunks()] {
            head.extend_from_slice(&(number as u32).to_le_bytes());
        }
        head.extend(header.tokens.iter().flat_map(|token| token.to_le_bytes()));
        writer.write(&head)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), EvalError> {
        self.file.write_all(bytes).map_err(at(&self.path))
    }

    /// Appends rows.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn rows(&mut self, rows: &[u16]) -> Result<(), EvalError> {
        let bytes: Vec<u8> = rows.iter().flat_map(|code| code.to_le_bytes()).collect();
        self.write(&bytes)
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn finish(mut self) -> Result<(), EvalError> {
        let finish = |writer: &mut Self| {
            writer.file.flush()?;
            writer.file.get_ref().sync_all()?;
            std::fs::rename(&writer.part, &writer.path)
        };
        finish(&mut self).map_err(at(&self.path))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // It is gone if the file was finished.
        let _ = std::fs::remove_file(&self.part);
    }
}

/// Reads a file from its beginning to its end.
pub(super) struct Reader {
    path: PathBuf,
    pub header: Header,
    file: BufReader<File>,
}

impl Reader {
    /// # Errors
    /// If the file cannot be read, or is not such a file.
    pub(super) fn open(path: &Path) -> Result<Self, EvalError> {
        let file = File::open(path).map_err(at(path))?;
        let length = file.metadata().map_err(at(path))?.len();
        let mut file = BufReader::new(file);
        let refuse = |why: String| EvalError::Refused(format!("{}: {why}", path.display()));
        let mut head = [0; 20];
        let read = file.read_exact(&mut head);
        if read.is_err() || head[..8] != *MAGIC {
            return Err(refuse(
                "it is no file of log-probabilities (llama-perplexity's \
                               --kl-divergence-base, or --save-logits)"
                    .into(),
            ));
        }
        let number =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let [context, vocabulary, chunks] = [number(8), number(12), number(16)];
        if !(4..=MOST_CONTEXT).contains(&context) || !(1..=MOST_VOCABULARY).contains(&vocabulary) {
            return Err(refuse(format!(
                "its header is damaged: chunks of {context} tokens, a vocabulary of {vocabulary}"
            )));
        }
        let count = u64::from(context) * u64::from(chunks);
        if chunks == 0 || 20 + 4 * count > length {
            return Err(refuse(format!("it ends within the tokens of its {chunks} chunks")));
        }
        let mut bytes = vec![0; 4 * count as usize];
        file.read_exact(&mut bytes).map_err(at(path))?;
        let tokens: Vec<Token> = bytes
            .chunks_exact(4)
            .map(|bytes| Token::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect();
        if let Some(token) = tokens.iter().find(|token| **token >= vocabulary) {
            return Err(refuse(format!("token {token} is not in its vocabulary of {vocabulary}")));
        }
        let header = Header { context: context as usize, vocabulary: vocabulary as usize, tokens };
        if header.file_bytes() > length {
            return Err(refuse(format!(
                "it has {length} bytes of {}: it was not written to its end",
                header.file_bytes()
            )));
        }
        Ok(Self { path: path.to_owned(), header, file })
    }

    /// (rows · row length) the rows of the next chunk.
    ///
    /// # Errors
    /// If the file cannot be read, or a row is no distribution.
    pub(super) fn chunk(&mut self) -> Result<Vec<u16>, EvalError> {
        let length = self.header.row_length();
        let mut bytes = vec![0; 2 * self.header.rows() * length];
        self.file.read_exact(&mut bytes).map_err(at(&self.path))?;
        let codes: Vec<u16> =
            bytes.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]])).collect();
        for row in codes.chunks_exact(length) {
            let Row { scale, least, .. } = Row::of(row, self.header.vocabulary);
            // No probability is above 1.
            let most = 65535.0 * scale + least;
            if !(scale >= 0.0 && least.is_finite() && most <= 0.01) {
                let why = format!("{}: a row is damaged", self.path.display());
                return Err(EvalError::Refused(why));
            }
        }
        Ok(codes)
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> EvalError {
    let path = path.to_owned();
    move |source| EvalError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header { context: 8, vocabulary: 5, tokens: (0..16).map(|n| n % 5).collect() }
    }

    /// The logits of a row that depend on its number.
    fn logits(number: usize) -> [f32; 5] {
        std::array::from_fn(|token| {
            ((number * 7 + token * 3) % 11) as f32 - 30.0 * f32::from(u8::from(token == 4))
        })
    }

    fn write(path: &Path) {
        let header = header();
        let mut writer = Writer::create(path, &header).unwrap();
        let mut row = vec![0; header.row_length()];
        for number in 0..header.chunks() * header.rows() {
            compress(&logits(number), 0, &mut row);
            writer.rows(&row).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base");
        write(&path);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(reader.header, header());
        assert_eq!((reader.header.chunks(), reader.header.rows()), (2, 3));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), reader.header.file_bytes());
        for chunk in 0..2 {
            let codes = reader.chunk().unwrap();
            for (number, row) in codes.chunks(reader.header.row_length()).enumerate() {
                let (row, logits) = (Row::of(row, 5), logits(chunk * 3 + number));
                let total = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
                let most = logits.iter().copied().fold(f32::MIN, f32::max);
                for (token, x) in logits.iter().enumerate() {
                    let right = f64::from(x.max(most - DEPTH)) - total;
                    assert!((f64::from(row.log_p(token)) - right).abs() < 2e-4, "{token}");
                }
            }
        }
        assert!(reader.chunk().is_err(), "there is no third chunk");
    }

    #[test]
    fn a_row_has_llama_perplexitys_bits() {
        // From its log_softmax with the same logits, by hand: scale = 16 / 65535, codes are steps
        // above the lowest stored logit.
        let mut row = [9; 8];
        let nll = compress(&[4.0, 0.0, -20.0], 1, &mut row);
        let log_sum = (1.0 + (-4f64).exp() + (-24f64).exp()).ln();
        assert!((nll - (4.0 + log_sum)).abs() < 1e-6);
        let scale = f32::from_bits(u32::from(row[0]) | u32::from(row[1]) << 16);
        assert_eq!(scale, 16.0 / 65535.0);
        assert_eq!(row[4..], [65535, 49151, 0, 0]);
        // All logits equal: there is no scale.
        let mut row = [9; 6];
        let nll = compress(&[1.0, 1.0], 0, &mut row);
        assert!((nll - 2f64.ln()).abs() < 1e-6);
        assert_eq!((row[0], row[1], row[4], row[5]), (0, 0, 0, 0));
        assert!((Row::of(&row, 2).log_p(1) + 2f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            match Reader::open(&path) {
                Ok(_) => panic!("it was read"),
                Err(error) => error.to_string(),
            }
        };
        assert!(refused(b"").contains("no file of log-probabilities"));
        assert!(refused(&[b"_logitz_", &good[8..]].concat()).contains("no file of"));
        assert!(refused(&good[..good.len() - 1]).contains("not written to its end"));
        assert!(refused(&good[..40]).contains("within the tokens"));
        let with = |at: usize, number: u32| {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
            bytes
        };
        for (at, number, why) in [
            (8, 0, "damaged"),
            (8, u32::MAX, "damaged"),
            (12, 0, "damaged"),
            (12, u32::MAX, "damaged"),
            (16, 0, "within"),
            (16, u32::MAX, "within"),
            (20, 5, "token 5"),
        ] {
            let error = refused(&with(at, number));
            assert!(error.contains(why), "{at}, {number}: {error}");
        }
        // A scale that makes no distribution, in the first row.
        for scale in [f32::NAN, f32::MAX, f32::INFINITY, -1.0, 1.0] {
            std::fs::write(&path, with(20 + 64, scale.to_bits())).unwrap();
            let error = Reader::open(&path).unwrap().chunk().unwrap_err().to_string();
            assert!(error.contains("a row is damaged"), "{scale}: {error}");
        }
    }
}
