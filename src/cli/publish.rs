//! `ingot publish` and `ingot rollback`: what a name stands for on a server.

use super::CliError;
use super::http::Server;
use super::train::remote::say;
use crate::config::Secret;
use hyper::Method;
use serde_json::{Value, json};
use std::process::ExitCode;

/// The server whose names are changed.
#[derive(Debug, clap::Args)]
pub struct ServerOptions {
    /// The server
    #[arg(long, env = "INGOT_URL", default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Its admin key
    #[arg(long, env = "INGOT_ADMIN_KEY", hide_env_values = true)]
    pub admin_key: Option<Secret>,
}

/// Options of `ingot publish`.
#[derive(Debug, clap::Args)]
pub struct PublishOptions {
    /// The name that clients use; without it, all published names are listed
    #[arg(value_name = "NAME", requires = "model")]
    pub name: Option<String>,
    /// The model or adapter that serves it from now on
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,
    /// Only a share of the requests, such as 5%
    #[arg(long, value_name = "SHARE", value_parser = share, requires = "model")]
    pub share: Option<f64>,
    /// Only if this evaluation job kept all bounds
    #[arg(long, value_name = "JOB", requires = "model")]
    pub evaluation: Option<String>,
    #[command(flatten)]
    pub server: ServerOptions,
}

/// Options of `ingot rollback`.
#[derive(Debug, clap::Args)]
pub struct RollbackOptions {
    /// The name that clients use
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub server: ServerOptions,
}

fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = match text.strip_suffix('%') {
        Some(percent) => (percent, 100.0),
        None => (text, 1.0),
    };
    let share = number.trim().parse::<f64>().map(|number| number / unit);
    share
        .ok()
        .filter(|share| *share > 0.0 && *share < 1.0)
        .ok_or_else(|| "it is a share above 0 and below all, such as 5% or 0.05".to_owned())
}

/// Publishes a model, or lists the published names.
///
/// # Errors
/// What the server refuses.
pub fn publish(options: PublishOptions) -> Result<ExitCode, CliError> {
    let (Some(name), Some(model)) = (options.name, options.model) else {
        let listed = ask(options.server, Method::GET, "/admin/published", None)?;
        print!("{}", table(listed["data"].as_array().map_or(&[], Vec::as_slice)));
        return Ok(ExitCode::SUCCESS);
    };
    let body = json!({
        "name": name, "model": model, "share": options.share, "evaluation": options.evaluation,
    });
    let now = ask(options.server, Method::POST, "/admin/published", Some(body))?;
    print!("{}", table(std::slice::from_ref(&now)));
    Ok(ExitCode::SUCCESS)
}

/// Has the model serve a name that served it before.
///
/// # Errors
/// What the server refuses.
pub fn rollback(options: RollbackOptions) -> Result<ExitCode, CliError> {
    let path = format!("/admin/published/{}/rollback", options.name);
    let now = ask(options.server, Method::POST, &path, None)?;
    print!("{}", table(std::slice::from_ref(&now)));
    Ok(ExitCode::SUCCESS)
}

fn ask(
    server: ServerOptions,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Result<Value, CliError> {
    let server = Server::parse(&server.url, server.admin_key).map_err(CliError::Message)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::message(format!("The runtime cannot be started: {error}.")))?;
    let body = body.map(|body| body.to_string().into());
    runtime.block_on(server.json(method, path, body)).map_err(say)
}

fn table(published: &[Value]) -> String {
    let header = ["NAME", "MODEL", "CANDIDATE", "SHARE", "PREVIOUS"].map(str::to_owned);
    let row = |entry: &Value| {
        let text = |key: &str| entry[key].as_str().unwrap_or("-").to_owned();
        let share = entry["share"].as_f64();
        let share = share.map_or_else(|| "-".to_owned(), |share| format!("{:.2}%", 100.0 * share));
        [text("id"), text("model"), text("candidate"), share, text("previous")]
    };
    super::models::align(std::iter::once(header).chain(published.iter().map(row)).collect())
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_are_percent_or_numbers() {
        assert_eq!(share("5%"), Ok(0.05));
        assert_eq!(share("0.25"), Ok(0.25));
        for bad in ["0", "0%", "100%", "1", "-5%", "x", "", "%", "NaN"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }
}
