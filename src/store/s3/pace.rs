//! How many requests are on the wire at once: as many as the store takes.
//!
//! Every attempt of a request takes a place before it is sent. There is no limit until the store
//! refuses an attempt with 503 or 429; then half of what was on the wire is allowed (multiplicative
//! decrease), and one more after each round of successes (additive increase), until as many are
//! allowed again as were on the wire at the first refusal: then the limit is lifted.
//!
//! One burst brings many refusals, of attempts that all began before the store said a word. They
//! are one round and count as one refusal, unless as many of them are refused as are still allowed:
//! then the half was too many, and is halved again. So of 64 attempts at a store that takes 8,
//! the first round of refusals leads to 8.
//!
//! A place is given back when the head of the answer has come. Whoever reads a body may be held up
//! by whom it is for, and must not hold up others.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::store::metrics::StoreMetrics;

/// More than there are ever requests at once: no limit.
const UNLIMITED: usize = 1 << 20;

/// The arithmetic, without the waiting.
#[derive(Debug, Default)]
struct Window {
    in_flight: usize,
    /// Attempts so far: each has its number.
    begun: u64,
    limit: Option<Limit>,
}

#[derive(Debug)]
struct Limit {
    places: usize,
    /// With more places than this there is no limit.
    ceiling: usize,
    /// Attempts with lower numbers began before the last cut.
    round: u64,
    /// Since the last change.
    successes: usize,
    refusals: usize,
}

impl Window {
    fn places(&self) -> usize {
        self.limit.as_ref().map_or(UNLIMITED, |limit| limit.places)
    }

    fn begin(&mut self) -> u64 {
        self.in_flight += 1;
        self.begun += 1;
        self.begun - 1
    }

    fn end(&mut self) {
        self.in_flight -= 1;
    }

    /// The store has refused the attempt of this number, which is still in flight.
    fn refused(&mut self, number: u64) {
        let (in_flight, begun) = (self.in_flight, self.begun);
        let limit = self.limit.get_or_insert(Limit {
            places: in_flight,
            ceiling: in_flight,
            round: 0,
            successes: 0,
            refusals: 0,
        });
        limit.refusals += 1;
        if number >= limit.round || limit.refusals >= limit.places {
            limit.places = (limit.places / 2).max(1);
            limit.round = begun;
            limit.successes = 0;
            limit.refusals = 0;
        }
    }

    fn succeeded(&mut self) {
        let Some(limit) = &mut self.limit else { return };
        limit.successes += 1;
        if limit.successes >= limit.places {
            limit.places += 1;
            limit.successes = 0;
            limit.refusals = 0;
        }
        if limit.places > limit.ceiling {
            self.limit = None;
        }
    }
}

#[derive(Debug)]
struct State {
    window: Window,
    /// Places there are, taken or free. More than the window's for as long as those that are to go
    /// are taken.
    existing: usize,
}

/// The places of one endpoint.
#[derive(Debug)]
pub(super) struct Pace {
    free: Arc<Semaphore>,
    state: Mutex<State>,
    metrics: Arc<StoreMetrics>,
}

/// A place on the wire, until it is dropped.
pub(super) struct Place {
    pace: Arc<Pace>,
    permit: Option<OwnedSemaphorePermit>,
    number: u64,
}

impl Pace {
    pub fn new(metrics: Arc<StoreMetrics>) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(UNLIMITED)),
            state: Mutex::new(State {
                window: Window::default(),
                existing: UNLIMITED,
            }),
            metrics,
        })
    }

    /// Waits for a place, first come, first served; `None` when there is none within `longest`.
    pub async fn place(self: &Arc<Self>, longest: Duration) -> Option<Place> {
        let free = Arc::clone(&self.free);
        let permit = match Arc::clone(&free).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let _waiting = self.metrics.waiting();
                // It is never closed.
                tokio::time::timeout(longest, free.acquire_owned())
                    .await
                    .ok()?
                    .ok()?
            }
        };
        let number = self.state.lock().window.begin();
        Some(Place {
            pace: Arc::clone(self),
            permit: Some(permit),
            number,
        })
    }

    /// Makes and takes away places until there are as many as the window says.
    fn settle(&self, state: &mut State) {
        let wanted = state.window.places();
        if wanted > state.existing {
            self.free.add_permits(wanted - state.existing);
            state.existing = wanted;
        } else {
            state.existing -= self.free.forget_permits(state.existing - wanted);
        }
        let limit = state.window.limit.as_ref().map(|limit| limit.places);
        self.metrics.set_places(limit);
    }
}

impl Place {
    /// The store has answered with this HTTP status.
    pub fn answered(&self, status: u16) {
        let mut state = self.pace.state.lock();
        if matches!(status, 429 | 503) {
            self.pace.metrics.count_throttled();
            state.window.refused(self.number);
        } else if status < 500 {
            state.window.succeeded();
        }
        self.pace.settle(&mut state);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.pace.state.lock();
        state.window.end();
        drop(self.permit.take());
        self.pace.settle(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn burst(window: &mut Window, attempts: usize) -> Vec<u64> {
        (0..attempts).map(|_| window.begin()).collect()
    }

    #[test]
    fn one_refusal_halves_and_the_rest_of_its_round_does_not() {
        let mut window = Window::default();
        let burst = burst(&mut window, 64);
        for number in &burst[..32] {
            window.refused(*number);
            window.end();
            assert_eq!(window.places(), 32);
        }
    }

    #[test]
    fn more_refusals_than_places_halve_again_down_to_what_was_taken() {
        for (taken, places) in [(32, 32), (16, 16), (8, 8), (1, 1), (0, 1)] {
            let mut window = Window::default();
            let burst = burst(&mut window, 64);
            for number in &burst[taken..] {
                window.refused(*number);
                window.end();
            }
            assert_eq!(window.places(), places, "of a store that takes {taken}");
        }
    }

    #[test]
    fn it_never_falls_below_one_and_an_attempt_after_the_cut_halves_again() {
        let mut window = Window::default();
        for places in [4, 2, 1, 1, 1] {
            let burst = burst(&mut window, 8);
            window.refused(burst[0]);
            burst.iter().for_each(|_| window.end());
            assert_eq!(window.places(), places);
        }
    }

    #[test]
    fn it_grows_by_one_a_round_until_there_is_no_limit() {
        let mut window = Window::default();
        let burst = burst(&mut window, 8);
        window.refused(burst[7]);
        for places in 4..=8 {
            assert_eq!(window.places(), places);
            (0..places).for_each(|_| window.succeeded());
        }
        assert_eq!(window.places(), UNLIMITED);
        window.succeeded();
        assert_eq!(window.places(), UNLIMITED);
    }

    #[tokio::test(start_paused = true)]
    async fn places_that_are_taken_away_do_not_come_back_and_those_that_grow_do() {
        let longest = Duration::from_secs(60);
        let pace = Pace::new(Arc::default());
        let mut places = Vec::new();
        for _ in 0..8 {
            places.push(pace.place(longest).await.unwrap());
        }
        places[0].answered(503);
        // Five of eight must go before one of four is free.
        for _ in 0..4 {
            assert!(pace.place(longest).await.is_none());
            places.pop();
        }
        assert!(pace.place(longest).await.is_none());
        places.pop();
        places.push(pace.place(longest).await.unwrap());
        assert!(pace.place(longest).await.is_none());
        for _ in 0..4 {
            places[0].answered(200);
        }
        places.push(pace.place(longest).await.unwrap());
        assert!(pace.place(longest).await.is_none());
    }
}
