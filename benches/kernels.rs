//! Rates of single kernels, on one core and in cache where it is not said otherwise:
//! `cargo bench --bench kernels [-- FILTER]`; `INGOT_ISA` chooses the instruction set. Elements are multiplications, or numbers that are normed
//! and quantized.

#![allow(unsafe_code)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ingot::gguf::{KERNEL_TYPES, KvType};
use ingot::isa::choose_isa_of_environment;
use ingot::kernels::attention::{Plan, Scope};
use ingot::kernels::ops::{self, Activations, Product, Span};
use ingot::kernels::{KvCache, Matrix, Pool};
use std::time::Duration;

/// The binary's own: its huge pages are worth a fifth of a token's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PAGES: usize = 160;

fn activations(pool: &mut Pool, rows: usize, cols: usize) -> Activations {
    let mut x = Activations::default();
    x.resize(rows, cols);
    ops::norm(pool, &vec![0.5; rows * cols], &vec![1.0; cols], 1e-5, &mut x);
    x
}

/// A matrix of each type by some tokens.
fn matmul(criterion: &mut Criterion) {
    choose_isa_of_environment().expect("INGOT_ISA is one of this CPU's");
    let mut pool = Pool::new(1).expect("no thread to start");
    for (n, k) in [(512usize, 4096usize), (1536, 576)] {
        let mut group = criterion.benchmark_group(format!("matmul {n}x{k}"));
        for ty in KERNEL_TYPES {
            if !(k as u64).is_multiple_of(ty.block_size()) {
                continue;
            }
            let bytes = ty.bytes_for((n * k) as u64).expect("whole blocks");
            let bytes = vec![0; bytes as usize];
            let matrix = Matrix::pack(ty, n, k, &bytes, &mut pool).expect("whole blocks");
            for m in [1, 2, 4, 8, 252] {
                let x = activations(&mut pool, m, k);
                let (mut out, mut low) = (vec![0f32; m * n], Vec::new());
                group.throughput(Throughput::Elements((m * n * k) as u64));
                group.bench_function(format!("{ty}, {m} tokens"), |bencher| {
                    bencher.iter(|| {
                        let product =
                            Product { matrix: &matrix, bias: None, adapted: vec![], out: &mut out };
                        ops::products(&mut pool, &x, &mut [product], &mut low);
                    });
                });
            }
        }
    }
}

fn norm(criterion: &mut Criterion) {
    let mut pool = Pool::new(1).expect("no thread to start");
    let mut group = criterion.benchmark_group("norm and quantize");
    for cols in [576, 2048] {
        let (numbers, weight) = (vec![0.5f32; 256 * cols], vec![1.0; cols]);
        let mut x = activations(&mut pool, 256, cols);
        group.throughput(Throughput::Elements(numbers.len() as u64));
        group.bench_function(format!("{cols} columns"), |bencher| {
            bencher.iter(|| ops::norm(&mut pool, &numbers, &weight, 1e-5, &mut x));
        });
    }
}

fn attention(criterion: &mut Criterion) {
    let mut pool = Pool::new(1).expect("no thread to start");
    let own = |sequence: usize| {
        (sequence * PAGES..(sequence + 1) * PAGES).map(|page| page as u32).collect::<Vec<_>>()
    };
    let many = |pages: &dyn Fn(usize) -> Vec<u32>| {
        let span = |s| Span { rows: s..s + 1, position: 2047, pages: pages(s) };
        (0..8).map(span).collect::<Vec<_>>()
    };
    let works = [
        ("1 at 4,096", vec![Span { rows: 0..1, position: 4095, pages: own(0) }]),
        ("8 at 2,048", many(&own)),
        ("8 that share 2,048", many(&|_| own(0))),
        ("prefill 512", vec![Span { rows: 0..512, position: 0, pages: own(0) }]),
        ("prefill 128 at 4,000", vec![Span { rows: 0..128, position: 4000, pages: own(0) }]),
    ];
    for (heads, kv_heads, dim) in [(9, 3, 64), (32, 8, 64), (32, 8, 128)] {
        for ty in [KvType::F16, KvType::Q8_0] {
            let cache = KvCache::new(ty, 1, 8 * PAGES, kv_heads, dim);
            let name = format!("attention {heads}/{kv_heads}x{dim}, {ty:?}");
            let mut group = criterion.benchmark_group(name);
            for (name, spans) in &works {
                let rows = spans.last().map_or(0, |span| span.rows.end);
                let seen =
                    |span: &Span| (1..=span.rows.len()).map(|r| span.position + r).sum::<usize>();
                let seen: usize = spans.iter().map(seen).sum();
                let (q, mut out) = (vec![0.1f32; rows * heads * dim], Activations::default());
                out.resize(rows, heads * dim);
                let mut kept = Vec::new();
                group.throughput(Throughput::Elements((seen * heads * dim * 2) as u64));
                group.bench_function(*name, |bencher| {
                    bencher.iter(|| {
                        let scope = Scope::default();
                        let plan = Plan::new(spans, scope, kv_heads, heads / kv_heads, 1);
                        ops::attend(&mut pool, &q, &plan, &cache, 0, &mut out, &mut kept);
                    });
                });
            }
        }
    }
}

/// One token's attention in all layers at 4,096 tokens: more than a cache of the CPU holds, as a
/// decode step finds it.
fn attention_from_memory(criterion: &mut Criterion) {
    for (layers, heads, kv_heads, dim) in [(60, 9, 3, 64), (16, 32, 8, 128)] {
        let name = format!("attention {heads}/{kv_heads}x{dim}, {layers} layers, 1 at 4,096");
        let mut group = criterion.benchmark_group(name);
        for (ty, threads) in [KvType::F16, KvType::Q8_0].map(|ty| [(ty, 1), (ty, 2)]).concat() {
            let mut pool = Pool::new(threads).expect("a thread starts");
            let mut cache = KvCache::new(ty, layers, 128, kv_heads, dim);
            let (writer, row) = (cache.writer(), vec![0.3; dim]);
            // What was never written would be one page of zeros.
            for at in 0..layers * 128 * kv_heads * 32 {
                let (page, layer) = (at / 32 / kv_heads / layers, at / 32 / kv_heads % layers);
                // SAFETY: one thread.
                unsafe {
                    writer.write(layer, page as u32, at / 32 % kv_heads, at % 32, &row, &row);
                }
            }
            let spans = [Span { rows: 0..1, position: 4095, pages: (0..128).collect() }];
            let (q, mut out) = (vec![0.1f32; heads * dim], Activations::default());
            out.resize(1, heads * dim);
            let mut kept = Vec::new();
            group.throughput(Throughput::Elements((layers * 4096 * heads * dim * 2) as u64));
            group.bench_function(format!("{ty:?}, {threads} threads"), |bencher| {
                let scope = Scope::default();
                let plan = Plan::new(&spans, scope, kv_heads, heads / kv_heads, threads);
                bencher.iter(|| {
                    for layer in 0..layers {
                        ops::attend(&mut pool, &q, &plan, &cache, layer, &mut out, &mut kept);
                    }
                });
            });
        }
    }
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400));
    targets = matmul, norm, attention, attention_from_memory
}
criterion_main!(kernels);
