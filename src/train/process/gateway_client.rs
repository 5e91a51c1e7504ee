//! A job's connection to the gateway that started it: the process's standard output is a socket.
//!
//! The socket is connected, not listening, so no other process can connect and no key is needed.

use crate::grade::{Answer, Failed, Question};
use crate::ipc::{FrameError, read_frame, write_frame};
use crate::job::rollout::{Call, CallCause, CallError, Reply, Rollout, RolloutRequest};
use crate::train::rollout::RolloutClient;
use std::io::{self, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The connection to the gateway.
pub(super) struct GatewayClient {
    socket: BufReader<UnixStream>,
}

impl GatewayClient {
    /// Opens the connection. `None` if the job was started without a gateway.
    ///
    /// # Errors
    /// If the connection cannot be used.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        let ty = rustix::fs::fstat(&output).map(|found| found.st_mode)?;
        if rustix::fs::FileType::from_raw_mode(ty) != rustix::fs::FileType::Socket {
            return Ok(None);
        }
        Ok(Some(Self { socket: BufReader::new(UnixStream::from(output)) }))
    }

    fn send(&mut self, call: &Call) -> Result<(), CallError> {
        write_frame(self.socket.get_mut(), call).map_err(|error| lost(&error))
    }

    /// The next reply; a failed call is an error.
    fn reply(&mut self) -> Result<Reply, CallError> {
        match read_frame(&mut self.socket).map_err(|error| lost(&error))? {
            Reply::Failed(error) => Err(error),
            reply => Ok(reply),
        }
    }
}

fn lost(error: &FrameError) -> CallError {
    let cause = match error {
        FrameError::Closed | FrameError::Io(_) => CallCause::Disconnected,
        FrameError::TooLarge(_) | FrameError::Encode(_) | FrameError::Decode(_) => {
            CallCause::Refused
        }
    };
    CallError { cause, message: format!("the connection to the server was lost: {error}") }
}

fn unexpected() -> CallError {
    let message = "the server sent a reply that does not belong to the call".into();
    CallError { cause: CallCause::Refused, message }
}

impl RolloutClient for GatewayClient {
    fn load_policy(&mut self, adapter: &Path) -> Result<(), CallError> {
        self.send(&Call::LoadPolicy(adapter.to_owned()))?;
        match self.reply()? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    fn start(&mut self, what: &RolloutRequest) -> Result<(), CallError> {
        self.send(&Call::Generate(what.clone()))
    }

    fn collect(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, CallError> {
        let mut found = vec![Vec::new(); what.prompts.len()];
        loop {
            match self.reply()? {
                Reply::Rollouts { prompt, completions } if prompt < found.len() => {
                    found[prompt] = completions;
                }
                Reply::Done => return Ok(found),
                _ => return Err(unexpected()),
            }
        }
    }

    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, CallError> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        self.send(&Call::QueryGraders(questions.to_vec()))?;
        match self.reply()? {
            Reply::Answers(answers) => Ok(answers),
            _ => Err(unexpected()),
        }
    }
}
