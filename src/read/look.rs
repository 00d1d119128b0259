//! Looks at what begins a member of a container: a header, and often nothing more.
//!
//! torch looks at every header of a file before it touches a tensor, one after the other. The
//! second look says that more will follow: the next ones are fetched side by side, just the pages
//! that a reader with a small buffer asks the kernel for. They are kept apart from the blocks, of
//! which a page is a small part.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::fetch::object_name;
use super::plan::Extents;
use super::{Reader, Source};
use crate::store::{StoreError, StoreResult};

const PAGE: u64 = 4096;
/// A header and its name, wherever in a page it begins, bytes.
const LENGTH: u64 = 2 * PAGE;
/// Looks fetched ahead.
const AHEAD: usize = 64;
/// Most kept, of all objects: 4 MiB. The kernel has the pages that were asked for.
const MOST: NonZeroUsize = NonZeroUsize::new(512).unwrap();

/// The first pages of one member, once they are there.
type Cell = Arc<OnceCell<Bytes>>;

/// The headers that were looked at last, of all objects, by content and where they begin, in bytes.
#[derive(Debug)]
pub(super) struct Looks {
    cells: Mutex<LruCache<(u64, u64), Cell>>,
}

/// A look that somebody waits for, and those that will come after it.
#[derive(Debug)]
pub(super) struct Looking {
    own: (Range<u64>, Cell),
    ahead: Vec<(Range<u64>, Cell)>,
}

impl Looks {
    pub fn new() -> Self {
        Self {
            cells: Mutex::new(LruCache::new(MOST)),
        }
    }

    /// How to serve `read` of an object of `size` bytes, which ends in the header of `extent`;
    /// `None` where it is more than a look. `asked` counts those of this object that were not there.
    pub fn plan(
        &self,
        content: u64,
        read: &Range<u64>,
        extent: &Range<u64>,
        extents: &Extents,
        size: u64,
        asked: &mut u64,
    ) -> Option<Looking> {
        let own = pages(extent.start, size);
        if read.start < own.start || read.end > own.end {
            return None;
        }
        let mut cells = self.cells.lock();
        let mut cell = |start| Arc::clone(cells.get_or_insert_mut((content, start), Cell::default));
        let own = (own.clone(), cell(own.start));
        let mut ahead = Vec::new();
        if !own.1.initialized() {
            *asked += 1;
            let next = extents.after(extent.start).take(AHEAD);
            let next = next.filter(|_| *asked > 1);
            ahead.extend(next.map(|extent| {
                let pages = pages(extent.start, size);
                (pages.clone(), cell(pages.start))
            }));
        }
        Some(Looking { own, ahead })
    }
}

impl Looking {
    /// The bytes of `read`; what is ahead is fetched in the background, as far as requests are free.
    ///
    /// # Errors
    /// As for any read.
    pub async fn read(
        self,
        reader: &Arc<Reader>,
        source: &Source,
        read: Range<u64>,
    ) -> StoreResult<Bytes> {
        let ahead = self.ahead.into_iter();
        for (range, cell) in ahead.filter(|(_, cell)| !cell.initialized()) {
            let Ok(permit) = Arc::clone(&reader.prefetches).try_acquire_owned() else {
                break;
            };
            let (reader, source) = (Arc::clone(reader), source.clone());
            let runtime = reader.runtime.clone();
            runtime.spawn(async move {
                let asked = &reader.metrics.bytes_prefetched;
                let looked = cell.get_or_try_init(|| look(&source, &range, asked));
                if let Err(error) = looked.await {
                    tracing::debug!(object = object_name(&source), %error, "not looked ahead");
                }
                drop(permit);
            });
        }
        let (own, cell) = self.own;
        let asked = &reader.metrics.bytes_demanded;
        let bytes = cell.get_or_try_init(|| look(source, &own, asked)).await?;
        let from = (read.start - own.start) as usize;
        Ok(bytes.slice(from..(read.end - own.start) as usize))
    }
}

/// The pages that a header at `start` is in.
fn pages(start: u64, size: u64) -> Range<u64> {
    let start = start / PAGE * PAGE;
    start..(start + LENGTH).min(size)
}

async fn look(source: &Source, range: &Range<u64>, asked: &AtomicU64) -> StoreResult<Bytes> {
    let length = range.end - range.start;
    asked.fetch_add(length, Ordering::Relaxed);
    let body = source
        .store
        .get(&source.key, range.clone(), source.etag.as_ref())
        .await?;
    if body.object_size != source.size || body.range != *range {
        return Err(StoreError::Changed {
            object: object_name(source),
        });
    }
    let mut frames = body.frames;
    let mut bytes = BytesMut::with_capacity(length as usize);
    while let Some(frame) = frames.try_next().await? {
        bytes.extend_from_slice(&frame);
    }
    if bytes.len() as u64 != length {
        return Err(StoreError::Unavailable {
            object: object_name(source),
            detail: "the answer is not as long as the range asked for".to_owned(),
        });
    }
    Ok(bytes.freeze())
}
