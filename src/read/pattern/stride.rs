//! Readers that move in equal steps: through a file from its end to its start, or down a column.
//!
//! A **touch** is what one read(2) asked for. The kernel makes several requests of it, not always
//! in order; those that lie close together are one touch. Touches that begin equally far from each
//! other, forward or backward, three steps in a row, make a **stride**, whoever they come from; and
//! what it will touch next is fetched ahead, but not what lies between. Who reads that as well is
//! no strided reader: a mapping that the C library faults backwards inside each MiB is a stream. Nor are
//! several who read equal parts of the object at the same time, as long as none of them has gone on to
//! another, and where the parts are long.

use std::collections::VecDeque;
use std::ops::Range;

use super::{CAUTIOUS, EAGER, KEPT_BEHIND, LONGEST_ALIKE, QUIET};
use crate::read::{BLOCK_SIZE, PAGE, READAHEAD};

/// Touches and strides that are remembered per object; the oldest give way. Strides are looked
/// for among the touches, so that several readers can be at it at once.
const TOUCHES: usize = 32;
const STRIDES: usize = 8;
/// Touches that a stride remembers: enough to know its length, and what it has left behind.
const STRIDE_TOUCHES: usize = 128;
/// So many of the last ones tell how long touches are; some of them may be at work still.
const LENGTHS: usize = 8;
/// A request that begins no further behind a touch's end, bytes, belongs to it: the kernel's are of
/// its readahead, and one of them may overtake another.
const MERGED: u64 = READAHEAD;
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
struct Touch {
    start: u64,
    end: u64,
    /// Who asked last, 0 if that is not known.
    thread: u32,
    /// Whoever asked began elsewhere since.
    ended: bool,
}

impl Touch {
    fn new(thread: u32, read: &Range<u64>) -> Self {
        Self {
            start: read.start,
            end: read.end,
            thread,
            ended: false,
        }
    }

    fn go_on(&mut self, thread: u32, read: &Range<u64>) {
        self.end = self.end.max(read.end);
        self.thread = thread;
    }

    fn takes(&self, read: &Range<u64>) -> bool {
        let earliest = self.start.max(self.end.saturating_sub(2 * MERGED));
        (earliest..=self.end + MERGED).contains(&read.start)
    }

    fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Bytes of it that lie in `range`.
    fn within(&self, range: &Range<u64>) -> u64 {
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        end.saturating_sub(start)
    }
}

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
    /// All that may be ahead of it, bytes.
    pub window: u64,
    /// What is left of the piece that somebody is reading, and its step; may be empty.
    pub rest: Range<u64>,
    pub step: i64,
    /// What is touched after that, nearest first: a request each, and the step it reaches to.
    pub requests: Vec<(Range<u64>, i64)>,
    /// What was left behind for good.
    pub behind: Vec<Range<u64>>,
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
        if let Some((index, start)) = self.going_on(thread, read) {
            let stride = &self.strides[index];
            // What goes on is a stream that began here.
            if read.start > start + stride.length().min(LONGEST_ALIKE) + MERGED {
                return None;
            }
            return stride.ahead(index, start, read, window, size);
        }
        if !new {
            return None;
        }
        let clock = self.clock;
        self.strides.retain(|stride| clock - stride.touched < STALE);
        let mut strides = self.strides.iter_mut().enumerate();
        let begun =
            strides.find_map(|(index, stride)| Some((index, stride.begin(thread, read, clock)?)));
        let (index, behind) = match begun {
            Some(begun) => begun,
            None => (
                self.keep(self.recognise(thread, read, bound, size)?),
                Vec::new(),
            ),
        };
        let mut strided = self.strides[index].ahead(index, read.start, read, window, size)?;
        strided.behind = behind;
        Some(strided)
    }

    /// Adds `read` to the touches; tells whether it begins one.
    fn remember(&mut self, thread: u32, read: &Range<u64>) -> bool {
        let mut touches = self.touches.iter_mut().rev();
        if let Some(touch) = touches.find(|touch| touch.takes(read)) {
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
        }
    }

    /// The stride that one of the last touches of goes on with `read`, and where it began.
    fn going_on(&mut self, thread: u32, read: &Range<u64>) -> Option<(usize, u64)> {
        for (index, stride) in self.strides.iter_mut().enumerate() {
            let mut touches = stride.touches.iter_mut().rev().take(LENGTHS);
            if let Some(touch) = touches.find(|touch| touch.takes(read)) {
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
        // The last one is the read itself.
        self.touches.iter().rev().skip(1).find_map(|last| {
            let step = distance(last.start, read.start);
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

    /// Takes a touch that begins where this stride is expected; says what it then leaves behind.
    fn begin(&mut self, thread: u32, read: &Range<u64>, clock: u64) -> Option<Vec<Range<u64>>> {
        let slack = slack(self.step());
        let near = |steps: &i64| (read.start as i64).abs_diff(self.place(*steps)) <= slack;
        // The next one first: it is the one that mostly comes.
        let steps = (1..=REACH).chain(-REACH..=0).find(near)?;
        self.touched = clock;
        if steps > 0 {
            self.even &= read.start as i64 == self.place(steps);
            self.front = read.start;
            self.steps += steps;
        }
        if !self.bound.contains(&read.start) {
            self.bound = 0..u64::MAX;
        }
        self.touches.push_back(Touch::new(thread, read));
        let mut behind = Vec::new();
        let most = KEPT_BEHIND.div_ceil(self.length().max(1)) as usize;
        let most = most.clamp(LENGTHS, STRIDE_TOUCHES);
        while self.touches.len() > most {
            let Some(touch) = self.touches.pop_front() else {
                break;
            };
            if self.consumed() > CAUTIOUS {
                behind.push(self.piece(touch.start as i64, touch.length()));
            }
        }
        Some(behind)
    }

    /// Bytes of a touch.
    fn length(&self) -> u64 {
        let last = self.touches.iter().rev().take(LENGTHS);
        let mut lengths: Vec<u64> = last.map(Touch::length).collect();
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
    fn is_sure(&self) -> bool {
        let way = self.front.abs_diff(self.origin);
        let goes_on = self.touches.iter().any(|touch| touch.ended);
        goes_on && (self.gap() > MERGED || (self.step() < 0 && way > QUIET))
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
        &self,
        index: usize,
        start: u64,
        read: &Range<u64>,
        window: u64,
        size: u64,
    ) -> Option<Strided> {
        if !self.is_sure() {
            return None;
        }
        let length = self.length();
        let most = self.bound.end.min(size);
        let mut rest = 0..0;
        if start == self.front && self.asked < self.steps {
            rest = read.end..(start + length).min(most).max(read.end);
        }
        let step = self.step().unsigned_abs().max(1);
        let (pieces, bytes, group) = if self.bridged() {
            let pieces = self.deserved().min(window / step);
            let request = (pieces * step / REQUESTS).clamp(SMALL_REQUEST, LARGE_REQUEST);
            (pieces, step, (request / step).max(1) as i64)
        } else {
            let blocks = length.next_multiple_of(BLOCK_SIZE).max(BLOCK_SIZE);
            let pieces = self.deserved().min(window / blocks).min(MOST_PIECES);
            (pieces, blocks, 1)
        };
        let mut requests = Vec::new();
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
            requests.push((low..high, self.steps + last));
            first = last + 1;
        }
        Some(Strided {
            stride: index,
            window: pieces * bytes,
            rest,
            step: self.steps,
            requests,
            behind: Vec::new(),
        })
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
