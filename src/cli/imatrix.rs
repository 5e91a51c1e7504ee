//! `ingot imatrix MODEL`: computes an importance matrix for `ingot quantize` and llama-quantize.

use super::progress::work_bar;
use super::{CliError, fetch, read_text};
use crate::config::DataDirOption;
use crate::gateway::store::Store;
use crate::job::{CompressError, IMATRIX_CONTEXT, ImatrixPlan, ImatrixReport};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `ingot imatrix`.
#[derive(Debug, clap::Args)]
pub struct ImatrixOptions {
    /// A GGUF file (F32, F16 or BF16 is best), or a name of `ingot models`
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Calibration text, UTF-8: what the model will be used for
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// The file to write
    #[arg(long, short, value_name = "FILE", default_value = "imatrix.gguf")]
    pub output: PathBuf,
    /// Tokens of a chunk, which is read from its beginning [default: 512]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..=1 << 16))]
    pub context: Option<u32>,
    /// Chunks to read, at most [default: all]
    #[arg(long, value_name = "N")]
    pub chunks: Option<NonZeroUsize>,
    /// Also collect the inputs of output.weight
    #[arg(long)]
    pub output_tensor: bool,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
    /// Threads [default: all usable cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub data_dir: DataDirOption,
}

/// Computes with `imatrix`, and says what was written.
///
/// # Errors
/// If the model cannot be found, or nothing was written.
pub fn main(
    options: ImatrixOptions,
    imatrix: impl FnOnce(
        &ImatrixPlan,
        &mut dyn FnMut(usize, usize),
    ) -> Result<ImatrixReport, CompressError>,
) -> Result<ExitCode, CliError> {
    let store = Store::open(&options.data_dir.resolve()?)?;
    let model = fetch(&store, &options.model)?;
    let text = read_text(&options.data)?;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let plan = ImatrixPlan {
        model,
        output: options.output,
        text,
        text_name: options.data.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        context: options.context.map_or(IMATRIX_CONTEXT, |tokens| tokens as usize),
        chunks: options.chunks.map(NonZeroUsize::get),
        output_tensor: options.output_tensor,
        threads: options.threads.map_or_else(cores, usize::from),
        force: options.force,
    };
    let bar = work_bar(0);
    bar.set_prefix("chunks");
    let result = imatrix(&plan, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let report = result.map_err(|error| CliError::message(format!("{error}.")))?;
    for (name, count) in &report.unused_experts {
        eprintln!(
            "{name}: {count} experts were not used by the text; they are quantized without importance."
        );
    }
    println!(
        "{}: {} tensors, {} chunks, {} tokens",
        plan.output.display(),
        report.tensors,
        report.chunks,
        report.tokens
    );
    Ok(ExitCode::SUCCESS)
}
