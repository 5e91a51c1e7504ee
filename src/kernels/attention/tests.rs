use super::*;
use crate::gguf::KvType;
use crate::kernels::cache::{KvCache, PAGE};
use crate::kernels::isa::{Isa, isa};
use crate::kernels::ops::{self, Activations, Span};
use crate::kernels::pool::Pool;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;

const KV_HEADS: usize = 2;
const TOKENS: usize = 1_100;
/// With a whole q8_0 block, and with half and a quarter of one.
const FORMS: [(KvType, usize); 4] =
    [(KvType::F16, 32), (KvType::Q8_0, 32), (KvType::Q8_0, 80), (KvType::Q8_0, 40)];

struct Case {
    cache: KvCache,
    dim: usize,
    pages: Vec<u32>,
    /// As stored in the cache.
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

/// The tokens of one sequence on shuffled pages.
fn case(ty: KvType, dim: usize, heads: usize) -> Case {
    let mut rng = StdRng::seed_from_u64(heads as u64);
    let mut numbers = |count: usize, size: f32| -> Vec<f32> {
        (0..count * dim).map(|_| rng.random_range(-size..size)).collect()
    };
    let count = TOKENS.div_ceil(PAGE);
    let mut cache = KvCache::new(ty, 2, count, KV_HEADS, dim);
    let pages: Vec<u32> = (0..count as u32).map(|page| (page * 3 + 1) % count as u32).collect();
    let (k, v) = (numbers(TOKENS, 3.0), numbers(TOKENS, 1.0));
    let q = numbers(heads, (32.0 / dim as f32).sqrt());
    let writer = cache.writer();
    for token in 0..TOKENS {
        let (at, page) = (token * dim..(token + 1) * dim, pages[token / PAGE]);
        // SAFETY: there is only one thread.
        unsafe { writer.write(1, page, 1, token % PAGE, &k[at.clone()], &v[at]) };
    }
    let places = || (0..TOKENS).flat_map(|token| (0..dim).map(move |d| (token, d)));
    let key = |(token, d): (usize, usize)| {
        let t = token % PAGE;
        cache.keys(1, pages[token / PAGE], 1).number(d * PAGE + t, t, d)
    };
    let value = |(token, d): (usize, usize)| {
        let t = token % PAGE;
        cache.values(1, pages[token / PAGE], 1).number(t * dim + d, t, d)
    };
    let (k, v) = (places().map(key).collect(), places().map(value).collect());
    Case { cache, dim, pages, k, v, q }
}

fn attend(case: &Case, isa: Isa, seen: Range<usize>, q: &[f32]) -> Vec<f32> {
    attend_in(case, isa, seen, q, None)
}

fn attend_in(case: &Case, isa: Isa, seen: Range<usize>, q: &[f32], cap: Option<f32>) -> Vec<f32> {
    let group = q.len() / case.dim;
    let head = Head { isa, cache: &case.cache, layer: 1, head: 1, group, cap };
    let query = Query { row: 0, seen, pages: &case.pages, slot: None };
    let mut scratch = Scratch::default();
    scratch.q.extend_from_slice(q);
    head.attend(std::slice::from_ref(&query), query.runs(), &mut scratch);
    scratch.out
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
    const ENDS: [usize; 10] = [1, 2, 31, 32, 33, 511, 512, 513, 530, TOKENS];
    let works = [1, 3, 4, 7].into_iter().flat_map(|heads| FORMS.map(|form| (heads, form)));
    for (heads, (ty, dim)) in works {
        let case = case(ty, dim, heads);
        for (scope, end) in scopes.into_iter().flat_map(|scope| ENDS.map(|end| (scope, end))) {
            let seen = end.saturating_sub(scope.window.unwrap_or(end))..end;
            let out = attend_in(&case, Isa::Scalar, seen.clone(), &case.q, scope.cap);
            for isa in Isa::available() {
                let fast = attend_in(&case, isa, seen.clone(), &case.q, scope.cap);
                assert_eq!(out, fast, "{isa}");
            }
            for (q, out) in case.q.chunks(dim).zip(out.chunks(dim)) {
                let weights = weights(&case, q, seen.clone(), scope.cap);
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let values = case.v.iter().skip(d).step_by(dim).skip(seen.start);
                    let sum: f64 = values.zip(&weights).map(|(v, w)| f64::from(*v) * w).sum();
                    let error = (f64::from(out[d]) - sum / total).abs();
                    assert!(error < 1e-5, "{ty:?}, {heads}x{dim}, {seen:?}, {scope:?}: {error}");
                }
            }
        }
    }
}

/// e^score of the visible tokens.
fn weights(case: &Case, q: &[f32], seen: Range<usize>, cap: Option<f32>) -> Vec<f64> {
    let weight = |k: &[f32]| {
        let dot: f64 = k.iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        cap.map(f64::from).map_or(dot, |cap| cap * (dot / cap).tanh()).exp()
    };
    case.k.chunks(case.dim).take(seen.end).skip(seen.start).map(weight).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn plain_code_gives_the_same_bits_and_heads_do_not_matter() {
    for (ty, dim) in FORMS {
        let case = case(ty, dim, 7);
        for seen in [0..1, 0..40, 0..512, 100..700, 0..TOKENS] {
            let fast = attend(&case, isa(), seen.clone(), &case.q);
            assert_eq!(bits(&fast), bits(&attend(&case, Isa::Scalar, seen.clone(), &case.q)));
            let alone = case.q.chunks(dim).flat_map(|q| attend(&case, isa(), seen.clone(), q));
            assert_eq!(bits(&fast), bits(&alone.collect::<Vec<_>>()));
        }
    }
}

#[test]
fn pages_are_copied_whole() {
    for (ty, dim) in FORMS {
        let mut case = case(ty, dim, 1);
        let before = attend(&case, isa(), 0..20, &case.q);
        let (from, to) = (case.pages[0], case.pages[5]);
        case.cache.copy_page(from, to);
        case.pages[0] = to;
        assert_eq!(attend(&case, isa(), 0..20, &case.q), before);
    }
}

/// Sequences of a batch that share prefixes of different lengths; some decode, some prefill.
fn spans(rng: &mut StdRng) -> Vec<Span> {
    let mut free = 0u32..;
    let mut pages = |count: usize| free.by_ref().take(count).collect::<Vec<_>>();
    let shared = pages(40);
    let mut row = 0;
    let mut next = |rng: &mut StdRng, _| {
        let count: usize = if rng.random_bool(0.7) { 1 } else { rng.random_range(1..60) };
        let position: usize = rng.random_range(0..1_300);
        let needed = (position + count).div_ceil(PAGE);
        let mut own = shared[..rng.random_range(0..=position.min(1_200) / PAGE)].to_vec();
        own.extend(pages(needed - own.len()));
        row += count;
        Span { rows: row - count..row, position, pages: own }
    };
    (0..12).map(|index| next(rng, index)).collect()
}

#[test]
fn company_sharing_and_threads_change_no_bit() {
    for (ty, dim, group) in [(KvType::F16, 32, 3), (KvType::Q8_0, 32, 3), (KvType::Q8_0, 40, 4)] {
        company_changes_no_bit(ty, dim, group);
    }
}

fn company_changes_no_bit(ty: KvType, dim: usize, group: usize) {
    let pages = 800;
    let cols = KV_HEADS * group * dim;
    let mut rng = StdRng::seed_from_u64(3);
    let mut cache = KvCache::new(ty, 1, pages, KV_HEADS, dim);
    let writer = cache.writer();
    for page in 0..pages as u32 {
        for (head, token) in (0..KV_HEADS).flat_map(|head| (0..PAGE).map(move |t| (head, t))) {
            let mut numbers = || (0..dim).map(|_| rng.random_range(-2.0f32..2.0)).collect();
            let (k, v): (Vec<f32>, Vec<f32>) = (numbers(), numbers());
            // SAFETY: there is only one thread.
            unsafe { writer.write(0, page, head, token, &k, &v) };
        }
    }
    for round in 0..12 {
        let spans = spans(&mut rng);
        let rows = spans.last().map_or(0, |span| span.rows.end);
        let q: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let scope = Scope { window: (round % 3 == 2).then_some(100), cap: None };
        let run = |threads, q: &[f32], spans: &[Span]| {
            let mut pool = Pool::new(threads).unwrap();
            let mut out = Activations::default();
            out.resize(q.len() / cols, cols);
            let plan = Plan::new(spans, scope, KV_HEADS, group, threads);
            ops::attend(&mut pool, q, &plan, &cache, 0, &mut out, &mut Vec::new());
            (0..q.len() / cols).flat_map(|row| bits(out.row(row))).collect::<Vec<_>>()
        };
        let together = run(1 + round % 3, &q, &spans);
        for span in &spans {
            for (offset, row) in span.rows.clone().enumerate() {
                let at = row * cols..(row + 1) * cols;
                let position = span.position + offset;
                let alone = Span { rows: 0..1, position, pages: span.pages.clone() };
                let alone = run(1, &q[at.clone()], &[alone]);
                assert!(alone == together[at], "round {round}, row {row} of {span:?}");
            }
        }
    }
}

/// Scores of all sizes, and runs of all lengths.
#[test]
fn softmaxes_have_the_same_bits() {
    let mut rng = StdRng::seed_from_u64(3);
    for len in (1..=70).chain([RUN]) {
        for size in [1e-3, 3.0, 60.0, 1e4] {
            let scores: Vec<f32> = (0..len).map(|_| rng.random_range(-size..size)).collect();
            let run = |isa: Isa| {
                let mut scores = scores.clone();
                let (max, total) = (isa.kernels().attention.softmax)(&mut scores);
                scores.extend([max, total]);
                bits(&scores)
            };
            for isa in Isa::available() {
                assert_eq!(run(isa), run(Isa::Scalar), "{isa}: {scores:?}");
            }
        }
    }
}
