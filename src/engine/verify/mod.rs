//! `ingot verify`: how far the runners' rounding moves a model's predictions.
//!
//! The reference is F32 arithmetic on the dequantized weights: a temporary GGUF in which
//! [`write_dequantized`] has made every matrix F32 (its decoders give ggml's own bits, by test), run
//! by llama.cpp with keys and values in F32. So the native runner is not its own judge. The same
//! file also goes through the native runner, and both have to agree: two independent programs that
//! compute the same numbers in F32 are what proves the reference.
//!
//! The runners under test see the file as it is, with a cache in f16, as by default. All read the
//! same windows of text, each from its beginning, and all rows count. Rows of logits are compared as
//! they come and never kept.
//!
//! It runs in the calling process: llama.cpp may end it on a hostile file, where an engine process
//! of the server would die alone.

mod divergence;
mod report;
#[cfg(test)]
mod tests;

pub use report::{Check, Report, Summary};

use crate::engine::runner::llama_cpp::LlamaCpp;
use crate::engine::runner::native::Native;
use crate::engine::runner::{
    Batch, BatchSequence, MAX_PROMPT_LOGITS, ModelRunner, PAGE_TOKENS, RunnerError, SeqSlot, Wants,
};
use crate::gguf::{Gguf, GgufError, ModelFacts, TensorType, dequantized_bytes, write_dequantized};
use crate::ipc::{KvLayout, LoadSpec, RunnerKind, Token};
use divergence::{Divergence, Reference};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Tokens of a window.
pub const WINDOW: usize = 512;

/// English prose, dialogue, code, numbers and a little of other languages, written for this purpose.
pub const SAMPLE: &str = include_str!("sample.txt");

/// What to evaluate.
#[derive(Debug, Clone)]
pub struct Plan {
    pub model: PathBuf,
    pub text: String,
    /// The text's first tokens that count.
    pub tokens: usize,
    /// Tokens that are read from scratch together, at most.
    pub window: usize,
    pub threads: u32,
    /// Where the F32 copy may lie while it is needed.
    pub folder: PathBuf,
}

/// What is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Writing the F32 copy, this many bytes.
    Writing(u64),
    Loading(&'static str),
    /// Tokens that all have read, of this many.
    Reading {
        done: usize,
        total: usize,
    },
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the model cannot be verified: {0}")]
    Gguf(#[from] GgufError),
    #[error("{0}")]
    Runner(#[from] RunnerError),
    #[error(
        "the copy of the model in F32 needs {needed} bytes in {folder}, where {free} are free: make \
         room, or choose another data folder"
    )]
    Disk { needed: u64, free: u64, folder: String },
    #[error("{folder} cannot be looked at: {source}")]
    Folder { folder: String, source: io::Error },
    #[error("the text has {0} tokens, too few to measure anything")]
    TooShort(usize),
    #[error("{0} gave a logit that is no number")]
    NotFinite(&'static str),
}

/// The names of the sides, as they are reported.
const REFERENCE: &str = "F32, llama.cpp";
const NATIVE: &str = "native";
const LLAMA_CPP: &str = "llama.cpp";
const PROOF: &str = "F32, native";

/// One of the runners that are compared with the reference.
struct Side {
    name: &'static str,
    runner: Box<dyn ModelRunner>,
    divergence: Divergence,
}

/// Evaluates the text with all runners.
///
/// # Errors
/// [`VerifyError`]; missed bounds are no error but a [`Check`] of the report that did not pass.
pub fn verify(plan: &Plan, progress: &mut dyn FnMut(Progress)) -> Result<Report, VerifyError> {
    let file = Gguf::open(&plan.model)?;
    let facts = ModelFacts::read(&file)?;
    let exact = is_f32(&file);
    let copy = match exact {
        true => None,
        false => Some(Copy::write(&file, &plan.folder, progress)?),
    };
    drop(file);
    let reference_file = copy.as_ref().map_or(&*plan.model, |copy| &copy.0);

    let trained = match facts.n_ctx_train as usize {
        0 => usize::MAX,
        tokens => tokens,
    };
    let window = plan.window.min(trained).max(1);
    let spec = |model: &Path| spec(model, window, plan.threads);
    progress(Progress::Loading(REFERENCE));
    let mut reference = LlamaCpp::load_exact(&spec(reference_file))?;
    let mut sides = Vec::new();
    let mut add = |name, runner: Box<dyn ModelRunner>| {
        sides.push(Side { name, runner, divergence: Divergence::default() });
    };
    progress(Progress::Loading(NATIVE));
    let uncovered = match Native::load(&spec(&plan.model)) {
        Ok(native) => {
            add(NATIVE, Box::new(native));
            None
        }
        Err(reason) => Some(reason.to_string()),
    };
    progress(Progress::Loading(LLAMA_CPP));
    add(LLAMA_CPP, Box::new(LlamaCpp::load(&spec(&plan.model))?));
    if !exact && uncovered.is_none() {
        progress(Progress::Loading(PROOF));
        let native = Native::load(&spec(reference_file));
        let native = native.map_err(|reason| RunnerError(format!("the F32 copy: {reason}")))?;
        add(PROOF, Box::new(native));
    }
    // Everyone has it mapped: whatever happens to this process, nothing stays on the disk.
    drop(copy);

    let text = Text::new(&reference, &plan.text, plan.tokens)?;
    let windows = text.windows(window);
    let mut judge = Reference::default();
    for (number, window) in windows.iter().enumerate() {
        let done = windows[..number].iter().map(|window| window.inputs.len()).sum();
        progress(Progress::Reading { done, total: text.tokens.len() });
        read(window, &mut reference, &mut judge, &mut sides)?;
    }
    Ok(Report::new(&facts, exact, uncovered, window, &judge, &sides))
}

/// Nothing but vectors and F32 matrices: the file is its own reference.
fn is_f32(file: &Gguf) -> bool {
    file.tensors().iter().all(|tensor| tensor.ty() == TensorType::F32)
}

/// As the server runs a model by default, with one sequence of one window.
fn spec(model: &Path, window: usize, threads: u32) -> LoadSpec {
    let tokens = window.next_multiple_of(PAGE_TOKENS) as u32;
    LoadSpec {
        context_length: tokens,
        kv_tokens: tokens,
        max_sequences: 1,
        batch_tokens: MAX_PROMPT_LOGITS as u32,
        kv_layout: KvLayout::Streams,
        threads,
        ..LoadSpec::plain(model, RunnerKind::LlamaCpp)
    }
}

/// The tokens of a text, and the token that every window begins with.
struct Text {
    bos: Option<Token>,
    tokens: Vec<Token>,
}

/// What is read from scratch: tokens, and the token that really follows each, if any does.
struct Window {
    inputs: Vec<Token>,
    targets: Vec<Option<Token>>,
}

impl Text {
    fn new(model: &LlamaCpp, text: &str, limit: usize) -> Result<Self, VerifyError> {
        let tokenizer = model.tokenizer();
        let mut tokens = tokenizer.encode(text, false, false);
        tokens.truncate(limit);
        if tokens.len() < 2 {
            return Err(VerifyError::TooShort(tokens.len()));
        }
        let first = tokenizer.encode("a", true, false).first().copied();
        let bos = first.filter(|_| first == tokenizer.vocab().bos);
        Ok(Self { bos, tokens })
    }

    /// At most `window` inputs each.
    fn windows(&self, window: usize) -> Vec<Window> {
        let mark = usize::from(self.bos.is_some());
        let parts = self.tokens.chunks(window.saturating_sub(mark).max(1)).enumerate();
        let each = |(number, part): (usize, &[Token])| {
            let inputs: Vec<Token> = self.bos.into_iter().chain(part.iter().copied()).collect();
            // After BOS comes the window's first token.
            let next = number * window.saturating_sub(mark).max(1) + 1 - mark;
            let targets = (next..next + inputs.len()).map(|at| self.tokens.get(at).copied());
            Window { targets: targets.collect(), inputs }
        };
        parts.map(each).collect()
    }
}

/// Reads a window with everyone, as many rows at a time as a step gives logits for.
fn read(
    window: &Window,
    reference: &mut LlamaCpp,
    judge: &mut Reference,
    sides: &mut [Side],
) -> Result<(), VerifyError> {
    let parts =
        window.inputs.chunks(MAX_PROMPT_LOGITS).zip(window.targets.chunks(MAX_PROMPT_LOGITS));
    for (number, (tokens, targets)) in parts.enumerate() {
        let batch = batch(tokens, number * MAX_PROMPT_LOGITS);
        reference.step(&batch)?;
        for side in sides.iter_mut() {
            side.runner.step(&batch)?;
        }
        for (row, &target) in targets.iter().enumerate() {
            let known = judge.read(reference.logits(row)?, target);
            known.ok_or(VerifyError::NotFinite(REFERENCE))?;
            for side in sides.iter_mut() {
                let counted = side.divergence.add(judge, side.runner.logits(row)?, target);
                counted.ok_or(VerifyError::NotFinite(side.name))?;
            }
        }
    }
    reference.truncate(SeqSlot(0), 0);
    for side in sides {
        side.runner.truncate(SeqSlot(0), 0);
    }
    Ok(())
}

fn batch(tokens: &[Token], position: usize) -> Batch {
    let pages = (position + tokens.len()).div_ceil(PAGE_TOKENS) as u32;
    let sequence = BatchSequence {
        slot: SeqSlot(0),
        rows: 0..tokens.len(),
        position,
        wants: Wants::AllLogits,
        pages: (0..pages).collect(),
        adapter: None,
    };
    Batch { tokens: tokens.to_vec(), sequences: vec![sequence], adapter: None }
}

/// The F32 copy, removed when dropped.
struct Copy(PathBuf);

impl Copy {
    fn write(
        file: &Gguf,
        folder: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, VerifyError> {
        let needed = dequantized_bytes(file).saturating_add(file.data_offset());
        let space = rustix::fs::statvfs(folder).map_err(|error| VerifyError::Folder {
            folder: folder.display().to_string(),
            source: error.into(),
        })?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if needed > free {
            let folder = folder.display().to_string();
            return Err(VerifyError::Disk { needed, free, folder });
        }
        progress(Progress::Writing(needed));
        let copy = Self(folder.join(format!(".verify-{}.gguf", std::process::id())));
        write_dequantized(file, &copy.0)?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // Nothing can be done about a failure; a copy that was never written is none.
        let _ = fs::remove_file(&self.0);
    }
}
