//! `ingot pull REF`.

use super::{CliError, PullBar};
use crate::config::{ByteSize, DataDirOption, HubAccess};
use crate::gateway::store::{ModelRef, Store, pull};
use std::process::ExitCode;

/// Options of `ingot pull`.
#[derive(Debug, clap::Args)]
pub struct PullOptions {
    /// hf:org/repo/file.gguf (or file.gguf@revision), an alias such as smollm2:135m, or a file to copy in
    #[arg(value_name = "REF")]
    pub reference: String,
    #[command(flatten)]
    pub data: DataDirOption,
}

/// Gets the model and prints its path.
pub fn main(options: PullOptions) -> Result<ExitCode, CliError> {
    let store = Store::open(&options.data.resolve()?)?;
    let reference = ModelRef::parse(&options.reference)?;
    let mut bar = PullBar::new(reference.model_name());
    let result = pull(&store, &reference, &HubAccess::from_env(), &mut |event| bar.show(event));
    bar.finish();
    let model = result?;
    eprintln!(
        "{} {} ({}, sha256 {}).",
        model.name,
        if model.already_here { "is here already" } else { "is ready" },
        ByteSize(model.bytes),
        model.sha256.as_deref().unwrap_or("unknown"),
    );
    println!("{}", model.path.display());
    Ok(ExitCode::SUCCESS)
}
