//! What is fetched of an object before somebody asks for it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::OwnedSemaphorePermit;

use super::{Ahead, Layout, ObjectReader, State};
use crate::budget::Class;
use crate::read::block::Unread;
use crate::read::fetch::Fetch;
use crate::read::pattern::Strided;
use crate::read::{BLOCK_SIZE, PAGE};

/// Bytes of one prefetch request at most: long enough that the time to the first byte does not
/// matter on a connection of 90 MB/s, short enough that 16 of them fit a small budget.
const REQUEST_SIZE: u64 = 8 << 20;
/// Requests that overlap where the store is near, or a disk has the blocks.
const NEAR_REQUESTS: u64 = 8;
/// A read this close to the beginning of a tensor begins it, bytes: the C library copies each MiB of
/// a mapping backwards, and the kernel reads ahead out of order.
const BEGINNING: u64 = 2 << 20;
/// The kernel reads around the first page of a tensor that is touched, this far to each side, bytes.
const EDGE: u64 = 128 << 10;

/// What a read is of.
struct Target {
    /// The tensor, if the file has any.
    extent: Option<Range<u64>>,
    /// Whether that one is wanted for certain.
    for_certain: bool,
    /// Where the next one begins, if the read may be for either, unless it goes on with another.
    border: Option<u64>,
}

impl State {
    /// What a read is of.
    ///
    /// The kernel reads whole pages, and around the page that is touched first: a read around the place
    /// where one tensor ends and the next begins may be for either. It is for the one that was begun.
    /// Where the beginning of the one before came along with the index, or with the end of the first
    /// tensor, what is read next tells. Elsewhere it is for the next one, more likely.
    fn target_of(&mut self, read: &Range<u64>) -> Target {
        let mut target = Target {
            extent: None,
            for_certain: false,
            border: None,
        };
        let Layout::Known(_, extents) = &self.layout else {
            return target;
        };
        let Some(extent) = extents.containing(read.end - 1) else {
            return target;
        };
        let doubtful = self.doubtful;
        let before = extents.containing(read.start);
        if let Some(before) = before.filter(|_| read.start + PAGE < extent.start) {
            let border = Some(extent.start);
            if doubtful == Some(before.start) {
                self.doubtful = None;
                target.for_certain = true;
                target.extent = Some(before);
            } else if self.along == border {
                self.along = None;
                target.border = border;
                target.extent = Some(before);
            } else {
                let is_begun = self.begun == border;
                target.extent = Some(if is_begun { before } else { extent });
            }
            return target;
        }
        let was_end = doubtful == Some(extent.end);
        let is_either = was_end || doubtful == Some(extent.start);
        target.for_certain = is_either && read.start <= extent.start + BEGINNING;
        if target.for_certain {
            self.doubtful = None;
            let next = extents.containing(extent.end).filter(|_| was_end);
            self.along = next.map(|next| next.end);
        }
        target.extent = Some(extent);
        target
    }
}

impl ObjectReader {
    /// Fetches ahead of the reader what the pattern and the format call for, as far as permits
    /// and memory allow; never waits.
    pub(super) fn run_ahead(self: &Arc<Self>, thread: u32, read: Range<u64>) {
        let mut state = self.state.lock();
        if let Layout::Known(format, extents) = &state.layout {
            let extent = extents.containing(read.end - 1);
            if extent.is_some_and(|extent| format.looks(&read, &extent)) {
                return;
            }
        }
        let Target {
            extent,
            for_certain,
            border,
        } = state.target_of(&read);
        let bound = extent.as_ref().map_or(self.size, |extent| extent.end);
        let wasted = state.wasted.swap(0, Ordering::Relaxed);
        if state.pattern.note_waste(&read, wasted) {
            // What was fetched before the cut says nothing of the windows after it.
            state.wasted = Arc::default();
        }
        let limit = state.pattern.limit();
        let mut requests = self.requests();
        let maximum = self.maximum_window(requests).min(limit);
        let inside = extent.clone().unwrap_or(0..self.size);
        let pattern = &mut state.pattern;
        if let Some(strided) = pattern.note_stride(thread, &read, maximum, &inside, self.size) {
            tracing::trace!(thread, ?read, ?strided, "stride");
            self.run_ahead_in_steps(&mut state, &strided, requests);
            return;
        }
        let pattern = &mut state.pattern;
        let mut ahead = pattern.note(thread, read.clone(), maximum, bound, self.size);
        if ahead.first && border.is_some() {
            state.doubtful = border;
        }
        if ahead.first
            && let Layout::Known(_, extents) = &state.layout
            && let Some(extent) = &extent
        {
            let before = extents.gap_before(extent);
            state.pattern.bind(&before, extent);
        }
        // Not who comes from the tensor before: the kernel reads past the end of what was asked.
        let begins = |extent: &Range<u64>| {
            for_certain || ahead.first && read.start <= extent.start + BEGINNING
        };
        let begun = extent.filter(begins);
        let mut most = self.most_unread();
        let mut end = None;
        if let Some(extent) = begun {
            // Where others were says nothing of this one.
            requests = self.requests_of_store();
            let maximum = self.maximum_window(requests).min(limit);
            // Some loaders touch each tensor before they read the first: that must not get in the
            // way of whoever reads on.
            most /= 2;
            let goes_on = state.begun == Some(extent.start);
            end = for_certain.then_some(if goes_on { self.size } else { extent.end });
            if goes_on {
                // One after the other: where the next one begins is touched next.
                let around = extent.end - EDGE.min(extent.end)..self.size.min(extent.end + EDGE);
                self.prefetch(&mut state, around, most, false);
            }
            state.begun = Some(extent.end);
            // Whoever begins a tensor reads it to its end: all of it at once.
            let from = if read.start <= extent.start + BEGINNING {
                read.end
            } else {
                // What is around its beginning was read before.
                extent.start + EDGE
            };
            ahead.range = from..extent.end.min(from + maximum).max(from);
            ahead.window = ahead.range.end - ahead.range.start;
            ahead.last = ahead.range.end == extent.end;
            ahead.first |= for_certain;
        }
        tracing::trace!(thread, ?read, ?ahead, bound, "pattern");
        // Its first block was the last of the piece before, and still needed then.
        let behind = ahead.behind.start / BLOCK_SIZE..ahead.behind.end / BLOCK_SIZE;
        self.reader.cache.remove(self.content, behind);
        if ahead.range.is_empty() {
            return;
        }
        let request = ahead.request_size(requests, REQUEST_SIZE);
        let mut from = ahead.range.start;
        while from < ahead.range.end {
            let mut to = (from + request).min(ahead.range.end);
            // A small rest is not worth a request.
            if ahead.whole && ahead.range.end - to < request / 4 {
                to = ahead.range.end;
            }
            let is_last = ahead.last && to == ahead.range.end;
            if to - from < request && !ahead.whole && !is_last {
                break;
            }
            if !self.prefetch(&mut state, from..to, most, ahead.whole) {
                break;
            }
            from = to;
        }
        state.pattern.asked(read.start, from, end);
    }

    /// Fetches ahead of a strided reader, in up to so many `requests` at once, as far as permits and
    /// memory allow; never waits.
    fn run_ahead_in_steps(self: &Arc<Self>, state: &mut State, strided: &Strided, requests: u64) {
        for bytes in &strided.behind {
            let blocks = bytes.start / BLOCK_SIZE..bytes.end / BLOCK_SIZE;
            self.reader.cache.remove(self.content, blocks);
        }
        let most = self.most_unread();
        let request = strided.request_size(requests, REQUEST_SIZE);
        let rest = &strided.rest;
        let is_short = rest.end.saturating_sub(rest.start) <= REQUEST_SIZE;
        let first = (rest, strided.step, is_short && strided.begins);
        let others = strided.requests.iter();
        let others = others.map(|(bytes, step)| (bytes, *step, false));
        for (bytes, step, demanded) in std::iter::once(first).chain(others) {
            let mut from = bytes.start;
            while from < bytes.end {
                let mut to = (from + request).min(bytes.end);
                // A small rest is not worth a request.
                if bytes.end - to < request / 4 {
                    to = bytes.end;
                }
                if !self.prefetch(state, from..to, most, demanded) {
                    return;
                }
                from = to;
            }
            state.pattern.asked_stride(strided, step);
        }
    }

    /// Most bytes to run ahead of one stream: enough for all its requests and what has come and is not
    /// read yet, within what all streams may.
    fn maximum_window(&self, requests: u64) -> u64 {
        let wire = (requests + (requests / 2).max(2)) * REQUEST_SIZE;
        wire.min(self.most_unread())
    }

    /// Requests of a stream that goes on: few while it comes to what is on local disk. Measured, that is
    /// read at 1.8 GB/s with 4 and with 32 of them; with 8 it takes 280 MiB of memory, with 32 500.
    fn requests(&self) -> u64 {
        let requests = self.requests_of_store();
        if self.distance.is_on_disk() {
            requests.min(NEAR_REQUESTS)
        } else {
            requests
        }
    }

    /// Requests of one stream: as many as there may be, but few where they cost no time. Measured, a
    /// sequential read from a store without delays was 1.65 GB/s with 8 of them, and 1.45 with 32; from
    /// one that takes 40 ms to answer, over connections of 25 MB/s, .63 GB/s with 32 and 1.09 with 64.
    fn requests_of_store(&self) -> u64 {
        let options = &self.reader.options;
        let permitted = options.transfers as u64;
        if self.distance.is_near() {
            permitted.min(NEAR_REQUESTS)
        } else if self.is_far() {
            permitted + options.far_prefetches as u64
        } else {
            permitted
        }
    }

    fn is_far(&self) -> bool {
        self.scales && self.distance.is_far()
    }

    /// Leave for one more prefetch, if there may be one.
    fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let reader = &self.reader;
        let permit = Arc::clone(&reader.prefetches).try_acquire_owned();
        if permit.is_err() && self.is_far() {
            return Arc::clone(&reader.far_prefetches).try_acquire_owned().ok();
        }
        permit.ok()
    }

    /// Most bytes to run ahead of all streams: three quarters of what readers may hold. With half of it, a
    /// read of 4 GiB through 32 requests was 3 to 4 % slower; what has been read is kept in the rest.
    fn most_unread(&self) -> u64 {
        self.reader.budget.ceiling(Class::Read) / 4 * 3
    }

    /// Fetches `bytes` ahead, unless there would be more than `most` bytes that nobody has read, or
    /// no request or memory is left; tells whether it does.
    ///
    /// What is `demanded` goes on a read that somebody waits for, and needs no free request.
    fn prefetch(
        self: &Arc<Self>,
        state: &mut State,
        bytes: Range<u64>,
        most: u64,
        demanded: bool,
    ) -> bool {
        let blocks = bytes.start / BLOCK_SIZE..bytes.end.div_ceil(BLOCK_SIZE);
        for gap in self.gaps(state, blocks, None) {
            let length = self.bytes_of(&gap);
            // What nobody has read yet must not make way for what somebody may read even later.
            let unread = self.reader.unread.load(Ordering::Relaxed);
            if unread + length > most {
                return false;
            }
            let permit = self.permit();
            if permit.is_none() && !demanded {
                return false;
            }
            let Some(reservation) = self.reader.budget.try_reserve(Class::Read, length) else {
                return false;
            };
            let fetch = Fetch::new(gap.clone());
            state.fetches.insert(gap.start, Arc::clone(&fetch));
            let unread = Unread::new(&self.reader.unread, &state.wasted, length);
            let ahead = Ahead { permit, unread };
            self.start(fetch, state.source.clone(), reservation, Some(ahead));
        }
        true
    }
}
