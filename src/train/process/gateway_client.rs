//! A job's connection to the gateway that started it: the process's standard output is a socket.
//!
//! The socket is connected, not listening, so no other process can connect and no key is needed.

use crate::grade::{Answer, Failed, Question};
use crate::job::rollout::{ANSWERS, POLICY, ROLLOUTS, Rollout, RolloutRequest};
use crate::train::rollout::{RolloutClient, RolloutError};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use tokio::runtime::Runtime;

/// The connection to the gateway.
pub(super) struct GatewayClient {
    runtime: Runtime,
    requests: SendRequest<Full<Bytes>>,
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
        let stream = UnixStream::from(output);
        stream.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("link")
            .enable_all()
            .build()?;
        let requests = runtime.block_on(async {
            let stream = TokioIo::new(tokio::net::UnixStream::from_std(stream)?);
            let (requests, connection) = handshake(stream).await.map_err(io::Error::other)?;
            tokio::spawn(connection);
            Ok::<_, io::Error>(requests)
        })?;
        Ok(Some(Self { runtime, requests }))
    }

    fn post<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, RolloutError> {
        let lost = |error: &dyn std::fmt::Display| RolloutError {
            passing: false,
            message: format!("the connection to the server was lost: {error}"),
        };
        let body = rmp_serde::to_vec_named(body).map_err(|error| lost(&error))?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(http::header::HOST, "job")
            .header(http::header::CONTENT_TYPE, "application/msgpack")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| lost(&error))?;
        let requests = &mut self.requests;
        let (status, body) = self.runtime.block_on(async {
            let lost = |error: hyper::Error| lost(&error);
            requests.ready().await.map_err(lost)?;
            let answer = requests.send_request(request).await.map_err(lost)?;
            let status = answer.status();
            let body = answer.into_body().collect().await.map_err(lost)?.to_bytes();
            Ok::<_, RolloutError>((status, body))
        })?;
        if !status.is_success() {
            let error: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            let message = error["error"]["message"].as_str().unwrap_or("no reason is known");
            let passing = matches!(
                status,
                StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::INTERNAL_SERVER_ERROR
                    | StatusCode::GATEWAY_TIMEOUT
            );
            return Err(RolloutError { passing, message: format!("{status}: {message}") });
        }
        rmp_serde::from_slice(&body).map_err(|error| lost(&error))
    }
}

impl RolloutClient for GatewayClient {
    fn load_policy(&mut self, adapter: &Path) -> Result<(), RolloutError> {
        self.post(POLICY, &adapter)
    }

    fn generate(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, RolloutError> {
        self.post(ROLLOUTS, what)
    }

    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, RolloutError> {
        match questions {
            [] => Ok(Vec::new()),
            questions => self.post(ANSWERS, &questions),
        }
    }
}
