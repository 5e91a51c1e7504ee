//! Tasks whose answers the model writes: the most probable token each time, rewarded by a grader.

use super::scorer::Scorer;
use super::stats::bootstrap;
use crate::grade::Context;
use crate::job::{EvalError, EvalSample, EvalTask, Generation, Rate, TaskReport, question_text};
use crate::template::{ChatTemplate, RenderInput};
use serde_json::Value;

/// Number of answers that are kept in the report.
const SAMPLES: usize = 10;

/// An answer.
struct Answer {
    text: String,
    tokens: usize,
    ended: bool,
}

/// Answers the questions and grades the answers.
///
/// # Errors
/// If the model fails, its chat template cannot render a conversation, or a question is longer than
/// its context.
pub(super) fn score(
    scorer: &mut Scorer,
    task: &EvalTask,
    generation: &Generation,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TaskReport, EvalError> {
    let (shots, questions) = generation.items.split_at(task.shots.min(generation.items.len()));
    let shots: String = shots.iter().map(solved).collect();
    let template = ChatTemplate::of(&scorer.facts.tokenizer).map_err(|error| error.to_string());
    let (mut rewards, mut samples) = (Vec::new(), Vec::new());
    let (mut ended, mut tokens) = (0, 0);
    for (number, item) in questions.iter().enumerate() {
        progress(number, questions.len());
        let at = |why: String| {
            let line = task.shots + number + 1;
            EvalError::Refused(format!("{why} (task {}, question {line})", task.name))
        };
        let prompt = match question_text(item) {
            Some(text) if !item["messages"].is_array() => format!("{shots}{text}"),
            _ => rendered(&template, item).map_err(at)?,
        };
        let chat = item["messages"].is_array();
        let answer = answer(scorer, &prompt, chat, generation).map_err(|error| match error {
            EvalError::Refused(why) => at(why),
            other => other,
        })?;
        let reward = generation.grader.grade(&Context::new(item, &answer.text), &[]).reward;
        rewards.push((reward, 1.0));
        ended += usize::from(answer.ended);
        tokens += answer.tokens;
        if samples.len() < SAMPLES {
            samples.push(EvalSample { question: prompt, answer: answer.text, reward });
        }
    }
    progress(questions.len(), questions.len());
    let count = questions.len();
    let ended = Rate::of(ended as f64, count)
        .ok_or_else(|| EvalError::Refused(format!("{}: no question is left", task.name)))?;
    Ok(TaskReport::Generation {
        questions: count,
        reward: bootstrap(&rewards, |mean| mean),
        ended,
        tokens: tokens as f64 / count as f64,
        samples,
    })
}

/// An example with its answer.
fn solved(item: &Value) -> String {
    let answer = item["answer"].as_str().unwrap_or_default();
    format!("{} {answer}\n\n", question_text(item).unwrap_or_default().trim_end_matches(' '))
}

fn rendered(template: &Result<ChatTemplate, String>, item: &Value) -> Result<String, String> {
    let template = template.as_ref().map_err(|why| format!("the chat template: {why}"))?;
    let input = RenderInput {
        messages: item["messages"].as_array().cloned().unwrap_or_default(),
        add_generation_prompt: true,
        ..RenderInput::default()
    };
    template.render(&input).map_err(|error| error.to_string())
}

/// Continues a prompt until the model ends its answer, a stop text comes, or `max_tokens` are
/// written.
fn answer(
    scorer: &mut Scorer,
    prompt: &str,
    chat: bool,
    generation: &Generation,
) -> Result<Answer, EvalError> {
    let tokenizer = scorer.tokenizer();
    let vocab = tokenizer.vocab();
    let mut tokens = match chat {
        true => {
            // A template that writes BOS itself must not get a second one.
            let bos = vocab.bos.map(|bos| vocab.piece(bos)).filter(|bos| !bos.is_empty());
            let wrote_bos = bos.is_some_and(|bos| prompt.as_bytes().starts_with(bos));
            tokenizer.encode_rendered(prompt, &[], !wrote_bos)
        }
        false => tokenizer.encode_prompt(prompt.trim_end_matches(' '), true, false),
    };
    let (asked, mut bytes) = (tokens.len(), Vec::new());
    if asked == 0 || asked.saturating_add(generation.max_tokens) > scorer.context {
        return Err(EvalError::Refused(format!(
            "{asked} tokens and an answer of up to {} are more than the {} that the model reads: use \
             fewer shots, or a lower maximum of tokens",
            generation.max_tokens, scorer.context
        )));
    }
    loop {
        let text = String::from_utf8_lossy(&bytes);
        let stop = generation.stop.iter().filter_map(|stop| text.find(stop.as_str())).min();
        let written = tokens.len() - asked;
        if let Some(at) = stop {
            return Ok(Answer { text: text[..at].to_owned(), tokens: written, ended: true });
        }
        if written == generation.max_tokens {
            return Ok(Answer { text: text.into_owned(), tokens: written, ended: false });
        }
        let mut best = 0;
        let last = tokens.len() - 1;
        scorer.read(&tokens, last..last + 1, &mut |_, logits| {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            best = logits.iter().position(|x| *x == largest).unwrap_or(0) as u32;
            Ok(())
        })?;
        if vocab.ends_generation(best) {
            let text = text.into_owned();
            return Ok(Answer { text, tokens: written + 1, ended: true });
        }
        bytes.extend_from_slice(vocab.output_piece(best, false));
        tokens.push(best);
    }
}
