//! One version of one object, and everybody who reads it.

mod ahead;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::block::{Block, Segments, Unread};
use super::distance::Distance;
use super::fetch::{Fetch, Origin, object_name};
use super::look::{Looking, Progress};
use super::pattern::Pattern;
use super::plan::{Extents, Format, Plan};
use super::{BLOCK_SIZE, Reader, Source};
use crate::budget::{Class, Reservation};
use crate::store::{StoreError, StoreResult};

/// An object up to this size, bytes, is fetched whole at the first touch: its bytes cost less than
/// a second round trip.
const WHOLE_OBJECT: u64 = 512 * 1024;
/// Of a container these first bytes are fetched at the first touch of its beginning: torch's index of
/// what is in it, which is read next, is among them.
const CONTAINER_HEAD: u64 = 64 * 1024;
/// A prefetch that failed is repeated by each reader that needs it, this often.
const ATTEMPTS: usize = 2;

/// What is known of the inside of the file.
#[derive(Debug)]
enum Layout {
    /// The format's index has not been read yet; these bytes of the file tell more of it.
    Unread(Format, Range<u64>),
    Known(Format, Arc<Extents>),
    Plain,
}

#[derive(Debug)]
struct State {
    source: Source,
    pattern: Pattern,
    /// Bytes fetched ahead since windows were cut last, and let go of unread, that the pattern has
    /// not been told of yet.
    wasted: Arc<AtomicU64>,
    /// Fetches on their way, by first block; they never overlap.
    fetches: BTreeMap<u64, Arc<Fetch>>,
    layout: Layout,
    looks: Progress,
    /// Where the tensor ends that somebody began last.
    begun: Option<u64>,
    /// Where the tensor ends whose beginning came along with the index, or with the end of the first
    /// tensor, until that place is touched.
    along: Option<u64>,
    /// Where one tensor ends and the next begins, if a read was around that place and may have been for
    /// either.
    doubtful: Option<u64>,
}

/// What a fetch brings that nobody waits for.
struct Ahead {
    /// None where somebody waits for its first bytes.
    permit: Option<OwnedSemaphorePermit>,
    unread: Unread,
}

/// All the blocks of a read, there or on their way with memory of their own: who holds this waits
/// for no memory.
#[derive(Default)]
struct Gathered {
    /// Blocks that are there, by index, in order.
    there: Vec<(u64, Arc<Block>)>,
    /// Fetches of all others.
    waiting: Vec<Arc<Fetch>>,
}

/// Reads one version of one object; never a byte of another.
#[derive(Debug)]
pub struct ObjectReader {
    reader: Arc<Reader>,
    content: u64,
    size: u64,
    distance: Distance,
    /// Whether its store [scales](crate::store::Capabilities::scales).
    scales: bool,
    state: Mutex<State>,
}

impl ObjectReader {
    pub(super) fn new(reader: Arc<Reader>, source: Source, content: u64) -> Arc<Self> {
        let layout = match Format::of_name(&source.key) {
            Some(format) => Layout::Unread(format, format.first(source.size)),
            None => Layout::Plain,
        };
        Arc::new(Self {
            reader,
            content,
            size: source.size,
            distance: Distance::default(),
            scales: source.store.capabilities().scales,
            state: Mutex::new(State {
                source,
                pattern: Pattern::default(),
                wasted: Arc::default(),
                fetches: BTreeMap::new(),
                layout,
                looks: Progress::default(),
                begun: None,
                along: None,
                doubtful: None,
            }),
        })
    }

    /// What it is by its name and as far as it has been read; `None`: nothing with an index.
    pub(super) fn format(&self) -> Option<Format> {
        match self.state.lock().layout {
            Layout::Unread(format, _) | Layout::Known(format, _) => Some(format),
            Layout::Plain => None,
        }
    }

    pub(super) fn distance(&self) -> &Distance {
        &self.distance
    }

    pub(super) fn reader(&self) -> &Reader {
        &self.reader
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

    /// Up to `length` bytes at `offset`; fewer only at the end of the object. `thread` is the one
    /// that asks, 0 if that is not known: how far each one read before it went elsewhere tells how
    /// far the next one will.
    ///
    /// # Errors
    /// `Changed` when the object was replaced, `NotFound` when it is gone.
    pub async fn read(
        self: &Arc<Self>,
        thread: u32,
        offset: u64,
        length: u64,
    ) -> StoreResult<Segments> {
        let end = offset.saturating_add(length).min(self.size);
        if offset >= end {
            return Ok(Segments::default());
        }
        if self.is_look(&(offset..end)).await
            && let Some((looking, source)) = self.look(offset..end)
        {
            let bytes = looking.read(&self.reader, &source, offset..end).await?;
            self.note_served(end - offset);
            let mut segments = Segments::default();
            segments.push(bytes);
            return Ok(segments);
        }
        let wanted = self.demand(offset..end);
        let mut gathered = self.gather(wanted.clone()).await;
        self.run_ahead(thread, offset..end);
        let mut failures = BTreeMap::new();
        let segments = loop {
            let (index, error) = match self.collect(&gathered, offset..end).await {
                Ok(segments) => break segments,
                Err(failure) => failure,
            };
            let attempts: &mut usize = failures.entry(index).or_default();
            *attempts += 1;
            if *attempts >= ATTEMPTS || !error.is_transient() {
                return Err(error);
            }
            drop(gathered);
            gathered = self.gather(wanted.clone()).await;
        };
        self.learn_layout(end);
        self.note_served(end - offset);
        Ok(segments)
    }

    fn note_served(&self, bytes: u64) {
        (self.reader.metrics.bytes_served).fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether a read only looks at how a member begins, and its blocks are neither here nor on their
    /// way here.
    async fn is_look(&self, read: &Range<u64>) -> bool {
        let blocks = read.start / BLOCK_SIZE..read.end.div_ceil(BLOCK_SIZE);
        {
            let state = self.state.lock();
            let Layout::Known(format, extents) = &state.layout else {
                return false;
            };
            let extent = extents.containing(read.end - 1);
            let looks = extent.is_some_and(|extent| format.looks(read, &extent));
            if !looks || self.gaps(&state, blocks.clone(), None).is_empty() {
                return false;
            }
        }
        let disk = self.reader.disk.as_ref();
        match disk.and_then(|disk| disk.object(&self.source())) {
            Some(disk) => !disk.missing(blocks).await.is_empty(),
            None => true,
        }
    }

    /// How to serve a read that only looks at how a member begins.
    fn look(&self, read: Range<u64>) -> Option<(Looking, Source)> {
        let mut state = self.state.lock();
        let State { layout, looks, .. } = &mut *state;
        let Layout::Known(_, extents) = layout else {
            return None;
        };
        let extent = extents.containing(read.end - 1)?;
        let kept = &self.reader.looks;
        let looking = kept.plan(self.content, &read, &extent, extents, self.size, looks)?;
        Some((looking, state.source.clone()))
    }

    /// The blocks a read of `range` asks for.
    fn demand(&self, range: Range<u64>) -> Range<u64> {
        if self.size <= WHOLE_OBJECT {
            return 0..self.size.div_ceil(BLOCK_SIZE);
        }
        let wanted = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        let begins =
            range.start == 0 && matches!(self.state.lock().layout, Layout::Unread(Format::Zip, _));
        if begins {
            0..wanted.end.max(CONTAINER_HEAD / BLOCK_SIZE)
        } else {
            wanted
        }
    }

    /// The bytes of `range`, as they come; or which block did not, and why.
    async fn collect(
        &self,
        gathered: &Gathered,
        range: Range<u64>,
    ) -> Result<Segments, (u64, StoreError)> {
        let wanted = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        // All of a small object is asked for, whatever of it is read.
        let read = |fetch: &&Arc<Fetch>| {
            fetch.blocks.start < wanted.end && wanted.start < fetch.blocks.end
        };
        for fetch in gathered.waiting.iter().filter(read) {
            let last = fetch.blocks.end.min(wanted.end) - 1;
            fetch.until(last).await.map_err(|error| (last, error))?;
        }
        let mut segments = Segments::default();
        let mut there = gathered.there.iter().peekable();
        for index in wanted {
            while there.next_if(|(other, _)| *other < index).is_some() {}
            let block = match there.next_if(|(other, _)| *other == index) {
                Some((_, block)) => Some(Arc::clone(block)),
                None => gathered.waiting.iter().find_map(|fetch| fetch.block(index)),
            };
            let Some(block) = block else {
                unreachable!("every block is there or has come");
            };
            let start = index * BLOCK_SIZE;
            let from = range.start.max(start) - start;
            let to = range.end.min(start + BLOCK_SIZE) - start;
            segments.push_block(&block, from..to);
        }
        Ok(segments)
    }

    /// Makes sure that every block of `blocks` is there or on its way; starts what is not.
    ///
    /// It holds nothing while it waits for memory: those who hold some of what they need, and wait
    /// for the rest, would wait for each other.
    async fn gather(self: &Arc<Self>, blocks: Range<u64>) -> Gathered {
        let budget = &self.reader.budget;
        let mut reserved: Option<Reservation> = None;
        let mut most = 0;
        loop {
            {
                let mut state = self.state.lock();
                let mut gathered = Gathered::default();
                let gaps = self.gaps(&state, blocks.clone(), Some(&mut gathered));
                if gaps.is_empty() {
                    return gathered;
                }
                let bytes: u64 = gaps.iter().map(|gap| self.bytes_of(gap)).sum();
                // What it waited for is as much as it can ever have.
                let waited = reserved.take().filter(|_| bytes <= most);
                let reservation = match waited {
                    Some(reservation) => Some(reservation),
                    None => budget.try_reserve(Class::Read, bytes),
                };
                if let Some(mut reservation) = reservation {
                    for gap in gaps {
                        let fetch = Fetch::new(gap.clone());
                        state.fetches.insert(gap.start, Arc::clone(&fetch));
                        let own = reservation.split(self.bytes_of(&gap));
                        self.start(Arc::clone(&fetch), state.source.clone(), own, None);
                        gathered.waiting.push(fetch);
                    }
                    return gathered;
                }
                most = bytes.max(most);
            }
            reserved = Some(budget.reserve(Class::Read, most).await);
        }
    }

    /// The runs of `blocks` that are neither cached nor on their way; the others are added to
    /// `gathered`.
    fn gaps(
        &self,
        state: &State,
        blocks: Range<u64>,
        mut gathered: Option<&mut Gathered>,
    ) -> Vec<Range<u64>> {
        let mut gaps: Vec<Range<u64>> = Vec::new();
        let mut index = blocks.start;
        while index < blocks.end {
            if let Some(fetch) = state.on_its_way(index) {
                let next = fetch.blocks.end;
                if let Some(gathered) = gathered.as_deref_mut() {
                    gathered.waiting.push(fetch);
                }
                index = next;
                continue;
            }
            let cache = &self.reader.cache;
            let is_there = match gathered.as_deref_mut() {
                Some(gathered) => {
                    let block = cache.get(self.content, index);
                    gathered.there.extend(block.map(|block| (index, block)));
                    gathered
                        .there
                        .last()
                        .is_some_and(|(last, _)| *last == index)
                }
                None => cache.contains(self.content, index),
            };
            if !is_there {
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

    /// Starts a fetch that stands in the table already, with memory for all of it.
    fn start(
        self: &Arc<Self>,
        fetch: Arc<Fetch>,
        source: Source,
        reservation: Reservation,
        ahead: Option<Ahead>,
    ) {
        let this = Arc::clone(self);
        self.reader.runtime.spawn(async move {
            let reader = &this.reader;
            let (permit, unread, asked) = match ahead {
                Some(Ahead { permit, unread }) => {
                    (permit, Some(unread), &reader.metrics.bytes_prefetched)
                }
                None => (None, None, &reader.metrics.bytes_demanded),
            };
            tracing::trace!(blocks = ?fetch.blocks, ahead = unread.is_some(), "fetch");
            let origin = Origin {
                source: &source,
                distance: &this.distance,
            };
            let outcome = fetch
                .run(reader, origin, this.content, reservation, unread, asked)
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

    /// Reads the format's index as soon as its bytes are in the cache, after a read that went up to
    /// `end`; asks for nothing itself.
    fn learn_layout(&self, end: u64) {
        let mut state = self.state.lock();
        while let Layout::Unread(format, needed) = &state.layout {
            let format = *format;
            let Some(bytes) = self.cached(needed) else {
                return;
            };
            let plan = format.plan(self.size, needed.start, &bytes);
            let longer = |range: &Range<u64>| {
                range.end <= self.size && range.end - range.start > needed.end - needed.start
            };
            state.layout = match plan {
                Plan::Need(range) if longer(&range) => Layout::Unread(format, range),
                Plan::Ready(extents) => {
                    state.along = extents.containing(end - 1).map(|extent| extent.end);
                    Layout::Known(format, Arc::new(extents))
                }
                other => {
                    tracing::debug!(object = object_name(&state.source), plan = ?other,
                        "read without a plan");
                    Layout::Plain
                }
            };
        }
    }

    /// Bytes of the object, if all of them are in memory.
    fn cached(&self, range: &Range<u64>) -> Option<Vec<u8>> {
        let mut segments = Segments::default();
        for index in range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE) {
            let block = self.reader.cache.get(self.content, index)?;
            let start = index * BLOCK_SIZE;
            let from = range.start.max(start) - start;
            let to = (range.end - start).min(block.length);
            segments.push_block(&block, from..to);
        }
        let mut bytes = Vec::new();
        Some(segments.contiguous(&mut bytes).to_vec())
    }
}

impl State {
    fn on_its_way(&self, index: u64) -> Option<Arc<Fetch>> {
        let (_, fetch) = self.fetches.range(..=index).next_back()?;
        fetch.blocks.contains(&index).then(|| Arc::clone(fetch))
    }
}
