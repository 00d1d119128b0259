//! Format plans: where the tensors of a file lie, so that running ahead stays inside one.

mod safetensors;

use std::ops::Range;

pub use safetensors::safetensors;

/// What is known of a file's layout after reading some of its start.
#[derive(Debug)]
pub enum Plan {
    /// The index needs this many bytes of the start.
    NeedPrefix(u64),
    Ready(Extents),
    /// Not of this format, or hostile; why.
    Unsuitable(&'static str),
}

/// Byte ranges that are read as a whole: sorted, not overlapping, within the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Extents {
    ranges: Vec<Range<u64>>,
}

impl Extents {
    /// The ranges, if none is empty, beyond `size`, or overlaps another.
    fn new(mut ranges: Vec<Range<u64>>, size: u64) -> Option<Self> {
        ranges.retain(|range| range.start != range.end);
        ranges.sort_by_key(|range| range.start);
        let ordered = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let inside = ranges
            .iter()
            .all(|range| range.start < range.end && range.end <= size);
        (ordered && inside).then_some(Self { ranges })
    }

    /// The extent that holds byte `offset`.
    pub fn containing(&self, offset: u64) -> Option<Range<u64>> {
        let after = self.ranges.partition_point(|range| range.start <= offset);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        range.contains(&offset).then(|| range.clone())
    }

    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}
