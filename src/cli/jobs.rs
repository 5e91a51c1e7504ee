//! `ingot jobs`: a server's jobs.

use super::CliError;
use super::http::Server;
use super::train::remote::{follow, say};
use crate::config::Secret;
use hyper::Method;
use serde_json::Value;
use std::process::ExitCode;

/// Options of `ingot jobs`.
#[derive(Debug, clap::Args)]
pub struct JobsOptions {
    #[command(subcommand)]
    pub what: Option<JobsCommand>,
    /// The server
    #[arg(long, env = "INGOT_URL", default_value = "http://127.0.0.1:8000", global = true)]
    pub url: String,
    /// Its admin key
    #[arg(long, env = "INGOT_ADMIN_KEY", hide_env_values = true, global = true)]
    pub admin_key: Option<Secret>,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub enum JobsCommand {
    /// All jobs, the newest first
    List,
    /// Everything about one, as JSON
    Show { id: String },
    /// Follow a job to its end
    Follow { id: String },
    /// End a job for good
    Cancel { id: String },
    /// Write a checkpoint and leave the cores to others
    Pause { id: String },
    /// Queue a paused job again
    Resume { id: String },
    /// End training after the current step and serve what was learned
    Finish { id: String },
}

/// Asks the server.
pub fn main(options: JobsOptions) -> Result<ExitCode, CliError> {
    let server = Server::parse(&options.url, options.admin_key).map_err(CliError::Message)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::message(format!("The runtime cannot be started: {error}.")))?;
    runtime.block_on(async {
        let ask = async |method: Method, path: String| {
            server.json(method, &path, None).await.map_err(say)
        };
        match options.what.unwrap_or(JobsCommand::List) {
            JobsCommand::List => {
                let jobs = ask(Method::GET, "/admin/jobs?limit=1000".into()).await?;
                print!("{}", table(jobs["data"].as_array().map_or(&[], Vec::as_slice)));
            }
            JobsCommand::Show { id } => {
                let job = ask(Method::GET, format!("/admin/jobs/{id}")).await?;
                println!("{job:#}");
            }
            JobsCommand::Follow { id } => return follow(&server, &id).await,
            JobsCommand::Cancel { id } => tell(&ask(Method::POST, path(&id, "cancel")).await?),
            JobsCommand::Pause { id } => tell(&ask(Method::POST, path(&id, "pause")).await?),
            JobsCommand::Resume { id } => tell(&ask(Method::POST, path(&id, "resume")).await?),
            JobsCommand::Finish { id } => tell(&ask(Method::POST, path(&id, "finish")).await?),
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn path(id: &str, verb: &str) -> String {
    format!("/admin/jobs/{id}/{verb}")
}

fn tell(job: &Value) {
    let text = |key: &str| job[key].as_str().unwrap_or_default().to_owned();
    println!("{} is {}", text("id"), text("status"));
}

fn table(jobs: &[Value]) -> String {
    let header = ["ID", "KIND", "STATUS", "STEP", "LOSS", "NAME"].map(str::to_owned);
    let row = |job: &Value| {
        let text = |key: &str| job[key].as_str().unwrap_or_default().to_owned();
        let progress = &job["progress"];
        let pair = |done: &str, total: &str| {
            Some(format!("{}/{}", progress[done].as_u64()?, progress[total].as_u64()?))
        };
        // Jobs that do not train count other work.
        let step = pair("step", "total_steps").or_else(|| pair("done", "total"));
        let step = step.unwrap_or_else(|| "-".to_owned());
        let loss =
            progress["loss"].as_f64().map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"));
        [text("id"), text("kind"), text("status"), step, loss, text("name")]
    };
    super::models::align(std::iter::once(header).chain(jobs.iter().map(row)).collect())
}
