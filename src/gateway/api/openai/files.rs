//! `/v1/files`: input files and result files of jobs.
//!
//! Source: OpenAI's API reference, "Files". A key sees its own files; the admin key sees all.

use crate::gateway::api::wire::form::{self, next_chunk, next_field, skip, text};
use crate::gateway::api::wire::query;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::jobs::new_id;
use crate::gateway::registry::work_folder;
use crate::gateway::store::{StoredFile, hex};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::Field;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Maximum size of a file in bytes, as at OpenAI.
const MAX_FILE: u64 = 512 << 20;
/// Maximum number of parts of a form.
const MAX_PARTS: usize = 16;
/// Purposes for which clients may upload files.
const PURPOSES: [&str; 2] = ["fine-tune", "batch"];
const CHUNK: usize = 256 << 10;

type Answer = Result<Json<Value>, ApiError>;

/// Query parameters that select a page of a list.
#[derive(Debug, Deserialize)]
pub struct Page {
    pub after: Option<String>,
    pub limit: Option<usize>,
    purpose: Option<String>,
    order: Option<String>,
}

impl Page {
    /// The page of `all` after the entry with the id `after`, and whether more entries follow.
    pub(in crate::gateway::api) fn cut<T>(
        &self,
        all: Vec<T>,
        id: impl Fn(&T) -> &str,
        most: usize,
    ) -> Result<(Vec<T>, bool), ApiError> {
        let limit = self.limit.unwrap_or(most.min(20));
        if !(1..=most).contains(&limit) {
            let message = format!("limit must lie between 1 and {most}.");
            return Err(ApiError::invalid("limit", message));
        }
        let start = match &self.after {
            None => 0,
            Some(after) => {
                all.iter().position(|entry| id(entry) == after).map(|at| at + 1).ok_or_else(
                    || ApiError::invalid("after", "after must be the id of an entry of this list."),
                )?
            }
        };
        let more = all.len() > start + limit;
        Ok((all.into_iter().skip(start).take(limit).collect(), more))
    }
}

/// A list in the form that OpenAI's clients use for paging.
pub(in crate::gateway::api) fn listed(data: Vec<Value>, more: bool) -> Json<Value> {
    let id = |entry: Option<&Value>| entry.map_or(Value::Null, |entry| entry["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    Json(json!({
        "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more,
    }))
}

/// Owner whose entries a request may see; `None` means the entries of all owners.
pub(in crate::gateway::api) fn seen_by(app: &App, identity: Identity) -> Option<String> {
    (!identity.admin).then(|| app.auth.owner(identity))
}

/// `POST /v1/files`: a form with `purpose` and `file`.
///
/// # Errors
/// 400 for an invalid form, 413 if the file is larger than 512 MB, 507 if the disk is full.
pub async fn upload(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    request: Request,
) -> Answer {
    if !form::is_form(&request) {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            "Send multipart/form-data with the fields `purpose` and `file`.",
        ));
    }
    let mut form = form::open(request).await?;
    let patience = app.config.listen.body_timeout;
    let (mut purpose, mut upload) = (None, None);
    for _ in 0..MAX_PARTS {
        let Some(field) = next_field(&mut form, patience).await? else { break };
        match field.name() {
            Some("purpose") => purpose = Some(checked_purpose(text(field, patience).await?)?),
            Some("file") => upload = Some(Upload::receive(&app, field, patience).await?),
            Some(name) if name.starts_with("expires_after") => {
                let message = "expires_after is not supported: files stay until they are deleted.";
                return Err(ApiError::invalid("expires_after", message));
            }
            _ => skip(field, patience).await?,
        }
    }
    let missing = |name: &str| {
        ApiError::invalid(name, format!("The form must have the field `{name}`."))
            .with_code("missing_required_parameter")
    };
    let purpose = purpose.ok_or_else(|| missing("purpose"))?;
    let upload = upload.ok_or_else(|| missing("file"))?;
    if upload.bytes == 0 {
        return Err(ApiError::invalid("file", "The file is empty."));
    }
    let owner = app.auth.owner(identity);
    let kept = move || upload.keep(&app, purpose, owner);
    let file = tokio::task::spawn_blocking(kept).await.map_err(ApiError::internal)??;
    Ok(Json(show(&file)))
}

fn checked_purpose(purpose: String) -> Result<String, ApiError> {
    match PURPOSES.contains(&purpose.as_str()) {
        true => Ok(purpose),
        false => Err(ApiError::invalid(
            "purpose",
            format!("purpose must be one of {}, not `{purpose}`.", PURPOSES.join(", ")),
        )),
    }
}

/// A file upload in progress; dropping it removes the file unless it was kept.
struct Upload {
    path: PathBuf,
    name: String,
    bytes: u64,
    digest: Sha256,
}

impl Drop for Upload {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Upload {
    async fn receive(
        app: &App,
        mut field: Field<'_>,
        patience: Duration,
    ) -> Result<Self, ApiError> {
        let name = field.file_name().unwrap_or("file").rsplit(['/', '\\']).next();
        let name: String =
            name.unwrap_or("file").chars().filter(|c| !c.is_control()).take(255).collect();
        let folder = work_folder(app.registry.store());
        tokio::fs::create_dir_all(&folder).await.map_err(ApiError::disk)?;
        let path = folder.join(format!("file-{:016x}", rand::random::<u64>()));
        let mut file = tokio::fs::File::create_new(&path).await.map_err(ApiError::disk)?;
        let mut upload = Self { path, name, bytes: 0, digest: Sha256::new() };
        while let Some(chunk) = next_chunk(&mut field, patience).await? {
            upload.bytes += chunk.len() as u64;
            if upload.bytes > MAX_FILE {
                let message = format!("A file has at most {} MiB.", MAX_FILE >> 20);
                return Err(ApiError::too_large(message));
            }
            upload.digest.update(&chunk);
            file.write_all(&chunk).await.map_err(ApiError::disk)?;
        }
        file.flush().await.map_err(ApiError::disk)?;
        file.sync_all().await.map_err(ApiError::disk)?;
        Ok(upload)
    }

    /// Stores the bytes first, then the database row of the file. Blocks.
    fn keep(self, app: &App, purpose: String, owner: String) -> Result<StoredFile, ApiError> {
        let store = app.registry.store();
        let id = new_id("file-");
        std::fs::rename(&self.path, store.files_folder().join(&id)).map_err(ApiError::disk)?;
        let file = StoredFile {
            id,
            name: self.name.clone(),
            purpose,
            bytes: self.bytes,
            sha256: hex(&self.digest.clone().finalize()),
            owner,
            created_at: crate::job::now() as i64,
        };
        store.put_file(&file).map_err(ApiError::internal)?;
        Ok(file)
    }
}

/// `GET /v1/files`.
///
/// # Errors
/// 400 for invalid page parameters.
pub async fn list(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    query: Result<Query<Page>, QueryRejection>,
) -> Answer {
    let page = query::read(query)?;
    let owner = seen_by(&app, identity);
    let mut files = app.registry.store().files(owner.as_deref()).map_err(ApiError::internal)?;
    files.retain(|file| page.purpose.as_ref().is_none_or(|purpose| file.purpose == *purpose));
    match page.order.as_deref() {
        None | Some("desc") => {}
        Some("asc") => files.reverse(),
        Some(_) => return Err(ApiError::invalid("order", "order must be asc or desc.")),
    }
    let page = Page { limit: Some(page.limit.unwrap_or(10_000)), ..page };
    let (files, more) = page.cut(files, |file| &file.id, 10_000)?;
    Ok(listed(files.iter().map(show).collect(), more))
}

/// `GET /v1/files/{id}`.
///
/// # Errors
/// 404.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Answer {
    find(&app, identity, &id).map(|file| Json(show(&file)))
}

/// `GET /v1/files/{id}/content`.
///
/// # Errors
/// 404.
pub async fn content(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&app, identity, &id)?;
    download(app.registry.store().files_folder().join(&file.id), &file.name).await
}

/// `DELETE /v1/files/{id}`. Jobs that use the file keep their own hard link or copy.
///
/// # Errors
/// 404.
pub async fn delete(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Answer {
    let file = find(&app, identity, &id)?;
    let store = app.registry.store();
    store.remove_file(&file.id).map_err(ApiError::internal)?;
    let _ = std::fs::remove_file(store.files_folder().join(&file.id));
    Ok(Json(json!({"id": file.id, "object": "file", "deleted": true})))
}

fn find(app: &App, identity: Identity, id: &str) -> Result<StoredFile, ApiError> {
    let owner = seen_by(app, identity);
    let found = app.registry.store().file(id).map_err(ApiError::internal)?;
    found.filter(|file| owner.as_ref().is_none_or(|owner| file.owner == *owner)).ok_or_else(|| {
        let id: String = id.chars().take(100).collect();
        ApiError::not_found(format!("There is no file `{id}`.")).with_param("id")
    })
}

fn show(file: &StoredFile) -> Value {
    json!({
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": null,
    })
}

/// A file as a download, sent in pieces.
///
/// # Errors
/// 404 if the file no longer exists.
pub(in crate::gateway::api) async fn download(
    path: PathBuf,
    name: &str,
) -> Result<Response, ApiError> {
    let gone = |_| ApiError::not_found("The file is not there any more.");
    let file = tokio::fs::File::open(path).await.map_err(gone)?;
    let length = file.metadata().await.map_err(ApiError::internal)?.len();
    let pieces = futures_util::stream::try_unfold(file, async |mut file| {
        let mut piece = vec![0; CHUNK];
        let read = file.read(&mut piece).await?;
        piece.truncate(read);
        std::io::Result::Ok((read > 0).then(|| (Bytes::from(piece), file)))
    });
    let plain: String =
        name.chars().filter(|c| c.is_ascii_graphic() && !"\"\\/".contains(*c)).collect();
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if let Ok(value) = format!("attachment; filename=\"{plain}\"").parse() {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other() {
        let page = |after: Option<&str>, limit| Page {
            after: after.map(str::to_owned),
            limit: Some(limit),
            purpose: None,
            order: None,
        };
        let all = || vec!["a", "b", "c"];
        let cut = |page: Page| page.cut(all(), |entry| entry, 10);
        assert_eq!(cut(page(None, 2)).unwrap(), (vec!["a", "b"], true));
        assert_eq!(cut(page(Some("b"), 2)).unwrap(), (vec!["c"], false));
        assert_eq!(cut(page(Some("c"), 2)).unwrap(), (vec![], false));
        assert_eq!(cut(page(Some("d"), 2)).unwrap_err().param.as_deref(), Some("after"));
        for limit in [0, 11] {
            assert_eq!(cut(page(None, limit)).unwrap_err().param.as_deref(), Some("limit"));
        }
    }

    #[test]
    fn a_list_names_its_ends() {
        let Json(list) = listed(vec![json!({"id": "a"}), json!({"id": "b"})], true);
        assert_eq!((&list["first_id"], &list["last_id"]), (&json!("a"), &json!("b")));
        let Json(none) = listed(vec![], false);
        assert_eq!((&none["first_id"], &none["has_more"]), (&Value::Null, &json!(false)));
    }
}
