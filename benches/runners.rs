//! The native runner against llama.cpp, in one process, in turn: `cargo bench --bench runners --
//! MODEL.gguf [REPETITIONS]`. Medians, and their ratio; both get two threads.
//!
//! llama.cpp has its cache in streams, which measured best, with and without flash attention; the
//! better one counts. `llama-bench` measures the same kernels.

use ingot::engine::runner::{self, Batch, BatchSequence, ModelRunner, PAGE_TOKENS, SeqSlot, Wants};
use ingot::ipc::{KvCacheType, KvLayout, LoadSpec, RunnerKind, Speculate, Token};
use std::time::Instant;

const THREADS: u32 = 2;
const STREAMS: usize = 32;
/// Tokens of a stream, at most.
const CONTEXT: usize = 4_608;
const SHORT: usize = 128;

/// Answers tokens per second.
type Work = fn(&mut Bench) -> f64;

const WORKS: [(&str, Work); 6] = [
    ("prefill 512", |bench| bench.prefill(512)),
    ("decode, 1 stream, 64 to 128", |bench| bench.decode(1, 64, 64)),
    ("decode, 1 stream, at 4,000", |bench| bench.decode(1, 4_000, 24)),
    ("decode, 8 streams", |bench| bench.decode(8, 64, 32)),
    ("decode, 32 streams", |bench| bench.decode(32, 64, 12)),
    ("prefill 64 at 4,000", |bench| bench.chunk(4_000, 64)),
];

struct Bench {
    runner: Box<dyn ModelRunner>,
    /// Tokens of stream 0 that stay computed.
    depth: usize,
}

impl Bench {
    fn new(model: &str, kind: RunnerKind, flash_attention: bool) -> Self {
        let spec = LoadSpec {
            model: model.into(),
            runner: kind,
            context_length: CONTEXT as u32,
            kv_tokens: (STREAMS * CONTEXT) as u32,
            max_sequences: STREAMS as u32,
            batch_tokens: 512,
            kv_type: KvCacheType::F16,
            flash_attention,
            kv_layout: KvLayout::Streams,
            threads: THREADS,
            gpu_layers: 0,
            mmap: true,
            target_step_ms: 100,
            queue_limit: 8,
            speculate: Speculate::Off,
            mock_step_us: 0,
        };
        Self { runner: runner::load(&spec).expect("the model loads"), depth: 0 }
    }

    /// Computes rows of some streams, a number of tokens each, from their positions on.
    fn step(&mut self, streams: &[(usize, usize, usize)]) {
        let mut batch = Batch::default();
        for &(stream, position, count) in streams {
            let first = batch.tokens.len();
            // Any tokens will do: no kernel looks at what they mean.
            batch.tokens.extend((0..count).map(|i| (1000 + (position + i) * 7 % 9000) as Token));
            let each = CONTEXT / PAGE_TOKENS;
            batch.sequences.push(BatchSequence {
                slot: SeqSlot(stream as u32),
                rows: first..first + count,
                position,
                wants: Wants::LastLogits,
                pages: (0..each).map(|page| (stream * each + page) as u32).collect(),
                adapter: None,
            });
        }
        self.runner.step(&batch).expect("it computes");
        for sequence in &batch.sequences {
            let logits = self.runner.logits(sequence.rows.end - 1).expect("they were wanted");
            assert!(logits[0].is_finite());
        }
    }

    /// Brings stream 0 to a depth, once.
    fn reach(&mut self, depth: usize) {
        if self.depth < depth {
            self.runner.truncate(SeqSlot(0), 0);
            for position in (0..depth).step_by(500) {
                self.step(&[(0, position, 500.min(depth - position))]);
            }
            self.depth = depth;
        }
        self.runner.truncate(SeqSlot(0), depth);
    }

    fn prefill(&mut self, count: usize) -> f64 {
        self.forget(0);
        let started = Instant::now();
        self.step(&[(0, 0, count)]);
        count as f64 / started.elapsed().as_secs_f64()
    }

    fn chunk(&mut self, depth: usize, count: usize) -> f64 {
        self.reach(depth);
        let started = Instant::now();
        self.step(&[(0, depth, count)]);
        count as f64 / started.elapsed().as_secs_f64()
    }

    fn decode(&mut self, streams: usize, depth: usize, count: usize) -> f64 {
        if depth > SHORT {
            self.reach(depth);
        } else {
            for stream in 0..streams {
                self.forget(stream);
                self.step(&[(stream, 0, depth)]);
            }
        }
        let started = Instant::now();
        for position in depth..depth + count {
            let rows: Vec<_> = (0..streams).map(|stream| (stream, position, 1)).collect();
            self.step(&rows);
        }
        (streams * count) as f64 / started.elapsed().as_secs_f64()
    }

    fn forget(&mut self, stream: usize) {
        self.runner.truncate(SeqSlot(stream as u32), 0);
        if stream == 0 {
            self.depth = 0;
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // Cargo adds `--bench`.
    let arguments: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let Some(model) = arguments.first() else {
        eprintln!("usage: cargo bench --bench runners -- MODEL.gguf [REPETITIONS]");
        return;
    };
    let repetitions = arguments.get(1).map_or(5, |n| n.parse().expect("a number"));
    let mut sides = [
        Bench::new(model, RunnerKind::Native, false),
        Bench::new(model, RunnerKind::LlamaCpp, true),
        Bench::new(model, RunnerKind::LlamaCpp, false),
    ];
    println!("| work | native | llama.cpp, flash | without | ratio |\n|---|---|---|---|---|");
    for (name, work) in WORKS {
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..repetitions {
            for (side, rates) in sides.iter_mut().zip(&mut rates) {
                rates.push(work(side));
            }
        }
        let [ours, flash, plain] = rates.map(median);
        let ratio = ours / flash.max(plain);
        println!("| {name} | {ours:.1} | {flash:.1} | {plain:.1} | {ratio:.2} |");
    }
}
