//! A draft: a file that is being written and is not, or not yet again, an object.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Writer;
use super::chunk::{Chunk, Data, Refusal};
use super::error::WriteError;
use super::geometry::Geometry;
use super::journal::{self, Journal, Record, now};
use super::spill::SpillFile;
use super::target::Target;
use crate::read::{ObjectReader, Segments, Source};
use crate::store::{Condition, ETag, StoreError};

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
    pub misplaced: Option<Target>,
}

/// A file that is being written.
#[derive(Debug)]
pub struct Draft {
    /// Names it to people, and its files in the spill directory.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) since: u64,
    pub(super) writer: Arc<Writer>,
    pub(super) state: Mutex<State>,
    /// One publication, retargeting or creation of an upload at a time.
    pub(super) publishing: tokio::sync::Mutex<()>,
    /// A queued chunk was sent, or could not be.
    pub(super) sent: Notify,
    pub(super) creating: tokio::sync::Mutex<()>,
    /// Parts that the store has confirmed, of whatever version.
    pub(super) confirmed: AtomicU64,
}

/// What a non-blocking write achieved.
#[derive(Debug)]
pub enum Progress {
    Done,
    /// This many bytes were taken; the rest needs [`Draft::write`].
    Partial(usize),
}

impl Draft {
    /// A draft of a new, empty file.
    pub fn new(writer: &Arc<Writer>, target: Target) -> Arc<Self> {
        Self::build(writer, target, None)
    }

    /// A draft of changes to an object that is in the store.
    pub fn over(writer: &Arc<Writer>, target: Target, base: Arc<ObjectReader>) -> Arc<Self> {
        Self::build(writer, target, Some(base))
    }

    fn build(writer: &Arc<Writer>, target: Target, base: Option<Arc<ObjectReader>>) -> Arc<Self> {
        let size = base.as_ref().map_or(0, |base| base.size());
        let published = base.is_some().then_some(0);
        let state = State {
            held: target.looks_temporary(),
            target,
            base,
            base_limit: size,
            low_water: size,
            size,
            geometry: Geometry::over(writer.options.part_size, size),
            chunks: BTreeMap::new(),
            queued: BTreeSet::new(),
            generation: 0,
            opened: 0,
            published,
            upload: None,
            sequential: true,
            cursor: 0,
            detached: false,
            failure: None,
            only: None,
            guard: None,
            journal: None,
            journal_failed: false,
            recorded: false,
            recorded_closed: false,
            named: Vec::new(),
            rewritten: BTreeSet::new(),
            misplaced: None,
        };
        Self::with_state(writer, new_id(), now(), state)
    }

    pub(super) fn with_state(
        writer: &Arc<Writer>,
        id: String,
        since: u64,
        state: State,
    ) -> Arc<Self> {
        let draft = Arc::new(Self {
            id,
            since,
            writer: Arc::clone(writer),
            state: Mutex::new(state),
            publishing: tokio::sync::Mutex::new(()),
            sent: Notify::new(),
            creating: tokio::sync::Mutex::new(()),
            confirmed: AtomicU64::new(0),
        });
        writer.register(&draft);
        draft
    }

    /// Names it to people, for as long as it is not wholly in the store.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When it was begun, in seconds since 1970.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Parts that the store has confirmed, those sent again included.
    pub(super) fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// Bytes of the file now.
    pub fn size(&self) -> u64 {
        self.state.lock().size
    }

    /// Bytes of it that the store has confirmed, in an upload that is not complete yet.
    pub fn sent(&self) -> u64 {
        let state = self.state.lock();
        let parts = state.chunks.iter().map(|(index, chunk)| {
            let part = state.part(*index);
            let length = part.end.saturating_sub(part.start);
            if chunk.is_sent(length) { length } else { 0 }
        });
        parts.sum()
    }

    /// Rises with every change of its size or content.
    pub fn generation(&self) -> u64 {
        self.state.lock().generation
    }

    /// From now on only the file as it was at this generation is published: once it is another,
    /// [`Self::publish`] does nothing. `None` lifts that.
    pub fn publish_only(&self, generation: Option<u64>) {
        self.state.lock().only = generation;
    }

    /// Whether the store lacks something of it.
    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        !state.detached && state.published != Some(state.generation)
    }

    /// Whether the store has had a version of this file: what it was opened over, or what was
    /// published since.
    pub fn was_stored(&self) -> bool {
        self.state.lock().published.is_some()
    }

    /// The file has lost its name before this draft began: nothing of it will be published.
    pub fn keep_local(&self) {
        self.state.lock().detached = true;
    }

    /// Whether anything was written to it since it was opened or last published. A file that was
    /// only created, or emptied by its opening, has none: a shell closes a duplicate of its
    /// redirection before the program has written a byte.
    pub fn has_changes(&self) -> bool {
        let state = self.state.lock();
        let unchanged = state.opened.max(state.published.unwrap_or(0));
        !state.detached && state.generation > unchanged
    }

    /// Empties the file on behalf of `O_TRUNC`.
    pub fn truncate_at_open(&self) -> Result<(), WriteError> {
        let before = self.has_changes();
        self.truncate(0)?;
        let mut state = self.state.lock();
        if !before {
            state.opened = state.generation;
        }
        Ok(())
    }

    /// Why the last attempt to publish failed, if it did.
    pub fn failure(&self) -> Option<String> {
        self.state.lock().failure.clone()
    }

    /// It is tried again: until that fails too, nothing is known against it.
    pub fn forget_failure(&self) {
        self.state.lock().failure = None;
    }

    pub fn target(&self) -> Target {
        self.state.lock().target.clone()
    }

    /// Writes as much as can be written without waiting.
    pub fn try_write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<Progress, WriteError> {
        let mut done = 0;
        while done < data.len() {
            let (taken, refusal) = self.write_piece(offset + done as u64, &data[done..])?;
            done += taken;
            match refusal {
                None => {}
                Some(_) => return Ok(Progress::Partial(done)),
            }
        }
        Ok(Progress::Done)
    }

    /// Writes all of `data`, waiting for room where there is none.
    pub async fn write(self: &Arc<Self>, offset: u64, data: Bytes) -> Result<(), WriteError> {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (taken, refusal) = self.write_piece(at, &data[done..])?;
            done += taken;
            match refusal {
                None => {}
                Some(Refusal::Room) => self.writer.make_room(self).await?,
                Some(Refusal::Gap(gap)) => self.fill(gap).await?,
                Some(Refusal::GivenUp) => return Err(self.given_up(at..at + 1)),
                Some(Refusal::Error(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes what falls into one chunk; a refusal's gap is in file offsets.
    fn write_piece(
        self: &Arc<Self>,
        at: u64,
        data: &[u8],
    ) -> Result<(usize, Option<Refusal>), WriteError> {
        let mut state = self.state.lock();
        let end = at.saturating_add(data.len() as u64);
        if end > state.geometry.capacity() {
            return Err(WriteError::TooLarge {
                object: state.target.object(),
                size: end,
            });
        }
        let index = state.geometry.index(at);
        let range = state.geometry.range(index);
        let length = ((range.end - at) as usize).min(data.len());
        let piece = &data[..length];
        let refusal = state.write_chunk(&self.writer, index, &range, at, piece);
        if let Some(refusal) = refusal {
            return Ok((0, Some(refusal)));
        }
        let filled = state.chunks.get(&index).is_some_and(|chunk| {
            chunk.local == (0..range.end - range.start) && at + length as u64 == range.end
        });
        if filled && !state.detached {
            if !state.held {
                self.queue(&mut state, index);
            } else if state.whole_chunks() >= MOST_HELD {
                state.held = false;
                self.queue_full_chunks(&mut state);
            }
        }
        Ok((length, None))
    }

    /// Fetches or zeroes the bytes `range` (file offsets, within one chunk), which border on the
    /// chunk's run, so that the run reaches over them.
    pub(super) async fn fill(self: &Arc<Self>, range: Range<u64>) -> Result<(), WriteError> {
        let bytes = self.underlying(range.clone()).await?;
        loop {
            let refusal = {
                let mut state = self.state.lock();
                let index = state.geometry.index(range.start);
                let bounds = state.geometry.range(index);
                state.fill_chunk(&self.writer, index, &bounds, range.start, &bytes)
            };
            match refusal {
                None => return Ok(()),
                Some(Refusal::Room) => self.writer.make_room(self).await?,
                Some(Refusal::GivenUp) => return Err(self.given_up(range)),
                Some(Refusal::Error(error)) => return Err(error),
                // The run moved meanwhile; whoever asked looks again.
                Some(Refusal::Gap(_)) => return Ok(()),
            }
        }
    }

    /// What lies under the chunks: the base where it counts, zeros beyond.
    pub(super) async fn underlying(&self, range: Range<u64>) -> Result<Bytes, WriteError> {
        let (base, limit) = {
            let state = self.state.lock();
            (state.base.clone(), state.base_limit)
        };
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        if let Some(base) = base {
            let end = range.end.min(limit);
            let mut at = range.start;
            while at < end {
                let step = (end - at).min(BASE_STEP);
                let segments = base.read(at, step).await?;
                for piece in segments.pieces() {
                    bytes.extend_from_slice(piece);
                }
                if segments.len() as u64 != step {
                    return Err(StoreError::Changed {
                        object: self.target().object(),
                    }
                    .into());
                }
                at += step;
            }
        }
        bytes.resize((range.end - range.start) as usize, 0);
        Ok(bytes.into())
    }

    /// Up to `length` bytes at `offset`, as the file is now; fewer only at its end.
    pub async fn read(self: &Arc<Self>, offset: u64, length: u64) -> Result<Segments, WriteError> {
        let mut segments = Segments::default();
        let mut at = offset;
        loop {
            let step = {
                let state = self.state.lock();
                let end = offset.saturating_add(length).min(state.size);
                if at >= end {
                    return Ok(segments);
                }
                state.read_step(at..end)
            };
            match step {
                Step::Bytes(bytes) => {
                    at += bytes.len() as u64;
                    segments.push(bytes);
                }
                Step::Zeros(count) => {
                    at += count;
                    segments.push(vec![0; count as usize].into());
                }
                Step::Base(base, count) => {
                    let part = base.read(at, count).await?;
                    if part.len() as u64 != count {
                        return Err(StoreError::Changed {
                            object: self.target().object(),
                        }
                        .into());
                    }
                    at += count;
                    segments.append(part);
                }
                Step::Refused(Refusal::Error(error)) => return Err(error),
                Step::Refused(_) => return Err(self.given_up(at..at + 1)),
            }
        }
    }

    /// Sets the size: cuts off, or adds a hole.
    pub fn truncate(&self, size: u64) -> Result<(), WriteError> {
        let mut state = self.state.lock();
        if size > state.geometry.capacity() && !state.chunks.is_empty() {
            return Err(WriteError::TooLarge {
                object: state.target.object(),
                size,
            });
        }
        if size == state.size {
            return Ok(());
        }
        if let Some(range) = state.given_up_around(size) {
            return Err(WriteError::GivenUp {
                object: state.target.object(),
                start: range.start,
                end: range.end,
            });
        }
        if state.chunks.is_empty() && state.upload.is_none() {
            state.geometry = Geometry::new(self.writer.options.part_size, size);
        }
        state.note_change();
        state.generation += 1;
        state.size = size;
        state.base_limit = state.base_limit.min(size);
        state.low_water = state.low_water.min(size);
        let geometry = state.geometry;
        state
            .chunks
            .retain(|index, chunk| geometry.range(*index).start + chunk.local.start < size);
        let version = state.generation;
        if let Some((index, chunk)) = state.chunks.iter_mut().next_back() {
            let start = geometry.range(*index).start;
            if start + chunk.local.end > size {
                chunk.truncate(size - start);
                chunk.version = version;
            }
        }
        Ok(())
    }

    /// The base has moved inside the store (its file was renamed).
    pub fn repoint_base(&self, to: Source) {
        let mut state = self.state.lock();
        let Some(base) = state.base.clone() else {
            return;
        };
        let limit = state.base_limit;
        state.note(&Record::Moved(journal::Base::of(&to, limit)));
        base.repoint(to);
    }

    /// Only what stands under its name now may be replaced by it: `None` for nothing.
    pub fn replace_only(&self, standing: Option<ETag>) {
        let guard = standing.map_or(Condition::IfAbsent, Condition::IfMatch);
        self.state.lock().guard = Some(guard);
    }

    pub(super) fn given_up(&self, range: Range<u64>) -> WriteError {
        WriteError::GivenUp {
            object: self.target().object(),
            start: range.start,
            end: range.end,
        }
    }
}

/// Eight hexadecimal digits: short enough to type, and unlikely to be another draft's.
fn new_id() -> String {
    format!("{:08x}", rand::random::<u32>())
}

enum Step {
    Bytes(Bytes),
    Zeros(u64),
    Base(Arc<ObjectReader>, u64),
    Refused(Refusal),
}

/// Bytes of the base read at once. A read that is larger than what readers keep whatever writers
/// hold would wait for memory that only this draft's publication can free.
const BASE_STEP: u64 = 1 << 20;

/// So many whole chunks are held back for a better name. A larger file is sent meanwhile, and
/// copied inside the store when it has its name: measured, what a second look at the bytes costs is
/// made up for by sending while it is written.
const MOST_HELD: usize = 8;

/// Longest piece of a read or a hole handled in one step, bytes.
const LONGEST_STEP: u64 = 4 << 20;

impl State {
    fn write_chunk(
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
    fn is_full_before(&self, at: u64) -> bool {
        let Some(before) = at.checked_sub(1).map(|last| self.geometry.index(last)) else {
            return false;
        };
        let range = self.geometry.range(before);
        let full = 0..range.end - range.start;
        self.chunks.get(&before).is_some_and(|it| it.local == full)
    }

    /// Like a write, but content and size stay what they were: only the run grows.
    fn fill_chunk(
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

    fn read_step(&self, range: Range<u64>) -> Step {
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
    fn given_up_around(&self, size: u64) -> Option<Range<u64>> {
        let range = self.geometry.range(self.geometry.index(size));
        let chunk = self.chunks.get(&self.geometry.index(size))?;
        let cut = range.start < size && size < range.start + chunk.local.end;
        (cut && matches!(chunk.data, Data::GivenUp)).then_some(range)
    }

    /// Bytes of the part that chunk `index` travels as.
    pub(super) fn part(&self, index: u32) -> Range<u64> {
        let range = self.geometry.range(index);
        range.start..range.end.min(self.size)
    }
}
