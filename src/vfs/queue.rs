//! In which order closed files become visible.
//!
//! Files of one directory are published one after the other, in the order of their closes;
//! directories go side by side. A **manifest**, whose presence makes programs load the directory,
//! comes last: after everything else that is dirty in its directory and below. What has failed and
//! waits for a word holds up manifests, and nobody else.
//!
//! The queue knows paths and numbers, and nothing of files, stores or time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// What a file is to its directory. Of two files of one directory the one of lower rank goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    Ordinary,
    /// `*.index.json`: names the shards of a checkpoint.
    Index,
    /// `MLmodel`: makes an MLflow model of a directory.
    Model,
}

impl Rank {
    /// The rank of a file, by its name or path.
    pub fn of(path: &str) -> Self {
        let name = path.rsplit('/').next().unwrap_or_default();
        match name {
            "MLmodel" => Self::Model,
            name if name.ends_with(".index.json") => Self::Index,
            _ => Self::Ordinary,
        }
    }

    /// Whether everything else of its directory comes first.
    pub fn is_manifest(self) -> bool {
        self > Self::Ordinary
    }
}

/// Where an item stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Waiting,
    /// Being published.
    Trying,
    /// It could not be published, and waits for a word.
    Failed,
}

#[derive(Debug)]
struct Entry {
    path: String,
    sequence: u64,
    standing: Standing,
    /// Somebody waits for it: an open file must not hold it up.
    urgent: bool,
    /// It was closed again while it was being published: its place after that.
    again: Option<u64>,
}

impl Entry {
    fn place(&self) -> (Rank, u64) {
        (Rank::of(&self.path), self.sequence)
    }
}

/// What is closed and not stored, in the order in which it is to be published.
#[derive(Debug)]
pub struct Queue<K> {
    entries: HashMap<K, Entry>,
    /// By directory; in each the next one first.
    lanes: BTreeMap<String, BTreeMap<(Rank, u64), K>>,
    trying: usize,
    /// Most items that are tried at once.
    most: usize,
    next: u64,
}

fn directory_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

impl<K: Clone + Eq + Hash> Queue<K> {
    /// A queue that has at most `most` items tried at once.
    pub fn new(most: usize) -> Self {
        Self {
            entries: HashMap::new(),
            lanes: BTreeMap::new(),
            trying: 0,
            most: most.max(1),
            next: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn standing(&self, key: &K) -> Option<Standing> {
        self.entries.get(key).map(|entry| entry.standing)
    }

    pub fn is_urgent(&self, key: &K) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.urgent)
    }

    /// Whether something is being published, or about to be.
    pub fn is_moving(&self) -> bool {
        self.trying > 0
    }

    /// The file at `path` was closed: it goes behind what was closed before.
    pub fn add(&mut self, key: K, path: &str, urgent: bool) {
        let sequence = self.next;
        self.next += 1;
        if let Some(entry) = self.entries.get_mut(&key)
            && entry.standing == Standing::Trying
        {
            entry.again = Some(sequence);
            entry.urgent |= urgent;
            self.moved(&key, path);
            return;
        }
        let urgent = urgent || self.is_urgent(&key);
        self.remove(&key);
        let entry = Entry {
            path: path.to_owned(),
            sequence,
            standing: Standing::Waiting,
            urgent,
            again: None,
        };
        self.insert(key, entry);
    }

    /// Something at `path` that cannot be published without a word.
    pub fn add_failed(&mut self, key: K, path: &str) {
        self.add(key.clone(), path, false);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.standing = Standing::Failed;
        }
    }

    /// What failed is tried again, in its old place.
    pub fn retry(&mut self, key: &K) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.standing == Standing::Failed
        {
            entry.standing = Standing::Waiting;
        }
    }

    /// The file has another path.
    pub fn moved(&mut self, key: &K, path: &str) {
        if let Some(mut entry) = self.take(key) {
            path.clone_into(&mut entry.path);
            self.insert(key.clone(), entry);
        }
    }

    /// The file is gone, or nobody wants it any more.
    pub fn remove(&mut self, key: &K) {
        self.take(key);
    }

    /// The file at `path` is stored: versions of it that had failed matter no more.
    pub fn supersede(&mut self, path: &str, older: impl Fn(&K) -> bool) {
        let Some(lane) = self.lanes.get(directory_of(path)) else {
            return;
        };
        let failed = lane.values().find(|key| {
            older(key)
                && self
                    .entries
                    .get(key)
                    .is_some_and(|entry| entry.standing == Standing::Failed && entry.path == path)
        });
        if let Some(key) = failed.cloned() {
            self.remove(&key);
        }
    }

    /// What is to be published now; from here on it counts as being tried, until
    /// [`Self::finished`]. `dirty_below` tells whether a directory has, in it or below, something
    /// dirty that is not in the queue, as its last argument tells, and comes before a manifest of
    /// that rank.
    pub fn ready(
        &mut self,
        mut dirty_below: impl FnMut(&str, Rank, &dyn Fn(&K) -> bool) -> bool,
    ) -> Vec<K> {
        if self.trying >= self.most {
            return Vec::new();
        }
        let mut found: Vec<(u64, K)> = Vec::new();
        let queued = |key: &K| self.entries.contains_key(key);
        for (directory, lane) in &self.lanes {
            let next = self.next_of(directory, lane);
            let Some((key, entry)) = next else { continue };
            let rank = Rank::of(&entry.path);
            let held = rank.is_manifest() && !entry.urgent && dirty_below(directory, rank, &queued);
            if !held {
                found.push((entry.sequence, key.clone()));
            }
        }
        // Who has waited longest first, so that no directory waits for ever.
        found.sort_by_key(|(sequence, _)| *sequence);
        found.truncate(self.most - self.trying);
        let found: Vec<K> = found.into_iter().map(|(_, key)| key).collect();
        for key in &found {
            if let Some(entry) = self.entries.get_mut(key) {
                entry.standing = Standing::Trying;
                self.trying += 1;
            }
        }
        found
    }

    /// The first of a directory, if the queue does not hold it up.
    fn next_of<'a>(
        &'a self,
        directory: &str,
        lane: &'a BTreeMap<(Rank, u64), K>,
    ) -> Option<(&'a K, &'a Entry)> {
        let mut failed = false;
        for ((rank, _), key) in lane {
            let entry = self.entries.get(key)?;
            match entry.standing {
                Standing::Trying => return None,
                Standing::Failed => failed = true,
                Standing::Waiting if rank.is_manifest() => {
                    let held = failed || self.first_below(directory).is_some();
                    return (!held).then_some((key, entry));
                }
                Standing::Waiting => return Some((key, entry)),
            }
        }
        None
    }

    /// Something in a directory below.
    fn first_below(&self, directory: &str) -> Option<&K> {
        let prefix = format!("{directory}/");
        let (found, lane) = self.lanes.range(prefix.clone()..).next()?;
        let below = found.starts_with(&prefix);
        below.then(|| lane.values().next()).flatten()
    }

    /// What a waiting manifest waits for: another item, one that has failed if there is one.
    pub fn held_by(&self, key: &K) -> Option<&K> {
        let entry = self.entries.get(key)?;
        if entry.standing != Standing::Waiting || !Rank::of(&entry.path).is_manifest() {
            return None;
        }
        self.first_before(&entry.path, entry.place())
    }

    /// What a manifest would wait for that came to be at `path` now.
    pub fn before(&self, path: &str) -> Option<Standing> {
        self.standing(self.first_before(path, (Rank::of(path), 0))?)
    }

    fn first_before(&self, path: &str, place: (Rank, u64)) -> Option<&K> {
        let directory = directory_of(path);
        let prefix = format!("{directory}/");
        let lane = self.lanes.get(directory);
        let before = lane.into_iter().flat_map(|lane| lane.range(..place));
        let below = self.lanes.range(prefix.clone()..);
        let below = below.take_while(|(directory, _)| directory.starts_with(&prefix));
        let below = below.flat_map(|(_, lane)| lane);
        let all = before.chain(below).map(|(_, key)| key);
        // The first that has failed, else the first.
        all.min_by_key(|key| Reverse(self.standing(key) == Some(Standing::Failed)))
    }

    /// Whether it stands behind something that has failed, directly or through others.
    pub fn is_stuck(&self, key: &K) -> bool {
        let mut at = key;
        // A manifest waits for one of lower rank, or deeper down: this ends.
        while let Some(held) = self.held_by(at) {
            if self.standing(held) == Some(Standing::Failed) {
                return true;
            }
            at = held;
        }
        false
    }

    pub fn path(&self, key: &K) -> Option<&str> {
        self.entries.get(key).map(|entry| entry.path.as_str())
    }

    /// What was ready has been tried. `done` means that nothing is left to do for it: it is stored,
    /// gone, or being written to again.
    pub fn finished(&mut self, key: &K, done: bool) {
        self.trying = self.trying.saturating_sub(1);
        let Some(mut entry) = self.take(key) else {
            return;
        };
        match entry.again.take() {
            Some(sequence) => {
                entry.sequence = sequence;
                entry.standing = Standing::Waiting;
            }
            None if done => return,
            None => {
                entry.standing = Standing::Failed;
                entry.urgent = false;
            }
        }
        self.insert(key.clone(), entry);
    }

    fn insert(&mut self, key: K, entry: Entry) {
        let directory = directory_of(&entry.path).to_owned();
        let lane = self.lanes.entry(directory).or_default();
        lane.insert(entry.place(), key.clone());
        self.entries.insert(key, entry);
    }

    fn take(&mut self, key: &K) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        let directory = directory_of(&entry.path);
        if let Some(lane) = self.lanes.get_mut(directory) {
            lane.remove(&entry.place());
            if lane.is_empty() {
                self.lanes.remove(directory);
            }
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
