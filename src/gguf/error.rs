//! Errors of GGUF files.

use std::io;

/// Reason why a GGUF file could not be read or written. The message is one sentence that names the
/// key or tensor at fault; it never contains a path of this machine, so it may be shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// An operation of the operating system failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// The operation, such as "open the GGUF file".
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The bytes violate the format, or exceed one of its limits.
    #[error("{0}")]
    Malformed(String),
    /// A required key is missing.
    #[error("key '{0}' is missing")]
    MissingKey(String),
    /// A key holds another type than the one requested.
    #[error("key '{key}' holds {found} where {wanted} was expected")]
    WrongType {
        /// The key.
        key: String,
        /// The requested type.
        wanted: &'static str,
        /// The type in the file.
        found: &'static str,
    },
    /// A required tensor is missing.
    #[error("tensor '{0}' is missing")]
    MissingTensor(String),
}

impl GgufError {
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> GgufError {
        move |source| GgufError::Io { action, source }
    }
}

/// Returns early with [`GgufError::Malformed`].
macro_rules! malformed {
    ($($arg:tt)*) => {
        return Err($crate::gguf::GgufError::Malformed(format!($($arg)*)))
    };
}
pub(crate) use malformed;
