//! How long a close goes on trying while the store is in trouble.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Writer;
use super::draft::Draft;
use super::error::WriteError;

/// Pauses between two attempts, beyond those that the store makes inside of each.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The trouble that one file has with its store. It ends with the first part that gets through, and
/// begins again with the next failure.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    since: Option<Instant>,
    pause: Duration,
    /// Parts that the store had confirmed when the trouble began.
    confirmed: u64,
    ending: watch::Receiver<bool>,
}

impl Writer {
    /// Patience for one file, for as long as nothing of it gets through.
    pub fn patience(&self) -> Patience {
        Patience {
            limit: self.options.close_timeout,
            since: None,
            pause: FIRST_PAUSE,
            confirmed: 0,
            ending: self.ending.subscribe(),
        }
    }

    /// The mount is about to end: what fails from now on is left to the next one.
    pub fn end(&self) {
        self.ending.send_replace(true);
    }
}

impl Patience {
    /// After a failure: waits a while and tells whether to try again. Nothing is waited for where
    /// trying again cannot help, or has not helped for the whole of `--close-timeout`.
    pub async fn outlasts(&mut self, error: &WriteError, draft: &Draft) -> bool {
        if !error.is_transient() || *self.ending.borrow() {
            return false;
        }
        let confirmed = draft.confirmed();
        let now = Instant::now();
        if self.since.is_none() || confirmed > self.confirmed {
            if self.since.is_none() && !self.limit.is_zero() {
                tracing::warn!(object = draft.target().object(), %error,
                    for_seconds = self.limit.as_secs(), "not stored yet; trying again");
            }
            self.since = Some(now);
            self.pause = FIRST_PAUSE;
            self.confirmed = confirmed;
        }
        let tried = self.since.map_or(Duration::ZERO, |since| now - since);
        let left = self.limit.saturating_sub(tried);
        if left.is_zero() {
            return false;
        }
        // All who wait for one store do not come back at once.
        let pause = self.pause.mul_f64(rand::random_range(0.5..1.0)).min(left);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        let ended = tokio::time::timeout(pause, self.ending.wait_for(|ending| *ending)).await;
        ended.is_err()
    }
}
