//! One ranged GET that fills consecutive blocks while it streams.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::block::{Block, BlockCache};
use super::{BLOCK_SIZE, Source};
use crate::budget::Reservation;
use crate::store::{StoreError, StoreResult};

/// How far a fetch is.
#[derive(Clone, Debug)]
enum Progress {
    /// Blocks below this index are there.
    Ready(u64),
    Failed(StoreError),
}

/// A fetch on its way. Whoever waits for a block of it holds the fetch, and with it the blocks:
/// the cache may evict them meanwhile, the waiter gets them all the same.
#[derive(Debug)]
pub(super) struct Fetch {
    /// Block indices.
    pub blocks: Range<u64>,
    filled: Mutex<Vec<Arc<Block>>>,
    progress: watch::Sender<Progress>,
}

impl Fetch {
    pub fn new(blocks: Range<u64>) -> Arc<Self> {
        let (progress, _) = watch::channel(Progress::Ready(blocks.start));
        Arc::new(Self {
            blocks,
            filled: Mutex::new(Vec::new()),
            progress,
        })
    }

    /// Waits for block `index`, which must be one of this fetch's.
    pub async fn block(&self, index: u64) -> StoreResult<Arc<Block>> {
        debug_assert!(self.blocks.contains(&index));
        let mut progress = self.progress.subscribe();
        loop {
            match &*progress.borrow_and_update() {
                Progress::Ready(until) if index < *until => break,
                Progress::Ready(_) => {}
                Progress::Failed(error) => return Err(error.clone()),
            }
            if progress.changed().await.is_err() {
                break;
            }
        }
        let position = (index - self.blocks.start) as usize;
        self.filled
            .lock()
            .get(position)
            .cloned()
            .ok_or_else(|| StoreError::Unavailable {
                object: format!("block {index}"),
                detail: "the fetch was given up".to_owned(),
            })
    }

    fn fill(&self, cache: &BlockCache, content: u64, block: Arc<Block>) {
        let mut filled = self.filled.lock();
        let index = self.blocks.start + filled.len() as u64;
        filled.push(Arc::clone(&block));
        drop(filled);
        cache.insert(content, index, block);
        self.progress
            .send_modify(|progress| *progress = Progress::Ready(index + 1));
    }

    /// Tells the waiters that no more will come.
    pub fn fail(&self, error: StoreError) {
        self.progress
            .send_modify(|progress| *progress = Progress::Failed(error));
    }

    /// Runs the request to its end and fills the blocks as the bytes arrive.
    pub async fn run(
        &self,
        source: &Source,
        cache: &BlockCache,
        content: u64,
        mut reservation: Reservation,
    ) -> StoreResult<()> {
        let start = self.blocks.start * BLOCK_SIZE;
        let end = (self.blocks.end * BLOCK_SIZE).min(source.size);
        let body = source
            .store
            .get(&source.key, start..end, source.etag.as_ref())
            .await?;
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
                    let frames = std::mem::take(&mut gathered);
                    let length: u64 = frames.iter().map(|frame| frame.len() as u64).sum();
                    let block = Block::new(frames, reservation.split(length));
                    self.fill(cache, content, block);
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
}

pub(super) fn object_name(source: &Source) -> String {
    format!("{}/{}", source.store.name(), source.key)
}

fn too_long(source: &Source) -> StoreError {
    StoreError::Corrupt {
        object: object_name(source),
        detail: "the answer was longer than the range asked for".to_owned(),
    }
}
