//! Format plans: where the tensors and members of a file lie, so that running ahead stays inside
//! one.
//!
//! A plan is made from bytes that the reader asked for anyway; none is fetched for it. A file that
//! is not what its name says, or is hostile, has no plan, and is read like any other.

mod bytes;
mod gguf;
mod safetensors;
mod zip;

use std::ops::Range;

pub use gguf::gguf;
pub use safetensors::safetensors;
pub use zip::zip;

/// A file's index longer than this is not worth holding, bytes. (A thousand tensors take about
/// 100 KB; a vocabulary in a GGUF file a few MB.)
const LONGEST_INDEX: u64 = 16 << 20;

/// Bytes at the beginning of a member that loaders look at without reading on: a buffer of the C
/// library, and the pages around it.
const HEADER: u64 = 16 << 10;

/// How a file tells what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Gguf,
    /// What torch, numpy, Keras and skops save.
    Zip,
}

/// What is known of a file's layout after reading some of it.
#[derive(Debug)]
pub enum Plan {
    /// The index needs these bytes of the file.
    Need(Range<u64>),
    Ready(Extents),
    /// Not of this format, or hostile; why.
    Unsuitable(&'static str),
}

/// Byte ranges that are read as a whole: sorted, not overlapping, within the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Extents {
    ranges: Vec<Range<u64>>,
    looked_through: bool,
}

impl Format {
    /// The format that a file of this name has, if it keeps its promise.
    pub fn of_name(name: &str) -> Option<Self> {
        let (_, extension) = name.rsplit_once('.')?;
        match extension.to_ascii_lowercase().as_str() {
            "safetensors" => Some(Self::Safetensors),
            "gguf" => Some(Self::Gguf),
            "pt" | "pth" | "bin" | "ckpt" | "npz" | "keras" | "skops" | "zip" => Some(Self::Zip),
            _ => None,
        }
    }

    /// What of a file of `size` bytes has to be there first.
    pub fn first(self, size: u64) -> Range<u64> {
        match self {
            Self::Safetensors => 0..size.min(safetensors::LENGTH as u64),
            Self::Gguf => 0..size.min(gguf::FIRST),
            Self::Zip => size.saturating_sub(zip::END)..size,
        }
    }

    /// The layout of a file of `size` bytes that has `bytes` at `start`: what was needed.
    pub fn plan(self, size: u64, start: u64, bytes: &[u8]) -> Plan {
        match self {
            Self::Safetensors => safetensors(size, bytes),
            Self::Gguf => gguf(size, bytes),
            Self::Zip => zip(size, start, bytes),
        }
    }

    /// Whether a read that ends in `extent` only looks at how that begins, and is no reason to
    /// read on.
    pub fn looks(self, read: &Range<u64>, extent: &Range<u64>) -> bool {
        match self {
            Self::Safetensors | Self::Gguf => false,
            Self::Zip => read.end <= extent.start + HEADER && read.end - read.start <= HEADER,
        }
    }
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
        (ordered && inside).then_some(Self {
            ranges,
            looked_through: false,
        })
    }

    /// Whether who looks at how one of them begins looks at all of them, one after the other.
    pub fn looked_through(&self) -> bool {
        self.looked_through
    }

    /// The extent that holds byte `offset`.
    pub fn containing(&self, offset: u64) -> Option<Range<u64>> {
        let after = self.ranges.partition_point(|range| range.start <= offset);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        range.contains(&offset).then(|| range.clone())
    }

    /// What lies between an extent and the one before it, or the file's beginning.
    pub fn gap_before(&self, extent: &Range<u64>) -> Range<u64> {
        let before = self
            .ranges
            .partition_point(|range| range.start < extent.start);
        let before = before.checked_sub(1).and_then(|at| self.ranges.get(at));
        before.map_or(0, |before| before.end)..extent.start
    }

    /// Those that begin behind byte `offset`, in order.
    pub fn after(&self, offset: u64) -> impl Iterator<Item = &Range<u64>> {
        let after = self.ranges.partition_point(|range| range.start <= offset);
        self.ranges.iter().skip(after)
    }

    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}
