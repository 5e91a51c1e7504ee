//! What an evaluation is: [`EvalPlan`], and [`EvalReport`], what it found.

use super::Rate;
use crate::grade::Grader;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

/// Tokens of a chunk by default, as in llama-perplexity.
pub const EVAL_CONTEXT: usize = 512;

/// A model to evaluate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvalModel {
    /// Its name in the report.
    pub name: String,
    /// A GGUF file.
    pub file: PathBuf,
    /// A LoRA adapter, as GGUF or PEFT folder.
    pub adapter: Option<PathBuf>,
    /// SHA-256 of `file` and of the adapter, if the data folder knows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_sha256: Option<String>,
}

impl EvalModel {
    /// Whether both are the same weights, as far as the digests tell; a model without a digest is
    /// compared by its path.
    pub fn is_same_file(&self, other: &Self) -> bool {
        let path = |file: &PathBuf| file.canonicalize().unwrap_or_else(|_| file.clone());
        let same_base = match (&self.sha256, &other.sha256) {
            (Some(one), Some(two)) => one == two,
            _ => path(&self.file) == path(&other.file),
        };
        // A loaded adapter is a copy, whose path says nothing.
        let same_adapter = match (&self.adapter_sha256, &other.adapter_sha256) {
            (Some(one), Some(two)) => one == two,
            _ => self.adapter.is_some() == other.adapter.is_some(),
        };
        same_base && same_adapter
    }
}

/// A task.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalTask {
    pub name: String,
    pub questions: Questions,
    /// Examples before each question, taken from the beginning of the file; these are not
    /// evaluated.
    pub shots: usize,
}

/// The questions of a task, all of one form.
#[derive(Debug, Clone, PartialEq)]
pub enum Questions {
    /// With given answers.
    MultipleChoice(Vec<MultipleChoice>),
    /// With answers that the model writes, and a grader rewards.
    Generation(Generation),
}

impl Questions {
    pub fn len(&self) -> usize {
        match self {
            Self::MultipleChoice(questions) => questions.len(),
            Self::Generation(generation) => generation.items.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Questions that the model answers with the most probable token each time.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Objects with `messages`, which the chat template renders, or `prompt` (or `question`), which
    /// is continued as it is; and further keys for the grader.
    pub items: Vec<Value>,
    pub grader: Grader,
    /// Maximum number of tokens of an answer.
    pub max_tokens: usize,
    /// Texts before which an answer ends.
    pub stop: Vec<String>,
}

/// How answers of generation tasks are made and graded.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationSettings {
    /// The grader of the task, if one is named.
    pub grader: Option<Grader>,
    pub max_tokens: usize,
    pub stop: Vec<String>,
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
    /// Reads JSON lines. With the keys `prompt` (or `question`), `choices` and `answer` (the index of
    /// the right choice, its letter, or its text) the task has given answers; without `choices` the
    /// model writes them, and a grader is needed.
    ///
    /// # Errors
    /// The line that is wrong, and why.
    pub fn parse(
        name: &str,
        text: &str,
        shots: usize,
        settings: GenerationSettings,
    ) -> Result<Self, String> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let each = lines.map(|(number, line)| {
            let parsed = serde_json::from_str::<Value>(line).map_err(|error| error.to_string());
            let item = parsed.and_then(|item| match item.is_object() {
                true => Ok(item),
                false => Err("it is no object".to_owned()),
            });
            Ok((number + 1, item.map_err(|why| format!("{name}: line {}: {why}", number + 1))?))
        });
        let items: Vec<(usize, Value)> = each.collect::<Result<_, String>>()?;
        if items.is_empty() {
            return Err(format!("{name}: there is no question"));
        }
        let at = |number: usize, why: String| format!("{name}: line {number}: {why}");
        let questions = if items.iter().any(|(_, item)| item.get("choices").is_some()) {
            if settings.grader.is_some() {
                return Err(format!("{name}: its answers are given, so it needs no grader"));
            }
            let each = items
                .into_iter()
                .map(|(number, item)| MultipleChoice::parse(item).map_err(|why| at(number, why)));
            Questions::MultipleChoice(each.collect::<Result<_, _>>()?)
        } else {
            let GenerationSettings { grader, max_tokens, stop } = settings;
            let grader = grader.ok_or_else(|| {
                format!(
                    "{name}: its lines have no `choices`: name a grader (`grader` of the task, or \
                     --grader {name}=FILE)"
                )
            })?;
            if let Some((model, _)) = grader.models().first_key_value() {
                return Err(format!(
                    "{name}: its grader asks the model `{model}`, and no server runs here; use a \
                     grader that needs no model"
                ));
            }
            for (number, item) in &items {
                let why = generation_fault(item, shots).or_else(|| grader.missing_key(item));
                if let Some(why) = why {
                    return Err(at(*number, why));
                }
            }
            let items = items.into_iter().map(|(_, item)| item).collect();
            Questions::Generation(Generation { items, grader, max_tokens, stop })
        };
        match questions.len() {
            count if count <= shots => Err(format!(
                "{name}: {count} questions, of which {shots} are shown as examples: none is left"
            )),
            _ => Ok(Self { name: name.to_owned(), questions, shots }),
        }
    }
}

/// The text of an item's question, if it is no conversation.
pub fn question_text(item: &Value) -> Option<&str> {
    item["prompt"].as_str().or(item["question"].as_str())
}

/// What a line of a generation task lacks.
fn generation_fault(item: &Value, shots: usize) -> Option<String> {
    let messages = item["messages"].as_array().is_some_and(|messages| !messages.is_empty());
    match (messages, question_text(item)) {
        (true, _) if shots > 0 => Some("shots are for lines with `prompt`".into()),
        (true, _) => None,
        (false, None) => Some("it has neither `prompt`, `question` nor `messages`".into()),
        (false, Some(_)) if shots > 0 && !item["answer"].is_string() => {
            Some("`answer` is not a string; with shots, the first lines become examples".into())
        }
        _ => None,
    }
}

impl MultipleChoice {
    fn parse(item: Value) -> Result<Self, String> {
        let Line { prompt, choices, answer } =
            serde_json::from_value(item).map_err(|error| error.to_string())?;
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

/// The result of a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TaskReport {
    MultipleChoice {
        /// Share of questions whose right answer has the highest probability.
        accuracy: Rate,
        /// The same with log-probabilities divided by the letters of the answer (`acc_norm` of
        /// lm-evaluation-harness).
        normalized_accuracy: Rate,
    },
    Generation {
        questions: usize,
        /// The mean of the grader's rewards, with its interval over resampled questions.
        reward: Interval,
        /// Share of answers that ended before the maximum of tokens.
        ended: Rate,
        /// Mean tokens of an answer.
        tokens: f64,
        /// The first answers.
        samples: Vec<EvalSample>,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalSample {
    pub question: String,
    pub answer: String,
    pub reward: f64,
}

impl TaskReport {
    pub fn questions(&self) -> usize {
        match self {
            Self::MultipleChoice { accuracy, .. } => accuracy.count,
            Self::Generation { questions, .. } => *questions,
        }
    }

    /// The value that a gate bounds, with its interval: the accuracy, or the mean reward.
    pub fn score(&self) -> Interval {
        match self {
            Self::MultipleChoice { accuracy, .. } => {
                let Rate { value, low, high, .. } = *accuracy;
                Interval { value, low, high }
            }
            Self::Generation { reward, .. } => *reward,
        }
    }
}

/// A bound that an evaluation has to keep.
#[derive(Debug, Clone, PartialEq)]
pub enum Gate {
    /// Highest mean KL.
    MaxKl(f64),
    MaxPerplexity(f64),
    /// Lowest accuracy, or mean reward, of a task.
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
        let none = GenerationSettings { grader: None, max_tokens: 8, stop: Vec::new() };
        let task = |text: &str, shots| EvalTask::parse("t", text, shots, none.clone());
        let answer_of = |text: &str| match task(text, 0).unwrap().questions {
            Questions::MultipleChoice(questions) => questions[0].answer,
            other => panic!("{other:?}"),
        };
        for (answer, right) in [("0", 0), ("1", 1), (r#""A""#, 0), (r#""B""#, 1), (r#""x""#, 0)] {
            assert_eq!(answer_of(&line(answer)), right, "{answer}");
        }
        for answer in ["2", "-1", r#""C""#, r#""y""#, "null", "0.5", r#""""#] {
            let error = task(&format!("\n{}", line(answer)), 0).unwrap_err();
            assert!(error.contains("line 2") && error.contains("`answer`"), "{answer}: {error}");
        }
        for (text, shots, why) in [
            (String::new(), 0, "no question"),
            (line("0"), 1, "none is left"),
            (r#"{"choices": []}"#.into(), 0, "prompt"),
            ("[]".into(), 0, "line 1: it is no object"),
            ("{".into(), 0, "line 1"),
            (r#"{"prompt": "q"}"#.into(), 0, "--grader t=FILE"),
            (r#"{"prompt": "q", "choices": ["x"], "answer": 0}"#.into(), 0, "choices"),
            (r#"{"prompt": "q", "choices": ["x", " "], "answer": 0}"#.into(), 0, "choices"),
        ] {
            assert!(task(&text, shots).unwrap_err().contains(why), "{text}");
        }
    }

    #[test]
    fn written_answers_need_a_grader_without_a_model() {
        let settings = |grader: &str| GenerationSettings {
            grader: Some(Grader::parse(serde_json::from_str(grader).unwrap()).unwrap()),
            max_tokens: 8,
            stop: Vec::new(),
        };
        let task = |text: &str, shots, grader: &str| {
            EvalTask::parse("t", text, shots, settings(grader)).map(|task| task.questions.len())
        };
        let number = r#"{"type": "number_match", "name": "n", "reference": "{{item.answer}}"}"#;
        let lines = r#"{"question": "1+1=", "answer": "2"}
            {"messages": [{"role": "user", "content": "2+2="}], "answer": "4"}"#;
        assert_eq!(task(lines, 0, number), Ok(2));
        let judge = r#"{"type": "score_model", "name": "j", "model": "m",
            "input": [{"role": "user", "content": "x"}]}"#;
        for (text, shots, grader, why) in [
            (lines, 0, judge, "the model `m`"),
            (lines, 1, number, "line 2: shots"),
            (r#"{"question": "q"}"#, 0, number, "answer"),
            (r#"{"question": "q", "answer": 2}"#, 1, number, "`answer` is not a string"),
            (r#"{"answer": "2"}"#, 0, number, "neither"),
            (r#"{"messages": [], "answer": "2"}"#, 0, number, "neither"),
            (
                r#"{"prompt": "q", "choices": ["a", "b"], "answer": 0}"#,
                0,
                number,
                "needs no grader",
            ),
        ] {
            assert!(task(text, shots, grader).unwrap_err().contains(why), "{text}, {why}");
        }
    }

    #[test]
    fn models_are_the_same_by_digest_or_else_by_path() {
        let model = |file: &str, sha256: Option<&str>, adapter: Option<&str>| EvalModel {
            name: "m".into(),
            file: file.into(),
            adapter: adapter.map(PathBuf::from),
            sha256: sha256.map(str::to_owned),
            adapter_sha256: adapter.map(str::to_owned),
        };
        let one = model("/a", Some("1"), None);
        assert!(one.is_same_file(&model("/b", Some("1"), None)));
        assert!(!one.is_same_file(&model("/a", Some("2"), None)));
        assert!(one.is_same_file(&model("/a", None, None)));
        assert!(!one.is_same_file(&model("/b", None, None)));
        assert!(!one.is_same_file(&model("/a", Some("1"), Some("3"))));
        let adapted = model("/a", None, Some("3"));
        assert!(!adapted.is_same_file(&model("/a", None, Some("4"))));
        let copy = EvalModel { adapter_sha256: None, ..model("/a", None, Some("4")) };
        assert!(adapted.is_same_file(&copy));
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
