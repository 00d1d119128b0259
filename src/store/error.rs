//! What can go wrong in a store: a dozen kinds, each with the object it concerns.

use thiserror::Error;

use super::Condition;

pub type StoreResult<T> = Result<T, StoreError>;

/// A store's failure. `object` is `<store name>/<key>`; `detail` holds no secrets and no query
/// strings.
#[derive(Clone, Debug, Error)]
pub enum StoreError {
    #[error("{object}: not found")]
    NotFound { object: String },
    #[error("{object}: no permission: {detail}")]
    PermissionDenied { object: String, detail: String },
    #[error("{object}: credentials missing, wrong or expired: {detail}")]
    Unauthenticated { object: String, detail: String },
    /// A pinned read found another version.
    #[error("{object}: replaced by another version while it was open")]
    Changed { object: String },
    /// A conditional write found another version.
    #[error("{object}: somebody else wrote it meanwhile")]
    Conflict { object: String },
    /// The multipart upload is unknown to the store.
    #[error("{object}: the multipart upload is gone: {detail}")]
    UploadGone { object: String, detail: String },
    /// A part that the store holds is not the one that was confirmed.
    #[error("{object}: the store holds other parts than it confirmed: {detail}")]
    PartsDiffer { object: String, detail: String },
    #[error("{object}: too large for the store: {detail}")]
    TooLarge { object: String, detail: String },
    #[error("{object}: there is no room for it in the store: {detail}")]
    Full { object: String, detail: String },
    #[error("{object}: the store does not accept this name: {detail}")]
    InvalidName { object: String, detail: String },
    #[error("{object}: the store cannot do this: {detail}")]
    Unsupported { object: String, detail: String },
    /// The store's checksum, size or ETag differs from ours.
    #[error("{object}: data damaged on the way: {detail}")]
    Corrupt { object: String, detail: String },
    /// Network trouble, 5xx, throttling or a stall that outlasted the retries.
    #[error("{object}: store unreachable or failing: {detail}")]
    Unavailable { object: String, detail: String },
    #[error("{object}: {detail}")]
    Other { object: String, detail: String },
}

impl StoreError {
    /// The errno a POSIX program expects.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound { .. } => libc::ENOENT,
            Self::PermissionDenied { .. } | Self::Unauthenticated { .. } => libc::EACCES,
            Self::Changed { .. } | Self::Conflict { .. } => libc::ESTALE,
            Self::TooLarge { .. } => libc::EFBIG,
            Self::Full { .. } => libc::ENOSPC,
            Self::InvalidName { .. } => libc::EINVAL,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            Self::UploadGone { .. }
            | Self::PartsDiffer { .. }
            | Self::Corrupt { .. }
            | Self::Unavailable { .. }
            | Self::Other { .. } => libc::EIO,
        }
    }

    /// A condition of ours that failed is a conflict of writers.
    pub(super) fn under(self, condition: &Condition) -> Self {
        match self {
            Self::Changed { object } if *condition != Condition::Always => {
                Self::Conflict { object }
            }
            Self::NotFound { object } if matches!(condition, Condition::IfMatch(_)) => {
                Self::Conflict { object }
            }
            error => error,
        }
    }

    /// Whether trying again later can help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Corrupt { .. })
    }
}
