//! One version of one object, and everybody who reads it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::block::{Block, Segments};
use super::fetch::{Fetch, object_name};
use super::pattern::Pattern;
use super::plan::{self, Extents, Plan};
use super::{BLOCK_SIZE, Reader, Source};
use crate::budget::Class;
use crate::store::StoreResult;

/// Bytes of one prefetch request at most: long enough that the time to the first byte does not
/// matter on a connection of 90 MB/s, short enough that 16 of them fit a small budget.
const REQUEST_SIZE: u64 = 8 << 20;
/// Requests that a window is cut into while they are small.
const PIECES: u64 = 4;
/// Bytes of one prefetch request at least, unless the window itself is smaller.
const SMALL_REQUEST: u64 = 1 << 20;
/// An object up to this size, bytes, is fetched whole at the first touch: its bytes cost less than
/// a second round trip.
const WHOLE_OBJECT: u64 = 512 * 1024;
/// A read this close to the beginning of a tensor begins it, bytes: the C library copies each MiB of
/// a mapping backwards, and the kernel reads ahead out of order.
const BEGINNING: u64 = 2 << 20;
/// A prefetch that failed is repeated by each reader that needs it, this often.
const ATTEMPTS: usize = 2;

/// What is known of the inside of the file.
#[derive(Debug)]
enum Layout {
    /// The format's index has not been read yet; it is complete with this many bytes of the start.
    Unread(u64),
    Known(Arc<Extents>),
    Plain,
}

#[derive(Debug)]
struct State {
    source: Source,
    pattern: Pattern,
    /// Fetches on their way, by first block; they never overlap.
    fetches: BTreeMap<u64, Arc<Fetch>>,
    layout: Layout,
}

/// Reads one version of one object; never a byte of another.
#[derive(Debug)]
pub struct ObjectReader {
    reader: Arc<Reader>,
    content: u64,
    size: u64,
    state: Mutex<State>,
}

impl ObjectReader {
    pub(super) fn new(reader: Arc<Reader>, source: Source, content: u64) -> Arc<Self> {
        let layout = if source.key.ends_with(".safetensors") {
            Layout::Unread(8)
        } else {
            Layout::Plain
        };
        Arc::new(Self {
            reader,
            content,
            size: source.size,
            state: Mutex::new(State {
                source,
                pattern: Pattern::default(),
                fetches: BTreeMap::new(),
                layout,
            }),
        })
    }

    /// Bytes of the object.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A number that is the same for all readers of the same version, within this mount.
    pub fn content(&self) -> u64 {
        self.content
    }

    /// The version being read and where it is now.
    pub fn source(&self) -> Source {
        self.state.lock().source.clone()
    }

    /// The same bytes now lie elsewhere (the file was renamed by a copy inside the store).
    pub fn repoint(&self, to: Source) {
        debug_assert_eq!(to.size, self.size);
        let from = std::mem::replace(&mut self.state.lock().source, to.clone());
        self.reader.alias(&from, &to);
    }

    /// Up to `length` bytes at `offset`; fewer only at the end of the object.
    ///
    /// # Errors
    /// `Changed` when the object was replaced, `NotFound` when it is gone.
    pub async fn read(self: &Arc<Self>, offset: u64, length: u64) -> StoreResult<Segments> {
        let end = offset.saturating_add(length).min(self.size);
        if offset >= end {
            return Ok(Segments::default());
        }
        let wanted = self.demand(offset..end);
        let mut segments = Segments::default();
        let mut waiting = self.plan_fetches(wanted.clone());
        self.run_ahead(offset..end);
        for index in offset / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE) {
            let block = self.block(index, &mut waiting).await?;
            let start = index * BLOCK_SIZE;
            let from = offset.max(start) - start;
            let to = end.min(start + BLOCK_SIZE) - start;
            segments.push_block(&block, from..to);
        }
        self.learn_layout();
        self.reader
            .metrics
            .bytes_served
            .fetch_add(end - offset, Ordering::Relaxed);
        Ok(segments)
    }

    /// The blocks a read of `range` asks for.
    fn demand(&self, range: Range<u64>) -> Range<u64> {
        if self.size <= WHOLE_OBJECT {
            return 0..self.size.div_ceil(BLOCK_SIZE);
        }
        range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE)
    }

    async fn block(
        self: &Arc<Self>,
        index: u64,
        waiting: &mut Vec<Arc<Fetch>>,
    ) -> StoreResult<Arc<Block>> {
        let mut attempts = 0;
        loop {
            if let Some(block) = self.reader.cache.get(self.content, index) {
                return Ok(block);
            }
            let fetch = waiting
                .iter()
                .find(|fetch| fetch.blocks.contains(&index))
                .cloned();
            let Some(fetch) = fetch else {
                // Evicted between planning and now.
                *waiting = self.plan_fetches(index..index + 1);
                continue;
            };
            match fetch.block(index).await {
                Ok(block) => return Ok(block),
                Err(error) => {
                    attempts += 1;
                    if attempts >= ATTEMPTS || !error.is_transient() {
                        return Err(error);
                    }
                    waiting.retain(|other| !Arc::ptr_eq(other, &fetch));
                }
            }
        }
    }

    /// Makes sure that every block of `blocks` is in the cache or on its way; starts what is not.
    /// Returns the fetches to wait for.
    fn plan_fetches(self: &Arc<Self>, blocks: Range<u64>) -> Vec<Arc<Fetch>> {
        let mut waiting = Vec::new();
        let mut state = self.state.lock();
        for gap in self.gaps(&state, blocks, Some(&mut waiting)) {
            let fetch = Fetch::new(gap.clone());
            state.fetches.insert(gap.start, Arc::clone(&fetch));
            self.start(Arc::clone(&fetch), state.source.clone(), None);
            waiting.push(fetch);
        }
        waiting
    }

    /// The runs of `blocks` that are neither cached nor on their way; those on their way are
    /// added to `waiting`.
    fn gaps(
        &self,
        state: &State,
        blocks: Range<u64>,
        mut waiting: Option<&mut Vec<Arc<Fetch>>>,
    ) -> Vec<Range<u64>> {
        let mut gaps: Vec<Range<u64>> = Vec::new();
        let mut index = blocks.start;
        while index < blocks.end {
            if let Some(fetch) = state.on_its_way(index) {
                let next = fetch.blocks.end;
                if let Some(waiting) = waiting.as_deref_mut() {
                    waiting.push(fetch);
                }
                index = next;
                continue;
            }
            if !self.reader.cache.contains(self.content, index) {
                match gaps.last_mut() {
                    Some(gap) if gap.end == index => gap.end += 1,
                    _ => gaps.push(index..index + 1),
                }
            }
            index += 1;
        }
        gaps
    }

    fn bytes_of(&self, blocks: &Range<u64>) -> u64 {
        (blocks.end * BLOCK_SIZE).min(self.size) - blocks.start * BLOCK_SIZE
    }

    /// Starts a fetch that stands in the table already. A prefetch brings its permit and its
    /// reservation; a demand waits for its reservation, for somebody waits for it.
    fn start(
        self: &Arc<Self>,
        fetch: Arc<Fetch>,
        source: Source,
        prefetch: Option<(
            tokio::sync::OwnedSemaphorePermit,
            crate::budget::Reservation,
        )>,
    ) {
        let this = Arc::clone(self);
        self.reader.runtime.spawn(async move {
            let reader = &this.reader;
            let bytes = this.bytes_of(&fetch.blocks);
            let (permit, reservation, asked) = match prefetch {
                Some((permit, reservation)) => {
                    (Some(permit), reservation, &reader.metrics.bytes_prefetched)
                }
                None => {
                    let reservation = reader.budget.reserve(Class::Read, bytes).await;
                    (None, reservation, &reader.metrics.bytes_demanded)
                }
            };
            let outcome = fetch
                .run(reader, &source, this.content, reservation, asked)
                .await;
            drop(permit);
            // The blocks are in the cache now, and can be given up for others.
            this.reader.budget.note_reclaimable();
            // Out of the table first: who plans anew must not meet a fetch that has failed.
            this.state.lock().fetches.remove(&fetch.blocks.start);
            if let Err(error) = outcome {
                tracing::debug!(object = object_name(&source), %error, "range not fetched");
                fetch.fail(error);
            }
        });
    }

    /// Fetches ahead of the reader what the pattern and the format call for, as far as permits
    /// and memory allow; never waits.
    fn run_ahead(self: &Arc<Self>, read: Range<u64>) {
        let mut state = self.state.lock();
        // The kernel reads whole pages: the first byte of a read may still be a neighbour's.
        let extent = match &state.layout {
            Layout::Known(extents) => extents.containing(read.end - 1),
            _ => None,
        };
        let bound = extent.as_ref().map_or(self.size, |extent| extent.end);
        let maximum = self.maximum_window();
        let mut ahead = state.pattern.note(read.clone(), maximum, bound, self.size);
        // Not who comes from the tensor before: the kernel reads past the end of what was asked.
        let begun = extent.filter(|extent| ahead.first && read.start <= extent.start + BEGINNING);
        let mut pieces = PIECES;
        if let Some(extent) = begun {
            // Whoever begins a tensor reads it to its end: all of it at once.
            ahead.range = read.end..extent.end.min(read.end + maximum).max(read.end);
            ahead.window = ahead.range.end - ahead.range.start;
            pieces = self.reader.options.transfers as u64;
        }
        tracing::trace!(?read, ?ahead, bound, "pattern");
        let behind = ahead.behind.start.div_ceil(BLOCK_SIZE)..ahead.behind.end / BLOCK_SIZE;
        self.reader.cache.remove(self.content, behind);
        if ahead.range.is_empty() {
            return;
        }
        // Small windows are cut, so that their requests overlap; large ones into requests of full
        // size, so that few are needed. A rest smaller than a request waits for more.
        let request = (ahead.window / pieces).clamp(SMALL_REQUEST, REQUEST_SIZE);
        let mut from = ahead.range.start;
        while from < ahead.range.end {
            let to = (from + request).min(ahead.range.end);
            if to - from < request && to < bound {
                break;
            }
            if !self.prefetch(&mut state, from..to) {
                break;
            }
            from = to;
        }
        state.pattern.asked(read.start, from);
    }

    /// Most bytes to run ahead: enough for every permitted request, within half of what readers
    /// may hold.
    fn maximum_window(&self) -> u64 {
        let wire = (self.reader.options.transfers as u64 + 2) * REQUEST_SIZE;
        wire.min(self.reader.budget.ceiling(Class::Read) / 2)
    }

    fn prefetch(self: &Arc<Self>, state: &mut State, bytes: Range<u64>) -> bool {
        let blocks = bytes.start / BLOCK_SIZE..bytes.end.div_ceil(BLOCK_SIZE);
        for gap in self.gaps(state, blocks, None) {
            let length = self.bytes_of(&gap);
            let Ok(permit) = Arc::clone(&self.reader.prefetches).try_acquire_owned() else {
                return false;
            };
            let Some(reservation) = self.reader.budget.try_reserve(Class::Read, length) else {
                return false;
            };
            let fetch = Fetch::new(gap.clone());
            state.fetches.insert(gap.start, Arc::clone(&fetch));
            self.start(fetch, state.source.clone(), Some((permit, reservation)));
        }
        true
    }

    /// Reads the format's index as soon as its bytes are in the cache; asks for nothing itself.
    fn learn_layout(&self) {
        let mut state = self.state.lock();
        while let Layout::Unread(needed) = state.layout {
            let Some(prefix) = self.cached_prefix(needed) else {
                return;
            };
            state.layout = match plan::safetensors(self.size, &prefix) {
                Plan::NeedPrefix(more) if more > needed => Layout::Unread(more),
                Plan::Ready(extents) => Layout::Known(Arc::new(extents)),
                other => {
                    tracing::debug!(object = object_name(&state.source), plan = ?other,
                        "read without a plan");
                    Layout::Plain
                }
            };
        }
    }

    fn cached_prefix(&self, length: u64) -> Option<Vec<u8>> {
        let length = length.min(self.size);
        let mut segments = Segments::default();
        for index in 0..length.div_ceil(BLOCK_SIZE) {
            let block = self.reader.cache.get(self.content, index)?;
            let start = index * BLOCK_SIZE;
            segments.push_block(&block, 0..(length - start).min(block.length));
        }
        let mut prefix = Vec::new();
        Some(segments.contiguous(&mut prefix).to_vec())
    }
}

impl State {
    fn on_its_way(&self, index: u64) -> Option<Arc<Fetch>> {
        let (_, fetch) = self.fetches.range(..=index).next_back()?;
        fetch.blocks.contains(&index).then(|| Arc::clone(fetch))
    }
}
