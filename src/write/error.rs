//! What can go wrong while a file is written.

use thiserror::Error;

use crate::store::StoreError;

#[derive(Debug, Error)]
pub enum WriteError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{path}: spill file: {source} (see --spill-dir)")]
    Spill {
        path: String,
        source: std::io::Error,
    },
    #[error(
        "{object}: no room for more unsent data and nothing on its way to the store: \
         raise --memory or --spill-size"
    )]
    NoRoom { object: String },
    #[error(
        "{object}: bytes {start}..{end} are in an unfinished upload only, their local copy was \
         given up: raise --memory or --spill-size to work on earlier parts of a large file"
    )]
    GivenUp {
        object: String,
        start: u64,
        end: u64,
    },
    #[error(
        "{object}: holds the only copy of parts of {file}, which could not be stored: \
         `mlfs uploads retry` or `discard` that first"
    )]
    InUse { object: String, file: String },
    #[error("{object}: a file of {size} bytes needs more than 10000 parts: raise --part-size")]
    TooLarge { object: String, size: u64 },
}

impl WriteError {
    /// Whether trying again later can help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_transient())
    }

    /// The errno a POSIX program expects.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Store(error) => error.errno(),
            Self::Spill { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::NoRoom { .. } | Self::GivenUp { .. } => libc::ENOSPC,
            Self::InUse { .. } => libc::EBUSY,
            Self::TooLarge { .. } => libc::EFBIG,
        }
    }
}
