//! Tests of the native runner against llama.cpp and against itself.

mod families;
mod layers;

use super::*;
use crate::engine::runner::MAX_PROMPT_LOGITS;
use crate::evaluate::verify::SAMPLE;
use crate::gguf::{KvType, ModelFacts};
use crate::ipc::{ActivationType, KvCacheType, KvLayout, RunnerKind};
use crate::tokenizer::native::NativeError;
use std::path::PathBuf;

/// The path of the default model's file; always set in CI.
fn model() -> Option<PathBuf> {
    let path = std::env::var_os("INGOT_TEST_MODEL").map(PathBuf::from);
    assert!(path.is_some() || std::env::var_os("CI").is_none(), "CI sets INGOT_TEST_MODEL");
    path
}

fn spec(model: PathBuf, runner: RunnerKind) -> LoadSpec {
    let plain = LoadSpec::plain(model, runner);
    LoadSpec { max_sequences: 4, kv_layout: KvLayout::Streams, ..plain }
}

const TEXT: &str = "The sea was calm that morning, and the fishermen set out early. By noon the wind \
    had turned; clouds stood over the hills in the west, and the oldest of them, who had seen many \
    summers, said that it was time to go home. Nobody listened. In 1987 the harbour was rebuilt with \
    stone from the quarry (see page 12), and `let x = 3;` was carved into the wall as a joke.";

/// One sequence's rows in a batch, on 64 pages of its own.
fn part(rows: std::ops::Range<usize>, position: usize, slot: u32, wants: Wants) -> BatchSequence {
    let pages = (0..64).map(|page| slot * 64 + page).collect();
    BatchSequence { slot: SeqSlot(slot), rows, position, wants, pages, adapter: None }
}

fn step(runner: &mut dyn ModelRunner, tokens: &[Token], sequences: Vec<BatchSequence>) {
    let batch = Batch { tokens: tokens.to_vec(), sequences, adapter: None };
    runner.step(&batch).unwrap();
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| f64::from(x - max) - total.ln()).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Mean KL divergence of the other runner's predictions from the reference's, and the number of
/// positions where both have the same most probable token.
fn apart(
    reference: &mut impl ModelRunner,
    other: &mut impl ModelRunner,
    tokens: &[Token],
) -> (f64, usize) {
    let (mut sum, mut same) = (0.0, 0);
    for (chunk, tokens) in tokens.chunks(MAX_PROMPT_LOGITS).enumerate() {
        let (rows, position) = (0..tokens.len(), chunk * MAX_PROMPT_LOGITS);
        for runner in [&mut *reference as &mut dyn ModelRunner, other] {
            step(runner, tokens, vec![part(rows.clone(), position, 0, Wants::AllLogits)]);
        }
        for row in rows {
            let expected = log_softmax(reference.logits(row).unwrap());
            let found = log_softmax(other.logits(row).unwrap());
            sum += kl(&expected, &found);
            let best = |p: &[f64]| (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b]));
            same += usize::from(best(&expected) == best(&found));
        }
    }
    (sum / tokens.len() as f64, same)
}

/// The native tokenizer does not support WordPiece.
#[test]
fn a_vocabulary_that_is_not_covered_is_llama_cpps() {
    let Some(folder) = std::env::var_os("INGOT_TEST_VOCABS") else {
        assert!(std::env::var_os("CI").is_none(), "CI sets INGOT_TEST_VOCABS");
        return;
    };
    let path = PathBuf::from(folder).join("ggml-vocab-bert-bge.gguf");
    let file = Gguf::open_header(&path).unwrap();
    assert!(matches!(NativeTokenizer::from_gguf(&file), Err(NativeError::NotCovered(_))));
    assert_eq!(tokenizer(&file, &path).unwrap().vocab().len(), 30_522);
}

#[test]
fn predicts_what_llama_cpp_predicts() {
    let Some(model) = model() else { return };
    let mut native = Native::load(&spec(model.clone(), RunnerKind::Native)).unwrap();
    let mut oracle = llama_cpp::LlamaCpp::load(&spec(model, RunnerKind::LlamaCpp)).unwrap();
    let tokens = native.tokenizer().encode(TEXT, false, false);
    let tokens = &tokens[..tokens.len().min(64)];
    let count = tokens.len();
    let (mean, same) = apart(&mut oracle, &mut native, tokens);
    println!("mean KL {mean:.5}, same best token {same} of {count}");
    // Both runners round activations to eight bits, with different methods.
    assert!(mean < 0.01, "{mean}");
    assert!(same * 10 >= count * 9, "{same} of {count}");
}

#[test]
fn a_request_gives_the_same_bits_in_any_company() {
    let Some(model) = model() else { return };
    for kv_type in [KvCacheType::F16, KvCacheType::Q8_0] {
        let spec = LoadSpec { kv_type, ..spec(model.clone(), RunnerKind::Native) };
        let mut native = Native::load(&spec).unwrap();
        let tokens = native.tokenizer().encode(TEXT, false, false);
        let count = tokens.len().min(80);
        same_bits(&mut native, &tokens[..count], &tokens[tokens.len() - 30..]);
    }
}

/// Activations of 16 bits are as good as F32; the default has much less of the error of 8 bits.
#[test]
fn wide_activations_come_closer_to_f32() {
    let Some(model) = model() else { return };
    let native = |activations| {
        Native::load(&LoadSpec { activations, ..spec(model.clone(), RunnerKind::Native) }).unwrap()
    };
    let mut wide = native(ActivationType::I16);
    let tokens = wide.tokenizer().encode(SAMPLE, false, false);
    let tokens = &tokens[..384];
    let (some, narrow) = (
        apart(&mut wide, &mut native(ActivationType::Auto), tokens),
        apart(&mut wide, &mut native(ActivationType::I8), tokens),
    );
    println!("mean KL and same best tokens of 384: auto {some:?}, i8 {narrow:?}");
    assert!(narrow.0 > 0.001 && some.0 < 0.35 * narrow.0, "auto {some:?}, i8 {narrow:?}");
    assert!(some.1 > narrow.1, "auto {some:?}, i8 {narrow:?}");
    same_bits(&mut wide, &tokens[..80], &tokens[100..130]);
}

/// The effect of an 8-bit cache, compared with its effect in llama.cpp.
#[test]
fn a_q8_0_cache_moves_predictions_little() {
    let Some(model) = model() else { return };
    let native = |kv_type| {
        let spec = LoadSpec { kv_type, ..spec(model.clone(), RunnerKind::Native) };
        let native = Native::load(&spec).unwrap();
        let facts = ModelFacts::read(&native.weights.file).unwrap();
        let ty = if kv_type == KvCacheType::F16 { KvType::F16 } else { KvType::Q8_0 };
        let planned = facts.kv_bytes_per_token(ty) * u64::from(spec.kv_tokens);
        assert_eq!(native.cache.bytes() as u64, planned);
        native
    };
    let llama_cpp = |kv_type| {
        let spec = spec(model.clone(), RunnerKind::LlamaCpp);
        llama_cpp::LlamaCpp::load(&LoadSpec { kv_type, flash_attention: true, ..spec }).unwrap()
    };
    let (mut f16, mut q8) = (native(KvCacheType::F16), native(KvCacheType::Q8_0));
    let tokens = f16.tokenizer().encode(SAMPLE, false, false);
    let tokens = &tokens[..384];
    let ours = apart(&mut f16, &mut q8, tokens);
    let (mut f16, mut q8) = (llama_cpp(KvCacheType::F16), llama_cpp(KvCacheType::Q8_0));
    let theirs = apart(&mut f16, &mut q8, tokens);
    println!("mean KL and same best tokens of 384: {ours:?}, llama.cpp {theirs:?}");
    // The distance is that of any two roundings of activations (docs/log/rounding.md): a slightly
    // changed value makes some of the following values round differently.
    assert!(ours.0 < 0.008 && ours.0 < 1.5 * theirs.0, "{ours:?}, llama.cpp {theirs:?}");
    assert!(ours.1 * 100 >= tokens.len() * 94, "{ours:?}");
}

/// Computes `tokens` alone and in other ways, and compares the bits.
fn same_bits(native: &mut Native, tokens: &[Token], others: &[Token]) {
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    let count = tokens.len();
    step(native, tokens, vec![part(0..count, 0, 0, Wants::LastLogits)]);
    let alone = native.logits(count - 1).unwrap().to_vec();
    // In chunks, beside another sequence, on other pages.
    let (mut at, beside) = (0, others.len());
    for size in [1, 7, 32, 5, 1, 1, 100, 300, 13, 1000] {
        let size = size.min(count - at);
        let mut rows = others.to_vec();
        rows.extend_from_slice(&tokens[at..at + size]);
        let other = part(0..beside, 0, 1, Wants::LastLogits);
        let mine = part(beside..beside + size, at, 2, Wants::LastLogits);
        step(native, &rows, vec![other, mine]);
        at += size;
        if at == count {
            assert!(same(&alone, native.logits(beside + size - 1).unwrap()), "chunked");
            break;
        }
    }
    assert_eq!(at, count);
    // With the prefix copied from another sequence's pages, and on one thread.
    *native.pool.borrow_mut() = Pool::new(1).unwrap();
    let cached = count / 2;
    for page in 0..cached.div_ceil(PAGE_TOKENS) as u32 {
        native.copy_page(2 * 64 + page, 3 * 64 + page);
    }
    let rest = part(0..count - cached, cached, 3, Wants::LastLogits);
    step(native, &tokens[cached..], vec![rest]);
    assert!(same(&alone, native.logits(count - cached - 1).unwrap()), "cached");
}

#[test]
fn embeds_as_llama_cpp_does() {
    let Some(model) = model() else { return };
    let mut native = Native::load(&spec(model.clone(), RunnerKind::Native)).unwrap();
    let mut oracle = llama_cpp::LlamaCpp::load(&spec(model, RunnerKind::LlamaCpp)).unwrap();
    let tokens = native.tokenizer().encode(TEXT, false, false);
    let ours = native.pooled(&tokens, None).unwrap();
    let theirs = oracle.pooled(&tokens, None).unwrap();
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let cosine =
        product(&ours, &theirs) / (product(&ours, &ours) * product(&theirs, &theirs)).sqrt();
    assert!(cosine > 0.995, "{cosine}");
}
