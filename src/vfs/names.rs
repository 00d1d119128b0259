//! Which store keys can be paths, and which names can be keys.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::time::SystemTime;

use super::directory::{Entry, FileInfo};
use super::error::{VfsError, VfsResult};
use crate::store::{ListPage, ObjectMeta};

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

/// Whether the store takes a key this long.
pub fn check_key(key: &str) -> VfsResult<()> {
    if key.len() > LONGEST_KEY {
        Err(VfsError::NAME_TOO_LONG)
    } else {
        Ok(())
    }
}

pub fn file_info(object: &ObjectMeta) -> FileInfo {
    FileInfo {
        size: object.size,
        etag: object.etag.clone(),
        modified: object.modified.unwrap_or(SystemTime::UNIX_EPOCH),
    }
}

/// The names of a delimited listing below `prefix` (with its trailing slash). Keys that cannot be
/// names are left out; a directory hides an object of the same name.
pub fn entries(prefix: &str, page: &ListPage) -> BTreeMap<String, Entry> {
    let mut entries = BTreeMap::new();
    for object in &page.objects {
        if let Some(name) = object
            .key
            .strip_prefix(prefix)
            .filter(|name| is_showable(name))
        {
            entries.insert(name.to_owned(), Entry::File(file_info(object)));
        }
    }
    for key in &page.prefixes {
        let name = key
            .strip_prefix(prefix)
            .and_then(|name| name.strip_suffix('/'));
        if let Some(name) = name.filter(|name| is_showable(name)) {
            entries.insert(name.to_owned(), Entry::Directory);
        }
    }
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
        let page = ListPage {
            objects: ["r/", "r/..", "r/.", "r/fine", "r/a", &long]
                .map(object)
                .into(),
            prefixes: vec!["r//".into(), "r/../".into(), "r/a/".into(), "r/d/".into()],
            next: None,
        };
        let entries = entries("r/", &page);
        let names: Vec<&str> = entries.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "d", "fine"]);
        assert_eq!(entries["a"], Entry::Directory);
    }
}
