//! Models of other servers, which the operator has configured (`--remote-model`). The graders and
//! judges of the operator's jobs may ask them; they are not served.

use super::error::ApiError;
use crate::config::RemoteModel;
use http::StatusCode;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of bytes of a response.
const MOST_BYTES: u64 = 1 << 20;
/// Maximum number of letters of another server's error message.
const MOST_LETTERS: usize = 300;

/// The models, and the HTTP client that reaches them.
#[derive(Debug, Clone)]
pub struct RemoteModels {
    agent: Agent,
    models: Arc<[RemoteModel]>,
}

impl RemoteModels {
    /// `timeout`: for a request as a whole.
    pub fn new(models: &[RemoteModel], timeout: Duration) -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // A key must not follow a redirect to another server.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(timeout))
            .tls_config(tls)
            .user_agent(concat!("ingot/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self { agent, models: models.into() }
    }

    /// The model of a name.
    pub fn find(&self, name: &str) -> Option<&RemoteModel> {
        self.models.iter().find(|model| model.name == name)
    }

    /// Sends a chat completion request, and returns the response.
    ///
    /// # Errors
    /// 503 if the server cannot be reached, fails, or answers with no JSON; 429 if it is busy; 400
    /// if it refuses the request.
    pub async fn chat(&self, model: &RemoteModel, mut body: Value) -> Result<Value, ApiError> {
        body["model"] = model.model.clone().into();
        let (agent, model) = (self.agent.clone(), model.clone());
        let sent = tokio::task::spawn_blocking(move || send(&agent, &model, &body)).await;
        sent.map_err(ApiError::internal)?
    }
}

fn send(agent: &Agent, model: &RemoteModel, body: &Value) -> Result<Value, ApiError> {
    let RemoteModel { name, url, key, .. } = model;
    let lost = |why: &dyn std::fmt::Display| {
        ApiError::unavailable(format!("The server of the remote model `{name}`: {why}."))
    };
    let mut request = agent
        .post(format!("{}/chat/completions", url.trim_end_matches('/')))
        .header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {}", key.expose()));
    }
    let response = request.send(body.to_string()).map_err(|error| lost(&error))?;
    let status = response.status();
    let limited = response.into_body().into_with_config().limit(MOST_BYTES).read_to_vec();
    let bytes = limited.map_err(|error| lost(&error))?;
    let json: Result<Value, _> = serde_json::from_slice(&bytes);
    if status.is_success() {
        return json.map_err(|error| lost(&format_args!("its answer is no JSON ({error})")));
    }
    let said = json.ok().and_then(|json| Some(json["error"]["message"].as_str()?.to_owned()));
    let mut said = said.unwrap_or_default();
    if let Some(key) = key {
        // A server may repeat the key that it refuses.
        said = said.replace(key.expose(), "…");
    }
    let said: String = said.chars().take(MOST_LETTERS).collect();
    let message = format!("The server of the remote model `{name}` answered {status}: {said}");
    Err(match status {
        StatusCode::TOO_MANY_REQUESTS => ApiError::too_many(message, 1, "remote_model_busy"),
        StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT | StatusCode::TOO_EARLY => {
            ApiError::unavailable(message)
        }
        status if status.is_server_error() => ApiError::unavailable(message),
        _ => ApiError::bad_request(message),
    })
}
