//! What is known of a draft at one moment, and writing to it, under its lock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::Writer;
use super::chunk::{Chunk, Data, Refusal};
use super::geometry::Geometry;
use super::growing::Following;
use super::journal::Journal;
use super::spill::SpillFile;
use super::target::Target;
use crate::read::ObjectReader;
use crate::store::{Condition, ETag};

/// Longest piece of a read or a hole handled in one step, bytes.
const LONGEST_STEP: u64 = 4 << 20;

/// An upload that has begun, under the key it was begun with.
#[derive(Clone, Debug)]
pub(super) struct Upload {
    pub target: Target,
    pub id: String,
}

#[derive(Debug)]
pub(super) struct State {
    pub target: Target,
    /// The object this draft was opened over, if its content still counts.
    pub base: Option<Arc<ObjectReader>>,
    /// Bytes of the base that still count: a truncation cuts them off for good.
    pub base_limit: u64,
    /// The smallest size since the last snapshot for publishing.
    pub low_water: u64,
    pub size: u64,
    pub geometry: Geometry,
    pub chunks: BTreeMap<u32, Chunk>,
    /// Parts that a sender has, or will have soon. A part's number outlives its chunk, which a
    /// truncation may drop meanwhile: no two senders may fill the same part at once.
    pub queued: BTreeSet<u32>,
    /// Rises with every change of size or content.
    pub generation: u64,
    /// Up to this generation nothing happened but opening, which may have emptied the file.
    pub opened: u64,
    /// The generation that is in the store.
    pub published: Option<u64>,
    pub upload: Option<Upload>,
    /// Where it goes while it is written, though it has no parts.
    pub following: Following,
    /// Every write went to the end, or on from where the last had ended, or to the first or last
    /// chunk.
    pub sequential: bool,
    /// Where the last write ended.
    pub cursor: u64,
    /// Send nothing before the name is known.
    pub held: bool,
    /// The file was unlinked: nothing of it will be published.
    pub detached: bool,
    pub failure: Option<String>,
    /// The generation whose close has failed, and has said so.
    pub failed_close: Option<u64>,
    /// Publish this generation and no other.
    pub only: Option<u64>,
    /// What must stand under the name for a file without a base to take its place: that of a former
    /// mount must not overwrite what came since.
    pub guard: Option<Condition>,
    /// Begun with the first thing that a crash must not make anybody forget.
    pub journal: Option<Arc<Journal>>,
    /// The disk took no journal; it is not asked again.
    pub journal_failed: bool,
    /// The journal's last manifest is of the file as it is.
    pub recorded: bool,
    /// That manifest says that the file is closed.
    pub recorded_closed: bool,
    /// Files that the journal's last manifest names: they stay until there is another.
    pub named: Vec<Arc<SpillFile>>,
    /// Chunks whose named files were written to since.
    pub rewritten: BTreeSet<u32>,
    /// Where an object of this file was left that could not be moved to its last name.
    pub misplaced: Option<Misplaced>,
}

/// An object of a file under a name that the file has no longer.
#[derive(Debug)]
pub(super) struct Misplaced {
    pub target: Target,
    pub etag: Option<ETag>,
    /// What the file lay over before, and how many bytes of that counted.
    pub before: Option<(Arc<ObjectReader>, u64)>,
    /// Something of the file is nowhere else.
    pub only_copy: bool,
}

/// A piece of a read, or where it is to be had.
pub(super) enum Step {
    Bytes(Bytes),
    Zeros(u64),
    Base(Arc<ObjectReader>, u64),
    Refused(Refusal),
}

impl State {
    pub(super) fn write_chunk(
        &mut self,
        writer: &Writer,
        index: u32,
        bounds: &Range<u64>,
        at: u64,
        data: &[u8],
    ) -> Option<Refusal> {
        let relative = at - bounds.start;
        let whole = bounds.end - bounds.start;
        let new_end = at + data.len() as u64;
        self.note_rewriting(index);
        let fills = relative == 0 && whole <= writer.options.part_size && self.is_full_before(at);
        match self.chunks.get_mut(&index) {
            Some(chunk) => match chunk.write(&writer.room, relative, data, whole) {
                Ok(()) => {}
                Err(Refusal::Gap(gap)) => {
                    return Some(Refusal::Gap(
                        bounds.start + gap.start..bounds.start + gap.end,
                    ));
                }
                Err(refusal) => {
                    if let Refusal::Error(_) = &refusal {
                        // The disk may have taken some of it: what was sent is another version.
                        self.generation += 1;
                        chunk.version = self.generation;
                    }
                    return Some(refusal);
                }
            },
            None => match Chunk::new(&writer.room, relative, data, whole, fills) {
                Some(chunk) => {
                    self.chunks.insert(index, chunk);
                }
                None => return Some(Refusal::Room),
            },
        }
        self.note_change();
        self.generation += 1;
        let goes_on = at == self.size || at == self.cursor;
        self.sequential &= goes_on || index == 0 || new_end >= self.size;
        self.cursor = new_end;
        self.size = self.size.max(new_end);
        let version = self.generation;
        if let Some(chunk) = self.chunks.get_mut(&index) {
            chunk.version = version;
            chunk.touched = writer.tick();
        }
        None
    }

    /// Chunks that were written from their first byte to their last.
    pub(super) fn whole_chunks(&self) -> usize {
        let whole = |(index, chunk): &(&u32, &Chunk)| {
            let range = self.geometry.range(**index);
            chunk.local == (0..range.end - range.start)
        };
        self.chunks.iter().filter(whole).count()
    }

    /// Whether the chunk that ends at `at` was written from its first byte to its last: who does
    /// that is about to do the same to the next. Its memory is reserved as a whole then, so that no
    /// buffer kept for it has to go, page by page, while it grows.
    pub(super) fn is_full_before(&self, at: u64) -> bool {
        let Some(before) = at.checked_sub(1).map(|last| self.geometry.index(last)) else {
            return false;
        };
        let range = self.geometry.range(before);
        let full = 0..range.end - range.start;
        self.chunks.get(&before).is_some_and(|it| it.local == full)
    }

    /// Like a write, but content and size stay what they were: only the run grows.
    pub(super) fn fill_chunk(
        &mut self,
        writer: &Writer,
        index: u32,
        bounds: &Range<u64>,
        at: u64,
        data: &[u8],
    ) -> Option<Refusal> {
        let relative = at - bounds.start;
        let chunk = self.chunks.get_mut(&index)?;
        let range = relative..relative + data.len() as u64;
        // Writes that came meanwhile may cover some of it: only what is still outside counts.
        let before = range.start..range.end.min(chunk.local.start);
        let after = range.start.max(chunk.local.end)..range.end;
        let part = if before.start < before.end {
            before
        } else {
            after
        };
        if part.start >= part.end {
            return None;
        }
        let piece = &data[(part.start - range.start) as usize..(part.end - range.start) as usize];
        chunk
            .write(&writer.room, part.start, piece, bounds.end - bounds.start)
            .err()
    }

    pub(super) fn read_step(&self, range: Range<u64>) -> Step {
        let index = self.geometry.index(range.start);
        let bounds = self.geometry.range(index);
        let mut end = range.end.min(bounds.end).min(range.start + LONGEST_STEP);
        if let Some(chunk) = self.chunks.get(&index) {
            let local = bounds.start + chunk.local.start..bounds.start + chunk.local.end;
            if local.contains(&range.start) {
                let end = end.min(local.end);
                return match chunk.read(range.start - bounds.start..end - bounds.start) {
                    Ok(bytes) => Step::Bytes(bytes),
                    Err(refusal) => Step::Refused(refusal),
                };
            }
            if range.start < local.start {
                end = end.min(local.start);
            }
        }
        match &self.base {
            Some(base) if range.start < self.base_limit => {
                Step::Base(Arc::clone(base), end.min(self.base_limit) - range.start)
            }
            _ => Step::Zeros(end - range.start),
        }
    }

    /// The part that `size` would cut, if it is in the unfinished upload only: a part that was
    /// sent can be left out, and not be made shorter.
    pub(super) fn given_up_around(&self, size: u64) -> Option<Range<u64>> {
        let range = self.geometry.range(self.geometry.index(size));
        let chunk = self.chunks.get(&self.geometry.index(size))?;
        let cut = range.start < size && size < range.start + chunk.local.end;
        (cut && matches!(chunk.data, Data::GivenUp)).then_some(range)
    }

    /// Whether the journal has the file as it is, and closed.
    pub(super) fn is_recorded_closed(&self) -> bool {
        self.recorded && self.recorded_closed
    }

    /// Whether a part is in the unfinished upload only.
    pub(super) fn has_given_up(&self) -> bool {
        let mut chunks = self.chunks.values();
        chunks.any(|chunk| matches!(chunk.data, Data::GivenUp))
    }

    /// Whether the object underneath has part `index` as it is.
    pub(super) fn lies_beneath(&self, index: u32) -> bool {
        let chunk = self.chunks.get(&index);
        chunk.is_some_and(|chunk| chunk.beneath == Some(chunk.version))
            && self.part(index).end <= self.base_limit
    }

    /// Parts of these chunks are no longer sent.
    pub(super) fn unsend(&mut self, which: impl Fn(&Chunk) -> bool) {
        for chunk in self.chunks.values_mut().filter(|chunk| which(chunk)) {
            chunk.sent = None;
        }
    }

    /// Bytes of the part that chunk `index` travels as.
    pub(super) fn part(&self, index: u32) -> Range<u64> {
        let range = self.geometry.range(index);
        range.start..range.end.min(self.size)
    }
}
