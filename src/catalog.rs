//! Names → artifact roots, with caches that live for a stated time.
//!
//! The catalog is what the root of the mount is made of. It knows MLflow's runs and the stores
//! their artifacts lie in; it knows nothing of inodes or of what is inside an artifact root.
//!
//! An answer of the tracking server, "no such run" included, is believed for the TTL. Callers who
//! ask for one run at the same time share one request. A run whose TTL has passed goes on counting
//! while the server is away or slow ([`GRACE`], [`PATIENCE`]), so that work in it goes on too.

mod cache;
mod listing;
mod outage;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::{Instant, timeout};

use crate::store::{Location, StoreError, StoreResult, Stores};
use crate::tracking::{Lifecycle, Tracking, TrackingError, TrackingResult};
use cache::{Answer, Cache, KnownRun};
use outage::Outage;

pub use listing::RunListing;

/// How long past its TTL a run that was known goes on counting when the server does not answer.
const GRACE: Duration = Duration::from_secs(3600);
/// Who asks for a run that was known waits this long for the server before the old answer counts;
/// the request goes on behind the scenes.
const PATIENCE: Duration = Duration::from_secs(5);

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

/// Opens the store of a run's artifact URI.
#[async_trait]
pub trait Locate: std::fmt::Debug + Send + Sync + 'static {
    async fn locate(&self, run_id: &str, artifact_uri: &str) -> StoreResult<Location>;
}

#[async_trait]
impl Locate for Stores {
    async fn locate(&self, run_id: &str, artifact_uri: &str) -> StoreResult<Location> {
        Stores::locate_run(self, run_id, artifact_uri).await
    }
}

/// A request under way, and its answer for all who wait.
type Flight = Shared<BoxFuture<'static, TrackingResult<Answer>>>;

/// Resolves and lists runs.
#[derive(Debug)]
pub struct Catalog {
    tracking: Arc<dyn Tracking>,
    stores: Arc<dyn Locate>,
    ttl: Duration,
    cache: Cache,
    /// One request at a time for each run that is asked for.
    flights: Mutex<HashMap<String, Flight>>,
    outage: Outage,
}

impl Catalog {
    /// A catalog that believes what it was told for `ttl`: zero for never, `Duration::MAX` for
    /// ever.
    pub fn new(tracking: Arc<dyn Tracking>, stores: Arc<dyn Locate>, ttl: Duration) -> Arc<Self> {
        Arc::new(Self {
            tracking,
            stores,
            ttl,
            cache: Cache::new(),
            flights: Mutex::default(),
            outage: Outage::default(),
        })
    }

    /// Any run the server knows and has not deleted, listed or not. Its store is not opened, so
    /// a run in a store that cannot be served is found too.
    ///
    /// # Errors
    /// `NotFound` for runs that do not exist or are deleted; the server's other failures.
    pub async fn run_entry(self: &Arc<Self>, run_id: &str) -> Result<RunEntry, CatalogError> {
        Ok(self.resolve(run_id).await?.entry(run_id))
    }

    /// What is known of a run within the TTL, without asking anybody. `None` says nothing.
    pub fn known_run(&self, run_id: &str) -> Option<RunEntry> {
        let known = self.cache.get(run_id)?;
        let run = known.is_younger_than(self.ttl).then_some(known.answer)??;
        Some(run.entry(run_id))
    }

    /// The artifact root of a run that was found. No request is sent to its store, and while the
    /// run is remembered none to the server: MLflow fixes the root when a run is made.
    ///
    /// # Errors
    /// As [`Self::run_entry`], and those of opening the store: `Unsupported` for a scheme that no
    /// store serves.
    pub async fn run(self: &Arc<Self>, run_id: &str) -> Result<ArtifactRoot, CatalogError> {
        let known = self.cache.get(run_id).and_then(|known| known.answer);
        let run = match known {
            Some(run) => run,
            None => self.resolve(run_id).await?,
        };
        let location = self.stores.locate(run_id, &run.artifact_uri).await?;
        Ok(ArtifactRoot {
            run_id: run_id.to_owned(),
            location,
        })
    }

    /// Begins a listing of the active runs of all active experiments; asks for nothing yet.
    pub fn list_runs(self: &Arc<Self>) -> RunListing {
        RunListing::new(Arc::clone(self))
    }

    async fn resolve(self: &Arc<Self>, run_id: &str) -> Result<Arc<KnownRun>, CatalogError> {
        let known = self.cache.get(run_id);
        if let Some(known) = &known
            && known.is_younger_than(self.ttl)
        {
            let answer = known.answer.clone();
            return answer.ok_or_else(|| self.missing(run_id));
        }
        let longest = self.ttl.saturating_add(GRACE);
        let stale = known
            .filter(|known| known.is_younger_than(longest))
            .and_then(|known| known.answer);
        let answer = match stale {
            Some(stale) => self.refresh(run_id, stale).await?,
            None => self.ask(run_id).await?,
        };
        answer.ok_or_else(|| self.missing(run_id))
    }

    /// Asks for a run that was known; if the server is away or slow, what was known counts.
    async fn refresh(
        self: &Arc<Self>,
        run_id: &str,
        stale: Arc<KnownRun>,
    ) -> TrackingResult<Answer> {
        if self.outage.is_known() {
            if self.outage.is_time_to_ask() {
                // It runs by itself; nobody waits for it.
                drop(self.ask(run_id));
            }
            return Ok(Some(stale));
        }
        match timeout(PATIENCE, self.ask(run_id)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(
                error @ (TrackingError::Unavailable { .. } | TrackingError::Protocol { .. }),
            )) => {
                // A server that once knew this run and now talks nonsense is away too: something
                // else answers in its place.
                self.outage.note_down(&error);
                Ok(Some(stale))
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                // The next callers need not find that out each for themselves.
                self.outage.note_down(&TrackingError::Unavailable {
                    server: self.tracking.name().to_owned(),
                    detail: format!("no answer for {} s", PATIENCE.as_secs()),
                });
                Ok(Some(stale))
            }
        }
    }

    /// Joins the request for a run that is under way, or starts one. It runs as a task of its
    /// own, and ends whether or not anybody waits.
    fn ask(self: &Arc<Self>, run_id: &str) -> Flight {
        let flight = {
            let mut flights = self.flights.lock();
            if let Some(flight) = flights.get(run_id) {
                return flight.clone();
            }
            let landing = Landing {
                catalog: Arc::clone(self),
                run_id: run_id.to_owned(),
            };
            let flight = landing.fly().boxed().shared();
            flights.insert(run_id.to_owned(), flight.clone());
            flight
        };
        tokio::spawn(flight.clone());
        flight
    }

    async fn fetch(&self, run_id: &str) -> TrackingResult<Answer> {
        let asked = Instant::now();
        let answer = match self.noted(self.tracking.run(run_id).await) {
            Ok(run) => (run.lifecycle == Lifecycle::Active).then(|| Arc::new(KnownRun::new(&run))),
            Err(TrackingError::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        self.cache.put(run_id, answer.clone(), asked);
        Ok(answer)
    }

    /// Passes an answer on, and notes what it tells of the server.
    fn noted<T>(&self, answer: TrackingResult<T>) -> TrackingResult<T> {
        match &answer {
            Err(error @ TrackingError::Unavailable { .. }) => self.outage.note_down(error),
            // Whether this was the server is not clear.
            Err(TrackingError::Protocol { .. }) => {}
            Ok(_) | Err(_) => self.outage.note_up(self.tracking.name()),
        }
        answer
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

/// Ends a flight, however it ends: the next caller starts a new one.
struct Landing {
    catalog: Arc<Catalog>,
    run_id: String,
}

impl Landing {
    async fn fly(self) -> TrackingResult<Answer> {
        // A panic would stay in the shared future, and meet all who ask for this run from then on.
        let fetch = AssertUnwindSafe(self.catalog.fetch(&self.run_id));
        fetch.catch_unwind().await.unwrap_or_else(|_| {
            Err(TrackingError::Unavailable {
                server: self.catalog.tracking.name().to_owned(),
                detail: "asking for a run panicked; this is a bug in mlfs".to_owned(),
            })
        })
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // The flight may be dropped here, which must not happen under the lock.
        let flight = self.catalog.flights.lock().remove(&self.run_id);
        drop(flight);
    }
}

#[cfg(test)]
mod tests;
