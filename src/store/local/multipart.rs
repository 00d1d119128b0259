//! Uploads in parts: a hidden directory beside the file that they will be.
//!
//! Parts as large as the first one lie in one file, each at its place, so that little is copied at
//! the end: the last part, and those that came before the first. These have files of their own. A
//! part counts once its note is there, which tells what it is; its bytes are durable before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::files::{
    HIDDEN, Staged, about_parents, directory_of, explain, make_directories, object,
};
use crate::store::{Condition, ETag, PartReceipt, Payload, StoreError, StoreResult, Stored};

/// Holds the size of a place, decimal.
const PLACE: &str = "place";
/// The file of places.
const DATA: &str = "data";
/// Holds the name of the file that is about to become the object: once that is gone, it has.
const ASSEMBLED: &str = "assembled";

/// What is noted of a part.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    size: u64,
    crc32c: u32,
    /// In the file of places, or in its own.
    placed: bool,
}

impl Note {
    fn receipt(&self, number: u32) -> PartReceipt {
        PartReceipt {
            number,
            size: self.size,
            etag: ETag::new(format!("\"{:08x}-{}\"", self.crc32c, self.size)),
            crc32c: Some(self.crc32c),
        }
    }
}

/// An upload that has begun.
#[derive(Debug)]
pub(super) struct Upload {
    key: String,
    upload_id: String,
    directory: PathBuf,
}

/// Begins an upload and returns its id.
pub(super) fn create(key: &str) -> StoreResult<String> {
    let upload_id = format!("{:032x}", rand::random::<u128>());
    let directory = directory(key, &upload_id);
    make_directories(&directory).map_err(about_parents(key))?;
    Ok(upload_id)
}

fn directory(key: &str, upload_id: &str) -> PathBuf {
    directory_of(key).join(format!("{HIDDEN}mlfs-{upload_id}"))
}

impl Upload {
    /// # Errors
    /// `UploadGone` when there is none of this id.
    pub fn open(key: &str, upload_id: &str) -> StoreResult<Self> {
        let upload = Self {
            key: key.to_owned(),
            upload_id: upload_id.to_owned(),
            directory: directory(key, upload_id),
        };
        let is_id = upload_id.bytes().all(|letter| letter.is_ascii_hexdigit());
        if is_id && upload.directory.is_dir() && !upload.is_completed() {
            Ok(upload)
        } else {
            Err(upload.gone())
        }
    }

    /// Whether its file has become the object, and only what it leaves is here.
    fn is_completed(&self) -> bool {
        fs::read_to_string(self.directory.join(ASSEMBLED))
            .is_ok_and(|name| !self.directory.join(name).exists())
    }

    /// Stores a part, in place of what was sent under its number before.
    pub fn store(
        &self,
        number: u32,
        payload: &Payload,
        names: &Mutex<()>,
    ) -> StoreResult<PartReceipt> {
        let stored = self.write(number, payload, names);
        stored.map_err(|error| self.explain(error))
    }

    fn write(&self, number: u32, payload: &Payload, names: &Mutex<()>) -> io::Result<PartReceipt> {
        let size = payload.bytes.len() as u64;
        let place = {
            let _names = names.lock();
            self.place(number, size)?
        };
        // As long as its bytes are neither the old nor the new ones it does not count.
        remove(&self.note(number))?;
        let placed = place == Some(size);
        let (path, at) = if placed {
            remove(&self.own(number))?;
            (self.directory.join(DATA), offset(number, size))
        } else {
            (self.own(number), 0)
        };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(!placed)
            .open(path)?;
        file.write_all_at(&payload.bytes, at)?;
        file.sync_data()?;
        let note = Note {
            size,
            crc32c: payload.crc32c,
            placed,
        };
        self.replace(&self.note(number), &serde_json::to_vec(&note)?)?;
        Ok(note.receipt(number))
    }

    /// The size of a place: that of the part with the first number, once it is here.
    fn place(&self, number: u32, size: u64) -> io::Result<Option<u64>> {
        let path = self.directory.join(PLACE);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let damaged = |_| io::Error::other(format!("{}: damaged", path.display()));
                text.parse().map(Some).map_err(damaged)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if number != 1 {
                    return Ok(None);
                }
                self.replace(&path, size.to_string().as_bytes())?;
                Ok(Some(size))
            }
            Err(error) => Err(error),
        }
    }

    /// A small file, whole or not at all.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(temporary, path)
    }

    /// The parts that are there, in order.
    pub fn parts(&self) -> StoreResult<Vec<PartReceipt>> {
        let notes = self.notes().map_err(|error| self.explain(error))?;
        let parts = notes.iter().map(|(number, note)| note.receipt(*number));
        Ok(parts.collect())
    }

    fn notes(&self) -> io::Result<Vec<(u32, Note)>> {
        let mut notes = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            notes.push((
                number,
                serde_json::from_slice(&fs::read(self.note(number))?)?,
            ));
        }
        notes.sort_by_key(|(number, _)| *number);
        Ok(notes)
    }

    /// Makes the object of the parts that were told; what is left is to be removed.
    pub fn complete(
        &self,
        parts: &[PartReceipt],
        condition: &Condition,
        names: &Mutex<()>,
    ) -> StoreResult<Stored> {
        let held = self.notes().map_err(|error| self.explain(error))?;
        let mut notes = Vec::with_capacity(parts.len());
        for part in parts {
            let found = held.binary_search_by_key(&part.number, |(number, _)| *number);
            let note = found.ok().and_then(|index| held.get(index));
            match note {
                Some((number, note)) if note.receipt(*number).etag == part.etag => {
                    notes.push((*number, note));
                }
                _ => {
                    return Err(StoreError::PartsDiffer {
                        object: object(&self.key),
                        detail: format!("part {}", part.number),
                    });
                }
            }
        }
        let (path, file) = self.assemble(&notes).map_err(|error| self.explain(error))?;
        Staged::of(&self.key, path, file).publish(condition, names)
    }

    /// A file of the parts, and where it is; noted, so that a crash cannot make it anew of nothing.
    fn assemble(&self, notes: &[(u32, &Note)]) -> io::Result<(PathBuf, File)> {
        let total: u64 = notes.iter().map(|(_, note)| note.size).sum();
        let last = notes.len().saturating_sub(1);
        let place = self.place(0, 0)?.unwrap_or(0);
        let fits = notes.iter().enumerate().all(|(index, (number, note))| {
            *number as usize == index + 1
                && (note.size == place || (index == last && note.size < place))
        });
        // Parts of many sizes, or with some left out: one after the other, anew.
        let name = if fits { DATA } else { "whole" };
        let path = self.directory.join(name);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(!fits)
            .truncate(!fits)
            .open(&path)?;
        let mut at = 0;
        for (number, note) in notes {
            if !(fits && note.placed) {
                let (path, from) = if note.placed {
                    (self.directory.join(DATA), offset(*number, place))
                } else {
                    (self.own(*number), 0)
                };
                let mut part = File::open(path)?;
                part.seek(SeekFrom::Start(from))?;
                file.seek(SeekFrom::Start(at))?;
                let copied = io::copy(&mut part.take(note.size), &mut file)?;
                if copied != note.size {
                    return Err(io::Error::other(format!("part {number} was cut off")));
                }
            }
            at += note.size;
        }
        file.set_len(total)?;
        self.replace(&self.directory.join(ASSEMBLED), name.as_bytes())?;
        Ok((path, file))
    }

    /// Gives the upload up.
    pub fn remove(&self) -> StoreResult<()> {
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            outcome => outcome.map_err(explain(&self.key)),
        }
    }

    fn note(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:05}"))
    }

    fn own(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:05}.part"))
    }

    fn explain(&self, error: io::Error) -> StoreError {
        if error.kind() == ErrorKind::NotFound {
            self.gone()
        } else {
            explain(&self.key)(error)
        }
    }

    fn gone(&self) -> StoreError {
        StoreError::UploadGone {
            object: object(&self.key),
            detail: format!("there is none of the id {}", self.upload_id),
        }
    }
}

/// Where a part's place begins.
fn offset(number: u32, place: u64) -> u64 {
    u64::from(number.saturating_sub(1)) * place
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::store::checksum::crc32c;

    #[test]
    fn an_upload_that_became_an_object_is_gone_also_if_a_crash_left_what_it_was_made_of() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("object");
        let key = key.to_str().unwrap().trim_start_matches('/');
        // Parts at their places, and of sizes that have none.
        for sizes in [[9, 9, 3], [9, 4, 5]] {
            let upload_id = create(key).unwrap();
            let upload = Upload::open(key, &upload_id).unwrap();
            let names = Mutex::new(());
            let parts = sizes.iter().zip(1..).map(|(size, number)| {
                let bytes = Bytes::from(vec![number as u8; *size]);
                let crc32c = crc32c(&bytes);
                upload.store(number, &Payload { bytes, crc32c }, &names)
            });
            let parts: Vec<PartReceipt> = parts.collect::<StoreResult<_>>().unwrap();
            let conflict = upload.complete(&parts, &Condition::IfMatch(ETag::new("x")), &names);
            assert!(matches!(conflict, Err(StoreError::Conflict { .. })));
            let upload = Upload::open(key, &upload_id).unwrap();
            upload.complete(&parts, &Condition::Always, &names).unwrap();
            // Killed here, before anything was removed.
            let gone = Upload::open(key, &upload_id);
            assert!(matches!(gone, Err(StoreError::UploadGone { .. })));
            let content = fs::read(folder.path().join("object")).unwrap();
            assert_eq!(content.len(), sizes.iter().sum::<usize>());
            assert!(!content.contains(&0));
        }
    }
}
