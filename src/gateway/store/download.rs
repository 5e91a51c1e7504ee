//! Download of one file over HTTP: resumed by range, checked by SHA-256.
//!
//! Received bytes are kept in `<key>.part`. A lost connection, a stopped process or a reboot loses
//! at most the bytes that were not written yet.

use super::hex;
use super::pull::{PullError, PullEvent, io_error};
use crate::config::Secret;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit between two reads of a body, and between a request and the headers of its response.
const SILENCE: Duration = Duration::from_secs(30);
/// Number of consecutive attempts without a received byte after which the download fails.
const FRUITLESS_TRIES: u32 = 4;

/// Location and expected properties of a file.
#[derive(Debug, Clone)]
pub(super) struct Remote {
    pub url: String,
    pub token: Option<Secret>,
    /// Lower-case hexadecimal; `None` accepts any content that the hub sends.
    pub sha256: Option<String>,
    pub bytes: Option<u64>,
    /// Name of the file in messages.
    pub what: String,
}

/// HTTP downloader. `patient` retries a server that cannot be reached.
pub(super) struct Downloader {
    agent: Agent,
    patient: bool,
    /// The pause before the first retry; it doubles with every retry.
    pause: Duration,
}

impl Downloader {
    pub(super) fn new(patient: bool) -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects_will_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .tls_config(tls)
            .user_agent(concat!("ingot/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let pause = Duration::from_millis(if cfg!(test) { 10 } else { 1_000 });
        Self { agent, patient, pause }
    }

    /// Requests the headers of the file and sets its digest and size.
    ///
    /// The hub responds with a redirect to the storage server. The digest of a large file is in
    /// that first response (`x-linked-etag`), so redirects are followed by hand, on one host only.
    pub(super) fn describe(&self, remote: &mut Remote) -> Result<(), PullError> {
        let mut url = remote.url.clone();
        for _ in 0..5 {
            let response = self.send("HEAD", &url, remote, 0)?;
            let headers = response.headers();
            if let Some(sha256) = linked_digest(headers) {
                if remote.sha256.as_ref().is_some_and(|expected| *expected != sha256) {
                    return Err(PullError::OtherFile { what: remote.what.clone() });
                }
                remote.sha256 = Some(sha256);
                remote.bytes = number(headers, "x-linked-size").or(remote.bytes);
                return Ok(());
            }
            let location = headers.get("location").and_then(|value| value.to_str().ok());
            match location {
                // Follow only redirects within the hub; any other redirect leads to the storage
                // server.
                Some(path) if response.status().is_redirection() && path.starts_with('/') => {
                    let host_end = url.find("://").map_or(0, |at| at + 3);
                    let end = url[host_end..].find('/').map_or(url.len(), |at| host_end + at);
                    url = format!("{}{path}", &url[..end]);
                }
                _ => {
                    if response.status().is_success() {
                        remote.bytes = number(headers, "content-length").or(remote.bytes);
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Downloads into `part` and resumes an earlier attempt. Returns the SHA-256.
    pub(super) fn fetch(
        &self,
        remote: &Remote,
        part: &Path,
        events: &mut dyn FnMut(PullEvent),
    ) -> Result<String, PullError> {
        let mut file = Part::open(part)?;
        events(PullEvent::Start { total: remote.bytes, done: file.len });
        let mut fruitless = 0;
        let resumed = file.len > 0;
        while remote.bytes.is_none_or(|bytes| file.len < bytes) {
            let before = file.len;
            match self.fetch_once(remote, &mut file, events) {
                Ok(()) => break,
                Err(error) if !error.is_passing() || (!self.patient && file.len == 0) => {
                    return Err(error);
                }
                Err(error) => {
                    fruitless = if file.len > before { 0 } else { fruitless + 1 };
                    if fruitless >= FRUITLESS_TRIES {
                        return Err(error);
                    }
                    events(PullEvent::Note(format!("{error} Trying again.")));
                    std::thread::sleep(self.pause * 2u32.pow(fruitless));
                }
            }
        }
        let found = file.finish(part)?;
        match &remote.sha256 {
            Some(expected) if *expected != found => {
                let _ = std::fs::remove_file(part);
                if resumed {
                    // The bytes of the earlier attempt may be damaged: retry once from the start.
                    events(PullEvent::Note("The resumed file is damaged: starting over.".into()));
                    return self.fetch(remote, part, events);
                }
                let what = remote.what.clone();
                Err(PullError::Checksum { what, expected: expected.clone(), found })
            }
            _ => Ok(found),
        }
    }

    fn fetch_once(
        &self,
        remote: &Remote,
        file: &mut Part,
        events: &mut dyn FnMut(PullEvent),
    ) -> Result<(), PullError> {
        let response = self.send("GET", &remote.url, remote, file.len)?;
        let resumes = response.status() == StatusCode::PARTIAL_CONTENT
            && range_start(response.headers()) == Some(file.len);
        if !resumes {
            // The server does not support ranges, or sent another range than requested.
            file.restart()?;
            events(PullEvent::Start { total: remote.bytes, done: 0 });
            if response.status() != StatusCode::OK {
                return Err(remote.unreachable("it ignores the range that was asked for"));
            }
        }
        let declared = number(response.headers(), "content-length").map(|n| n + file.len);
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) => return Err(remote.unreachable(error)),
            };
            if remote.bytes.is_some_and(|bytes| file.len + count as u64 > bytes) {
                file.restart()?;
                return Err(PullError::OtherFile { what: remote.what.clone() });
            }
            file.write(&buffer[..count])?;
            events(PullEvent::Bytes(count as u64));
        }
        match remote.bytes.or(declared) {
            Some(expected) if file.len < expected => {
                Err(remote.unreachable("the connection was cut"))
            }
            _ => Ok(()),
        }
    }

    fn send(
        &self,
        method: &str,
        url: &str,
        remote: &Remote,
        from: u64,
    ) -> Result<Response<Body>, PullError> {
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        if let Some(token) = &remote.token {
            request = request.header("authorization", format!("Bearer {}", token.expose()));
        }
        // Compressed transfers would make ranges and sizes wrong.
        request = request.header("accept-encoding", "identity");
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let request = request.body(()).map_err(|error| PullError::BadAddress {
            url: url.to_owned(),
            error: error.to_string(),
        })?;
        let redirects = if method == "HEAD" { 0 } else { 10 };
        let request = self.agent.configure_request(request).max_redirects(redirects).build();
        let response = self.agent.run(request).map_err(|error| remote.unreachable(error))?;
        match response.status() {
            status if status.is_success() || (method == "HEAD" && status.is_redirection()) => {
                Ok(response)
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            StatusCode::NOT_FOUND => Err(PullError::NotFound { what: remote.what.clone() }),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(PullError::Denied {
                what: remote.what.clone(),
                advice: match remote.token {
                    None => "set HF_TOKEN to a token that may read it",
                    Some(_) => "the token in HF_TOKEN may not read it",
                },
            }),
            status if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
                Err(PullError::Refused { what: remote.what.clone(), status: status.as_u16() })
            }
            status => Err(remote.unreachable(format_args!("it answers {status}"))),
        }
    }
}

impl Remote {
    fn unreachable(&self, reason: impl std::fmt::Display) -> PullError {
        PullError::Unreachable { what: self.what.clone(), reason: reason.to_string() }
    }
}

/// The partial file, with the digest of its bytes so far.
pub(super) struct Part {
    file: File,
    hasher: Sha256,
    pub len: u64,
}

impl Part {
    /// Opens or creates the file, and hashes the bytes of an earlier attempt.
    pub(super) fn open(path: &Path) -> Result<Self, PullError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io_error("write", path))?;
        let mut part = Self { file, hasher: Sha256::new(), len: 0 };
        let mut buffer = vec![0; 1 << 18];
        loop {
            let count = part.file.read(&mut buffer).map_err(io_error("read", path))?;
            if count == 0 {
                return Ok(part);
            }
            part.hasher.update(&buffer[..count]);
            part.len += count as u64;
        }
    }

    pub(super) fn restart(&mut self) -> Result<(), PullError> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(write_error)?;
        self.hasher = Sha256::new();
        self.len = 0;
        Ok(())
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), PullError> {
        self.file.write_all(bytes).map_err(write_error)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Syncs the file to disk; returns the SHA-256.
    pub(super) fn finish(self, path: &Path) -> Result<String, PullError> {
        self.file.sync_all().map_err(io_error("write", path))?;
        Ok(hex(&self.hasher.finalize()))
    }
}

fn write_error(source: std::io::Error) -> PullError {
    PullError::Io { action: "write", path: "the download".into(), source }
}

/// The SHA-256 that the hub sends for a large file; small files have a Git digest instead.
fn linked_digest(headers: &HeaderMap) -> Option<String> {
    ["x-linked-etag", "etag"].iter().find_map(|name| {
        let value = headers.get(*name)?.to_str().ok()?;
        let value = value.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        (value.len() == 64 && value.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(value)
    })
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// The first byte position in `content-range: bytes 5-9/10`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get("content-range")?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
