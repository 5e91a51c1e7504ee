//! `ingot quantize IN OUT`: writes a model in another type.

use super::CliError;
use super::progress::tensor_bar;
use crate::config::{ByteSize, DataDirOption};
use crate::gateway::store::Store;
use crate::gguf::{TensorType, is_hugging_face};
use crate::job::{
    CompressError, ModelType, QuantizePlan, QuantizeReport, QuantizeSettings, QuantizedTensor,
    TensorOverride, tensor_type,
};
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `ingot quantize`.
#[derive(Debug, clap::Args)]
pub struct QuantizeOptions {
    /// A GGUF file (F32, F16 or BF16), a Hugging Face folder, or a name of `ingot models`
    #[arg(value_name = "IN")]
    pub input: String,
    /// The file to write
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Type of the model, with llama-quantize's names: Q8_0, Q6_K, Q5_K_M, Q4_K_M, IQ4_XS, COPY, …
    #[arg(long = "type", value_name = "TYPE")]
    pub ty: ModelType,
    /// Importance matrix (GGUF), which the types below 3 bits need
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,
    /// Type of the tensors whose names match a regular expression; may be repeated
    #[arg(long = "tensor-type", value_name = "PATTERN=TYPE")]
    pub overrides: Vec<TensorOverride>,
    /// Type of output.weight
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    pub output_type: Option<TensorType>,
    /// Type of token_embd.weight
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    pub embedding_type: Option<TensorType>,
    /// Keep output.weight as it is
    #[arg(long)]
    pub leave_output: bool,
    /// All matrices in one type, without a mix
    #[arg(long)]
    pub pure: bool,
    /// Quantize a model that is quantized already
    #[arg(long)]
    pub requantize: bool,
    /// Write as many files as the input has
    #[arg(long)]
    pub keep_split: bool,
    /// Replace OUT if it exists
    #[arg(long)]
    pub force: bool,
    /// Threads [default: all usable cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub data: DataDirOption,
}

/// Quantizes with `quantize`, and says what was written.
///
/// # Errors
/// If the model cannot be found, or nothing was written.
pub fn main(
    options: QuantizeOptions,
    quantize: impl FnOnce(
        &QuantizePlan,
        &mut dyn FnMut(QuantizedTensor),
    ) -> Result<QuantizeReport, CompressError>,
) -> Result<ExitCode, CliError> {
    let plan = plan(options)?;
    let mut bar = Bar::new();
    let result = quantize(&plan, &mut |tensor| bar.show(&tensor));
    bar.bar.finish_and_clear();
    let report = result.map_err(|error| CliError::message(format!("{error}.")))?;
    for note in &report.notes {
        eprintln!("{note}");
    }
    let files: Vec<_> = report.files.iter().map(|file| file.display().to_string()).collect();
    println!(
        "{}: {}, {:.2} bits per weight (before: {}, {:.2})",
        files.join(", "),
        ByteSize(report.after),
        bits(report.after, report.weights),
        ByteSize(report.before),
        bits(report.before, report.weights),
    );
    Ok(ExitCode::SUCCESS)
}

fn bits(bytes: u64, weights: u64) -> f64 {
    8.0 * bytes as f64 / weights.max(1) as f64
}

fn plan(options: QuantizeOptions) -> Result<QuantizePlan, CliError> {
    let near = Path::new(&options.input);
    let input = match near.is_file() || is_hugging_face(near) {
        true => near.to_owned(),
        false => named(&options)?,
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    Ok(QuantizePlan {
        input,
        output: options.output,
        settings: QuantizeSettings {
            ty: options.ty,
            imatrix: options.imatrix,
            overrides: options.overrides,
            output_type: options.output_type,
            embedding_type: options.embedding_type,
            pure: options.pure,
            requantize: options.requantize,
            leave_output: options.leave_output,
        },
        keep_split: options.keep_split,
        threads: options.threads.map_or_else(cores, usize::from),
        force: options.force,
    })
}

/// The file of a model in the data folder.
fn named(options: &QuantizeOptions) -> Result<PathBuf, CliError> {
    let store = Store::open(&options.data.clone().resolve()?)?;
    super::fetch(&store, &options.input)
}

/// A bar of tensors, with the size of the file so far.
struct Bar {
    bar: ProgressBar,
    /// MiB written.
    written: f64,
}

impl Bar {
    fn new() -> Self {
        Self { bar: tensor_bar(), written: 0.0 }
    }

    fn show(&mut self, tensor: &QuantizedTensor) {
        self.written += tensor.after;
        self.bar.set_length(tensor.total as u64);
        self.bar.set_position(tensor.number as u64);
        self.bar.set_message(format!("{:.1} MiB  {}", self.written, tensor.name));
    }
}
