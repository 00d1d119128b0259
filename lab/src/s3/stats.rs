//! What was asked, by kind.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Requests remembered one by one.
const REMEMBERED: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    List,
    Head,
    Get,
    Put,
    CreateMultipart,
    UploadPart,
    CopyPart,
    CompleteMultipart,
    AbortMultipart,
    ListParts,
    ListUploads,
    Copy,
    Delete,
    Other,
}

/// One request.
#[derive(Clone, Debug, Serialize)]
pub struct Logged {
    pub kind: Kind,
    pub key: String,
    pub range: Option<String>,
    pub status: u16,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Count {
    pub requests: u64,
    /// Bytes of bodies that came in.
    pub bytes_in: u64,
    /// Bytes of bodies that went out.
    pub bytes_out: u64,
}

/// Counts by kind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    pub kinds: BTreeMap<Kind, Count>,
    /// Requests that came in and have no answer yet.
    pub at_once: u64,
    pub most_at_once: u64,
    /// Answers to reads whose bodies are on their way.
    pub sending: u64,
    pub most_sending: u64,
}

impl Stats {
    pub fn of(&self, kind: Kind) -> Count {
        self.kinds.get(&kind).cloned().unwrap_or_default()
    }

    pub fn requests(&self) -> u64 {
        self.kinds.values().map(|count| count.requests).sum()
    }
}

#[derive(Debug, Default)]
struct State {
    stats: Stats,
    log: VecDeque<Logged>,
}

/// Counts while the server runs.
#[derive(Debug, Default)]
pub(super) struct Counter {
    state: Mutex<State>,
}

/// A request that is being served; also one that nobody waits for any more ends.
pub(super) struct AtOnce<'a>(&'a Counter);

impl Drop for AtOnce<'_> {
    fn drop(&mut self) {
        self.0.state.lock().stats.at_once -= 1;
    }
}

/// An answer whose body is on its way; one that nobody takes any more ends, too.
pub(super) struct Sending(Arc<Counter>);

impl Sending {
    pub fn begin(counter: &Arc<Counter>) -> Self {
        let stats = &mut counter.state.lock().stats;
        stats.sending += 1;
        stats.most_sending = stats.most_sending.max(stats.sending);
        Self(Arc::clone(counter))
    }

    /// Counts `bytes` that went out.
    pub fn bytes_out(&self, kind: Kind, bytes: u64) {
        let mut state = self.0.state.lock();
        state.stats.kinds.entry(kind).or_default().bytes_out += bytes;
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.state.lock().stats.sending -= 1;
    }
}

impl Counter {
    pub fn begin(&self, kind: Kind) -> AtOnce<'_> {
        let mut state = self.state.lock();
        let stats = &mut state.stats;
        stats.at_once += 1;
        stats.most_at_once = stats.most_at_once.max(stats.at_once);
        stats.kinds.entry(kind).or_default().requests += 1;
        AtOnce(self)
    }

    pub fn answered(&self, logged: Logged) {
        let mut state = self.state.lock();
        if state.log.len() == REMEMBERED {
            state.log.pop_front();
        }
        state.log.push_back(logged);
    }

    pub fn bytes_in(&self, kind: Kind, bytes: u64) {
        self.state
            .lock()
            .stats
            .kinds
            .entry(kind)
            .or_default()
            .bytes_in += bytes;
    }

    pub fn stats(&self) -> Stats {
        self.state.lock().stats.clone()
    }

    pub fn log(&self) -> Vec<Logged> {
        self.state.lock().log.iter().cloned().collect()
    }

    pub fn reset(&self) {
        let mut state = self.state.lock();
        let Stats {
            at_once, sending, ..
        } = state.stats;
        *state = State::default();
        state.stats.at_once = at_once;
        state.stats.sending = sending;
    }
}
