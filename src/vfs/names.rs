//! Which store keys can be paths, and which names can be keys.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::SystemTime;

use super::directory::{Entry, FileInfo, Name};
use super::error::{VfsError, VfsResult};
use crate::store::{ObjectMeta, Store};

/// The longest name, bytes (Linux's NAME_MAX).
pub const LONGEST_NAME: usize = 255;
/// The longest key, bytes (S3's limit).
const LONGEST_KEY: usize = 1024;

/// Whether a key's component can be shown as a name.
pub fn is_showable(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && name.len() <= LONGEST_NAME
        && !name.contains(['/', '\0'])
}

/// A name a program gave, as a key's component.
pub fn from_kernel(name: &OsStr) -> VfsResult<&str> {
    let name = name.to_str().ok_or(VfsError::plain(libc::EILSEQ))?;
    if name.len() > LONGEST_NAME {
        return Err(VfsError::NAME_TOO_LONG);
    }
    Ok(name)
}

/// Whether the store takes a key of this length, and this name.
pub fn check_key(store: &Arc<dyn Store>, key: &str) -> VfsResult<()> {
    if key.len() > LONGEST_KEY {
        return Err(VfsError::NAME_TOO_LONG);
    }
    Ok(store.accepts(key)?)
}

fn file_info(object: ObjectMeta) -> FileInfo {
    FileInfo {
        size: object.size,
        etag: object.etag,
        modified: object.modified.unwrap_or(SystemTime::UNIX_EPOCH),
    }
}

/// The names of a delimited listing below `prefix` (with its trailing slash), in order. Keys that
/// cannot be names are left out; a directory hides an object of the same name.
pub fn entries(prefix: &str, objects: Vec<ObjectMeta>, prefixes: &[String]) -> Vec<(Name, Entry)> {
    let mut entries = Vec::with_capacity(objects.len() + prefixes.len());
    for key in prefixes {
        let name = key
            .strip_prefix(prefix)
            .and_then(|name| name.strip_suffix('/'));
        if let Some(name) = name.filter(|name| is_showable(name)) {
            entries.push((Name::from(name), Entry::Directory));
        }
    }
    for object in objects {
        let name = object.key.strip_prefix(prefix);
        if let Some(name) = name.filter(|name| is_showable(name)) {
            let name = Name::from(name);
            entries.push((name, Entry::File(file_info(object))));
        }
    }
    // Two runs that are in order, as stores list: that is soon done. Of one name the first stays.
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    entries.dedup_by(|(later, _), (earlier, _)| later == earlier);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: &str) -> ObjectMeta {
        ObjectMeta {
            key: key.to_owned(),
            size: 1,
            etag: None,
            modified: None,
        }
    }

    #[test]
    fn keys_that_cannot_be_paths_neither_crash_nor_escape() {
        let long = format!("r/{}", "x".repeat(256));
        let objects = ["r/", "r/..", "r/.", "r/a", "r/fine", &long].map(object);
        let prefixes = ["r//", "r/../", "r/a/", "r/d/"].map(str::to_owned);
        let entries = entries("r/", objects.into(), &prefixes);
        let names: Vec<&str> = entries.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["a", "d", "fine"]);
        assert_eq!(entries[0].1, Entry::Directory);
    }
}
