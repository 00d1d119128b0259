//! Byte budgets: a limit that is never exceeded, shared by classes that cannot starve each other.
//!
//! Whoever wants bytes reserves them first and gives them back by dropping the [`Reservation`].
//! When the budget is spent the reserving task waits; that wait is mlfs's backpressure. Each
//! class has a floor that the other classes cannot take, so that a full write buffer cannot stop
//! the transfer that would empty it.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Who wants bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Data that writers handed over.
    Write,
    /// Blocks that were read, or are being read.
    Read,
    /// Bodies brought back from disk, or from the store, to be sent.
    Transfer,
}

const CLASSES: usize = 3;

/// Something that holds bytes it can do without, such as a cache.
pub trait Reclaim: Send + Sync {
    /// Gives up at least `bytes` if it can; returns what it gave up.
    fn reclaim(&self, bytes: u64) -> u64;
}

#[derive(Debug, Default)]
struct Usage {
    used: [u64; CLASSES],
    peak: u64,
}

/// A limit in bytes and what is used of it.
pub struct Budget {
    limit: u64,
    floors: [u64; CLASSES],
    usage: Mutex<Usage>,
    freed: Notify,
    reclaimers: Mutex<Vec<Weak<dyn Reclaim>>>,
}

impl std::fmt::Debug for Budget {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (used, peak) = (self.used(), self.peak());
        formatter
            .debug_struct("Budget")
            .field("limit", &self.limit)
            .field("used", &used)
            .field("peak", &peak)
            .finish()
    }
}

/// Bytes held; dropping gives them back.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    class: Class,
    bytes: u64,
}

impl Budget {
    /// A budget of `limit` bytes; each class keeps its floor whatever the others do.
    pub fn new(limit: u64, write_floor: u64, read_floor: u64, transfer_floor: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            floors: [write_floor, read_floor, transfer_floor],
            usage: Mutex::new(Usage::default()),
            freed: Notify::new(),
            reclaimers: Mutex::new(Vec::new()),
        })
    }

    /// A budget for one class only.
    pub fn plain(limit: u64) -> Arc<Self> {
        Self::new(limit, 0, 0, 0)
    }

    /// Registers a holder of bytes that can be given up when somebody wants them. The one that was
    /// registered last is asked first.
    pub fn add_reclaimer(&self, reclaimer: Weak<dyn Reclaim>) {
        self.reclaimers.lock().push(reclaimer);
    }

    /// Something came to be that can be given up: who waits for bytes looks again.
    pub fn note_reclaimable(&self) {
        self.freed.notify_waiters();
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes reserved now.
    pub fn used(&self) -> u64 {
        self.usage.lock().used.iter().sum()
    }

    /// Bytes reserved now by one class.
    pub fn used_by(&self, class: Class) -> u64 {
        self.usage.lock().used[class as usize]
    }

    /// The most bytes that were ever reserved at once.
    pub fn peak(&self) -> u64 {
        self.usage.lock().peak
    }

    /// The most one class can ever hold.
    pub fn ceiling(&self, class: Class) -> u64 {
        let others: u64 = (0..CLASSES)
            .filter(|other| *other != class as usize)
            .map(|other| self.floors[other])
            .sum();
        self.limit.saturating_sub(others)
    }

    fn take(&self, class: Class, bytes: u64) -> bool {
        let mut usage = self.usage.lock();
        let kept_for_others: u64 = (0..CLASSES)
            .filter(|other| *other != class as usize)
            .map(|other| self.floors[other].saturating_sub(usage.used[other]))
            .sum();
        let total: u64 = usage.used.iter().sum();
        if total + kept_for_others + bytes > self.limit {
            return false;
        }
        usage.used[class as usize] += bytes;
        usage.peak = usage.peak.max(total + bytes);
        true
    }

    /// Reserves without waiting, asking the reclaimers when there is not enough.
    pub fn try_reserve(self: &Arc<Self>, class: Class, bytes: u64) -> Option<Reservation> {
        if self.take(class, bytes) || (self.reclaim(bytes) && self.take(class, bytes)) {
            return Some(Reservation {
                budget: Arc::clone(self),
                class,
                bytes,
            });
        }
        None
    }

    /// Reserves only what is free, never at the cost of a reclaimer.
    pub fn try_reserve_free(self: &Arc<Self>, class: Class, bytes: u64) -> Option<Reservation> {
        self.take(class, bytes).then(|| Reservation {
            budget: Arc::clone(self),
            class,
            bytes,
        })
    }

    /// Reserves what is spent already, such as bytes that a former process left on the disk: the
    /// only way past the limit.
    pub fn reserve_regardless(self: &Arc<Self>, class: Class, bytes: u64) -> Reservation {
        let mut usage = self.usage.lock();
        usage.used[class as usize] += bytes;
        usage.peak = usage.peak.max(usage.used.iter().sum());
        Reservation {
            budget: Arc::clone(self),
            class,
            bytes,
        }
    }

    fn reclaim(&self, bytes: u64) -> bool {
        let reclaimers: Vec<_> = self
            .reclaimers
            .lock()
            .iter()
            .rev()
            .filter_map(Weak::upgrade)
            .collect();
        let mut freed = 0;
        for reclaimer in reclaimers {
            if freed >= bytes {
                break;
            }
            freed += reclaimer.reclaim(bytes - freed);
        }
        freed > 0
    }

    /// Reserves, waiting as long as it takes. More than the class can ever hold is cut to that.
    pub async fn reserve(self: &Arc<Self>, class: Class, bytes: u64) -> Reservation {
        let bytes = bytes.min(self.ceiling(class));
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(reservation) = self.try_reserve(class, bytes) {
                return reservation;
            }
            freed.await;
        }
    }

    /// Is ready when something is given back, or could be given up, from now on. To be pinned and
    /// enabled before looking for what there is.
    pub fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    fn give_back(&self, class: Class, bytes: u64) {
        if bytes == 0 {
            return;
        }
        {
            let mut usage = self.usage.lock();
            let used = &mut usage.used[class as usize];
            debug_assert!(*used >= bytes, "more given back than was reserved");
            *used = used.saturating_sub(bytes);
        }
        self.freed.notify_waiters();
    }
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds another reservation of the same budget and class to this one.
    pub fn merge(&mut self, mut other: Reservation) {
        debug_assert!(Arc::ptr_eq(&self.budget, &other.budget) && self.class == other.class);
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Cuts `bytes` off into a reservation of their own.
    pub fn split(&mut self, bytes: u64) -> Reservation {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Reservation {
            budget: Arc::clone(&self.budget),
            class: self.class,
            bytes,
        }
    }

    /// Gives back all but `bytes`.
    pub fn shrink_to(&mut self, bytes: u64) {
        if bytes < self.bytes {
            self.budget.give_back(self.class, self.bytes - bytes);
            self.bytes = bytes;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.give_back(self.class, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_never_exceeded_and_dropping_gives_back() {
        let budget = Budget::plain(100);
        let first = budget.try_reserve(Class::Write, 60).unwrap();
        assert!(budget.try_reserve(Class::Write, 41).is_none());
        drop(first);
        assert!(budget.try_reserve(Class::Write, 100).is_some());
        assert_eq!(budget.used(), 0);
        assert_eq!(budget.peak(), 100);
    }

    #[test]
    fn a_class_cannot_take_the_floor_of_another() {
        let budget = Budget::new(100, 10, 10, 20);
        let writes = budget.try_reserve(Class::Write, 70).unwrap();
        assert!(budget.try_reserve(Class::Write, 1).is_none());
        assert!(budget.try_reserve(Class::Transfer, 20).is_some());
        assert!(budget.try_reserve(Class::Read, 10).is_some());
        drop(writes);
    }

    #[tokio::test]
    async fn a_waiter_is_served_when_bytes_come_back() {
        let budget = Budget::plain(10);
        let held = budget.try_reserve(Class::Write, 10).unwrap();
        let waiter = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.reserve(Class::Write, 5).await.bytes() }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(held);
        assert_eq!(waiter.await.unwrap(), 5);
    }
}
