//! Takes a file of arbitrary bytes through a format's plan, just as a reader of it would, and holds
//! the plan to what the reader relies on.
//!
//! The parsers are the product's own source, without the rest of it, which would take minutes to
//! build and has no part in this.

mod memory;

/// Only the part of the room that needs nothing else.
#[path = "../../src/read"]
pub mod read {
    pub mod plan;
}

use std::ops::Range;

use read::plan::{Extents, Format, Plan};

/// The number at an input's end: how much larger the store says the file is than what is held of
/// it.
const CLAIM: usize = 8;
/// Times that a plan may ask for more.
const MOST_ROUNDS: usize = 16;
/// Most bytes that a plan may ask for.
const LONGEST_REQUEST: u64 = (16 << 20) + 8;
/// Where a file is not held it is zeros. A reader that would need more of them has not read that far.
const MOST_ZEROS: u64 = 64 << 10;
/// Memory that a plan may take: for each byte that it was given, and besides.
const MEMORY_PER_BYTE: usize = 4;
const MEMORY_BESIDES: usize = 16 << 10;

/// A file of which some is held: its beginning, or, of a container, its end.
struct File<'a> {
    held: &'a [u8],
    /// Where that is in the file.
    place: Range<u64>,
    size: u64,
}

impl<'a> File<'a> {
    fn new(format: Format, input: &'a [u8]) -> Self {
        let (held, beyond) = match input.split_last_chunk::<CLAIM>() {
            Some((held, beyond)) => (held, u64::from_le_bytes(*beyond)),
            None => (input, 0),
        };
        let length = held.len() as u64;
        let size = length.saturating_add(beyond);
        let place = match format {
            Format::Zip => size - length..size,
            Format::Safetensors | Format::Gguf => 0..length,
        };
        Self { held, place, size }
    }

    /// The bytes of `range`; `None` where a reader has not been.
    fn bytes(&self, range: &Range<u64>) -> Option<Vec<u8>> {
        let from = range.start.max(self.place.start).min(range.end);
        let to = range.end.min(self.place.end).max(from);
        let length = range.end - range.start;
        if length - (to - from) > MOST_ZEROS {
            return None;
        }
        let mut bytes = vec![0; length as usize];
        if from < to {
            let held = (from - self.place.start) as usize..(to - self.place.start) as usize;
            let at = (from - range.start) as usize..(to - range.start) as usize;
            bytes[at].copy_from_slice(&self.held[held]);
        }
        Some(bytes)
    }
}

/// Gives the plan what it asks for until it is ready or gives up.
///
/// # Panics
/// When the plan does what its reader does not expect.
pub fn check(format: Format, input: &[u8]) {
    let file = File::new(format, input);
    let mut needed = format.first(file.size);
    assert!(needed.start <= needed.end && needed.end <= file.size);
    for _ in 0..MOST_ROUNDS {
        let Some(bytes) = file.bytes(&needed) else {
            return;
        };
        let (plan, most) = memory::most(|| format.plan(file.size, needed.start, &bytes));
        let allowed = bytes.len() * MEMORY_PER_BYTE + MEMORY_BESIDES;
        assert!(most <= allowed, "{most} bytes to plan {}", bytes.len());
        match plan {
            Plan::Need(more) => {
                assert!(more.end <= file.size, "{more:?} of {}", file.size);
                assert!(more.start <= needed.start && needed.end <= more.end);
                let length = more.end - more.start;
                assert!(length > needed.end - needed.start, "{needed:?}, {more:?}");
                assert!(length <= LONGEST_REQUEST, "{more:?}");
                needed = more;
            }
            Plan::Ready(extents) => return check_extents(format, &extents, file.size, bytes.len()),
            Plan::Unsuitable(_) => return,
        }
    }
    panic!("asks for more and more");
}

fn check_extents(format: Format, extents: &Extents, size: u64, given: usize) {
    let first = extents.containing(0);
    let listed: Vec<&Range<u64>> = first.iter().chain(extents.after(0)).collect();
    assert_eq!(listed.len(), extents.len());
    assert_eq!(listed.is_empty(), extents.is_empty());
    assert!(listed.len() <= given, "more tensors than bytes that tell");
    for extent in &listed {
        assert!(extent.start < extent.end && extent.end <= size);
        assert_eq!(extents.containing(extent.start).as_ref(), Some(*extent));
        assert_eq!(extents.containing(extent.end - 1).as_ref(), Some(*extent));
        for length in [1, 4096, 1 << 20] {
            let read = extent.start..extent.start.saturating_add(length).min(size);
            let _ = format.looks(&read, extent);
        }
    }
    assert!(listed.windows(2).all(|pair| pair[0].end <= pair[1].start));
    for offset in [size, u64::MAX] {
        assert_eq!(extents.containing(offset), None);
        assert_eq!(extents.after(offset).count(), 0);
    }
}
