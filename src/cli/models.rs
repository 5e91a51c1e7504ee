//! `ingot models`.

use super::CliError;
use crate::config::{ByteSize, DataDirOption};
use crate::gateway::store::{Store, StoredModel};
use crate::gguf::{Gguf, ModelFacts};
use std::path::Path;
use std::process::ExitCode;

/// Options of `ingot models`.
#[derive(Debug, clap::Args)]
pub struct ModelsOptions {
    #[command(flatten)]
    pub data: DataDirOption,
}

/// Prints the table.
pub fn main(options: ModelsOptions) -> Result<ExitCode, CliError> {
    let folder = options.data.resolve()?;
    let store = Store::open(&folder)?;
    let models = store.models()?;
    if models.is_empty() {
        eprintln!("No models yet in {}. Get one with: ingot pull smollm2:135m", folder.display());
    } else {
        print!("{}", table(store.folder(), &models));
    }
    Ok(ExitCode::SUCCESS)
}

fn table(folder: &Path, models: &[StoredModel]) -> String {
    let header = ["NAME", "QUANTIZATION", "SIZE", "SHA256", "SOURCE"].map(str::to_owned);
    let rows = models.iter().map(|model| {
        [
            model.name.clone(),
            quantization(&folder.join(&model.file)),
            ByteSize(model.bytes).to_string(),
            model.sha256.chars().take(12).collect(),
            model.source.clone(),
        ]
    });
    align(std::iter::once(header).chain(rows).collect())
}

fn quantization(path: &Path) -> String {
    if !path.exists() {
        return "missing".to_owned();
    }
    Gguf::open_header(path)
        .and_then(|gguf| ModelFacts::read(&gguf))
        .map_or_else(|_| "unreadable".to_owned(), |facts| facts.quantization)
}

/// Columns as wide as their widest cell, two spaces apart.
pub(super) fn align<const N: usize>(rows: Vec<[String; N]>) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_names_missing_files() {
        let model = StoredModel {
            name: "smollm2:135m".into(),
            file: "models/gone.gguf".into(),
            sha256: "b179c9523d0e6a0f".into(),
            bytes: 98_362_432,
            source: "smollm2:135m".into(),
            created_at: 0,
        };
        let text = table(Path::new("nowhere"), &[model]);
        let expected = "NAME          QUANTIZATION  SIZE      SHA256        SOURCE\n\
                        smollm2:135m  missing       93.8 MiB  b179c9523d0e  smollm2:135m\n";
        assert_eq!(text, expected);
    }
}
