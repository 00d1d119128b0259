//! Errors as the kernel sees them: an errno, with the cause kept for the log.

use std::sync::Arc;

use thiserror::Error;

use crate::catalog::CatalogError;
use crate::store::StoreError;
use crate::write::WriteError;

/// An errno and what caused it. Plain errnos are everyday answers (ENOENT, ENOTEMPTY) and are
/// not logged; those with a cause are.
#[derive(Clone, Debug, Error)]
#[error("errno {errno}: {}", cause.as_deref().unwrap_or("no further cause"))]
pub struct VfsError {
    pub errno: i32,
    pub cause: Option<Arc<str>>,
}

pub type VfsResult<T> = Result<T, VfsError>;

impl VfsError {
    pub const NOT_FOUND: Self = Self::plain(libc::ENOENT);
    pub const NOT_DIRECTORY: Self = Self::plain(libc::ENOTDIR);
    pub const IS_DIRECTORY: Self = Self::plain(libc::EISDIR);
    pub const EXISTS: Self = Self::plain(libc::EEXIST);
    pub const NOT_EMPTY: Self = Self::plain(libc::ENOTEMPTY);
    pub const NOT_PERMITTED: Self = Self::plain(libc::EPERM);
    pub const INVALID: Self = Self::plain(libc::EINVAL);
    pub const READ_ONLY: Self = Self::plain(libc::EROFS);
    pub const OTHER_STORE: Self = Self::plain(libc::EXDEV);
    pub const BAD_HANDLE: Self = Self::plain(libc::EBADF);
    pub const NAME_TOO_LONG: Self = Self::plain(libc::ENAMETOOLONG);
    pub const BUSY: Self = Self::plain(libc::EBUSY);
    pub const STALE: Self = Self::plain(libc::ESTALE);

    pub const fn plain(errno: i32) -> Self {
        Self { errno, cause: None }
    }

    pub fn because(errno: i32, cause: &str) -> Self {
        let cause = Some(cause.into());
        Self { errno, cause }
    }

    fn caused(errno: i32, cause: &dyn std::fmt::Display) -> Self {
        let everyday = matches!(errno, libc::ENOENT);
        let cause = (!everyday).then(|| cause.to_string().into());
        Self { errno, cause }
    }
}

impl From<CatalogError> for VfsError {
    fn from(error: CatalogError) -> Self {
        Self::caused(error.errno(), &error)
    }
}

impl From<StoreError> for VfsError {
    fn from(error: StoreError) -> Self {
        Self::caused(error.errno(), &error)
    }
}

impl From<WriteError> for VfsError {
    fn from(error: WriteError) -> Self {
        Self::caused(error.errno(), &error)
    }
}
