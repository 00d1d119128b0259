//! Readers that move in equal steps: through a file from its end to its start, or down a column.
//!
//! A **touch** is what one read(2) asked for. The kernel makes several requests of it, not always
//! in order; those that lie close together are one touch. Touches that begin equally far from each
//! other, forward or backward, three steps in a row, make a **stride**, whoever they come from; and
//! what it will touch next is fetched ahead, but not what lies between. Who reads that as well is
//! no strided reader: a mapping that the C library faults backwards inside each MiB is a stream. Nor are
//! several who read equal parts of the object at the same time, as long as none of them has gone on to
//! another.
//!
//! A stride is **shared** if several threads read it, each the next piece that nobody has begun. Half of
//! the window then is for the pieces that are being read, and these may be long.

mod touch;

use std::collections::VecDeque;
use std::ops::Range;

use super::{CAUTIOUS, EAGER, KEPT_BEHIND, LONGEST_ALIKE, LONGEST_READAHEAD, QUIET, SLACK_AHEAD};
use crate::read::{BLOCK_SIZE, PAGE};
use touch::{MERGED, Touch};

/// Touches and strides that are remembered per object; the oldest give way. Strides are looked
/// for among the touches, so that several readers can be at it at once.
const TOUCHES: usize = 32;
const STRIDES: usize = 8;
/// Touches that a stride remembers: enough to know its length, and what it has left behind.
const STRIDE_TOUCHES: usize = 128;
/// So many of the last ones tell how long touches are.
const LENGTHS: usize = 8;
/// Equal steps before anything is fetched ahead.
const STEPS: i64 = 3;
/// Touches that come out of order are known this many steps away.
const REACH: i64 = 4;
/// A gap up to this long, bytes, is fetched along, as one request costs less than two; but it
/// must not be a larger share of the pieces, for that would be waste.
const BRIDGED: u64 = 512 << 10;
const BRIDGED_SHARE: u64 = 4;
/// Bytes of a request over bridged gaps: at most, for a backward reader waits for its end, and at
/// least, while the window allows; and how many the window is cut into in between.
const LARGE_REQUEST: u64 = 4 << 20;
const SMALL_REQUEST: u64 = 1 << 20;
const REQUESTS: u64 = 4;
/// Most pieces ahead, of one request each: enough to fill the wire twice.
const MOST_PIECES: u64 = 32;
/// A stride that was not touched while so many touches began elsewhere is over.
const STALE: u64 = 256;

#[derive(Clone, Debug)]
struct Stride {
    /// Where the first of its touches began, and the furthest; and the steps between them.
    origin: u64,
    front: u64,
    steps: i64,
    /// All steps were equal to the byte.
    even: bool,
    /// It goes down from the object's very end.
    eager: bool,
    /// The step up to which pieces were asked for ahead of time.
    asked: i64,
    /// Nothing is fetched outside of this, the tensor it began in, until it has left that.
    bound: Range<u64>,
    /// The last ones, in the order of time.
    touches: VecDeque<Touch>,
    touched: u64,
}

/// What is to be fetched ahead of a strided reader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::read) struct Strided {
    /// Tells [`Strides::asked`] which stride it is.
    stride: usize,
    /// Where the piece begins that somebody is reading.
    touch: u64,
    /// All that may be ahead of it, bytes.
    pub window: u64,
    /// What is left of the piece that somebody is reading, and its step; may be empty.
    pub rest: Range<u64>,
    pub step: i64,
    /// That piece was not asked for before, and somebody waits for it.
    pub begins: bool,
    /// Several threads read it.
    shared: bool,
    /// What is touched after that, nearest first: a request each, and the step it reaches to.
    pub requests: Vec<(Range<u64>, i64)>,
    /// What was left behind for good: bytes of whole blocks.
    pub behind: Vec<Range<u64>>,
}

impl Strided {
    /// Bytes of one request, at most `most`: where several threads read, as many requests as there may be
    /// are to overlap in the window, of which a third has come and is about to be read.
    pub fn request_size(&self, requests: u64, most: u64) -> u64 {
        if self.shared {
            (self.window * 2 / (requests * 3)).clamp(SMALL_REQUEST, most)
        } else {
            most
        }
    }
}

/// The strides of one object.
#[derive(Debug, Default)]
pub(super) struct Strides {
    touches: VecDeque<Touch>,
    strides: Vec<Stride>,
    /// Counts touches.
    clock: u64,
}

impl Strides {
    /// Notes that `thread` asked for `read`. If it belongs to a stride, says what to fetch ahead: at
    /// most `window` bytes, within `size`, and within `bound`, the tensor that the read is in.
    pub fn note(
        &mut self,
        thread: u32,
        read: &Range<u64>,
        window: u64,
        bound: &Range<u64>,
        size: u64,
    ) -> Option<Strided> {
        let new = self.remember(thread, read);
        let clock = self.clock;
        if let Some((index, start)) = self.going_on(thread, read) {
            let stride = &mut self.strides[index];
            let start = stride.cross(thread, start, read, clock).unwrap_or(start);
            let longest = match stride.shared() {
                Some(_) => u64::MAX,
                None => LONGEST_ALIKE,
            };
            // What goes on is a stream that began here.
            if read.start > start + stride.length().min(longest) + MERGED {
                return None;
            }
            return stride.ahead(index, start, read, window, size);
        }
        if !new {
            return None;
        }
        self.strides.retain(|stride| clock - stride.touched < STALE);
        let mut strides = self.strides.iter_mut().enumerate();
        let begun =
            strides.find_map(|(index, stride)| Some((index, stride.begin(thread, read, clock)?)));
        let (index, start) = match begun {
            Some(begun) => begun,
            None => {
                let stride = self.recognise(thread, read, bound, size)?;
                (self.keep(stride), read.start)
            }
        };
        let stride = &mut self.strides[index];
        let mut strided = stride.ahead(index, start, read, window, size)?;
        strided.behind.extend(stride.leave_behind());
        Some(strided)
    }

    /// Adds `read` to the touches; tells whether it begins one.
    fn remember(&mut self, thread: u32, read: &Range<u64>) -> bool {
        let mut touches = self.touches.iter_mut().rev();
        if let Some(touch) = touches.find(|touch| touch.takes(thread, read)) {
            touch.go_on(thread, read);
            return false;
        }
        let strides = self
            .strides
            .iter_mut()
            .flat_map(|stride| &mut stride.touches);
        for touch in self.touches.iter_mut().chain(strides) {
            touch.ended |= touch.thread == thread;
        }
        self.clock += 1;
        if self.touches.len() == TOUCHES {
            self.touches.pop_front();
        }
        self.touches.push_back(Touch::new(thread, read));
        true
    }

    /// Remembers that everything up to a step has been asked for.
    pub fn asked(&mut self, strided: &Strided, step: i64) {
        if let Some(stride) = self.strides.get_mut(strided.stride) {
            stride.asked = stride.asked.max(step);
            let mut touches = stride.touches.iter_mut().rev();
            if let Some(touch) = touches.find(|touch| touch.start == strided.touch) {
                touch.asked = touch.asked.max(strided.rest.end);
            }
        }
    }

    /// The stride that one of the last touches of goes on with `read`, and where it began.
    fn going_on(&mut self, thread: u32, read: &Range<u64>) -> Option<(usize, u64)> {
        for (index, stride) in self.strides.iter_mut().enumerate() {
            let touches = stride.touches.iter_mut().rev().enumerate();
            let mut touches = touches.filter(|(age, touch)| *age < LENGTHS || !touch.ended);
            if let Some((_, touch)) = touches.find(|(_, touch)| touch.takes(thread, read)) {
                touch.go_on(thread, read);
                stride.touched = self.clock;
                return Some((index, touch.start));
            }
        }
        None
    }

    /// A stride that leads to `read` in [`STEPS`] equal steps.
    fn recognise(
        &self,
        thread: u32,
        read: &Range<u64>,
        bound: &Range<u64>,
        size: u64,
    ) -> Option<Stride> {
        // The next one first: where several threads take pieces in turn, each second and third piece
        // lie in equal steps, too.
        let mut others: Vec<u64> = self.touches.iter().map(|touch| touch.start).collect();
        others.sort_unstable_by_key(|start| start.abs_diff(read.start));
        others.into_iter().find_map(|other| {
            let step = distance(other, read.start);
            if step.unsigned_abs() < PAGE {
                return None;
            }
            let slack = slack(step);
            let mut touches = VecDeque::from([Touch::new(thread, read)]);
            for steps in 1..=STEPS {
                let place = (read.start as i64).checked_sub(step.checked_mul(steps)?)?;
                let mut touched = self.touches.iter().rev();
                let near = |touch: &&Touch| (touch.start as i64).abs_diff(place) <= slack;
                touches.push_front(touched.find(near)?.clone());
            }
            let origin = touches.front()?.clone();
            let stride = Stride {
                origin: origin.start,
                front: read.start,
                steps: STEPS,
                even: origin.start as i64 + STEPS * step == read.start as i64,
                eager: step < 0 && origin.end >= size,
                asked: 0,
                bound: bound.clone(),
                touches,
                touched: self.clock,
            };
            let inside = bound.contains(&origin.start);
            (inside && !self.fills_gaps(&stride)).then_some(stride)
        })
    }

    /// Whether more than half of what a new stride leaves out has been read as well.
    fn fills_gaps(&self, stride: &Stride) -> bool {
        let (from, to) = (stride.origin, stride.front);
        let span = from.min(to)..from.max(to);
        let bytes = |touches: &VecDeque<Touch>| -> u64 {
            touches.iter().map(|touch| touch.within(&span)).sum()
        };
        let pieces = bytes(&stride.touches);
        let others = bytes(&self.touches).saturating_sub(pieces);
        others > (span.end - span.start).saturating_sub(pieces) / 2
    }

    /// Keeps a new stride, and returns its place.
    fn keep(&mut self, stride: Stride) -> usize {
        if self.strides.len() < STRIDES {
            self.strides.push(stride);
            return self.strides.len() - 1;
        }
        let strides = self.strides.iter_mut().enumerate();
        let Some((index, oldest)) = strides.min_by_key(|(_, stride)| stride.touched) else {
            return 0;
        };
        *oldest = stride;
        index
    }
}

impl Stride {
    /// Where it is so many steps from the front; may be outside of the object.
    fn place(&self, steps: i64) -> i64 {
        let way = i128::from(distance(self.origin, self.front)) * i128::from(steps);
        let place = i128::from(self.front) + way / i128::from(self.steps);
        place.clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }

    fn step(&self) -> i64 {
        distance(self.origin, self.front) / self.steps
    }

    /// Takes a touch that begins where this stride is expected; says where that is.
    fn begin(&mut self, thread: u32, read: &Range<u64>, clock: u64) -> Option<u64> {
        let (steps, start) = self.reached(read.start)?;
        self.touched = clock;
        if steps > 0 {
            self.even &= start as i64 == self.place(steps);
            self.front = start;
            self.steps += steps;
        }
        if !self.bound.contains(&read.start) {
            self.bound = 0..u64::MAX;
        }
        if self.touches.len() > STRIDE_TOUCHES {
            self.touches.pop_front();
        }
        let mut touch = Touch::new(thread, &(start..read.end));
        touch.alone = self.begun() == 0;
        if self.steps + steps.min(0) <= self.asked {
            touch.asked = touch.asked.max(start + self.length());
        }
        self.touches.push_back(touch);
        Some(start)
    }

    /// Who goes on beyond the end of the piece at `start`, where several threads read one each, has begun
    /// the next one: says where that is, if `read` does so.
    fn cross(&mut self, thread: u32, start: u64, read: &Range<u64>, clock: u64) -> Option<u64> {
        let end = start.checked_add_signed(self.step())?;
        // The kernel reads ahead beyond it, too.
        if end <= start || read.start < end + 2 * MERGED || self.shared().is_none() {
            return None;
        }
        let mut touches = self.touches.iter_mut().rev();
        let touch = touches.find(|touch| touch.start == start)?;
        touch.end = end;
        touch.ended = true;
        self.begin(thread, read, clock)
    }

    /// The piece that a touch at `start` begins: its steps from the front, and where it begins.
    fn reached(&self, start: u64) -> Option<(i64, u64)> {
        let slack = slack(self.step());
        // Who reads the piece before may have brought its beginning to the kernel.
        let late = if self.step() > 0 && self.shared().is_some() {
            LONGEST_READAHEAD.min(self.step().unsigned_abs() / 4)
        } else {
            0
        };
        // The next one first: it is the one that mostly comes.
        (1..=REACH).chain(-REACH..=0).find_map(|steps| {
            let place = self.place(steps);
            let off = (start as i64).saturating_sub(place);
            if off.unsigned_abs() <= slack {
                return Some((steps, start));
            }
            let is_late = (0..=late as i64).contains(&off);
            Some((steps, u64::try_from(place).ok().filter(|_| is_late)?))
        })
    }

    /// Lets go of pieces that have been read, but for the last of them.
    fn leave_behind(&mut self) -> Vec<Range<u64>> {
        let is_long = self.consumed() > CAUTIOUS;
        let mut behind = Vec::new();
        let mut kept = 0;
        for (age, touch) in self.touches.iter_mut().rev().enumerate() {
            // Where nobody knows the threads, others may be at it still.
            let is_over = touch.ended && (touch.thread != 0 || age >= LENGTHS);
            if is_over {
                kept += touch.kept();
            }
            if is_long && (age == STRIDE_TOUCHES || is_over && kept > KEPT_BEHIND) {
                behind.extend(touch.leave(touch.end));
            }
        }
        behind.iter().map(|bytes| self.blocks_of(bytes)).collect()
    }

    /// The blocks of a piece, or those that it has for itself where pieces follow closely.
    fn blocks_of(&self, bytes: &Range<u64>) -> Range<u64> {
        if self.gap() < BLOCK_SIZE {
            let start = bytes.start.next_multiple_of(BLOCK_SIZE);
            return start..(bytes.end / BLOCK_SIZE * BLOCK_SIZE).max(start);
        }
        let piece = self.piece(bytes.start as i64, bytes.end - bytes.start);
        piece.start / BLOCK_SIZE * BLOCK_SIZE..piece.end.next_multiple_of(BLOCK_SIZE)
    }

    /// Bytes of a touch, of those that nobody goes on with, if there are any.
    fn length(&self) -> u64 {
        let ended = self.touches.iter().rev().filter(|touch| touch.ended);
        let mut lengths: Vec<u64> = ended.take(LENGTHS).map(Touch::length).collect();
        if lengths.is_empty() {
            let last = self.touches.iter().rev().take(LENGTHS);
            lengths = last.map(Touch::length).collect();
        }
        lengths.sort_unstable();
        lengths.get(lengths.len() / 2).copied().unwrap_or(0)
    }

    fn consumed(&self) -> u64 {
        self.steps.unsigned_abs() * self.length()
    }

    /// Bytes between two touches.
    fn gap(&self) -> u64 {
        self.step().unsigned_abs().saturating_sub(self.length())
    }

    fn bridged(&self) -> bool {
        self.gap() <= BRIDGED.min(self.length() / BRIDGED_SHARE)
    }

    /// Whether it is one for sure: somebody has gone on from one touch to another, else they are of as
    /// many readers. What follows closely, forward, is a stream; backward, it may be one MiB of a mapping.
    fn is_sure(&self, is_shared: bool) -> bool {
        let way = self.front.abs_diff(self.origin);
        let goes_on = self.touches.iter().any(|touch| touch.ended);
        goes_on && (self.gap() > MERGED || (self.step() < 0 && way > QUIET) || is_shared)
    }

    /// If several threads read it at the same time, each the next piece that nobody has begun: how many of
    /// these are being read. Where these lie close together, they are a stream.
    fn shared(&self) -> Option<u64> {
        let last = self.touches.iter().rev().take(2 * LENGTHS);
        let mut threads: Vec<u32> = last.map(|touch| touch.thread).collect();
        threads.sort_unstable();
        threads.dedup();
        let spread = threads.len() as u64 * self.step().unsigned_abs();
        let last = self.touches.iter().rev().take(LENGTHS);
        let alone = last.filter(|touch| touch.alone).count();
        if threads.len() < 2 || spread <= SLACK_AHEAD || alone > LENGTHS / 2 {
            return None;
        }
        Some(self.begun().max(1))
    }

    /// Pieces that are being read.
    fn begun(&self) -> u64 {
        // Readahead of the piece before may have brought its beginning: that is missing in its length.
        let most = self.length().saturating_sub(MERGED);
        let begun = |touch: &&Touch| !touch.ended && touch.length() < most;
        self.touches.iter().filter(begun).count() as u64
    }

    /// Bytes of the pieces that are being read that were asked for and not read.
    fn unread(&self) -> u64 {
        let begun = self.touches.iter().filter(|touch| !touch.ended);
        begun
            .map(|touch| touch.asked.saturating_sub(touch.end))
            .sum()
    }

    /// How many pieces its past says that it will go on.
    fn deserved(&self) -> u64 {
        let steps = self.steps.unsigned_abs();
        match self.bridged() {
            true if self.eager => steps * EAGER,
            true if self.consumed() > CAUTIOUS => steps,
            _ => (steps / 4).max(1),
        }
    }

    /// A piece that begins at `start`, with all that it may be off by.
    fn piece(&self, start: i64, length: u64) -> Range<u64> {
        let off = if self.even { 0 } else { PAGE as i64 };
        let end = start.saturating_add_unsigned(length).saturating_add(off);
        start.saturating_sub(off).max(0) as u64..end.max(0) as u64
    }

    /// What to fetch ahead of `read`, which belongs to the touch that began at `start`.
    fn ahead(
        &mut self,
        index: usize,
        start: u64,
        read: &Range<u64>,
        window: u64,
        size: u64,
    ) -> Option<Strided> {
        let shared = self.shared();
        if !self.is_sure(shared.is_some()) {
            return None;
        }
        let length = self.length();
        let end = (start + length).min(self.bound.end).min(size).max(read.end);
        let is_first = start == self.front && self.asked < self.steps;
        let mut strided = Strided {
            stride: index,
            touch: start,
            step: if is_first { self.steps } else { self.asked },
            begins: is_first,
            ..Strided::default()
        };
        if let Some(begun) = shared {
            let share = (window / 2 / begun).min(length);
            strided.shared = true;
            strided.window = self.unread().max(begun * share);
            let kept = (KEPT_BEHIND / begun).max(MERGED);
            let until = read.start.saturating_sub(kept) / BLOCK_SIZE * BLOCK_SIZE;
            let is_long = self.consumed() > CAUTIOUS;
            let mut touches = self.touches.iter_mut().rev();
            if let Some(touch) = touches.find(|touch| touch.start == start) {
                strided.rest = touch.rest(read, share, end);
                let left = if is_long { touch.leave(until) } else { None };
                strided.behind = left.iter().map(|bytes| self.blocks_of(bytes)).collect();
            }
        } else if is_first {
            strided.rest = read.end..end;
        }
        self.add_pieces(&mut strided, window, size);
        Some(strided)
    }

    /// Adds the pieces that are touched next: as many as its past says, and as the window has room for.
    fn add_pieces(&self, strided: &mut Strided, window: u64, size: u64) {
        let length = self.length();
        let room = window.saturating_sub(strided.window);
        let step = self.step().unsigned_abs().max(1);
        let (pieces, bytes, group) = if self.bridged() {
            let pieces = self.deserved().min(room / step);
            let request = (pieces * step / REQUESTS).clamp(SMALL_REQUEST, LARGE_REQUEST);
            (pieces, step, (request / step).max(1) as i64)
        } else {
            let blocks = length.next_multiple_of(BLOCK_SIZE).max(BLOCK_SIZE);
            let pieces = self.deserved().min(room / blocks).min(MOST_PIECES);
            (pieces, blocks, 1)
        };
        strided.window += pieces * bytes;
        let most = self.bound.end.min(size);
        let asked = (self.asked - self.steps).max(0);
        let furthest = pieces as i64;
        let mut first = asked + 1;
        while first <= furthest {
            let last = (first + group - 1).min(furthest);
            let (one, other) = (self.place(first), self.place(last));
            let (low, high) = (one.min(other), one.max(other));
            let low = self.piece(low, length).start.max(self.bound.start);
            let high = self.piece(high, length).end.min(most);
            if low >= high {
                break;
            }
            let at_an_end = low == self.bound.start || high == most;
            // A request smaller than it could be waits for more.
            if last - first + 1 < group && !at_an_end {
                break;
            }
            strided.requests.push((low..high, self.steps + last));
            first = last + 1;
        }
    }
}

/// From one offset to another. The kernel's offsets fit.
fn distance(from: u64, to: u64) -> i64 {
    (to as i64).saturating_sub(from as i64)
}

/// How far off the place of a touch may be, bytes: the kernel asks for whole pages, and steps may be none.
fn slack(step: i64) -> u64 {
    (2 * PAGE).min(step.unsigned_abs() / 8)
}

#[cfg(test)]
mod tests;
