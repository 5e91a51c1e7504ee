//! Answers, critiques and revisions.

use super::super::judge::{Comparison, Judgement};
use super::super::{Event, TrainError};
use super::pipeline::{Pipeline, Purpose, is_helpful, message, messages};
use super::table::Table;
use crate::job::rollout::Rollout;
use crate::job::spec::Principle;
use crate::train::data::EncodedPrompt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const ANSWER: Purpose = Purpose(0x616e_7377);
const CRITIQUE: Purpose = Purpose(0x6372_6974);
const REVISION: Purpose = Purpose(0x7265_7669);

/// Beginnings of refusals that say nothing about the request, in lower case.
const STOCK_REFUSALS: [&str; 10] = [
    "i can't help with that",
    "i cannot help with that",
    "i can't assist with that",
    "i cannot assist with that",
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "i'm sorry, i can",
    "as an ai language model, i can",
    "i cannot fulfill",
    "i can't fulfill",
];
/// Why a text is not trained on.
const CUT: &str = "cut off at max_tokens";
/// Words with which a model talks about the task instead of answering, in lower case.
const ABOUT_THE_TASK: [&str; 7] = [
    "the answer does",
    "the answer ends",
    "my answer",
    "revised",
    "rewritten",
    "critique",
    "rewrite",
];
/// Number of words at the beginning in which these are looked for.
const OPENING: usize = 8;

/// A row of `revisions.jsonl`: a prompt, its first answer and the revision of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Revised {
    pub prompt: usize,
    pub messages: Value,
    /// The prompt is marked as helpful: its answer is not revised.
    pub helpful: bool,
    pub answer: String,
    pub rounds: Vec<Round>,
    /// The probability, by the judge, that the revision responds to the prompt.
    pub on_topic: Option<f64>,
    /// The judge's comparison of the revision with the first answer, in this order.
    pub judgement: Option<Judgement>,
    /// Why the example is not trained on; `null`: it is.
    pub dropped: Option<String>,
}

/// A critique and a revision under a principle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Round {
    pub principle: String,
    pub critique: String,
    pub revision: String,
}

impl Revised {
    /// The last revision, or the answer if there is none.
    pub(super) fn last(&self) -> &str {
        self.rounds.last().map_or(&self.answer, |round| &round.revision)
    }

    /// The training example, if the row is kept. Earlier answers of the conversation are not
    /// trained.
    pub(super) fn example(&self) -> Option<Value> {
        if self.dropped.is_some() {
            return None;
        }
        let mut messages = self.messages.as_array().cloned().unwrap_or_default();
        for message in &mut messages {
            if message["role"] == "assistant" {
                message["weight"] = json!(0);
            }
        }
        messages.push(message("assistant", self.last()));
        Some(json!({"messages": messages}))
    }
}

/// The revisions of all training prompts.
///
/// # Errors
/// If the model or the judge is not available, or a file cannot be written.
pub(super) fn revise(
    pipeline: &Pipeline,
    event: &mut dyn FnMut(Event),
) -> Result<Vec<Revised>, TrainError> {
    let mut table = Table::open(&pipeline.file("revisions.jsonl"))?;
    let total = pipeline.job.train.len();
    pipeline.calls.export()?;
    pipeline.batches("Answers revised", table.rows.len(), total, event, |batch| {
        Ok(table.append(revised(pipeline, batch)?)?)
    })?;
    Ok(table.rows)
}

/// A row before the checks.
struct Draft<'a> {
    row: Revised,
    conversation: Vec<Value>,
    /// The principle of the last round.
    principle: Option<&'a Principle>,
}

fn revised(pipeline: &Pipeline, prompts: &[usize]) -> Result<Vec<Revised>, TrainError> {
    let mut drafts = first_answers(pipeline, prompts)?;
    for round in 0..pipeline.block.rounds {
        let open: Vec<usize> = (0..drafts.len())
            .filter(|&at| !drafts[at].row.helpful && drafts[at].row.dropped.is_none())
            .collect();
        let seed = |purpose: Purpose, at: usize| {
            pipeline.seed(Purpose(purpose.0 + round as u64), drafts[at].row.prompt)
        };
        let principles: Vec<&Principle> =
            open.iter().map(|&at| pipeline.principle(seed(CRITIQUE, at))).collect();
        let asked = |at: usize, principle: &Principle| {
            let draft = &drafts[at];
            critique_request(pipeline, &draft.conversation, draft.row.last(), principle)
        };
        let asked: Vec<_> =
            open.iter().zip(&principles).map(|(&at, principle)| asked(at, principle)).collect();
        let seeds: Vec<_> = open.iter().map(|&at| seed(CRITIQUE, at)).collect();
        let critiques = texts(pipeline, &asked, &seeds)?;
        let asked: Vec<_> = asked
            .into_iter()
            .zip(&critiques)
            .zip(&principles)
            .map(|((mut messages, critique), principle)| {
                messages.push(message(
                    "assistant",
                    critique.as_ref().map_or("", |critique| &critique.text),
                ));
                messages.push(message("user", &revision_text(principle)));
                messages
            })
            .collect();
        let seeds: Vec<_> = open.iter().map(|&at| seed(REVISION, at)).collect();
        let revisions = texts(pipeline, &asked, &seeds)?;
        let found = critiques.into_iter().zip(revisions).zip(principles);
        for (&at, ((critique, revision), principle)) in open.iter().zip(found) {
            let draft = &mut drafts[at];
            draft.principle = Some(principle);
            let (Some(critique), Some(revision)) = (critique, revision) else {
                draft.row.dropped = Some("an empty text, or longer than the context".into());
                continue;
            };
            draft.row.dropped = (!revision.ended).then(|| CUT.to_owned());
            let (critique, revision) = (critique.text, revision.text);
            let principle = principle.name.clone();
            draft.row.rounds.push(Round { principle, critique, revision });
        }
    }
    check(pipeline, &mut drafts)?;
    Ok(drafts.into_iter().map(|draft| draft.row).collect())
}

fn first_answers<'a>(
    pipeline: &Pipeline<'a>,
    prompts: &[usize],
) -> Result<Vec<Draft<'a>>, TrainError> {
    let items: Vec<_> =
        prompts.iter().map(|&prompt| pipeline.job.train.get(prompt)).collect::<Result<_, _>>()?;
    let conversations: Vec<_> = items.iter().map(|prompt| messages(&prompt.item)).collect();
    let seeds: Vec<_> = prompts.iter().map(|&prompt| pipeline.seed(ANSWER, prompt)).collect();
    let answers = texts(pipeline, &conversations, &seeds)?;
    let drafts = prompts.iter().zip(items).zip(conversations).zip(answers);
    let draft = |(((&prompt, item), conversation), answer): (((&usize, _), Vec<Value>), _)| {
        let item: EncodedPrompt = item;
        let answer: Option<Text> = answer;
        let helpful = is_helpful(&item.item);
        // An answer that comes with the prompt is taken as it is.
        let given = item.item["answer"].as_str().filter(|_| helpful);
        // An answer that was cut off can be revised, but not trained on.
        let dropped = match (&given, &answer) {
            (Some(_), _) => None,
            (None, None) => Some("an empty answer, or longer than the context"),
            (None, Some(answer)) if helpful && !answer.ended => Some(CUT),
            _ => None,
        };
        let dropped = dropped.map(str::to_owned);
        let answer = given.map(str::to_owned).or(answer.map(|answer| answer.text));
        let row = Revised {
            prompt,
            messages: json!(conversation),
            helpful,
            answer: answer.unwrap_or_default(),
            rounds: Vec::new(),
            on_topic: None,
            judgement: None,
            dropped,
        };
        Draft { row, conversation, principle: None }
    };
    Ok(drafts.map(draft).collect())
}

/// A completion of a conversation.
struct Text {
    text: String,
    /// It ended before `max_tokens`.
    ended: bool,
}

/// One completion of each conversation; `None` if there is no room for one, or it is empty.
fn texts(
    pipeline: &Pipeline,
    conversations: &[Vec<Value>],
    seeds: &[u64],
) -> Result<Vec<Option<Text>>, TrainError> {
    let sampled = pipeline.sample(conversations, seeds, 1)?;
    let text = |found: Option<Vec<Rollout>>| {
        let Rollout { text, ended, .. } = found?.into_iter().next()?;
        let text = text.trim().to_owned();
        (!text.is_empty()).then_some(Text { text, ended })
    };
    Ok(sampled.into_iter().map(text).collect())
}

/// The conversation that asks for a critique: examples, then the prompt with its answer.
fn critique_request(
    pipeline: &Pipeline,
    conversation: &[Value],
    answer: &str,
    principle: &Principle,
) -> Vec<Value> {
    let is_system =
        |message: &&Value| message["role"] == "system" || message["role"] == "developer";
    let mut asked: Vec<Value> = conversation.iter().take_while(is_system).cloned().collect();
    let rest = asked.len();
    for example in &pipeline.block.constitution.examples {
        asked.extend([
            message("user", &example.prompt),
            message("assistant", &example.answer),
            message("user", &critique_text(principle)),
            message("assistant", &example.critique),
            message("user", &revision_text(principle)),
            message("assistant", &example.revision),
        ]);
    }
    asked.extend_from_slice(&conversation[rest..]);
    asked.push(message("assistant", answer));
    asked.push(message("user", &critique_text(principle)));
    asked
}

fn critique_text(principle: &Principle) -> String {
    format!("{} Answer in one or two sentences.", principle.critique.trim())
}

fn revision_text(principle: &Principle) -> String {
    format!("{} Write only the new answer.", principle.revision.trim())
}

/// Decides which revisions are trained on.
fn check(pipeline: &Pipeline, drafts: &mut [Draft]) -> Result<(), TrainError> {
    for draft in drafts.iter_mut() {
        let row = &mut draft.row;
        if !row.helpful && row.dropped.is_none() {
            row.dropped = unfit(row).map(str::to_owned);
        }
    }
    let open = |drafts: &[Draft]| -> Vec<usize> {
        let is_open = |draft: &Draft| !draft.row.helpful && draft.row.dropped.is_none();
        (0..drafts.len()).filter(|&at| is_open(&drafts[at])).collect()
    };
    if pipeline.block.min_on_topic > 0.0 {
        let open = open(drafts);
        let asked: Vec<_> =
            open.iter().map(|&at| (&drafts[at].row.messages, drafts[at].row.last())).collect();
        let found = pipeline.judge.on_topic(&asked)?;
        for (&at, found) in open.iter().zip(found) {
            let row = &mut drafts[at].row;
            row.on_topic = found;
            row.dropped = below(found, pipeline.block.min_on_topic, "off topic");
        }
    }
    if pipeline.block.min_preferred > 0.0 {
        let open = open(drafts);
        let asked = |at: &usize| {
            let Draft { row, principle, .. } = &drafts[*at];
            let (principle, question) =
                principle.map_or(("", ""), |found| (&*found.name, &*found.comparison));
            let answers = [row.last(), &*row.answer];
            Comparison { messages: &row.messages, principle, question, answers }
        };
        let asked: Vec<_> = open.iter().map(asked).collect();
        let found = pipeline.judge.compare(&asked)?;
        for (&at, found) in open.iter().zip(found) {
            let row = &mut drafts[at].row;
            let probability = found.as_ref().map(Judgement::probability);
            row.dropped = below(probability, pipeline.block.min_preferred, "not better");
            row.judgement = found;
        }
    }
    Ok(())
}

fn below(found: Option<f64>, least: f64, what: &str) -> Option<String> {
    match found {
        None => Some("the judge gave no answer".to_owned()),
        Some(p) if p <= least => Some(format!("{what}, by the judge")),
        Some(_) => None,
    }
}

/// Why a revision cannot be trained on, as far as it can be seen without a judge.
fn unfit(row: &Revised) -> Option<&'static str> {
    let words =
        |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_lowercase).collect() };
    let revision = words(row.last());
    let opening = revision[..revision.len().min(OPENING)].join(" ");
    let critique = row.rounds.last().map(|round| words(&round.critique));
    match () {
        () if words(&row.answer) == revision => Some("not changed"),
        () if critique.is_some_and(|critique| critique == revision) => {
            Some("the same as the critique")
        }
        () if is_refusal(row.last()) && !is_refusal(&row.answer) => Some("a stock refusal"),
        () if ABOUT_THE_TASK.iter().any(|words| opening.contains(words)) => {
            Some("about the task instead of the prompt")
        }
        () => None,
    }
}

/// Whether an answer begins like a refusal that says nothing about the request.
pub(super) fn is_refusal(answer: &str) -> bool {
    let answer = answer.trim().to_lowercase().replace('’', "'");
    STOCK_REFUSALS.iter().any(|refusal| answer.starts_with(refusal))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(answer: &str, revision: &str) -> Revised {
        Revised {
            prompt: 0,
            messages: json!([{"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
            helpful: false,
            answer: answer.into(),
            rounds: vec![Round {
                principle: "p".into(),
                critique: "It is rude.".into(),
                revision: revision.into(),
            }],
            on_topic: None,
            judgement: None,
            dropped: None,
        }
    }

    #[test]
    fn unfit_revisions_are_found() {
        let of = |answer, revision| unfit(&row(answer, revision));
        let answer = "Take the blue one.";
        assert_eq!(of(answer, "take the  Blue one."), Some("not changed"));
        assert_eq!(of(answer, "It is  rude."), Some("the same as the critique"));
        assert_eq!(of(answer, "I’m sorry, but I can't do that."), Some("a stock refusal"));
        assert_eq!(of("I can't help with that.", "I cannot fulfill this."), None);
        let about = Some("about the task instead of the prompt");
        assert_eq!(of(answer, "Here is the revised answer: take it."), about);
        assert_eq!(of(answer, "Take the blue one, if you like it. Would you?"), None);
        assert_eq!(of(answer, "The answer is blue."), None);
    }

    #[test]
    fn only_the_last_answer_of_an_example_is_trained() {
        let row = row("first", "second");
        let example = row.example().unwrap();
        assert_eq!(example["messages"][1]["weight"], 0);
        assert_eq!(example["messages"][3], json!({"role": "assistant", "content": "second"}));
        let dropped = Revised { dropped: Some("why".into()), ..row };
        assert_eq!(dropped.example(), None);
    }
}
