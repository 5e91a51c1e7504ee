//! `ingot run MODEL [PROMPT]`: one answer, or a chat in the terminal.
//!
//! It is a client like any other: it starts `ingot serve` on a free port of this machine (or uses
//! the server of `--url`) and speaks the HTTP API.

mod chat;
mod server;

use super::http::Server;
use super::{CliError, PullBar};
use crate::config::{DataDirOption, HubAccess, Secret};
use crate::gateway::store::{DEFAULT_MODEL, ModelRef, Store, ensure};
use chat::{Answer, Chat};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use server::ServeChild;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `ingot run`. The server that it starts reads `INGOT_*` variables as always.
#[derive(Debug, clap::Args)]
pub struct RunOptions {
    /// A file, hf:org/repo/file.gguf, an alias, a name of `ingot models`, or, with --url, a name
    /// that the server lists
    #[arg(value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Asks this and leaves; what is piped in is added to it. Without it: an interactive chat
    #[arg(value_name = "PROMPT")]
    pub prompt: Vec<String>,
    /// Use this running server instead of starting one
    #[arg(long)]
    pub url: Option<String>,
    /// Key to send
    #[arg(long, env = "INGOT_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Vec<Secret>,
    /// Instructions that come before the conversation
    #[arg(long)]
    pub system: Option<String>,
    /// 0 always takes the most likely token [default: the server's]
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Longest answer, in tokens [default: until the context is full]
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Makes sampled answers repeatable
    #[arg(long)]
    pub seed: Option<u64>,
    /// A smaller model of the same vocabulary, which drafts for it
    #[arg(long, value_name = "MODEL", env = "INGOT_DRAFT_MODEL")]
    pub draft_model: Option<String>,
    #[command(flatten)]
    pub data: DataDirOption,
}

const HELP: &str = "\
/system TEXT  set the instructions (without TEXT: remove them)
/clear        forget the conversation
/help         this list
/exit         leave; so does Ctrl-D
Ctrl-C stops an answer.";

/// Answers, or chats until the user leaves.
pub fn main(options: RunOptions) -> Result<ExitCode, CliError> {
    let data_dir = options.data.clone().resolve()?;
    let prompt = gather_prompt(&options)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::message(format!("The runtime cannot be started: {error}.")))?;
    let key = options.api_key.first().cloned();
    let (_child, url) = match &options.url {
        Some(url) => (None, url.clone()),
        None => {
            let draft = options.draft_model.as_deref();
            for model in [Some(&*options.model), draft].into_iter().flatten() {
                fetch_model(model, &data_dir)?;
            }
            let (child, url) = ServeChild::start(&options.model, draft, &data_dir)?;
            (Some(child), url)
        }
    };
    let server = Server::parse(&url, key).map_err(CliError::Message)?;
    let model = match &options.url {
        Some(_) => options.model.clone(),
        None => runtime.block_on(server::wait_ready(&server, _child.as_ref(), &options.model))?,
    };
    let mut chat = Chat::new(server, model, &options);
    match prompt {
        Some(prompt) => one_shot(&runtime, &mut chat, &prompt),
        None => interactive(&runtime, &mut chat, data_dir.join("history.txt")),
    }
}

/// The words of the command line and what is piped in; `None` asks for an interactive chat.
fn gather_prompt(options: &RunOptions) -> Result<Option<String>, CliError> {
    let mut prompt = options.prompt.join(" ");
    let mut stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let mut piped = String::new();
        stdin.read_to_string(&mut piped).map_err(|error| {
            CliError::message(format!("Standard input cannot be read as text: {error}."))
        })?;
        let piped = piped.trim_end();
        if !piped.is_empty() {
            prompt += if prompt.is_empty() { "" } else { "\n\n" };
            prompt += piped;
        }
        if prompt.is_empty() {
            return Err(CliError::message(
                "There is no prompt: give one after the model, pipe one in, or run in a terminal.",
            ));
        }
    }
    Ok(Some(prompt).filter(|prompt| !prompt.trim().is_empty()))
}

/// Pulls here rather than in the server, where the progress bar would not be seen.
fn fetch_model(model: &str, data_dir: &std::path::Path) -> Result<(), CliError> {
    let store = Store::open(data_dir)?;
    let reference = ModelRef::parse(model)?;
    let mut bar = PullBar::new(reference.model_name());
    let result = ensure(&store, &reference, &HubAccess::from_env(), &mut |event| bar.show(event));
    bar.finish();
    result.map(drop).map_err(CliError::from)
}

fn one_shot(
    runtime: &tokio::runtime::Runtime,
    chat: &mut Chat,
    prompt: &str,
) -> Result<ExitCode, CliError> {
    match runtime.block_on(chat.ask(prompt)) {
        Ok(Answer::Whole) => Ok(ExitCode::SUCCESS),
        // 128 + SIGINT, as shells report it.
        Ok(Answer::Stopped) => Ok(ExitCode::from(130)),
        Err(error) => Err(CliError::message(format!("No answer: {error}."))),
    }
}

fn interactive(
    runtime: &tokio::runtime::Runtime,
    chat: &mut Chat,
    history: PathBuf,
) -> Result<ExitCode, CliError> {
    let unusable = |error: ReadlineError| {
        CliError::message(format!("The terminal cannot be used for a chat: {error}."))
    };
    let mut editor = DefaultEditor::new().map_err(unusable)?;
    // There is none the first time.
    let _ = editor.load_history(&history);
    eprintln!("Chat with {}. /help lists the commands, Ctrl-D leaves.", chat.model());
    loop {
        let line = match editor.readline(">>> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(unusable(error)),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let _ = editor.add_history_entry(line);
        let _ = editor.save_history(&history);
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/exit" | "/quit" | "/bye" => return Ok(ExitCode::SUCCESS),
            "/help" => println!("{HELP}"),
            "/clear" => chat.clear(),
            "/system" => chat.set_system(rest.trim()),
            command if command.starts_with('/') && !command[1..].contains('/') => {
                println!("There is no command {command}.\n{HELP}");
            }
            _ => {
                if let Err(error) = runtime.block_on(chat.ask(line)) {
                    eprintln!("No answer: {error}.");
                }
            }
        }
    }
}
