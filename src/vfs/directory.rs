//! What is known of one directory inside an artifact root.
//!
//! Three sources make its content: a listing of the store, which is believed for the metadata
//! TTL; changes of this mount, which count at once, also against a listing that was under way
//! when they were made; and what exists only locally (unpublished files, empty directories),
//! which the tree knows as children.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::store::ETag;

/// A name in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    File(FileInfo),
    Directory,
}

/// A published file, as listings and answers to writes describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    pub etag: Option<ETag>,
    pub modified: SystemTime,
}

#[derive(Clone, Debug)]
struct Known {
    /// `None`: the store has no such name.
    entry: Option<Entry>,
    at: Instant,
}

/// The names of one directory, as far as they are known.
#[derive(Debug, Default)]
pub struct Directory {
    known: HashMap<String, Known>,
    /// When a complete listing was begun, if one is believed.
    complete: Option<Instant>,
    /// Too large for one page, as of then: names are asked for singly.
    large: Option<Instant>,
    /// Listings under way, and the changes made since the oldest of them began.
    listings: usize,
    changes: Vec<(String, Option<Entry>)>,
}

/// The answer to "is this name here?"
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    Found(Entry, Instant),
    Absent,
    Unknown,
}

fn fresh(at: Instant, ttl: Duration) -> bool {
    at.elapsed() < ttl
}

impl Directory {
    pub fn lookup(&self, name: &str, ttl: Duration) -> Lookup {
        let listed = self.complete.is_some_and(|at| fresh(at, ttl));
        match self.known.get(name) {
            // Never older than the listing: it may grow stale between two looks at the clock.
            Some(known) if listed || fresh(known.at, ttl) => match &known.entry {
                Some(entry) => Lookup::Found(entry.clone(), known.at),
                None => Lookup::Absent,
            },
            None if listed => Lookup::Absent,
            _ => Lookup::Unknown,
        }
    }

    /// All names in order, when a complete listing is believed, and when it was begun.
    pub fn complete(&self, ttl: Duration) -> Option<(BTreeMap<String, Entry>, Instant)> {
        let at = self.complete.filter(|at| fresh(*at, ttl))?;
        let names = self
            .known
            .iter()
            .filter_map(|(name, known)| Some((name.clone(), known.entry.clone()?)))
            .collect();
        Some((names, at))
    }

    pub fn is_large(&self, ttl: Duration) -> bool {
        self.large.is_some_and(|at| fresh(at, ttl))
    }

    /// A listing begins: from now on changes are kept, to be laid over its result.
    pub fn begin_listing(&mut self) {
        self.listings += 1;
    }

    /// A listing that began at `begun` has ended; `entries` when it was read to its end.
    pub fn end_listing(&mut self, begun: Instant, entries: Option<BTreeMap<String, Entry>>) {
        if let Some(mut entries) = entries {
            self.overlay(&mut entries);
            self.known = entries
                .into_iter()
                .map(|(name, entry)| {
                    (
                        name,
                        Known {
                            entry: Some(entry),
                            at: begun,
                        },
                    )
                })
                .collect();
            self.complete = Some(begun);
            self.large = None;
        }
        self.listings -= 1;
        if self.listings == 0 {
            self.changes = Vec::new();
        }
    }

    /// The first page was not the last.
    pub fn note_large(&mut self, at: Instant) {
        self.large = Some(at);
    }

    /// Lays what this mount changed meanwhile over what the store answered.
    pub fn overlay(&self, entries: &mut BTreeMap<String, Entry>) {
        for (name, change) in &self.changes {
            match change {
                Some(entry) => entries.insert(name.clone(), entry.clone()),
                None => entries.remove(name),
            };
        }
    }

    /// What the store said of one name, asked at `at`.
    pub fn note(&mut self, name: &str, entry: Option<Entry>, at: Instant) {
        let newer = self.known.get(name).is_some_and(|known| known.at > at);
        if !newer {
            self.known.insert(name.to_owned(), Known { entry, at });
        }
    }

    /// This mount changed a name in the store.
    pub fn change(&mut self, name: &str, entry: Option<Entry>) {
        if self.listings > 0 {
            self.changes.push((name.to_owned(), entry.clone()));
        }
        self.known.insert(
            name.to_owned(),
            Known {
                entry,
                at: Instant::now(),
            },
        );
    }

    /// Forgets everything the store said; a listing under way is still overlaid.
    pub fn forget(&mut self) {
        self.known = HashMap::new();
        self.complete = None;
        self.large = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(5);

    fn file(size: u64) -> Entry {
        Entry::File(FileInfo {
            size,
            etag: None,
            modified: SystemTime::UNIX_EPOCH,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_unknown_until_listed_and_again_after_the_ttl() {
        let mut directory = Directory::default();
        assert_eq!(directory.lookup("a", TTL), Lookup::Unknown);
        directory.begin_listing();
        directory.end_listing(
            Instant::now(),
            Some(BTreeMap::from([("a".into(), file(1))])),
        );
        assert!(matches!(directory.lookup("a", TTL), Lookup::Found(..)));
        assert_eq!(directory.lookup("b", TTL), Lookup::Absent);
        tokio::time::advance(TTL).await;
        assert_eq!(directory.lookup("a", TTL), Lookup::Unknown);
    }

    #[tokio::test(start_paused = true)]
    async fn what_this_mount_did_counts_against_a_listing_that_was_under_way() {
        let mut directory = Directory::default();
        let begun = Instant::now();
        directory.begin_listing();
        directory.change("deleted", None);
        directory.change("published", Some(file(2)));
        let listed = BTreeMap::from([("deleted".to_owned(), file(1))]);
        directory.end_listing(begun, Some(listed));
        assert_eq!(directory.lookup("deleted", TTL), Lookup::Absent);
        assert!(matches!(
            directory.lookup("published", TTL),
            Lookup::Found(..)
        ));
    }
}
