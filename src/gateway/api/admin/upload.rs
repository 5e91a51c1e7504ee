//! Adapters uploaded as a form: streamed into a folder of this process, loaded from there, and
//! moved into the adapters folder once an engine has loaded them.

use crate::gateway::api::wire::form::{next_chunk, next_field, skip, text};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{AdapterSpec, AdapterVersion, work_folder};
use crate::gateway::store::{Store, StoredAdapter, hex};
use axum::extract::Multipart;
use axum::extract::multipart::Field;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// Maximum number of parts of a form.
const MAX_PARTS: usize = 16;
/// Maximum length of a text field or of `adapter_config.json`, in bytes.
const MAX_TEXT: u64 = 1 << 20;
/// Maximum size of all files together, in bytes.
const MAX_UPLOAD: u64 = 4 << 30;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// File name under which a GGUF adapter is stored, whatever its name in the form.
const GGUF: &str = "adapter.gguf";

/// An adapter upload in progress. Dropping it removes the files unless it was
/// [kept](Upload::keep).
#[derive(Debug)]
pub(in crate::gateway::api) struct Upload {
    folder: PathBuf,
    bytes: u64,
    digest: Sha256,
    files: Vec<&'static str>,
}

impl Drop for Upload {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Reads the whole form.
pub(in crate::gateway::api) async fn receive(
    app: &App,
    mut form: Multipart,
) -> Result<(AdapterSpec, Upload), ApiError> {
    let patience = app.config.listen.body_timeout;
    let mut upload = Upload::new(app.registry.store()).await?;
    let (mut name, mut base, mut scale) = (None, None, 1.0);
    for _ in 0..MAX_PARTS {
        let Some(field) = next_field(&mut form, patience).await? else { break };
        match field.name() {
            Some("name") => name = Some(text(field, patience).await?),
            Some("base") => base = Some(text(field, patience).await?),
            Some("scale") => {
                let number = text(field, patience).await?.parse().ok();
                scale =
                    number.ok_or_else(|| ApiError::invalid("scale", "scale must be a number."))?;
            }
            _ => upload.take(field, patience).await?,
        }
    }
    let name =
        name.ok_or_else(|| ApiError::invalid("name", "The form must have the field `name`."))?;
    upload.check_complete()?;
    let path = upload.folder.clone();
    Ok((AdapterSpec { name, base, path, scale, check: false }, upload))
}

impl Upload {
    async fn new(store: &Store) -> Result<Self, ApiError> {
        let folder = work_folder(store).join(format!("upload-{:016x}", rand::random::<u64>()));
        tokio::fs::create_dir_all(&folder).await.map_err(ApiError::disk)?;
        Ok(Self { folder, bytes: 0, digest: Sha256::new(), files: Vec::new() })
    }

    /// Writes one file of the form, under the name that the file has in an adapter folder.
    async fn take(&mut self, mut field: Field<'_>, patience: Duration) -> Result<(), ApiError> {
        let sent = field.file_name().or(field.name()).unwrap_or_default();
        let (file_name, limit) = match sent.rsplit(['/', '\\']).next().unwrap_or_default() {
            CONFIG => (CONFIG, MAX_TEXT),
            WEIGHTS => (WEIGHTS, MAX_UPLOAD),
            other if other.ends_with(".gguf") => (GGUF, MAX_UPLOAD),
            // `tokenizer.json`, `README.md` and similar files of a PEFT folder have no effect.
            _ => return skip(field, patience).await,
        };
        if self.files.contains(&file_name) {
            return Err(ApiError::bad_request(format!("The form holds two files `{file_name}`.")));
        }
        self.files.push(file_name);
        self.digest.update(file_name.as_bytes());
        let path = self.folder.join(file_name);
        let mut file = tokio::fs::File::create_new(path).await.map_err(ApiError::disk)?;
        let mut size = 0;
        while let Some(chunk) = next_chunk(&mut field, patience).await? {
            size += chunk.len() as u64;
            self.bytes += chunk.len() as u64;
            if size > limit || self.bytes > MAX_UPLOAD {
                let message = format!("`{file_name}` is larger than {limit} bytes.");
                return Err(ApiError::too_large(message));
            }
            self.digest.update(&chunk);
            file.write_all(&chunk).await.map_err(ApiError::disk)?;
        }
        file.sync_all().await.map_err(ApiError::disk)
    }

    fn check_complete(&self) -> Result<(), ApiError> {
        let has = |name| self.files.contains(&name);
        match (has(GGUF), has(CONFIG), has(WEIGHTS)) {
            (true, false, false) | (false, true, true) => Ok(()),
            _ => Err(ApiError::bad_request(format!(
                "The form must hold the files `{CONFIG}` and `{WEIGHTS}`, or one `.gguf`."
            ))),
        }
    }

    /// Moves the files into the adapters folder and lists them in the store, as the adapter `name`.
    /// Blocks.
    pub(in crate::gateway::api) fn keep(
        self,
        store: &Store,
        version: &AdapterVersion,
    ) -> Result<(), ApiError> {
        let sha256 = hex(&self.digest.clone().finalize());
        let folder = format!("upload-{}", &sha256[..16]);
        let target = store.adapters_folder().join(&folder);
        if !target.exists() {
            std::fs::rename(&self.folder, &target).map_err(ApiError::internal)?;
        }
        let before = store.adapter(&version.name).map_err(ApiError::internal)?;
        let adapter = StoredAdapter {
            name: version.name.clone(),
            base_model: version.base().to_owned(),
            file: Path::new("adapters").join(folder),
            format: if self.files.contains(&GGUF) { "gguf" } else { "peft" }.to_owned(),
            sha256,
            bytes: self.bytes,
            scale: version.scale,
            created_at: i64::try_from(version.created).unwrap_or(i64::MAX),
        };
        store.put_adapter(&adapter).map_err(ApiError::internal)?;
        let Some(before) = before.filter(|before| before.file != adapter.file) else {
            return Ok(());
        };
        // The upload that this one replaces, unless another name still refers to it.
        let adapters = store.adapters().map_err(ApiError::internal)?;
        let ours = before
            .file
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("upload-"));
        if ours && !adapters.iter().any(|other| other.file == before.file) {
            let _ = std::fs::remove_dir_all(store.folder().join(before.file));
        }
        Ok(())
    }
}
