//! Looks at what begins a member of a container: a header, and often nothing more.
//!
//! torch looks at every header of a file before it touches a tensor, one after the other. The
//! second look says that more will follow: the next ones are fetched side by side, just the pages
//! that a reader with a small buffer asks the kernel for. They are kept apart from the blocks, of
//! which a page is a small part.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use tokio::sync::OnceCell;

use super::fetch::object_name;
use super::plan::Extents;
use super::{Reader, Source};
use crate::budget::{Class, Reservation};
use crate::store::{StoreError, StoreResult};

const PAGE: u64 = 4096;
/// A header and its name, wherever in a page it begins, bytes.
const LENGTH: u64 = 2 * PAGE;
/// Looks fetched ahead.
const AHEAD: usize = 64;
/// Most kept of one object; then all of them are forgotten.
const MOST: usize = 4096;

/// The first pages of one member.
#[derive(Debug)]
struct Look {
    bytes: Bytes,
    _reservation: Reservation,
}

type Cell = Arc<OnceCell<Look>>;

/// What was looked at of one version of an object.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// By where they begin, in bytes.
    cells: HashMap<u64, Cell>,
    /// How many were asked for, by readers.
    asked: u64,
}

/// A look that somebody waits for, and those that will come after it.
#[derive(Debug)]
pub(super) struct Looking {
    own: (Range<u64>, Cell),
    ahead: Vec<(Range<u64>, Cell)>,
}

impl Looks {
    /// How to serve `read`, which ends in the header of `extent`; `None` where it is more than a
    /// look.
    pub fn plan(
        &mut self,
        read: &Range<u64>,
        extent: &Range<u64>,
        extents: &Extents,
        size: u64,
    ) -> Option<Looking> {
        let own = pages(extent.start, size);
        if read.start < own.start || read.end > own.end {
            return None;
        }
        if self.cells.len() > MOST {
            self.cells.clear();
        }
        let cell = self.cell(own.start);
        if !cell.initialized() {
            self.asked += 1;
        }
        let mut ahead = Vec::new();
        if self.asked > 1 && !cell.initialized() {
            for extent in extents.after(extent.start).take(AHEAD) {
                let pages = pages(extent.start, size);
                if pages.start != own.start && !self.cells.contains_key(&pages.start) {
                    ahead.push((pages.clone(), self.cell(pages.start)));
                }
            }
        }
        Some(Looking {
            own: (own, cell),
            ahead,
        })
    }

    fn cell(&mut self, start: u64) -> Cell {
        Arc::clone(self.cells.entry(start).or_default())
    }
}

impl Looking {
    /// The bytes of `read`; what is ahead is fetched in the background, as far as requests and
    /// memory allow.
    ///
    /// # Errors
    /// As for any read.
    pub async fn read(
        self,
        reader: &Arc<Reader>,
        source: &Source,
        read: Range<u64>,
    ) -> StoreResult<Bytes> {
        for (range, cell) in self.ahead {
            let Ok(permit) = Arc::clone(&reader.prefetches).try_acquire_owned() else {
                break;
            };
            let (reader, source) = (Arc::clone(reader), source.clone());
            let runtime = reader.runtime.clone();
            runtime.spawn(async move {
                let asked = &reader.metrics.bytes_prefetched;
                let looked = cell.get_or_try_init(|| look(&reader, &source, &range, asked));
                if let Err(error) = looked.await {
                    tracing::debug!(object = object_name(&source), %error, "not looked ahead");
                }
                drop(permit);
            });
        }
        let (own, cell) = self.own;
        let asked = &reader.metrics.bytes_demanded;
        let look = cell
            .get_or_try_init(|| look(reader, source, &own, asked))
            .await?;
        let from = (read.start - own.start) as usize;
        Ok(look.bytes.slice(from..(read.end - own.start) as usize))
    }
}

/// The pages that a header at `start` is in.
fn pages(start: u64, size: u64) -> Range<u64> {
    let start = start / PAGE * PAGE;
    start..(start + LENGTH).min(size)
}

async fn look(
    reader: &Reader,
    source: &Source,
    range: &Range<u64>,
    asked: &AtomicU64,
) -> StoreResult<Look> {
    let length = range.end - range.start;
    let reservation = reader.budget.reserve(Class::Read, length).await;
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
    Ok(Look {
        bytes: bytes.freeze(),
        _reservation: reservation,
    })
}
