//! What an evaluation is: [`EvalPlan`], and [`EvalReport`], what it found.

use super::Rate;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

/// Tokens of a chunk by default, as in llama-perplexity.
pub const EVAL_CONTEXT: usize = 512;

/// A model to evaluate.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalModel {
    /// Its name in the report.
    pub name: String,
    /// A GGUF file.
    pub file: PathBuf,
    /// A LoRA adapter, as GGUF or PEFT folder.
    pub adapter: Option<PathBuf>,
}

/// Examples of a task with given answers.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalTask {
    pub name: String,
    pub questions: Vec<MultipleChoice>,
    /// Examples before each question, taken from the beginning of the file; these are not
    /// evaluated.
    pub shots: usize,
}

/// A question and possible continuations, of which one is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MultipleChoice {
    /// The text before the answer. It is continued by a space and the answer.
    pub prompt: String,
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// A line of a task's file.
#[derive(Deserialize)]
struct Line {
    #[serde(alias = "question")]
    prompt: String,
    choices: Vec<String>,
    answer: Value,
}

impl EvalTask {
    /// Reads JSON lines with the keys `prompt` (or `question`), `choices` and `answer`: the index of
    /// the right choice, its letter, or its text. Other keys are not read.
    ///
    /// # Errors
    /// The line that is wrong, and why.
    pub fn parse(name: &str, text: &str, shots: usize) -> Result<Self, String> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let each = lines.map(|(number, line)| {
            MultipleChoice::parse(line).map_err(|why| format!("{name}: line {}: {why}", number + 1))
        });
        let questions: Vec<_> = each.collect::<Result<_, _>>()?;
        match questions.len() {
            0 => Err(format!("{name}: there is no question")),
            count if count <= shots => Err(format!(
                "{name}: {count} questions, of which {shots} are shown as examples: none is left"
            )),
            _ => Ok(Self { name: name.to_owned(), questions, shots }),
        }
    }
}

impl MultipleChoice {
    fn parse(line: &str) -> Result<Self, String> {
        let Line { prompt, choices, answer } =
            serde_json::from_str(line).map_err(|error| error.to_string())?;
        if choices.len() < 2 || choices.iter().any(|choice| choice.trim().is_empty()) {
            return Err("`choices` has two or more texts, none of them empty".into());
        }
        let index = match &answer {
            Value::Number(number) => number.as_u64().map(|index| index as usize),
            Value::String(text) => {
                let letter = text.len() == 1 && text.as_bytes()[0].is_ascii_uppercase();
                let by_text = choices.iter().position(|choice| choice == text);
                by_text.or(letter.then(|| usize::from(text.as_bytes()[0] - b'A')))
            }
            _ => None,
        };
        match index.filter(|index| *index < choices.len()) {
            Some(answer) => Ok(Self { prompt, choices, answer }),
            None => Err(format!(
                "`answer` is {answer}; it is the index of a choice (from 0), its letter (from A) or its \
                 text"
            )),
        }
    }
}

/// What the predictions are compared with.
#[derive(Debug, Clone, PartialEq)]
pub enum EvalReference {
    /// Another model.
    Model(EvalModel),
    /// A file of log-probabilities, in the format of llama-perplexity. It holds the text, too.
    BaseLogits(PathBuf),
}

/// An evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalPlan {
    pub models: Vec<EvalModel>,
    /// The text whose perplexity is measured; not needed with [`EvalReference::BaseLogits`].
    pub text: Option<String>,
    /// Tokens of a chunk of the text. Those of its second half count.
    pub context: usize,
    /// Maximum number of chunks.
    pub chunks: Option<usize>,
    pub reference: Option<EvalReference>,
    /// Where to write the reference's log-probabilities, for later evaluations and for
    /// llama-perplexity.
    pub save_logits: Option<PathBuf>,
    pub tasks: Vec<EvalTask>,
    pub gates: Vec<Gate>,
    /// Runs models by llama.cpp instead of the native runner.
    pub llama_cpp: bool,
    pub threads: u32,
    /// Folder for temporary files.
    pub folder: PathBuf,
}

/// The progress of an evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EvalProgress {
    Loading(String),
    /// What is done with a model: steps of `total` that are done.
    Working {
        what: String,
        done: usize,
        total: usize,
    },
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The message names the file, and what to change.
    #[error("{0}")]
    Refused(String),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

/// A mean with its 95% interval, by resampling the chunks of the text (bootstrap; Efron 1979).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct EvalReport {
    /// The name of the model, or of the file, that the others are compared with.
    pub reference: Option<String>,
    pub text: Option<TextFacts>,
    pub models: Vec<ModelReport>,
    pub gates: Vec<GateReport>,
}

/// How the text was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TextFacts {
    /// Tokens of a chunk.
    pub context: usize,
    pub chunks: usize,
    /// Predictions that count, over all chunks.
    pub counted: usize,
}

/// One model.
#[derive(Debug, Clone, Serialize)]
pub struct ModelReport {
    pub name: String,
    pub architecture: String,
    pub quantization: String,
    pub parameters: u64,
    /// Bytes of the model's file.
    pub bytes: u64,
    pub perplexity: Option<Interval>,
    pub bits_per_byte: Option<Interval>,
    /// Of the text, with the logits of half of the tokens.
    pub tokens_per_second: Option<f64>,
    /// Largest resident memory of this process while the model was loaded, in bytes.
    pub memory_bytes: u64,
    /// Compared with the reference.
    pub divergence: Option<DivergenceReport>,
    pub tasks: BTreeMap<String, TaskReport>,
}

/// The distance of a model's predictions from the reference's.
#[derive(Debug, Clone, Serialize)]
pub struct DivergenceReport {
    /// KL(reference || model) in nats per token.
    pub mean_kl: Interval,
    pub median_kl: f64,
    pub p99_kl: f64,
    pub p999_kl: f64,
    pub max_kl: f64,
    /// Share of predictions whose most probable token is the reference's.
    pub top1_agreement: Rate,
    /// Root mean square of the difference of the right token's probability.
    pub rms_delta_p: f64,
    /// ln(perplexity / the reference's perplexity).
    pub log_perplexity_ratio: Interval,
    pub reference_perplexity: f64,
    /// (share, KL): this share of the predictions has at most this KL.
    pub kl_quantiles: Vec<(f64, f64)>,
}

/// A task with given answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TaskReport {
    /// Share of questions whose right answer has the highest probability.
    pub accuracy: Rate,
    /// The same with log-probabilities divided by the bytes of the answer (`acc_norm` of
    /// lm-evaluation-harness).
    pub normalized_accuracy: Rate,
}

/// A bound that an evaluation has to keep.
#[derive(Debug, Clone, PartialEq)]
pub enum Gate {
    /// Highest mean KL.
    MaxKl(f64),
    MaxPerplexity(f64),
    /// Lowest accuracy of a task.
    MinAccuracy {
        task: String,
        least: f64,
    },
}

impl FromStr for Gate {
    type Err = String;

    /// Of the form `TASK=NUMBER`: a lowest accuracy.
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.rsplit_once('=').and_then(|(task, least)| {
            let least: f64 = least.parse().ok()?;
            let fits = !task.is_empty() && (0.0..=1.0).contains(&least);
            fits.then(|| Self::MinAccuracy { task: task.to_owned(), least })
        });
        parsed.ok_or_else(|| "it has the form TASK=SHARE, such as arc=0.3".to_owned())
    }
}

/// A gate, and the value of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GateReport {
    pub model: String,
    pub what: String,
    pub value: f64,
    pub bound: f64,
    pub passed: bool,
}

impl EvalReport {
    /// Whether every model keeps every bound.
    pub fn passed(&self) -> bool {
        self.gates.iter().all(|gate| gate.passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_indices_letters_or_texts() {
        let line = |answer: &str| {
            format!(r#"{{"question": "q", "choices": ["x", "B"], "answer": {answer}}}"#)
        };
        let task = |text: &str, shots| EvalTask::parse("t", text, shots);
        for (answer, right) in [("0", 0), ("1", 1), (r#""A""#, 0), (r#""B""#, 1), (r#""x""#, 0)] {
            assert_eq!(task(&line(answer), 0).unwrap().questions[0].answer, right, "{answer}");
        }
        for answer in ["2", "-1", r#""C""#, r#""y""#, "null", "0.5", r#""""#] {
            let error = task(&format!("\n{}", line(answer)), 0).unwrap_err();
            assert!(error.contains("line 2") && error.contains("`answer`"), "{answer}: {error}");
        }
        for (text, shots, why) in [
            (String::new(), 0, "no question"),
            (line("0"), 1, "none is left"),
            ("{}".into(), 0, "prompt"),
            (r#"{"prompt": "q", "choices": ["x"], "answer": 0}"#.into(), 0, "choices"),
            (r#"{"prompt": "q", "choices": ["x", " "], "answer": 0}"#.into(), 0, "choices"),
        ] {
            assert!(task(&text, shots).unwrap_err().contains(why), "{text}");
        }
    }

    #[test]
    fn a_gate_names_a_task_and_a_share() {
        let gate = |text: &str| text.parse::<Gate>();
        let right = Gate::MinAccuracy { task: "a=b".into(), least: 0.3 };
        assert_eq!(gate("a=b=0.3").unwrap(), right);
        for bad in ["", "a", "a=", "=0.3", "a=2", "a=-0.1", "a=NaN", "a=x"] {
            assert!(gate(bad).unwrap_err().contains("TASK=SHARE"), "{bad}");
        }
    }
}
