//! Keeping the cache under its limit: what is there, and what has to go.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::version::{GONE, NEW, make_folder, remove, usage};

/// When something has to go, this share of the limit is made free, so that not every write has to
/// look for room.
const FREED_SHARE: u64 = 8;
/// What other mounts have added is seen by looking again after having written this share of the
/// limit. With several mounts on one directory the limit may be exceeded by this share for each
/// but the first.
const LOOK_SHARE: u64 = 16;
/// Bytes that a write may take beyond its own: a folder, an identity, pages of the index.
const OVERHEAD: u64 = 64 * 1024;
/// When nothing could be made free for a version, how long to believe that.
const FULL: Duration = Duration::from_secs(10);
/// A folder that has been in the making for so long was left behind by a process that is gone.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Locked by whoever deletes. Not named as the spill's, which takes folders with a `lock` for its
/// own, should both be told the same folder.
const LOCK: &str = "eviction";

/// What a cache folder holds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CacheUsage {
    /// Versions of objects, each whole or in part.
    pub versions: usize,
    /// Bytes of disk.
    pub bytes: u64,
    /// When the version that was used longest ago was used, seconds since 1970.
    pub oldest_use: Option<u64>,
}

/// A version on disk.
#[derive(Debug)]
struct Kept {
    name: String,
    bytes: u64,
    used: SystemTime,
}

/// The room that the cache takes on disk. Used by one thread.
#[derive(Debug)]
pub(super) struct Space {
    root: PathBuf,
    /// Bytes.
    limit: u64,
    /// Bytes on disk: as last seen, and what this process has added since.
    used: u64,
    /// Bytes that may be added before looking again.
    unseen: u64,
    /// The version for which there was no room, and when.
    full: Option<(String, Instant)>,
}

impl Space {
    /// Looks at nothing yet: the first call of [`Self::room`] does.
    pub fn new(root: &Path, limit: u64) -> Self {
        Self {
            root: root.to_owned(),
            limit,
            used: 0,
            unseen: 0,
            full: None,
        }
    }

    /// Bytes on disk.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// `bytes` more are on disk now.
    pub fn add(&mut self, bytes: u64) {
        self.used += bytes;
        self.unseen = self.unseen.saturating_sub(bytes);
    }

    /// Makes room for `bytes` more of the version `name`, which itself stays. Returns whether
    /// there is room; never waits for another process. Those that had to go are added to `gone`.
    pub fn room(&mut self, bytes: u64, name: &str, gone: &mut Vec<String>) -> io::Result<bool> {
        let bytes = bytes + OVERHEAD;
        if self.used + bytes <= self.limit && self.unseen > 0 {
            return Ok(true);
        }
        let believed = |(full, since): &(String, Instant)| full == name && since.elapsed() < FULL;
        if self.full.as_ref().is_some_and(believed) {
            return Ok(false);
        }
        let Some(_lock) = self.lock()? else {
            return Ok(false);
        };
        self.evict(bytes, name, gone)?;
        let fits = self.used + bytes <= self.limit;
        self.full = (!fits).then(|| (name.to_owned(), Instant::now()));
        Ok(fits)
    }

    /// What is there.
    pub fn usage(&self) -> io::Result<CacheUsage> {
        Ok(CacheUsage::of(&self.look()?))
    }

    /// Deletes every version, and tells what that was; `None` while another process deletes.
    pub fn clear(&self) -> io::Result<Option<CacheUsage>> {
        let Some(_lock) = self.lock()? else {
            return Ok(None);
        };
        let kept = self.look()?;
        for version in &kept {
            remove(&self.root, &version.name)?;
        }
        Ok(Some(CacheUsage::of(&kept)))
    }

    /// Looks at what there is, and deletes the least recently used versions while it is too much.
    fn evict(&mut self, bytes: u64, name: &str, gone: &mut Vec<String>) -> io::Result<()> {
        let mut kept = self.look()?;
        self.used = kept.iter().map(|version| version.bytes).sum();
        self.unseen = (self.limit / LOOK_SHARE).max(1);
        if self.used + bytes <= self.limit {
            return Ok(());
        }
        kept.sort_by_key(|version| version.used);
        let enough = self.limit - self.limit / FREED_SHARE;
        for version in kept.iter().filter(|version| version.name != name) {
            if self.used + bytes <= enough {
                break;
            }
            remove(&self.root, &version.name)?;
            self.used -= version.bytes;
            gone.push(version.name.clone());
        }
        Ok(())
    }

    /// Every version and what it takes; removes what processes that are gone left half done.
    fn look(&self) -> io::Result<Vec<Kept>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&self.root)? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let Ok(kept) = Kept::of(&path, name) else {
                // Not a folder, or gone meanwhile.
                continue;
            };
            let old = kept.used.elapsed().is_ok_and(|age| age > ABANDONED);
            if name.starts_with(GONE) || name.starts_with(NEW) && old {
                let _ = std::fs::remove_dir_all(&path);
            } else if !name.starts_with(NEW) {
                all.push(kept);
            }
        }
        Ok(all)
    }

    /// Held by whoever deletes; `None` when that is another process.
    fn lock(&self) -> io::Result<Option<File>> {
        // Somebody may have emptied the cache folder.
        make_folder(&self.root)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.root.join(LOCK))?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(lock)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl CacheUsage {
    fn of(kept: &[Kept]) -> Self {
        let oldest = kept.iter().map(|version| version.used).min();
        let since = |used: SystemTime| used.duration_since(UNIX_EPOCH).ok();
        Self {
            versions: kept.len(),
            bytes: kept.iter().map(|version| version.bytes).sum(),
            oldest_use: oldest.and_then(since).map(|since| since.as_secs()),
        }
    }
}

impl Kept {
    fn of(path: &Path, name: &str) -> io::Result<Self> {
        let folder = path.symlink_metadata()?;
        let mut bytes = usage(&folder);
        let mut used = folder.modified()?;
        for file in std::fs::read_dir(path)? {
            let file = file?;
            let metadata = file.metadata()?;
            bytes += usage(&metadata);
            if file.file_name() == "index" {
                used = metadata.modified()?;
            }
        }
        Ok(Self {
            name: name.to_owned(),
            bytes,
            used,
        })
    }
}

/// Bytes of disk that the version `name` takes, folder and identity included.
pub(super) fn folder_usage(root: &Path, name: &str) -> io::Result<u64> {
    Ok(Kept::of(&root.join(name), name)?.bytes)
}
