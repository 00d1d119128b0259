//! Listings as object stores give them, in key order, of what directories hold.

use std::fs;
use std::io;
use std::path::Path;

use super::files::{HIDDEN, explain, is_absence, meta, path_of};
use crate::store::{ListPage, ObjectMeta, PageStart, StoreResult};

/// Names of one page. More than object stores give: each page reads the directory anew.
const PER_PAGE: usize = 10_000;

/// Where a page begins.
#[derive(Clone, Debug)]
pub(super) enum Start {
    First,
    /// Behind the last key of the page before.
    Behind(String),
    /// Behind a key, with what shares its directory.
    After(String),
}

impl Start {
    pub fn new(start: PageStart<'_>) -> Self {
        match start {
            PageStart::First => Self::First,
            PageStart::Token(token) => Self::Behind(token.to_owned()),
            PageStart::After(key) => Self::After(key.to_owned()),
        }
    }

    fn allows(&self, key: &str) -> bool {
        match self {
            Self::First => true,
            Self::Behind(last) => key > last.as_str(),
            // Of a directory that begins before the key, something may come behind it.
            Self::After(after) => {
                key > after.as_str() || (key.ends_with('/') && after.starts_with(key))
            }
        }
    }

    /// Whether anything below a directory can be behind it.
    fn allows_below(&self, directory: &str) -> bool {
        match self {
            Self::First => true,
            Self::Behind(key) | Self::After(key) => {
                directory > key.as_str() || key.starts_with(directory)
            }
        }
    }
}

/// A name that is listed: a key, with a slash at its end for a directory.
struct Found {
    key: String,
    /// A directory that stands for itself: as an empty one that was asked for, and as any where
    /// everything below is listed.
    marker: bool,
}

pub(super) fn page(
    prefix: &str,
    delimited: bool,
    start: &Start,
    maximum: Option<u32>,
) -> StoreResult<ListPage> {
    let limit = maximum.map_or(PER_PAGE, |maximum| (maximum as usize).min(PER_PAGE));
    let (directory, stem) = match prefix.rfind('/') {
        Some(slash) => prefix.split_at(slash + 1),
        None => ("", prefix),
    };
    let mut found = Vec::new();
    let collected = if delimited {
        names(directory, stem, start, &mut found)
    } else {
        everything(directory, stem, start, limit, &mut found)
    };
    match collected {
        Err(error) if is_absence(&error) => return Ok(ListPage::default()),
        outcome => outcome.map_err(explain(prefix))?,
    }
    found.sort_unstable_by(|one, other| one.key.cmp(&other.key));
    let more = found.len() > limit;
    found.truncate(limit);
    let mut page = ListPage {
        next: found.last().filter(|_| more).map(|last| last.key.clone()),
        ..ListPage::default()
    };
    for Found { key, marker } in found {
        if key.ends_with('/') && !marker {
            page.prefixes.push(key);
        } else {
            page.objects.extend(describe(key).map_err(explain(prefix))?);
        }
    }
    Ok(page)
}

/// What one directory holds. An empty one that was asked for itself holds its own mark.
fn names(directory: &str, stem: &str, start: &Start, found: &mut Vec<Found>) -> io::Result<()> {
    let mut is_empty = true;
    for entry in fs::read_dir(path_of(directory))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        is_empty = false;
        if !name.starts_with(stem) || name.starts_with(HIDDEN) {
            continue;
        }
        let Some(is_directory) = kind(&entry) else {
            continue;
        };
        let slash = if is_directory { "/" } else { "" };
        let key = format!("{directory}{name}{slash}");
        if start.allows(&key) {
            found.push(Found { key, marker: false });
        }
    }
    if is_empty && stem.is_empty() && !directory.is_empty() && start.allows(directory) {
        let key = directory.to_owned();
        found.push(Found { key, marker: true });
    }
    Ok(())
}

/// All that lies below, in key order, until there is more than a page of it. Symlinks to directories
/// are not followed: they may lead back.
fn everything(
    directory: &str,
    stem: &str,
    start: &Start,
    limit: usize,
    found: &mut Vec<Found>,
) -> io::Result<()> {
    let mut here = Vec::new();
    names(directory, stem, &Start::First, &mut here)?;
    here.retain(|it| !it.marker);
    if stem.is_empty() && !directory.is_empty() && start.allows(directory) {
        let key = directory.to_owned();
        found.push(Found { key, marker: true });
    }
    here.sort_unstable_by(|one, other| one.key.cmp(&other.key));
    for it in here {
        if found.len() > limit {
            return Ok(());
        }
        if !it.key.ends_with('/') {
            if start.allows(&it.key) {
                found.push(it);
            }
            continue;
        }
        let is_link = path_of(it.key.trim_end_matches('/')).is_symlink();
        if is_link || !start.allows_below(&it.key) {
            continue;
        }
        match everything(&it.key, "", start, limit, found) {
            Err(error) if is_absence(&error) => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

/// Whether it is a directory; `None` for what is neither that nor a file.
fn kind(entry: &fs::DirEntry) -> Option<bool> {
    let kind = entry.file_type().ok()?;
    if kind.is_symlink() {
        return kind_behind(&entry.path());
    }
    (kind.is_dir() || kind.is_file()).then(|| kind.is_dir())
}

fn kind_behind(link: &Path) -> Option<bool> {
    let metadata = link.metadata().ok()?;
    (metadata.is_dir() || metadata.is_file()).then(|| metadata.is_dir())
}

/// Nothing, if it has gone meanwhile.
fn describe(key: String) -> io::Result<Option<ObjectMeta>> {
    match path_of(&key).metadata() {
        Ok(metadata) if key.ends_with('/') => Ok(Some(ObjectMeta {
            key,
            size: 0,
            etag: None,
            modified: metadata.modified().ok(),
        })),
        Ok(metadata) => Ok(Some(meta(key, &metadata))),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(error),
    }
}
