//! A job on a server: files are uploaded, events are followed.

use super::{Screen, located};
use crate::cli::CliError;
use crate::cli::http::{HttpError, Server, SseLines};
use crate::config::Secret;
use crate::job::Entry;
use crate::job::spec::Spec;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;

const BOUNDARY: &str = "ingot-7c8f1e5b2d9a4036";

pub(super) async fn run(
    url: &str,
    key: Option<Secret>,
    mut spec: Spec,
    beside: &Path,
) -> Result<ExitCode, CliError> {
    let server = Server::parse(url, key).map_err(CliError::Message)?;
    spec.data.train = upload(&server, beside, &spec.data.train).await?;
    if let Some(path) = &spec.data.validation {
        spec.data.validation = Some(upload(&server, beside, path).await?);
    }
    if let Some(path) = &spec.data.human {
        spec.data.human = Some(upload(&server, beside, path).await?);
    }
    let body = serde_json::to_vec(&spec).map_err(|error| CliError::message(error.to_string()))?;
    let job = server.json(Method::POST, "/admin/jobs", Some(body.into())).await.map_err(say)?;
    let id = job["id"].as_str().unwrap_or_default().to_owned();
    eprintln!("{id}  (`ingot jobs pause {id}` and `resume`, `cancel`, `show`)");
    follow(&server, &id).await
}

/// An id of the server stays what it is.
async fn upload(server: &Server, beside: &Path, path: &str) -> Result<String, CliError> {
    if path.starts_with("file-") && !beside.join(path).exists() {
        return Ok(path.to_owned());
    }
    let file = located(beside, path)?;
    let unreadable =
        |error| CliError::message(format!("{} cannot be read: {error}.", file.display()));
    let bytes = std::fs::read(&file).map_err(unreadable)?;
    let name =
        file.file_name().unwrap_or_default().to_string_lossy().replace(['"', '\r', '\n'], "_");
    let head = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n\
         --{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    );
    let body = [head.as_bytes(), &bytes, format!("\r\n--{BOUNDARY}--\r\n").as_bytes()].concat();
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    let body = Some((content_type.as_str(), Bytes::from(body)));
    let answer = server.json_of(Method::POST, "/v1/files", body).await.map_err(say)?;
    Ok(answer["id"].as_str().unwrap_or_default().to_owned())
}

/// Shows a job's events until it has ended.
pub(in crate::cli) async fn follow(server: &Server, id: &str) -> Result<ExitCode, CliError> {
    let mut connection = server.connect().await.map_err(say)?;
    let path = format!("/admin/jobs/{id}/events");
    let response = connection.send(server, Method::GET, &path, None).await.map_err(say)?;
    let (mut body, mut lines) = (response.into_body(), SseLines::default());
    let mut screen = Screen::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| say(HttpError::Lost(error.to_string())))?;
        let Some(data) = frame.data_ref() else { continue };
        lines.feed(data, |line| {
            if let Ok(entry) = serde_json::from_slice::<Entry>(line) {
                screen.show(&entry);
            }
        });
    }
    drop(screen);
    let path = format!("/admin/jobs/{id}");
    let job = server.json(Method::GET, &path, None).await.map_err(say)?;
    match job["status"].as_str().unwrap_or_default() {
        "succeeded" => {
            println!("{}", job["name"].as_str().unwrap_or_default());
            Ok(ExitCode::SUCCESS)
        }
        status => {
            let why = match &job["error"]["message"] {
                Value::String(why) => format!(": {why}"),
                _ => String::new(),
            };
            eprintln!("{id} is {status}{why}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// What went wrong, as a sentence.
pub(in crate::cli) fn say(error: HttpError) -> CliError {
    match error {
        HttpError::Status { status: 404, message } => CliError::message(format!(
            "The server answered 404: {message} Jobs need `ingot serve --admin-key KEY`, and the \
             same key here (--admin-key, INGOT_ADMIN_KEY)."
        )),
        other => CliError::message(format!("{other}.")),
    }
}
