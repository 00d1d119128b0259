//! What has come from the store and waits to be written to disk.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, mpsc};

use super::identity::Identity;
use crate::read::block::Block;

/// Consecutive blocks of one version.
#[derive(Debug)]
pub(super) struct Batch {
    pub identity: Arc<Identity>,
    /// Index of the first block.
    pub first: u64,
    pub blocks: Vec<Arc<Block>>,
    /// Dropped with the batch, for whoever waits for that.
    pub _waiter: Option<mpsc::Sender<()>>,
}

impl Batch {
    /// Bytes of the blocks.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.length).sum()
    }
}

#[derive(Debug, Default)]
struct State {
    batches: VecDeque<Batch>,
    /// Bytes of the batches, the one that is being written included.
    bytes: u64,
    closed: bool,
}

/// A queue that never holds more than `limit` bytes, for they are bytes of the memory budget.
#[derive(Debug)]
pub(super) struct Queue {
    limit: u64,
    state: Mutex<State>,
    changed: Condvar,
    /// A batch was dealt with, or no more are taken.
    moved: Notify,
}

/// What the writer is to do.
pub(super) enum Next {
    Write(Batch),
    /// Nothing came for as long as it was willing to wait.
    Idle,
    Closed,
}

impl Queue {
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            state: Mutex::default(),
            changed: Condvar::new(),
            moved: Notify::new(),
        }
    }

    /// Adds a batch; gives it back when there is no room.
    pub fn push(&self, batch: Batch) -> Result<(), Batch> {
        let bytes = batch.bytes();
        let mut state = self.state.lock();
        if state.closed || state.bytes + bytes > self.limit {
            return Err(batch);
        }
        state.bytes += bytes;
        state.batches.push_back(batch);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Completes when a batch is dealt with, or no more are taken, after this was called.
    pub fn moved(&self) -> Notified<'_> {
        self.moved.notified()
    }

    /// Whether no more are taken.
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// The next batch; it takes its room until [`Self::done`].
    pub fn next(&self, patience: Duration) -> Next {
        let mut state = self.state.lock();
        if state.batches.is_empty() && !state.closed {
            self.changed.wait_for(&mut state, patience);
        }
        match state.batches.pop_front() {
            Some(batch) => Next::Write(batch),
            None if state.closed => Next::Closed,
            None => Next::Idle,
        }
    }

    /// `batch` has been dealt with.
    pub fn done(&self, batch: Batch) {
        let bytes = batch.bytes();
        // Its reservations go back first, and outside of the lock.
        drop(batch);
        self.state.lock().bytes -= bytes;
        self.changed.notify_all();
        self.moved.notify_waiters();
    }

    /// Takes no more; what is queued is still handed out.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
        self.moved.notify_waiters();
    }

    /// Waits until everything has been dealt with; false when that takes longer than `patience`.
    pub fn wait_until_empty(&self, patience: Duration) -> bool {
        let mut state = self.state.lock();
        self.changed
            .wait_while_for(&mut state, |state| state.bytes > 0, patience);
        state.bytes == 0
    }

    /// Lets go of everything and takes no more.
    pub fn abandon(&self) {
        self.close();
        let batches = std::mem::take(&mut self.state.lock().batches);
        let bytes: u64 = batches.iter().map(Batch::bytes).sum();
        drop(batches);
        self.state.lock().bytes -= bytes;
        self.changed.notify_all();
    }

    /// Bytes waiting or being written.
    pub fn bytes(&self) -> u64 {
        self.state.lock().bytes
    }
}
