//! How far a file has gone that is sent while it is written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::target::Target;
use crate::store::{StoreResult, Stored};

/// A chunk of a file as it is sent in one body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub index: u32,
    pub range: Range<u64>,
    /// `None`: nothing of it is here; it comes from the object underneath, or is a hole.
    pub version: Option<u64>,
}

/// What a draft sends while it is written.
#[derive(Debug, Default)]
pub(super) enum Following {
    /// Nothing yet.
    #[default]
    Not,
    Under(Stream),
    /// Nothing any more, until it is stored.
    Ended,
}

impl Following {
    pub fn is_under_way(&self) -> bool {
        matches!(self, Self::Under(_))
    }
}

/// A body on its way; whoever drops it breaks it off.
#[derive(Debug)]
pub(super) struct Stream {
    pub target: Target,
    pub growing: Arc<Growing>,
    pub task: JoinHandle<StoreResult<Stored>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.growing.break_off();
        self.task.abort();
    }
}

/// What has gone of a file that grows, and what will.
#[derive(Debug, Default)]
pub(super) struct Growing {
    /// From the first chunk on.
    gone: Mutex<Vec<Piece>>,
    /// All of the file, once that is known.
    whole: Mutex<Option<Arc<[Piece]>>>,
    /// Nobody wants it any more.
    broken_off: AtomicBool,
    /// Something came to it.
    pub woken: Notify,
}

impl Growing {
    pub fn gone(&self) -> Vec<Piece> {
        self.gone.lock().clone()
    }

    pub fn note_gone(&self, piece: Piece) {
        self.gone.lock().push(piece);
    }

    /// Whether what has gone is how a file of these pieces begins.
    pub fn is_beginning_of(&self, pieces: &[Piece]) -> bool {
        pieces.starts_with(&self.gone.lock())
    }

    /// All of the file, if that is known.
    pub fn whole(&self) -> Option<Arc<[Piece]>> {
        self.whole.lock().clone()
    }

    /// Nothing more is to go: a request that was answered already may still ask for its body.
    pub fn break_off(&self) {
        self.broken_off.store(true, Ordering::Relaxed);
        self.woken.notify_one();
    }

    pub fn is_broken_off(&self) -> bool {
        self.broken_off.load(Ordering::Relaxed)
    }

    /// That is all of it.
    pub fn end(&self, pieces: Arc<[Piece]>) {
        *self.whole.lock() = Some(pieces);
        self.woken.notify_one();
    }
}
