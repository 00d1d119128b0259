//! A draft: a file that is being written and is not, or not yet again, an object.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Writer;
use super::chunk::Refusal;
use super::error::WriteError;
use super::geometry::Geometry;
use super::growing::Following;
use super::journal::{self, Record, now};
use super::state::{State, Step};
use super::target::Target;
use crate::read::{ObjectReader, Segments, Source};
use crate::store::{Condition, ObjectMeta, StoreError};

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
            following: Following::Not,
            sequential: true,
            cursor: 0,
            detached: false,
            failure: None,
            failed_close: None,
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

    /// Whoever closed the file at this generation was told that it could not be stored.
    pub fn note_failed_close(&self, generation: u64) {
        self.state.lock().failed_close = Some(generation);
    }

    /// Whether somebody knows that the file as it is now could not be stored.
    pub fn is_known_to_have_failed(&self) -> bool {
        let state = self.state.lock();
        state.failed_close == Some(state.generation)
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
            } else if state.whole_chunks() > MOST_HELD {
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
                let segments = base.read(0, at, step).await?;
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
            let (step, end) = {
                let state = self.state.lock();
                let end = offset.saturating_add(length).min(state.size);
                if at >= end {
                    return Ok(segments);
                }
                (state.read_step(at..end), end)
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
                    let mut part = base.read(0, at, count).await?;
                    if part.len() as u64 != count {
                        return Err(StoreError::Changed {
                            object: self.target().object(),
                        }
                        .into());
                    }
                    at += count;
                    if at < end {
                        // More of the base may follow, and waits for memory: nobody who waits for
                        // some holds any.
                        part = part.copied();
                    }
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

    /// Only what stands under its name now may be replaced by it: `None` for nothing. What has no
    /// version cannot be told from what comes to stand there.
    pub fn replace_only(&self, standing: Option<ObjectMeta>) {
        let guard = match standing.map(|standing| standing.etag) {
            None => Condition::IfAbsent,
            Some(Some(etag)) => Condition::IfMatch(etag),
            Some(None) => Condition::Always,
        };
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

/// Bytes of the base read at once. A read that is larger than what readers keep whatever writers
/// hold would wait for memory that only this draft's publication can free.
const BASE_STEP: u64 = 1 << 20;

/// So many whole chunks are held back for a better name. With one more a file is sent meanwhile, and
/// copied inside the store when it has its name: measured, what a second look at the bytes costs is
/// made up for by sending while it is written.
const MOST_HELD: usize = 8;
