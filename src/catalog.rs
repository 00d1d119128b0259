//! Names → artifact roots, with caches that live for a stated time.
//!
//! The catalog is what the upper part of the mount is made of. It knows MLflow's runs, experiments and
//! models, and the stores their artifacts lie in; it knows nothing of inodes or of what is inside an
//! artifact root.
//!
//! An answer of the tracking server, "no such run" included, is believed for the TTL. Callers who
//! ask for one run at the same time share one request. A run whose TTL has passed goes on counting
//! while the server is away or slow ([`GRACE`], [`PATIENCE`]), so that work in it goes on too.

mod branch;
mod branch_listing;
mod cache;
mod document;
mod listing;
mod making;
mod naming;
mod outage;
mod root;

use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::{Instant, timeout};

use crate::store::{Location, StoreError, StoreResult, Stores};
use crate::tracking::{Lifecycle, Tracking, TrackingError, TrackingResult};
use branch::Branches;
use cache::{Answer, Cache, KnownRoot};
use outage::Outage;

pub use branch::{Branch, Item};
pub use branch_listing::BranchListing;
pub use document::Document;
pub use listing::RunListing;
pub use root::{EXPERIMENTS, MODELS, RootEntry, RootId};

/// How long past its TTL a run that was known goes on counting when the server does not answer.
const GRACE: Duration = Duration::from_secs(3600);
/// Who asks for a run that was known waits this long for the server before the old answer counts;
/// the request goes on behind the scenes.
const PATIENCE: Duration = Duration::from_secs(5);

/// An artifact root, opened.
#[derive(Clone, Debug)]
pub struct ArtifactRoot {
    pub id: RootId,
    pub location: Location,
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
    async fn locate(&self, id: &RootId, artifact_uri: &str) -> StoreResult<Location>;
}

#[async_trait]
impl Locate for Stores {
    async fn locate(&self, id: &RootId, artifact_uri: &str) -> StoreResult<Location> {
        match id {
            RootId::Run(run_id) => Stores::locate_run(self, run_id, artifact_uri).await,
            // The server gives out of runs only what no store here has.
            RootId::Model(_) | RootId::Version { .. } => Stores::locate(self, artifact_uri).await,
        }
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
    /// One request at a time for each root that is asked for.
    flights: Mutex<HashMap<RootId, Flight>>,
    outage: Outage,
    branches: Branches,
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
            branches: Branches::default(),
        })
    }

    /// Any artifact root of something the server knows and has not deleted, listed or not. Its store is
    /// not opened, so one in a store that cannot be served is found too.
    ///
    /// # Errors
    /// `NotFound` for what does not exist or is deleted; the server's other failures.
    pub async fn root_entry(self: &Arc<Self>, id: &RootId) -> Result<RootEntry, CatalogError> {
        Ok(self.resolve(id).await?.entry(id))
    }

    /// What is known of a root within the TTL, without asking anybody. `None` says nothing.
    pub fn known_root(&self, id: &RootId) -> Option<RootEntry> {
        let known = self.cache.get(id)?;
        let root = known.is_younger_than(self.ttl).then_some(known.answer)??;
        Some(root.entry(id))
    }

    /// An artifact root that was found. No request is sent to its store, and while it is remembered none
    /// to the server: MLflow fixes it when the run or model is made.
    ///
    /// # Errors
    /// As [`Self::root_entry`], and those of opening the store: `Unsupported` for a scheme that no
    /// store serves.
    pub async fn root(self: &Arc<Self>, id: &RootId) -> Result<ArtifactRoot, CatalogError> {
        let known = self.cache.get(id).and_then(|known| known.answer);
        let root = match known {
            Some(root) => root,
            None => self.resolve(id).await?,
        };
        let location = self.stores.locate(id, &root.artifact_uri).await?;
        Ok(ArtifactRoot {
            id: id.clone(),
            location,
        })
    }

    /// The artifact URI of a root.
    ///
    /// # Errors
    /// As [`Self::root_entry`].
    pub async fn artifact_uri(self: &Arc<Self>, id: &RootId) -> Result<String, CatalogError> {
        let known = self.cache.get(id).and_then(|known| known.answer);
        let root = match known {
            Some(root) => root,
            None => self.resolve(id).await?,
        };
        Ok(root.artifact_uri.to_string())
    }

    /// Begins a listing of the active runs of all active experiments; asks for nothing yet.
    pub fn list_runs(self: &Arc<Self>) -> RunListing {
        RunListing::new(Arc::clone(self))
    }

    async fn resolve(self: &Arc<Self>, id: &RootId) -> Result<Arc<KnownRoot>, CatalogError> {
        let known = self.cache.get(id);
        if let Some(known) = &known
            && known.is_younger_than(self.ttl)
        {
            let answer = known.answer.clone();
            return answer.ok_or_else(|| self.missing(id));
        }
        let longest = self.ttl.saturating_add(GRACE);
        let stale = known
            .filter(|known| known.is_younger_than(longest))
            .and_then(|known| known.answer);
        let answer = match stale {
            Some(stale) => self.refresh(id, stale).await?,
            None => self.ask(id).await?,
        };
        answer.ok_or_else(|| self.missing(id))
    }

    /// Asks for a root that was known; if the server is away or slow, what was known counts.
    async fn refresh(
        self: &Arc<Self>,
        id: &RootId,
        stale: Arc<KnownRoot>,
    ) -> TrackingResult<Answer> {
        if self.outage.is_known() {
            if self.outage.is_time_to_ask() {
                // It runs by itself; nobody waits for it.
                drop(self.ask(id));
            }
            return Ok(Some(stale));
        }
        match timeout(PATIENCE, self.ask(id)).await {
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

    /// Joins the request for a root that is under way, or starts one. It runs as a task of its
    /// own, and ends whether or not anybody waits.
    fn ask(self: &Arc<Self>, id: &RootId) -> Flight {
        let flight = {
            let mut flights = self.flights.lock();
            if let Some(flight) = flights.get(id) {
                return flight.clone();
            }
            let landing = Landing {
                catalog: Arc::clone(self),
                id: id.clone(),
            };
            let flight = landing.fly().boxed().shared();
            flights.insert(id.clone(), flight.clone());
            flight
        };
        tokio::spawn(flight.clone());
        flight
    }

    async fn fetch(&self, id: &RootId) -> TrackingResult<Answer> {
        let asked = Instant::now();
        let answer = match self.noted(self.ask_for(id).await) {
            Ok(answer) => answer.map(Arc::new),
            Err(TrackingError::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        self.cache.put(id, answer.clone(), asked);
        Ok(answer)
    }

    async fn ask_for(&self, id: &RootId) -> TrackingResult<Option<KnownRoot>> {
        match id {
            RootId::Run(run_id) => {
                let run = self.tracking.run(run_id).await?;
                let active = run.lifecycle == Lifecycle::Active;
                Ok(active.then(|| KnownRoot::of_run(&run)))
            }
            RootId::Model(model_id) => {
                let model = self.tracking.logged_model(model_id).await?;
                Ok(Some(KnownRoot::of_model(&model)))
            }
            RootId::Version { model, version } => {
                let known = self.tracking.model_version(model, version).await?;
                let uri = self.tracking.version_location(model, version).await?;
                Ok(Some(KnownRoot::of_version(&uri, known.modified)))
            }
        }
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

    fn missing(&self, what: &dyn fmt::Display) -> CatalogError {
        let server = self.tracking.name().to_owned();
        TrackingError::NotFound {
            server,
            what: what.to_string(),
        }
        .into()
    }
}

/// Ends a flight, however it ends: the next caller starts a new one.
struct Landing {
    catalog: Arc<Catalog>,
    id: RootId,
}

impl Landing {
    async fn fly(self) -> TrackingResult<Answer> {
        // A panic would stay in the shared future, and meet all who ask for this from then on.
        let fetch = AssertUnwindSafe(self.catalog.fetch(&self.id));
        fetch.catch_unwind().await.unwrap_or_else(|_| {
            Err(TrackingError::Unavailable {
                server: self.catalog.tracking.name().to_owned(),
                detail: "asking the server panicked; this is a bug in mlfs".to_owned(),
            })
        })
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // The flight may be dropped here, which must not happen under the lock.
        let flight = self.catalog.flights.lock().remove(&self.id);
        drop(flight);
    }
}

#[cfg(test)]
mod tests;
