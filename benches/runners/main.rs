//! The native runner against llama.cpp, in one process, in turn: `cargo bench --bench runners --
//! MODEL.gguf [--repeat 5] [--works decode] [--sides native,flash]`. Medians; both get two threads.
//! Instead of a file, `random:Q4_K_M` is a model with random weights and the dimensions of
//! Llama-3.2-1B; `--write FILE` only leaves it there, for others to read (`scripts/bench_kernels.py`
//! measures them beside this).
//!
//! llama.cpp has its cache in streams, which measured best, with and without flash attention; the
//! better one counts. `llama-bench` measures the same kernels.

mod random;

use clap::Parser;
use ingot::engine::runner::{self, Batch, BatchSequence, ModelRunner, PAGE_TOKENS, SeqSlot, Wants};
use ingot::gguf::{Gguf, TensorInfo};
use ingot::ipc::{KvLayout, LoadSpec, RunnerKind, Token};
use ingot::isa::choose_isa_of_environment;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The binary's own: its huge pages are worth a fifth of a token's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const THREADS: u32 = 2;
const STREAMS: usize = 32;
/// Tokens of a stream, at most.
const CONTEXT: usize = 4_608;
const SHORT: usize = 128;

/// Answers a rate, tokens per second unless its name says otherwise.
type Work = fn(&mut Bench) -> f64;

const WORKS: [(&str, Work); 9] = [
    ("prefill 512", |bench| bench.prefill(512)),
    ("prefill 4,000", |bench| bench.prefill(4_000)),
    ("decode, 1 stream, 64 to 128", |bench| bench.decode(1, 64, 64)),
    ("decode, 1 stream, at 4,000", |bench| bench.decode(1, 4_000, 24)),
    ("decode, 8 streams", |bench| bench.decode(8, 64, 32)),
    ("decode, 32 streams", |bench| bench.decode(32, 64, 12)),
    ("decode, 8 streams that share 1,000", |bench| bench.decode_shared(8, 1_000, 16)),
    ("prefill 64 at 4,000", |bench| bench.chunk(4_000, 64)),
    ("loads and first tokens, a minute", |bench| bench.load()),
];

const SIDES: [(&str, RunnerKind, bool); 3] = [
    ("native", RunnerKind::Native, false),
    ("flash", RunnerKind::LlamaCpp, true),
    ("plain", RunnerKind::LlamaCpp, false),
];

#[derive(Parser)]
struct Arguments {
    /// A file, or `random:` and the name of a preset.
    model: String,
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Only works that have one of these names, or hold one that is no whole name; a semicolon
    /// stands between them.
    #[arg(long, value_delimiter = ';', default_value = "")]
    works: Vec<String>,
    /// Of native, flash and plain.
    #[arg(long, value_delimiter = ',', default_value = "native,flash,plain")]
    sides: Vec<String>,
    /// Writes the random model there, and does nothing else.
    #[arg(long)]
    write: Option<PathBuf>,
    /// Cargo's own.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Bytes of all weights that a token reads.
fn weights(model: &str) -> u64 {
    let file = Gguf::open(Path::new(model)).expect("a GGUF file");
    let tied = file.tensor("output.weight").is_none();
    let read = |tensor: &&TensorInfo| {
        tensor.dims().len() > 1 && (tied || tensor.name() != "token_embd.weight")
    };
    let tensors = file.tensors().iter().filter(read);
    tensors.map(|tensor| file.data(tensor.name()).map_or(0, |data| data.len() as u64)).sum()
}

/// What the threads read from memory to find out how fast that is.
struct Memory(Vec<u64>);

impl Memory {
    /// Bytes per second, the median of some tries, as rates of works are: the machine's neighbours use
    /// the same memory.
    fn rate(&self) -> f64 {
        let part = self.0.len() / THREADS as usize;
        let once = || {
            let started = Instant::now();
            std::thread::scope(|scope| {
                for part in self.0.chunks(part) {
                    scope.spawn(move || {
                        let mut lanes = [0u64; 16];
                        for sixteen in part.as_chunks::<16>().0 {
                            for (lane, x) in lanes.iter_mut().zip(sixteen) {
                                *lane = lane.wrapping_add(*x);
                            }
                        }
                        std::hint::black_box(lanes);
                    });
                }
            });
            (8 * self.0.len()) as f64 / started.elapsed().as_secs_f64()
        };
        median((0..9).map(|_| once()).collect())
    }
}

struct Bench {
    spec: LoadSpec,
    runner: Box<dyn ModelRunner>,
    /// Leading tokens of all streams that lie in the first one's pages.
    shared: usize,
    /// Tokens of stream 0 that stay computed.
    depth: usize,
}

impl Bench {
    fn new(model: &str, kind: RunnerKind, flash_attention: bool) -> Self {
        let spec = LoadSpec {
            context_length: CONTEXT as u32,
            kv_tokens: (STREAMS * CONTEXT) as u32,
            max_sequences: STREAMS as u32,
            flash_attention,
            kv_layout: KvLayout::Streams,
            threads: THREADS,
            ..LoadSpec::plain(model, kind)
        };
        Self::of(spec)
    }

    fn of(spec: LoadSpec) -> Self {
        let runner = runner::load(&spec).expect("the model loads");
        Self { spec, runner, shared: 0, depth: 0 }
    }

    /// A second copy, with a cache for one stream: a cache for many takes longer than small models.
    /// A copy before it leaves its memory to the system, which would otherwise have to ask the host
    /// for it, for whoever comes first.
    fn load(&mut self) -> f64 {
        let (kv_tokens, max_sequences) = (CONTEXT as u32, 1);
        let spec = LoadSpec { kv_tokens, max_sequences, ..self.spec.clone() };
        drop(Self::of(spec.clone()));
        let started = Instant::now();
        let mut copy = Self::of(spec);
        copy.step(&[(0, 0, 1)]);
        60.0 / started.elapsed().as_secs_f64()
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
                pages: (0..each)
                    .map(|page| match page < self.shared / PAGE_TOKENS {
                        true => page as u32,
                        false => (stream * each + page) as u32,
                    })
                    .collect(),
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
        for position in (0..count).step_by(512) {
            self.step(&[(0, position, 512.min(count - position))]);
        }
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
        self.timed(streams, depth, count)
    }

    fn timed(&mut self, streams: usize, depth: usize, count: usize) -> f64 {
        let started = Instant::now();
        for position in depth..depth + count {
            let rows: Vec<_> = (0..streams).map(|stream| (stream, position, 1)).collect();
            self.step(&rows);
        }
        (streams * count) as f64 / started.elapsed().as_secs_f64()
    }

    /// Streams that begin with the same tokens: the same pages, or copied cells.
    fn decode_shared(&mut self, streams: usize, depth: usize, count: usize) -> f64 {
        self.reach(depth);
        self.shared = depth / PAGE_TOKENS * PAGE_TOKENS;
        for stream in 1..streams {
            self.forget(stream);
            self.runner.fork(SeqSlot(0), SeqSlot(stream as u32), self.shared);
            self.step(&[(stream, self.shared, depth - self.shared)]);
        }
        let rate = self.timed(streams, depth, count);
        self.shared = 0;
        rate
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
    choose_isa_of_environment().expect("INGOT_ISA is one of this CPU's");
    let mut arguments = Arguments::parse();
    let folder = tempfile::tempdir().expect("a folder");
    if let Some(name) = arguments.model.strip_prefix("random:") {
        let path = arguments.write.clone().unwrap_or_else(|| folder.path().join("random.gguf"));
        random::write(&path, random::preset(name).expect("a preset such as Q4_K_M"));
        if arguments.write.is_some() {
            return;
        }
        arguments.model = path.display().to_string();
    }
    let mut sides: Vec<_> = SIDES
        .iter()
        .filter(|(name, ..)| arguments.sides.iter().any(|side| side == name))
        .map(|&(_, kind, flash)| Bench::new(&arguments.model, kind, flash))
        .collect();
    let bytes = weights(&arguments.model) as f64;
    let memory = Memory(vec![1; 1 << 26]);
    let most = memory.rate() / bytes;
    println!("{:.0} MB of weights; memory gives them {most:.1} times a second", bytes / 1e6);
    for (side, name) in sides.iter().zip(&arguments.sides) {
        println!("{name} loaded in {:.2} s", side.runner.info().load_seconds);
    }
    println!("| work | {} | first to best other |", arguments.sides.join(" | "));
    println!("|{}", "---|".repeat(sides.len() + 2));
    let whole = |part: &str| WORKS.iter().any(|&(name, _)| name == part);
    let wanted = |name: &str| {
        arguments.works.iter().any(|part| name == part || !whole(part) && name.contains(part))
    };
    for (name, work) in WORKS.iter().filter(|(name, _)| wanted(name)) {
        let mut rates = vec![Vec::new(); sides.len()];
        let mut shares = Vec::new();
        for _ in 0..arguments.repeat {
            for (side, rates) in sides.iter_mut().zip(&mut rates) {
                rates.push(work(side));
            }
            shares.push(rates[0][rates[0].len() - 1] * bytes / memory.rate());
        }
        let rates: Vec<_> = rates.into_iter().map(median).collect();
        let best = rates[1..].iter().copied().fold(f64::NAN, f64::max);
        let cells: Vec<_> = rates.iter().map(|rate| format!("{rate:.1}")).collect();
        println!("| {name} | {} | {:.2} |", cells.join(" | "), rates[0] / best);
        if name.starts_with("decode, 1 stream, 64") {
            println!(
                "| the same, of what memory gave then | {:.0}% |{}",
                100.0 * median(shares),
                " |".repeat(sides.len())
            );
        }
    }
}
