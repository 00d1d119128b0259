//! safetensors: eight bytes of header length, a JSON header, the tensors.
//!
//! Source: the format's specification. Each tensor has `data_offsets`, relative to the header's
//! end.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{Extents, LONGEST_INDEX, Plan};

/// The header's length stands in this many bytes.
pub(super) const LENGTH: usize = 8;

#[derive(serde::Deserialize)]
struct Tensor {
    data_offsets: Option<(u64, u64)>,
}

/// Where a header's tensors are, relative to its end. Names are not kept: a hostile header is
/// nothing but names, and kept they take many times its bytes.
struct Places(Vec<(u64, u64)>);

impl<'de> Deserialize<'de> for Places {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(Vec::new()))
    }
}

impl<'de> Visitor<'de> for Places {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some((_, tensor)) = map.next_entry::<IgnoredAny, Tensor>()? {
            self.0.extend(tensor.data_offsets);
        }
        Ok(self)
    }
}

/// The layout of a file of `size` bytes that starts with `prefix`.
pub fn safetensors(size: u64, prefix: &[u8]) -> Plan {
    let Some(length) = prefix.first_chunk::<LENGTH>() else {
        return if size < LENGTH as u64 {
            Plan::Unsuitable("too short")
        } else {
            Plan::Need(0..LENGTH as u64)
        };
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_INDEX || length > size - LENGTH as u64 {
        return Plan::Unsuitable("header length beyond the file or the limit");
    }
    let start = LENGTH as u64 + length;
    let Some(header) = prefix.get(LENGTH..start as usize) else {
        return Plan::Need(0..start);
    };
    let Ok(Places(places)) = serde_json::from_slice(header) else {
        return Plan::Unsuitable("header is no JSON of tensors");
    };
    let ranges: Option<Vec<Range<u64>>> = places
        .into_iter()
        .map(|(from, to)| Some(start.checked_add(from)?..start.checked_add(to)?))
        .collect();
    match ranges.and_then(|ranges| Extents::new(ranges, size)) {
        Some(extents) => Plan::Ready(extents),
        None => Plan::Unsuitable("tensors overlap or lie beyond the file"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes
    }

    #[test]
    fn a_tensor_is_found_by_any_of_its_bytes() {
        let bytes = file(
            r#"{"__metadata__":{"format":"pt"},
                "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                "b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#,
        );
        let start = bytes.len() as u64;
        let Plan::Ready(extents) = safetensors(start + 24, &bytes) else {
            panic!("no plan")
        };
        assert_eq!(extents.len(), 2);
        assert_eq!(extents.containing(start + 7), Some(start..start + 8));
        assert_eq!(extents.containing(start + 8), Some(start + 8..start + 24));
        assert_eq!(extents.containing(0), None);
    }

    #[test]
    fn the_header_is_asked_for_in_two_steps() {
        let bytes = file("{}");
        assert!(matches!(
            safetensors(100, &[]),
            Plan::Need(Range { start: 0, end: 8 })
        ));
        assert!(matches!(
            safetensors(100, &bytes[..8]),
            Plan::Need(Range { start: 0, end: 10 })
        ));
        assert!(matches!(safetensors(100, &bytes), Plan::Ready(_)));
    }

    #[test]
    fn a_hostile_header_is_no_plan() {
        for header in [
            "[]",
            "not json",
            r#"{"a":{"data_offsets":[8,0]}}"#,
            r#"{"a":{"data_offsets":[0,18446744073709551615]}}"#,
            r#"{"a":{"data_offsets":[0,8]},"b":{"data_offsets":[4,12]}}"#,
            r#"{"a":{"data_offsets":[0,8]},"a":{"data_offsets":[0,8]}}"#,
            r#"{"a":{"data_offsets":[0,8]}"#,
            r#"{"a":[0,8]}{"#,
        ] {
            let bytes = file(header);
            let plan = safetensors(bytes.len() as u64 + 64, &bytes);
            assert!(matches!(plan, Plan::Unsuitable(_)), "{header}: {plan:?}");
        }
        let huge = u64::MAX.to_le_bytes();
        assert!(matches!(safetensors(1 << 40, &huge), Plan::Unsuitable(_)));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(size in any::<u64>(), prefix in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = safetensors(size.max(prefix.len() as u64), &prefix);
        }
    }
}
