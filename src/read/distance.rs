//! How far away a store is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A store that has answered within this time is near. One in a cloud takes ten times as long.
const NEAR: Duration = Duration::from_millis(2);

/// The shortest time that an answer has taken to begin.
#[derive(Debug)]
pub(super) struct Distance {
    nanoseconds: AtomicU64,
}

impl Default for Distance {
    fn default() -> Self {
        Self {
            nanoseconds: AtomicU64::new(u64::MAX),
        }
    }
}

impl Distance {
    /// Notes how long an answer took to begin.
    pub fn note(&self, first_byte: Duration) {
        let nanoseconds = u64::try_from(first_byte.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_min(nanoseconds, Ordering::Relaxed);
    }

    /// Whether requests cost hardly any time: what is fetched far ahead of a reader then only lies in
    /// memory, and grows cold.
    pub fn is_near(&self) -> bool {
        u128::from(self.nanoseconds.load(Ordering::Relaxed)) < NEAR.as_nanos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_quick_answer_is_enough_to_be_near() {
        let distance = Distance::default();
        assert!(!distance.is_near());
        distance.note(Duration::from_millis(15));
        assert!(!distance.is_near());
        distance.note(Duration::from_micros(400));
        distance.note(Duration::from_millis(15));
        assert!(distance.is_near());
    }
}
