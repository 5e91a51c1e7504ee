//! What an export is: [`ExportPlan`], and the model card that goes with it.

use super::EvalReport;
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use serde_json::Value;
use std::path::PathBuf;
use std::str::FromStr;

const CARD: &str = include_str!("card.md");

/// The form in which a model or adapter is written for other programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// A model as one file for llama.cpp; an adapter is merged into its base.
    Gguf,
    /// An adapter as one file for llama.cpp.
    LoraGguf,
    /// An adapter as a folder for PEFT.
    Peft,
    /// A model as a folder for transformers; an adapter is merged into its base.
    HuggingFace,
}

impl ExportFormat {
    const NAMES: [(&str, Self); 4] = [
        ("gguf", Self::Gguf),
        ("lora-gguf", Self::LoraGguf),
        ("peft", Self::Peft),
        ("hugging-face", Self::HuggingFace),
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, format)| *format == self).map_or("", |(name, _)| name)
    }

    /// Whether the result is an adapter.
    pub fn is_adapter(self) -> bool {
        matches!(self, Self::LoraGguf | Self::Peft)
    }
}

impl FromStr for ExportFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, format)| *format).ok_or_else(|| {
            let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            format!("there is no format `{name}`; there are {}", names.join(", "))
        })
    }
}

/// An export.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportPlan {
    /// A GGUF file.
    pub base: PathBuf,
    /// The name of the base model, which PEFT loads.
    pub base_name: String,
    pub adapter: Option<ExportAdapter>,
    /// The Hugging Face folder from which the base was converted, whose tokenizer is copied.
    pub parent: Option<PathBuf>,
    pub format: ExportFormat,
    /// The file of [`ExportFormat::Gguf`] and [`ExportFormat::LoraGguf`], else the folder.
    pub output: PathBuf,
}

/// The adapter of an export.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportAdapter {
    /// A LoRA GGUF, a folder that holds one, or a PEFT folder.
    pub path: PathBuf,
    /// Factor on the adapter's own scale, with which it is exported.
    pub scale: f32,
    /// File for the adapter as LoRA GGUF while the export runs.
    pub work_file: PathBuf,
}

/// Why nothing was exported. The message names what to change.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ExportRefused(pub String);

/// What a model card says.
#[derive(Debug, Clone)]
pub struct ModelCard {
    pub name: String,
    pub format: ExportFormat,
    /// The type of the weights, such as `Q4_K_M`.
    pub quantization: String,
    pub architecture: String,
    pub parameters: u64,
    /// The licence of the base model, if its file names one.
    pub license: Option<String>,
    /// The file of the job that made it: `provenance.json`.
    pub provenance: Option<Value>,
    pub evaluation: Option<EvaluationFacts>,
}

/// The part of an evaluation that a card shows: JSON of [`EvalReport`].
#[derive(Debug, Clone)]
pub struct EvaluationFacts(Value);

impl EvaluationFacts {
    /// Reads the JSON that `ingot eval --json` or an evaluation job has written.
    ///
    /// # Errors
    /// If it is no report.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if let Some(report) = value.get_mut("report") {
            value = report.take();
        }
        match value["models"].is_array() {
            true => Ok(Self(value)),
            false => Err("it is no report of `ingot eval --json` or of an evaluation job".into()),
        }
    }

    /// The facts of a report.
    ///
    /// # Errors
    /// Numbers that JSON cannot hold.
    pub fn of(report: &EvalReport) -> serde_json::Result<Self> {
        serde_json::to_value(report).map(Self)
    }
}

impl ModelCard {
    /// The card as Markdown, with the metadata that Hugging Face's hub reads (YAML front matter).
    ///
    /// # Errors
    /// If the template fails.
    pub fn markdown(&self) -> Result<String, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        let base = self.provenance.as_ref().and_then(|facts| facts["base"]["model"].as_str());
        // A JSON string is a YAML one.
        let quoted = |text: &str| Value::from(text).to_string();
        let values = serde_json::json!({
            "yaml": {
                "license": self.license.as_deref().map(quoted),
                "base_model": base.and_then(public_name).map(|name| quoted(&name)),
            },
            "base_name": base.map(without_folders),
            "name": self.name,
            "format": self.format.name(),
            "is_adapter": self.format.is_adapter(),
            "quantization": self.quantization,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "license": self.license,
            "provenance": self.provenance,
            "spec": self.provenance.as_ref().map(|facts| pretty(&facts["spec"])),
            "evaluation": self.evaluation.as_ref().map(|facts| &facts.0),
            "version": env!("CARGO_PKG_VERSION"),
        });
        let rendered = environment.render_str(CARD, Serde(&values));
        rendered.map(|text| text + "\n").map_err(|error| error.to_string())
    }
}

/// The name of a base model for others: the repository of a reference to the hub, or a name. `None` for
/// a path of this machine.
fn public_name(model: &str) -> Option<String> {
    if let Some(address) = model.strip_prefix("hf:") {
        let mut parts = address.split('/');
        return Some(format!("{}/{}", parts.next()?, parts.next()?));
    }
    let is_path = model.contains('/') || model.contains('\\') || model.ends_with(".gguf");
    (!is_path && !model.starts_with('.')).then(|| model.to_owned())
}

/// The last part of a path of this machine; any other name as it is.
fn without_folders(model: &str) -> &str {
    match public_name(model) {
        Some(_) => model,
        None => model.rsplit(['/', '\\']).find(|part| !part.is_empty()).unwrap_or(model),
    }
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn formats_have_names() {
        for (name, format) in ExportFormat::NAMES {
            assert_eq!(name.parse(), Ok(format));
            assert_eq!(format.name(), name);
        }
        assert!("onnx".parse::<ExportFormat>().unwrap_err().contains("hugging-face"));
    }

    #[test]
    fn a_card_says_what_is_known() {
        let mut card = ModelCard {
            name: "ft:m:ingot:x:1".into(),
            format: ExportFormat::Peft,
            quantization: "F16".into(),
            architecture: "llama".into(),
            parameters: 134_515_008,
            license: Some("apache-2.0".into()),
            provenance: Some(json!({
                "job": "ftjob-1",
                "name": "ft:m:ingot:x:1",
                "spec": {"kind": "sft", "model": "m", "seed": 3},
                "base": {"model": "m", "sha256": "ab12"},
                "data": {"train": {"examples": 12, "tokens": 345, "digest": "cd34"}, "validation": null},
            })),
            evaluation: None,
        };
        let text = card.markdown().unwrap();
        assert!(
            text.starts_with(
                "---\nlicense: \"apache-2.0\"\nbase_model: \"m\"\nlibrary_name: peft\n"
            ),
            "{text}"
        );
        for part in ["ftjob-1", "`ab12`", "cd34", "\"seed\": 3", "134.5 million", "12 examples"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("## Evaluation"), "{text}");
        let report = r#"{"report": {"reference": "big", "models": [{"name": "small", "perplexity":
            {"value": 12.345, "low": 12.0, "high": 13.0}, "bits_per_byte": null, "divergence":
            {"mean_kl": {"value": 0.0123, "low": 0.01, "high": 0.02}, "top1_agreement": {"value": 0.9}},
            "tasks": {}}]}}"#;
        card.evaluation = Some(EvaluationFacts::parse(report).unwrap());
        card.provenance = None;
        card.format = ExportFormat::Gguf;
        let text = card.markdown().unwrap();
        for part in
            ["library_name: gguf", "| small | 12.3450 | 0.01230 | 90.0% |", "compared with big"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("base_model"), "{text}");
        assert!(EvaluationFacts::parse("{}").is_err());
    }

    #[test]
    fn a_card_names_no_path_and_quotes_what_yaml_would_read() {
        let mut card = ModelCard {
            name: "m-Q8_0".into(),
            format: ExportFormat::Gguf,
            quantization: "Q8_0".into(),
            architecture: "llama".into(),
            parameters: 1,
            license: Some("a: \"b\"\nc: d".into()),
            provenance: Some(json!({
                "job": "ftjob-1",
                "step": "7",
                "spec": {"kind": "quantize"},
                "base": {"model": "/home/someone/base.gguf"},
            })),
            evaluation: None,
        };
        let text = card.markdown().unwrap();
        assert!(text.starts_with("---\nlicense: \"a: \\\"b\\\"\\nc: d\"\nlibrary_name"), "{text}");
        for part in ["| base model | base.gguf |", "`ingot quantize`", "after step 7"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("/home") && !text.contains("ingot train"), "{text}");
        card.provenance = Some(json!({"job": "j", "spec": {"kind": "sft"},
            "base": {"model": "hf:org/repo/base.gguf@main"}}));
        let text = card.markdown().unwrap();
        assert!(text.contains("\nbase_model: \"org/repo\"\n"), "{text}");
        assert!(!text.contains("checkpoint"), "{text}");
    }
}
