//! Buffers of whole chunks, kept for the next chunk.
//!
//! The memory of a large buffer that is given back goes back to the kernel, which clears every page
//! of it anew for the next one: measured, 45 % of the processor time of a large write. A buffer kept
//! here stays reserved, and goes as soon as anybody else needs the bytes.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::budget::{Budget, Class, Reclaim, Reservation};

/// A buffer whose pages are all there, and the reservation that covers them.
#[derive(Debug)]
struct Kept {
    bytes: Vec<u8>,
    reservation: Reservation,
}

/// Empty buffers of one size.
#[derive(Debug)]
pub(super) struct Pool {
    budget: Arc<Budget>,
    /// Bytes of a buffer.
    size: usize,
    kept: Mutex<Vec<Kept>>,
}

impl Pool {
    /// A pool of buffers of `size` bytes, as many as `budget` has room for: files that are written
    /// one after the other need as many again. It gives way when that is short.
    pub fn new(budget: Arc<Budget>, size: usize) -> Arc<Self> {
        let pool = Arc::new(Self {
            budget: Arc::clone(&budget),
            size,
            kept: Mutex::default(),
        });
        let as_reclaimer: std::sync::Weak<Self> = Arc::downgrade(&pool);
        budget.add_reclaimer(as_reclaimer);
        pool
    }

    /// An empty buffer of `size` bytes with its reservation, if there is one.
    pub fn take(&self, size: usize) -> Option<(Vec<u8>, Reservation)> {
        if size != self.size {
            return None;
        }
        let kept = self.kept.lock().pop()?;
        Some((kept.bytes, kept.reservation))
    }

    /// Keeps a buffer that nobody needs any more, if it is of the right size and all of it can be
    /// reserved at nobody's cost.
    pub fn put(&self, mut bytes: Vec<u8>, mut reservation: Reservation) {
        if bytes.capacity() != self.size {
            return;
        }
        let missing = (self.size as u64).saturating_sub(reservation.bytes());
        if missing > 0 {
            let Some(more) = self.budget.try_reserve_free(Class::Write, missing) else {
                return;
            };
            reservation.merge(more);
        }
        bytes.clear();
        self.kept.lock().push(Kept { bytes, reservation });
        // Who waits for bytes can have these.
        self.budget.note_reclaimable();
    }
}

impl Reclaim for Pool {
    fn reclaim(&self, bytes: u64) -> u64 {
        let buffers = bytes.div_ceil(self.size as u64) as usize;
        let given: Vec<Kept> = {
            let mut kept = self.kept.lock();
            let rest = kept.len().saturating_sub(buffers);
            kept.split_off(rest)
        };
        (given.len() * self.size) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_kept_reserved_and_gives_way_to_who_needs_the_bytes() {
        let budget = Budget::plain(100);
        let pool = Pool::new(Arc::clone(&budget), 40);
        for _ in 0..2 {
            let reservation = budget.try_reserve(Class::Write, 10).unwrap();
            pool.put(Vec::with_capacity(40), reservation);
        }
        assert_eq!(budget.used(), 80);
        let (bytes, reservation) = pool.take(40).unwrap();
        assert_eq!((bytes.capacity(), reservation.bytes()), (40, 40));
        drop(reservation);
        assert!(budget.try_reserve(Class::Read, 100).is_some());
        assert!(pool.take(40).is_none());
    }

    #[tokio::test]
    async fn who_waits_for_bytes_gets_those_of_a_buffer_put_here() {
        let budget = Budget::plain(50);
        let pool = Pool::new(Arc::clone(&budget), 40);
        let reservation = budget.try_reserve(Class::Write, 40).unwrap();
        let waiter = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.reserve(Class::Read, 30).await.bytes() }
        });
        tokio::task::yield_now().await;
        pool.put(Vec::with_capacity(40), reservation);
        assert_eq!(waiter.await.unwrap(), 30);
    }

    #[test]
    fn what_does_not_fit_is_let_go() {
        let budget = Budget::plain(50);
        let pool = Pool::new(Arc::clone(&budget), 40);
        let other = budget.try_reserve(Class::Read, 30).unwrap();
        let reservation = budget.try_reserve(Class::Write, 10).unwrap();
        pool.put(Vec::with_capacity(40), reservation);
        assert_eq!(budget.used(), 30);
        drop(other);
        let reservation = budget.try_reserve(Class::Write, 10).unwrap();
        pool.put(Vec::with_capacity(41), reservation);
        assert!(pool.take(40).is_none() && pool.take(41).is_none());
    }
}
