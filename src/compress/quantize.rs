//! Quantization by llama.cpp: [`quantize`].
//!
//! `llama_model_quantize` chooses the type of each tensor and converts it, so that the tensors are
//! byte for byte those that llama-quantize writes from the same file, options and importance matrix.
//! Here is what it lacks: checks with messages that say what to change, Hugging Face folders,
//! importance matrices, progress, and an output that is there as a whole or not at all.

use super::imatrix::Imatrix;
use super::log::{Listening, LogLine};
use crate::gguf::{Gguf, TensorType, convert, is_hugging_face};
use crate::job::{QuantizeError, QuantizePlan, QuantizeReport, QuantizedTensor};
use llama_cpp_sys_2 as sys;
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
/// [`QuantizeError`]; no output is left, and an earlier output is as it was.
pub fn quantize(
    plan: &QuantizePlan,
    progress: &mut dyn FnMut(QuantizedTensor),
) -> Result<QuantizeReport, QuantizeError> {
    let _one = ONE.lock();
    let folder = check_output(plan)?;
    let part = Parts::new(&plan.output, folder);
    let mut notes = Vec::new();
    let converted = folder.join(format!(".{}.f32.part", name_of(&plan.output)));
    let converted = Temporary(converted);
    let input = match is_hugging_face(&plan.input) {
        true => {
            let lacking = convert(&plan.input, &converted.0, &[]);
            let lacking = lacking.map_err(|error| refused(&plan.input, &error))?;
            notes.extend(lacking.into_iter().map(|what| format!("left out: {what}")));
            converted.0.clone()
        }
        false => plan.input.clone(),
    };
    let model = Gguf::open(&input).map_err(|error| refused(&plan.input, &error))?;
    check_types(plan, &model)?;
    let imatrix = read_imatrix(plan, &model)?;
    let (said, errors) = run(plan, &input, &part.stem, imatrix.as_ref(), progress)?;
    if let Some(errors) = errors {
        return Err(explain(plan, folder, &errors));
    }
    notes.extend(said);
    let after = part.publish(&plan.output)?;
    Ok(QuantizeReport {
        before: model.file_size(),
        after,
        weights: model.tensors().iter().map(|tensor| tensor.elements()).sum(),
        notes,
    })
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn refused(path: &Path, why: &dyn std::fmt::Display) -> QuantizeError {
    QuantizeError::Refused(format!("{}: {why}", path.display()))
}

/// The folder of the output.
fn check_output(plan: &QuantizePlan) -> Result<&Path, QuantizeError> {
    let output = &plan.output;
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
    if output.exists() && !plan.force {
        return Err(refused(output, &"it exists; --force replaces it"));
    }
    let same =
        |a: &Path, b: &Path| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if same(output, &plan.input) {
        return Err(refused(output, &"it is the input; name another file"));
    }
    Ok(folder)
}

/// Checks that no tensor is quantized twice without being asked for.
fn check_types(plan: &QuantizePlan, model: &Gguf) -> Result<(), QuantizeError> {
    let quantized = model.tensors().iter().find(|tensor| tensor.ty().is_quantized());
    match quantized {
        Some(tensor) if !plan.requantize && !plan.ty.copies() => Err(refused(
            &plan.input,
            &format!(
                "tensor `{}` is quantized already ({}), and a second quantization loses more than one \
                 from the original weights. Use the F32, F16 or BF16 file, or --requantize.",
                tensor.name(),
                tensor.ty().name()
            ),
        )),
        _ => Ok(()),
    }
}

fn read_imatrix(plan: &QuantizePlan, model: &Gguf) -> Result<Option<Imatrix>, QuantizeError> {
    let Some(path) = &plan.imatrix else { return Ok(None) };
    let refused = |error| refused(path, &error);
    let imatrix = Imatrix::read(path).map_err(refused)?;
    imatrix.check(model).map_err(refused)?;
    Ok(Some(imatrix))
}

/// Notes, and the errors if it failed.
type Said = (Vec<String>, Option<Vec<String>>);

/// Runs llama.cpp on a thread, and follows its log here.
fn run(
    plan: &QuantizePlan,
    input: &Path,
    output: &Path,
    imatrix: Option<&Imatrix>,
    progress: &mut dyn FnMut(QuantizedTensor),
) -> Result<Said, QuantizeError> {
    let call = Call::new(plan, input, output, imatrix)?;
    let (lines, heard) = channel();
    std::thread::scope(|scope| {
        let listening = Listening::start(lines);
        let worker = scope.spawn(move || {
            let status = call.run();
            drop(listening);
            status
        });
        let (notes, errors) = follow(&heard, progress);
        match worker.join() {
            Ok(0) => Ok((notes, None)),
            Ok(_) => Ok((notes, Some(errors))),
            Err(_) => Err(QuantizeError::Refused("llama.cpp panicked".into())),
        }
    })
}

/// Reads the log to its end: notes and errors.
fn follow(
    heard: &Receiver<LogLine>,
    progress: &mut dyn FnMut(QuantizedTensor),
) -> (Vec<String>, Vec<String>) {
    let (mut notes, mut errors) = (Vec::new(), Vec::new());
    let mut begun = None;
    for (is_error, line) in heard {
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
fn explain(plan: &QuantizePlan, folder: &Path, errors: &[String]) -> QuantizeError {
    let all = errors.join(" ");
    if all.contains("iostream error") || all.contains("basic_ios") {
        let free = rustix::fs::statvfs(folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
        let source = match free < BUFFER as u64 {
            true => io::Error::from(io::ErrorKind::StorageFull),
            false => io::Error::other("an error while writing"),
        };
        return QuantizeError::Write { path: plan.output.clone(), source };
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
                "type {} needs an importance matrix{tensor}: give one with --imatrix, or choose another \
                 type",
                plan.ty.name()
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
    ) -> Result<Self, QuantizeError> {
        let text = |path: &Path| {
            CString::new(path.as_os_str().as_encoded_bytes())
                .map_err(|_| refused(path, &"its name has a NUL byte"))
        };
        let pattern = |pattern: &str| {
            CString::new(pattern).map_err(|_| {
                QuantizeError::Refused("a pattern of --tensor-type has a NUL byte".into())
            })
        };
        let patterns = plan.overrides.iter().map(|found| Ok((pattern(&found.pattern)?, found.ty)));
        let entries = imatrix.into_iter().flat_map(|imatrix| &imatrix.means);
        let entries = entries.map(|(name, means)| Ok((pattern(name)?, means.clone())));
        Ok(Self {
            input: text(input)?,
            output: text(output)?,
            plan: plan.clone(),
            patterns: patterns.collect::<Result<_, QuantizeError>>()?,
            entries: entries.collect::<Result<_, QuantizeError>>()?,
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
        params.ftype = plan.ty.number() as sys::llama_ftype;
        params.output_tensor_type = ty(plan.output_type, params.output_tensor_type);
        params.token_embedding_type = ty(plan.embedding_type, params.token_embedding_type);
        params.allow_requantize = plan.requantize;
        params.quantize_output_tensor = !plan.leave_output;
        params.only_copy = plan.ty.copies();
        params.pure_ = plan.pure;
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
}

impl Parts {
    /// Also deletes what a killed process left.
    fn new(output: &Path, folder: &Path) -> Self {
        let name = format!(".{}.part", name_of(output));
        let found = Self { folder: folder.to_owned(), stem: folder.join(&name), name };
        found.remove();
        found
    }

    /// The files, and what follows the stem in their names.
    fn files(&self) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        for file in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if let Some(rest) = name.strip_prefix(&self.name) {
                found.push((file.path(), rest.to_owned()));
            }
        }
        found.sort();
        found
    }

    fn remove(&self) {
        for (file, _) in self.files() {
            let _ = fs::remove_file(file);
        }
    }

    /// Syncs the files and moves them to their place. Returns their size.
    fn publish(&self, output: &Path) -> Result<u64, QuantizeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| QuantizeError::Write { path, source }
        };
        let mut bytes = 0;
        for (file, rest) in self.files() {
            let to = match rest.is_empty() {
                true => output.to_owned(),
                // llama.cpp has put `-00001-of-00003.gguf` behind the stem.
                false => {
                    let stem = output.with_extension("");
                    PathBuf::from(format!("{}{rest}", stem.display()))
                }
            };
            let handle = fs::File::open(&file).map_err(failed(&file))?;
            handle.sync_all().map_err(failed(&file))?;
            bytes += handle.metadata().map_err(failed(&file))?.len();
            fs::rename(&file, &to).map_err(failed(&to))?;
        }
        fs::File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed(output))?;
        Ok(bytes)
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod log_tests {
    use super::*;

    #[test]
    fn lines_of_the_log_are_read() {
        let (lines, heard) = channel();
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
        let (notes, errors) = follow(&heard, &mut |tensor| seen.push(tensor));
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
