//! The same through a real mount, with its kernel: readers side by side, somebody else who overwrites
//! and deletes, memory and a disk cache that are smaller than the files.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};

use super::content::{content, told};
use super::harness::{BUCKET, Lab, Mount, PREFIX, wait_until};

const NAMES: [&str; 3] = ["plain", "other", "d/model.pt"];
/// Bytes of a file; all together are more than memory or the disk cache hold.
const SIZE: u64 = 24 << 20;
/// How often somebody else changes a file at least, how often at most until somebody has read what was
/// there no more, and what readers have read in between, of all files.
const CHANGES: usize = 15;
const MOST_CHANGES: usize = 90;
const READS_BETWEEN: u64 = 60;
const READERS: u64 = 4;
/// Reads before a reader opens a file anew.
const READS_OF_ONE: usize = 12;

/// One name's versions.
#[derive(Default)]
struct History {
    versions: RwLock<Vec<Arc<Vec<u8>>>>,
    /// Versions that were in the store, for certain.
    stored: AtomicUsize,
    /// It is gone from the store for a while, or has been.
    deleted: AtomicBool,
}

impl History {
    fn version(&self, version: usize) -> Arc<Vec<u8>> {
        Arc::clone(&self.versions.read().unwrap()[version])
    }

    fn overwrite(&self, lab: &Lab, name: &str, size: u64) {
        let version = self.stored.load(Ordering::SeqCst);
        let bytes = Arc::new(content(name, version, size));
        self.versions.write().unwrap().push(Arc::clone(&bytes));
        lab.put(name, bytes.to_vec());
        self.stored.store(version + 1, Ordering::SeqCst);
    }

    fn delete(&self, lab: &Lab, name: &str) {
        self.deleted.store(true, Ordering::SeqCst);
        lab.s3.delete(BUCKET, &format!("{PREFIX}/{name}"));
    }
}

/// What readers have done so far.
#[derive(Default)]
struct Progress {
    reads: AtomicU64,
    refused: AtomicU64,
    over: AtomicBool,
}

fn random(seed: &mut u64, range: Range<u64>) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    range.start + *seed % (range.end - range.start)
}

/// Whether an error means that a version, or a name, is gone.
fn is_gone(error: &std::io::Error, history: &History) -> bool {
    match error.raw_os_error() {
        Some(libc::ESTALE) => true,
        Some(libc::ENOENT) => history.deleted.load(Ordering::SeqCst),
        _ => false,
    }
}

/// Reads here and there until it is over, every other reader past the kernel's pages.
fn read_on(mount: &Mount<'_>, histories: &[History], progress: &Progress, reader: u64) {
    let mut seed = 0x9e37_79b9_7f4a_7c15 ^ (reader + 1);
    let mut buffer = vec![0; 1 << 20];
    while !progress.over.load(Ordering::SeqCst) {
        let file = random(&mut seed, 0..NAMES.len() as u64) as usize;
        let (name, history) = (NAMES[file], &histories[file]);
        let stored = history.stored.load(Ordering::SeqCst);
        let mut options = File::options();
        options.read(true);
        if reader % 2 == 1 {
            options.custom_flags(libc::O_DIRECT);
        }
        let opened = match options.open(mount.at(name)) {
            Ok(opened) => opened,
            Err(error) if is_gone(&error, history) => continue,
            Err(error) => panic!("opening {name}: {error}"),
        };
        let mut version = None;
        for _ in 0..READS_OF_ONE {
            let at = random(&mut seed, 0..SIZE / 4096) * 4096;
            let length = random(&mut seed, 1..257) as usize * 4096;
            progress.reads.fetch_add(1, Ordering::SeqCst);
            let read = match read_fully(&opened, &mut buffer[..length], at) {
                Ok(read) => read,
                Err(error) if is_gone(&error, history) => {
                    progress.refused.fetch_add(1, Ordering::SeqCst);
                    break;
                }
                Err(error) => panic!("reading {name}: {error}"),
            };
            let bytes = &buffer[..read];
            // Behind the end of any version.
            if bytes.is_empty() && version.is_none() {
                continue;
            }
            version = version.or_else(|| version_of(history, at, bytes));
            let Some(version) = version else {
                continue;
            };
            // Nothing is believed longer than the moment: it is the newest, or a newer one.
            assert!(version + 1 >= stored, "{name}: {version} after {stored}");
            let whole = history.version(version);
            let expected =
                &whole[whole.len().min(at as usize)..whole.len().min(at as usize + length)];
            assert!(
                bytes == expected,
                "{name}, version {version} at {at}: {} bytes for {}, {} at the beginning",
                bytes.len(),
                expected.len(),
                told(bytes)
            );
        }
    }
}

/// Reads until the buffer is full or the file ends. (The kernel returns what it has of a read when
/// the rest fails; the next one gets the error.)
fn read_fully(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut there = 0;
    while there < buffer.len() {
        match file.read_at(&mut buffer[there..], at + there as u64)? {
            0 => break,
            read => there += read,
        }
    }
    Ok(there)
}

/// The version that has these bytes; none if several have: a container's directory is the same in
/// all that are of one size.
fn version_of(history: &History, at: u64, bytes: &[u8]) -> Option<usize> {
    let known = history.versions.read().unwrap();
    let of = |version: &usize| {
        let whole = &known[*version];
        let at = whole.len().min(at as usize);
        whole[at..].starts_with(bytes)
    };
    let found: Vec<usize> = (0..known.len()).filter(of).collect();
    match found.as_slice() {
        [] => panic!("at {at}: no version, {} at the beginning", told(bytes)),
        [version] => Some(*version),
        _ => None,
    }
}

#[test]
fn readers_side_by_side_get_bytes_of_one_version_while_others_overwrite() {
    let lab = Lab::new();
    let histories: Vec<History> = NAMES.iter().map(|_| History::default()).collect();
    for (name, history) in NAMES.iter().zip(&histories) {
        history.overwrite(&lab, name, SIZE);
    }
    let cache = lab.empty_folder();
    let mount = lab.mount_with(&[
        "--metadata-ttl",
        "0",
        "--memory",
        "64MiB",
        "--cache-dir",
        cache.to_str().unwrap(),
        "--cache-size",
        "64MiB",
    ]);
    let progress = Progress::default();
    let status = std::thread::scope(|scope| {
        // Also when a reader or the writer fails.
        let over = Over(&progress);
        let (mount, histories, progress) = (&mount, &histories, &progress);
        for reader in 0..READERS {
            scope.spawn(move || read_on(mount, histories, progress, reader));
        }
        let mut seed = 42;
        for change in 0..MOST_CHANGES {
            if change >= CHANGES && progress.refused.load(Ordering::SeqCst) > 0 {
                break;
            }
            let before = progress.reads.load(Ordering::SeqCst);
            wait_until("the readers to read", || {
                progress.reads.load(Ordering::SeqCst) >= before + READS_BETWEEN
            });
            let file = change % NAMES.len();
            let (name, history) = (NAMES[file], &histories[file]);
            if change % 5 == 4 {
                history.delete(&lab, name);
            }
            let size = match change % 2 {
                0 => SIZE,
                _ => random(&mut seed, SIZE / 2..SIZE),
            };
            history.overwrite(&lab, name, size);
        }
        drop(over);
        mount.status()
    });
    // They read what was there no more, and what had been evicted.
    let read = &status["read"];
    let fetched = |name: &str| read[name].as_u64().unwrap();
    assert!(fetched("bytes_demanded") + fetched("bytes_prefetched") > 64 << 20);
    assert!(fetched("bytes_from_disk") > 0, "{read}");
    let refused = progress.refused.load(Ordering::SeqCst);
    assert!(
        refused > 0,
        "every version was there as long as anybody read it"
    );
}

/// Ends the readers when dropped.
struct Over<'a>(&'a Progress);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}
