//! How much may be fetched ahead in an object, learnt from what was fetched in vain.

/// The smallest window, bytes: a request that costs little more than its round trip. Where even
/// that is wasted there is none, until so many bytes were read.
const LEAST: u64 = 1 << 20;
const CLOSED_FOR: u64 = 64 << 20;
/// So much of the window, and of what is read, may be wasted without a cut, as a share: a stream
/// that ends wastes its window once, and strided readers have small gaps fetched along.
const TOLERATED: u64 = 4;
/// So many windows read without a cut double the limit.
const REGROWTH: u64 = 4;

/// Cut in half when too much was let go of unread, doubled while that does not happen.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    bytes: u64,
    /// The largest window since it was changed last, and the bytes wasted and read.
    granted: u64,
    wasted: u64,
    read: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self::new(u64::MAX, 0)
    }
}

impl Limit {
    fn new(bytes: u64, granted: u64) -> Self {
        Self {
            bytes,
            granted,
            wasted: 0,
            read: 0,
        }
    }

    /// Bytes of a window at most.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes how large a window is.
    pub fn note_window(&mut self, bytes: u64) {
        self.granted = self.granted.max(bytes.min(self.bytes));
    }

    /// Notes that `bytes` fetched ahead since the last cut were let go of without anybody having
    /// read them; tells whether that makes for a cut.
    pub fn note_waste(&mut self, bytes: u64) -> bool {
        self.wasted += bytes;
        let window = self.granted.max(LEAST);
        let cut = bytes > 0 && self.wasted > window / TOLERATED + self.read / TOLERATED;
        if cut {
            let half = window / 2;
            let half = if half < LEAST { 0 } else { half };
            *self = Self::new(half, half);
        }
        cut
    }

    /// Notes that `bytes` were asked for.
    pub fn note_read(&mut self, bytes: u64) {
        self.read += bytes;
        let (pause, larger) = match self.bytes {
            0 => (CLOSED_FOR, LEAST),
            bytes => {
                let window = self.granted.max(LEAST);
                (window.saturating_mul(REGROWTH), bytes.saturating_mul(2))
            }
        };
        if self.read >= pause {
            *self = Self::new(larger, self.granted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_window_that_was_wasted_is_cut_and_grows_again_while_none_is() {
        let mut limit = Limit::default();
        limit.note_window(64 * MIB);
        limit.note_read(32 * MIB);
        limit.note_waste(64 * MIB);
        assert_eq!(limit.bytes(), 32 * MIB);
        limit.note_read(REGROWTH * 32 * MIB);
        assert_eq!(limit.bytes(), 64 * MIB);
        for _ in 0..20 {
            limit.note_window(64 * MIB);
            limit.note_waste(64 * MIB);
        }
        assert_eq!(limit.bytes(), 0);
        limit.note_read(CLOSED_FOR);
        assert_eq!(limit.bytes(), LEAST);
    }

    #[test]
    fn a_little_waste_beside_much_reading_cuts_nothing() {
        let mut limit = Limit::default();
        limit.note_window(64 * MIB);
        for _ in 0..10_000 {
            limit.note_read(MIB);
            limit.note_waste(MIB / TOLERATED);
        }
        assert_eq!(limit.bytes(), u64::MAX);
    }

    #[test]
    fn bursts_of_a_stream_settle_on_a_window_of_about_half_their_length() {
        let mut limit = Limit::default();
        let burst = 32 * MIB;
        let mut wasted = 0;
        for index in 0..100 {
            for _ in 0..32 {
                limit.note_read(MIB);
                limit.note_window(burst.min(limit.bytes()));
            }
            let window = burst.min(limit.bytes());
            limit.note_waste(window);
            if index >= 10 {
                wasted += window;
            }
        }
        assert!(wasted <= 90 * burst / 2, "{}", wasted / MIB);
    }
}
