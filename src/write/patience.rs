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
#[derive(Debug, Default)]
struct Trouble {
    since: Option<Instant>,
    pause: Duration,
    /// Parts that the store had confirmed when it began.
    confirmed: u64,
}

/// How much of that a close puts up with.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    trouble: Trouble,
    ending: watch::Receiver<bool>,
}

impl Writer {
    /// Patience for one file, for as long as nothing of it gets through.
    pub fn patience(&self) -> Patience {
        Patience {
            limit: self.options.close_timeout,
            trouble: Trouble::default(),
            ending: self.ending.subscribe(),
        }
    }

    /// The mount is about to end: what fails from now on is left to the next one.
    pub fn end(&self) {
        self.ending.send_replace(true);
    }
}

impl Trouble {
    /// After a failure: how long to pause before the next attempt, at most; `None` when nothing got
    /// through for `limit`.
    fn pause(&mut self, now: Instant, confirmed: u64, limit: Duration) -> Option<Duration> {
        if confirmed > self.confirmed {
            self.since = None;
        }
        let since = *self.since.get_or_insert_with(|| {
            self.pause = FIRST_PAUSE;
            self.confirmed = confirmed;
            now
        });
        let left = limit.saturating_sub(now.saturating_duration_since(since));
        let pause = self.pause.min(left);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        (!left.is_zero()).then_some(pause)
    }
}

impl Patience {
    /// After a failure: waits a while and tells whether to try again. Nothing is waited for where
    /// trying again cannot help, or has not helped for the whole of `--close-timeout`.
    pub async fn outlasts(&mut self, error: &WriteError, draft: &Draft) -> bool {
        if !error.is_transient() || *self.ending.borrow() {
            return false;
        }
        let begins = self.trouble.since.is_none();
        let pause = self
            .trouble
            .pause(Instant::now(), draft.confirmed(), self.limit);
        let Some(pause) = pause else {
            return false;
        };
        if begins {
            tracing::warn!(object = draft.target().object(), %error,
                for_seconds = self.limit.as_secs(), "not stored yet; trying again");
        }
        // All who wait for one store do not come back at once.
        let pause = pause.mul_f64(rand::random_range(0.5..1.0));
        let ended = tokio::time::timeout(pause, self.ending.wait_for(|ending| *ending)).await;
        ended.is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(100);

    #[test]
    fn pauses_grow_to_a_limit_and_end_with_the_time() {
        let mut trouble = Trouble::default();
        let mut now = Instant::now();
        let begun = now;
        let mut pauses = Vec::new();
        while let Some(pause) = trouble.pause(now, 7, LIMIT) {
            pauses.push(pause.as_millis());
            now += pause;
        }
        assert_eq!(pauses[..3], [500, 1000, 2000]);
        assert!(pauses.iter().all(|pause| *pause <= 30_000));
        assert_eq!(now - begun, LIMIT);
    }

    #[test]
    fn a_part_that_gets_through_begins_the_time_anew() {
        let mut trouble = Trouble::default();
        let begun = Instant::now();
        let almost = begun + LIMIT - Duration::from_secs(1);
        assert!(trouble.pause(begun, 0, LIMIT).is_some());
        assert!(trouble.pause(almost, 1, LIMIT).is_some());
        assert!(trouble.pause(almost + LIMIT / 2, 1, LIMIT).is_some());
        assert!(trouble.pause(almost + LIMIT, 1, LIMIT).is_none());
    }

    #[test]
    fn without_time_nothing_is_tried_again() {
        let mut trouble = Trouble::default();
        assert_eq!(trouble.pause(Instant::now(), 0, Duration::ZERO), None);
    }
}
