//! Consecutive blocks on their way: from disk, or by ranged GETs that fill them while they stream.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures_util::TryStreamExt;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::block::{Block, BlockCache, Unread};
use super::disk::Found;
use super::distance::Distance;
use super::{BLOCK_SIZE, Reader, Source};
use crate::budget::Reservation;
use crate::store::{StoreError, StoreResult};

/// The blocks of a request of at most this many bytes get a buffer each. Frames share the buffers
/// that they were received into, and one of them keeps all of a buffer: where requests are small and
/// far apart, the blocks of one are let go of one by one, and the daemon held 1.6 times the bytes
/// that the budget knew of. Where there are many blocks, those of all requests do: see
/// [`BlockCache::is_crowded`].
const COPIED: u64 = 2 << 20;

/// Where bytes are fetched from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin<'a> {
    pub source: &'a Source,
    /// Is told where the blocks were, and how long answers take.
    pub distance: &'a Distance,
}

/// A fetch on its way. Whoever waits for a block of it holds the fetch, and with it the blocks:
/// the cache may evict them meanwhile, the waiter gets them all the same.
#[derive(Debug)]
pub(super) struct Fetch {
    /// Block indices.
    pub blocks: Range<u64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The blocks that are there: the first ones.
    filled: Vec<Arc<Block>>,
    failed: Option<StoreError>,
    /// Who waits, each for the block of this index. Each is woken once: there may be dozens.
    waiting: Vec<(u64, oneshot::Sender<StoreResult<()>>)>,
}

impl Fetch {
    pub fn new(blocks: Range<u64>) -> Arc<Self> {
        Arc::new(Self {
            blocks,
            state: Mutex::default(),
        })
    }

    /// Waits until block `index`, which must be one of this fetch's, and all before it are there.
    ///
    /// # Errors
    /// Why no more will come.
    pub async fn until(&self, index: u64) -> StoreResult<()> {
        debug_assert!(self.blocks.contains(&index));
        let came = {
            let mut state = self.state.lock();
            if index < self.blocks.start + state.filled.len() as u64 {
                return Ok(());
            }
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let (sender, came) = oneshot::channel();
            state.waiting.push((index, sender));
            came
        };
        came.await.unwrap_or_else(|_| Err(given_up(index)))
    }

    /// Block `index`, if it is there.
    pub fn block(&self, index: u64) -> Option<Arc<Block>> {
        let position = index.checked_sub(self.blocks.start)? as usize;
        self.state.lock().filled.get(position).cloned()
    }

    fn fill(&self, cache: &BlockCache, content: u64, block: Arc<Block>) {
        let index = self.blocks.start + self.state.lock().filled.len() as u64;
        cache.insert(content, index, Arc::clone(&block));
        let mut state = self.state.lock();
        state.filled.push(block);
        let came = state.waiting.extract_if(.., |(waits, _)| *waits <= index);
        for (_, waiter) in came {
            // Nobody may be waiting any more.
            let _ = waiter.send(Ok(()));
        }
    }

    /// Tells the waiters that no more will come.
    pub fn fail(&self, error: StoreError) {
        let mut state = self.state.lock();
        for (_, waiter) in state.waiting.drain(..) {
            let _ = waiter.send(Err(error.clone()));
        }
        state.failed = Some(error);
    }

    /// Fills the blocks in order: from disk where it has them, else from the store as the bytes
    /// arrive, a request a gap. Bytes asked of the store are added to `asked`.
    pub async fn run(
        &self,
        reader: &Reader,
        origin: Origin<'_>,
        content: u64,
        mut reservation: Reservation,
        mut unread: Option<Unread>,
        asked: &AtomicU64,
    ) -> StoreResult<()> {
        let source = origin.source;
        let disk = reader.disk.as_ref().and_then(|disk| disk.object(source));
        let mut rest = self.blocks.clone();
        while !rest.is_empty() {
            let found = match &disk {
                Some(disk) => disk.find(rest.clone()).await,
                None => Found::Gap(rest.clone()),
            };
            match found {
                Found::Run(run) => {
                    let from_disk = &reader.metrics.bytes_from_disk;
                    rest.start += run.len() as u64;
                    origin.distance.note_disk();
                    for bytes in run {
                        let length = bytes.len() as u64;
                        from_disk.fetch_add(length, Ordering::Relaxed);
                        let block =
                            Block::new(vec![bytes], reservation.split(length), unread.as_mut());
                        self.fill(&reader.cache, content, block);
                    }
                }
                Found::Gap(gap) => {
                    rest.start = gap.end;
                    let bytes = range_of(&gap, source);
                    asked.fetch_add(bytes.end - bytes.start, Ordering::Relaxed);
                    let outcome = self
                        .request(
                            bytes,
                            origin,
                            &reader.cache,
                            content,
                            &mut reservation,
                            unread.as_mut(),
                        )
                        .await;
                    if let Some(disk) = &disk {
                        disk.offer(gap.start, &self.filled_from(gap.start));
                    }
                    outcome?;
                }
            }
        }
        Ok(())
    }

    /// The blocks from `index` on, as far as they are there.
    fn filled_from(&self, index: u64) -> Vec<Arc<Block>> {
        let position = (index - self.blocks.start) as usize;
        let state = self.state.lock();
        state.filled.get(position..).unwrap_or_default().to_vec()
    }

    /// One ranged GET of whole blocks, the next to be filled.
    async fn request(
        &self,
        bytes: Range<u64>,
        origin: Origin<'_>,
        cache: &BlockCache,
        content: u64,
        reservation: &mut Reservation,
        mut unread: Option<&mut Unread>,
    ) -> StoreResult<()> {
        let is_small = bytes.end - bytes.start <= COPIED;
        request(origin, bytes, |mut frames| {
            if is_small || cache.is_crowded() {
                frames = vec![Bytes::from(frames.concat())];
            }
            let length = frames.iter().map(|frame| frame.len() as u64).sum();
            let block = Block::new(frames, reservation.split(length), unread.as_deref_mut());
            self.fill(cache, content, block);
        })
        .await
    }
}

/// One ranged GET of whole blocks, of which each is handed over when its last byte has come.
///
/// # Errors
/// `Changed` when there is another version; the store's.
pub(super) async fn request(
    origin: Origin<'_>,
    bytes: Range<u64>,
    mut block: impl FnMut(Vec<Bytes>),
) -> StoreResult<()> {
    let Origin { source, distance } = origin;
    let (start, end) = (bytes.start, bytes.end);
    let asked = Instant::now();
    let body = source
        .store
        .get(&source.key, bytes, source.etag.as_ref())
        .await?;
    distance.note(asked.elapsed());
    if body.object_size != source.size || body.range != (start..end) {
        return Err(StoreError::Changed {
            object: object_name(source),
        });
    }
    let mut frames = body.frames;
    let mut gathered: Vec<Bytes> = Vec::new();
    let mut offset = start;
    let mut boundary = (start + BLOCK_SIZE).min(end);
    while let Some(mut frame) = frames.try_next().await? {
        while !frame.is_empty() {
            let take = ((boundary - offset) as usize).min(frame.len());
            if take == 0 {
                return Err(too_long(source));
            }
            gathered.push(frame.split_to(take));
            offset += take as u64;
            if offset == boundary {
                block(std::mem::take(&mut gathered));
                boundary = (boundary + BLOCK_SIZE).min(end);
            }
        }
    }
    if offset < end {
        return Err(StoreError::Unavailable {
            object: object_name(source),
            detail: format!("the answer ended {} bytes early", end - offset),
        });
    }
    Ok(())
}

/// Bytes of some blocks.
pub(super) fn range_of(blocks: &Range<u64>, source: &Source) -> Range<u64> {
    blocks.start * BLOCK_SIZE..(blocks.end * BLOCK_SIZE).min(source.size)
}

pub(super) fn object_name(source: &Source) -> String {
    format!("{}/{}", source.store.name(), source.key)
}

fn given_up(index: u64) -> StoreError {
    StoreError::Unavailable {
        object: format!("block {index}"),
        detail: "the fetch was given up".to_owned(),
    }
}

fn too_long(source: &Source) -> StoreError {
    StoreError::Corrupt {
        object: object_name(source),
        detail: "the answer was longer than the range asked for".to_owned(),
    }
}
