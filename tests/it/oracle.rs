//! Greedy text of a real model compared with a plain llama.cpp loop without scheduler, pages and
//! sampler.

#![allow(unsafe_code)]

use crate::support::{Options, one_at_a_time, real_model};
use ingot::gguf::{Gguf, write_dequantized};
use llama_cpp_sys_2 as sys;
use serde_json::{Value, json};
use std::ffi::{CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const TOKENS: usize = 24;
/// The same values as the server's: llama.cpp chooses its kernels by them.
const BATCH: u32 = 512;
const CONTEXT: u32 = 4096;
/// More threads would wait for each other while other tests run.
const THREADS: i32 = 1;
/// llama.cpp itself uses different kernels for different batch shapes: if the two best
/// log-probabilities differ by less than this, either token is correct.
const TIE: f32 = 0.1;
/// The bound for the native runner. Both runners round activations to 8 bits, but the native runner
/// sums in another order, so its rounding differs. This changes single logits more than a change of
/// kernels does. Where nothing is rounded, [`TIE`] applies.
const NATIVE_TIE: f32 = 0.5;

const QUESTIONS: [&str; 20] = [
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "What is 12 times 12?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "List the planets of the solar system.",
    "Why is the sky blue?",
    "Tell me a joke about a penguin.",
    "What does a compiler do?",
    "Write a short poem about autumn leaves.",
    "How do I boil an egg?",
    "What is the largest ocean?",
    "Describe a cat in one sentence.",
    "What year did the second world war end?",
    "Suggest a name for a bookshop.",
    "What is photosynthesis?",
    "Say something kind to a tired friend.",
];

/// A prompt as the model's template renders it. Each begins differently, so that no two share a
/// prefix.
fn prompt(number: usize) -> String {
    format!(
        "<|im_start|>system\nAnswer number {number}.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n\
         <|im_start|>assistant\n",
        QUESTIONS[number]
    )
}

#[test]
fn greedy_text_equals_a_plain_llama_cpp_loop() {
    let flags = [("--kv-layout", "unified"), ("--flash-attention", "true")];
    equals_the_oracle(&real_model(), &flags, true, TIE, QUESTIONS.len() * 3 / 4);
}

#[test]
fn greedy_text_of_streams_equals_a_plain_llama_cpp_loop() {
    let flags = [("--kv-layout", "streams"), ("--flash-attention", "false")];
    equals_the_oracle(&real_model(), &flags, false, TIE, QUESTIONS.len() * 3 / 4);
}

#[test]
fn greedy_text_of_the_native_runner_leaves_llama_cpps_only_where_it_is_close() {
    // 96% of single best tokens agree, so about a third of sequences of 24 tokens are expected to
    // agree.
    let flags = [("--runner", "native")];
    equals_the_oracle(&real_model(), &flags, false, NATIVE_TIE, QUESTIONS.len() / 3);
}

#[test]
fn greedy_text_of_the_native_runner_equals_llama_cpps_where_nothing_is_rounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("f32.gguf");
    let file = Gguf::open(real_model()).expect("it is a GGUF");
    write_dequantized(&file, &copy).expect("a copy in F32");
    let flags = [("--runner", "native")];
    equals_the_oracle(&copy, &flags, false, TIE, QUESTIONS.len() * 3 / 4);
}

fn equals_the_oracle(
    path: &Path,
    flags: &[(&str, &str)],
    flash_attention: bool,
    tie: f32,
    least: usize,
) {
    let _turn = one_at_a_time();
    let options = Options::models(&[path])
        .flag("--threads", THREADS)
        .flag("--batch-tokens", BATCH)
        .flag("--context-length", CONTEXT / 4)
        .flag("--kv-tokens", CONTEXT)
        .flag("--max-sequences", 4);
    let server =
        flags.iter().fold(options, |options, (flag, value)| options.flag(flag, value)).start();
    let model = server.client.get("/v1/models").good()["data"][0]["id"].clone();
    let ask = |prompt: &str| {
        let body = json!({"model": model, "prompt": prompt, "max_tokens": TOKENS,
                          "temperature": 0, "logprobs": 2});
        server.client.post("/v1/completions", &body).good()
    };
    let ours: Vec<Value> = (0..QUESTIONS.len()).map(|i| ask(&prompt(i))).collect();

    // In parallel: kernels change with the batch, so the text may change, but every completion is
    // whole.
    std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..QUESTIONS.len()).map(|i| scope.spawn(move || ask(&prompt(i)))).collect();
        for (i, answer) in all.into_iter().enumerate() {
            let answer = answer.join().expect("no panic");
            let choice = &answer["choices"][0];
            let tokens = choice["logprobs"]["tokens"].as_array().expect("a list");
            match choice["finish_reason"].as_str() {
                Some("length") => assert_eq!(tokens.len(), TOKENS),
                Some("stop") => assert!(tokens.len() < TOKENS),
                other => panic!("prompt {i} ended by {other:?}"),
            }
            // The first token depends on the prompt alone, and its margin is seldom small.
            let first = &ours[i]["choices"][0]["logprobs"]["tokens"][0];
            assert_eq!(&tokens[0], first, "prompt {i}");
        }
    });
    drop(server);

    let mut oracle = Oracle::load(path, flash_attention);
    let (mut equal, mut ties) = (0, 0);
    for (i, answer) in ours.iter().enumerate() {
        let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().expect("a list");
        let tokens: Vec<&str> = tokens.iter().map(|token| token.as_str().expect("text")).collect();
        let steps = oracle.greedy(&prompt(i), TOKENS);
        let differ = (0..TOKENS)
            .find(|&at| tokens.get(at).copied() != steps.get(at).and_then(|s| s.token.as_deref()));
        let Some(at) = differ else {
            equal += 1;
            continue;
        };
        // Past the end of both lists nothing differs.
        let step = &steps[at.min(steps.len() - 1)];
        eprintln!("prompt {i} differs at token {at}: {:?}, {step:?}", tokens.get(at));
        assert!(step.margin <= tie, "prompt {i}: `{tokens:?}` is not `{steps:?}`");
        ties += 1;
    }
    eprintln!("{equal} of {} answers are equal, {ties} differ first at a tie", QUESTIONS.len());
    assert!(equal >= least, "only {equal} answers are equal");
}

/// One step of the oracle.
#[derive(Debug)]
struct Step {
    /// The best token in the server's notation; `None` ends the text.
    token: Option<String>,
    /// Difference between the two best log-probabilities.
    margin: f32,
}

/// llama.cpp with the simplest possible use of its API.
struct Oracle {
    model: *mut sys::llama_model,
    context: *mut sys::llama_context,
    vocab: *const sys::llama_vocab,
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // SAFETY: both were created in `load` and are freed once, the context first.
        unsafe {
            sys::llama_free(self.context);
            sys::llama_model_free(self.model);
        }
    }
}

/// A log callback that discards all messages.
unsafe extern "C" fn silence(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}

impl Oracle {
    fn load(path: &Path, flash_attention: bool) -> Self {
        let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: parameters are llama.cpp's defaults except for plain values, the path is
        // NUL-terminated, the callback is a static function, and null results are handled.
        unsafe {
            sys::llama_log_set(Some(silence), std::ptr::null_mut());
            sys::llama_backend_init();
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            let model = sys::llama_model_load_from_file(path.as_ptr(), params);
            assert!(!model.is_null(), "the oracle loads the model");
            let mut params = sys::llama_context_default_params();
            params.n_ctx = CONTEXT;
            params.n_batch = BATCH;
            params.n_ubatch = BATCH;
            params.n_threads = THREADS;
            params.n_threads_batch = THREADS;
            params.flash_attn_type = match flash_attention {
                true => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                false => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            };
            let context = sys::llama_init_from_model(model, params);
            assert!(!context.is_null(), "the oracle makes a context");
            Self { model, context, vocab: sys::llama_model_get_vocab(model) }
        }
    }

    /// Decodes the prompt in one batch, then one token at a time, always the best one.
    fn greedy(&mut self, prompt: &str, count: usize) -> Vec<Step> {
        let mut tokens = self.tokenize(prompt);
        assert!(tokens.len() < BATCH as usize);
        // SAFETY: the context is live; all sequences and their data are cleared.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context), true) };
        let mut steps = Vec::new();
        while steps.len() < count {
            // SAFETY: the batch borrows `tokens`, which outlives the call, and has its length.
            let code = unsafe {
                let length = i32::try_from(tokens.len()).expect("short");
                let batch = sys::llama_batch_get_one(tokens.as_mut_ptr(), length);
                sys::llama_decode(self.context, batch)
            };
            assert_eq!(code, 0, "the oracle decodes");
            let (best, margin) = self.best();
            // SAFETY: the token is in the vocabulary.
            let over = unsafe { sys::llama_vocab_is_eog(self.vocab, best) };
            steps.push(Step { token: (!over).then(|| self.piece(best)), margin });
            if over {
                break;
            }
            tokens = vec![best];
        }
        steps
    }

    /// The best token after the last one, and its margin.
    fn best(&self) -> (sys::llama_token, f32) {
        // SAFETY: the last batch requested logits of its last token, and a row is one float per
        // token of the vocabulary.
        let logits = unsafe {
            let count = usize::try_from(sys::llama_vocab_n_tokens(self.vocab)).expect("positive");
            let row = sys::llama_get_logits_ith(self.context, -1);
            assert!(!row.is_null(), "there are logits");
            std::slice::from_raw_parts(row, count)
        };
        // The first one of equal logits, as in every argmax.
        let mut best = 0;
        for (token, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = token;
            }
        }
        let others = logits.iter().enumerate().filter(|(token, _)| *token != best);
        let second = others.map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max);
        (best as sys::llama_token, logits[best] - second)
    }

    fn tokenize(&self, text: &str) -> Vec<sys::llama_token> {
        let mut tokens = vec![0; text.len() + 8];
        let length = i32::try_from(text.len()).expect("short");
        let room = i32::try_from(tokens.len()).expect("short");
        // SAFETY: both lengths are those of the buffers.
        let count = unsafe {
            sys::llama_tokenize(
                self.vocab,
                text.as_ptr().cast(),
                length,
                tokens.as_mut_ptr(),
                room,
                true,
                true,
            )
        };
        tokens.truncate(usize::try_from(count).expect("the text fits"));
        tokens
    }

    /// The token in the notation that the server uses in logprobs.
    fn piece(&self, token: sys::llama_token) -> String {
        let mut buffer = [0u8; 256];
        let room = i32::try_from(buffer.len()).expect("short");
        // SAFETY: the length is the buffer's, and the token is in the vocabulary.
        let length = unsafe {
            let out = buffer.as_mut_ptr().cast();
            sys::llama_token_to_piece(self.vocab, token, out, room, 0, true)
        };
        let bytes = &buffer[..usize::try_from(length).expect("a piece is short")];
        let escaped = || bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
        String::from_utf8(bytes.to_vec()).unwrap_or_else(|_| format!("bytes:{}", escaped()))
    }
}
