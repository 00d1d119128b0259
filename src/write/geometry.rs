//! Which bytes of a file are which part.
//!
//! Stores take at most 10 000 parts. Parts are uniform while a file is small; every 2 000 parts
//! the size doubles, so that a file whose size nobody announced can grow to 62 000 times the
//! part size (about 1 TiB at 16 MiB) without a part ever being cut anew. A size announced by
//! `ftruncate` before the first byte raises the part size up front instead.
//!
//! A file over an object that is stored already has a cut where the object ends: files that grow
//! by open, append, close send what was appended, and not the part before it again.

use std::ops::Range;

/// S3's limit, and the highest part number.
pub const MAXIMUM_PARTS: u64 = 10_000;

/// Parts of one size before the size doubles.
const PARTS_PER_STEP: u64 = 2_000;
const STEPS: u64 = MAXIMUM_PARTS / PARTS_PER_STEP;

/// S3's smallest part but for the last, bytes. A part before a joint is longer than its neighbours
/// by less than this.
pub const SMALLEST_PART: u64 = 5 << 20;

/// The cut of a file into chunks; chunk `index` travels as part `index + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the first chunks.
    first: u64,
    /// A cut at the end of the object underneath, where that is no uniform cut: 0 for none.
    joint: u64,
}

impl Geometry {
    /// Chunks of `part_size` bytes, or larger ones if `announced` bytes would not fit 10 000 of
    /// the uniform size.
    pub fn new(part_size: u64, announced: u64) -> Self {
        let mut first = part_size.max(1);
        while announced.div_ceil(first) > MAXIMUM_PARTS {
            first *= 2;
        }
        Self { first, joint: 0 }
    }

    /// The cut of a file that lies over an object of `base` bytes: one cut is where that ends, so
    /// that what is appended travels alone.
    pub fn over(part_size: u64, base: u64) -> Self {
        let Self { first, .. } = Self::new(part_size, base);
        let joint = if base < first { 0 } else { base };
        Self { first, joint }
    }

    /// A cut that was made before, by its [`Self::first`] and [`Self::joint`].
    pub fn of(first: u64, joint: u64) -> Self {
        Self {
            first: first.max(1),
            joint,
        }
    }

    /// Bytes of the first chunks.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Where the object underneath ends, if that is a cut of its own; else 0.
    pub fn joint(&self) -> u64 {
        self.joint
    }

    /// The chunk that ends at the joint. It is as long as a store takes: what is less than the
    /// smallest part is added to the chunk before it.
    fn last_before_joint(&self) -> u64 {
        let index = self.uniform_index(self.joint);
        let rest = self.joint - self.uniform_range(index).start;
        if rest < SMALLEST_PART {
            index - 1
        } else {
            index
        }
    }

    /// The largest file, bytes.
    pub fn capacity(&self) -> u64 {
        let uniform = (0..STEPS)
            .map(|step| PARTS_PER_STEP * (self.first << step))
            .sum();
        if self.joint == 0 {
            return uniform;
        }
        uniform - self.uniform_range(self.last_before_joint()).end + self.joint
    }

    /// The chunk that holds byte `offset`, which must be below [`Self::capacity`].
    pub fn index(&self, offset: u64) -> u32 {
        if self.joint == 0 {
            return self.uniform_index(offset) as u32;
        }
        let last = self.last_before_joint();
        let index = if offset >= self.joint {
            self.uniform_index(offset - self.joint + self.uniform_range(last).end)
        } else {
            self.uniform_index(offset).min(last)
        };
        index as u32
    }

    /// The bytes of chunk `index`.
    pub fn range(&self, index: u32) -> Range<u64> {
        let range = self.uniform_range(u64::from(index));
        if self.joint == 0 {
            return range;
        }
        let last = self.last_before_joint();
        if u64::from(index) < last {
            return range;
        }
        if u64::from(index) == last {
            return range.start..self.joint;
        }
        let end = self.uniform_range(last).end;
        range.start - end + self.joint..range.end - end + self.joint
    }

    fn uniform_index(&self, offset: u64) -> u64 {
        let mut start = 0;
        for step in 0..STEPS {
            let size = self.first << step;
            let span = PARTS_PER_STEP * size;
            if offset < start + span || step + 1 == STEPS {
                return step * PARTS_PER_STEP + (offset - start) / size;
            }
            start += span;
        }
        unreachable!("the last step answers")
    }

    fn uniform_range(&self, index: u64) -> Range<u64> {
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

    #[test]
    fn what_is_appended_to_an_object_begins_a_part_and_every_other_part_is_long_enough() {
        let part = 16 << 20;
        for base in [
            part,
            part + 9,
            part + SMALLEST_PART,
            5 * part - 1,
            2_003 * part + 9,
        ] {
            let geometry = Geometry::over(part, base);
            let own = geometry.index(base);
            assert_eq!(geometry.range(own).start, base);
            for index in 0..own + 2 {
                let range = geometry.range(index);
                assert!(range.end - range.start >= SMALLEST_PART);
                assert!(range.end - range.start < 2 * part + SMALLEST_PART);
                assert_eq!(geometry.index(range.start), index);
                assert_eq!(geometry.index(range.end - 1), index);
                assert_eq!(geometry.range(index + 1).start, range.end);
            }
            assert_eq!(geometry.range(9_999).end, geometry.capacity());
        }
        assert_eq!(Geometry::over(part, part - 1), Geometry::new(part, 0));
    }
}
