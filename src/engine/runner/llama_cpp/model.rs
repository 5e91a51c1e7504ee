//! A loaded model: weights, vocabulary, metadata.

use super::super::RunnerError;
use crate::ipc::{LoadSpec, Token};
use crate::tokenizer::{Tokenizer, Vocab};
use llama_cpp_sys_2 as sys;
use std::ffi::{CString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, Once};

static BACKEND: Once = Once::new();

pub(super) struct Model {
    raw: NonNull<sys::llama_model>,
    vocab: Vocab,
    /// Guards llama.cpp's list of adapters in the model.
    pub(super) adapters: Mutex<()>,
}

// SAFETY: after loading, weights and vocabulary are only read; `adapters` guards the one part that
// changes, the list of adapters.
unsafe impl Send for Model {}
// SAFETY: as for `Send` above.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts and adapters hold an `Arc` of the model, so none is left.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}

impl Model {
    pub(super) fn load(spec: &LoadSpec) -> Result<Self, RunnerError> {
        // SAFETY: the function takes no arguments and returns plain data.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.n_gpu_layers = i32::try_from(spec.gpu_layers).unwrap_or(i32::MAX);
        params.load_mode =
            if spec.mmap { sys::LLAMA_LOAD_MODE_MMAP } else { sys::LLAMA_LOAD_MODE_NONE };
        // The check would read every weight before the first is used. A corrupt weight produces bad
        // text, not a crash.
        params.check_tensors = false;
        Self::load_with(&spec.model, params)
    }

    /// Loads only the vocabulary, which is all that tokenizing needs.
    pub(super) fn load_vocabulary(path: &Path) -> Result<Self, RunnerError> {
        // SAFETY: the function takes no arguments and returns plain data.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.vocab_only = true;
        Self::load_with(path, params)
    }

    fn load_with(path: &Path, params: sys::llama_model_params) -> Result<Self, RunnerError> {
        // SAFETY: called once, before any other llama.cpp function.
        BACKEND.call_once(|| unsafe { sys::llama_backend_init() });
        let file = c_path(path)?;
        // SAFETY: the path is NUL-terminated; the parameters are llama.cpp's defaults, changed only
        // in plain values.
        let raw = unsafe { sys::llama_model_load_from_file(file.as_ptr(), params) };
        let raw = NonNull::new(raw)
            .ok_or_else(|| RunnerError(format!("llama.cpp could not load {}", path.display())))?;
        // SAFETY: the model is live; its vocabulary lives as long.
        let vocab = unsafe { read_vocab(sys::llama_model_get_vocab(raw.as_ptr())) };
        Ok(Self { raw, vocab, adapters: Mutex::new(()) })
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.raw.as_ptr()
    }

    pub(super) fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// llama.cpp's one-line description of the model, such as "llama 135M Q4_1".
    pub(super) fn description(&self) -> String {
        let mut buffer = [0u8; 256];
        // SAFETY: the length passed is the buffer's.
        let written = unsafe {
            sys::llama_model_desc(self.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
        };
        text(&buffer, written)
    }

    pub(super) fn metadata(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        let mut buffer = [0u8; 1024];
        // SAFETY: the key is NUL-terminated; the length passed is the buffer's.
        let written = unsafe {
            sys::llama_model_meta_val_str(
                self.as_ptr(),
                key.as_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        };
        (written >= 0).then(|| text(&buffer, written))
    }

    pub(super) fn parameters(&self) -> u64 {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_n_params(self.as_ptr()) }
    }

    /// Elements of an output embedding.
    pub(super) fn embedding_size(&self) -> u32 {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_n_embd_out(self.as_ptr()) }.max(0) as u32
    }

    pub(super) fn has_decoder(&self) -> bool {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_has_decoder(self.as_ptr()) }
    }

    pub(super) fn is_encoder_decoder(&self) -> bool {
        // SAFETY: the model is live.
        self.has_decoder() && unsafe { sys::llama_model_has_encoder(self.as_ptr()) }
    }

    /// Whether attention is causal; false for BERT-like models.
    pub(super) fn is_causal(&self) -> bool {
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        self.metadata(&format!("{architecture}.attention.causal")).as_deref() != Some("false")
    }

    /// Whether a sequence can be truncated. Recurrent and hybrid models cannot do that.
    pub(super) fn shares_prefixes(&self) -> bool {
        // SAFETY: the model is live.
        unsafe {
            !sys::llama_model_is_recurrent(self.as_ptr())
                && !sys::llama_model_is_hybrid(self.as_ptr())
        }
    }

    /// The pooling type that the file names, or `None`.
    pub(super) fn pooling(&self) -> Option<sys::llama_pooling_type> {
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        self.metadata(&format!("{architecture}.pooling_type"))?.parse().ok()
    }

    /// Whether an input may be pooled in chunks: no token attends to a later one, and the last row
    /// is the pooled row.
    pub(super) fn pools_in_chunks(&self) -> bool {
        self.is_causal() && super::context::pooling(self) == sys::LLAMA_POOLING_TYPE_LAST
    }

    /// Whether the model produces embeddings. Rerankers have a classification head instead.
    pub(super) fn can_embed(&self) -> bool {
        self.pooling() != Some(sys::LLAMA_POOLING_TYPE_RANK)
    }
}

impl Tokenizer for Model {
    fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<Token> {
        // SAFETY: the model is live.
        let vocab = unsafe { sys::llama_model_get_vocab(self.as_ptr()) };
        let Ok(length) = i32::try_from(text.len()) else { return Vec::new() };
        // No tokenizer produces more tokens than bytes, apart from a leading space, BOS and EOS.
        let mut tokens = vec![0i32; text.len() + 8];
        loop {
            let room = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
            // SAFETY: text and token buffers are passed with their own lengths.
            let count = unsafe {
                sys::llama_tokenize(
                    vocab,
                    text.as_ptr().cast::<c_char>(),
                    length,
                    tokens.as_mut_ptr(),
                    room,
                    add_special,
                    parse_special,
                )
            };
            if let Ok(count) = usize::try_from(count) {
                tokens.truncate(count);
                return tokens.into_iter().map(|token| token as Token).collect();
            }
            if count == i32::MIN || tokens.len() as i64 >= -i64::from(count) {
                return Vec::new();
            }
            tokens.resize(count.unsigned_abs() as usize, 0);
        }
    }

    fn adds_eos(&self) -> bool {
        // SAFETY: the model is live.
        let adds =
            unsafe { sys::llama_vocab_get_add_eos(sys::llama_model_get_vocab(self.as_ptr())) };
        adds && self.vocab.eos.is_some()
    }
}

/// # Safety
/// `vocab` must belong to a live model.
unsafe fn read_vocab(vocab: *const sys::llama_vocab) -> Vocab {
    // SAFETY: the caller guarantees that the vocabulary is live in all calls below; buffers are
    // passed with their own lengths; token ids are below the vocabulary's size.
    unsafe {
        let count = sys::llama_vocab_n_tokens(vocab).max(0);
        let mut buffer = vec![0u8; 256];
        let pieces: Vec<_> = (0..count)
            .map(|token| {
                let call = |buffer: &mut Vec<u8>| {
                    let room = i32::try_from(buffer.len()).unwrap_or(i32::MAX);
                    sys::llama_token_to_piece(
                        vocab,
                        token,
                        buffer.as_mut_ptr().cast(),
                        room,
                        0,
                        true,
                    )
                };
                let mut length = call(&mut buffer);
                if length < 0 {
                    buffer.resize(length.unsigned_abs() as usize, 0);
                    length = call(&mut buffer);
                }
                (
                    buffer[..length.max(0) as usize].to_vec(),
                    sys::llama_vocab_is_control(vocab, token),
                    sys::llama_vocab_is_eog(vocab, token),
                )
            })
            .collect();
        let mut read = Vocab::new(pieces);
        let known = |token: i32| Token::try_from(token).ok().filter(|_| token < count);
        read.bos = known(sys::llama_vocab_bos(vocab));
        read.eos = known(sys::llama_vocab_eos(vocab));
        let marks = [
            known(sys::llama_vocab_fim_pre(vocab)),
            known(sys::llama_vocab_fim_suf(vocab)),
            known(sys::llama_vocab_fim_mid(vocab)),
        ];
        read.infill = match marks {
            [Some(prefix), Some(suffix), Some(middle)] => Some([prefix, suffix, middle]),
            _ => None,
        };
        read
    }
}

pub(super) fn c_path(path: &Path) -> Result<CString, RunnerError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| RunnerError(format!("{} has a NUL in its name", path.display())))
}

fn text(buffer: &[u8], written: i32) -> String {
    let length = usize::try_from(written).unwrap_or(0).min(buffer.len() - 1);
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}
