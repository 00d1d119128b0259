//! GGUF: key-value metadata, then where each tensor is, then the tensors.
//!
//! Source: the format's specification (versions 2 and 3, little-endian). Where the index ends is
//! known only when it has been walked; it is asked for in ever longer pieces.

use std::ops::Range;

use super::bytes::Bytes;
use super::{Extents, LONGEST_INDEX, Plan};

/// Bytes asked for first: as much as the block that holds the magic.
pub(super) const FIRST: u64 = 32 << 10;
const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
/// Where nothing says otherwise tensors begin at multiples of this, bytes.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &[u8] = b"general.alignment";
/// Types of metadata values.
const UINT32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// Arrays of arrays deeper than this are nobody's.
const DEEPEST: u32 = 4;
const MOST_DIMENSIONS: u32 = 8;

/// Why a walk ended early.
enum Stop {
    /// There may be more of it further on.
    Short,
    Unsuitable(&'static str),
}

/// The layout of a file of `size` bytes that starts with `prefix`.
pub fn gguf(size: u64, prefix: &[u8]) -> Plan {
    match walk(size, prefix) {
        Ok(extents) => Plan::Ready(extents),
        Err(Stop::Unsuitable(why)) => Plan::Unsuitable(why),
        Err(Stop::Short) => {
            let length = prefix.len() as u64;
            let more = (length * 2).max(FIRST).min(size);
            if more <= length || more > LONGEST_INDEX {
                return Plan::Unsuitable("the index is beyond the file or the limit");
            }
            Plan::Need(0..more)
        }
    }
}

fn walk(size: u64, prefix: &[u8]) -> Result<Extents, Stop> {
    let mut bytes = Bytes::new(prefix);
    if bytes.u32().ok_or(Stop::Short)? != MAGIC {
        return Err(Stop::Unsuitable("no GGUF magic"));
    }
    if !(2..=3).contains(&bytes.u32().ok_or(Stop::Short)?) {
        return Err(Stop::Unsuitable("a version that is not known"));
    }
    let tensors = bytes.u64().ok_or(Stop::Short)?;
    let entries = bytes.u64().ok_or(Stop::Short)?;
    let mut alignment = ALIGNMENT;
    for _ in 0..entries {
        let key = string(&mut bytes)?;
        let kind = bytes.u32().ok_or(Stop::Short)?;
        let mut ahead = bytes;
        skip(&mut bytes, kind, 0)?;
        if key == ALIGNMENT_KEY && kind == UINT32 {
            alignment = ahead.u32().ok_or(Stop::Short)?.into();
        }
    }
    let mut offsets = Vec::new();
    for _ in 0..tensors {
        string(&mut bytes)?;
        let dimensions = bytes.u32().ok_or(Stop::Short)?;
        if dimensions > MOST_DIMENSIONS {
            return Err(Stop::Unsuitable("a tensor of too many dimensions"));
        }
        take(&mut bytes, u64::from(dimensions) * 8)?;
        bytes.u32().ok_or(Stop::Short)?;
        offsets.push(bytes.u64().ok_or(Stop::Short)?);
    }
    if alignment == 0 {
        return Err(Stop::Unsuitable("no alignment"));
    }
    let index = (prefix.len() - bytes.left()) as u64;
    let start = index.next_multiple_of(alignment);
    extents(start, offsets, size).ok_or(Stop::Unsuitable("tensors lie beyond the file"))
}

/// Each tensor ends where the next one begins.
fn extents(start: u64, mut offsets: Vec<u64>, size: u64) -> Option<Extents> {
    offsets.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(offsets.len());
    for (position, offset) in offsets.iter().enumerate() {
        let end = match offsets.get(position + 1) {
            Some(next) => start.checked_add(*next)?,
            None => size,
        };
        ranges.push(start.checked_add(*offset)?..end);
    }
    Extents::new(ranges, size)
}

fn take<'a>(bytes: &mut Bytes<'a>, count: u64) -> Result<&'a [u8], Stop> {
    if count > LONGEST_INDEX {
        return Err(Stop::Unsuitable("a value beyond the limit"));
    }
    bytes.take(count).ok_or(Stop::Short)
}

fn string<'a>(bytes: &mut Bytes<'a>) -> Result<&'a [u8], Stop> {
    let length = bytes.u64().ok_or(Stop::Short)?;
    take(bytes, length)
}

/// Bytes of a value of a type that has a size of its own.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn skip(bytes: &mut Bytes<'_>, kind: u32, depth: u32) -> Result<(), Stop> {
    match kind {
        STRING => {
            string(bytes)?;
        }
        ARRAY if depth < DEEPEST => {
            let kind = bytes.u32().ok_or(Stop::Short)?;
            let count = bytes.u64().ok_or(Stop::Short)?;
            match width(kind) {
                Some(width) => {
                    take(bytes, count.saturating_mul(width))?;
                }
                // Each takes some bytes: a count beyond them ends with `Short`.
                None => {
                    for _ in 0..count {
                        skip(bytes, kind, depth + 1)?;
                    }
                }
            }
        }
        other => {
            let width = width(other).ok_or(Stop::Unsuitable("a value of no known type"))?;
            take(bytes, width)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    /// A file's index: some metadata, and tensors at `offsets`.
    fn index(alignment: u32, words: u64, offsets: &[u64]) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((offsets.len() as u64).to_le_bytes());
        bytes.extend(3u64.to_le_bytes());
        bytes.extend(text("general.architecture"));
        bytes.extend(STRING.to_le_bytes());
        bytes.extend(text("llama"));
        bytes.extend(text("general.alignment"));
        bytes.extend(UINT32.to_le_bytes());
        bytes.extend(alignment.to_le_bytes());
        bytes.extend(text("tokenizer.ggml.tokens"));
        bytes.extend(ARRAY.to_le_bytes());
        bytes.extend(STRING.to_le_bytes());
        bytes.extend(words.to_le_bytes());
        for word in 0..words {
            bytes.extend(text(&format!("word {word}")));
        }
        for (number, offset) in offsets.iter().enumerate() {
            bytes.extend(text(&format!("blk.{number}.weight")));
            bytes.extend(2u32.to_le_bytes());
            bytes.extend([4u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
            bytes.extend(0u32.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_tensor_ends_where_the_next_begins_and_the_last_with_the_file() {
        let bytes = index(64, 3, &[128, 0, 640]);
        let start = (bytes.len() as u64).next_multiple_of(64);
        let size = start + 1000;
        let Plan::Ready(extents) = gguf(size, &bytes) else {
            panic!("no plan")
        };
        assert_eq!(extents.len(), 3);
        assert_eq!(extents.containing(start), Some(start..start + 128));
        assert_eq!(
            extents.containing(start + 639),
            Some(start + 128..start + 640)
        );
        assert_eq!(extents.containing(start + 999), Some(start + 640..size));
        assert_eq!(extents.containing(start - 1), None);
    }

    #[test]
    fn a_long_index_is_asked_for_in_ever_longer_pieces() {
        let bytes = index(32, 20_000, &[0, 64]);
        let size = bytes.len() as u64 + 4096;
        let mut needed = FIRST;
        let mut asked = 0;
        loop {
            let prefix = &bytes[..bytes.len().min(needed as usize)];
            match gguf(size, prefix) {
                Plan::Need(more) => {
                    assert!(more.start == 0 && more.end > needed);
                    needed = more.end;
                    asked += 1;
                }
                Plan::Ready(extents) => break assert_eq!(extents.len(), 2),
                Plan::Unsuitable(why) => panic!("{why}"),
            }
        }
        assert!(asked < 8);
    }

    #[test]
    fn a_hostile_index_is_no_plan() {
        let far = index(32, 1, &[0, 1 << 40]);
        let nothing = index(0, 1, &[0]);
        let mut endless = index(32, 1, &[0]);
        endless[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        for bytes in [&far, &nothing, &endless, &b"GGUFnonsense"[..].to_vec()] {
            let plan = gguf(bytes.len() as u64 + 64, bytes);
            let gives_up = match plan {
                Plan::Unsuitable(_) => true,
                // It asks for more until there is no more.
                Plan::Need(more) => more.end <= bytes.len() as u64 + 64,
                Plan::Ready(_) => false,
            };
            assert!(gives_up);
        }
        let mut whole = endless.clone();
        whole.resize(endless.len() + 64, 0);
        assert!(matches!(
            gguf(whole.len() as u64, &whole),
            Plan::Unsuitable(_)
        ));
    }

    proptest! {
        #[test]
        fn a_damaged_index_never_panics(
            words in 0u64..20,
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
            size in any::<u64>(),
        ) {
            let mut bytes = index(32, words, &[0, 64, 4096]);
            for (place, value) in damage {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            let size = size.max(bytes.len() as u64);
            if let Plan::Need(more) = gguf(size, &bytes) {
                prop_assert!(more.end > bytes.len() as u64 && more.end <= size);
            }
        }
    }
}
