//! Single files: what they are, and how one takes its name.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::store::{Condition, ETag, ObjectMeta, StoreError, StoreResult, Stored};

/// How MLflow marks files of a local directory that are being written; it shows none of them.
pub(super) const HIDDEN: &str = ".artifact.uploading.";

/// The file of a key.
pub(super) fn path_of(key: &str) -> PathBuf {
    Path::new("/").join(key)
}

/// What an object is called in messages.
pub(super) fn object(key: &str) -> String {
    format!("file:///{key}")
}

/// The version of a file: it changes with whatever changes its content.
pub(super) fn version(metadata: &Metadata) -> ETag {
    let time = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    let (inode, size) = (metadata.ino(), metadata.size());
    ETag::new(format!("\"{inode:x}-{size:x}-{time:x}\""))
}

pub(super) fn meta(key: String, metadata: &Metadata) -> ObjectMeta {
    ObjectMeta {
        key,
        size: metadata.size(),
        etag: Some(version(metadata)),
        modified: metadata.modified().ok(),
    }
}

/// What an error of the file system means to whoever asks a store.
pub(super) fn explain(key: &str) -> impl Fn(io::Error) -> StoreError {
    let object = object(key);
    move |error| {
        let object = object.clone();
        let detail = error.to_string();
        match error.kind() {
            _ if is_absence(&error) => StoreError::NotFound { object },
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                StoreError::PermissionDenied { object, detail }
            }
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                StoreError::Full { object, detail }
            }
            ErrorKind::FileTooLarge => StoreError::TooLarge { object, detail },
            ErrorKind::InvalidFilename => StoreError::InvalidName { object, detail },
            _ => StoreError::Other { object, detail },
        }
    }
}

/// Nothing is there; below a file neither.
pub(super) fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

pub(super) fn head(key: &str) -> StoreResult<ObjectMeta> {
    let metadata = path_of(key).metadata().map_err(explain(key))?;
    if metadata.is_file() && !key.ends_with('/') {
        Ok(meta(key.to_owned(), &metadata))
    } else {
        Err(StoreError::NotFound {
            object: object(key),
        })
    }
}

/// Removes a file, or an empty directory whose key ends in a slash.
pub(super) fn delete(key: &str) -> StoreResult<()> {
    let path = path_of(key);
    let outcome = if key.ends_with('/') {
        fs::remove_dir(path)
    } else {
        fs::remove_file(path)
    };
    match outcome {
        Err(error) => match error.kind() {
            ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::DirectoryNotEmpty => Ok(()),
            _ => Err(explain(key)(error)),
        },
        Ok(()) => Ok(()),
    }
}

/// Gives a version of a file a second name, without moving a byte where that can be.
pub(super) fn copy(source: &ObjectMeta, target: &str, names: &Mutex<()>) -> StoreResult<Stored> {
    if target.ends_with('/') {
        let path = path_of(target);
        make_directories(&path).map_err(explain(target))?;
        return Ok(Stored {
            etag: None,
            size: 0,
            modified: None,
        });
    }
    let found = head(&source.key)?;
    if source.etag.is_some() && source.etag != found.etag {
        return Err(StoreError::Changed {
            object: object(&source.key),
        });
    }
    let from = path_of(&source.key);
    let mut staged = Staged::name(target)?;
    if fs::hard_link(&from, &staged.temporary).is_err() {
        // Another disk, or one that knows no links.
        fs::copy(&from, &staged.temporary).map_err(explain(target))?;
    }
    staged.file = Some(File::open(&staged.temporary).map_err(explain(target))?);
    staged.publish(&Condition::Always, names)
}

/// A file that has no name yet under which anybody looks for it; removed unless it is published.
#[derive(Debug)]
pub(super) struct Staged {
    key: String,
    temporary: PathBuf,
    file: Option<File>,
    /// It is somebody else's to remove.
    kept: bool,
}

impl Staged {
    /// A new file beside the one that it will be.
    pub fn create(key: &str) -> StoreResult<Self> {
        let mut staged = Self::name(key)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&staged.temporary);
        staged.file = Some(file.map_err(explain(key))?);
        Ok(staged)
    }

    /// A file that was written elsewhere on the same disk, and stays there if it is not published.
    pub fn of(key: &str, temporary: PathBuf, file: File) -> Self {
        Self {
            key: key.to_owned(),
            temporary,
            file: Some(file),
            kept: true,
        }
    }

    fn name(key: &str) -> StoreResult<Self> {
        let directory = directory_of(key);
        make_directories(&directory).map_err(about_parents(key))?;
        let name = format!("{HIDDEN}mlfs-{:016x}", rand::random::<u64>());
        Ok(Self {
            key: key.to_owned(),
            temporary: directory.join(name),
            file: None,
            kept: false,
        })
    }

    pub fn write(&self, bytes: &[u8]) -> StoreResult<()> {
        match &self.file {
            Some(file) => file.write_all_at(bytes, 0).map_err(explain(&self.key)),
            None => Ok(()),
        }
    }

    /// Makes the file durable and gives it its name, if what is there now allows it.
    pub fn publish(mut self, condition: &Condition, names: &Mutex<()>) -> StoreResult<Stored> {
        let Some(file) = self.file.take() else {
            return Err(explain(&self.key)(io::Error::from(ErrorKind::NotFound)));
        };
        file.sync_all().map_err(explain(&self.key))?;
        let target = path_of(&self.key);
        {
            let _names = names.lock();
            self.check(condition)?;
            fs::rename(&self.temporary, &target).map_err(|error| {
                if matches!(
                    error.kind(),
                    ErrorKind::IsADirectory | ErrorKind::DirectoryNotEmpty
                ) {
                    return StoreError::InvalidName {
                        object: object(&self.key),
                        detail: "a directory has this name".to_owned(),
                    };
                }
                explain(&self.key)(error)
            })?;
        }
        synchronise(&directory_of(&self.key)).map_err(explain(&self.key))?;
        let metadata = file.metadata().map_err(explain(&self.key))?;
        let meta = meta(String::new(), &metadata);
        Ok(Stored {
            etag: meta.etag,
            size: meta.size,
            modified: meta.modified,
        })
    }

    fn check(&self, condition: &Condition) -> StoreResult<()> {
        let expected = match condition {
            Condition::Always => return Ok(()),
            Condition::IfAbsent => None,
            Condition::IfMatch(etag) => Some(etag),
        };
        let found = match head(&self.key) {
            Ok(found) => found.etag,
            Err(StoreError::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        if found.as_ref() == expected {
            Ok(())
        } else {
            Err(StoreError::Conflict {
                object: object(&self.key),
            })
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a rename nothing is there; two links to one file are not renamed onto each other.
        if !self.kept {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The directory a key's file is in.
pub(super) fn directory_of(key: &str) -> PathBuf {
    let path = path_of(key);
    path.parent().map_or_else(|| path.clone(), Path::to_owned)
}

/// Makes a directory and those above it, each durable in the one above.
pub(super) fn make_directories(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Ok(()) => synchronise(path.parent().unwrap_or(path)),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let Some(above) = path.parent() else {
                return Err(error);
            };
            make_directories(above)?;
            match fs::create_dir(path) {
                Ok(()) => synchronise(above),
                // Somebody else was faster.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                Err(error) => Err(error),
            }
        }
        Err(error) if path.is_dir() => {
            // Also where nobody may make any, as at the root of a read-only disk.
            drop(error);
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Err(io::Error::from(ErrorKind::NotADirectory))
        }
        Err(error) => Err(error),
    }
}

/// As [`explain`], but that a file stands where a directory is needed is no absence.
pub(super) fn about_parents(key: &str) -> impl Fn(io::Error) -> StoreError {
    let key = key.to_owned();
    move |error| {
        if error.kind() == ErrorKind::NotADirectory {
            return StoreError::InvalidName {
                object: object(&key),
                detail: "a file stands where a directory is needed".to_owned(),
            };
        }
        explain(&key)(error)
    }
}

/// Makes what was done in a directory durable.
pub(super) fn synchronise(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
