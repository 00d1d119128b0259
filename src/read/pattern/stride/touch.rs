//! What one read(2) asked for.

use std::ops::Range;

use super::LARGE_REQUEST;
use crate::read::READAHEAD;

/// A request that begins no further behind a touch's end, bytes, belongs to it: the kernel's are of
/// its readahead, and one of them may overtake another.
pub const MERGED: u64 = READAHEAD;

#[derive(Clone, Debug)]
pub struct Touch {
    pub start: u64,
    pub end: u64,
    /// Who asked for its end, 0 if that is not known.
    pub thread: u32,
    /// Whoever asked began elsewhere since.
    pub ended: bool,
    /// Nobody was reading another piece of its stride when it was begun.
    pub alone: bool,
    /// Everything before this has been asked for ahead of time.
    pub asked: u64,
    /// Everything before this was let go of.
    left: u64,
}

impl Touch {
    pub fn new(thread: u32, read: &Range<u64>) -> Self {
        Self {
            start: read.start,
            end: read.end,
            thread,
            ended: false,
            alone: false,
            asked: read.end,
            left: read.start,
        }
    }

    pub fn go_on(&mut self, thread: u32, read: &Range<u64>) {
        if read.end > self.end {
            self.end = read.end;
            self.thread = thread;
        }
    }

    /// Whether a read of `thread` belongs to it. What goes on behind its end belongs to whoever asked
    /// for that.
    pub fn takes(&self, thread: u32, read: &Range<u64>) -> bool {
        let earliest = self.start.max(self.end.saturating_sub(2 * MERGED));
        let is_others = thread != self.thread && thread != 0 && read.start >= self.end;
        (earliest..=self.end + MERGED).contains(&read.start) && !is_others
    }

    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Bytes of it that lie in `range`.
    pub fn within(&self, range: &Range<u64>) -> u64 {
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        end.saturating_sub(start)
    }

    /// What to fetch of it now that `read` was asked for, so that up to `share` bytes are ahead, and
    /// nothing beyond `end`; may be empty.
    pub fn rest(&self, read: &Range<u64>, share: u64, end: u64) -> Range<u64> {
        let from = self.asked.max(read.end);
        let to = (read.end + share).min(end).max(from);
        // A request smaller than it could be waits for more.
        if to == end || to - from >= LARGE_REQUEST.min(share / 2) {
            from..to
        } else {
            from..from
        }
    }

    /// Bytes of it that were read and not let go of.
    pub fn kept(&self) -> u64 {
        self.end.saturating_sub(self.left)
    }

    /// Lets go of it up to `until`: of what was not yet.
    pub fn leave(&mut self, until: u64) -> Option<Range<u64>> {
        let left = self.left..until.min(self.end);
        self.left = self.left.max(left.end);
        (!left.is_empty()).then_some(left)
    }
}
