use super::*;
use crate::kernels::matmul::isa;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DIM: usize = 24;
const KV_HEADS: usize = 2;
const TOKENS: usize = 1_100;

struct Case {
    cache: Cache,
    pages: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

/// Tokens of one sequence on shuffled pages, as f16 holds them.
fn case(heads: usize) -> Case {
    let mut rng = StdRng::seed_from_u64(heads as u64);
    let mut number = || f16::from_f32(rng.random_range(-1.0f32..1.0)).to_f32();
    let count = TOKENS.div_ceil(PAGE);
    let mut cache = Cache::new(2, count, KV_HEADS, DIM);
    let pages: Vec<u32> = (0..count as u32).map(|page| (page * 3 + 1) % count as u32).collect();
    let k: Vec<f32> = (0..TOKENS * DIM).map(|_| 3.0 * number()).collect();
    let k: Vec<f32> = k.into_iter().map(|x| f16::from_f32(x).to_f32()).collect();
    let v: Vec<f32> = (0..TOKENS * DIM).map(|_| number()).collect();
    let q = (0..heads * DIM).map(|_| number()).collect();
    let writer = cache.writer();
    for token in 0..TOKENS {
        let (at, page) = (token * DIM..(token + 1) * DIM, pages[token / PAGE]);
        // SAFETY: one thread.
        unsafe { writer.write(1, page, 1, token % PAGE, &k[at.clone()], &v[at]) };
    }
    Case { cache, pages, k, v, q }
}

fn attend(case: &Case, isa: Isa, tokens: usize, q: &[f32]) -> Vec<f32> {
    attend_in(case, isa, tokens, q, Scope::default())
}

fn attend_in(case: &Case, isa: Isa, tokens: usize, q: &[f32], scope: Scope) -> Vec<f32> {
    let pages = &case.pages;
    let attention = Attention { isa, cache: &case.cache, layer: 1, head: 1, pages, tokens, scope };
    let mut out = vec![0.0; q.len()];
    attention.attend(q, &mut out, &mut Scratch::default());
    out
}

#[test]
fn equals_a_softmax_in_double_precision() {
    let scopes = [
        Scope::default(),
        Scope { window: Some(20), cap: None },
        Scope { window: Some(100), cap: Some(2.0) },
        Scope { window: Some(700), cap: None },
        Scope { window: None, cap: Some(5.0) },
    ];
    for (heads, scope) in [1, 3, 4, 7].into_iter().flat_map(|h| scopes.map(|scope| (h, scope))) {
        let case = case(heads);
        for tokens in [1, 2, 31, 32, 33, 511, 512, 513, 530, TOKENS] {
            let out = attend_in(&case, isa(), tokens, &case.q, scope);
            assert_eq!(out, attend_in(&case, Isa::Scalar, tokens, &case.q, scope));
            for (q, out) in case.q.chunks(DIM).zip(out.chunks(DIM)) {
                let weights = weights(&case, q, tokens, scope);
                let total: f64 = weights.iter().sum();
                for d in 0..DIM {
                    let values = case.v.iter().skip(d).step_by(DIM);
                    let sum: f64 = values.zip(&weights).map(|(v, w)| f64::from(*v) * w).sum();
                    let error = (f64::from(out[d]) - sum / total).abs();
                    assert!(error < 1e-5, "{heads} heads, {tokens} tokens, {scope:?}: {error}");
                }
            }
        }
    }
}

/// (tokens) e^score, 0 outside the window.
fn weights(case: &Case, q: &[f32], tokens: usize, scope: Scope) -> Vec<f64> {
    let weight = |(at, k): (usize, &[f32])| {
        let dot: f64 = k.iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let capped = scope.cap.map(f64::from).map_or(dot, |cap| cap * (dot / cap).tanh());
        let seen = scope.window.is_none_or(|window| at + window >= tokens);
        if seen { capped.exp() } else { 0.0 }
    };
    case.k.chunks(DIM).take(tokens).enumerate().map(weight).collect()
}

#[test]
fn plain_code_gives_the_same_bits_and_heads_do_not_matter() {
    let case = case(7);
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for tokens in [1, 40, 512, 700, TOKENS] {
        let fast = attend(&case, isa(), tokens, &case.q);
        assert_eq!(bits(&fast), bits(&attend(&case, Isa::Scalar, tokens, &case.q)));
        let alone: Vec<f32> =
            case.q.chunks(DIM).flat_map(|q| attend(&case, isa(), tokens, q)).collect();
        assert_eq!(bits(&fast), bits(&alone));
    }
}

#[test]
fn pages_are_copied_whole() {
    let mut case = case(1);
    let before = attend(&case, isa(), 20, &case.q);
    let (from, to) = (case.pages[0], case.pages[5]);
    case.cache.copy_page(from, to);
    case.pages[0] = to;
    assert_eq!(attend(&case, isa(), 20, &case.q), before);
}
