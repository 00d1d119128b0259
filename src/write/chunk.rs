//! A chunk: a part's local form.
//!
//! A chunk holds one run of local bytes, anywhere inside the part's range; what lies outside the
//! run comes from the object that the draft was opened over, or is a hole of zeros. A write that
//! touches or overlaps the run extends it. All offsets here are relative to the chunk's start.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::error::WriteError;
use super::pool::Pool;
use super::spill::SpillFile;
use crate::budget::{Budget, Class, Reservation};
use crate::store::{PartReceipt, checksum};

/// Memory is reserved in steps of this many bytes.
const STEP: usize = 64 * 1024;
/// Once a chunk holds this much its buffer is made as large as the part at once: untouched pages
/// cost nothing, growing again and again costs copies.
const FULL_SIZE_FROM: usize = 256 * 1024;

/// The bytes of a run in memory; byte 0 stands at `origin` in the chunk.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    origin: u64,
    /// Taken out only when the buffer goes.
    reservation: Option<Reservation>,
    pool: Arc<Pool>,
}

/// Where a chunk's local bytes are.
#[derive(Debug)]
pub(super) enum Data {
    Memory(Arc<Buffer>),
    Spilled(Arc<SpillFile>),
    /// In the unfinished upload only.
    GivenUp,
}

/// A part that the store holds, of a certain version of the chunk.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub version: u64,
    pub receipt: PartReceipt,
}

#[derive(Debug)]
pub(super) struct Chunk {
    pub data: Data,
    /// The run of local bytes.
    pub local: Range<u64>,
    /// CRC32C of the run, as long as it only grew at its end.
    pub crc32c: Option<u32>,
    /// Rises with each change; unique within the draft.
    pub version: u64,
    pub sent: Option<Sent>,
    /// The version that the object underneath has too.
    pub beneath: Option<u64>,
    /// When it was last written to, by the writer's clock.
    pub touched: u64,
    /// On disk too, for the journal, while the data is in memory.
    pub copy: Option<DiskCopy>,
}

/// A copy of a run as it was once.
#[derive(Clone, Debug)]
pub(super) struct DiskCopy {
    pub version: u64,
    pub local: Range<u64>,
    /// CRC32C of the run.
    pub crc32c: u32,
    pub file: Arc<SpillFile>,
}

/// Where chunks get their memory.
#[derive(Debug)]
pub(super) struct Room {
    pub budget: Arc<Budget>,
    pub pool: Arc<Pool>,
}

/// Shares a buffer with a request body without copying it.
struct Shared {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.buffer.bytes[self.range.clone()]
    }
}

/// Why a write could not be taken at once.
#[derive(Debug)]
pub(super) enum Refusal {
    /// No memory (or spill) left for it.
    Room,
    /// The gap between the run and the write must be filled first.
    Gap(Range<u64>),
    /// Its local copy was given up.
    GivenUp,
    Error(WriteError),
}

impl Chunk {
    /// A chunk of `size` bytes with its first ones, if the budget allows; `fills` says that all of
    /// it is about to be written.
    pub fn new(room: &Room, at: u64, data: &[u8], size: u64, fills: bool) -> Option<Self> {
        let length = if fills {
            (size - at) as usize
        } else {
            data.len()
        };
        let mut buffer = Buffer::with_room(room, length, at, size)?;
        buffer.bytes.extend_from_slice(data);
        Some(Self {
            data: Data::Memory(Arc::new(buffer)),
            local: at..at + data.len() as u64,
            crc32c: Some(checksum::crc32c(data)),
            version: 0,
            sent: None,
            beneath: None,
            touched: 0,
            copy: None,
        })
    }

    /// Whether `range` can be written without filling a gap first.
    fn gap_before(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.start > self.local.end {
            Some(self.local.end..range.start)
        } else if range.end < self.local.start {
            Some(range.end..self.local.start)
        } else {
            None
        }
    }

    /// Writes `data` at `at`; `size` is the size of the whole chunk.
    pub fn write(&mut self, room: &Room, at: u64, data: &[u8], size: u64) -> Result<(), Refusal> {
        let range = at..at + data.len() as u64;
        if let Some(gap) = self.gap_before(&range) {
            return Err(Refusal::Gap(gap));
        }
        match &mut self.data {
            Data::GivenUp => return Err(Refusal::GivenUp),
            Data::Spilled(file) => {
                if !file.grow(range.end.max(self.local.end)) {
                    return Err(Refusal::Room);
                }
                if let Err(error) = file.write(data, at) {
                    // Some of it may be there: the run is no longer what was summed up, or sent.
                    self.crc32c = None;
                    self.sent = None;
                    return Err(Refusal::Error(error));
                }
            }
            Data::Memory(buffer) => Buffer::write(buffer, room, at, data, size)?,
        }
        self.crc32c = match self.crc32c {
            Some(crc) if at == self.local.end => Some(checksum::crc32c_update(crc, data)),
            _ => None,
        };
        self.local = self.local.start.min(range.start)..self.local.end.max(range.end);
        Ok(())
    }

    /// Cuts the run off at `end`.
    pub fn truncate(&mut self, end: u64) {
        if end >= self.local.end {
            return;
        }
        self.local.end = end.max(self.local.start);
        self.crc32c = None;
        if let Data::Memory(buffer) = &mut self.data
            && let Some(buffer) = Arc::get_mut(buffer)
        {
            let length = (self.local.end - buffer.origin) as usize;
            buffer.bytes.truncate(length);
            buffer.shrink_reservation(round_up(length) as u64);
        }
    }

    /// Copies `range`, which must lie inside the run.
    pub fn read(&self, range: Range<u64>) -> Result<Bytes, Refusal> {
        debug_assert!(self.local.start <= range.start && range.end <= self.local.end);
        match &self.data {
            Data::GivenUp => Err(Refusal::GivenUp),
            Data::Memory(buffer) => Ok(Bytes::copy_from_slice(
                &buffer.bytes[buffer.positions(&range)],
            )),
            Data::Spilled(file) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                file.read(&mut bytes, range.start).map_err(Refusal::Error)?;
                Ok(bytes.into())
            }
        }
    }

    /// The run's bytes without a copy, when they are in memory.
    pub fn share(&self) -> Option<Bytes> {
        let Data::Memory(buffer) = &self.data else {
            return None;
        };
        let range = buffer.positions(&self.local);
        Some(Bytes::from_owner(Shared {
            buffer: Arc::clone(buffer),
            range,
        }))
    }

    /// The file that holds the run as it is now.
    pub fn on_disk(&self) -> Option<&Arc<SpillFile>> {
        match &self.data {
            Data::Spilled(file) => Some(file),
            Data::GivenUp => None,
            Data::Memory(_) => self
                .copy
                .as_ref()
                .filter(|copy| copy.version == self.version && copy.local == self.local)
                .map(|copy| &copy.file),
        }
    }

    /// The files that hold the run, as it is or as it was once.
    pub fn files(&self) -> impl Iterator<Item = &Arc<SpillFile>> {
        let data = match &self.data {
            Data::Spilled(file) => Some(file),
            Data::Memory(_) | Data::GivenUp => None,
        };
        data.into_iter()
            .chain(self.copy.as_ref().map(|copy| &copy.file))
    }

    /// Bytes of memory held.
    pub fn memory(&self) -> u64 {
        match &self.data {
            Data::Memory(buffer) => buffer.reserved(),
            Data::Spilled(_) | Data::GivenUp => 0,
        }
    }

    /// Whether the store holds this very version as a part of `size` bytes.
    pub fn is_sent(&self, size: u64) -> bool {
        self.sent
            .as_ref()
            .is_some_and(|sent| sent.version == self.version && sent.receipt.size == size)
    }
}

impl Buffer {
    fn positions(&self, range: &Range<u64>) -> Range<usize> {
        (range.start - self.origin) as usize..(range.end - self.origin) as usize
    }

    fn write(
        this: &mut Arc<Self>,
        room: &Room,
        at: u64,
        data: &[u8],
        size: u64,
    ) -> Result<(), Refusal> {
        let end = at + data.len() as u64;
        let origin = this.origin.min(at);
        let length = (end.max(this.origin + this.bytes.len() as u64) - origin) as usize;
        let shared = Arc::get_mut(this).is_none();
        let too_small = length > this.bytes.capacity();
        if shared || too_small || origin < this.origin {
            // Somebody sends or reads the old bytes, or the run outgrows them: a new buffer.
            let mut larger = Self::with_room(room, length, origin, size).ok_or(Refusal::Room)?;
            larger.bytes.resize((this.origin - origin) as usize, 0);
            larger.bytes.extend_from_slice(&this.bytes);
            *this = Arc::new(larger);
        }
        let Some(buffer) = Arc::get_mut(this) else {
            return Err(Refusal::Room);
        };
        let reserved = round_up(length) as u64;
        if reserved > buffer.reserved() {
            let more = room
                .budget
                .try_reserve(Class::Write, reserved - buffer.reserved());
            let more = more.ok_or(Refusal::Room)?;
            match &mut buffer.reservation {
                Some(reservation) => reservation.merge(more),
                none => *none = Some(more),
            }
        }
        buffer.put((at - buffer.origin) as usize, data);
        Ok(())
    }

    /// An empty buffer with room for `length` bytes from `origin` on, in a chunk of `size` bytes.
    fn with_room(room: &Room, length: usize, origin: u64, size: u64) -> Option<Self> {
        let whole = (size - origin) as usize;
        let capacity = capacity(length, whole);
        let reserved = round_up(length) as u64;
        let fresh = |reservation| (Vec::with_capacity(capacity), reservation);
        // A little is not got by giving up a kept buffer: that one is taken.
        let (bytes, reservation) = room
            .pool
            .take(capacity)
            .or_else(|| Some(fresh(room.budget.try_reserve_free(Class::Write, reserved)?)))
            .or_else(|| room.pool.take(whole))
            .or_else(|| Some(fresh(room.budget.try_reserve(Class::Write, reserved)?)))?;
        Some(Self {
            bytes,
            origin,
            reservation: Some(reservation),
            pool: Arc::clone(&room.pool),
        })
    }

    fn reserved(&self) -> u64 {
        self.reservation.as_ref().map_or(0, Reservation::bytes)
    }

    /// Gives back what is reserved beyond `bytes`, where the pages behind it may be given back too.
    fn shrink_reservation(&mut self, bytes: u64) {
        self.bytes.shrink_to(bytes as usize);
        if let Some(reservation) = &mut self.reservation {
            reservation.shrink_to(bytes);
        }
    }

    fn put(&mut self, position: usize, data: &[u8]) {
        let overlap = self.bytes.len().saturating_sub(position).min(data.len());
        let (over, beyond) = data.split_at(overlap);
        self.bytes[position..position + overlap].copy_from_slice(over);
        self.bytes.extend_from_slice(beyond);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(reservation) = self.reservation.take() {
            self.pool.put(std::mem::take(&mut self.bytes), reservation);
        }
    }
}

fn round_up(length: usize) -> usize {
    length.div_ceil(STEP) * STEP
}

fn capacity(length: usize, limit: usize) -> usize {
    if length >= FULL_SIZE_FROM {
        return limit.max(length);
    }
    length
        .next_power_of_two()
        .clamp(STEP, limit.max(STEP))
        .max(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1 << 20;

    fn room(limit: usize) -> Room {
        let budget = Budget::plain(limit as u64);
        let pool = Pool::new(Arc::clone(&budget), SIZE);
        Room { budget, pool }
    }

    #[test]
    fn a_little_is_not_got_by_giving_up_a_kept_buffer() {
        let room = room(SIZE);
        drop(Chunk::new(&room, 0, &vec![1; SIZE], SIZE as u64, false).unwrap());
        let kept = room.budget.used();
        assert_eq!(kept, SIZE as u64);
        let chunk = Chunk::new(&room, 0, b"little", SIZE as u64, false).unwrap();
        assert_eq!((chunk.memory(), room.budget.used()), (kept, kept));
        assert_eq!(chunk.read(0..6).unwrap(), &b"little"[..]);
    }

    #[test]
    fn what_will_fill_its_chunk_has_all_of_its_memory_from_the_beginning_or_waits() {
        let room = room(SIZE + SIZE / 2);
        let first = Chunk::new(&room, 0, b"begun", SIZE as u64, true).unwrap();
        assert_eq!(first.memory(), SIZE as u64);
        assert!(Chunk::new(&room, 0, b"begun", SIZE as u64, true).is_none());
        assert!(Chunk::new(&room, 0, b"begun", SIZE as u64, false).is_some());
    }
}
