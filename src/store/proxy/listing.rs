//! Listings as object stores give them, of directories that the server lists whole.

use std::collections::VecDeque;

use serde::{Deserialize, Deserializer};

use super::access::{Access, Failed};
use super::address::check_name;
use crate::store::{ListPage, ObjectMeta, PageStart, StoreError, StoreResult};

/// The longest key that is listed with all that is below a directory, bytes.
const LONGEST_KEY: usize = 1024;

/// A directory as the server tells it.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    files: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    /// Its name; from some stores with directories before it.
    path: String,
    #[serde(default)]
    is_dir: bool,
    /// Absent for nothing.
    #[serde(default, deserialize_with = "number_or_text")]
    file_size: u64,
}

/// JSON of protocol buffers may have large numbers as texts.
fn number_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
        Nothing(()),
    }
    match Either::deserialize(deserializer)? {
        Either::Number(number) => Ok(number),
        Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        Either::Nothing(()) => Ok(0),
    }
}

/// One name of a directory.
struct Entry {
    /// With a slash at its end for a directory.
    key: String,
    size: u64,
}

/// The names of the directory at `path`, with their keys; none if there is no such directory.
async fn directory(access: &Access, object: &str, path: &str) -> StoreResult<Vec<Entry>> {
    let url = access.address.listing();
    let answer: Result<Answer, Failed> = access
        .ask(object, |client| client.get(&url).query(&[("path", path)]))
        .await;
    let is_of_run = access.address.run.is_some();
    let answer = match answer {
        // It has no way to that store, or not all that it takes, or is no such server.
        Err(failed)
            if is_of_run
                && (failed.is(500) || failed.is(400) || failed.is(404) && path.is_empty()) =>
        {
            return Err(StoreError::Unsupported {
                object: object.to_owned(),
                // Its own words may quote the URI, with a password in it.
                detail: match failed.status {
                    Some(status) => format!("the tracking server has no way there: HTTP {status}"),
                    None => "the tracking server has no way there".to_owned(),
                },
            });
        }
        Err(failed) if failed.is(404) => return Ok(Vec::new()),
        answer => answer?,
    };
    let prefix = match path {
        "" => String::new(),
        path => format!("{path}/"),
    };
    let entries = answer.files.into_iter().filter_map(|file| {
        let name = file.path.trim_end_matches('/');
        let name = name.rsplit('/').next().filter(|name| !name.is_empty())?;
        let slash = if file.is_dir { "/" } else { "" };
        Some(Entry {
            key: format!("{prefix}{name}{slash}"),
            size: file.file_size,
        })
    });
    Ok(entries.collect())
}

fn allows(start: &PageStart<'_>, key: &str) -> bool {
    match start {
        PageStart::First => true,
        PageStart::Token(last) => key > *last,
        // Of a directory that begins before the key, something may come behind it.
        PageStart::After(after) => key > *after || (key.ends_with('/') && after.starts_with(key)),
    }
}

/// A page of what begins with `prefix`. Without a `maximum` it is all there is.
pub(super) async fn page(
    access: &Access,
    object: &str,
    prefix: &str,
    delimited: bool,
    start: PageStart<'_>,
    maximum: Option<u32>,
) -> StoreResult<ListPage> {
    let (path, _) = prefix.rsplit_once('/').unwrap_or_default();
    let mut found = directory(access, object, path).await?;
    found.retain(|entry| entry.key.starts_with(prefix));
    let itself = |key: &str| Entry {
        key: key.to_owned(),
        size: 0,
    };
    if found.is_empty() && is_empty_directory(access, object, prefix).await? {
        // It stands for itself, as the empty objects do that stores' consoles make.
        return Ok(cut(vec![itself(prefix)], false, start, maximum));
    }
    if !delimited && !found.is_empty() {
        let mut below: VecDeque<String> = VecDeque::new();
        let mut all = Vec::new();
        if prefix.ends_with('/') {
            all.push(itself(prefix));
        }
        loop {
            // A server that is wrong, or has links in a circle, is not followed for ever.
            found.retain(|it| it.key.len() <= LONGEST_KEY && check_name(object, &it.key).is_ok());
            let directories = found.iter().filter_map(|it| it.key.strip_suffix('/'));
            below.extend(directories.map(str::to_owned));
            all.append(&mut found);
            let Some(path) = below.pop_front() else {
                break;
            };
            found = directory(access, object, &path).await?;
        }
        found = all;
    }
    Ok(cut(found, delimited, start, maximum))
}

/// Whether a key, which ends in a slash then, is a directory with nothing in it.
pub(super) async fn is_empty_directory(
    access: &Access,
    object: &str,
    key: &str,
) -> StoreResult<bool> {
    let Some(path) = key.strip_suffix('/').filter(|path| !path.is_empty()) else {
        return Ok(false);
    };
    if !directory(access, object, path).await?.is_empty() {
        return Ok(false);
    }
    let (parent, _) = path.rsplit_once('/').unwrap_or_default();
    let siblings = directory(access, object, parent).await?;
    Ok(siblings.iter().any(|entry| entry.key == key))
}

/// The keys in a directory that begin so.
pub(super) async fn beginning_with(
    access: &Access,
    object: &str,
    key: &str,
) -> StoreResult<Vec<String>> {
    let (path, _) = key.rsplit_once('/').unwrap_or_default();
    let entries = directory(access, object, path).await?;
    let keys = entries.into_iter().map(|entry| entry.key);
    Ok(keys.filter(|other| other.starts_with(key)).collect())
}

fn cut(
    mut found: Vec<Entry>,
    delimited: bool,
    start: PageStart<'_>,
    maximum: Option<u32>,
) -> ListPage {
    found.retain(|entry| allows(&start, &entry.key));
    found.sort_by(|one, other| one.key.cmp(&other.key));
    let mut next = None;
    if let Some(maximum) = maximum {
        let most = (maximum as usize).max(1);
        if found.len() > most {
            found.truncate(most);
            next = found.last().map(|entry| entry.key.clone());
        }
    }
    let mut page = ListPage {
        next,
        ..ListPage::default()
    };
    for Entry { key, size } in found {
        if delimited && key.ends_with('/') {
            page.prefixes.push(key);
        } else {
            page.objects.push(meta(key, size));
        }
    }
    page
}

fn meta(key: String, size: u64) -> ObjectMeta {
    ObjectMeta {
        key,
        size,
        etag: None,
        modified: None,
    }
}

/// One object, as its directory tells of it: asking for the object itself makes some servers fetch
/// all of it.
pub(super) async fn find(
    access: &Access,
    object: &str,
    key: &str,
) -> StoreResult<Option<ObjectMeta>> {
    let (path, _) = key.rsplit_once('/').unwrap_or_default();
    let entries = directory(access, object, path).await?;
    let found = entries.into_iter().find(|entry| entry.key == key);
    Ok(found.map(|entry| meta(entry.key, entry.size)))
}
