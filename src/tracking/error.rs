//! What can go wrong between mlfs and a tracking server.

use thiserror::Error;

pub type TrackingResult<T> = Result<T, TrackingError>;

/// A tracking server's failure; `server` is its URI without credentials.
#[derive(Clone, Debug, Error)]
pub enum TrackingError {
    #[error("{server}: {what} does not exist")]
    NotFound { server: String, what: String },
    #[error("{server}: no permission for {what}: {detail}")]
    PermissionDenied {
        server: String,
        what: String,
        detail: String,
    },
    #[error("{server}: the credentials are missing or wrong: {detail}")]
    Unauthenticated { server: String, detail: String },
    #[error("{server}: cannot be reached or fails: {detail}")]
    Unavailable { server: String, detail: String },
    #[error("{server}: {what} exists already")]
    Exists { server: String, what: String },
    #[error("{server}: {what} is refused: {detail}")]
    Invalid {
        server: String,
        what: String,
        detail: String,
    },
    /// Of what is read without a server.
    #[error("{server}: {what}: it is only read; do it with MLflow, or mount a tracking server")]
    ReadOnly { server: String, what: String },
    #[error("{server}: unexpected answer to {what}: {detail}")]
    Protocol {
        server: String,
        what: String,
        detail: String,
    },
}

impl TrackingError {
    /// The errno a POSIX program expects.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound { .. } => libc::ENOENT,
            Self::PermissionDenied { .. } | Self::Unauthenticated { .. } => libc::EACCES,
            Self::Exists { .. } => libc::EEXIST,
            Self::Invalid { .. } => libc::EINVAL,
            Self::ReadOnly { .. } => libc::EROFS,
            Self::Unavailable { .. } | Self::Protocol { .. } => libc::EIO,
        }
    }
}
