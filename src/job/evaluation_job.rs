//! Jobs that evaluate models: [`EvaluateSpec`] and [`EvaluateOrder`].

use super::spec::VERSION;
use super::{
    EVAL_CONTEXT, EvalModel, EvalPlan, EvalReference, EvalTask, Folder, Gate, GenerationSettings,
};
use crate::grade::Grader;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Most models, and most tasks, of an evaluation.
const MOST: usize = 16;

/// The specification of a job that evaluates models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateSpec {
    #[serde(default = "version")]
    pub version: u32,
    pub kind: EvaluateKind,
    /// Name of the job in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub evaluate: Evaluate,
}

/// The `kind` of an [`EvaluateSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvaluateKind {
    Evaluate,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {
    /// Models and adapters.
    pub models: Vec<String>,
    /// The id of an uploaded text, whose perplexity is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The model with which the others are compared on the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Tokens of a chunk of the text.
    #[serde(default = "context")]
    pub context: usize,
    /// Maximum number of chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<EvaluateTask>,
    /// Bounds that every model has to keep; the job fails if one does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_perplexity: Option<f64>,
    /// Lowest accuracy, or mean reward, by task.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub min_accuracy: BTreeMap<String, f64>,
}

/// A task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateTask {
    pub name: String,
    /// The id of an uploaded file of JSON lines.
    pub file: String,
    /// Lines at the beginning of the file that are shown as examples.
    #[serde(default)]
    pub shots: usize,
    /// The grader of a task whose answers the model writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grader: Option<Value>,
    /// Longest answer, in tokens.
    #[serde(default = "max_tokens")]
    pub max_tokens: usize,
    /// Texts before which an answer ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
}

fn version() -> u32 {
    VERSION
}
fn context() -> usize {
    EVAL_CONTEXT
}
fn max_tokens() -> usize {
    256
}

impl EvaluateSpec {
    /// Name of the job.
    pub fn new_name(&self) -> String {
        let usual = || format!("evaluation of {}", self.evaluate.models.join(", "));
        self.name.clone().unwrap_or_else(usual)
    }

    /// Checks everything that needs neither models nor files.
    ///
    /// # Errors
    /// The key that is wrong and the values it may have.
    pub fn check(&self) -> Result<(), String> {
        let Evaluate { models, text, reference, context, chunks, tasks, .. } = &self.evaluate;
        let wrong = |key: &str, why: &str| Err(format!("evaluate.{key}: {why}"));
        if !(1..=MOST).contains(&models.len()) {
            return wrong("models", &format!("it names 1 to {MOST} models"));
        }
        if tasks.len() > MOST {
            return wrong("tasks", &format!("there are at most {MOST}"));
        }
        if text.is_none() && tasks.is_empty() {
            return wrong("text", "there is nothing to measure: name a text, or tasks");
        }
        if reference.is_some() && text.is_none() {
            return wrong("reference", "models are compared on a text, and `text` names none");
        }
        if !(4..=1 << 20).contains(context) {
            return wrong("context", &format!("{context} is not between 4 and {}", 1 << 20));
        }
        if *chunks == Some(0) {
            return wrong("chunks", "0 is not above 0");
        }
        for (number, task) in tasks.iter().enumerate() {
            let key = |name: &str| format!("tasks[{number}].{name}");
            if task.name.is_empty() || tasks[..number].iter().any(|other| other.name == task.name) {
                return wrong(&key("name"), "it is a name of its own for each task");
            }
            if !(1..=1 << 16).contains(&task.max_tokens) {
                return wrong(&key("max_tokens"), &format!("it is not between 1 and {}", 1 << 16));
            }
            if task.stop.iter().any(String::is_empty) {
                return wrong(&key("stop"), "an empty text would end every answer");
            }
            if let Some(Err(why)) = task.grader() {
                return wrong(&key("grader"), &why);
            }
        }
        self.check_gates()
    }

    /// Whether there is a bound, without which an evaluation cannot fail.
    pub fn has_bounds(&self) -> bool {
        !self.gates().is_empty()
    }

    fn check_gates(&self) -> Result<(), String> {
        let Evaluate { text, reference, tasks, max_kl, max_perplexity, min_accuracy, .. } =
            &self.evaluate;
        if max_kl.is_some() && reference.is_none() {
            return Err(
                "evaluate.max_kl: it bounds the KL to a `reference`, which is missing".into()
            );
        }
        if max_perplexity.is_some() && text.is_none() {
            return Err(
                "evaluate.max_perplexity: it bounds the perplexity of a `text`, which is missing"
                    .into(),
            );
        }
        for (key, bound) in [("max_kl", max_kl), ("max_perplexity", max_perplexity)] {
            if bound.is_some_and(|bound| !(bound.is_finite() && bound >= 0.0)) {
                return Err(format!("evaluate.{key}: it is not 0 or above"));
            }
        }
        for (task, least) in min_accuracy {
            if tasks.iter().all(|known| known.name != *task) {
                return Err(format!("evaluate.min_accuracy: no task is called `{task}`"));
            }
            if !(0.0..=1.0).contains(least) {
                return Err(format!("evaluate.min_accuracy: {least} is not between 0 and 1"));
            }
        }
        Ok(())
    }

    fn gates(&self) -> Vec<Gate> {
        let Evaluate { max_kl, max_perplexity, min_accuracy, .. } = &self.evaluate;
        let bounds = [max_kl.map(Gate::MaxKl), max_perplexity.map(Gate::MaxPerplexity)];
        let tasks = min_accuracy
            .iter()
            .map(|(task, &least)| Gate::MinAccuracy { task: task.clone(), least });
        bounds.into_iter().flatten().chain(tasks).collect()
    }
}

impl EvaluateTask {
    fn grader(&self) -> Option<Result<Grader, String>> {
        let grader = self.grader.clone()?;
        Some(Grader::parse(grader).map_err(|error| error.message))
    }
}

/// The order of a job that evaluates models: every name is replaced by a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluateOrder {
    pub version: u32,
    pub id: String,
    pub spec: EvaluateSpec,
    pub name: String,
    /// In the order of the specification.
    pub models: Vec<EvalModel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<EvalModel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// The files of the tasks, in the order of the specification.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<PathBuf>,
}

/// Why an order cannot be carried out: the key of the specification, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderFault {
    pub param: String,
    pub message: String,
}

impl EvaluateOrder {
    /// The report among the artifacts.
    pub const JSON: &str = "report.json";
    pub const HTML: &str = "report.html";

    /// Reads the files and makes the plan, whose temporary files stand in the job's folder.
    ///
    /// # Errors
    /// A file that cannot be read, or a line that is wrong.
    pub fn plan(&self, folder: &Folder) -> Result<EvalPlan, OrderFault> {
        let spec = &self.spec.evaluate;
        let text = self.text.as_deref().map(|path| read(path, "evaluate.text")).transpose()?;
        let tasks = spec.tasks.iter().zip(&self.tasks).enumerate().map(|(number, (task, path))| {
            let param = format!("evaluate.tasks[{number}]");
            let text = read(path, &param)?;
            let fault = |message| OrderFault { param: param.clone(), message };
            let settings = GenerationSettings {
                grader: task.grader().transpose().map_err(fault)?,
                max_tokens: task.max_tokens,
                stop: task.stop.clone(),
            };
            EvalTask::parse(&task.name, &text, task.shots, settings).map_err(fault)
        });
        Ok(EvalPlan {
            models: self.models.clone(),
            text,
            context: spec.context,
            chunks: spec.chunks,
            reference: self.reference.clone().map(EvalReference::Model),
            save_logits: None,
            tasks: tasks.collect::<Result<_, _>>()?,
            gates: self.spec.gates(),
            llama_cpp: false,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            folder: folder.cache(),
        })
    }
}

fn read(path: &Path, param: &str) -> Result<String, OrderFault> {
    let fault = |message: String| OrderFault { param: param.to_owned(), message };
    let bytes =
        std::fs::read(path).map_err(|error| fault(format!("it cannot be read: {error}")))?;
    String::from_utf8(bytes).map_err(|error| {
        fault(format!("it is not UTF-8 at byte {}", error.utf8_error().valid_up_to()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(block: &str) -> Result<(), String> {
        let text = format!(r#"{{"kind": "evaluate", "evaluate": {block}}}"#);
        let spec: EvaluateSpec = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        assert_eq!(
            serde_json::from_str::<EvaluateSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(),
            spec
        );
        spec.check()
    }

    #[test]
    fn specifications_name_what_is_wrong() {
        for good in [
            r#"{"models": ["a"], "text": "file-1"}"#,
            r#"{"models": ["a", "b"], "text": "f", "reference": "c", "max_kl": 0.02, "max_perplexity": 30}"#,
            r#"{"models": ["a"], "tasks": [{"name": "t", "file": "f"}], "min_accuracy": {"t": 0.3}}"#,
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for (bad, key) in [
            (r#"{"models": [], "text": "f"}"#, "evaluate.models"),
            (r#"{"models": ["a"]}"#, "evaluate.text"),
            (
                r#"{"models": ["a"], "reference": "b", "tasks": [{"name": "t", "file": "f"}]}"#,
                "evaluate.reference",
            ),
            (r#"{"models": ["a"], "text": "f", "context": 3}"#, "evaluate.context"),
            (r#"{"models": ["a"], "text": "f", "chunks": 0}"#, "evaluate.chunks"),
            (r#"{"models": ["a"], "text": "f", "max_kl": 0.1}"#, "evaluate.max_kl"),
            (r#"{"models": ["a"], "text": "f", "max_perplexity": -1}"#, "evaluate.max_perplexity"),
            (
                r#"{"models": ["a"], "text": "f", "min_accuracy": {"t": 0.3}}"#,
                "evaluate.min_accuracy",
            ),
            (
                r#"{"models": ["a"], "tasks": [{"name": "t", "file": "f"}, {"name": "t", "file": "g"}]}"#,
                "evaluate.tasks[1].name",
            ),
            (
                r#"{"models": ["a"], "tasks": [{"name": "t", "file": "f", "max_tokens": 0}]}"#,
                "evaluate.tasks[0].max_tokens",
            ),
            (
                r#"{"models": ["a"], "tasks": [{"name": "t", "file": "f", "stop": [""]}]}"#,
                "evaluate.tasks[0].stop",
            ),
            (
                r#"{"models": ["a"], "tasks": [{"name": "t", "file": "f", "grader": {"type": "x"}}]}"#,
                "evaluate.tasks[0].grader",
            ),
            (
                r#"{"models": ["a"], "tasks": [{"name": "t", "file": "f"}], "min_accuracy": {"t": 1.1}}"#,
                "evaluate.min_accuracy",
            ),
            (r#"{"models": ["a"], "text": "f", "texts": "g"}"#, "unknown field"),
        ] {
            let why = check(bad).unwrap_err();
            assert!(why.starts_with(key), "{bad}: {why}");
        }
    }
}
