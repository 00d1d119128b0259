//! Which bytes of a file are which part.
//!
//! Stores take at most 10 000 parts. Parts are uniform while a file is small; every 2 000 parts
//! the size doubles, so that a file whose size nobody announced can grow to 62 000 times the
//! part size (about 1 TiB at 16 MiB) without a part ever being cut anew. A size announced by
//! `ftruncate` before the first byte raises the part size up front instead.

use std::ops::Range;

/// S3's limit, and the highest part number.
pub const MAXIMUM_PARTS: u64 = 10_000;

/// Parts of one size before the size doubles.
const PARTS_PER_STEP: u64 = 2_000;
const STEPS: u64 = MAXIMUM_PARTS / PARTS_PER_STEP;

/// The cut of a file into chunks; chunk `index` travels as part `index + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the first chunks.
    first: u64,
}

impl Geometry {
    /// Chunks of `part_size` bytes, or larger ones if `announced` bytes would not fit 10 000 of
    /// the uniform size.
    pub fn new(part_size: u64, announced: u64) -> Self {
        let mut first = part_size.max(1);
        while announced.div_ceil(first) > MAXIMUM_PARTS {
            first *= 2;
        }
        Self { first }
    }

    /// A cut that was made before, by the size of its first chunks.
    pub fn of_first(first: u64) -> Self {
        Self {
            first: first.max(1),
        }
    }

    /// Bytes of the first chunks.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The largest file, bytes.
    pub fn capacity(&self) -> u64 {
        (0..STEPS)
            .map(|step| PARTS_PER_STEP * (self.first << step))
            .sum()
    }

    /// The chunk that holds byte `offset`, which must be below [`Self::capacity`].
    pub fn index(&self, offset: u64) -> u32 {
        let mut start = 0;
        for step in 0..STEPS {
            let size = self.first << step;
            let span = PARTS_PER_STEP * size;
            if offset < start + span || step + 1 == STEPS {
                return (step * PARTS_PER_STEP + (offset - start) / size) as u32;
            }
            start += span;
        }
        unreachable!("the last step answers")
    }

    /// The bytes of chunk `index`.
    pub fn range(&self, index: u32) -> Range<u64> {
        let index = u64::from(index);
        let mut start = 0;
        for step in 0..STEPS {
            let size = self.first << step;
            if index < (step + 1) * PARTS_PER_STEP || step + 1 == STEPS {
                let begin = start + (index - step * PARTS_PER_STEP) * size;
                return begin..begin + size;
            }
            start += PARTS_PER_STEP * size;
        }
        unreachable!("the last step answers")
    }

    /// The chunks of a file of `size` bytes.
    pub fn chunks(&self, size: u64) -> Range<u32> {
        if size == 0 {
            0..0
        } else {
            0..self.index(size - 1) + 1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_belongs_to_the_chunk_whose_range_holds_it() {
        let geometry = Geometry::new(16, 0);
        for index in [0, 1, 1_999, 2_000, 2_001, 3_999, 4_000, 9_999] {
            let range = geometry.range(index);
            assert_eq!(geometry.index(range.start), index);
            assert_eq!(geometry.index(range.end - 1), index);
            if index < 9_999 {
                assert_eq!(geometry.range(index + 1).start, range.end);
            }
        }
        assert_eq!(geometry.range(9_999).end, geometry.capacity());
        assert_eq!(geometry.capacity(), 62_000 * 16);
    }

    #[test]
    fn two_hundred_gibibytes_fit_ten_thousand_parts_announced_or_not() {
        let size = 200 << 30;
        let part = 16 << 20;
        let announced = Geometry::new(part, size);
        assert!(u64::from(announced.chunks(size).end) <= MAXIMUM_PARTS);
        let grown = Geometry::new(part, 0);
        assert!(grown.capacity() > size);
        assert!(u64::from(grown.chunks(size).end) <= MAXIMUM_PARTS);
    }
}
