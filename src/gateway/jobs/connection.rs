//! The connection of a running job to its gateway. Only the job's process can use it.

use super::Jobs;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{AdapterSpec, AdapterVersion, OfJob, Registry, Served};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Creates the router of a connection. It is injected because the module with the routes depends on
/// this one.
pub type Routes = Arc<dyn Fn(Arc<JobConnection>) -> Router + Send + Sync>;

/// The gateway's side of a job's connection.
pub struct JobConnection {
    pub job: String,
    /// The model that the job trains.
    base: String,
    registry: Arc<Registry>,
    policy: Mutex<Option<Arc<AdapterVersion>>>,
}

impl fmt::Debug for JobConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JobConnection").field(&self.job).finish()
    }
}

impl JobConnection {
    /// Loads an adapter of the job in place of the previous one. Completions that have already
    /// started continue with the previous adapter.
    ///
    /// # Errors
    /// As [`Registry::load_adapter`].
    pub async fn adopt(&self, path: PathBuf) -> Result<(), ApiError> {
        let model = self.registry.find(&self.base).await?.model;
        let name = format!("the policy of {}", self.job);
        let spec = AdapterSpec { name, base: None, path, scale: 1.0, check: false };
        let version = self.registry.private_adapter(&model, spec).await?;
        *super::lock(&self.policy) = Some(version);
        Ok(())
    }

    /// The model with the job's newest adapter.
    ///
    /// # Errors
    /// 404 if the model is no longer loaded.
    pub async fn policy(&self) -> Result<Served, ApiError> {
        let served = self.registry.find(&self.base).await?;
        let adapter = super::lock(&self.policy).clone();
        Ok(Served { adapter, ..served })
    }

    /// Counts running requests of the job, until the returned value is dropped.
    pub fn count(&self, requests: usize) -> OfJob {
        self.registry.count_of_job(requests)
    }
}

impl Jobs {
    /// Serves a new connection for a job, and returns the end of the socket for the job process.
    pub(super) fn link(&self, job: &str, base: String) -> std::io::Result<Option<OwnedFd>> {
        let Some(routes) = self.routes.get() else { return Ok(None) };
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = tokio::net::UnixStream::from_std(ours)?;
        let (job, registry) = (job.to_owned(), self.registry.clone());
        let link = Arc::new(JobConnection { job, base, registry, policy: Mutex::default() });
        let service = TowerToHyperService::new(routes(link));
        tokio::spawn(async move {
            let served = http1::Builder::new().serve_connection(TokioIo::new(ours), service);
            if let Err(error) = served.await {
                tracing::debug!("a job's connection ended: {error}");
            }
        });
        Ok(Some(theirs.into()))
    }
}
