//! State that all request handlers share.

use crate::config::ServeConfig;
use crate::gateway::auth::Auth;
use crate::gateway::jobs::{JobConnection, Jobs};
use crate::gateway::lifecycle::Lifecycle;
use crate::gateway::metrics::Metrics;
use crate::gateway::registry::Registry;
use crate::gateway::remote::RemoteModels;
use std::sync::Arc;
use tokio::sync::mpsc::UnboundedSender;

/// Shared state of the routes, extracted as `axum::extract::State<Arc<App>>`.
#[derive(Debug)]
pub struct App {
    pub config: Arc<ServeConfig>,
    pub registry: Arc<Registry>,
    pub jobs: Arc<Jobs>,
    pub metrics: Arc<Metrics>,
    pub auth: Auth,
    pub life: Lifecycle,
    /// Models of other servers.
    pub remote_models: RemoteModels,
}

impl App {
    /// Creates everything except the listener and the models.
    ///
    /// The connections of jobs are sent to `connections`.
    pub fn new(
        config: Arc<ServeConfig>,
        registry: Arc<Registry>,
        connections: UnboundedSender<JobConnection>,
    ) -> Arc<Self> {
        Arc::new(Self {
            auth: Auth::new(&config.keys),
            metrics: Arc::new(Metrics::new()),
            life: Lifecycle::default(),
            remote_models: RemoteModels::new(
                &config.jobs.remote_models,
                config.limits.request_timeout,
            ),
            jobs: Jobs::new(config.clone(), registry.clone(), connections),
            registry,
            config,
        })
    }
}

/// Request ID, as returned in `x-request-id`. Every request carries it in its extensions.
#[derive(Debug, Clone)]
pub struct RequestTag(pub Arc<str>);
