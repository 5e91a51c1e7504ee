//! Tokenizes training files into a cache on disk.

use super::encode::{Encoded, Encoder};
use crate::dataset::{
    BadLines, DataError, DatasetKind, Line, Lines, OneFormat, PairFacts, hex, parse,
};
use crate::job::DataReport;
use rayon::prelude::*;
use serde_json::Value;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bit of a stored token that marks it as trained. Vocabularies are far smaller than this.
const TRAINED: u32 = 1 << 31;

/// Counts for the notes of a [`DataReport`].
#[derive(Debug, Default)]
struct Counts {
    /// Completions of conversations, and (`without_end`) those without an end-of-turn token.
    answers: u64,
    without_end: u64,
    /// Conversations that were split into several sequences, and the number of these sequences.
    split: u64,
    sequences: u64,
}

impl Counts {
    fn notes(&self) -> Vec<String> {
        let Self { answers, without_end, split, sequences } = self;
        let mut notes = Vec::new();
        if *without_end > 0 {
            notes.push(format!(
                "The chat template puts no end-of-turn token behind {without_end} of {answers} \
                 trained answers: the model does not learn from them where to stop. Use a chat \
                 template that writes the end-of-turn token behind the assistant's message."
            ));
        }
        if *split > 0 {
            notes.push(format!(
                "The chat template shows earlier answers otherwise than it prompts for them, so \
                 {split} conversations are trained as {sequences} sequences, each answer behind the \
                 prompt that it has when the model is served."
            ));
        }
        notes
    }
}

/// The tokenized examples of a file.
pub struct Prepared {
    file: File,
    /// (examples + 1) start of each example, in tokens.
    offsets: Vec<u64>,
}

impl Prepared {
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of tokens of an example.
    pub fn length(&self, example: usize) -> usize {
        (self.offsets[example + 1] - self.offsets[example]) as usize
    }

    /// Reads an example.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn get(&self, example: usize) -> io::Result<Encoded> {
        let mut bytes = vec![0; 4 * self.length(example)];
        self.file.read_exact_at(&mut bytes, 4 * self.offsets[example])?;
        let words = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        Ok(Encoded {
            tokens: words.clone().map(|word| word & !TRAINED).collect(),
            trained: words.map(|word| word & TRAINED != 0).collect(),
        })
    }
}

/// The tokenized preference pairs of a file.
pub struct PreparedPairs {
    /// The chosen completion of each pair, followed by the rejected one.
    answers: Prepared,
    facts: Vec<PairFacts>,
}

/// A preference pair: the prompt with the chosen, and the prompt with the rejected completion.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedPair {
    pub answers: [Encoded; 2],
    pub facts: PairFacts,
}

impl PreparedPairs {
    pub fn len(&self) -> usize {
        self.facts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a pair.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn get(&self, pair: usize) -> io::Result<EncodedPair> {
        let answers = [self.answers.get(2 * pair)?, self.answers.get(2 * pair + 1)?];
        Ok(EncodedPair { answers, facts: self.facts[pair] })
    }
}

/// The tokenized prompts of a file, with their lines.
pub struct PreparedPrompts {
    prompts: Prepared,
    /// The lines as JSON, concatenated.
    items: File,
    /// (prompts + 1) start of each line, in bytes.
    offsets: Vec<u64>,
}

/// A prompt whose completions are sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedPrompt {
    pub tokens: Vec<u32>,
    /// The line of the prompt, for graders.
    pub item: Value,
}

impl PreparedPrompts {
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a prompt.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn get(&self, prompt: usize) -> io::Result<EncodedPrompt> {
        let (start, end) = (self.offsets[prompt], self.offsets[prompt + 1]);
        let mut item = vec![0; (end - start) as usize];
        self.items.read_exact_at(&mut item, start)?;
        let tokens = self.prompts.get(prompt)?.tokens;
        Ok(EncodedPrompt { tokens, item: serde_json::from_slice(&item)? })
    }
}

/// Reads `source`, checks and tokenizes every line, and writes the tokens to `cache`.
///
/// # Errors
/// [`DataError`].
pub fn prepare(
    source: &Path,
    encoder: &Encoder,
    max_length: usize,
    cache: &Path,
) -> Result<(Prepared, DataReport), DataError> {
    let read = read(source, encoder, DatasetKind::PromptCompletion, max_length, cache)?;
    Ok((read.tokens, read.report))
}

/// [`prepare`] for preference pairs. A pair is dropped if one of its completions is too long (it is
/// never truncated), or if both completions are equal.
///
/// # Errors
/// [`DataError`].
pub fn prepare_pairs(
    source: &Path,
    encoder: &Encoder,
    max_length: usize,
    cache: &Path,
) -> Result<(PreparedPairs, DataReport), DataError> {
    let read = read(source, encoder, DatasetKind::Preference, max_length, cache)?;
    Ok((PreparedPairs { answers: read.tokens, facts: read.facts }, read.report))
}

/// [`prepare`] for prompts. Prompts that are too long are dropped. Their lines are written to a
/// file beside `cache`.
///
/// # Errors
/// [`DataError`].
pub fn prepare_prompts(
    source: &Path,
    encoder: &Encoder,
    max_length: usize,
    cache: &Path,
) -> Result<(PreparedPrompts, DataReport), DataError> {
    let read = read(source, encoder, DatasetKind::PromptOnly, max_length, cache)?;
    let items = File::open(items_of(cache))?;
    Ok((PreparedPrompts { prompts: read.tokens, items, offsets: read.items }, read.report))
}

fn items_of(cache: &Path) -> PathBuf {
    cache.with_extension("items")
}

/// The result of reading a file.
struct Read {
    tokens: Prepared,
    facts: Vec<PairFacts>,
    /// Start of each prompt's line in the items file, and the end of the last one.
    items: Vec<u64>,
    report: DataReport,
}

/// The tokens of a line: its completions, or its prompt.
#[derive(Default)]
struct Tokens {
    /// The sequences of an example, or the chosen and the rejected completion of a pair.
    answers: Vec<Encoded>,
    facts: Option<PairFacts>,
    /// The line of a prompt.
    item: Option<String>,
    counts: Counts,
}

impl Tokens {
    fn of(line: Line, encoder: &Encoder) -> Result<Self, String> {
        match line {
            Line::One(example) => {
                let found = encoder.encode(&example)?;
                let count = found.sequences.len() as u64;
                let (split, sequences) = if count > 1 { (1, count) } else { (0, 0) };
                let (answers, without_end) = (found.answers, found.without_end);
                let counts = Counts { answers, without_end, split, sequences };
                Ok(Self { answers: found.sequences, counts, ..Self::default() })
            }
            Line::Pair(pair) => {
                let (mut answers, mut counts) = (Vec::new(), Counts::default());
                for (example, name) in [(&pair.chosen, "chosen"), (&pair.rejected, "rejected")] {
                    let found = encoder.encode_one(example);
                    let found = found.map_err(|why| format!("the {name} answer: {why}"))?;
                    counts.answers += found.answers;
                    counts.without_end += found.without_end;
                    answers.extend(found.sequences);
                }
                answers.iter_mut().for_each(Encoded::end_at_the_answer);
                Ok(Self { answers, facts: Some(pair.facts), counts, ..Self::default() })
            }
            Line::Prompt(prompt) => {
                let tokens = encoder.prompt(&prompt.chat)?;
                let trained = vec![false; tokens.len()];
                let item = Some(Value::Object(prompt.item).to_string());
                Ok(Self { answers: vec![Encoded { tokens, trained }], item, ..Self::default() })
            }
        }
    }

    /// The part that can be trained on; `None` if there is none.
    fn within(mut self, max_length: usize, report: &mut DataReport) -> Option<Self> {
        let longest = self.answers.iter().map(|answer| answer.tokens.len()).max().unwrap_or(0);
        report.examples += 1;
        report.longest = report.longest.max(longest as u64);
        let trains = |answer: &Encoded| answer.targets() > 0;
        let fits = match (&self.item, self.facts) {
            (Some(_), _) => longest <= max_length,
            (None, Some(_)) => {
                longest <= max_length
                    && self.answers[0] != self.answers[1]
                    && self.answers.iter().all(trains)
            }
            (None, None) => {
                report.truncated += u64::from(longest > max_length);
                for answer in &mut self.answers {
                    answer.tokens.truncate(max_length);
                    answer.trained.truncate(max_length);
                }
                // Keeps those of several sequences that have trained tokens.
                self.answers.retain(trains);
                !self.answers.is_empty()
            }
        };
        report.dropped += u64::from(!fits);
        fits.then_some(self)
    }
}

fn read(
    source: &Path,
    encoder: &Encoder,
    dataset: DatasetKind,
    max_length: usize,
    cache: &Path,
) -> Result<Read, DataError> {
    let mut lines = Lines::open(source)?;
    let mut out = BufWriter::new(File::create(cache)?);
    let mut items_out = match dataset {
        DatasetKind::PromptOnly => Some(BufWriter::new(File::create(items_of(cache))?)),
        DatasetKind::PromptCompletion | DatasetKind::Preference => None,
    };
    let (mut items, mut offsets, mut facts) = (vec![0], vec![0], Vec::new());
    let (mut report, mut counts) = (DataReport::default(), Counts::default());
    let (mut bad, mut one_format) = (BadLines::default(), OneFormat::default());
    loop {
        let chunk = lines.next_chunk()?;
        if chunk.is_empty() {
            break;
        }
        let encoded: Vec<_> = chunk
            .par_iter()
            .map(|(number, line)| {
                let parsed = line.as_ref().map_err(Clone::clone);
                let parsed = parsed.and_then(|line| parse(line, dataset));
                let format = parsed.as_ref().ok().map(|(format, _)| *format);
                (*number, format, parsed.and_then(|(_, line)| Tokens::of(line, encoder)))
            })
            .collect();
        for (number, format, tokens) in encoded {
            // Lines that the template rejects also determine the format of the file.
            let same = format.map_or(Ok(()), |format| one_format.check(number, format));
            let tokens = match same.and(tokens) {
                Ok(tokens) => tokens,
                Err(why) => {
                    bad.add(number, why);
                    continue;
                }
            };
            counts.answers += tokens.counts.answers;
            counts.without_end += tokens.counts.without_end;
            counts.split += tokens.counts.split;
            counts.sequences += tokens.counts.sequences;
            let Some(tokens) = tokens.within(max_length, &mut report) else { continue };
            for answer in tokens.answers {
                report.tokens += answer.tokens.len() as u64;
                report.trained_tokens += answer.targets() as u64;
                put(&mut out, answer.tokens.into_iter().zip(answer.trained))?;
                offsets.push(report.tokens);
            }
            facts.extend(tokens.facts);
            if let (Some(item), Some(out)) = (tokens.item, &mut items_out) {
                out.write_all(item.as_bytes())?;
                items.push(items[items.len() - 1] + item.len() as u64);
            }
        }
    }
    bad.refuse()?;
    match (report.examples, offsets.len(), dataset) {
        (0, ..) => return Err(DataError::Empty),
        (_, 1, DatasetKind::PromptCompletion) => return Err(DataError::Untrained { max_length }),
        (_, 1, DatasetKind::Preference) => return Err(DataError::NoPair { max_length }),
        (_, 1, DatasetKind::PromptOnly) => return Err(DataError::NoPrompt { max_length }),
        _ => {}
    }
    for out in items_out.into_iter().chain([out]) {
        out.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    }
    report.digest = hex(lines.hash);
    report.notes = counts.notes();
    let tokens = Prepared { file: File::open(cache)?, offsets };
    Ok(Read { tokens, facts, items, report })
}

/// Prepares examples that are already tokenized; each token has a flag that says whether it is
/// trained.
///
/// # Errors
/// If the cache cannot be written.
pub fn prepare_tokens(
    examples: impl Iterator<Item = Vec<(u32, bool)>>,
    cache: &Path,
) -> io::Result<Prepared> {
    let mut out = BufWriter::new(File::create(cache)?);
    let mut offsets = vec![0];
    for example in examples {
        put(&mut out, example.iter().copied())?;
        offsets.push(offsets[offsets.len() - 1] + example.len() as u64);
    }
    out.flush()?;
    Ok(Prepared { file: File::open(cache)?, offsets })
}

fn put(out: &mut impl Write, tokens: impl Iterator<Item = (u32, bool)>) -> io::Result<()> {
    for (token, trained) in tokens {
        let word = token | if trained { TRAINED } else { 0 };
        out.write_all(&word.to_le_bytes())?;
    }
    Ok(())
}
