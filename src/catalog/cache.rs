//! What the catalog was told of runs, and when.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::RunEntry;
use crate::tracking::Run;

/// Runs remembered at most. One takes about 350 bytes with its artifact URI: some 22 MiB when full.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();

/// As much of a run as the catalog needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct KnownRun {
    pub artifact_uri: Box<str>,
    created: SystemTime,
    modified: SystemTime,
}

impl KnownRun {
    pub fn new(run: &Run) -> Self {
        let created = run.start_time.unwrap_or(SystemTime::UNIX_EPOCH);
        Self {
            artifact_uri: run.artifact_uri.as_str().into(),
            created,
            modified: run.end_time.unwrap_or(created),
        }
    }

    pub fn entry(&self, run_id: &str) -> RunEntry {
        RunEntry {
            run_id: run_id.to_owned(),
            created: self.created,
            modified: self.modified,
        }
    }
}

/// An answer of the server: the run, or that there is none (any more).
pub(super) type Answer = Option<Arc<KnownRun>>;

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

/// Answers by run id; the least recently used is forgotten first.
#[derive(Debug)]
pub(super) struct Cache {
    runs: Mutex<LruCache<String, Remembered>>,
}

impl Cache {
    pub fn new() -> Self {
        Self {
            runs: Mutex::new(LruCache::sparse(REMEMBERED)),
        }
    }

    pub fn get(&self, run_id: &str) -> Option<Remembered> {
        self.runs.lock().get(run_id).cloned()
    }

    /// Remembers an answer, unless one to a later question is known: a page of a listing may
    /// arrive after a lookup that began later and knows better.
    pub fn put(&self, run_id: &str, answer: Answer, asked: Instant) {
        let mut runs = self.runs.lock();
        if runs.peek(run_id).is_none_or(|known| known.asked <= asked) {
            runs.put(run_id.to_owned(), Remembered { answer, asked });
        }
    }
}
