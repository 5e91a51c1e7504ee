//! Loads the models and adapters of the command line and prints messages about them.

use super::ServeError;
use crate::config::{AdapterArg, ByteSize};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{AdapterSpec, Model};
use crate::gateway::store::{
    self, DEFAULT_MODEL, ModelRef, PullError, PullEvent, PulledModel, Store,
};
use crate::ipc::RunnerKind;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

/// Fetches and loads the models of the command line in order, then the adapters. The draft model
/// belongs to the first model.
pub(super) async fn load_all(app: &Arc<App>) -> Result<(), ServeError> {
    let mock = app.config.engine.runner == Some(RunnerKind::Mock);
    let default = if mock { "mock" } else { DEFAULT_MODEL };
    let mut wanted = app.config.models.clone();
    if wanted.is_empty() {
        wanted.push(default.to_owned());
    }
    let mut draft = match &app.config.draft_model {
        Some(reference) => Some(find(app, reference, mock).await?.1),
        None => None,
    };
    let mut first = None;
    for reference in &wanted {
        let (name, path) = find(app, reference, mock).await?;
        let failed = |error: ApiError| ServeError::Model {
            reason: match app.registry.is_published(&name) {
                true => published_name(&name),
                false => error.message,
            },
            name: name.clone(),
        };
        let model = app.registry.load_path(&name, path, draft.take()).await.map_err(failed)?;
        app.registry.note_command_line(&model.name);
        say(&describe(&model));
        first.get_or_insert_with(|| model.name.clone());
    }
    for adapter in &app.config.adapters {
        load_adapter(app, adapter, first.clone()).await?;
    }
    app.registry.load_published().await;
    Ok(())
}

/// Why a model cannot be loaded that has the name of a published one.
fn published_name(name: &str) -> String {
    format!(
        "`{name}` is a published name of this data folder, which no model may have: serve the file \
         under another file name, or start the server without this model and remove the published \
         name with `DELETE /admin/published/{name}`."
    )
}

/// Name and file of a model.
async fn find(
    app: &Arc<App>,
    reference: &str,
    mock: bool,
) -> Result<(String, PathBuf), ServeError> {
    Ok(match locate(app, reference, mock).await? {
        Some(found) => (found.name, found.path),
        None => (reference.to_owned(), PathBuf::from(reference)),
    })
}

/// The file of a reference, downloaded if necessary. `None`: the mock runner needs no file.
async fn locate(
    app: &Arc<App>,
    reference: &str,
    mock: bool,
) -> Result<Option<PulledModel>, ServeError> {
    let parsed = ModelRef::parse(reference)?;
    if mock && !matches!(&parsed, ModelRef::File(path) if path.is_file()) {
        return Ok(None);
    }
    let (store, hub) = (app.registry.store().clone(), app.config.hub.clone());
    let pulled = tokio::task::spawn_blocking(move || ensure(&store, &parsed, &hub)).await;
    match pulled {
        Ok(pulled) => Ok(Some(pulled?)),
        Err(error) => Err(ServeError::Runtime(std::io::Error::other(error))),
    }
}

/// As [`store::ensure`], with a progress bar on the terminal.
fn ensure(
    store: &Store,
    reference: &ModelRef,
    hub: &crate::config::HubAccess,
) -> Result<PulledModel, PullError> {
    let bar = ProgressBar::no_length();
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_message(reference.to_string());
    let mut show = |event| match event {
        PullEvent::Start { total, done } => {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
        }
        PullEvent::Bytes(bytes) => bar.inc(bytes),
        PullEvent::Note(note) => tracing::info!("{note}"),
    };
    let pulled = store::ensure(store, reference, hub, &mut show);
    bar.finish_and_clear();
    pulled
}

async fn load_adapter(
    app: &Arc<App>,
    adapter: &AdapterArg,
    base: Option<String>,
) -> Result<(), ServeError> {
    let spec = AdapterSpec {
        name: adapter.name.clone(),
        base,
        path: adapter.path.clone(),
        scale: 1.0,
        check: false,
    };
    let loaded = app.registry.load_adapter(spec).await.map_err(|error| ServeError::Adapter {
        name: adapter.name.clone(),
        reason: error.message,
    })?;
    app.registry.note_command_line(&loaded.name);
    say(&format!("adapter {} for {}", loaded.name, loaded.base()));
    Ok(())
}

fn describe(model: &Model) -> String {
    let facts = &model.facts;
    format!(
        "model {}: {}, {:.1}M parameters, {}, {}\n{}",
        model.name,
        facts.architecture,
        facts.parameters as f64 / 1e6,
        facts.quantization,
        ByteSize(facts.weights_bytes),
        model.plan.to_string().trim_end()
    )
}

/// Prints the address, in a line that scripts parse, and an example command.
pub(super) fn announce(app: &App, address: SocketAddr) {
    say(&format!("listening on http://{address}"));
    let mut near = address;
    if address.ip().is_unspecified() {
        near.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let Some(card) = app.registry.list().into_iter().next() else { return };
    let generates = app
        .registry
        .resolve(&card.id)
        .and_then(|served| Ok(served.model.engine.info()?))
        .is_ok_and(|info| info.can_generate);
    let (route, input) = match generates {
        true => ("chat/completions", r#""messages": [{"role": "user", "content": "Hello!"}]"#),
        false => ("embeddings", r#""input": "Hello!""#),
    };
    let key = match app.config.keys.api_keys.is_empty() {
        true => "",
        false => " -H \"Authorization: Bearer $INGOT_API_KEY\"",
    };
    let model = serde_json::Value::from(card.id.replace('\'', "'\\''"));
    say(&format!(
        "curl http://{near}/v1/{route}{key} -H 'Content-Type: application/json' -d '{{\"model\": \
         {model}, {input}}}'"
    ));
}

/// Writes a line to standard output; errors are ignored, because it may be closed.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
