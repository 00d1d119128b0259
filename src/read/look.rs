//! Looks at what begins a member of a container: a header, and often nothing more.
//!
//! torch looks at every header of a file before it touches a tensor, one after the other. Once that
//! is to be expected, the next ones are fetched side by side, just the pages that such a reader asks
//! the kernel for. They are kept apart from the blocks, of which a page is a small part.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::fetch::object_name;
use super::plan::Extents;
use super::{PAGE, Reader, Source};
use crate::store::{StoreError, StoreResult};

/// A header and its name, bytes: torch's are shorter.
const HEADER: u64 = 128;
/// A reader with a buffer of 8 KiB, wherever in a page it begins. Longer reads are no looks.
const MOST_PAGES: u64 = 3;
/// Looks fetched ahead of whoever looks.
const AHEAD: usize = 128;
/// Looks at once for each prefetch that there may be: a page is soon there, and what counts is the
/// time to its first byte.
const FOR_A_PREFETCH: usize = 8;
/// Most looks at once.
const MOST_AT_ONCE: usize = 256;
/// Most kept, of all objects: 2 MiB, 6 with large buffers. The kernel has the pages that were asked
/// for.
const MOST: NonZeroUsize = NonZeroUsize::new(512).unwrap();

/// The first pages of one member, once they are there.
#[derive(Debug)]
struct Look {
    content: u64,
    /// Bytes of the object.
    range: Range<u64>,
    bytes: OnceCell<Bytes>,
}

/// The headers that were looked at last, of all objects, by content and where they begin, in bytes.
#[derive(Debug)]
pub(super) struct Looks {
    kept: Mutex<LruCache<(u64, u64), Arc<Look>>>,
    /// Looks ahead on their way.
    requests: Arc<Semaphore>,
}

/// How far an object has been looked through.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Looks that nobody had foreseen.
    unforeseen: u64,
    /// Where the last member begins whose header was asked for.
    until: u64,
    /// What the longest look took.
    pages: u64,
}

/// A look that somebody waits for, and those that will come after it.
#[derive(Debug)]
pub(super) struct Looking {
    own: Arc<Look>,
    ahead: Vec<(Arc<Look>, OwnedSemaphorePermit)>,
}

impl Looks {
    /// For a mount that may have so many prefetches in flight.
    pub fn new(transfers: usize) -> Self {
        Self {
            kept: Mutex::new(LruCache::new(MOST)),
            requests: Arc::new(Semaphore::new(
                (transfers * FOR_A_PREFETCH).min(MOST_AT_ONCE),
            )),
        }
    }

    /// How to serve `read` of an object of `size` bytes, which ends in the header of `extent`;
    /// `None` where it is more than a look.
    pub fn plan(
        &self,
        content: u64,
        read: &Range<u64>,
        extent: &Range<u64>,
        extents: &Extents,
        size: u64,
        progress: &mut Progress,
    ) -> Option<Looking> {
        let shortest = pages(extent.start, 1, size);
        let own = shortest.start..shortest.end.max(read.end.next_multiple_of(PAGE).min(size));
        let taken = (own.end - own.start).div_ceil(PAGE);
        if read.start < own.start || taken > MOST_PAGES {
            return None;
        }
        progress.pages = progress.pages.max(taken);
        tracing::trace!(?read, header = extent.start, pages = taken, "look");
        let mut kept = self.kept.lock();
        // The kernel has what was looked at before: those that nobody has looked at may outlive it.
        let known = kept.peek(&(content, own.start));
        let known = known.filter(|look| read.end <= look.range.end).cloned();
        if known.is_none() {
            progress.unforeseen += 1;
            progress.until = extent.start;
        }
        let own = known.unwrap_or_else(|| keep(&mut kept, content, own));
        let mut ahead = Vec::new();
        if progress.unforeseen > 1 || extents.looked_through() {
            for next in extents.after(extent.start).take(AHEAD) {
                let range = pages(next.start, progress.pages, size);
                let known = kept.peek(&(content, range.start));
                let is_known = known.is_some_and(|look| range.end <= look.range.end);
                if next.start <= progress.until || is_known {
                    continue;
                }
                let Ok(permit) = Arc::clone(&self.requests).try_acquire_owned() else {
                    break;
                };
                progress.until = next.start;
                ahead.push((keep(&mut kept, content, range), permit));
            }
        }
        Some(Looking { own, ahead })
    }

    /// Forgets one that failed: whoever comes there has it fetched anew, and the next ones.
    fn forget(&self, look: &Arc<Look>) {
        let key = (look.content, look.range.start);
        let mut kept = self.kept.lock();
        if kept
            .peek(&key)
            .is_some_and(|known| Arc::ptr_eq(known, look))
        {
            kept.pop(&key);
        }
    }
}

fn keep(kept: &mut LruCache<(u64, u64), Arc<Look>>, content: u64, range: Range<u64>) -> Arc<Look> {
    let key = (content, range.start);
    let look = Arc::new(Look {
        content,
        range,
        bytes: OnceCell::new(),
    });
    kept.put(key, Arc::clone(&look));
    look
}

impl Looking {
    /// The bytes of `read`; what is ahead is fetched in the background.
    ///
    /// # Errors
    /// As for any read.
    pub async fn read(
        self,
        reader: &Arc<Reader>,
        source: &Source,
        read: Range<u64>,
    ) -> StoreResult<Bytes> {
        for (look, permit) in self.ahead {
            let (reader, source) = (Arc::clone(reader), source.clone());
            let runtime = reader.runtime.clone();
            runtime.spawn(async move {
                let asked = &reader.metrics.bytes_prefetched;
                if let Err(error) = look.bytes(&source, asked).await {
                    reader.looks.forget(&look);
                    tracing::debug!(object = object_name(&source), %error, "not looked ahead");
                }
                drop(permit);
            });
        }
        let own = self.own;
        let bytes = own.bytes(source, &reader.metrics.bytes_demanded).await;
        let bytes = bytes.inspect_err(|_| reader.looks.forget(&own))?;
        let from = (read.start - own.range.start) as usize;
        Ok(bytes.slice(from..(read.end - own.range.start) as usize))
    }
}

impl Look {
    /// Its bytes; where it has to ask for them, they are added to `asked`.
    async fn bytes(&self, source: &Source, asked: &AtomicU64) -> StoreResult<&Bytes> {
        let fetched = || fetch(source, &self.range, asked);
        self.bytes.get_or_try_init(fetched).await
    }
}

/// The pages that a header at `start` is in, but `least` at least.
fn pages(start: u64, least: u64, size: u64) -> Range<u64> {
    let first = start / PAGE * PAGE;
    let end = (start + HEADER).next_multiple_of(PAGE);
    first..end.max(first + least * PAGE).min(size)
}

async fn fetch(source: &Source, range: &Range<u64>, asked: &AtomicU64) -> StoreResult<Bytes> {
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
