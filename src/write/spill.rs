//! Chunks on local disk: named files in a directory that belongs to this mount alone, and is taken
//! over by the next mount when this one is gone.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::error::WriteError;
use crate::budget::{Budget, Class, Reservation};
use crate::store::checksum;

/// One mount's folder below the spill directory, locked for as long as anybody holds it.
#[derive(Debug)]
pub(super) struct SpillDirectory {
    path: PathBuf,
    /// What is in it stays when its owners go: a mount has to end before everything is sent.
    kept: AtomicBool,
    /// Held to keep the lock.
    _lock: File,
}

/// What a mount may put on local disk, and where.
#[derive(Debug)]
pub struct Spill {
    parent: PathBuf,
    directory: Arc<SpillDirectory>,
    /// Folders taken over from former mounts.
    adopted: Mutex<Vec<Weak<SpillDirectory>>>,
    budget: Arc<Budget>,
    next: AtomicU64,
}

/// One chunk on disk. Offsets are relative to the chunk's start. Dropping it deletes the file, if
/// it is owned and its directory is not kept.
#[derive(Debug)]
pub(super) struct SpillFile {
    file: File,
    name: String,
    directory: Arc<SpillDirectory>,
    /// Deleted with this value.
    owned: AtomicBool,
    reservation: Mutex<Reservation>,
    budget: Arc<Budget>,
}

/// Bytes read at once for a checksum.
const STEP: usize = 1 << 20;
const LOCK: &str = "lock";
/// How the names of mounts' folders begin.
const MOUNT: &str = "mount-";

impl SpillDirectory {
    /// Makes a folder of this process's own.
    fn create(parent: &Path) -> io::Result<Arc<Self>> {
        let name = format!("{}-{:08x}", std::process::id(), rand::random::<u32>());
        // Under another name until it is locked, so that nobody takes it for abandoned.
        let unready = parent.join(format!("unready-{name}"));
        std::fs::DirBuilder::new().mode(0o700).create(&unready)?;
        let made = Self::fill(&unready).inspect_err(|_| {
            let _ = std::fs::remove_dir_all(&unready);
        });
        let lock = made?;
        let path = parent.join(format!("{MOUNT}{name}"));
        std::fs::rename(&unready, &path)?;
        // What is made durable in it must be found after a loss of power.
        File::open(parent)?.sync_all()?;
        Ok(Arc::new(Self {
            path,
            kept: AtomicBool::new(false),
            _lock: lock,
        }))
    }

    /// The lock of a new folder. Whether the disk takes anything shows now, and not when a program
    /// writes.
    fn fill(folder: &Path) -> io::Result<File> {
        let mut lock = File::create(folder.join(LOCK))?;
        lock.lock()?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(lock)
    }

    /// Takes over a folder whose mount is gone; `None` when its mount lives.
    fn adopt(path: PathBuf) -> Option<Arc<Self>> {
        let lock = File::open(path.join(LOCK)).ok()?;
        match lock.try_lock() {
            Ok(()) => Some(Arc::new(Self {
                path,
                kept: AtomicBool::new(false),
                _lock: lock,
            })),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => None,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Files stay from now on, whoever lets go of them.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Makes the names in it durable.
    pub fn synchronise(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    /// Removes a file that nobody needs any more.
    pub fn remove(&self, path: &Path) {
        if self.kept.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "spill file not removed");
        }
    }

    /// The names of the files in it, without the lock's.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != LOCK {
                names.push(name);
            }
        }
        Ok(names)
    }

    #[cfg(test)]
    pub fn for_tests(parent: &Path) -> Arc<Self> {
        Self::create(parent).unwrap()
    }
}

impl Drop for SpillDirectory {
    fn drop(&mut self) {
        // Somebody may wait for the lock's file: it goes last, and only with the folder.
        if self.names().is_ok_and(|names| names.is_empty()) {
            let removed = std::fs::remove_file(self.path.join(LOCK))
                .and_then(|()| std::fs::remove_dir(&self.path));
            if let Err(error) = removed {
                tracing::warn!(directory = %self.path.display(), %error,
                    "spill directory not removed");
            }
        }
    }
}

impl Spill {
    /// Makes a directory of this mount's own below `parent`, for at most `limit` bytes.
    pub fn open(parent: &Path, limit: u64) -> io::Result<Arc<Self>> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
        Ok(Arc::new(Self {
            parent: parent.to_owned(),
            directory: SpillDirectory::create(parent)?,
            adopted: Mutex::default(),
            budget: Budget::plain(limit),
            next: AtomicU64::new(0),
        }))
    }

    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    pub(super) fn directory(&self) -> &Arc<SpillDirectory> {
        &self.directory
    }

    /// Files stay from now on, this mount's and those taken over, whoever lets go of them.
    pub(super) fn keep(&self) {
        self.directory.keep();
        for directory in self.adopted.lock().iter().filter_map(Weak::upgrade) {
            directory.keep();
        }
    }

    /// The folders of mounts that are gone, now this one's. Empty ones are removed on the way.
    pub(super) fn abandoned(&self) -> Vec<Arc<SpillDirectory>> {
        let Ok(entries) = std::fs::read_dir(&self.parent) else {
            return Vec::new();
        };
        let found: Vec<Arc<SpillDirectory>> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(MOUNT))
            .filter(|entry| entry.path() != self.directory.path)
            .filter_map(|entry| SpillDirectory::adopt(entry.path()))
            .filter(|directory| directory.names().is_ok_and(|names| !names.is_empty()))
            .collect();
        let mut adopted = self.adopted.lock();
        adopted.retain(|directory| directory.strong_count() > 0);
        adopted.extend(found.iter().map(Arc::downgrade));
        found
    }

    /// A number that no other file of this directory has in its name.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A file for `bytes` bytes of the draft `id`, or nothing when the spill's limit is reached.
    pub(super) fn create(&self, id: &str, bytes: u64) -> Option<Result<SpillFile, WriteError>> {
        let reservation = self.budget.try_reserve(Class::Write, bytes)?;
        let name = format!("{id}-{}", self.number());
        let path = self.directory.path.join(&name);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        Some(match opened {
            Ok(file) => Ok(SpillFile {
                file,
                name,
                directory: Arc::clone(&self.directory),
                owned: AtomicBool::new(true),
                reservation: Mutex::new(reservation),
                budget: Arc::clone(&self.budget),
            }),
            Err(source) => Err(WriteError::Spill {
                path: path.display().to_string(),
                source,
            }),
        })
    }

    /// A chunk of a former mount, which is not deleted with the value before [`SpillFile::own`].
    /// Its bytes are on the disk already: they count, even beyond the limit.
    pub(super) fn adopt(
        &self,
        directory: &Arc<SpillDirectory>,
        name: &str,
    ) -> io::Result<SpillFile> {
        let path = directory.path.join(name);
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let reservation = self
            .budget
            .reserve_regardless(Class::Write, file.metadata()?.len());
        Ok(SpillFile {
            file,
            name: name.to_owned(),
            directory: Arc::clone(directory),
            owned: AtomicBool::new(false),
            reservation: Mutex::new(reservation),
            budget: Arc::clone(&self.budget),
        })
    }
}

impl SpillFile {
    fn error(&self, source: io::Error) -> WriteError {
        WriteError::Spill {
            path: self.path().display().to_string(),
            source,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path.join(&self.name)
    }

    /// Deletes it with this value from now on.
    pub fn own(&self) {
        self.owned.store(true, Ordering::Relaxed);
    }

    /// Its name within the directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn write(&self, data: &[u8], offset: u64) -> Result<(), WriteError> {
        self.file
            .write_all_at(data, offset)
            .map_err(|error| self.error(error))
    }

    pub fn read(&self, data: &mut [u8], offset: u64) -> Result<(), WriteError> {
        self.file
            .read_exact_at(data, offset)
            .map_err(|error| self.error(error))
    }

    /// CRC32C of a range.
    pub fn checksum(&self, range: Range<u64>) -> Result<u32, WriteError> {
        let mut crc = checksum::crc32c(&[]);
        let mut buffer = vec![0; STEP.min((range.end - range.start) as usize)];
        let mut at = range.start;
        while at < range.end {
            let length = buffer.len().min((range.end - at) as usize);
            self.read(&mut buffer[..length], at)?;
            crc = checksum::crc32c_update(crc, &buffer[..length]);
            at += length as u64;
        }
        Ok(crc)
    }

    pub fn synchronise(&self) -> Result<(), WriteError> {
        self.file.sync_data().map_err(|error| self.error(error))
    }

    /// Makes room for the chunk to be `bytes` long; false when the spill's limit is reached.
    pub fn grow(&self, bytes: u64) -> bool {
        let mut reservation = self.reservation.lock();
        if bytes <= reservation.bytes() {
            return true;
        }
        let more = self
            .budget
            .try_reserve(Class::Write, bytes - reservation.bytes());
        more.is_some_and(|more| {
            reservation.merge(more);
            true
        })
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        if *self.owned.get_mut() {
            self.directory.remove(&self.path());
        }
    }
}
