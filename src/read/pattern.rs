//! How readers move through an object, and how far it pays to run ahead of them.
//!
//! A **stream** is a place that moves forward. Reads are matched to streams with slack in both
//! directions, because readers do not move byte by byte: the C library's large `memcpy` faults
//! each MiB of a mapping backwards, several threads share a file, the kernel reads ahead out of
//! order. A read near no stream starts a new one, with no window: the first touch of a place
//! fetches what was asked and nothing more. Later the window follows what the stream has
//! consumed, until it fills the wire. Who moves otherwise, but in equal steps, is for [`stride`];
//! how large windows get here, seeing what was fetched in vain, for [`limit`].

mod limit;
mod stride;

use std::collections::VecDeque;
use std::ops::Range;

use super::{BLOCK_SIZE, PAGE};
use limit::Limit;
pub(super) use stride::Strided;
use stride::Strides;

/// Streams watched per object; the one touched longest ago gives way.
const STREAMS: usize = 16;
/// A read that starts this far ahead of a stream still continues it, bytes.
const SLACK_AHEAD: u64 = 4 << 20;
/// A read that starts this far behind a stream's front still belongs to it, bytes.
const SLACK_BEHIND: u64 = 2 << 20;
/// Nothing is fetched ahead before a stream has consumed more than this, bytes: a random read of
/// a MiB arrives as several requests of the kernel's, and must not look like a stream. One that began
/// at the first byte is hardly random: it is run ahead of, by what it has consumed, as soon as it
/// has read more than the kernel does around the first page.
const QUIET: u64 = 3 << 19;
/// A stream that began in the middle may end soon (a tensor, a member of an archive): until it has
/// consumed this much, bytes, it runs ahead by a quarter of what it consumed.
const CAUTIOUS: u64 = 16 << 20;
/// Bytes of one request ahead at least; of a smaller window, half of it.
const SMALL_REQUEST: u64 = 1 << 20;
/// Until it has consumed this much, bytes, what it leaves out counts as much as what who begins at
/// the first byte does.
const UNSURE: u64 = 4 << 20;
/// What a long stream has read is kept this far behind its front, bytes: other readers may follow
/// closely, and readahead comes out of order.
const KEPT_BEHIND: u64 = 8 << 20;
/// A stream that began at the first byte is most likely a whole-file read, and one inside of a
/// tensor most likely reads that to its end: it runs ahead by this many times what it consumed.
const EAGER: u64 = 4;
/// The kernel reads around a page of a mapping that is touched, or ahead of it, this far at most,
/// bytes: a stream that consumed no more of the tensor before begins where it goes on.
const AROUND: u64 = 256 << 10;
/// The kernel's readahead is no longer than this, bytes: what torch maps, of files whose tensors are read
/// as a whole. Longer reads are of who asks for just what he wants.
const LONGEST_READAHEAD: u64 = 512 << 10;
/// It must have read three quarters of what it has passed, though, and any other half of it: who
/// leaves out more reads here and there.
const DENSE_QUARTERS: u64 = 3;
const SPARSE_QUARTERS: u64 = 2;
/// So many of the streams that ended last are looked at, and at least so many: if three quarters of
/// them were about as long, the next one is expected to be, too. Not all: two that meet are one for
/// a while.
const ENDED: usize = 8;
const ENDED_AT_LEAST: usize = 4;
/// Streams that were longer than this, bytes, say nothing: who reads that much is met on the way.
const LONGEST_ALIKE: u64 = 8 << 20;
/// A stream that has read no less than this share of what another has may read the next part.
const ALIKE_SHARE: u64 = 4;

#[derive(Clone, Debug)]
struct Stream {
    /// Whether it is inside of a tensor.
    inside: bool,
    start: u64,
    /// The furthest byte read.
    front: u64,
    /// Bytes read since the stream began.
    consumed: u64,
    /// Bytes of the last read.
    length: u64,
    window: u64,
    /// Everything before this has been asked for ahead of time.
    asked: u64,
    /// Nothing is fetched ahead beyond this: the end of the tensor the stream is in, until it has
    /// shown that it goes on.
    bound: u64,
    /// Bytes read beyond the bound.
    beyond: u64,
    /// Where those before say that it will end, until it has gone well past that.
    expected: Option<u64>,
    /// Everything before this has been let go of.
    kept: u64,
    touched: u64,
    /// The thread that reads it, 0 if that is not known or there are several.
    thread: u32,
    /// Its thread reads elsewhere now, and its length has been noted.
    ended: bool,
}

impl Stream {
    /// Whether `read` goes on with it.
    fn is_near(&self, read: &Range<u64>) -> bool {
        read.start + SLACK_BEHIND >= self.front && read.start <= self.front + SLACK_AHEAD
    }

    fn is_eager(&self) -> bool {
        self.inside || self.is_from_the_start()
    }

    /// Whether it began at the object's first byte, and reads all of it so far.
    fn is_from_the_start(&self) -> bool {
        self.start == 0 && self.has_read(DENSE_QUARTERS)
    }

    /// Whether it has read at least so many quarters of what it has passed.
    fn has_read(&self, quarters: u64) -> bool {
        let passed = self.front.saturating_sub(self.start);
        self.consumed >= passed / 4 * quarters
    }

    /// How far its past says that it will go on, bytes.
    fn deserved(&self) -> u64 {
        match self.consumed {
            consumed if consumed <= AROUND => 0,
            consumed if consumed <= QUIET && self.is_from_the_start() => consumed,
            consumed if consumed <= QUIET => 0,
            consumed if self.is_eager() => consumed * EAGER,
            consumed if consumed < UNSURE && !self.has_read(DENSE_QUARTERS) => 0,
            _ if !self.has_read(SPARSE_QUARTERS) => 0,
            consumed if consumed <= CAUTIOUS => consumed / 4,
            consumed => consumed,
        }
    }
}

/// What is to be fetched ahead, after a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ahead {
    /// Bytes to fetch that nobody has asked for yet; may be empty.
    pub range: Range<u64>,
    /// The stream's whole window, bytes: how large the requests may be.
    pub window: u64,
    /// Bytes that the stream has left behind for good, or where it begins, the one that its thread read
    /// before; may be empty. The kernel keeps their pages while it has room. Keeping them here too
    /// would make the daemon touch new memory all the time, which costs more than the network: a read
    /// of 4 GiB took 2.4 times as long.
    pub behind: Range<u64>,
    /// The read begins a stream, or goes on where one hardly touched the tensor before.
    pub first: bool,
    /// All of the range is wanted, however small its rest.
    pub whole: bool,
    /// Nothing is to be fetched behind the range.
    pub last: bool,
}

impl Ahead {
    /// Bytes of one request, at most `most`. A window is cut so that as many requests as there may be
    /// overlap: a connection's share of the wire is what limits each. A rest that is smaller waits for
    /// more, unless all of it is wanted.
    pub fn request_size(&self, requests: u64, most: u64) -> u64 {
        let window = self.window.max(self.range.end - self.range.start);
        let least = if window < SMALL_REQUEST {
            (window / 2).max(BLOCK_SIZE)
        } else {
            SMALL_REQUEST
        };
        // Of a window that moves, a third has come and is about to be read.
        let halves = if self.first { 2 } else { 3 };
        (window * 2 / (requests * halves)).clamp(least, most)
    }
}

/// How far the last read of what ends at `end` goes past that, bytes, if it is as long as `read`, and
/// all in between are.
fn overrun(read: &Range<u64>, end: u64) -> u64 {
    let length = read.end - read.start;
    match end.saturating_sub(read.end) % length {
        0 => 0,
        rest => length - rest,
    }
}

/// The streams and strides of one object.
#[derive(Debug, Default)]
pub(super) struct Pattern {
    streams: Vec<Stream>,
    strides: Strides,
    limit: Limit,
    /// Bytes that the streams that ended last had read, the last one at the end.
    ended: VecDeque<u64>,
    clock: u64,
}

impl Pattern {
    /// Notes that `read` is asked for, and that `wasted` bytes, fetched ahead since the last cut,
    /// were let go of unread; tells whether that makes for a cut.
    pub fn note_waste(&mut self, read: &Range<u64>, wasted: u64) -> bool {
        let windows = self.streams.iter().map(|stream| stream.window);
        self.limit.note_window(windows.max().unwrap_or(0));
        self.limit.note_read(read.end - read.start);
        self.limit.note_waste(wasted)
    }

    /// How much may be fetched ahead at once, bytes, seeing what was wasted.
    pub fn limit(&self) -> u64 {
        self.limit.bytes()
    }

    /// Notes that `thread` asked for `read` and, if that is one of a strided reader, says what to fetch
    /// ahead of it: at most `maximum` bytes, not beyond `size`, and within `bound`, the tensor that
    /// it is in, until the reader has left that. Everything else is to be noted as a stream's.
    pub fn note_stride(
        &mut self,
        thread: u32,
        read: &Range<u64>,
        maximum: u64,
        bound: &Range<u64>,
        size: u64,
    ) -> Option<Strided> {
        let strided = self.strides.note(thread, read, maximum, bound, size)?;
        self.limit.note_window(strided.window);
        Some(strided)
    }

    /// Remembers up to which step the pieces of a strided reader have been asked for.
    pub fn asked_stride(&mut self, strided: &Strided, step: i64) {
        self.strides.asked(strided, step);
    }

    /// Notes that `read` was asked for and says what to fetch ahead of it: at most `maximum` bytes
    /// beyond the read, not beyond `size`, and not beyond `bound`, where the thing that the read
    /// begins in ends, before the stream has passed that by more than readahead would. `thread` is
    /// who asks, 0 if that is not known.
    pub fn note(
        &mut self,
        thread: u32,
        read: Range<u64>,
        maximum: u64,
        bound: u64,
        size: u64,
    ) -> Ahead {
        self.clock += 1;
        let clock = self.clock;
        let near = self.streams.iter().position(|stream| stream.is_near(&read));
        let Some(index) = near else {
            let behind = self.end_of(thread).unwrap_or(read.start..read.start);
            let expected = self.typical().map(|length| read.start + length);
            let until = expected.map_or(read.end, |until| until.min(bound).min(size));
            let range = read.end..until.max(read.end);
            let stream = Stream {
                inside: bound < size,
                start: read.start,
                front: read.end,
                consumed: read.end - read.start,
                length: read.end - read.start,
                window: 0,
                asked: read.end,
                bound: bound.max(read.end),
                beyond: 0,
                expected,
                // Another may still read the rest of the block that it begins in.
                kept: read.start.next_multiple_of(BLOCK_SIZE),
                touched: clock,
                thread,
                ended: false,
            };
            self.begin(stream);
            return Ahead {
                window: range.end - range.start,
                range,
                behind,
                first: true,
                whole: true,
                last: false,
            };
        };
        let length = read.end - read.start;
        let met = self.met_by(index);
        let stream = &mut self.streams[index];
        let first = stream.consumed <= AROUND && read.end > stream.bound && stream.bound < size;
        if first {
            stream.bound = bound;
        }
        stream.inside |= bound < size;
        let is_regular = read.start == stream.front
            && stream.length == length
            && length <= LONGEST_READAHEAD
            && read.start.is_multiple_of(PAGE)
            && length.is_multiple_of(PAGE);
        stream.length = length;
        stream.consumed += length;
        stream.front = stream.front.max(read.end);
        stream.touched = clock;
        stream.ended = false;
        if stream.thread != thread {
            stream.thread = 0;
        }
        if read.end > stream.bound && stream.bound < size {
            stream.beyond += read.end - read.start.max(stream.bound);
            if stream.beyond > QUIET {
                stream.bound = size;
            }
        }
        let window = stream.window.max(stream.deserved()).min(maximum);
        // What it gets before may be a mistake.
        if stream.consumed > QUIET {
            stream.window = window;
        }
        let from = stream.asked.max(stream.front);
        // A few pages further is the kernel's readahead.
        (stream.expected).take_if(|until| stream.front >= until.saturating_add(AROUND));
        // Readahead is of whole pages, and is answered when all of it is there.
        let past = if is_regular && maximum > 0 {
            overrun(&read, stream.bound)
        } else {
            0
        };
        let end = (stream.bound + past).min(size);
        let until = if stream.asked >= stream.bound {
            end
        } else {
            stream.front.saturating_add(window).min(end)
        };
        // Not all of that may have been possible when it began.
        let to = stream
            .expected
            .map_or(until, |expected| expected.min(stream.bound))
            .min(met.max(stream.front));
        let mut behind = stream.kept..stream.kept;
        if stream.consumed > CAUTIOUS {
            behind.end = behind.end.max(stream.front.saturating_sub(KEPT_BEHIND));
            stream.kept = behind.end;
        }
        Ahead {
            range: from.min(to)..to,
            window,
            behind,
            first,
            whole: stream.expected.is_some(),
            last: to >= end,
        }
    }

    /// Where the stream of this index comes to what another has read, and read most of: several read a
    /// part each. The kernel has that, who goes on there asks for nothing. Shorter ones say nothing.
    fn met_by(&self, index: usize) -> u64 {
        let own = &self.streams[index];
        let others = self.streams.iter().filter(|other| {
            other.start > own.front
                && other.consumed >= own.consumed / ALIKE_SHARE
                && other.has_read(DENSE_QUARTERS)
        });
        others.map(|other| other.start).min().unwrap_or(u64::MAX)
    }

    /// How long streams are here, bytes, if the last ones were all alike.
    fn typical(&self) -> Option<u64> {
        if self.ended.len() < ENDED_AT_LEAST {
            return None;
        }
        let mut lengths: Vec<u64> = self.ended.iter().copied().collect();
        lengths.sort_unstable();
        let median = *lengths.get(lengths.len() / 2)?;
        lengths.retain(|length| length.abs_diff(median) <= median / 4);
        let longest = *lengths.last()?;
        let are_alike = lengths.len() * 4 >= self.ended.len() * 3;
        (are_alike && longest <= LONGEST_ALIKE).then_some(longest)
    }

    /// Whoever begins to read elsewhere has come to the end of what he read before. What of that he has
    /// left behind: whole blocks, as he may still read the rest of others; and nothing, if he left
    /// anything out.
    fn end_of(&mut self, thread: u32) -> Option<Range<u64>> {
        let mut streams = self.streams.iter_mut();
        let own = streams.find(|stream| thread != 0 && stream.thread == thread && !stream.ended)?;
        own.ended = true;
        let behind = own.kept.next_multiple_of(BLOCK_SIZE)..own.front;
        let is_whole = own.has_read(4);
        if is_whole {
            own.kept = own.kept.max(own.front);
        }
        let consumed = own.consumed;
        self.note_length(consumed);
        (is_whole && !behind.is_empty()).then_some(behind)
    }

    fn note_length(&mut self, bytes: u64) {
        if self.ended.len() == ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back(bytes);
    }

    /// Remembers that everything up to `until` ahead of the stream at `front` has been asked for, and
    /// its bound, if that is known now.
    pub fn asked(&mut self, front: u64, until: u64, bound: Option<u64>) {
        let mut streams = self.streams.iter_mut();
        if let Some(stream) = streams.find(|stream| stream.is_near(&(front..front))) {
            stream.asked = stream.asked.max(until);
            stream.bound = bound.unwrap_or(stream.bound);
        }
    }

    /// A tensor is read at several places at once: a stream in it that began in `before`, and perhaps
    /// before it was known that there are tensors, is bound to it, too.
    pub fn bind(&mut self, before: &Range<u64>, tensor: &Range<u64>) {
        let comes_in =
            |stream: &&mut Stream| before.contains(&stream.start) && tensor.contains(&stream.front);
        for stream in self.streams.iter_mut().filter(comes_in) {
            stream.bound = stream.bound.min(tensor.end);
        }
    }

    fn begin(&mut self, stream: Stream) {
        if self.streams.len() < STREAMS {
            self.streams.push(stream);
            return;
        }
        let oldest = self.streams.iter_mut().min_by_key(|stream| stream.touched);
        if let Some(oldest) = oldest {
            let gone = std::mem::replace(oldest, stream);
            if !gone.ended {
                self.note_length(gone.consumed);
            }
        }
    }
}

#[cfg(test)]
mod tests;
