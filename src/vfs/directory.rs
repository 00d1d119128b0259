//! What is known of one directory inside an artifact root.
//!
//! Three sources make its content: listings of the store and answers about single names, which are
//! believed for the metadata TTL; changes of this mount, which count at once, also against a page
//! that was under way when they were made; and what exists only locally (unpublished files, empty
//! directories), which the tree knows as children.
//!
//! Of two things that are known of a name the one counts that was asked for later.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Place;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::store::ETag;

/// A name, shared by all who hold it: listings are large.
pub type Name = Arc<str>;

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

/// A name that is there, as it was when the store was asked at `at`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    pub name: Name,
    pub entry: Entry,
    pub at: Instant,
}

#[derive(Clone, Debug)]
struct Known {
    /// `None`: the store has no such name.
    entry: Option<Entry>,
    at: Instant,
}

/// Stale names are dropped when there are more than this, and twice as many as were left the last
/// time.
const FEW: usize = 1024;
/// So many names in order, and the next are asked for a page at a time.
const SWEEP: usize = 8;
/// Above this, names that were looked for in vain are dropped too, however long the TTL.
const MOST_REMEMBERED: usize = 65_536;

/// The names of one directory, as far as they are known.
#[derive(Debug, Default)]
pub struct Directory {
    known: BTreeMap<Name, Known>,
    /// When a complete listing was begun, if one is believed.
    complete: Option<Instant>,
    /// Too large for one page, as of then: names are asked for singly.
    large: Option<Instant>,
    /// What was asked for before that is not believed; it only tells what came after it.
    forgotten: Option<Instant>,
    /// The name that was asked for last, and how far they seem to be asked for one after the other.
    asked: Option<Name>,
    sweep: usize,
    /// Listings under way: as long as there are any, nothing is dropped.
    listings: usize,
    /// Somebody drops what is stale from time to time, while there is much.
    watched: bool,
    /// How many names the last dropping left.
    left: usize,
}

/// How to ask the store for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// With the first page of the directory: perhaps that is all of it.
    First,
    /// With those that follow it.
    Around,
    /// Alone.
    Single,
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
            Some(known) if listed || (self.believes(known.at) && fresh(known.at, ttl)) => {
                match &known.entry {
                    Some(entry) => Lookup::Found(entry.clone(), known.at),
                    None => Lookup::Absent,
                }
            }
            None if listed => Lookup::Absent,
            _ => Lookup::Unknown,
        }
    }

    /// What is known of a name since `begun`, however long ago that was.
    pub fn since(&self, name: &str, begun: Instant) -> Lookup {
        match self.known.get(name).filter(|known| known.at >= begun) {
            Some(known) => match &known.entry {
                Some(entry) => Lookup::Found(entry.clone(), known.at),
                None => Lookup::Absent,
            },
            None if self.complete.is_some_and(|at| at >= begun) => Lookup::Absent,
            None => Lookup::Unknown,
        }
    }

    /// All names in order, when a complete listing is believed for as long as it was already.
    /// Whoever reads an older one would find it stale while looking at what it lists, and ask for
    /// each name alone.
    pub fn complete(&self, ttl: Duration) -> Option<Vec<Present>> {
        self.complete.filter(|at| fresh(*at, ttl / 2))?;
        let names = self.known.iter().filter_map(|(name, known)| {
            Some(Present {
                name: Arc::clone(name),
                entry: known.entry.clone()?,
                at: known.at,
            })
        });
        Some(names.collect())
    }

    /// How to ask for a name that is not known.
    pub fn way_to_ask(&mut self, name: &str, ttl: Duration) -> Way {
        if !self.large.is_some_and(|at| fresh(at, ttl)) {
            return Way::First;
        }
        let ascends = self.asked.as_deref().is_some_and(|asked| asked < name);
        self.sweep = if ascends {
            self.sweep + 1
        } else {
            self.sweep / 2
        };
        self.asked = Some(name.into());
        if self.sweep >= SWEEP {
            Way::Around
        } else {
            Way::Single
        }
    }

    /// The page around a name did not show it.
    pub fn asked_in_vain(&mut self) {
        self.sweep = 0;
    }

    /// A listing begins, to be ended with [`Self::end_listing`].
    pub fn begin_listing(&mut self) {
        self.listings += 1;
    }

    /// Notes names of a page that was asked for at `at`, and returns which of them are there: what
    /// this mount did meanwhile counts against the page.
    pub fn note_page(&mut self, page: Vec<(Name, Entry)>, at: Instant) -> Vec<Present> {
        let mut present = Vec::with_capacity(page.len());
        for (name, entry) in page {
            match self.known.entry(Arc::clone(&name)) {
                Place::Occupied(known) if known.get().at >= at => {
                    let known = known.get();
                    present.extend(known.entry.clone().map(|entry| Present {
                        name,
                        entry,
                        at: known.at,
                    }));
                    continue;
                }
                Place::Occupied(mut known) => {
                    let entry = Some(entry.clone());
                    known.insert(Known { entry, at });
                }
                Place::Vacant(place) => {
                    let entry = Some(entry.clone());
                    place.insert(Known { entry, at });
                }
            }
            present.push(Present { name, entry, at });
        }
        present
    }

    /// Every page of a listing that was begun at `begun` has been noted: there is nothing else.
    pub fn note_complete(&mut self, begun: Instant) {
        if self.believes(begun) && self.complete.is_none_or(|at| at < begun) {
            self.known.retain(|_, known| known.at >= begun);
            self.complete = Some(begun);
            self.large = None;
        }
    }

    /// Names that are known to be there since `begun`, and are not among those `shown`.
    pub fn others(&self, begun: Instant, shown: impl Fn(&str) -> bool) -> Vec<Present> {
        let there = self.known.iter().filter_map(|(name, known)| {
            let entry = known.entry.as_ref()?;
            (known.at >= begun && !shown(name)).then(|| Present {
                name: Arc::clone(name),
                entry: entry.clone(),
                at: known.at,
            })
        });
        there.collect()
    }

    /// A listing has ended, read to its end or not. Tells whether somebody has to drop what is
    /// stale in a while.
    pub fn end_listing(&mut self) -> bool {
        self.listings -= 1;
        let many = self.known.len() > FEW && !self.watched;
        self.watched |= many;
        many
    }

    /// Drops what is stale; tells whether that has to be done again in a while: until nothing is left.
    pub fn drop_stale_again(&mut self, ttl: Duration) -> bool {
        self.drop_stale(ttl);
        self.watched = !self.known.is_empty();
        self.watched
    }

    /// The first page was not the last.
    pub fn note_large(&mut self, at: Instant) {
        self.large = Some(at);
    }

    /// What the store said of one name, asked at `at`.
    pub fn note(&mut self, name: &str, entry: Option<Entry>, at: Instant, ttl: Duration) {
        if self.known.len() > FEW.max(2 * self.left) {
            self.drop_stale(ttl);
        }
        let newer = self.known.get(name).is_some_and(|known| known.at >= at);
        if !newer {
            self.known.insert(name.into(), Known { entry, at });
        }
    }

    /// This mount changed a name in the store.
    pub fn change(&mut self, name: &str, entry: Option<Entry>) {
        let at = Instant::now();
        self.known.insert(name.into(), Known { entry, at });
    }

    /// No longer believes what the store said until now.
    pub fn forget(&mut self) {
        self.forgotten = Some(Instant::now());
        self.complete = None;
        self.large = None;
    }

    /// Gives up what is no longer believed, or says no more than a complete listing.
    fn drop_stale(&mut self, ttl: Duration) {
        if self.listings == 0 {
            let listed = self.complete.is_some_and(|at| fresh(at, ttl));
            if !listed {
                self.complete = None;
                let forgotten = self.forgotten;
                self.known.retain(|_, known| {
                    forgotten.is_none_or(|at| at <= known.at) && fresh(known.at, ttl)
                });
            }
            if listed || self.known.len() > MOST_REMEMBERED {
                self.known.retain(|_, known| known.entry.is_some());
            }
        }
        self.left = self.known.len();
    }

    /// How many names are held.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether what was asked for at `at` has not been forgotten since.
    fn believes(&self, at: Instant) -> bool {
        self.forgotten.is_none_or(|forgotten| forgotten <= at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(5);
    const MOMENT: Duration = Duration::from_millis(1);

    fn file(size: u64) -> Entry {
        Entry::File(FileInfo {
            size,
            etag: None,
            modified: SystemTime::UNIX_EPOCH,
        })
    }

    fn page(names: &[(&str, u64)]) -> Vec<(Name, Entry)> {
        let entries = names
            .iter()
            .map(|(name, size)| (Name::from(*name), file(*size)));
        entries.collect()
    }

    fn names(present: &[Present]) -> Vec<&str> {
        present.iter().map(|it| &*it.name).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_unknown_until_listed_and_again_after_the_ttl() {
        let mut directory = Directory::default();
        assert_eq!(directory.lookup("a", TTL), Lookup::Unknown);
        let begun = Instant::now();
        directory.note_page(page(&[("a", 1)]), begun);
        assert_eq!(directory.lookup("b", TTL), Lookup::Unknown);
        directory.note_complete(begun);
        assert!(matches!(directory.lookup("a", TTL), Lookup::Found(..)));
        assert_eq!(directory.lookup("b", TTL), Lookup::Absent);
        tokio::time::advance(TTL).await;
        assert_eq!(directory.lookup("a", TTL), Lookup::Unknown);
    }

    #[tokio::test(start_paused = true)]
    async fn what_this_mount_did_counts_against_a_page_that_was_under_way() {
        let mut directory = Directory::default();
        let begun = Instant::now();
        tokio::time::advance(MOMENT).await;
        directory.change("deleted", None);
        directory.change("published", Some(file(2)));
        let shown = directory.note_page(page(&[("deleted", 1), ("other", 1)]), begun);
        assert_eq!(names(&shown), ["other"]);
        let made = directory.others(begun, |name| name == "other");
        assert_eq!(names(&made), ["published"]);
        directory.note_complete(begun);
        assert_eq!(directory.lookup("deleted", TTL), Lookup::Absent);
        let found = directory.lookup("published", TTL);
        assert!(matches!(found, Lookup::Found(..)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_gone_from_the_store_is_gone_with_the_next_listing() {
        let mut directory = Directory::default();
        directory.note_page(page(&[("gone", 1), ("kept", 1)]), Instant::now());
        tokio::time::advance(MOMENT).await;
        let begun = Instant::now();
        directory.note_page(page(&[("kept", 1)]), begun);
        directory.note_complete(begun);
        assert_eq!(directory.lookup("gone", TTL), Lookup::Absent);
        assert_eq!(names(&directory.complete(TTL).unwrap()), ["kept"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_that_was_asked_for_before_all_was_forgotten_is_not_believed() {
        let mut directory = Directory::default();
        let begun = Instant::now();
        tokio::time::advance(MOMENT).await;
        directory.change("deleted", None);
        directory.forget();
        let shown = directory.note_page(page(&[("a", 1), ("deleted", 1)]), begun);
        assert_eq!(names(&shown), ["a"]);
        directory.note_complete(begun);
        assert_eq!(directory.lookup("a", TTL), Lookup::Unknown);
        assert!(directory.complete(TTL).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_listing_is_given_out_again_for_half_of_the_ttl() {
        let mut directory = Directory::default();
        let begun = Instant::now();
        directory.note_page(page(&[("a", 1)]), begun);
        directory.note_complete(begun);
        tokio::time::advance(TTL / 2 - MOMENT).await;
        assert!(directory.complete(TTL).is_some());
        tokio::time::advance(MOMENT).await;
        assert!(directory.complete(TTL).is_none());
        assert!(matches!(directory.lookup("a", TTL), Lookup::Found(..)));
        assert!(directory.complete(Duration::MAX).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn names_that_are_stale_make_way_for_others() {
        let mut directory = Directory::default();
        for round in 0..10 {
            for index in 0..FEW {
                let name = format!("{round}-{index}");
                directory.note(&name, None, Instant::now(), TTL);
            }
            tokio::time::advance(TTL).await;
        }
        assert!(directory.len() <= 2 * FEW, "{}", directory.len());
    }
}
