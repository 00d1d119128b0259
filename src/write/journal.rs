//! What a crash must not make anybody forget: one append-only file a draft.
//!
//! A journal lies beside the draft's chunks in the spill directory. It names what the draft is to
//! become, the upload that holds its parts, and, whenever that is asked for, a **manifest**: where
//! every byte of the file is, on this disk or in the unfinished upload. After a crash the last
//! manifest that was not taken back is what the file was.
//!
//! Each record is one line: the CRC32C of the rest in hexadecimal, a space, JSON. A line that was
//! torn by a crash, and whatever follows it, counts as not written. A killed process loses nothing
//! that was appended; a machine that loses power loses what was not synchronised.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::error::WriteError;
use super::spill::SpillDirectory;
use crate::read::Source;
use crate::store::{ETag, PartReceipt, checksum};

/// How the names of journals end.
const SUFFIX: &str = ".journal";

/// Who a journal's bytes belong to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// The tracking server; another server's mount leaves the journal alone.
    pub tracking: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// Where a draft is to be published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// As artifact URIs name it: `s3://bucket`.
    pub store: String,
    pub key: String,
    /// Below the mount point, for people.
    pub path: String,
}

/// The object that a draft changes, and how much of it still counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub key: String,
    pub etag: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes of it that were not cut off.
    pub limit: u64,
}

impl Base {
    pub(super) fn of(source: &Source, limit: u64) -> Self {
        Self {
            key: source.key.clone(),
            etag: source.etag.as_ref().map(|etag| etag.as_str().to_owned()),
            size: source.size,
            limit,
        }
    }
}

/// A chunk: its run of local bytes, relative to the chunk's start, and where they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    pub index: u32,
    pub version: u64,
    pub start: u64,
    pub end: u64,
    /// CRC32C of the run.
    pub crc32c: Option<u32>,
    /// The file that holds the run; `None`: only the upload has it.
    pub file: Option<String>,
}

/// A whole file, as it was at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Whether its writer had closed it: only then is it sent without anybody's word.
    pub closed: bool,
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes of the first chunks.
    pub part_size: u64,
    /// Where the object underneath ends, if that is a cut of its own; else 0.
    #[serde(default)]
    pub joint: u64,
    pub base: Option<Base>,
    pub chunks: Vec<ChunkRecord>,
}

/// A part that the store has confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub index: u32,
    /// The chunk's version that was sent.
    pub version: u64,
    /// Bytes.
    pub size: u64,
    pub etag: String,
    pub crc32c: Option<u32>,
}

impl Part {
    pub fn new(index: u32, version: u64, receipt: &PartReceipt) -> Self {
        Self {
            index,
            version,
            size: receipt.size,
            etag: receipt.etag.as_str().to_owned(),
            crc32c: receipt.crc32c,
        }
    }

    pub fn receipt(&self) -> PartReceipt {
        PartReceipt {
            number: self.index + 1,
            size: self.size,
            etag: ETag::new(self.etag.as_str()),
            crc32c: self.crc32c,
        }
    }
}

/// How an object can be recognised that was stored just before a crash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completing {
    /// Bytes.
    pub size: u64,
    /// The ETag it will have, where that can be told.
    pub etag: Option<String>,
    /// CRC32C of all of it, where that is known.
    pub crc32c: Option<u32>,
}

/// An object under a name that the file has no longer, made of its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// The one it has or will have, where that is known.
    pub etag: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    Begin(Begin),
    Destination(Destination),
    /// An upload was begun, under this key; the parts of a former one no longer count.
    Upload {
        key: String,
        id: String,
    },
    Part(Part),
    Manifest(Manifest),
    /// The file was changed after its last manifest, which is what it was before.
    Changed,
    /// The file of this chunk, as the last manifest has it, is written to in place: from now on its
    /// bytes are those, or newer ones.
    Rewritten {
        index: u32,
    },
    /// The object that the draft changes lies elsewhere by now.
    Moved(Base),
    /// The file as its last manifest has it is about to appear under its name.
    Completing(Completing),
    /// The upload is about to become an object, or has, that is only copied from.
    Spent(Spent),
    /// Why the last attempt to send it failed.
    Failed {
        reason: String,
    },
    /// Nobody wants it any more; what is left of it is only to be removed.
    Discarded,
}

/// A draft's journal, open for appending. The file is removed with it, unless the spill directory
/// keeps its files.
#[derive(Debug)]
pub(super) struct Journal {
    directory: Arc<SpillDirectory>,
    path: PathBuf,
    file: Mutex<File>,
    /// Not removed with this value.
    left: AtomicBool,
}

impl Journal {
    /// A journal of the draft `id`, with a number that sets it apart from the draft's other files.
    pub fn create(directory: &Arc<SpillDirectory>, id: &str, number: u64) -> io::Result<Self> {
        let path = directory.path().join(format!("{id}-{number}{SUFFIX}"));
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Self {
            directory: Arc::clone(directory),
            path,
            file: Mutex::new(file),
            left: AtomicBool::new(false),
        })
    }

    /// Goes on with a journal that a former mount left.
    pub fn reopen(directory: &Arc<SpillDirectory>, path: PathBuf) -> io::Result<Self> {
        // What a crash tore off would spoil the next record.
        let whole = read(&path)?.1;
        let file = OpenOptions::new().append(true).open(&path)?;
        file.set_len(whole)?;
        Ok(Self {
            directory: Arc::clone(directory),
            path,
            file: Mutex::new(file),
            left: AtomicBool::new(false),
        })
    }

    /// Lets go of it without removing it.
    pub fn leave(self) {
        self.left.store(true, Ordering::Relaxed);
    }

    pub fn append(&self, record: &Record) -> io::Result<()> {
        let line = encode(record)?;
        self.file.lock().write_all(&line)
    }

    /// Makes everything appended so far, and the files named in it, findable after a loss of power.
    pub fn synchronise(&self) -> Result<(), WriteError> {
        // Outside of the lock: a sender that notes its part does not wait for the disk.
        let file = self.file.lock().try_clone();
        let synchronised = file
            .and_then(|file| file.sync_data())
            .and_then(|()| self.directory.synchronise());
        synchronised.map_err(|source| WriteError::Spill {
            path: self.path.display().to_string(),
            source,
        })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if !*self.left.get_mut() {
            self.directory.remove(&self.path);
        }
    }
}

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(record)?;
    let crc = checksum::crc32c(json.as_bytes());
    Ok(format!("{crc:08x} {json}\n").into_bytes())
}

fn decode(line: &[u8]) -> Option<Record> {
    let (crc, rest) = line.split_at_checked(8)?;
    let json = rest.strip_prefix(b" ")?;
    let told = u32::from_str_radix(std::str::from_utf8(crc).ok()?, 16).ok()?;
    if checksum::crc32c(json) != told {
        return None;
    }
    serde_json::from_slice(json).ok()
}

/// The records that are whole, and how many bytes they take.
pub(super) fn read(path: &Path) -> io::Result<(Vec<Record>, u64)> {
    let bytes = std::fs::read(path)?;
    let mut records = Vec::new();
    let mut whole = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(record) = line.strip_suffix(b"\n").and_then(decode) else {
            break;
        };
        records.push(record);
        whole += line.len() as u64;
    }
    Ok((records, whole))
}

/// What a journal comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    pub begin: Begin,
    pub destination: Destination,
    /// Key and id.
    pub upload: Option<(String, String)>,
    pub parts: Vec<Part>,
    /// The file as it last was, if that is known.
    pub manifest: Option<Manifest>,
    /// Chunks whose files were written to since.
    pub rewritten: BTreeSet<u32>,
    /// What it was to become when it was last about to be stored, if it did not change since.
    pub completing: Option<Completing>,
    /// What the parts of an upload may have become.
    pub spent: Option<Spent>,
    pub failure: Option<String>,
    pub discarded: bool,
}

impl Replayed {
    /// Plays records from the first to the last; `None` when they do not say what they are of.
    pub fn from_records(records: Vec<Record>) -> Option<Self> {
        let mut records = records.into_iter();
        let Some(Record::Begin(begin)) = records.next() else {
            return None;
        };
        let Some(Record::Destination(destination)) = records.next() else {
            return None;
        };
        let mut replayed = Self {
            begin,
            destination,
            upload: None,
            parts: Vec::new(),
            manifest: None,
            rewritten: BTreeSet::new(),
            completing: None,
            spent: None,
            failure: None,
            discarded: false,
        };
        for record in records {
            match record {
                Record::Begin(_) => return None,
                Record::Destination(destination) => replayed.destination = destination,
                Record::Upload { key, id } => {
                    replayed.upload = Some((key, id));
                    replayed.parts.clear();
                }
                Record::Part(part) => {
                    replayed.parts.retain(|other| other.index != part.index);
                    replayed.parts.push(part);
                }
                Record::Manifest(manifest) => {
                    replayed.manifest = Some(manifest);
                    replayed.rewritten.clear();
                    replayed.completing = None;
                    replayed.failure = None;
                }
                Record::Rewritten { index } => {
                    replayed.rewritten.insert(index);
                }
                Record::Completing(completing) => replayed.completing = Some(completing),
                Record::Changed => {
                    replayed.completing = None;
                    if let Some(manifest) = &mut replayed.manifest {
                        manifest.closed = false;
                    }
                }
                Record::Moved(to) => {
                    if let Some(base) = replayed.manifest.as_mut().and_then(|it| it.base.as_mut()) {
                        let limit = base.limit;
                        *base = Base { limit, ..to };
                    }
                }
                Record::Spent(spent) => replayed.spent = Some(spent),
                Record::Failed { reason } => replayed.failure = Some(reason),
                Record::Discarded => replayed.discarded = true,
            }
        }
        Some(replayed)
    }
}

/// Whether the file `name` is a journal.
pub(super) fn is_journal(name: &str) -> bool {
    name.ends_with(SUFFIX)
}

/// The id of the draft whose file `name` is.
pub(super) fn id_of(name: &str) -> &str {
    name.split_once('-').map_or(name, |(id, _)| id)
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    now_precisely() / 1000
}

/// Milliseconds since 1970.
pub(super) fn now_precisely() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn records() -> Vec<Record> {
        let destination = |key: &str| {
            Record::Destination(Destination {
                store: "s3://bucket".into(),
                key: key.into(),
                path: format!("run/{key}"),
            })
        };
        let part = |index, version| {
            Record::Part(Part {
                index,
                version,
                size: 5,
                etag: format!("\"{index}-{version}\""),
                crc32c: Some(7),
            })
        };
        vec![
            Record::Begin(Begin {
                tracking: "http://server".into(),
                since: 1,
            }),
            destination("a"),
            Record::Upload {
                key: "a".into(),
                id: "one".into(),
            },
            part(0, 1),
            part(1, 2),
            part(0, 3),
            destination("b\nwith a line break"),
            Record::Manifest(Manifest {
                closed: true,
                at: 1,
                size: 10,
                part_size: 5,
                joint: 0,
                base: None,
                chunks: Vec::new(),
            }),
            Record::Changed,
        ]
    }

    #[test]
    fn what_is_read_is_what_was_appended() {
        let folder = tempfile::tempdir().unwrap();
        let directory = SpillDirectory::for_tests(folder.path());
        let journal = Journal::create(&directory, "id", 0).unwrap();
        for record in records() {
            journal.append(&record).unwrap();
        }
        assert_eq!(read(&journal.path).unwrap().0, records());
    }

    #[test]
    fn a_part_sent_again_counts_once_and_a_changed_file_is_not_closed() {
        let replayed = Replayed::from_records(records()).unwrap();
        assert_eq!(replayed.destination.key, "b\nwith a line break");
        let versions: Vec<_> = replayed
            .parts
            .iter()
            .map(|part| (part.index, part.version))
            .collect();
        assert_eq!(versions, [(1, 2), (0, 3)]);
        assert!(!replayed.manifest.unwrap().closed);
    }

    proptest! {
        #[test]
        fn a_torn_or_damaged_journal_is_a_shorter_one(cut in 0.0..1.0, flip in any::<(bool, u8)>()) {
            let mut bytes: Vec<u8> = Vec::new();
            for record in records() {
                bytes.extend(encode(&record).unwrap());
            }
            let position = (bytes.len() as f64 * cut) as usize;
            match flip {
                (true, mask) => bytes[position] ^= mask,
                (false, _) => bytes.truncate(position),
            }
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("j");
            std::fs::write(&path, &bytes).unwrap();
            let (found, whole) = read(&path).unwrap();
            prop_assert!(records().starts_with(&found));
            prop_assert!(whole <= bytes.len() as u64);
        }
    }
}
