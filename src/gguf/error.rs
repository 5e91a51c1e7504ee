//! What can be wrong with a GGUF file.

use std::io;

/// Why a GGUF file could not be read or written. The text is one sentence that names the key or
/// tensor at fault; it never holds a path of this machine, so it may be shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, such as "open the GGUF file".
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The bytes contradict the format, or pass one of its limits.
    #[error("{0}")]
    Malformed(String),
    /// A key that is needed is absent.
    #[error("key '{0}' is missing")]
    MissingKey(String),
    /// A key holds another type than the one asked for.
    #[error("key '{key}' holds {found} where {wanted} was expected")]
    WrongType {
        /// The key.
        key: String,
        /// What was asked for.
        wanted: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// A tensor that is needed is absent.
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
