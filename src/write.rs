//! Writing: chunks in memory, spilled to disk beyond it, sent while the writer goes on.
//!
//! The room knows files only as drafts: a size, a cut into chunks, an object the draft may have
//! been opened over, and a key it is to be published under. It knows nothing of the kernel or of
//! MLflow, and runs against any store.
//!
//! - [`draft`], [`state`]: what a draft is, and reading and writing it;
//! - [`publish`]: how a draft becomes an object, complete or not at all;
//! - [`journal`], [`record`], [`recovery`], [`recognise`]: what a crash must not make anybody forget;
//! - [`patience`]: how long a close goes on trying;
//! - [`rename`], [`names`]: another name after parts were sent, and who has which;
//! - [`relief`]: what gives way when memory is spent.

mod chunk;
mod draft;
mod error;
mod geometry;
mod growing;
mod journal;
mod names;
mod patience;
mod pool;
mod publish;
mod recognise;
mod record;
mod recovery;
mod relief;
mod rename;
mod send;
mod spill;
mod state;
mod stream;
mod target;
mod whole;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::budget::Budget;
use crate::read::Reader;
use chunk::Room;
use names::Names;
use pool::Pool;

pub use draft::{Draft, Progress};
pub use error::WriteError;
pub use geometry::SMALLEST_PART;
pub use patience::Patience;
pub use recovery::{Leftover, ResumeError};
pub use spill::Spill;
pub use target::Target;

/// How this mount writes.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Bytes of a part.
    pub part_size: u64,
    /// Most parts and objects on their way at once, over all files.
    pub transfers: usize,
    /// How long a file is tried again while nothing of it gets through.
    pub close_timeout: Duration,
    /// The tracking server, without credentials: journals are of one server's runs.
    pub tracking: String,
}

/// Everything that drafts share: budgets, spill, the limit on transfers.
#[derive(Debug)]
pub struct Writer {
    memory: Arc<Budget>,
    room: Room,
    spill: Arc<Spill>,
    reader: Arc<Reader>,
    transfers: Arc<Semaphore>,
    /// Of them, those that may be with bodies that follow their writers, and wait for those.
    followers: Arc<Semaphore>,
    runtime: Handle,
    options: WriteOptions,
    drafts: Mutex<Vec<Weak<Draft>>>,
    /// Names that are being published.
    names: Arc<Names>,
    /// Held by whoever makes room, so that one does it for all.
    relief: tokio::sync::Mutex<()>,
    /// Transfers queued or on their way.
    in_flight: AtomicU64,
    /// Turns true when the mount is about to end.
    ending: watch::Sender<bool>,
    /// Rises with each write; tells which chunk was touched longest ago.
    clock: AtomicU64,
}

impl Writer {
    pub fn new(
        memory: Arc<Budget>,
        spill: Arc<Spill>,
        reader: Arc<Reader>,
        runtime: Handle,
        options: WriteOptions,
    ) -> Arc<Self> {
        let part_size = usize::try_from(options.part_size).unwrap_or(usize::MAX);
        let room = Room {
            budget: Arc::clone(&memory),
            pool: Pool::new(Arc::clone(&memory), part_size),
        };
        Arc::new(Self {
            memory,
            room,
            spill,
            reader,
            transfers: Arc::new(Semaphore::new(options.transfers)),
            followers: Arc::new(Semaphore::new(options.transfers / 2)),
            runtime,
            options,
            drafts: Mutex::new(Vec::new()),
            names: Arc::default(),
            relief: tokio::sync::Mutex::new(()),
            in_flight: AtomicU64::new(0),
            ending: watch::Sender::new(false),
            clock: AtomicU64::new(0),
        })
    }

    fn register(&self, draft: &Arc<Draft>) {
        let mut drafts = self.drafts.lock();
        drafts.retain(|draft| draft.strong_count() > 0);
        drafts.push(Arc::downgrade(draft));
    }

    fn all_drafts(&self) -> Vec<Arc<Draft>> {
        self.drafts
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .collect()
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// A transfer for a body that follows its writer, if one is free: it is never waited for.
    fn try_permit_to_follow(&self) -> Option<[OwnedSemaphorePermit; 2]> {
        let both = [&self.followers, &self.transfers];
        let [Ok(follower), Ok(transfer)] = both.map(|it| Arc::clone(it).try_acquire_owned()) else {
            return None;
        };
        Some([follower, transfer])
    }

    /// What is not stored stays on disk when this process ends, for the next mount.
    pub fn keep(&self) {
        self.spill.keep();
    }

    pub fn memory(&self) -> &Arc<Budget> {
        &self.memory
    }

    pub fn spill(&self) -> &Arc<Spill> {
        &self.spill
    }
}
