//! How far away is what is read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A store that has answered within this time is near. One in a cloud takes ten times as long.
const NEAR: Duration = Duration::from_millis(2);

/// A store that has not answered within this time once is far: in another region, most likely, and each
/// connection to it carries the less, the longer the way.
const FAR: Duration = Duration::from_millis(25);

/// The shortest time that an answer of the store has taken to begin, and whether it was asked last.
#[derive(Debug)]
pub(super) struct Distance {
    nanoseconds: AtomicU64,
    on_disk: AtomicBool,
}

impl Default for Distance {
    fn default() -> Self {
        Self {
            nanoseconds: AtomicU64::new(u64::MAX),
            on_disk: AtomicBool::new(false),
        }
    }
}

impl Distance {
    /// Notes how long an answer of the store took to begin.
    pub fn note(&self, first_byte: Duration) {
        self.on_disk.store(false, Ordering::Relaxed);
        let nanoseconds = u64::try_from(first_byte.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_min(nanoseconds, Ordering::Relaxed);
    }

    /// Notes that there were blocks on local disk.
    pub fn note_disk(&self) {
        self.on_disk.store(true, Ordering::Relaxed);
    }

    /// Whether the blocks that came last were on local disk.
    pub fn is_on_disk(&self) -> bool {
        self.on_disk.load(Ordering::Relaxed)
    }

    /// Whether requests cost hardly any time: what is fetched far ahead of a reader then only lies in
    /// memory, and grows cold.
    pub fn is_near(&self) -> bool {
        self.shortest().is_some_and(|shortest| shortest < NEAR)
    }

    /// Whether it takes many requests at once to fill the way to the store.
    pub fn is_far(&self) -> bool {
        self.shortest().is_some_and(|shortest| shortest >= FAR)
    }

    fn shortest(&self) -> Option<Duration> {
        let nanoseconds = self.nanoseconds.load(Ordering::Relaxed);
        (nanoseconds < u64::MAX).then(|| Duration::from_nanos(nanoseconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_answered_late_only_is_far() {
        let distance = Distance::default();
        assert!(!distance.is_far());
        distance.note(Duration::from_millis(60));
        assert!(distance.is_far());
        distance.note(Duration::from_millis(15));
        distance.note(Duration::from_millis(60));
        assert!(!distance.is_far() && !distance.is_near());
    }

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

    #[test]
    fn what_came_last_tells_whether_blocks_are_on_disk() {
        let distance = Distance::default();
        assert!(!distance.is_on_disk());
        distance.note_disk();
        assert!(distance.is_on_disk());
        distance.note(Duration::from_millis(15));
        assert!(!distance.is_on_disk());
    }
}
