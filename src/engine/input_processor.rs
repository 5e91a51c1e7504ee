//! Turns a [`Generate`] frame into a validated request: tokenizes it, checks it and compiles
//! grammars.
//!
//! Intake runs on its own threads, with a large stack and bounded work, so that neither a huge
//! prompt nor a slow grammar delays the step loop.

use super::commands::Command;
use super::grammar::{GrammarEngine, VocabSource, VocabToken};
use super::sampler::{Sampler, overlapping_sequences};
use super::sequence::{Choice, ValidRequest};
use crate::ipc::{
    Call, EngineError, EngineErrorKind, FromEngine, Generate, ModelInfo, Prompt, PromptPiece,
    Reply, Token,
};
use crate::tokenizer::Tokenizer;
use crossbeam_channel::{Receiver, Sender};
use serde_bytes::ByteBuf;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

/// Stack size in bytes: llama.cpp's pre-tokenizers recurse on long inputs.
const STACK: usize = 64 << 20;
const THREADS: usize = 2;

/// Work for the intake threads.
pub(super) enum Job {
    Generate(Box<Generate>, Instant),
    Call { call: u64, what: Call },
}

/// How a prompt's tokens are used.
#[derive(Clone, Copy)]
enum Use {
    /// The model continues them.
    Continue,
    /// The tokens are embedded or scored as a whole, with EOS appended if the vocabulary asks for
    /// it.
    Pool,
}

/// Validates requests against the model's properties.
pub(super) struct InputProcessor {
    tokenizer: Arc<dyn Tokenizer>,
    info: ModelInfo,
    longest_piece: usize,
    grammars: OnceLock<Result<GrammarEngine, EngineError>>,
}

impl InputProcessor {
    pub(super) fn new(tokenizer: Arc<dyn Tokenizer>, info: ModelInfo) -> Self {
        let vocab = tokenizer.vocab();
        let longest_piece =
            (0..vocab.len() as Token).map(|token| vocab.piece(token).len()).max().unwrap_or(1);
        Self { tokenizer, info, longest_piece: longest_piece.max(4), grammars: OnceLock::new() }
    }

    /// Starts the intake threads; they end when `jobs` is disconnected.
    pub(super) fn open(
        self,
        jobs: &Receiver<Job>,
        commands: &Sender<Command>,
        replies: &Sender<FromEngine>,
    ) -> std::io::Result<Vec<JoinHandle<()>>> {
        let processor = Arc::new(self);
        let work = |index: usize| {
            let (processor, jobs) = (processor.clone(), jobs.clone());
            let (commands, replies) = (commands.clone(), replies.clone());
            std::thread::Builder::new().name(format!("intake-{index}")).stack_size(STACK).spawn(
                move || {
                    for job in jobs {
                        processor.handle_safely(job, &commands, &replies);
                    }
                },
            )
        };
        (0..THREADS).map(work).collect()
    }

    /// Answers the request with an error if handling it panics. A panic is a bug, but the client
    /// must get a reply.
    fn handle_safely(&self, job: Job, commands: &Sender<Command>, replies: &Sender<FromEngine>) {
        let who = match &job {
            Job::Generate(request, _) => Ok(request.id),
            Job::Call { call, .. } => Err(*call),
        };
        let handled = catch_unwind(AssertUnwindSafe(|| self.handle(job, commands, replies)));
        if handled.is_err() {
            let error = EngineError::internal("the request could not be read: a bug in Ingot");
            let _ = match who {
                Ok(request) => commands.send(Command::Refuse(request, error)).is_ok(),
                Err(call) => replies.send(FromEngine::Reply { call, result: Err(error) }).is_ok(),
            };
        }
    }

    fn handle(&self, job: Job, commands: &Sender<Command>, replies: &Sender<FromEngine>) {
        match job {
            Job::Generate(request, arrived) => {
                let id = request.id;
                let outcome = match self.check(*request, arrived) {
                    Ok(admissible) => Command::Admit(Box::new(admissible)),
                    Err(error) => Command::Refuse(id, error),
                };
                let _ = commands.send(outcome);
            }
            Job::Call { call, what } => {
                let (inputs, scored_by) = match what {
                    Call::Embed { inputs } => (inputs, None),
                    Call::Score { adapter, inputs } => (inputs, Some(adapter)),
                    what => {
                        let result = self.answer(what);
                        let _ = replies.send(FromEngine::Reply { call, result });
                        return;
                    }
                };
                let tokens: Result<Vec<_>, _> =
                    inputs.iter().map(|input| self.pooled_tokens(input)).collect();
                match tokens {
                    Ok(inputs) => {
                        let _ = commands.send(Command::Pool { call, inputs, scored_by });
                    }
                    Err(error) => {
                        let _ = replies.send(FromEngine::Reply { call, result: Err(error) });
                    }
                }
            }
        }
    }

    fn answer(&self, what: Call) -> Result<Reply, EngineError> {
        let vocab = self.tokenizer.vocab();
        match what {
            Call::Tokenize { text, add_special, parse_special } => {
                Ok(self.pieces(self.tokenizer.encode(&text, add_special, parse_special)))
            }
            Call::TokenizeRendered { text, barriers, add_special } => {
                Ok(self.pieces(self.tokenizer.encode_rendered(&text, &barriers, add_special)))
            }
            Call::Detokenize { tokens, render_special } => {
                self.check_ids(&tokens, "tokens")?;
                let bytes: Vec<u8> = tokens
                    .iter()
                    .flat_map(|&token| {
                        let hidden = vocab.is_control(token) && !render_special;
                        if hidden { &[][..] } else { vocab.piece(token) }
                    })
                    .copied()
                    .collect();
                Ok(Reply::Text(String::from_utf8_lossy(&bytes).into_owned()))
            }
            Call::CheckGrammar { grammar } => {
                self.grammars()?.compile(&grammar)?;
                Ok(Reply::Done)
            }
            // The step loop or the loader answers the other calls.
            _ => Err(EngineError::internal("this call does not belong to intake")),
        }
    }

    fn pieces(&self, tokens: Vec<Token>) -> Reply {
        let vocab = self.tokenizer.vocab();
        let pieces = tokens.iter().map(|&token| ByteBuf::from(vocab.piece(token))).collect();
        Reply::Tokens { tokens, pieces }
    }

    fn check(&self, request: Generate, arrived: Instant) -> Result<ValidRequest, EngineError> {
        if !self.info.can_generate {
            return Err(EngineError::invalid(
                "model",
                format!(
                    "{} is an embedding model and cannot generate text; use /v1/embeddings",
                    self.info.description
                ),
            ));
        }
        if request.choices > self.info.max_sequences {
            return Err(EngineError::invalid(
                "n",
                format!(
                    "n is {}, but this server runs at most {} sequences at once",
                    request.choices, self.info.max_sequences
                ),
            ));
        }
        self.check_ids(&request.stop.token_ids, "stop_token_ids")?;
        let biased: Vec<_> = request.sampling.logit_bias.iter().map(|&(token, _)| token).collect();
        self.check_ids(&biased, "logit_bias")?;
        // The name of the prompt in the client's API.
        let param = match &request.prompt {
            Prompt::Rendered { .. } | Prompt::Pieces { .. } => "messages",
            Prompt::Text { .. } | Prompt::Tokens(_) | Prompt::Infill { .. } => "prompt",
        };
        let at = |error: EngineError| match error.kind {
            EngineErrorKind::ContextLength => EngineError { param: Some(param.into()), ..error },
            _ => error,
        };
        let tokens = self.prompt_tokens(&request.prompt, Use::Continue).map_err(at)?;
        let max_tokens = self.room(tokens.len(), request.stop.max_tokens).map_err(at)?;
        let choice = |choice: u32| {
            let grammar = match &request.grammar {
                Some(spec) => Some(self.grammars()?.start(spec)?),
                None => None,
            };
            Ok(Choice { choice, sampler: self.sampler(&request, choice), grammar })
        };
        let choices =
            (0..request.choices.max(1)).map(choice).collect::<Result<_, EngineError>>()?;
        Ok(ValidRequest { request, tokens, max_tokens, choices, arrived })
    }

    fn sampler(&self, request: &Generate, choice: u32) -> Sampler {
        let vocab = self.tokenizer.vocab();
        let encode = |text: &str| self.tokenizer.encode(text, false, false);
        let breakers = |text: &str| {
            let pieces = (0..vocab.len() as Token).map(|token| (token, vocab.piece(token)));
            overlapping_sequences(text, pieces, &encode)
        };
        Sampler::new(&request.sampling, choice, vocab.len(), &breakers)
    }

    fn grammars(&self) -> Result<&GrammarEngine, EngineError> {
        let made = self.grammars.get_or_init(|| {
            let vocab = self.tokenizer.vocab();
            let tokens = (0..vocab.len() as Token)
                .map(|token| VocabToken {
                    bytes: vocab.piece(token).to_vec(),
                    special: vocab.is_control(token) || vocab.ends_generation(token),
                })
                .collect();
            let tokenizer = self.tokenizer.clone();
            GrammarEngine::new(VocabSource {
                tokens,
                eos: vocab.end_tokens(),
                tokenize: Arc::new(move |bytes| match std::str::from_utf8(bytes) {
                    Ok(text) => tokenizer.encode(text, false, false),
                    Err(_) => Vec::new(),
                }),
            })
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn prompt_tokens(&self, prompt: &Prompt, usage: Use) -> Result<Vec<Token>, EngineError> {
        let vocab = self.tokenizer.vocab();
        let mut tokens = match prompt {
            Prompt::Tokens(tokens) => {
                self.check_ids(tokens, "prompt")?;
                tokens.clone()
            }
            Prompt::Text { text, add_special, parse_special } => {
                self.check_length(text)?;
                match usage {
                    Use::Continue => {
                        self.tokenizer.encode_prompt(text, *add_special, *parse_special)
                    }
                    Use::Pool => self.tokenizer.encode(text, *add_special, *parse_special),
                }
            }
            Prompt::Rendered { text, barriers, add_special } => {
                self.check_length(text)?;
                self.tokenizer.encode_rendered(text, barriers, *add_special)
            }
            Prompt::Pieces { pieces, add_special, parse_special, ends } => {
                let mut tokens = Vec::new();
                for (number, piece) in pieces.iter().enumerate() {
                    let PromptPiece { text, barriers } = piece;
                    self.check_length(text)?;
                    // As in training: a prompt, followed by the text that the model writes.
                    tokens.extend(match number {
                        0 if *parse_special => {
                            self.tokenizer.encode_rendered(text, barriers, *add_special)
                        }
                        0 => self.tokenizer.encode_prompt(text, *add_special, false),
                        _ => self.tokenizer.encode_continuation(text, *parse_special, barriers),
                    });
                }
                tokens.extend(vocab.eos.filter(|_| *ends));
                tokens
            }
            Prompt::Infill { prefix, suffix } => {
                let Some([pre, suf, mid]) = vocab.infill else {
                    return Err(EngineError::invalid(
                        "suffix",
                        "this model has no infill tokens, so suffix cannot be used; leave it out",
                    ));
                };
                self.check_length(prefix)?;
                self.check_length(suffix)?;
                let mut tokens: Vec<_> = vocab.bos.into_iter().collect();
                tokens.push(pre);
                tokens.extend(self.tokenizer.encode(prefix, false, false));
                tokens.push(suf);
                tokens.extend(self.tokenizer.encode(suffix, false, false));
                tokens.push(mid);
                tokens
            }
        };
        if tokens.is_empty() {
            // A model cannot continue an empty prompt: use the BOS token instead.
            tokens.extend(vocab.bos.or(vocab.eos));
        }
        if tokens.is_empty() {
            return Err(EngineError::invalid("prompt", "the prompt is empty; give some text"));
        }
        Ok(tokens)
    }

    /// Tokenizes an input to be embedded or scored.
    fn pooled_tokens(&self, input: &Prompt) -> Result<Vec<Token>, EngineError> {
        let tokens = self
            .prompt_tokens(input, Use::Pool)
            .map_err(|error| EngineError { param: error.param.map(|_| "input".into()), ..error })?;
        let limit = self.info.pooled_length as usize;
        if tokens.len() > limit {
            let message = format!(
                "inputs of this model may have {limit} tokens, but one has {}; shorten it",
                tokens.len()
            );
            return Err(EngineError { param: Some("input".into()), ..context_error(message) });
        }
        Ok(tokens)
    }

    /// Rejects a text that cannot fit even if every token were the longest, before tokenizing it.
    fn check_length(&self, text: &str) -> Result<(), EngineError> {
        let limit = self.info.context_length as usize;
        let least = text.len() / self.longest_piece;
        if least > limit {
            return Err(context_error(format!(
                "this model's maximum context length is {limit} tokens, but the prompt of {} \
                 bytes has at least {least} tokens; shorten it",
                text.len()
            )));
        }
        Ok(())
    }

    /// Most tokens that may be generated after a prompt of `prompt` tokens.
    fn room(&self, prompt: usize, wanted: Option<u32>) -> Result<usize, EngineError> {
        let limit = self.info.context_length as usize;
        let room = limit.saturating_sub(prompt);
        match wanted.map(|wanted| wanted as usize) {
            Some(wanted) if prompt.saturating_add(wanted) > limit => Err(context_error(format!(
                "this model's maximum context length is {limit} tokens, but {} were requested \
                 ({prompt} in the prompt, {wanted} for the completion); shorten the prompt or \
                 lower max_tokens",
                prompt.saturating_add(wanted)
            ))),
            None if room == 0 => Err(context_error(format!(
                "this model's maximum context length is {limit} tokens, but the prompt has \
                 {prompt} tokens, which leaves none for the completion; shorten it"
            ))),
            wanted => Ok(wanted.unwrap_or(room)),
        }
    }

    fn check_ids(&self, tokens: &[Token], param: &str) -> Result<(), EngineError> {
        let size = self.tokenizer.vocab().len();
        match tokens.iter().find(|&&token| token as usize >= size) {
            None => Ok(()),
            Some(token) => Err(EngineError::invalid(
                param,
                format!("token id {token} is not in the vocabulary, which has {size} tokens"),
            )),
        }
    }
}

fn context_error(message: String) -> EngineError {
    EngineError { kind: EngineErrorKind::ContextLength, message, param: Some("prompt".to_owned()) }
}
