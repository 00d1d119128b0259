//! Chunks on local disk: named files in a directory that belongs to this mount alone.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::error::WriteError;
use crate::budget::{Budget, Class, Reservation};

/// The spill directory of one mount, locked for as long as the mount lives.
#[derive(Debug)]
pub struct Spill {
    directory: PathBuf,
    budget: Arc<Budget>,
    next: AtomicU64,
    /// Held to keep the lock.
    _lock: File,
}

/// One chunk on disk. Offsets are relative to the chunk's start. Dropping it deletes the file.
#[derive(Debug)]
pub(super) struct SpillFile {
    file: File,
    path: PathBuf,
    reservation: Mutex<Reservation>,
    budget: Arc<Budget>,
}

impl Spill {
    /// Makes a directory of this mount's own below `parent`, for at most `limit` bytes.
    pub fn open(parent: &Path, limit: u64) -> io::Result<Arc<Self>> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
        remove_abandoned(parent);
        for attempt in 0..1000_u32 {
            let directory = parent.join(format!("mount-{}-{attempt}", std::process::id()));
            match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            }
            let mut lock = File::create(directory.join("lock"))?;
            lock.lock()?;
            // Whether the disk takes anything shows now, and not when a program writes.
            if let Err(error) = writeln!(lock, "{}", std::process::id()) {
                let _ = std::fs::remove_file(directory.join("lock"));
                let _ = std::fs::remove_dir(&directory);
                return Err(error);
            }
            return Ok(Arc::new(Self {
                directory,
                budget: Budget::plain(limit),
                next: AtomicU64::new(0),
                _lock: lock,
            }));
        }
        Err(io::Error::other(
            "a thousand spill directories of this process exist already",
        ))
    }

    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// A file for `bytes` bytes, or nothing when the spill's limit is reached.
    pub(super) fn create(&self, bytes: u64) -> Option<Result<SpillFile, WriteError>> {
        let reservation = self.budget.try_reserve(Class::Write, bytes)?;
        let name = format!("chunk-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let path = self.directory.join(name);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        Some(match opened {
            Ok(file) => Ok(SpillFile {
                file,
                path,
                reservation: Mutex::new(reservation),
                budget: Arc::clone(&self.budget),
            }),
            Err(source) => Err(WriteError::Spill {
                path: path.display().to_string(),
                source,
            }),
        })
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        let removed = std::fs::remove_file(self.directory.join("lock"))
            .and_then(|()| std::fs::remove_dir(&self.directory));
        if let Err(error) = removed {
            tracing::warn!(directory = %self.directory.display(), %error,
                "spill directory not removed");
        }
    }
}

/// Removes empty directories of mounts that are gone. One that holds data is kept.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let lock_path = entry.path().join("lock");
        let Ok(lock) = File::open(&lock_path) else {
            continue;
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => continue,
        }
        let only_lock = std::fs::read_dir(entry.path())
            .is_ok_and(|files| files.flatten().all(|file| file.path() == lock_path));
        if only_lock {
            let _ = std::fs::remove_file(&lock_path);
            let _ = std::fs::remove_dir(entry.path());
        } else {
            tracing::warn!(directory = %entry.path().display(),
                "a former mount left unsent data here; it is kept");
        }
    }
}

impl SpillFile {
    fn error(&self, source: io::Error) -> WriteError {
        WriteError::Spill {
            path: self.path.display().to_string(),
            source,
        }
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
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "spill file not removed");
        }
    }
}
