//! A training step's time: `cargo bench --bench train -- KIND [MODEL.gguf] …`
//!
//! - `lora MODEL [TOKENS] [STEPS]`, `full MODEL [TOKENS] [STEPS]`: one row of `TOKENS` (512) that all
//!   count, LoRA of rank 16 on all linears or all weights;
//! - `nano`: the shape of nanoGPT's characters (4 layers, 128 wide, batch of 12 by 64);
//! - `grpo MODEL [apart]`: LoRA, 8 completions of 64 tokens after one prompt of 256;
//! - `dpo MODEL [apart]`: LoRA, a pair of completions of 256 tokens after one prompt of 256.
//!
//! With `apart` the completions do not share the rows of their prompt. The optimizer is AdamW. Prints a
//! line a step (seconds, CPU seconds, loss), and at the end the most memory that was resident.
//! `scripts/bench_train.py` runs it in turn with PyTorch and TRL.

use ingot::gguf::fixture::TinyDecoder;
use ingot::gguf::{Gguf, Projection};
use ingot::isa::choose_isa_of_environment;
use ingot::job::spec::{Lora, Optimizer};
use ingot::train::data::Encoded;
use ingot::train::model::{Batch, Gradients, Model, OutputGrads, Pass, Training, Wanted};
use ingot::train::optim::Optimization;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The binary's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Error = Box<dyn std::error::Error>;

/// What is trained, and on rows of how many tokens.
struct Shape {
    file: Arc<Gguf>,
    training: Training,
    loss: Loss,
    /// Rows, or completions of one prompt.
    rows: u32,
    tokens: u32,
    steps: u32,
}

#[derive(Clone, Copy)]
enum Loss {
    CrossEntropy,
    /// A policy's or a preference loss of completions after a prompt of this many tokens.
    Completions {
        prompt: u32,
        preference: bool,
        apart: bool,
    },
}

impl Loss {
    /// The loss, and its gradient with respect to the log-probabilities of completions, the first half
    /// of which should become likelier.
    fn of(preference: bool, log_probs: &[f64]) -> (f64, Vec<f64>) {
        let (better, worse) = log_probs.split_at(log_probs.len() / 2);
        let signs = (0..log_probs.len()).map(|at| if at < better.len() { 1.0 } else { -1.0 });
        match preference {
            // GRPO at the first update: ratios are 1, and the advantages 1 and -1.
            false => (0.0, signs.map(|sign| -sign / log_probs.len() as f64).collect()),
            // DPO with a reference that gives both the same log-probability, and β = 0.1.
            true => {
                let margin = 0.1 * (better.iter().sum::<f64>() - worse.iter().sum::<f64>());
                let share = 1.0 / (1.0 + margin.exp());
                ((1.0 + (-margin).exp()).ln(), signs.map(|sign| -0.1 * sign * share).collect())
            }
        }
    }
}

fn shape(args: &[String], folder: &Path) -> Result<Shape, Error> {
    let number = |at: usize, or: u32| args.get(at).map_or(Ok(or), |text| text.parse());
    let all = [
        Projection::Q,
        Projection::K,
        Projection::V,
        Projection::O,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];
    let lora = Lora {
        rank: 16,
        alpha: 32.0,
        targets: all.into(),
        rank_stabilized: false,
        dropout: 0.0,
        seed: 1,
    };
    match args {
        [kind, ..] if kind == "nano" => {
            let path = folder.join("nano.gguf");
            let llama = TinyDecoder::new("llama");
            TinyDecoder {
                layers: 4,
                width: 128,
                heads: 4,
                kv_heads: 4,
                head_dim: 32,
                ff: 352,
                tied: true,
                ..llama
            }
            .write(&path)?;
            let file = Arc::new(Gguf::open(&path)?);
            Ok(Shape {
                file,
                training: Training::Full,
                loss: Loss::CrossEntropy,
                rows: 12,
                tokens: 64,
                steps: number(1, 60)?,
            })
        }
        [kind, path, ..] if kind == "lora" || kind == "full" => {
            let training = if kind == "lora" { Training::Lora(lora) } else { Training::Full };
            let file = Arc::new(Gguf::open(Path::new(path))?);
            let (loss, tokens) = (Loss::CrossEntropy, number(2, 512)?);
            Ok(Shape { file, training, loss, rows: 1, tokens, steps: number(3, 4)? })
        }
        [kind, path, rest @ ..] if kind == "grpo" || kind == "dpo" => {
            let apart = rest.first().is_some_and(|word| word == "apart");
            let (rows, tokens) = if kind == "grpo" { (8, 64) } else { (2, 256) };
            Ok(Shape {
                file: Arc::new(Gguf::open(Path::new(path))?),
                training: Training::Lora(lora),
                loss: Loss::Completions { prompt: 256, preference: kind == "dpo", apart },
                rows,
                tokens,
                steps: 4,
            })
        }
        _ => Err("give lora, full, grpo or dpo with a model, or nano".into()),
    }
}

/// User and system time of all threads, as proc(5) has it.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).flat_map(str::parse::<f64>);
    ticks.sum::<f64>() / rustix::param::clock_ticks_per_second() as f64
}

fn main() -> Result<(), Error> {
    choose_isa_of_environment()?;
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let folder = tempfile::tempdir()?;
    let Shape { file, training, loss, rows, tokens, steps } = shape(&args, folder.path())?;
    let model = Model::load(file, &training, 2048, &candle_core::Device::Cpu)?;
    let mut optimization = Optimization::new(Optimizer::default());
    let vocab = model.shape().vocab as u32;
    let prompt = match loss {
        Loss::CrossEntropy => 0,
        Loss::Completions { prompt, .. } => prompt,
    };
    for step in 0..steps {
        let token = |at: u32| (at * 7919 + step) % 40_000 % vocab;
        let row = |row: u32| Encoded {
            tokens: (0..prompt)
                .map(token)
                .chain((0..tokens).map(|at| token(at + row * 31)))
                .collect(),
            trained: (0..prompt + tokens).map(|at| at >= prompt).collect(),
        };
        let rows: Vec<Encoded> = (0..rows).map(row).collect();
        let (begun, cpu) = (Instant::now(), cpu_seconds());
        let pass = Pass { number: step.into(), checkpoint: false };
        let mut gradients = Gradients::default();
        let (sum, count) = match loss {
            Loss::CrossEntropy => {
                let losses = model.train(&Batch::of(&rows), pass, &mut gradients)?;
                (f64::from(losses.sum.to_scalar::<f32>()?), f64::from(tokens) * rows.len() as f64)
            }
            Loss::Completions { preference, apart, .. } => {
                let batch = match apart {
                    true => Batch::of(&rows),
                    false => Batch::of_groups([rows.iter().collect()]),
                };
                let mut sum = 0.0;
                model.train_with(&batch, pass, Wanted::LOG_PROBS, &mut gradients, |outputs| {
                    let (loss, log_probs) = Loss::of(preference, &outputs.log_probs);
                    sum = loss;
                    OutputGrads { log_probs, values: Vec::new() }
                })?;
                (sum, 1.0)
            }
        };
        let gradients = gradients.take(model.params())?;
        optimization.step(model.params(), &gradients, count, 2e-4, 1.0)?;
        let loss = sum / count;
        let (seconds, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        println!("step {seconds:.4} cpu {cpu:.4} loss {loss:.5}");
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
    Ok(())
}
