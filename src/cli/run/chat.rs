//! A conversation over `/v1/chat/completions`, printed as it streams.

use super::RunOptions;
use crate::cli::http::{HttpError, Server, SseLines, error_message};
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Whole,
    /// By Ctrl-C; what had been said is part of the conversation.
    Stopped,
}

/// The conversation so far.
pub(super) struct Chat {
    server: Server,
    model: String,
    system: Option<String>,
    messages: Vec<Value>,
    /// `temperature`, `max_tokens`, `seed` where they were given.
    settings: serde_json::Map<String, Value>,
    /// Show a thinking model's reasoning, dimmed.
    show_reasoning: bool,
}

impl Chat {
    pub(super) fn new(server: Server, model: String, options: &RunOptions) -> Self {
        let given = [
            ("temperature", options.temperature.map(|value| json!(value))),
            ("max_tokens", options.max_tokens.map(|value| json!(value))),
            ("seed", options.seed.map(|value| json!(value))),
        ];
        let settings =
            given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
        Self {
            server,
            model,
            system: options.system.clone(),
            messages: Vec::new(),
            settings,
            show_reasoning: std::io::stdout().is_terminal(),
        }
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// Forgets the conversation, not the instructions.
    pub(super) fn clear(&mut self) {
        self.messages.clear();
    }

    /// Sets the instructions; empty text removes them.
    pub(super) fn set_system(&mut self, text: &str) {
        self.system = Some(text.to_owned()).filter(|text| !text.is_empty());
    }

    /// Asks, and prints the answer as it comes. A question that failed leaves no trace.
    pub(super) async fn ask(&mut self, question: &str) -> Result<Answer, HttpError> {
        self.messages.push(json!({"role": "user", "content": question}));
        let mut printer = Printer { show_reasoning: self.show_reasoning, ..Printer::default() };
        let result = tokio::select! {
            result = self.stream(&mut printer) => result.map(|()| Answer::Whole),
            // Dropping the stream closes the connection, which ends the request on the server.
            _ = tokio::signal::ctrl_c() => Ok(Answer::Stopped),
        };
        printer.end();
        match (&result, printer.answer.is_empty()) {
            (Err(_), true) => drop(self.messages.pop()),
            _ => self.messages.push(json!({"role": "assistant", "content": printer.answer})),
        }
        result
    }

    async fn stream(&self, printer: &mut Printer) -> Result<(), HttpError> {
        let body = self.body().to_string();
        let path = "/v1/chat/completions";
        let mut connection = self.server.connect().await?;
        let response = connection.send(&self.server, Method::POST, path, Some(body.into())).await?;
        let mut frames = response.into_body();
        let mut lines = SseLines::default();
        let mut failure = None;
        while let Some(frame) = frames.frame().await {
            let frame = frame.map_err(|error| HttpError::Lost(error.to_string()))?;
            let Some(bytes) = frame.data_ref() else { continue };
            lines.feed(bytes, |data| match error_message(data) {
                Some(message) => failure = Some(HttpError::InStream(message)),
                None => printer.chunk(data),
            });
        }
        failure.map_or(Ok(()), Err)
    }

    fn body(&self) -> Value {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let mut body = self.settings.clone();
        body.insert("model".to_owned(), json!(self.model));
        body.insert("stream".to_owned(), json!(true));
        body.insert("messages".to_owned(), json!(messages));
        Value::Object(body)
    }
}

/// Prints deltas and keeps the answer.
#[derive(Debug, Default)]
struct Printer {
    answer: String,
    show_reasoning: bool,
    dimmed: bool,
}

impl Printer {
    fn chunk(&mut self, data: &[u8]) {
        let Ok(chunk) = serde_json::from_slice::<Value>(data) else { return };
        let delta = &chunk["choices"][0]["delta"];
        if let Some(text) = delta["reasoning_content"].as_str()
            && self.show_reasoning
            && !text.is_empty()
        {
            self.print(text, true);
        }
        if let Some(text) = delta["content"].as_str()
            && !text.is_empty()
        {
            self.answer.push_str(text);
            self.print(text, false);
        }
    }

    fn print(&mut self, text: &str, dim: bool) {
        let mut out = std::io::stdout().lock();
        let switch = match (self.dimmed, dim) {
            (false, true) => "\x1b[2m",
            (true, false) => "\x1b[0m\n\n",
            _ => "",
        };
        self.dimmed = dim;
        // A reader that is gone ends the process by SIGPIPE's error at the next flush; an answer
        // that nobody reads is no reason to panic.
        let _ = write!(out, "{switch}{text}");
        let _ = out.flush();
    }

    fn end(&mut self) {
        let reset = if self.dimmed { "\x1b[0m" } else { "" };
        println!("{reset}");
    }
}
