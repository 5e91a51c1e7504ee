//! Quantization by llama.cpp: [`quantize`].
//!
//! `llama_model_quantize` chooses the type of each tensor and converts it, so that the tensors are
//! byte for byte those that llama-quantize writes from the same file, options and importance matrix.
//! Here is what it lacks: checks with messages that say what to change, Hugging Face folders,
//! importance matrices, progress, and an output that is there as a whole or not at all.

use super::imatrix::Imatrix;
use crate::gguf::{Gguf, TensorType, convert, is_hugging_face};
use crate::job::{CompressError, QuantizePlan, QuantizeReport, QuantizedTensor};
use crate::llama_log::{LogCapture, LogLine};
use llama_cpp_sys_2 as sys;
use rustix::fs::{FlockOperation, flock};
use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

/// Maximum bytes of rows that are held at once; the input is mapped.
const BUFFER: usize = 64 << 20;

/// One quantization at a time: llama.cpp's log is global.
static ONE: Mutex<()> = Mutex::new(());

/// Carries out a plan. `progress` is called with every tensor that was written.
///
/// # Errors
/// [`CompressError`]; no output is left, and an earlier output is as it was.
pub fn quantize(
    plan: &QuantizePlan,
    progress: &mut dyn FnMut(QuantizedTensor),
) -> Result<QuantizeReport, CompressError> {
    let _one = ONE.lock();
    let folder = check_output(&plan.output)?;
    let part = Parts::new(&plan.output, folder)?;
    let mut notes = Vec::new();
    let converted = Temporary(folder.join(format!(".{}.f32.part", name_of(&plan.output))));
    let input = match is_hugging_face(&plan.input) {
        true => {
            let lacking = convert(&plan.input, &converted.0, &[]);
            let lacking = lacking.map_err(|error| refused(&plan.input, &error))?;
            notes.extend(lacking.into_iter().map(|what| format!("left out: {what}")));
            converted.0.clone()
        }
        false => plan.input.clone(),
    };
    let shards = shards(&input)?;
    let outputs = outputs(plan, &shards)?;
    let mut models = Vec::with_capacity(shards.len());
    for shard in &shards {
        models.push(Gguf::open(shard).map_err(|error| refused(&plan.input, &error))?);
    }
    check_types(plan, &models)?;
    let imatrix = read_imatrix(plan, &models)?;
    let (more, errors) = run(plan, &input, &part.stem, imatrix.as_ref(), progress)?;
    if let Some(errors) = errors {
        return Err(explain(plan, folder, &errors));
    }
    notes.extend(more);
    let after = part.publish(&outputs)?;
    let tensors = models.iter().flat_map(|model| model.tensors());
    Ok(QuantizeReport {
        files: outputs,
        before: models.iter().map(Gguf::file_size).sum(),
        after,
        weights: tensors.map(|tensor| tensor.elements()).sum(),
        notes,
    })
}

/// The files of a model: one, or all parts of a split one whose first part is given.
fn shards(input: &Path) -> Result<Vec<PathBuf>, CompressError> {
    let name = name_of(input);
    let Some(stem) = name.strip_suffix(".gguf") else { return Ok(vec![input.to_owned()]) };
    let split = stem.rsplit_once("-of-").and_then(|(before, count)| {
        let (prefix, number) = before.rsplit_once('-')?;
        let plain = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let count = count.parse::<usize>().ok().filter(|_| plain(count) && plain(number))?;
        Some((prefix, number.parse::<usize>().ok()?, count))
    });
    match split {
        None => Ok(vec![input.to_owned()]),
        Some((prefix, 1, count)) => Ok((1..=count)
            .map(|number| input.with_file_name(shard(prefix, number, count)))
            .collect()),
        Some((prefix, _, count)) => {
            let first = shard(prefix, 1, count);
            Err(refused(
                input,
                &format!("it is a part of a split model; name the first one, {first}"),
            ))
        }
    }
}

/// llama.cpp's name of a part of a split model.
fn shard(prefix: &str, number: usize, count: usize) -> String {
    format!("{prefix}-{number:05}-of-{count:05}.gguf")
}

/// The files to write.
fn outputs(plan: &QuantizePlan, shards: &[PathBuf]) -> Result<Vec<PathBuf>, CompressError> {
    let name = name_of(&plan.output);
    let prefix = name.strip_suffix(".gguf").unwrap_or(&name);
    let outputs: Vec<PathBuf> = match plan.keep_split && shards.len() > 1 {
        false => vec![plan.output.clone()],
        true => (1..=shards.len())
            .map(|number| plan.output.with_file_name(shard(prefix, number, shards.len())))
            .collect(),
    };
    for output in &outputs {
        if shards.iter().any(|shard| is_same(output, shard)) {
            return Err(refused(output, &"it is the input; name another file"));
        }
        check_free(output, plan.force)?;
    }
    Ok(outputs)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(super) fn refused(path: &Path, why: &dyn std::fmt::Display) -> CompressError {
    CompressError::Refused(format!("{}: {why}", path.display()))
}

/// Whether both paths are of the same file.
pub(super) fn is_same(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// Checks that one file can be written.
pub(super) fn check_new(output: &Path, force: bool) -> Result<(), CompressError> {
    check_output(output)?;
    check_free(output, force)
}

fn check_free(output: &Path, force: bool) -> Result<(), CompressError> {
    match output.exists() && !force {
        true => Err(refused(output, &"it exists; --force replaces it")),
        false => Ok(()),
    }
}

/// The folder of the output.
fn check_output(output: &Path) -> Result<&Path, CompressError> {
    let folder = match output.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => return Err(refused(output, &"it is no file")),
    };
    if !folder.is_dir() {
        return Err(refused(folder, &"there is no such folder; make it first"));
    }
    if output.is_dir() {
        return Err(refused(output, &"it is a folder; name a file"));
    }
    Ok(folder)
}

/// Checks that no tensor is quantized twice without being asked for, and that the types that are
/// given for some tensors can be had.
fn check_types(plan: &QuantizePlan, models: &[Gguf]) -> Result<(), CompressError> {
    let tensors = || models.iter().flat_map(|model| model.tensors());
    if let Some(tensor) = tensors().find(|tensor| tensor.ty().is_quantized())
        && !plan.settings.requantize
        && !plan.settings.ty.copies()
    {
        return Err(refused(
            &plan.input,
            &format!(
                "tensor `{}` is quantized already ({}), and a second quantization loses more than one \
                 from the original weights. Use the F32, F16 or BF16 file, or set `requantize`",
                tensor.name(),
                tensor.ty().name()
            ),
        ));
    }
    let plain = ["F32", "F16", "BF16", "COPY"].contains(&plan.settings.ty.name());
    if plain && !plan.settings.overrides.is_empty() {
        let why =
            format!("types of tensors have no effect with the type {}", plan.settings.ty.name());
        return Err(CompressError::Refused(why));
    }
    // llama.cpp falls back to another type for all tensors but these.
    let given = [
        (plan.settings.output_type, "output.weight", "output_type"),
        (plan.settings.embedding_type, "token_embd.weight", "embedding_type"),
        (plan.settings.embedding_type, "per_layer_token_embd.weight", "embedding_type"),
    ];
    for (ty, name, option) in given {
        let (Some(ty), Some(tensor)) = (ty, tensors().find(|tensor| tensor.name() == name)) else {
            continue;
        };
        let columns = tensor.dims().first().copied().unwrap_or_default();
        if !columns.is_multiple_of(ty.block_size()) {
            return Err(CompressError::Refused(format!(
                "{option} {}: the rows of `{name}` have {columns} numbers, no multiple of {}; choose \
                 another type",
                ty.name(),
                ty.block_size()
            )));
        }
    }
    Ok(())
}

fn read_imatrix(plan: &QuantizePlan, models: &[Gguf]) -> Result<Option<Imatrix>, CompressError> {
    let Some(path) = &plan.settings.imatrix else { return Ok(None) };
    let refused = |error| refused(path, &error);
    let imatrix = Imatrix::read(path).map_err(refused)?;
    imatrix.check(models).map_err(refused)?;
    Ok(Some(imatrix))
}

/// Notes, and the errors if it failed.
type RunLog = (Vec<String>, Option<Vec<String>>);

/// Runs llama.cpp on a thread, and follows its log here.
fn run(
    plan: &QuantizePlan,
    input: &Path,
    output: &Path,
    imatrix: Option<&Imatrix>,
    progress: &mut dyn FnMut(QuantizedTensor),
) -> Result<RunLog, CompressError> {
    let call = Call::new(plan, input, output, imatrix)?;
    let (lines, log) = channel();
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let capture = LogCapture::start(lines);
            let status = call.run();
            drop(capture);
            status
        });
        let (notes, errors) = follow(&log, progress);
        match worker.join() {
            Ok(0) => Ok((notes, None)),
            Ok(_) => Ok((notes, Some(errors))),
            Err(_) => Err(CompressError::Refused("llama.cpp panicked".into())),
        }
    })
}

/// Reads the log to its end: notes and errors.
fn follow(
    log: &Receiver<LogLine>,
    progress: &mut dyn FnMut(QuantizedTensor),
) -> (Vec<String>, Vec<String>) {
    let (mut notes, mut errors) = (Vec::new(), Vec::new());
    let mut begun = None;
    for (is_error, line) in log {
        begun = tensor_begun(&line).or(begun);
        if let (Some(tensor), Some((before, after))) = (&begun, sizes(&line)) {
            progress(QuantizedTensor { before, after, ..tensor.clone() });
            begun = None;
        } else if is_error {
            errors.push(line);
        } else if line.contains("required fallback") {
            let text = line.rsplit("WARNING: ").next().unwrap_or(&line);
            notes.push(format!("{text}: rows that are no multiple of a block of the type"));
        } else {
            tracing::debug!("{line}");
        }
    }
    (notes, errors)
}

/// Reads the beginning of `[ 12/ 272] NAME - [SHAPE], type = f32, converting to q4_K .. size =
/// 1.00 MiB -> 0.14 MiB`. Messages about the tensor may stand in lines between this and the sizes.
fn tensor_begun(line: &str) -> Option<QuantizedTensor> {
    let (numbers, rest) = line.strip_prefix('[')?.split_once(']')?;
    let (number, total) = numbers.split_once('/')?;
    let count = |text: &str| text.trim().parse::<usize>().ok();
    let (number, total) = (count(number)?, count(total)?);
    let name = rest.split_whitespace().next()?.to_owned();
    Some(QuantizedTensor { number, total, name, before: 0.0, after: 0.0 })
}

/// Reads the sizes at the end of such a line, in MiB before and after.
fn sizes(line: &str) -> Option<(f64, f64)> {
    let (_, sizes) = line.rsplit_once("size = ")?;
    let mebibytes = |text: &str| text.trim().strip_suffix("MiB")?.trim().parse::<f64>().ok();
    match sizes.split_once("->") {
        Some((before, after)) => Some((mebibytes(before)?, mebibytes(after)?)),
        None => mebibytes(sizes).map(|size| (size, size)),
    }
}

/// What to change, from llama.cpp's errors.
fn explain(plan: &QuantizePlan, folder: &Path, errors: &[String]) -> CompressError {
    let all = errors.join(" ");
    if all.contains("iostream error") || all.contains("basic_ios") {
        let free = rustix::fs::statvfs(folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
        let source = match free < BUFFER as u64 {
            true => io::Error::from(io::ErrorKind::StorageFull),
            false => io::Error::other("an error while writing"),
        };
        return CompressError::Write { path: plan.output.clone(), source };
    }
    let last = errors.last().map_or("llama.cpp gave no reason", |line| {
        line.rsplit("failed to quantize: ").next().unwrap_or(line)
    });
    let tensor = errors.iter().find_map(|line| line.split_once("offending tensor: "));
    let tensor = tensor.map(|(_, name)| format!(" (tensor `{}`)", name.trim())).unwrap_or_default();
    let why = match last {
        _ if all.contains("requires an importance matrix")
            || all.contains("Missing importance") =>
        {
            format!(
                "type {} needs an importance matrix{tensor}: give one (`imatrix`), or choose another \
                 type",
                plan.settings.ty.name()
            )
        }
        last => format!("{last}{tensor}"),
    };
    refused(&plan.input, &why)
}

/// The arguments of `llama_model_quantize`, which own what its pointers point to.
struct Call {
    input: CString,
    output: CString,
    plan: QuantizePlan,
    patterns: Vec<(CString, TensorType)>,
    entries: Vec<(CString, Vec<f32>)>,
}

impl Call {
    fn new(
        plan: &QuantizePlan,
        input: &Path,
        output: &Path,
        imatrix: Option<&Imatrix>,
    ) -> Result<Self, CompressError> {
        let text = |path: &Path| {
            CString::new(path.as_os_str().as_encoded_bytes())
                .map_err(|_| refused(path, &"its name has a NUL byte"))
        };
        let pattern = |pattern: &str| {
            CString::new(pattern).map_err(|_| {
                CompressError::Refused("a pattern of the types of tensors has a NUL byte".into())
            })
        };
        let patterns =
            plan.settings.overrides.iter().map(|found| Ok((pattern(&found.pattern)?, found.ty)));
        let entries = imatrix.into_iter().flat_map(|imatrix| &imatrix.means);
        let entries = entries.map(|(name, means)| Ok((pattern(name)?, means.clone())));
        Ok(Self {
            input: text(input)?,
            output: text(output)?,
            plan: plan.clone(),
            patterns: patterns.collect::<Result<_, CompressError>>()?,
            entries: entries.collect::<Result<_, CompressError>>()?,
        })
    }

    /// 0: the output is written.
    fn run(&self) -> u32 {
        let mut overrides: Vec<_> = self
            .patterns
            .iter()
            .map(|(pattern, ty)| sys::llama_model_tensor_override {
                pattern: pattern.as_ptr(),
                type_: *ty as sys::ggml_type,
            })
            .collect();
        overrides.push(sys::llama_model_tensor_override { pattern: std::ptr::null(), type_: 0 });
        let mut imatrix: Vec<_> = self
            .entries
            .iter()
            .map(|(name, means)| sys::llama_model_imatrix_data {
                name: name.as_ptr(),
                data: means.as_ptr(),
                size: means.len(),
            })
            .collect();
        let end = sys::llama_model_imatrix_data {
            name: std::ptr::null(),
            data: std::ptr::null(),
            size: 0,
        };
        imatrix.push(end);
        let plan = &self.plan;
        // SAFETY: the function has no arguments and returns plain data.
        let mut params = unsafe { sys::llama_model_quantize_default_params() };
        let ty = |ty: Option<TensorType>, other| ty.map_or(other, |ty| ty as sys::ggml_type);
        params.nthread = i32::try_from(plan.threads).unwrap_or(i32::MAX);
        params.ftype = plan.settings.ty.number() as sys::llama_ftype;
        params.output_tensor_type = ty(plan.settings.output_type, params.output_tensor_type);
        params.token_embedding_type = ty(plan.settings.embedding_type, params.token_embedding_type);
        params.allow_requantize = plan.settings.requantize;
        params.quantize_output_tensor = !plan.settings.leave_output;
        params.only_copy = plan.settings.ty.copies();
        params.pure_ = plan.settings.pure;
        params.keep_split = plan.keep_split;
        params.max_buf_size = BUFFER;
        if !self.entries.is_empty() {
            params.imatrix = imatrix.as_ptr();
        }
        if !self.patterns.is_empty() {
            params.tt_overrides = overrides.as_ptr();
        }
        // SAFETY: the paths are NUL-terminated. The arrays end with a null name or pattern, and they
        // and what they point to live in `self` and in this function until the call returns; it keeps
        // no pointer. Exceptions are caught inside and become its result.
        unsafe {
            sys::llama_backend_init();
            sys::llama_model_quantize(self.input.as_ptr(), self.output.as_ptr(), &raw const params)
        }
    }
}

/// A file that is deleted when this value is dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The files that llama.cpp writes before the output is in its place: one, or one for each part of a
/// split model. They are deleted when this value is dropped.
struct Parts {
    folder: PathBuf,
    /// The path that is passed to llama.cpp.
    stem: PathBuf,
    name: String,
    /// Locked: no other process writes the same output.
    _lock: fs::File,
    lock: Temporary,
}

impl Parts {
    /// Also deletes what a killed process left.
    fn new(output: &Path, folder: &Path) -> Result<Self, CompressError> {
        let name = format!(".{}.part", name_of(output));
        let lock = Temporary(folder.join(format!(".{}.lock", name_of(output))));
        let file = fs::File::create(&lock.0)
            .map_err(|source| CompressError::Write { path: lock.0.clone(), source })?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            // The file is the other process's.
            std::mem::forget(lock);
            return Err(refused(output, &"another process is writing it"));
        }
        let stem = folder.join(&name);
        let found = Self { folder: folder.to_owned(), stem, name, _lock: file, lock };
        found.remove();
        Ok(found)
    }

    /// The files in order.
    fn files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let named = files.filter(|file| {
            let name = file.file_name();
            let rest = name.to_str().and_then(|name| name.strip_prefix(&self.name));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        });
        let mut found: Vec<_> = named.map(|file| file.path()).collect();
        found.sort();
        found
    }

    fn remove(&self) {
        for file in self.files() {
            let _ = fs::remove_file(file);
        }
    }

    /// Syncs the files and moves them to their place. Returns their size.
    fn publish(&self, outputs: &[PathBuf]) -> Result<u64, CompressError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CompressError::Write { path, source }
        };
        let files = self.files();
        if files.len() != outputs.len() {
            let why = format!("llama.cpp wrote {} files, not {}", files.len(), outputs.len());
            return Err(CompressError::Refused(why));
        }
        let mut bytes = 0;
        for file in &files {
            let handle = fs::File::open(file).map_err(failed(file))?;
            handle.sync_all().map_err(failed(file))?;
            bytes += handle.metadata().map_err(failed(file))?.len();
        }
        for (file, output) in files.iter().zip(outputs) {
            fs::rename(file, output).map_err(failed(output))?;
        }
        let folder = &self.folder;
        fs::File::open(folder).and_then(|opened| opened.sync_all()).map_err(failed(folder))?;
        Ok(bytes)
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.remove();
        let _ = fs::remove_file(&self.lock.0);
    }
}

#[cfg(test)]
mod log_tests {
    use super::*;

    #[test]
    fn lines_of_the_log_are_read() {
        let (lines, log) = channel();
        for line in [
            "[   1/ 272] output_norm.weight - [ 576,     1,     1,     1], type =    f32, size =    0.002 MiB",
            "[  12/ 272] blk.0.ffn_down.weight    - [ 1536,   576,     1,     1], type =    f32, converting to \
             q6_K .. size =     3.38 MiB ->     0.69 MiB",
            "[  13/ 272] blk.0.ffn_up.weight - [ 576, 1536, 1, 1], type = f32,",
            "====== llama_model_quantize_impl: did not find weights for blk.0.ffn_up.weight",
            "converting to q4_K .. size =     3.38 MiB ->     0.47 MiB",
            "llama_model_quantize_impl: model size  =   256.63 MiB (16.00 BPW)",
            "[a/b] x",
        ] {
            lines.send((false, line.to_owned())).unwrap();
        }
        lines.send((true, "bad".into())).unwrap();
        drop(lines);
        let mut seen = Vec::new();
        let (notes, errors) = follow(&log, &mut |tensor| seen.push(tensor));
        assert_eq!((notes.len(), errors), (0, vec!["bad".to_owned()]));
        let of = |number, name: &str, before, after| QuantizedTensor {
            number,
            total: 272,
            name: name.into(),
            before,
            after,
        };
        let right = [
            of(1, "output_norm.weight", 0.002, 0.002),
            of(12, "blk.0.ffn_down.weight", 3.38, 0.69),
            of(13, "blk.0.ffn_up.weight", 3.38, 0.47),
        ];
        assert_eq!(seen, right);
    }
}
