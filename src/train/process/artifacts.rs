//! Writes the artifacts of a job.

use crate::gguf::{Gguf, TensorType, is_hugging_face};
use crate::job::spec::WeightType;
use crate::job::{
    Artifact, ArtifactKind, Entry, Follower, JobEvent, JobFailure, JobWork, Level, Order,
};
use crate::train::export::{self, ExportError};
use crate::train::model::{Model, Training};
use std::fs;
use std::io;
use std::path::Path;

/// Metadata about the origin of an artifact.
pub(super) fn facts(order: &Order, step: Option<u64>) -> Vec<(&'static str, String)> {
    let spec = &order.spec;
    let mut facts = vec![
        ("general.name", order.name.clone()),
        ("ingot.job", order.id.clone()),
        ("ingot.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("ingot.spec", serde_json::to_string(spec).unwrap_or_default()),
    ];
    let named = [("ingot.base_model", &spec.model), ("ingot.base_sha256", &order.model_sha256)];
    facts.extend(named.into_iter().filter_map(|(key, value)| Some((key, value.clone()?))));
    facts.extend(step.map(|step| ("ingot.step", step.to_string())));
    facts
}

/// Writes all artifacts of the job.
pub(super) fn artifacts(
    work: &mut JobWork<'_>,
    order: &Order,
    model: &Model,
    training: &Training,
    base: &Gguf,
) -> Result<Vec<Artifact>, JobFailure> {
    work.clear_artifacts()?;
    let folder = work.folder;
    let to = folder.artifacts();
    let facts = facts(order, None);
    let export = &order.spec.export;
    // Storage types of the GGUF and of the Hugging Face folder.
    let (ty, float) = match export.ty.unwrap_or(WeightType::F16) {
        WeightType::F32 => (TensorType::F32, TensorType::F32),
        WeightType::F16 => (TensorType::F16, TensorType::F16),
        WeightType::BF16 => (TensorType::BF16, TensorType::BF16),
        WeightType::Q8 => (TensorType::Q8_0, TensorType::F16),
    };
    let mut made: Vec<(ArtifactKind, String)> = Vec::new();
    let lora = match training {
        Training::Lora(lora) => {
            export::lora_gguf(model, lora, &facts, &to.join("adapter.gguf"))?;
            made.push((ArtifactKind::Adapter, "adapter.gguf".into()));
            // PEFT loads the base model by this name.
            let name = match &order.parent {
                Some(parent) => parent.display().to_string(),
                None => order.spec.model.clone().unwrap_or_default(),
            };
            export::peft_folder(model, lora, &name, &to.join("peft"))?;
            made.extend(files(&to, "peft", ArtifactKind::Peft)?);
            Some(lora)
        }
        Training::Full => None,
    };
    if lora.is_none() || export.merged {
        export::model_gguf(model, lora, base, ty, &facts, &to.join("model.gguf"))?;
        made.push((ArtifactKind::Model, "model.gguf".into()));
    }
    if order.spec.writes_hugging_face() {
        // The parent is ignored if the folder is gone or is not a Hugging Face folder.
        let parent = order.parent.as_deref().filter(|parent| is_hugging_face(parent));
        let made_folder = to.join("hugging_face");
        match export::hf_folder(model, lora, base, float, parent, &made_folder) {
            Ok(lacking) => {
                for what in lacking {
                    work.log.say(Level::Warn, format!("The folder for transformers: {what}."))?;
                }
                made.extend(files(&to, "hugging_face", ArtifactKind::HuggingFace)?);
            }
            // The other artifacts are useful without this folder.
            Err(ExportError::Other(why)) => {
                work.log
                    .say(Level::Warn, format!("There is no folder for transformers: {why}."))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let entries = Follower::new(folder.events(), 0).read()?;
    fs::write(to.join("results.csv"), results(&entries))?;
    made.push((ArtifactKind::Results, "results.csv".into()));
    if folder.rollouts().exists() {
        let (from, to) = (folder.rollouts(), to.join("rollouts.jsonl"));
        fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop))?;
        made.push((ArtifactKind::Rollouts, "rollouts.jsonl".into()));
    }
    if folder.made().is_dir() {
        for (_, name) in files(folder.path(), "made", ArtifactKind::Examples)? {
            let file = Path::new(&name).file_name().unwrap_or_default();
            let (from, to) = (folder.path().join(&name), to.join(file));
            fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop))?;
            let examples = to.extension().is_some_and(|extension| extension == "jsonl");
            let kind = if examples { ArtifactKind::Examples } else { ArtifactKind::Report };
            made.push((kind, file.to_string_lossy().into_owned()));
        }
    }
    fs::write(to.join("provenance.json"), provenance(order, &entries)?)?;
    made.push((ArtifactKind::Provenance, "provenance.json".into()));
    let each = made.into_iter().map(|(kind, name)| work.artifact(kind, name));
    Ok(each.collect::<io::Result<_>>()?)
}

/// The files of a folder, sorted by name.
fn files(to: &Path, folder: &str, kind: ArtifactKind) -> io::Result<Vec<(ArtifactKind, String)>> {
    let mut names = Vec::new();
    for file in fs::read_dir(to.join(folder))? {
        names.push(format!("{folder}/{}", file?.file_name().to_string_lossy()));
    }
    names.sort();
    Ok(names.into_iter().map(|name| (kind, name)).collect())
}

/// OpenAI's result file as CSV, with further metrics: of each step, and, for policies, of the
/// validation prompts (`valid_…`).
fn results(entries: &[Entry]) -> String {
    let mut text =
        String::from("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy");
    let first = entries.iter().find_map(|entry| match &entry.event {
        JobEvent::Step(step) => Some(&step.metrics),
        _ => None,
    });
    let names: Vec<&String> = first.into_iter().flat_map(|metrics| metrics.keys()).collect();
    let first = entries.iter().find_map(|entry| match &entry.event {
        JobEvent::Validation(found) if found.loss.is_none() => Some(&found.metrics),
        _ => None,
    });
    let held_out: Vec<&String> = first.into_iter().flat_map(|metrics| metrics.keys()).collect();
    names.iter().for_each(|name| text += &format!(",{name}"));
    held_out.iter().for_each(|name| text += &format!(",valid_{name}"));
    text.push('\n');
    let cell = |value: Option<f64>| value.map_or(",".into(), |value| format!(",{value:.6}"));
    let mut steps = entries.iter().peekable();
    while let Some(entry) = steps.next() {
        let JobEvent::Step(step) = &entry.event else { continue };
        text += &format!("{}{}{}", step.step, cell(Some(step.loss)), cell(step.accuracy));
        let found = steps.peek().and_then(|next| match &next.event {
            JobEvent::Validation(found) if found.step == step.step => Some(found),
            _ => None,
        });
        text += &cell(found.and_then(|found| found.loss));
        text += &cell(found.and_then(|found| found.accuracy));
        names.iter().for_each(|&name| text += &cell(step.metrics.get(name).copied()));
        for &name in &held_out {
            text += &cell(found.and_then(|found| found.metrics.get(name).copied()));
        }
        text.push('\n');
    }
    text
}

fn provenance(order: &Order, entries: &[Entry]) -> Result<Vec<u8>, JobFailure> {
    let data = entries.iter().rev().find_map(|entry| match &entry.event {
        JobEvent::Data { train, validation } => Some((train, validation)),
        _ => None,
    });
    let value = serde_json::json!({
        "job": order.id,
        "name": order.name,
        "ingot": env!("CARGO_PKG_VERSION"),
        "spec": order.spec,
        "base": {"model": order.spec.model, "sha256": order.model_sha256},
        "data": data.map(|(train, validation)| serde_json::json!({
            "train": train, "validation": validation,
        })),
    });
    serde_json::to_vec_pretty(&value).map_err(|error| JobFailure::from(io::Error::from(error)))
}
