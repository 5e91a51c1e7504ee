//! Importance matrices from a model's activations: for each matrix the sums of its squared inputs
//! over a calibration text. llama.cpp runs the model, and its conventions are those of llama-imatrix
//! (tools/imatrix/imatrix.cpp): chunks of 512 tokens, each from an empty cache with BOS in place of
//! its first token if the model uses BOS; the matrices of the layers, and the output matrix if asked
//! for.

use super::imatrix::{COUNTS, SUMS};
use super::quantize::{check_new, is_same, refused};
use crate::gguf::{Gguf, GgufWriter, TensorType};
use crate::job::{CompressError, ImatrixPlan, ImatrixReport};
use crate::llama_log::{LogCapture, LogLine};
use llama_cpp_sys_2 as sys;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, channel};

/// A matrix multiplication of fewer rows is not collected, as by llama-imatrix.
const LEAST_ROWS: i64 = 16;

/// The sums of a matrix.
#[derive(Debug, Clone, Default, PartialEq)]
struct Sums {
    /// (experts, columns) squares of the inputs.
    squares: Vec<f64>,
    /// (experts) rows that were summed.
    counts: Vec<u64>,
}

/// What the callback collects.
#[derive(Default)]
struct Collector {
    sums: BTreeMap<String, Sums>,
    output_tensor: bool,
    /// The first tensor whose inputs are not finite, or have another form than before.
    error: Option<String>,
    /// Inputs and expert ids, if they are not in this process's memory.
    buffer: Vec<u8>,
    ids: Vec<u8>,
}

/// Computes an importance matrix and writes it.
///
/// # Errors
/// If the output exists, the model cannot be loaded, the text is too short, or activations are not
/// finite; nothing is written.
pub fn imatrix(
    plan: &ImatrixPlan,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<ImatrixReport, CompressError> {
    check_new(&plan.output, plan.force)?;
    if is_same(&plan.output, &plan.model) {
        return Err(refused(&plan.output, &"it is the model; name another file"));
    }
    // llama.cpp aborts on some malformed files that the reader refuses.
    Gguf::open(&plan.model).map_err(|error| refused(&plan.model, &error))?;
    let (lines, log) = channel();
    let _capture = LogCapture::start(lines);
    let model = Model::load(&plan.model, &log)?;
    let mut tokens = model.tokenize(&plan.text)?;
    let there = tokens.len();
    if there < 2 * plan.context {
        return Err(CompressError::Refused(format!(
            "{}: the text has {there} tokens, and two chunks of {} are needed: take a longer text, or \
             a smaller --context",
            plan.text_name, plan.context
        )));
    }
    let chunks = plan.chunks.unwrap_or(usize::MAX).min(there / plan.context);
    tokens.truncate(chunks * plan.context);
    let mut collector = Collector { output_tensor: plan.output_tensor, ..Collector::default() };
    let mut context = Context::new(&model, plan, &mut collector, &log)?;
    for (number, chunk) in tokens.chunks_exact_mut(plan.context).enumerate() {
        progress(number, chunks);
        if let Some(bos) = model.bos() {
            chunk[0] = bos;
        }
        let decoded = context.decode(chunk);
        if let Some(why) = context.collector().error.take() {
            return Err(refused(&plan.model, &why));
        }
        if !decoded {
            return Err(llama_failed(&plan.model, "run", &log));
        }
    }
    progress(chunks, chunks);
    drop(context);
    if collector.sums.is_empty() {
        return Err(refused(&plan.model, &"no matrix of its layers was used"));
    }
    write(plan, &collector.sums, chunks)?;
    let unused = |sums: &Sums| sums.counts.iter().filter(|count| **count == 0).count();
    let unused_experts = collector.sums.iter().map(|(name, sums)| (name.clone(), unused(sums)));
    Ok(ImatrixReport {
        tensors: collector.sums.len(),
        chunks,
        tokens: chunks * plan.context,
        unused_experts: unused_experts.filter(|(_, unused)| *unused > 0).collect(),
    })
}

fn write(
    plan: &ImatrixPlan,
    sums: &BTreeMap<String, Sums>,
    chunks: usize,
) -> Result<(), CompressError> {
    let failed = |error: crate::gguf::GgufError| refused(&plan.output, &error);
    let mut file = GgufWriter::new();
    file.set("general.type", "imatrix")
        .set("imatrix.datasets", vec![plan.text_name.clone()])
        .set("imatrix.chunk_count", chunks as u32)
        .set("imatrix.chunk_size", plan.context as u32);
    for (name, Sums { squares, counts }) in sums {
        let experts = counts.len() as u64;
        let squares: Vec<f32> = squares.iter().map(|sum| *sum as f32).collect();
        let counts: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
        let dims = [squares.len() as u64 / experts, experts];
        file.tensor_f32(&format!("{name}{SUMS}"), &dims, TensorType::F32, squares)
            .map_err(failed)?;
        file.tensor_f32(&format!("{name}{COUNTS}"), &[1, experts], TensorType::F32, counts)
            .map_err(failed)?;
    }
    file.write(&plan.output).map_err(failed)?;
    Ok(())
}

/// llama.cpp could not do something with a model: its last error says why.
fn llama_failed(model: &Path, verb: &str, log: &Receiver<LogLine>) -> CompressError {
    let why = log.try_iter().filter(|(is_error, _)| *is_error).last();
    let why = why.map_or_else(String::new, |(_, line)| format!(": {line}"));
    refused(model, &format!("llama.cpp could not {verb} it{why}"))
}

/// A tensor's name without the additions of the scheduler: `NAME`, or `BACKEND#NAME#NUMBER`.
fn plain_name(name: &str) -> &str {
    match name.split_once('#') {
        Some((_, rest)) => rest.split('#').next().unwrap_or(rest),
        None => name,
    }
}

/// Receives each tensor before (`ask`) and after it is computed.
unsafe extern "C" fn on_tensor(
    tensor: *mut sys::ggml_tensor,
    ask: bool,
    collector: *mut c_void,
) -> bool {
    // SAFETY: llama.cpp passes a live tensor and the pointer that the context was made with, to a
    // `Collector` that outlives it; it calls from the thread that decodes.
    let (tensor, collector) = unsafe { (&*tensor, &mut *collector.cast::<Collector>()) };
    match ask {
        true => collector.wants(tensor),
        false => collector.take(tensor),
    }
}

/// The input `number` of a tensor.
fn source(tensor: &sys::ggml_tensor, number: usize) -> Option<&sys::ggml_tensor> {
    // SAFETY: an input is null or a tensor that lives as long as the graph.
    unsafe { tensor.src[number].as_ref() }
}

fn name_of(tensor: &sys::ggml_tensor) -> String {
    // SAFETY: ggml terminates names with NUL.
    let name = unsafe { CStr::from_ptr(tensor.name.as_ptr()) };
    plain_name(&name.to_string_lossy()).to_owned()
}

impl Collector {
    fn wants(&self, tensor: &sys::ggml_tensor) -> bool {
        let (Some(weights), Some(inputs)) = (source(tensor, 0), source(tensor, 1)) else {
            return false;
        };
        match tensor.op {
            sys::GGML_OP_MUL_MAT_ID => true,
            sys::GGML_OP_MUL_MAT => {
                let name = name_of(weights);
                let collected =
                    name.starts_with("blk.") || (self.output_tensor && name == "output.weight");
                collected && inputs.ne[1] >= LEAST_ROWS && inputs.type_ == sys::GGML_TYPE_F32
            }
            _ => false,
        }
    }

    /// Adds the squares of the inputs of a matrix. `false` ends the computation.
    fn take(&mut self, tensor: &sys::ggml_tensor) -> bool {
        let (Some(weights), Some(inputs)) = (source(tensor, 0), source(tensor, 1)) else {
            return true;
        };
        let name = name_of(weights);
        let data = host_data(inputs, &mut self.buffer);
        let columns = inputs.ne[0] as usize;
        let row = |at: usize| floats(data, at, columns);
        let (experts, rows) = match tensor.op {
            sys::GGML_OP_MUL_MAT_ID => {
                let Some(ids) = source(tensor, 2) else { return true };
                (weights.ne[2] as usize, routed_rows(inputs, ids, &mut self.ids))
            }
            _ => ((weights.ne[2] * weights.ne[3]) as usize, dense_rows(weights, inputs)),
        };
        let dense = tensor.op != sys::GGML_OP_MUL_MAT_ID;
        if rows.iter().any(|(expert, _)| *expert >= experts) {
            self.error = Some(format!("{name}: an expert that is not there is named"));
            return false;
        }
        let sums = self.sums.entry(name.clone()).or_default();
        if sums.counts.is_empty() {
            sums.squares = vec![0.0; columns * experts];
            // A matrix of several dimensions that is no set of experts has one count.
            sums.counts = vec![0; if dense { 1 } else { experts }];
        }
        if sums.squares.len() != columns * experts {
            self.error = Some(format!("{name}: its inputs change their form"));
            return false;
        }
        for (expert, at) in &rows {
            let sums = &mut sums.squares[expert * columns..(expert + 1) * columns];
            for (sum, x) in sums.iter_mut().zip(row(*at)) {
                *sum += f64::from(x * x);
            }
        }
        match dense {
            true => sums.counts[0] += (rows.len() / experts) as u64,
            false => rows.iter().for_each(|(expert, _)| sums.counts[*expert] += 1),
        }
        if sums.squares.iter().any(|sum| !sum.is_finite()) {
            self.error = Some(format!("{name}: its inputs are not finite: a weight may be NaN"));
            return false;
        }
        true
    }
}

/// The bytes of a tensor, copied to `buffer` if they are on a device.
fn host_data<'a>(tensor: &'a sys::ggml_tensor, buffer: &'a mut Vec<u8>) -> &'a [u8] {
    // SAFETY: the tensor has been computed; its buffer holds `ggml_nbytes` bytes at `data`, or on a
    // device, from which as many are copied.
    unsafe {
        let bytes = sys::ggml_nbytes(tensor);
        if sys::ggml_backend_buffer_is_host(tensor.buffer) {
            return std::slice::from_raw_parts(tensor.data.cast(), bytes);
        }
        buffer.resize(bytes, 0);
        sys::ggml_backend_tensor_get(tensor, buffer.as_mut_ptr().cast(), 0, bytes);
    }
    buffer
}

/// `count` numbers at a byte offset.
fn floats(data: &[u8], at: usize, count: usize) -> impl Iterator<Item = f32> + '_ {
    let bytes = &data[at..at + 4 * count];
    bytes.chunks_exact(4).map(|bytes| f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// (matrix, byte offset) of the rows of a multiplication by one matrix, or by as many as the weights
/// have.
fn dense_rows(weights: &sys::ggml_tensor, inputs: &sys::ggml_tensor) -> Vec<(usize, usize)> {
    let [_, rows, planes, blocks] = inputs.ne.map(|count| count as usize);
    let [_, row, plane, block] = inputs.nb;
    let [_, _, matrices, sets] = weights.ne.map(|count| count as usize);
    let mut found = Vec::with_capacity(rows * planes * blocks);
    for b in 0..blocks {
        for p in 0..planes {
            let matrix = (b % sets) * matrices + p % matrices;
            found.extend((0..rows).map(|r| (matrix, r * row + p * plane + b * block)));
        }
    }
    found
}

/// (expert, byte offset) of the rows of a multiplication by the experts that `ids` name.
fn routed_rows(
    inputs: &sys::ggml_tensor,
    ids: &sys::ggml_tensor,
    buffer: &mut Vec<u8>,
) -> Vec<(usize, usize)> {
    let data = host_data(ids, buffer);
    let (used, tokens) = (ids.ne[0] as usize, inputs.ne[2] as usize);
    let mut found = Vec::with_capacity(used * tokens);
    for slot in 0..used {
        for token in 0..tokens {
            let at = token * ids.nb[1] + slot * ids.nb[0];
            let id = i32::from_ne_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
            let place = slot % inputs.ne[1] as usize * inputs.nb[1] + token * inputs.nb[2];
            found.push((id as usize, place));
        }
    }
    found
}

/// A model of llama.cpp.
struct Model {
    raw: NonNull<sys::llama_model>,
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by `llama_model_load_from_file`, freed once, after its contexts.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}

impl Model {
    fn load(path: &Path, log: &Receiver<LogLine>) -> Result<Self, CompressError> {
        let file = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| refused(path, &"its name holds a NUL"))?;
        // SAFETY: the parameters are llama.cpp's defaults, changed in a plain value; the path is
        // NUL-terminated; a null result is handled.
        let raw = unsafe {
            sys::llama_backend_init();
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            sys::llama_model_load_from_file(file.as_ptr(), params)
        };
        let raw = NonNull::new(raw).ok_or_else(|| llama_failed(path, "load", log))?;
        Ok(Self { raw })
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_get_vocab(self.raw.as_ptr()) }
    }

    /// The token that every chunk begins with, if the model uses one.
    fn bos(&self) -> Option<sys::llama_token> {
        // SAFETY: the vocabulary lives as long as the model.
        let bos = unsafe {
            sys::llama_vocab_get_add_bos(self.vocab()).then(|| sys::llama_vocab_bos(self.vocab()))
        };
        bos.filter(|bos| *bos >= 0)
    }

    fn tokenize(&self, text: &str) -> Result<Vec<sys::llama_token>, CompressError> {
        let too_long = || CompressError::Refused("the text is longer than 2 GB".into());
        let length = i32::try_from(text.len()).map_err(|_| too_long())?;
        let mut tokens = vec![0; text.len() + 8];
        let room = i32::try_from(tokens.len()).map_err(|_| too_long())?;
        // SAFETY: both lengths are those of the buffers, and the vocabulary is live.
        let count = unsafe {
            sys::llama_tokenize(
                self.vocab(),
                text.as_ptr().cast(),
                length,
                tokens.as_mut_ptr(),
                room,
                true,
                false,
            )
        };
        tokens.truncate(usize::try_from(count).map_err(|_| too_long())?);
        // SAFETY: as above.
        if unsafe { sys::llama_vocab_get_add_eos(self.vocab()) } {
            tokens.pop();
        }
        Ok(tokens)
    }
}

/// A context whose computed tensors go to a collector.
struct Context<'a> {
    raw: NonNull<sys::llama_context>,
    batch: sys::llama_batch,
    collector: &'a mut Collector,
    _model: &'a Model,
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: both were made by llama.cpp and are freed once; the model is still live.
        unsafe {
            sys::llama_batch_free(self.batch);
            sys::llama_free(self.raw.as_ptr());
        }
    }
}

impl<'a> Context<'a> {
    fn new(
        model: &'a Model,
        plan: &ImatrixPlan,
        collector: &'a mut Collector,
        log: &Receiver<LogLine>,
    ) -> Result<Self, CompressError> {
        let tokens = plan.context as u32;
        let threads = i32::try_from(plan.threads.max(1)).unwrap_or(1);
        // SAFETY: the parameters are llama.cpp's defaults, changed in plain values; the callback is
        // a static function, and its argument outlives the context, which is dropped before the
        // borrow of the collector ends. Null results are handled.
        let raw = unsafe {
            let mut params = sys::llama_context_default_params();
            (params.n_ctx, params.n_batch, params.n_ubatch) = (tokens, tokens, tokens);
            (params.n_threads, params.n_threads_batch) = (threads, threads);
            params.n_seq_max = 1;
            params.no_perf = true;
            params.cb_eval = Some(on_tensor);
            params.cb_eval_user_data = std::ptr::from_mut(collector).cast();
            sys::llama_init_from_model(model.raw.as_ptr(), params)
        };
        let raw = NonNull::new(raw)
            .ok_or_else(|| llama_failed(&plan.model, "make a context for", log))?;
        // SAFETY: plain numbers; freed in `drop`.
        let batch = unsafe { sys::llama_batch_init(tokens as i32, 0, 1) };
        Ok(Self { raw, batch, collector, _model: model })
    }

    fn collector(&mut self) -> &mut Collector {
        self.collector
    }

    /// Decodes tokens from an empty cache. The logits of all are requested: else llama.cpp would
    /// leave out rows in the last layer.
    fn decode(&mut self, tokens: &[sys::llama_token]) -> bool {
        self.batch.n_tokens = tokens.len() as i32;
        // SAFETY: the batch was made for as many tokens, with one sequence id each; the context is
        // live.
        unsafe {
            for (at, token) in tokens.iter().enumerate() {
                *self.batch.token.add(at) = *token;
                *self.batch.pos.add(at) = at as sys::llama_pos;
                *self.batch.n_seq_id.add(at) = 1;
                **self.batch.seq_id.add(at) = 0;
                *self.batch.logits.add(at) = 1;
            }
            sys::llama_memory_clear(sys::llama_get_memory(self.raw.as_ptr()), true);
            sys::llama_decode(self.raw.as_ptr(), self.batch) == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_what_the_scheduler_adds() {
        for (name, plain) in [
            ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
            ("CPU#blk.0.attn_q.weight#0", "blk.0.attn_q.weight"),
            ("CPU#x", "x"),
            ("", ""),
        ] {
            assert_eq!(plain_name(name), plain);
        }
    }
}
