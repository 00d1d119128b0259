//! Which version of which object: what a folder of the disk cache is named after, and says inside.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use crate::read::Source;
use crate::store::ETag;

/// Stands first in every identity, so that no other text can be taken for one.
const HEADING: &str = "mlfs cached version 1";

/// One version of one object in one store, for good: the same in every mount and every process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// The folder's name: SHA-256 of the text, hexadecimal.
    pub name: String,
    /// What the folder's `identity` file holds. Compared whenever the folder is opened, so that a
    /// damaged folder, or two texts of one name, can never give another object's bytes.
    pub text: String,
    /// Bytes of the object.
    pub size: u64,
}

impl Identity {
    /// `None` for what cannot be told apart from its other versions for certain.
    pub fn of(source: &Source) -> Option<Self> {
        let etag = strong(source.etag.as_ref())?;
        let store = source.store.identity();
        Some(Self::new(store, &source.key, etag, source.size))
    }

    pub fn new(store: &str, key: &str, etag: &str, size: u64) -> Self {
        let mut text = format!("{HEADING}\n");
        for part in [store, key, etag] {
            // Each with its length: no choice of key and ETag makes the text of another pair.
            let _ = writeln!(text, "{} {part}", part.len());
        }
        let _ = writeln!(text, "{size}");
        let mut name = String::with_capacity(64);
        for byte in Sha256::digest(text.as_bytes()) {
            let _ = write!(name, "{byte:02x}");
        }
        Self { name, text, size }
    }
}

/// An ETag of which two that are equal mean that the bytes are (RFC 9110, 8.8.1).
fn strong(etag: Option<&ETag>) -> Option<&str> {
    let text = etag?.as_str();
    let weak = text.starts_with("W/") || text.trim_matches('"').is_empty();
    (!weak).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strong_etag_makes_a_version() {
        assert_eq!(strong(None), None);
        for (etag, is_strong) in [
            ("\"abc\"", true),
            ("abc", true),
            ("W/\"abc\"", false),
            ("\"\"", false),
        ] {
            assert_eq!(
                strong(Some(&ETag::new(etag))).is_some(),
                is_strong,
                "{etag}"
            );
        }
    }

    #[test]
    fn everything_that_makes_a_version_makes_another_name() {
        let all = [
            Identity::new("http://one/bucket", "k", "\"e\"", 1),
            Identity::new("http://two/bucket", "k", "\"e\"", 1),
            Identity::new("http://one/bucket", "l", "\"e\"", 1),
            Identity::new("http://one/bucket", "k", "\"f\"", 1),
            Identity::new("http://one/bucket", "k", "\"e\"", 2),
            Identity::new("http://one/bucket", "k\n3 \"e\"\n1", "", 1),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(all[..index].iter().all(|other| other.name != one.name));
            assert!(one.name.len() == 64 && one.name.chars().all(|it| it.is_ascii_hexdigit()));
        }
        assert_eq!(all[0], Identity::new("http://one/bucket", "k", "\"e\"", 1));
    }
}
