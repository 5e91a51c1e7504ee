//! `ingot verify`: measures how much the runners' rounding changes a model's predictions.
//!
//! The reference is F32 arithmetic on the dequantized weights: a temporary GGUF in which
//! [`write_dequantized`] has converted every matrix to F32 (tests check that its decoders match
//! ggml's bit for bit), run by llama.cpp with keys and values in F32. So the native runner is not
//! its own reference. The native runner also runs the same file, and the two results must agree:
//! two independent programs that compute the same numbers in F32 validate the reference.
//!
//! The runners under test load the file as it is, with the default f16 cache. All runners read the
//! same windows of text, each from its beginning, and all rows count. Rows of logits are compared
//! as they are computed and not stored.
//!
//! Verification runs in the calling process. On a hostile file llama.cpp may terminate that
//! process; in the server only the engine process would die.

mod divergence;
mod report;
#[cfg(test)]
mod tests;

use crate::engine::runner::llama_cpp::LlamaCpp;
use crate::engine::runner::native::Native;
use crate::engine::runner::{
    Batch, BatchSequence, MAX_PROMPT_LOGITS, ModelRunner, PAGE_TOKENS, RunnerError, SeqSlot, Wants,
};
use crate::gguf::{Gguf, ModelFacts, TensorType, dequantized_bytes, write_dequantized};
use crate::ipc::{ActivationType, KvLayout, LoadSpec, RunnerKind, Token};
use crate::job::{VerifyError, VerifyPlan, VerifyProgress, VerifyReport};
use divergence::{Divergence, Reference};
use std::fs;
use std::path::{Path, PathBuf};

/// English prose, dialogue, code, numbers and some text in other languages, written for this
/// purpose.
pub const SAMPLE: &str = include_str!("sample.txt");

/// The names of the runners in the report.
const REFERENCE: &str = "F32, llama.cpp";
const NATIVE: &str = "native";
const NATIVE_I8: &str = "native, i8";
const NATIVE_I16: &str = "native, i16";
const LLAMA_CPP: &str = "llama.cpp";
const PROOF: &str = "F32, native";

impl From<RunnerError> for VerifyError {
    fn from(error: RunnerError) -> Self {
        Self::Runner(error.to_string())
    }
}

/// A runner that is compared with the reference.
struct Side {
    name: &'static str,
    runner: Box<dyn ModelRunner>,
    divergence: Divergence,
}

/// Evaluates the text with all runners.
///
/// # Errors
/// [`VerifyError`]. An exceeded bound is not an error but a failed [`VerifyCheck`](crate::job::VerifyCheck) in the report.
pub fn verify(
    plan: &VerifyPlan,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport, VerifyError> {
    let file = Gguf::open(&plan.model)?;
    let facts = ModelFacts::read(&file)?;
    let exact = is_f32(&file);
    let quantized = file.tensors().iter().any(|tensor| tensor.ty().block_size() > 1);
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
    progress(VerifyProgress::Loading(REFERENCE));
    let mut reference = LlamaCpp::load_exact(&spec(reference_file))?;
    let mut sides = Vec::new();
    let mut add = |name, runner: Box<dyn ModelRunner>| {
        sides.push(Side { name, runner, divergence: Divergence::default() });
    };
    progress(VerifyProgress::Loading(NATIVE));
    let uncovered = match Native::load(&spec(&plan.model)) {
        Ok(native) => {
            add(NATIVE, Box::new(native));
            let others = [(NATIVE_I8, ActivationType::I8), (NATIVE_I16, ActivationType::I16)];
            for (name, activations) in others.into_iter().filter(|_| quantized) {
                progress(VerifyProgress::Loading(name));
                let spec = LoadSpec { activations, ..spec(&plan.model) };
                let native = Native::load(&spec).map_err(|why| RunnerError(why.to_string()))?;
                add(name, Box::new(native));
            }
            None
        }
        Err(reason) => Some(reason.to_string()),
    };
    progress(VerifyProgress::Loading(LLAMA_CPP));
    add(LLAMA_CPP, Box::new(LlamaCpp::load(&spec(&plan.model))?));
    if !exact && uncovered.is_none() {
        progress(VerifyProgress::Loading(PROOF));
        let native = Native::load(&spec(reference_file));
        let native = native.map_err(|reason| RunnerError(format!("the F32 copy: {reason}")))?;
        add(PROOF, Box::new(native));
    }
    // All runners have mapped the file: delete it now, so that nothing stays on disk if this
    // process dies.
    drop(copy);

    let text = Text::new(&reference, plan.text.as_deref().unwrap_or(SAMPLE), plan.tokens)?;
    let windows = text.windows(window);
    let mut judge = Reference::default();
    for (number, window) in windows.iter().enumerate() {
        let done = windows[..number].iter().map(|window| window.inputs.len()).sum();
        progress(VerifyProgress::Reading { done, total: text.tokens.len() });
        read(window, &mut reference, &mut judge, &mut sides)?;
    }
    Ok(report::report(&facts, exact, uncovered, window, &judge, &sides))
}

/// Whether the file has only vectors and F32 matrices: then it is its own reference.
fn is_f32(file: &Gguf) -> bool {
    file.tensors().iter().all(|tensor| tensor.ty() == TensorType::F32)
}

/// The server's default settings, with one sequence of one window.
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

/// The tokens of the text, and the BOS token that every window begins with, if the model uses one.
struct Text {
    bos: Option<Token>,
    tokens: Vec<Token>,
}

/// One evaluation: the input tokens, and the token that follows each of them in the text, if any.
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

    /// Splits the text into windows of at most `window` inputs.
    fn windows(&self, window: usize) -> Vec<Window> {
        let mark = usize::from(self.bos.is_some());
        let parts = self.tokens.chunks(window.saturating_sub(mark).max(1)).enumerate();
        let each = |(number, part): (usize, &[Token])| {
            let inputs: Vec<Token> = self.bos.into_iter().chain(part.iter().copied()).collect();
            // BOS is followed by the first token of the window.
            let next = number * window.saturating_sub(mark).max(1) + 1 - mark;
            let targets = (next..next + inputs.len()).map(|at| self.tokens.get(at).copied());
            Window { targets: targets.collect(), inputs }
        };
        parts.map(each).collect()
    }
}

/// Reads a window with all runners, in steps of as many rows as a step returns logits for.
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

/// The temporary F32 copy of the model, deleted on drop.
struct Copy(PathBuf);

impl Copy {
    fn write(
        file: &Gguf,
        folder: &Path,
        progress: &mut dyn FnMut(VerifyProgress),
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
        progress(VerifyProgress::Writing(needed));
        let copy = Self(folder.join(format!(".verify-{}.gguf", std::process::id())));
        write_dequantized(file, &copy.0)?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // A failure cannot be handled here; the file may never have been written.
        let _ = fs::remove_file(&self.0);
    }
}
