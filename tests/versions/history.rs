//! What a file has been: what a reader of it may get, and what not.

use std::ops::Range;

use mlfs::vfs::VfsError;

use super::content::{content, told};

/// One name's versions, in the order they came.
pub struct History {
    name: &'static str,
    versions: Vec<Vec<u8>>,
    /// The one that the store has.
    current: Option<usize>,
    /// Versions there were when it was deleted last.
    deleted: usize,
    /// What the store had, at one time or another, since the mount was made.
    shown: Vec<usize>,
    /// Whether it had nothing, at one time or another, since then.
    absent: bool,
}

impl History {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            versions: Vec::new(),
            current: None,
            deleted: 0,
            shown: Vec::new(),
            absent: true,
        }
    }

    /// Adds a version of `size` bytes, or as large as the one before, and returns its bytes.
    pub fn overwrite(&mut self, size: Option<u64>) -> &[u8] {
        let version = self.versions.len();
        let before = self.versions.last().map_or(0, Vec::len) as u64;
        let bytes = content(self.name, version, size.unwrap_or(before));
        self.current = Some(version);
        self.shown.push(version);
        self.versions.push(bytes);
        &self.versions[version]
    }

    pub fn delete(&mut self) {
        self.current = None;
        self.deleted = self.versions.len();
        self.absent = true;
    }

    /// A new mount knows nothing of the past.
    pub fn remounted(&mut self) {
        self.shown = self.current.into_iter().collect();
        self.absent = self.current.is_none();
    }

    pub fn current(&self) -> Option<&[u8]> {
        self.current.map(|version| &self.versions[version][..])
    }

    /// The versions that a lookup may have found, by the size that it told; `None`: it found nothing.
    pub fn looked_up(&self, size: Option<u64>, forever: bool) -> Result<Vec<usize>, String> {
        let possible: Vec<usize> = match forever {
            true => self.shown.clone(),
            false => self.current.into_iter().collect(),
        };
        let Some(size) = size else {
            let absent = self.current.is_none() || forever && self.absent;
            return match absent {
                true => Ok(Vec::new()),
                false => Err(format!("{} is not found", self.name)),
            };
        };
        let of_size = |version: &usize| self.versions[*version].len() as u64 == size;
        let found: Vec<usize> = possible.iter().copied().filter(of_size).collect();
        match found.is_empty() {
            true => Err(format!(
                "{} has {size} bytes, as none of {possible:?} has",
                self.name
            )),
            false => Ok(found),
        }
    }

    /// Those of `versions` that what was read of `range` may be of; fails where it is of none, or
    /// is an error that has no reason.
    pub fn check(
        &self,
        versions: &[usize],
        range: Range<u64>,
        outcome: Result<Vec<u8>, VfsError>,
    ) -> Result<Vec<usize>, String> {
        let name = self.name;
        let bytes = match outcome {
            Ok(bytes) => bytes,
            Err(error) => {
                let replaced = versions.iter().any(|it| Some(*it) != self.current);
                let deleted = versions.iter().any(|version| *version < self.deleted);
                let excused = match error.errno {
                    libc::ESTALE => replaced,
                    libc::ENOENT => deleted,
                    _ => false,
                };
                return match excused {
                    true => Ok(versions.to_vec()),
                    false => Err(format!("reading {range:?} of {name} {versions:?}: {error}")),
                };
            }
        };
        let matching = |version: &usize| self.part(*version, &range) == bytes;
        let found: Vec<usize> = versions.iter().copied().filter(matching).collect();
        match found.is_empty() {
            true => Err(self.described(versions, range, &bytes)),
            false => Ok(found),
        }
    }

    fn part(&self, version: usize, range: &Range<u64>) -> &[u8] {
        let bytes = &self.versions[version];
        let at = |offset: u64| (offset as usize).min(bytes.len());
        &bytes[at(range.start)..at(range.end)]
    }

    fn described(&self, versions: &[usize], range: Range<u64>, bytes: &[u8]) -> String {
        let name = self.name;
        let mut words = Vec::new();
        for version in versions {
            let expected = self.part(*version, &range);
            if expected.len() != bytes.len() {
                words.push(format!("{} bytes for {}", bytes.len(), expected.len()));
            }
            let differs = expected
                .iter()
                .zip(bytes)
                .position(|(one, other)| one != other);
            if let Some(position) = differs {
                // From the beginning of its word on.
                let place = range.start + position as u64;
                let word = position.saturating_sub((place % 8) as usize);
                let word = &bytes[word..bytes.len().min(word + 8)];
                words.push(format!("at {place} stands {}", told(word)));
            }
        }
        format!(
            "{range:?} of {name} is of none of {versions:?}: {}",
            words.join("; ")
        )
    }
}
