//! Zip containers: members, each behind a header of its own, and a directory of them at the end.
//!
//! Source: PKWARE's APPNOTE. The directory is found from the end: the end record, before it the
//! locator of the zip64 end record if numbers do not fit, before that the record itself. Files
//! with a comment behind the end record have no plan: none of the savers writes one.

use std::ops::Range;

use super::bytes::Bytes;
use super::{Extents, LONGEST_INDEX, Plan};

/// Bytes of the end record.
pub(super) const END: u64 = 22;
const LOCATOR: u64 = 20;
/// Bytes of a zip64 end record, as long as nobody extends it.
const END64: u64 = 56;
/// Bytes of a member's own header before its name.
const HEADER: u64 = 30;
/// What may stand between a member's name and its data, and behind the data, bytes.
const MOST_PADDING: u64 = u16::MAX as u64;
const DESCRIPTOR: u64 = 24;

const END_SIGNATURE: u32 = 0x0605_4b50;
const LOCATOR_SIGNATURE: u32 = 0x0706_4b50;
const END64_SIGNATURE: u32 = 0x0606_4b50;
const ENTRY_SIGNATURE: u32 = 0x0201_4b50;
/// Extra field with the numbers that do not fit.
const EXTRA64: u16 = 1;

/// Where the directory is.
struct Directory {
    range: Range<u64>,
    entries: u64,
}

/// How the name of the first member ends in what torch saves, which it looks through before it reads
/// a tensor.
const OF_TORCH: &[u8] = b"/data.pkl";

/// A member, as the directory tells it.
struct Member {
    /// Of its own header, bytes from the file's start.
    header: u64,
    /// Of the header without padding, and the data.
    least: u64,
    of_torch: bool,
}

/// The layout of a file of `size` bytes that ends with `bytes`, which begin at `start`.
pub fn zip(size: u64, start: u64, bytes: &[u8]) -> Plan {
    let directory = match directory(size, start, bytes) {
        Ok(directory) => directory,
        Err(plan) => return plan,
    };
    let range = directory.range;
    if range.start > range.end || range.end > size || size - range.start > LONGEST_INDEX {
        return Plan::Unsuitable("the directory is beyond the file or the limit");
    }
    if range.start < start {
        return Plan::Need(range.start..size);
    }
    let listed = slice(bytes, start, &range);
    let members = listed.and_then(|bytes| members(bytes, directory.entries));
    match members.and_then(|members| extents(members, range.start)) {
        Some(extents) => Plan::Ready(extents),
        None => Plan::Unsuitable("the directory is damaged"),
    }
}

fn slice<'a>(bytes: &'a [u8], start: u64, range: &Range<u64>) -> Option<&'a [u8]> {
    let from = usize::try_from(range.start.checked_sub(start)?).ok()?;
    let to = usize::try_from(range.end.checked_sub(start)?).ok()?;
    bytes.get(from..to)
}

fn directory(size: u64, start: u64, bytes: &[u8]) -> Result<Directory, Plan> {
    let no_end = Plan::Unsuitable("no end record");
    if size < END {
        return Err(no_end);
    }
    let end = size - END;
    let Some(record) = slice(bytes, start, &(end..size)) else {
        return Err(Plan::Need(end..size));
    };
    let Some(found) = end_record(record) else {
        return Err(no_end);
    };
    let saturated = found.entries == u64::from(u16::MAX)
        || found.range.start == u64::from(u32::MAX)
        || found.range.end - found.range.start == u64::from(u32::MAX);
    if !saturated {
        return Ok(found);
    }
    let Some(locator) = end.checked_sub(LOCATOR) else {
        return Ok(found);
    };
    let Some(record) = slice(bytes, start, &(locator..end)) else {
        return Err(Plan::Need(locator..size));
    };
    let Some(record64) = end64_at(record) else {
        // Just so many members, or just that large.
        return Ok(found);
    };
    let beyond = Plan::Unsuitable("the zip64 end record is beyond the file");
    let end64 = record64.checked_add(END64).filter(|end| *end <= locator);
    let Some(end64) = end64.filter(|_| size - record64 <= LONGEST_INDEX) else {
        return Err(beyond);
    };
    if record64 < start {
        return Err(Plan::Need(record64..size));
    }
    let found = slice(bytes, start, &(record64..end64)).and_then(end64_record);
    found.ok_or(Plan::Unsuitable("no zip64 end record"))
}

fn end_record(record: &[u8]) -> Option<Directory> {
    let mut bytes = Bytes::new(record);
    let signed = bytes.u32()? == END_SIGNATURE;
    // This disk, the directory's disk, entries on this disk.
    bytes.take(6)?;
    let entries = bytes.u16()?.into();
    let (length, offset) = (u64::from(bytes.u32()?), u64::from(bytes.u32()?));
    let comment = bytes.u16()?;
    (signed && comment == 0).then_some(Directory {
        range: offset..offset + length,
        entries,
    })
}

fn end64_at(locator: &[u8]) -> Option<u64> {
    let mut bytes = Bytes::new(locator);
    let signed = bytes.u32()? == LOCATOR_SIGNATURE;
    bytes.u32()?;
    bytes.u64().filter(|_| signed)
}

fn end64_record(record: &[u8]) -> Option<Directory> {
    let mut bytes = Bytes::new(record);
    let signed = bytes.u32()? == END64_SIGNATURE;
    // The record's length, versions, disks, entries on this disk.
    bytes.take(8 + 2 + 2 + 4 + 4 + 8)?;
    let entries = bytes.u64()?;
    let (length, offset) = (bytes.u64()?, bytes.u64()?);
    let range = offset..offset.checked_add(length)?;
    signed.then_some(Directory { range, entries })
}

fn members(directory: &[u8], entries: u64) -> Option<Vec<Member>> {
    let mut bytes = Bytes::new(directory);
    let mut members = Vec::new();
    for _ in 0..entries {
        members.push(member(&mut bytes)?);
    }
    Some(members)
}

fn member(bytes: &mut Bytes<'_>) -> Option<Member> {
    if bytes.u32()? != ENTRY_SIGNATURE {
        return None;
    }
    // Versions, flags, method, time, date, checksum.
    bytes.take(16)?;
    let (compressed, uncompressed) = (bytes.u32()?, bytes.u32()?);
    let (length, extra, comment) = (bytes.u16()?, bytes.u16()?, bytes.u16()?);
    // Disk, attributes.
    bytes.take(2 + 2 + 4)?;
    let header = bytes.u32()?;
    let name = bytes.take(length.into())?;
    let extra = bytes.take(extra.into())?;
    bytes.take(comment.into())?;
    let mut large = large_numbers(extra);
    let mut number = |small: u32| {
        if small == u32::MAX
            && let Some(large) = &mut large
        {
            return large.u64();
        }
        Some(u64::from(small))
    };
    // In this order they stand in the extra field, those that do not fit.
    number(uncompressed)?;
    let compressed = number(compressed)?;
    let header = number(header)?;
    Some(Member {
        header,
        least: compressed.checked_add(HEADER + u64::from(length))?,
        of_torch: name.ends_with(OF_TORCH),
    })
}

fn large_numbers(extra: &[u8]) -> Option<Bytes<'_>> {
    let mut bytes = Bytes::new(extra);
    loop {
        let (kind, length) = (bytes.u16()?, bytes.u16()?);
        let field = bytes.take(length.into())?;
        if kind == EXTRA64 {
            return Some(Bytes::new(field));
        }
    }
}

/// Each member ends where the next begins, or the directory, if they lie that close.
fn extents(mut members: Vec<Member>, directory: u64) -> Option<Extents> {
    members.sort_by_key(|member| member.header);
    let mut ranges = Vec::with_capacity(members.len());
    for (position, member) in members.iter().enumerate() {
        let next = members.get(position + 1).map_or(directory, |it| it.header);
        let least = member.header.checked_add(member.least)?;
        if least > next {
            return None;
        }
        let most = least.saturating_add(MOST_PADDING + DESCRIPTOR);
        ranges.push(member.header..next.min(most));
    }
    let looked_through = members.first().is_some_and(|member| member.of_torch);
    let extents = Extents::new(ranges, directory)?;
    Some(Extents {
        looked_through,
        ..extents
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A container of stored members of these sizes, as zipfile writes it, or with zip64 numbers as
    /// torch does.
    fn container(sizes: &[u64], large: bool) -> Vec<u8> {
        let mut file = Vec::new();
        let mut directory = Vec::new();
        for (number, size) in sizes.iter().enumerate() {
            let name = format!("archive/data/{number}");
            let header = file.len() as u64;
            file.extend(0x0403_4b50_u32.to_le_bytes());
            file.extend([0; 22]);
            file.extend((name.len() as u16).to_le_bytes());
            file.extend(0u16.to_le_bytes());
            file.extend(name.as_bytes());
            file.resize(file.len() + *size as usize, 7);
            let small = |value: u64| if large { u32::MAX } else { value as u32 };
            directory.extend(ENTRY_SIGNATURE.to_le_bytes());
            directory.extend([0; 16]);
            directory.extend(small(*size).to_le_bytes());
            directory.extend(small(*size).to_le_bytes());
            directory.extend((name.len() as u16).to_le_bytes());
            directory.extend(if large { 28u16 } else { 0 }.to_le_bytes());
            directory.extend([0; 10]);
            directory.extend(small(header).to_le_bytes());
            directory.extend(name.as_bytes());
            if large {
                directory.extend(EXTRA64.to_le_bytes());
                directory.extend(24u16.to_le_bytes());
                for value in [*size, *size, header] {
                    directory.extend(value.to_le_bytes());
                }
            }
        }
        let offset = file.len() as u64;
        let length = directory.len() as u64;
        file.extend(directory);
        let entries = sizes.len() as u64;
        if large {
            let record = file.len() as u64;
            file.extend(END64_SIGNATURE.to_le_bytes());
            file.extend(44u64.to_le_bytes());
            file.extend([0; 12]);
            for value in [entries, entries, length, offset] {
                file.extend(value.to_le_bytes());
            }
            file.extend(LOCATOR_SIGNATURE.to_le_bytes());
            file.extend(0u32.to_le_bytes());
            file.extend(record.to_le_bytes());
            file.extend(1u32.to_le_bytes());
        }
        let small = |value: u64| if large { u32::MAX } else { value as u32 };
        let count = if large { u16::MAX } else { entries as u16 };
        file.extend(END_SIGNATURE.to_le_bytes());
        file.extend([0; 4]);
        file.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
        file.extend(small(length).to_le_bytes());
        file.extend(small(offset).to_le_bytes());
        file.extend(0u16.to_le_bytes());
        file
    }

    /// Gives what is needed until there is a plan, or none to be had.
    fn plan(file: &[u8]) -> Plan {
        let size = file.len() as u64;
        let mut start = size.saturating_sub(END);
        loop {
            match zip(size, start, &file[start as usize..]) {
                Plan::Need(range) => {
                    assert!(range.start < start && range.end == size);
                    start = range.start;
                }
                done => return done,
            }
        }
    }

    #[test]
    fn a_member_is_found_with_its_header_and_up_to_the_next() {
        for large in [false, true] {
            let file = container(&[100, 0, 5000], large);
            let Plan::Ready(extents) = plan(&file) else {
                panic!("no plan")
            };
            assert_eq!(extents.len(), 3);
            assert_eq!(extents.containing(0), Some(0..144));
            assert_eq!(extents.containing(143), Some(0..144));
            assert_eq!(extents.containing(150), Some(144..188));
            assert_eq!(extents.containing(188 + 44 + 4999), Some(188..188 + 5044));
            assert_eq!(extents.containing(188 + 5044), None);
        }
    }

    #[test]
    fn an_empty_container_has_an_empty_plan() {
        assert!(matches!(plan(&container(&[], false)), Plan::Ready(extents) if extents.is_empty()));
    }

    #[test]
    fn what_is_no_container_or_hostile_has_no_plan() {
        let mut overlapping = container(&[100, 100], false);
        // The first member says that it is longer than up to the next.
        let entry = 2 * (100 + 44);
        overlapping[entry + 20..entry + 24].copy_from_slice(&200u32.to_le_bytes());
        let mut beyond = container(&[100], false);
        let end = beyond.len() - 22;
        beyond[end + 16..end + 20].copy_from_slice(&0xffff_0000_u32.to_le_bytes());
        let mut many = container(&[100], false);
        many[end + 10..end + 12].copy_from_slice(&9u16.to_le_bytes());
        for file in [overlapping, beyond, many, vec![0; 5], vec![0; 500]] {
            assert!(matches!(plan(&file), Plan::Unsuitable(_)));
        }
    }

    proptest! {
        #[test]
        fn a_damaged_container_never_panics(
            sizes in prop::collection::vec(0u64..300, 0..6),
            large in any::<bool>(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        ) {
            let mut file = container(&sizes, large);
            for (place, value) in damage {
                // What is read is at the end.
                let place = file.len() - 1 - place.index(file.len().min(400));
                file[place] = value;
            }
            if let Plan::Ready(extents) = plan(&file) {
                prop_assert!(extents.len() <= file.len());
            }
        }
    }
}
