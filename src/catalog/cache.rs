//! What the catalog was told of artifact roots, and when.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{RootEntry, RootId};
use crate::tracking::{LoggedModel, Run};

/// Artifact roots remembered at most. One takes about 350 bytes with its URI: some 22 MiB when full.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();

/// As much of an artifact root as the catalog needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct KnownRoot {
    pub artifact_uri: Box<str>,
    /// Empty where nobody asks for it.
    pub experiment_id: Box<str>,
    created: SystemTime,
    modified: SystemTime,
}

impl KnownRoot {
    pub fn of_run(run: &Run) -> Self {
        let created = run.start_time.unwrap_or(SystemTime::UNIX_EPOCH);
        Self {
            artifact_uri: run.artifact_uri.as_str().into(),
            experiment_id: run.experiment_id.as_str().into(),
            created,
            modified: run.end_time.unwrap_or(created),
        }
    }

    pub fn of_model(model: &LoggedModel) -> Self {
        let created = model.created.unwrap_or(SystemTime::UNIX_EPOCH);
        Self {
            artifact_uri: model.artifact_uri.as_str().into(),
            experiment_id: "".into(),
            created,
            modified: model.modified.unwrap_or(created),
        }
    }

    pub fn of_version(artifact_uri: &str, modified: Option<SystemTime>) -> Self {
        let modified = modified.unwrap_or(SystemTime::UNIX_EPOCH);
        Self {
            artifact_uri: artifact_uri.into(),
            experiment_id: "".into(),
            created: modified,
            modified,
        }
    }

    pub fn entry(&self, id: &RootId) -> RootEntry {
        RootEntry {
            id: id.clone(),
            created: self.created,
            modified: self.modified,
        }
    }
}

/// An answer of the server: the root, or that there is none (any more).
pub(super) type Answer = Option<Arc<KnownRoot>>;

#[derive(Clone, Debug)]
pub(super) struct Remembered {
    pub answer: Answer,
    /// When the question was sent: the answer is at least that fresh.
    asked: Instant,
}

impl Remembered {
    /// Whether it was asked for less than `longest` ago.
    pub fn is_younger_than(&self, longest: Duration) -> bool {
        self.asked.elapsed() < longest
    }
}

/// Answers by whose root it is; the least recently used is forgotten first.
#[derive(Debug)]
pub(super) struct Cache {
    roots: Mutex<LruCache<RootId, Remembered>>,
}

impl Cache {
    pub fn new() -> Self {
        Self {
            roots: Mutex::new(LruCache::sparse(REMEMBERED)),
        }
    }

    pub fn get(&self, id: &RootId) -> Option<Remembered> {
        self.roots.lock().get(id).cloned()
    }

    /// Remembers an answer, unless one to a later question is known: a page of a listing may
    /// arrive after a lookup that began later and knows better.
    pub fn put(&self, id: &RootId, answer: Answer, asked: Instant) {
        let mut roots = self.roots.lock();
        if roots.peek(id).is_none_or(|known| known.asked <= asked) {
            roots.put(id.clone(), Remembered { answer, asked });
        }
    }
}
