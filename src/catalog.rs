//! Names → artifact roots, with caches that live for a stated time.
//!
//! The catalog is what the root of the mount is made of. It knows MLflow's runs and the stores
//! their artifacts lie in; it knows nothing of inodes or of what is inside an artifact root.

mod listing;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use lru::LruCache;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::Instant;

use crate::store::{Location, StoreError, StoreResult, Stores};
use crate::tracking::{Lifecycle, Run, Tracking, TrackingError};

pub use listing::RunListing;

/// Runs remembered at most (some hundred bytes each).
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(100_000).unwrap();
/// How long what was known goes on counting when the server does not answer.
const GRACE: Duration = Duration::from_secs(3600);

/// A run's artifact root, opened.
#[derive(Clone, Debug)]
pub struct ArtifactRoot {
    pub run_id: String,
    pub location: Location,
}

/// A run as the root's listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunEntry {
    pub run_id: String,
    pub created: SystemTime,
    pub modified: SystemTime,
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

/// Opens the store of an artifact URI.
#[async_trait]
pub trait Locate: std::fmt::Debug + Send + Sync + 'static {
    async fn locate(&self, artifact_uri: &str) -> StoreResult<Location>;
}

#[async_trait]
impl Locate for Stores {
    async fn locate(&self, artifact_uri: &str) -> StoreResult<Location> {
        Stores::locate(self, artifact_uri).await
    }
}

/// A run that is known, or known not to be.
#[derive(Clone, Debug)]
struct Known {
    run: Option<Arc<Run>>,
    at: Instant,
}

/// Resolves and lists runs.
#[derive(Debug)]
pub struct Catalog {
    tracking: Arc<dyn Tracking>,
    stores: Arc<dyn Locate>,
    ttl: Duration,
    known: Mutex<LruCache<String, Known>>,
    /// One request at a time for each run that is asked for.
    asking: Mutex<std::collections::HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// The server did not answer last time; said once.
    down: AtomicBool,
}

impl Catalog {
    /// A catalog that believes what it was told for `ttl`.
    pub fn new(tracking: Arc<dyn Tracking>, stores: Arc<dyn Locate>, ttl: Duration) -> Arc<Self> {
        Arc::new(Self {
            tracking,
            stores,
            ttl,
            known: Mutex::new(LruCache::new(REMEMBERED)),
            asking: Mutex::default(),
            down: AtomicBool::new(false),
        })
    }

    /// Any run the server knows and has not deleted, listed or not. Its store is not opened.
    pub async fn run_entry(&self, run_id: &str) -> Result<RunEntry, CatalogError> {
        Ok(entry(&*self.resolve(run_id).await?))
    }

    /// The artifact root of a run. Concurrent callers share one request.
    pub async fn run(&self, run_id: &str) -> Result<ArtifactRoot, CatalogError> {
        let run = self.resolve(run_id).await?;
        let location = self.stores.locate(&run.artifact_uri).await?;
        Ok(ArtifactRoot {
            run_id: run.run_id.clone(),
            location,
        })
    }

    /// Begins a listing of the active runs of all active experiments.
    pub fn list_runs(self: &Arc<Self>) -> RunListing {
        RunListing::new(Arc::clone(self))
    }

    fn recall(&self, run_id: &str, longest: Duration) -> Option<Known> {
        let mut known = self.known.lock();
        known
            .get(run_id)
            .filter(|known| known.at.elapsed() < longest)
            .cloned()
    }

    fn remember(&self, run_id: &str, run: Option<Arc<Run>>, at: Instant) {
        self.known.lock().put(run_id.to_owned(), Known { run, at });
    }

    async fn resolve(&self, run_id: &str) -> Result<Arc<Run>, CatalogError> {
        if let Some(known) = self.recall(run_id, self.ttl) {
            return known.run.ok_or_else(|| self.missing(run_id));
        }
        let began = Instant::now();
        let gate = Arc::clone(self.asking.lock().entry(run_id.to_owned()).or_default());
        let answer = {
            let _gate = gate.lock().await;
            // Somebody may have asked while we waited, after we did.
            let fresh = self
                .recall(run_id, Duration::MAX)
                .filter(|known| known.at >= began);
            match fresh {
                Some(known) => known.run.ok_or_else(|| self.missing(run_id)),
                None => self.ask(run_id).await,
            }
        };
        let mut asking = self.asking.lock();
        if Arc::strong_count(&gate) <= 2 {
            asking.remove(run_id);
        }
        answer
    }

    async fn ask(&self, run_id: &str) -> Result<Arc<Run>, CatalogError> {
        let answer = self.tracking.run(run_id).await;
        let answered = Instant::now();
        match answer {
            Ok(run) => {
                self.note_up();
                let run = (run.lifecycle == Lifecycle::Active).then(|| Arc::new(run));
                self.remember(run_id, run.clone(), answered);
                run.ok_or_else(|| self.missing(run_id))
            }
            Err(error @ TrackingError::NotFound { .. }) => {
                self.note_up();
                self.remember(run_id, None, answered);
                Err(error.into())
            }
            Err(error @ TrackingError::Unavailable { .. }) => {
                self.note_down(&error);
                let stale = self.recall(run_id, self.ttl.saturating_add(GRACE));
                stale
                    .and_then(|known| known.run)
                    .ok_or_else(|| error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn note_up(&self) {
        if self.down.swap(false, Ordering::Relaxed) {
            tracing::info!(
                server = self.tracking.name(),
                "the tracking server answers again"
            );
        }
    }

    fn note_down(&self, error: &TrackingError) {
        if !self.down.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the tracking server does not answer; known runs go on");
        }
    }

    fn missing(&self, run_id: &str) -> CatalogError {
        let server = self.tracking.name().to_owned();
        TrackingError::NotFound {
            server,
            what: format!("run {run_id}"),
        }
        .into()
    }
}

fn entry(run: &Run) -> RunEntry {
    let created = run.start_time.unwrap_or(SystemTime::UNIX_EPOCH);
    RunEntry {
        run_id: run.run_id.clone(),
        created,
        modified: run.end_time.unwrap_or(created),
    }
}

#[cfg(test)]
mod tests;
