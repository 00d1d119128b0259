//! Names → artifact roots, with caches that live for a stated time.
//!
//! The catalog is what the root of the mount is made of. It knows MLflow's runs and the stores
//! their artifacts lie in; it knows nothing of inodes or of what is inside an artifact root.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use thiserror::Error;

use crate::store::{Location, StoreError, Stores};
use crate::tracking::{Tracking, TrackingError};

/// A run's artifact root, opened.
#[derive(Clone, Debug)]
pub struct ArtifactRoot {
    pub run_id: String,
    pub location: Location,
    pub created: SystemTime,
    pub modified: SystemTime,
}

/// A run as the root's listing shows it.
#[derive(Clone, Debug)]
pub struct RunEntry {
    pub run_id: String,
    pub created: SystemTime,
    pub modified: SystemTime,
}

#[derive(Clone, Debug)]
pub struct RunPage {
    pub entries: Vec<RunEntry>,
    /// Pass it to [`Catalog::runs`] for the next page; `None` at the end.
    pub next: Option<String>,
}

#[derive(Clone, Debug, Error)]
pub enum CatalogError {
    #[error(transparent)]
    Tracking(#[from] TrackingError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CatalogError {
    /// The errno a POSIX program expects.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Tracking(error) => error.errno(),
            Self::Store(error) => error.errno(),
        }
    }
}

/// Resolves and lists runs.
#[derive(Debug)]
pub struct Catalog {}

impl Catalog {
    pub fn new(_tracking: Arc<dyn Tracking>, _stores: Arc<Stores>, _ttl: Duration) -> Self {
        todo!("catalog helper")
    }

    /// The artifact root of any run the server knows and has not deleted, listed or not.
    /// Cached for the TTL, failures to find it too; concurrent callers share one request.
    pub async fn run(&self, _run_id: &str) -> Result<Arc<ArtifactRoot>, CatalogError> {
        todo!("catalog helper")
    }

    /// A page of the active runs of all active experiments; pages do not repeat a run.
    pub async fn runs(&self, _token: Option<&str>) -> Result<RunPage, CatalogError> {
        todo!("catalog helper")
    }
}
