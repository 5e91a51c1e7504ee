//! A training step's time: `cargo bench --bench train -- lora|full MODEL.gguf [TOKENS] [STEPS]`, or
//! `nano` for the shape of nanoGPT's characters (4 layers, 128 wide, batch of 12 by 64).
//!
//! One row of `TOKENS` (512) that all count, LoRA of rank 16 on all linears or all weights, AdamW. Prints
//! a line a step (seconds, CPU seconds, loss), and at the end the most memory that was resident.
//! `scripts/bench_train.py` runs it in turn with PyTorch.

use ingot::gguf::fixture::TinyDecoder;
use ingot::gguf::{Gguf, Projection};
use ingot::isa::choose_isa_of_environment;
use ingot::job::spec::{Lora, Optimizer};
use ingot::train::data::Encoded;
use ingot::train::model::{Batch, Gradients, Model, Pass, Training};
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
    rows: u32,
    tokens: u32,
    steps: u32,
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
                rows: 12,
                tokens: 64,
                steps: number(1, 60)?,
            })
        }
        [kind, path, ..] if kind == "lora" || kind == "full" => {
            let training = if kind == "lora" { Training::Lora(lora) } else { Training::Full };
            let file = Arc::new(Gguf::open(Path::new(path))?);
            Ok(Shape { file, training, rows: 1, tokens: number(2, 512)?, steps: number(3, 4)? })
        }
        _ => Err("give lora or full with a model, or nano".into()),
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
    let Shape { file, training, rows, tokens, steps } = shape(&args, folder.path())?;
    let model = Model::load(file, &training, 2048, &candle_core::Device::Cpu)?;
    let mut optimization = Optimization::new(Optimizer::default());
    let vocab = model.shape().vocab as u32;
    for step in 0..steps {
        let row = |row: u32| Encoded {
            tokens: (0..tokens).map(|at| (at * 7919 + step + row * 31) % 40_000 % vocab).collect(),
            trained: vec![true; tokens as usize],
        };
        let rows: Vec<Encoded> = (0..rows).map(row).collect();
        let batch = Batch::of(rows.iter());
        let (begun, cpu) = (Instant::now(), cpu_seconds());
        let mut gradients = Gradients::default();
        let losses =
            model.train(&batch, Pass { number: step.into(), checkpoint: false }, &mut gradients)?;
        let gradients = gradients.take(model.params())?;
        let count = f64::from(tokens) * rows.len() as f64;
        optimization.step(model.params(), &gradients, count, 2e-4, 1.0)?;
        let loss = f64::from(losses.sum.to_scalar::<f32>()?) / count;
        let (seconds, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        println!("step {seconds:.4} cpu {cpu:.4} loss {loss:.5}");
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
    Ok(())
}
