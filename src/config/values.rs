//! Typed values of options: each parses from the command line and from TOML alike.

use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// A key or token. It is never printed: `Debug` is redacted and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The key itself, for the one place that must send it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// SHA-256 of the key: what is compared (in constant time) and kept.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.0.as_bytes()).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl FromStr for Secret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        match text.is_empty() {
            true => Err("a key cannot be empty".to_owned()),
            false => Ok(Self(text.to_owned())),
        }
    }
}

/// A number of bytes: `4GiB`, `512MiB`, `2GB`, or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" | "k" => 1 << 10,
            "mib" | "m" => 1 << 20,
            "gib" | "g" => 1 << 30,
            "tib" | "t" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(format!("`{text}` is not a size; write it as 4GiB or 512MiB")),
        };
        let number: f64 = number
            .parse()
            .map_err(|_| format!("`{text}` is not a size; write it as 4GiB or 512MiB"))?;
        let bytes = number * factor as f64;
        // 2^63 bytes is past every machine; the comparison also refuses NaN.
        if !(0.0..9.0e18).contains(&bytes) {
            return Err(format!("`{text}` is out of range for a size"));
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            n if n < 1 << 10 => write!(f, "{n} B"),
            n if n < 1 << 20 => write!(f, "{:.1} KiB", bytes / 1024.0),
            n if n < 1 << 30 => write!(f, "{:.1} MiB", bytes / (1 << 20) as f64),
            _ => write!(f, "{:.2} GiB", bytes / (1 << 30) as f64),
        }
    }
}

/// A length of time: `10s`, `500ms`, `5m`, `1h`, or a plain number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let seconds = match unit {
            "" | "s" => 1.0,
            "ms" => 1e-3,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(format!("`{text}` is not a time; write it as 30s, 500ms or 5m")),
        };
        let number: f64 = number
            .parse()
            .map_err(|_| format!("`{text}` is not a time; write it as 30s, 500ms or 5m"))?;
        let seconds = number * seconds;
        if !(0.0..=30.0 * 86_400.0).contains(&seconds) {
            return Err(format!("`{text}` must lie between 0 and 30 days"));
        }
        Ok(Self(Duration::from_secs_f64(seconds)))
    }
}

/// Splits `4.5GiB` into `4.5` and `GiB`.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// An adapter to load at the start: the name that requests use, and its file or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterArg {
    pub name: String,
    pub path: PathBuf,
}

impl FromStr for AdapterArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.trim().is_empty() && !path.is_empty() => {
                Ok(Self { name: name.trim().to_owned(), path: PathBuf::from(path) })
            }
            _ => Err(format!("`{text}` is not an adapter; write it as NAME=PATH")),
        }
    }
}

/// A model of another server: the name that jobs use, the server's address up to `/v1`, and the
/// model's name there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteModelArg {
    pub name: String,
    pub url: String,
    pub model: String,
}

impl FromStr for RemoteModelArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=').and_then(|(name, rest)| {
            let (url, model) = rest.split_once('#').unwrap_or((rest, name));
            let is_url = url.starts_with("http://") || url.starts_with("https://");
            let parts = [name.trim(), url.trim(), model.trim()];
            (is_url && parts.iter().all(|part| !part.is_empty())).then_some(parts)
        });
        let [name, url, model] = parts.map(|parts| parts.map(str::to_owned)).ok_or_else(|| {
            format!("`{text}` is not a remote model; write it as NAME=https://HOST/v1#MODEL")
        })?;
        Ok(Self { name, url, model })
    }
}

/// The key of a [`RemoteModelArg`] as it was written, `NAME=KEY`. It is taken apart later: those who
/// report an error of parsing repeat the text, which may be a key.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteKeyArg(String);

impl fmt::Debug for RemoteKeyArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RemoteKeyArg(…)")
    }
}

impl RemoteKeyArg {
    /// The name and the key.
    ///
    /// # Errors
    /// What is wrong, without the text.
    pub fn parts(&self) -> Result<(&str, Secret), String> {
        match self.0.split_once('=') {
            Some((name, key)) if !name.trim().is_empty() => Ok((name.trim(), key.parse()?)),
            _ => Err("has a value without a name; write it as NAME=KEY".to_owned()),
        }
    }
}

impl FromStr for RemoteKeyArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(text.to_owned()))
    }
}

/// Which requests may reuse each other's cached prompt prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ShareScope {
    /// Those of one API key.
    Key,
    /// All of them.
    All,
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// The `Host` headers that are answered. A web page can point its own name at this machine (DNS
/// rebinding) but cannot make a browser send another name, so unknown names are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHosts {
    names: Vec<String>,
    any_name: bool,
    /// Listening on every interface: an IP address cannot be rebound, so all of them are fine.
    any_address: bool,
}

impl AllowedHosts {
    /// Localhost's names, the bound address, and `extra`, where `*` stands for every name.
    pub fn new(bound: IpAddr, extra: &[String]) -> Self {
        let mut names: Vec<String> =
            ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into_iter().collect();
        names.push(bound.to_string());
        names.extend(extra.iter().map(|name| host_of(name.trim()).to_ascii_lowercase()));
        names.retain(|name| !name.is_empty());
        names.dedup();
        Self {
            any_name: names.iter().any(|name| name == "*"),
            any_address: bound.is_unspecified(),
            names,
        }
    }

    /// Whether a request with this `Host` header (port and all) is answered.
    pub fn allows(&self, header: &str) -> bool {
        let host = host_of(header).to_ascii_lowercase();
        self.any_name
            || self.names.contains(&host)
            || (self.any_address && host.parse::<IpAddr>().is_ok())
    }
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`, without brackets.
fn host_of(header: &str) -> &str {
    if let Some(rest) = header.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    match header.matches(':').count() {
        1 => header.split(':').next().unwrap_or(header),
        _ => header,
    }
}

/// TOML gives a string, or a number where the unit may be left out.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a number")]
enum Scalar {
    Integer(u64),
    Float(f64),
    Text(String),
}

fn deserialize_scalar<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    deserializer: D,
) -> Result<T, D::Error> {
    let text = match Scalar::deserialize(deserializer)? {
        Scalar::Integer(number) => number.to_string(),
        Scalar::Float(number) => number.to_string(),
        Scalar::Text(text) => text,
    };
    text.parse().map_err(serde::de::Error::custom)
}

macro_rules! deserialize_from_str {
    ($($name:ident),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserialize_scalar(deserializer)
            }
        }
    )*};
}

deserialize_from_str!(ByteSize, Span, Secret, AdapterArg, RemoteModelArg, RemoteKeyArg);
