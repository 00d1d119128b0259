//! Whether the tracking server answers, said once when it stops and once when it is back.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::tracking::TrackingError;

/// While the server is away, runs that are known are refreshed no more often than this, all of
/// them together; each try is one call with its retries.
const ASK_AGAIN: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Outage {
    /// When the server may be asked again for what is known; `None` while it answers.
    state: Mutex<Option<Instant>>,
}

impl Outage {
    pub fn note_up(&self, server: &str) {
        if self.state.lock().take().is_some() {
            tracing::info!(server, "the tracking server answers again");
        }
    }

    pub fn note_down(&self, error: &TrackingError) {
        let mut state = self.state.lock();
        if state.is_none() {
            tracing::warn!(%error, "the tracking server fails; what is known of runs goes on \
                counting until it answers");
            *state = Some(Instant::now() + ASK_AGAIN);
        }
    }

    pub fn is_known(&self) -> bool {
        self.state.lock().is_some()
    }

    /// During an outage: whether it is time to ask whether it is over. True for one caller in
    /// each interval.
    pub fn is_time_to_ask(&self) -> bool {
        let mut state = self.state.lock();
        let now = Instant::now();
        match &mut *state {
            Some(next) if *next <= now => {
                *next = now + ASK_AGAIN;
                true
            }
            _ => false,
        }
    }
}
