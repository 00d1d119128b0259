//! Blocks in memory, least recently used first to go.

use std::hash::{BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use super::PAGE;
use crate::budget::{Reclaim, Reservation};

/// The frames of one block, as they came off the wire, or one copy of them.
#[derive(Debug)]
pub(super) struct Block {
    pub frames: Vec<Bytes>,
    pub length: u64,
    /// Until somebody reads it, if it was fetched ahead of anybody.
    unread: Mutex<Option<Unread>>,
    /// Held as long as anybody holds the block.
    _reservation: Reservation,
}

/// Bytes fetched ahead, or being fetched, that nobody has read yet; counted as long as it lives.
#[derive(Debug)]
pub(super) struct Unread {
    counted: Arc<AtomicU64>,
    /// Counts those that came and were let go of unread.
    wasted: Arc<AtomicU64>,
    bytes: u64,
}

impl Unread {
    /// Counts `bytes` more.
    pub fn new(counted: &Arc<AtomicU64>, wasted: &Arc<AtomicU64>, bytes: u64) -> Self {
        counted.fetch_add(bytes, Ordering::Relaxed);
        Self {
            counted: Arc::clone(counted),
            wasted: Arc::clone(wasted),
            bytes,
        }
    }

    /// Takes `bytes` out, counted on.
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self {
            counted: Arc::clone(&self.counted),
            wasted: Arc::clone(&self.wasted),
            bytes,
        }
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.counted.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(unread) = self.unread.get_mut() {
            unread.wasted.fetch_add(unread.bytes, Ordering::Relaxed);
        }
    }
}

impl Block {
    pub fn new(
        frames: Vec<Bytes>,
        reservation: Reservation,
        unread: Option<&mut Unread>,
    ) -> Arc<Self> {
        let length = frames.iter().map(|frame| frame.len() as u64).sum();
        Arc::new(Self {
            frames,
            length,
            unread: Mutex::new(unread.map(|unread| unread.split(length))),
            _reservation: reservation,
        })
    }
}

/// Pieces of a read's answer, in order. Holding it pins the blocks it comes from.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    pieces: Vec<Bytes>,
    length: usize,
    blocks: Vec<Arc<Block>>,
}

impl Segments {
    /// Appends `range` (relative to the block's start) of a block.
    pub(super) fn push_block(&mut self, block: &Arc<Block>, range: Range<u64>) {
        drop(block.unread.lock().take());
        let mut start = 0;
        for frame in &block.frames {
            let end = start + frame.len() as u64;
            let from = range.start.max(start);
            let to = range.end.min(end);
            if from < to {
                self.push(frame.slice((from - start) as usize..(to - start) as usize));
            }
            start = end;
        }
        self.blocks.push(Arc::clone(block));
    }

    /// Appends bytes that belong to no block.
    pub fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        self.pieces.push(piece);
    }

    /// Appends all of `other`.
    pub fn append(&mut self, mut other: Segments) {
        self.length += other.length;
        self.pieces.append(&mut other.pieces);
        self.blocks.append(&mut other.blocks);
    }

    /// The same bytes in memory of their own, which pins no blocks.
    pub fn copied(&self) -> Self {
        let mut copied = Self::default();
        copied.push(self.pieces.concat().into());
        copied
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// The bytes in one piece: as they are if they are one already, else put together in `scratch`, from
    /// where a page begins in it. The kernel copies pages, and one in two halves takes it longer: a read
    /// of 4 GiB cost 0.51 s/GiB of processor time before, and costs 0.48.
    pub fn contiguous<'a>(&'a self, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        if let [piece] = self.pieces.as_slice() {
            return piece;
        }
        let room = self.length + PAGE as usize;
        if scratch.len() < room {
            *scratch = vec![0; room];
        }
        let start = scratch.as_ptr().align_offset(PAGE as usize);
        let whole = &mut scratch[start..start + self.length];
        let mut rest = &mut *whole;
        for piece in &self.pieces {
            let (own, behind) = rest.split_at_mut(piece.len());
            own.copy_from_slice(piece);
            rest = behind;
        }
        whole
    }
}

/// Bytes of blocks that stay in the buffers which they were received into: so many at most, and at most
/// so many sixteenths of what readers may hold. What the buffers take beyond them is to be no more than a
/// process may hold beyond its budget.
const MOST_IN_WHOLE_BUFFERS: u64 = 256 << 20;
const SIXTEENTHS_IN_WHOLE_BUFFERS: u64 = 9;

type Index = LruCache<(u64, u64), Arc<Block>, BuildHasherDefault<DefaultHasher>>;

struct Cached {
    index: Index,
    bytes: u64,
}

/// Blocks by (content, index). Its bound is the budget: every block carries its reservation.
pub(super) struct BlockCache {
    cached: Mutex<Cached>,
    /// Bytes up to which it is not crowded.
    ample: u64,
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("BlockCache")
            .field("bytes", &self.bytes())
            .finish()
    }
}

impl BlockCache {
    /// `most`: bytes that the budget allows readers.
    pub fn new(most: u64) -> Arc<Self> {
        let index = LruCache::unbounded_with_hasher(BuildHasherDefault::default());
        Arc::new(Self {
            cached: Mutex::new(Cached { index, bytes: 0 }),
            ample: MOST_IN_WHOLE_BUFFERS.min(most / 16 * SIXTEENTHS_IN_WHOLE_BUFFERS),
        })
    }

    /// Whether the bytes that the buffers of blocks take beyond those of the blocks matter. The HTTP
    /// client receives into buffers of up to 400 KiB, whether as much has come or not: measured, they
    /// took 1.15 times the bytes in them raw, and 1.6 times over slower connections. A copy takes as
    /// much as its bytes. Copying everything cost 4 to 7 % of the speed of one reader, who does not
    /// come as far as this; eight who took pieces of 16 MiB in turn held 780 MiB of 512 without.
    pub fn is_crowded(&self) -> bool {
        self.bytes() > self.ample
    }

    pub fn bytes(&self) -> u64 {
        self.cached.lock().bytes
    }

    pub fn get(&self, content: u64, index: u64) -> Option<Arc<Block>> {
        self.cached.lock().index.get(&(content, index)).cloned()
    }

    pub fn contains(&self, content: u64, index: u64) -> bool {
        self.cached.lock().index.contains(&(content, index))
    }

    pub fn insert(&self, content: u64, index: u64, block: Arc<Block>) {
        let replaced = {
            let mut cached = self.cached.lock();
            cached.bytes += block.length;
            let replaced = cached.index.put((content, index), block);
            if let Some(old) = &replaced {
                cached.bytes -= old.length;
            }
            replaced
        };
        // Its reservation goes back outside of the lock: the budget may call us to reclaim.
        drop(replaced);
    }
}

impl BlockCache {
    /// Lets go of blocks nobody will ask for soon.
    pub fn remove(&self, content: u64, blocks: Range<u64>) {
        let mut removed = Vec::new();
        {
            let mut cached = self.cached.lock();
            for index in blocks {
                if let Some(block) = cached.index.pop(&(content, index)) {
                    cached.bytes -= block.length;
                    removed.push(block);
                }
            }
        }
        drop(removed);
    }
}

impl Reclaim for BlockCache {
    fn reclaim(&self, bytes: u64) -> u64 {
        let mut evicted = Vec::new();
        let mut freed = 0;
        {
            let mut cached = self.cached.lock();
            while freed < bytes {
                let Some((_, block)) = cached.index.pop_lru() else {
                    break;
                };
                cached.bytes -= block.length;
                freed += block.length;
                evicted.push(block);
            }
        }
        drop(evicted);
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_put_together_from_where_a_page_begins_whatever_was_there_before() {
        let mut scratch = Vec::new();
        for lengths in [
            vec![],
            vec![70, 5000],
            vec![1],
            vec![3, 1, 2],
            vec![9000, 4096],
        ] {
            let mut segments = Segments::default();
            let mut expected = Vec::new();
            for (number, length) in lengths.iter().enumerate() {
                let piece = vec![number as u8 + 1; *length];
                expected.extend_from_slice(&piece);
                segments.push(piece.into());
            }
            let whole = segments.contiguous(&mut scratch);
            assert_eq!(whole, expected);
            let is_copied = lengths.len() > 1;
            assert!(!is_copied || (whole.as_ptr() as usize).is_multiple_of(PAGE as usize));
        }
    }
}
