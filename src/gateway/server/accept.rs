//! Accepts connections and serves each in its own task, with limits on number, size and time.

use super::routes::router;
use super::socket::{Socket, bare_response};
use crate::gateway::app::App;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Maximum size of request line and headers together, in bytes; more is a 431.
const MAX_HEADER_BYTES: usize = 32 << 10;
const MAX_HEADERS: usize = 100;
/// Maximum buffer of hyper per connection and direction, in bytes.
const MAX_BUFFER: usize = 64 << 10;
/// Send buffer of the system per connection, in bytes. It is small, so that a slow reader is
/// noticed (and its request paused) after some hundred events, not after megabytes.
const SEND_BUFFER: usize = 64 << 10;

/// The listener and all open connections.
pub(super) struct Connections {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Connections {
    /// Starts accepting connections.
    pub(super) fn start(listener: TcpListener, app: Arc<App>) -> Self {
        let connections = Self { stop: CancellationToken::new(), tasks: TaskTracker::new() };
        let (stop, tasks) = (connections.stop.clone(), connections.tasks.clone());
        connections.tasks.spawn(async move {
            tokio::select! {
                () = accept(listener, app, &stop, &tasks) => {}
                () = stop.cancelled() => {}
            }
        });
        connections
    }

    /// Closes the listener and every connection; responses in progress get `patience` to finish.
    pub(super) async fn stop(self, patience: Duration) {
        self.stop.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(patience, self.tasks.wait()).await;
    }
}

async fn accept(
    listener: TcpListener,
    app: Arc<App>,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) {
    let router = router(app.clone());
    let places = Arc::new(Semaphore::new(app.config.listen.max_connections as usize));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, or the client disconnected already: retry after a pause.
                tracing::warn!("a connection could not be taken: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            app.metrics.rejected("too_many_connections");
            refuse(&stream);
            continue;
        };
        let (router, app, stop) = (router.clone(), app.clone(), stop.clone());
        tasks.spawn(async move {
            serve_connection(stream, router, &app, stop).await;
            drop(place);
        });
    }
}

async fn serve_connection(stream: TcpStream, router: Router, app: &App, stop: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER);
    let socket = Socket::new(stream, app.config.listen.slow_client_timeout);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.config.listen.header_timeout)
        .max_buf_size(MAX_BUFFER)
        .max_header_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended early: {error}");
    }
}

/// Sends a client the error that there are too many connections, without waiting for the client.
fn refuse(stream: &TcpStream) {
    let message = "The server has too many connections open; try again soon.";
    let _ = stream.try_write(&bare_response("503 Service Unavailable", message));
}
