//! Answers the calls of running jobs: sampling completions from the policy that a job trains, and
//! querying grader models. A call and its replies are frames of [`crate::ipc`] with the types of
//! [`crate::job::rollout`].
//!
//! Only the job's process holds the other end of the socket, so a call needs no key.

use super::api::openai::graders::answer;
use super::api::wire::format::response_format;
use super::app::App;
use super::auth::Identity;
use super::error::ApiError;
use super::generate;
use super::jobs::JobConnection;
use super::registry::{AdapterSpec, AdapterVersion, Served};
use crate::grade::{self, Question};
use crate::ipc::{self, FrameError, Generate, GrammarSpec, Prompt, SamplingParams, StopParams};
use crate::job::rollout::{Call, CallCause, CallError, Reply, Rollout, RolloutRequest};
use futures_util::stream::{self, StreamExt};
use http::StatusCode;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::UnboundedReceiver;

/// Priority of a job's requests: below all client requests.
const PRIORITY: i32 = -1;
/// Maximum number of a job's requests that wait in the engine at once, to leave room in the queue
/// for clients.
const AT_ONCE: usize = 16;
/// Code of the error about a prompt that is longer than the context.
const TOO_LONG: &str = "context_length_exceeded";
/// Identity of jobs. No key of the configuration has these numbers, so jobs share prefix-cache
/// entries with no client.
const OF_JOBS: Identity = Identity { key: u64::MAX, tenant: u64::MAX, admin: true };

/// Serves the connections that arrive, each until its job's process exits.
pub async fn serve(app: Arc<App>, mut connections: UnboundedReceiver<JobConnection>) {
    while let Some(connection) = connections.recv().await {
        let JobConnection { job, base, socket } = connection;
        let (read, write) = socket.into_split();
        // Only the operator's jobs may have requests sent to other servers, whatever the names were
        // when the job was created.
        let of_operator = match app.jobs.get(&job, None) {
            Ok(stored) => stored.owner == app.auth.owner(OF_JOBS),
            Err(_) => false,
        };
        let mut calls = Calls { app: app.clone(), job, base, of_operator, policy: None };
        tokio::spawn(async move {
            if let Err(error) = calls.serve(read, write).await {
                tracing::debug!(job = calls.job, "a job's connection ended: {error}");
            }
        });
    }
}

/// A connection of a job.
struct Calls {
    app: Arc<App>,
    job: String,
    /// The model that the job trains.
    base: String,
    /// The job was created with the admin key.
    of_operator: bool,
    /// The job's newest adapter. Requests that have already started continue with theirs.
    policy: Option<Arc<AdapterVersion>>,
}

impl Calls {
    /// Answers one call after another. A call is abandoned when the process exits.
    async fn serve(
        &mut self,
        mut read: OwnedReadHalf,
        mut write: OwnedWriteHalf,
    ) -> Result<(), FrameError> {
        let mut buffer = Vec::new();
        loop {
            let call = ipc::next_frame(&mut read, &mut buffer).await?;
            tokio::select! {
                () = hung_up(&read) => return Err(FrameError::Closed),
                replied = self.reply(call, &mut write) => replied?,
            }
        }
    }

    async fn reply(&mut self, call: Call, write: &mut OwnedWriteHalf) -> Result<(), FrameError> {
        let last = self.answer(call, write).await;
        let last = last.unwrap_or_else(|error| Reply::Failed(failure(&error)));
        send(write, &last).await
    }

    /// The last reply to a call. Earlier ones are written.
    async fn answer(&mut self, call: Call, write: &mut OwnedWriteHalf) -> Result<Reply, ApiError> {
        match call {
            Call::LoadPolicy(path) => {
                self.load_policy(path).await?;
                Ok(Reply::Done)
            }
            Call::Generate(request) => {
                self.generate(request, write).await?;
                Ok(Reply::Done)
            }
            Call::QueryGraders(questions) => {
                let asked = questions.into_iter().map(|question| self.query_grader(question));
                Ok(Reply::Answers(stream::iter(asked).buffered(AT_ONCE).collect().await))
            }
        }
    }

    /// Loads an adapter of the job in place of the previous one.
    async fn load_policy(&mut self, path: PathBuf) -> Result<(), ApiError> {
        let registry = &self.app.registry;
        let model = registry.find(&self.base).await?.model;
        let name = format!("the policy of {}", self.job);
        let spec = AdapterSpec { name, base: None, path, scale: 1.0, check: false };
        self.policy = Some(registry.private_adapter(&model, spec).await?);
        Ok(())
    }

    /// Samples completions. Each prompt's are sent as soon as they are complete.
    async fn generate(
        &self,
        request: RolloutRequest,
        write: &mut OwnedWriteHalf,
    ) -> Result<(), ApiError> {
        let RolloutRequest { prompts, seeds, answers, max_tokens, temperature, .. } = request;
        let skip = request.skip_too_long;
        let grammar = match &request.response_format {
            Some(format) => response_format("response_format", format)?,
            None => None,
        };
        let grammar = grammar.map(|grammar| GrammarSpec { grammar, trigger: None });
        let served = self.app.registry.find(&self.base).await?;
        let served = Served { adapter: self.policy.clone(), ..served };
        let adapter = served.adapter.as_ref().map(|adapter| adapter.id);
        let generate = |prompt: Vec<u32>, seed: u64| Generate {
            choices: answers,
            sampling: SamplingParams { temperature, seed, ..SamplingParams::default() },
            stop: StopParams { max_tokens: Some(max_tokens), ..StopParams::default() },
            logprobs: Some(0),
            grammar: grammar.clone(),
            adapter,
            tenant: OF_JOBS.tenant,
            fair_key: OF_JOBS.key,
            priority: PRIORITY,
            rollout: true,
            ..Generate::plain(0, Prompt::Tokens(prompt))
        };
        let sampled = prompts.into_iter().zip(seeds).enumerate().map(|(number, (prompt, seed))| {
            let (request, served) = (generate(prompt, seed), served.clone());
            async move {
                let _counted = self.app.registry.count_of_job(1);
                let found = generate::completions(&self.app, served, request).await;
                let found = match found {
                    Err(error) if skip && error.code.as_deref() == Some(TOO_LONG) => Vec::new(),
                    found => found?,
                };
                Ok::<(usize, Vec<Rollout>), ApiError>((number, found))
            }
        });
        let mut sampled = stream::iter(sampled).buffer_unordered(AT_ONCE);
        while let Some(found) = sampled.next().await {
            let (prompt, completions) = found?;
            let reply = Reply::Rollouts { prompt, completions };
            send(write, &reply).await.map_err(ApiError::internal)?;
        }
        Ok(())
    }

    async fn query_grader(&self, question: Question) -> Result<grade::Answer, grade::Failed> {
        let _counted = self.app.registry.count_of_job(1);
        let identity = Identity { admin: self.of_operator, ..OF_JOBS };
        answer(&self.app, identity, &question).await
    }
}

async fn send(write: &mut OwnedWriteHalf, reply: &Reply) -> Result<(), FrameError> {
    Ok(write.write_all(&ipc::encode(reply)?).await?)
}

/// Waits until the job's process has exited. The process waits for its replies, so the end of the
/// stream is all that can come.
async fn hung_up(read: &OwnedReadHalf) {
    loop {
        let ready = read.readable().await;
        // A socket can be marked readable although there is nothing to read.
        match ready.and_then(|()| read.try_read(&mut [0])) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// The error as the job sees it.
fn failure(error: &ApiError) -> CallError {
    let passing = matches!(
        error.status,
        StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::GATEWAY_TIMEOUT
            // The model may be loaded again.
            | StatusCode::NOT_FOUND
    );
    let cause = if passing { CallCause::Passing } else { CallCause::Refused };
    CallError { cause, message: format!("{}: {}", error.status, error.message) }
}
