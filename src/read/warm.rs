//! Bytes that are to be in the disk cache before anybody reads them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::block::Block;
use super::disk::DiskObject;
use super::fetch::{Origin, range_of, request};
use super::{BLOCK_SIZE, ObjectReader, Source};
use crate::budget::Class;
use crate::store::{StoreError, StoreResult};

/// Blocks of a request at most: 8 MiB, as those of a long stream.
const REQUEST: u64 = (8 << 20) / BLOCK_SIZE;

impl ObjectReader {
    /// Puts the blocks that hold `bytes` into the disk cache, those that are not there, and waits
    /// until they are written. They do not come into memory's: nobody reads them now. Returns how
    /// many bytes are not there in the end, for want of room or for a failure of the disk; `None`
    /// when there is no disk cache for this object.
    ///
    /// # Errors
    /// The store's; `Changed` when the object was replaced.
    pub async fn warm(self: &Arc<Self>, bytes: Range<u64>) -> StoreResult<Option<u64>> {
        let source = self.source();
        let reader = self.reader();
        let Some(disk) = reader.disk.as_ref().and_then(|disk| disk.object(&source)) else {
            return Ok(None);
        };
        let end = bytes.end.min(self.size());
        let blocks = bytes.start / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE);
        if bytes.start >= end {
            return Ok(Some(0));
        }
        let missing = disk.missing(blocks.clone()).await;
        let pieces = missing.into_iter().flat_map(pieces);
        let bring = |piece| self.bring(&source, &disk, piece);
        stream::iter(pieces.map(bring))
            .buffer_unordered(reader.options.transfers)
            .try_collect::<()>()
            .await?;
        let missing = disk.missing(blocks).await;
        let left = missing.iter().map(|run| {
            let bytes = range_of(run, &source);
            bytes.end - bytes.start
        });
        Ok(Some(left.sum()))
    }

    /// Fetches blocks and hands them to the disk.
    async fn bring(
        &self,
        source: &Source,
        disk: &DiskObject,
        blocks: Range<u64>,
    ) -> StoreResult<()> {
        let reader = self.reader();
        let permit = reader.prefetches.acquire().await;
        let permit = permit.map_err(|error| StoreError::Other {
            object: source.key.clone(),
            detail: error.to_string(),
        })?;
        let bytes = range_of(&blocks, source);
        let length = bytes.end - bytes.start;
        let mut reservation = reader.budget.reserve(Class::Read, length).await;
        let prefetched = &reader.metrics.bytes_prefetched;
        prefetched.fetch_add(length, Ordering::Relaxed);
        let mut filled = Vec::new();
        let origin = Origin {
            source,
            distance: self.distance(),
        };
        request(origin, bytes, |frames| {
            let length = frames.iter().map(|frame| frame.len() as u64).sum();
            filled.push(Block::new(frames, reservation.split(length), None));
        })
        .await?;
        drop(permit);
        disk.keep(blocks.start, &filled).await;
        Ok(())
    }
}

fn pieces(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = run.end;
    run.step_by(REQUEST as usize)
        .map(move |start| start..(start + REQUEST).min(end))
}
