//! `ingot export NAME FOLDER`: a model or adapter for other programs, with a model card.

use super::progress::spinner;
use super::{CliError, fetch, read_text};
use crate::config::DataDirOption;
use crate::gateway::store::{ModelRef, Store, StoredAdapter};
use crate::gguf::{Gguf, ModelFacts};
use crate::job::{
    CompressError, EvaluationFacts, ExportAdapter, ExportFormat, ExportPlan, ExportRefused, Folder,
    ModelCard, ModelType, QuantizePlan, QuantizeReport, QuantizeSettings, QuantizedTensor,
    write_whole,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `ingot export`.
#[derive(Debug, clap::Args)]
pub struct ExportOptions {
    /// A model or adapter: a name of the data folder, or a model's file or reference
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The folder to write; it must not exist, or be empty
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// gguf: a model for llama.cpp; lora-gguf, peft: an adapter for llama.cpp, for PEFT;
    /// hugging-face: a model for transformers
    #[arg(long, value_name = "FORMAT", default_value = "gguf")]
    pub format: ExportFormat,
    /// Type of a GGUF, with llama-quantize's names [default: F16 for a merged adapter, else as it is]
    #[arg(long = "type", value_name = "TYPE")]
    pub ty: Option<ModelType>,
    /// Importance matrix (GGUF), which the types below 3 bits need
    #[arg(long, value_name = "FILE", requires = "ty")]
    pub imatrix: Option<PathBuf>,
    /// The base model's file (GGUF) of an adapter, if the data folder does not know it
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// Report of `ingot eval --json` or of an evaluation job, for the model card
    #[arg(long, value_name = "FILE")]
    pub evaluation: Option<PathBuf>,
    #[command(flatten)]
    pub data: DataDirOption,
}

/// What is exported, with its files.
struct Source {
    base: PathBuf,
    base_name: String,
    parent: Option<PathBuf>,
    /// A file or folder, and the factor on its own scale.
    adapter: Option<(PathBuf, f32)>,
    /// The folder of the job that made it.
    job: Option<PathBuf>,
}

/// Exports with `export`, and by `quantize` in types that `export` does not write.
///
/// # Errors
/// If the model cannot be found, or nothing was written.
pub fn main(
    options: ExportOptions,
    export: impl FnOnce(&ExportPlan) -> Result<Vec<String>, ExportRefused>,
    quantize: impl FnOnce(
        &QuantizePlan,
        &mut dyn FnMut(QuantizedTensor),
    ) -> Result<QuantizeReport, CompressError>,
) -> Result<ExitCode, CliError> {
    let store = Store::open(&options.data.clone().resolve()?)?;
    let source = source(&store, &options.name, options.base.as_deref())?;
    check(&options, &source)?;
    let evaluation = options.evaluation.as_deref().map(evaluation).transpose()?;
    // Everything is written beside the folder first, so that no half of it is left.
    let part = Part::new(&options.folder)?;
    let bar = spinner(format!("exporting {}", options.name));
    let at = |name: &str| part.0.join(name);
    let output = match options.format {
        ExportFormat::Gguf => at(&format!("{}.gguf", file_name(&options))),
        ExportFormat::LoraGguf => at("adapter.gguf"),
        ExportFormat::Peft | ExportFormat::HuggingFace => part.0.clone(),
    };
    let is_plain = options.format == ExportFormat::Gguf && source.adapter.is_none();
    let mut model = source.base.clone();
    if !is_plain {
        let merged = at(".merged.gguf");
        let quantized = options.format == ExportFormat::Gguf && options.ty.is_some();
        let plan = ExportPlan {
            base: source.base.clone(),
            base_name: source.base_name.clone(),
            adapter: source.adapter.clone().map(|(path, scale)| ExportAdapter {
                path,
                scale,
                work_file: at(".adapter.gguf"),
            }),
            parent: source.parent.clone(),
            format: options.format,
            output: if quantized { merged.clone() } else { output.clone() },
        };
        let lacking = export(&plan).map_err(|error| CliError::message(format!("{error}.")))?;
        lacking.iter().for_each(|what| bar.suspend(|| eprintln!("left out: {what}")));
        model = plan.output;
    }
    if options.format == ExportFormat::Gguf && (is_plain || options.ty.is_some()) {
        let copy = "COPY".parse().expect("a known type");
        let plan = QuantizePlan {
            input: model.clone(),
            output: output.clone(),
            settings: QuantizeSettings {
                ty: options.ty.unwrap_or(copy),
                imatrix: options.imatrix.clone(),
                overrides: Vec::new(),
                output_type: None,
                embedding_type: None,
                pure: false,
                requantize: false,
                leave_output: false,
            },
            keep_split: false,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            force: true,
        };
        quantize(&plan, &mut |_| ()).map_err(|error| CliError::message(format!("{error}.")))?;
        if !is_plain {
            let _ = std::fs::remove_file(&model);
        }
    }
    let card = card(&options, &source, &output, evaluation)?;
    let text = card.markdown().map_err(CliError::Message)?;
    let written = write_whole(&at("README.md"), text.as_bytes());
    written.and_then(|()| part.publish(&options.folder)).map_err(|error| {
        CliError::message(format!("{} cannot be written: {error}.", options.folder.display()))
    })?;
    bar.finish_and_clear();
    println!("{}", options.folder.display());
    Ok(ExitCode::SUCCESS)
}

/// Finds the files of a model or adapter.
fn source(store: &Store, name: &str, base: Option<&Path>) -> Result<Source, CliError> {
    let Some(adapter) = store.adapter(name)? else {
        let base = fetch(store, name)?;
        let stored = match ModelRef::parse(name)? {
            ModelRef::File(_) => None,
            reference => store.model(&reference.model_name())?,
        };
        let parent = stored.as_ref().and_then(|stored| stored.parent());
        let made = stored.is_some_and(|stored| stored.source.starts_with("job:"));
        let job = job_of(&base).filter(|_| made);
        return Ok(Source { base, base_name: name.to_owned(), parent, adapter: None, job });
    };
    let StoredAdapter { base_model, file, scale, .. } = adapter;
    let made = file.starts_with("jobs");
    let file = store.folder().join(file);
    let job = job_of(&file).filter(|_| made);
    let stored = store.model(&base_model)?;
    let base = match (&stored, base) {
        (_, Some(base)) => base.to_owned(),
        (None, None) => match job.as_deref().and_then(trained_from) {
            Some(base) => base,
            None => fetch(store, &base_model)?,
        },
        (Some(_), None) => fetch(store, &base_model)?,
    };
    let parent = stored.and_then(|stored| stored.parent());
    Ok(Source { base, base_name: base_model, parent, adapter: Some((file, scale)), job })
}

/// The folder of the job that made a file, which is among its artifacts or checkpoints.
fn job_of(file: &Path) -> Option<PathBuf> {
    file.parent()?.parent().map(Path::to_owned)
}

/// The file of the model from which the job in this folder trained. The data folder does not list a
/// model that was served by its file.
fn trained_from(job: &Path) -> Option<PathBuf> {
    let order = Folder::new(job).order().ok()?;
    order.training()?.model.clone().filter(|model| model.is_file())
}

fn check(options: &ExportOptions, source: &Source) -> Result<(), CliError> {
    let name = &options.name;
    if options.format.is_adapter() && source.adapter.is_none() {
        return Err(CliError::message(format!(
            "`{name}` is a model, and `{}` is for adapters: use --format gguf or hugging-face.",
            options.format.name()
        )));
    }
    if options.base.is_some() && source.adapter.is_none() {
        return Err(CliError::message(format!(
            "`{name}` is a model, and --base is for adapters: leave it out."
        )));
    }
    if options.ty.is_some() && options.format != ExportFormat::Gguf {
        return Err(CliError::message("--type is for --format gguf.".to_owned()));
    }
    let used = std::fs::read_dir(&options.folder).is_ok_and(|mut files| files.next().is_some());
    match used || options.folder.is_file() {
        true => Err(CliError::message(format!(
            "{} exists and is not empty: name another folder.",
            options.folder.display()
        ))),
        false => Ok(()),
    }
}

/// A name without what file systems refuse, and the type.
fn file_name(options: &ExportOptions) -> String {
    let stem = Path::new(&options.name).file_stem().unwrap_or_default().to_string_lossy();
    let name = if Path::new(&options.name).is_file() { &*stem } else { &*options.name };
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = name.chars().map(plain).collect();
    options.ty.map_or_else(|| name.clone(), |ty| format!("{name}-{}", ty.name()))
}

fn evaluation(path: &Path) -> Result<EvaluationFacts, CliError> {
    let wrong = |why| CliError::message(format!("{}: {why}.", path.display()));
    EvaluationFacts::parse(&read_text(path)?).map_err(wrong)
}

fn card(
    options: &ExportOptions,
    source: &Source,
    output: &Path,
    evaluation: Option<EvaluationFacts>,
) -> Result<ModelCard, CliError> {
    let file = if options.format == ExportFormat::Gguf { output } else { &source.base };
    let wrong = |error: &dyn std::fmt::Display| {
        CliError::message(format!("{} cannot be read: {error}.", file.display()))
    };
    let gguf = Gguf::open_header(file).map_err(|error| wrong(&error))?;
    let facts = ModelFacts::read(&gguf).map_err(|error| wrong(&error))?;
    let license = gguf.get("general.license").and_then(|value| value.as_str());
    let quantization = match options.format {
        ExportFormat::HuggingFace => "F16".to_owned(),
        _ => facts.quantization.clone(),
    };
    Ok(ModelCard {
        name: options.name.clone(),
        format: options.format,
        quantization,
        architecture: facts.architecture.clone(),
        parameters: facts.parameters,
        license: license.map(str::to_owned),
        provenance: provenance(source),
        evaluation,
    })
}

/// The origin of a model or adapter: the file that its job wrote, or what the adapter's own metadata
/// say. A checkpoint of a job that runs, and one that was published, have only these.
fn provenance(source: &Source) -> Option<Value> {
    let file = source.job.as_ref().map(|job| Folder::new(job).artifacts().join("provenance.json"));
    let text = file.and_then(|path| std::fs::read(path).ok());
    let written: Option<Value> = text.and_then(|text| serde_json::from_slice(&text).ok());
    let adapter = source.adapter.as_ref().and_then(|(file, _)| Gguf::open_header(file).ok());
    let fact = |key: &str| Some(adapter.as_ref()?.get(key)?.as_str()?.to_owned());
    let mut found = match (written, fact("ingot.job")) {
        (Some(written), _) => written,
        (None, None) => return None,
        (None, Some(job)) => json!({
            "job": job,
            "name": fact("general.name"),
            "spec": serde_json::from_str::<Value>(&fact("ingot.spec")?).ok()?,
            "base": {"model": fact("ingot.base_model"), "sha256": fact("ingot.base_sha256")},
        }),
    };
    if let Some(step) = fact("ingot.step") {
        found["step"] = json!(step);
    }
    Some(found)
}

/// A folder beside the one to write, or in it if it exists already; deleted on drop.
struct Part(PathBuf);

impl Part {
    fn new(folder: &Path) -> Result<Self, CliError> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let part = format!(".{name}.part-{}", std::process::id());
        let part = match folder.is_dir() {
            true => folder.join(part),
            false => folder.with_file_name(part),
        };
        std::fs::create_dir_all(&part).map_err(|error| {
            CliError::message(format!("{} cannot be written: {error}.", part.display()))
        })?;
        Ok(Self(part))
    }

    fn publish(&self, folder: &Path) -> std::io::Result<()> {
        if self.0.parent() != Some(folder) {
            return std::fs::rename(&self.0, folder);
        }
        // An existing folder stays, because it may be a process's current one or a mount point.
        let mut moved = Vec::new();
        let outcome = std::fs::read_dir(&self.0)?.try_for_each(|entry| {
            let entry = entry?;
            let target = folder.join(entry.file_name());
            std::fs::rename(entry.path(), &target)?;
            moved.push(target);
            Ok(())
        });
        if outcome.is_err() {
            for path in moved {
                let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
            }
        }
        outcome
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_written_whole_whether_they_exist_or_not() {
        let root = tempfile::tempdir().unwrap();
        let (old, new) = (root.path().join("old"), root.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        for folder in [&old, &new] {
            let part = Part::new(folder).unwrap();
            std::fs::write(part.0.join("a"), "1").unwrap();
            std::fs::create_dir(part.0.join("b")).unwrap();
            part.publish(folder).unwrap();
            drop(part);
            let names = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
            let mut names: Vec<_> = names.collect();
            names.sort();
            assert_eq!(names, ["a", "b"], "{}", folder.display());
        }
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2);
        drop(Part::new(&old.join("c")).unwrap());
        assert!(!old.join("c").exists());
    }
}
