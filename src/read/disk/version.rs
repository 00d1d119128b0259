//! The files of one version: `identity`, which says what it is; `data`, sparse, in which byte i is
//! the object's byte i; `index`, an entry a block.
//!
//! A block is written before its entry, and every read is checked against the entry. What a crash,
//! a full disk or another process left half done is thus a block that is not there.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;

use super::identity::Identity;
use super::index::{ABSENT, ENTRY_SIZE, Entries};
use crate::read::BLOCK_SIZE;
use crate::read::block::Block;
use crate::store::checksum::crc32c;

/// Most blocks read or written by one call: 1 MiB, long enough that the call costs nothing beside
/// the bytes.
pub(super) const RUN: usize = 32;
/// Blocks between two gaps, this many at most, are asked of the store along with the gaps: 512 KiB
/// cost less than another round trip.
const BRIDGE: usize = 16;
/// How exactly it is known when a version was last used.
const TOUCH: Duration = Duration::from_secs(60);

/// Folders being made, until they are whole.
pub(super) const NEW: &str = ".new-";
/// Folders on their way out.
pub(super) const GONE: &str = ".gone-";

/// What there is of a range of blocks, at its start.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::read) enum Found {
    /// The first blocks, checked; not none.
    Run(Vec<Bytes>),
    /// These have to be fetched; not none.
    Gap(Range<u64>),
}

/// An open version. Its files may have been deleted meanwhile; they can be used all the same.
#[derive(Debug)]
pub(super) struct Version {
    data: Arc<File>,
    index: File,
    entries: Entries,
    /// Bytes of the object.
    size: u64,
    touched: Mutex<Instant>,
    checked: Mutex<Checked>,
}

/// Which blocks this process has written, or found to be what their entries say.
#[derive(Debug)]
struct Checked {
    blocks: Vec<bool>,
    /// How many are not.
    left: usize,
}

impl Checked {
    fn new(blocks: u64) -> Self {
        Self {
            blocks: vec![false; blocks as usize],
            left: blocks as usize,
        }
    }

    fn set(&mut self, index: u64, right: bool) {
        let Some(known) = self.blocks.get_mut(index as usize) else {
            return;
        };
        match (std::mem::replace(known, right), right) {
            (false, true) => self.left -= 1,
            (true, false) => self.left += 1,
            _ => {}
        }
    }
}

impl Version {
    /// Opens the version below `root`; `None` where there is none. What is there under its name
    /// and is not it is thrown away.
    pub fn open(root: &Path, identity: &Identity) -> io::Result<Option<Self>> {
        let folder = root.join(&identity.name);
        let told = match std::fs::read(folder.join("identity")) {
            Ok(told) => told,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if folder.is_dir() {
                    remove(root, &identity.name)?;
                }
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let options = options();
        let opened = (
            options.open(folder.join("data")),
            options.open(folder.join("index")),
        );
        match opened {
            (Ok(data), Ok(index)) if told == identity.text.as_bytes() => {
                let modified = index.metadata()?.modified()?;
                if modified.elapsed().is_ok_and(|age| age >= TOUCH) {
                    index.set_modified(SystemTime::now())?;
                }
                Ok(Some(Self::new(data, index, identity)))
            }
            (Err(error), _) | (_, Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                Err(error)
            }
            _ => {
                tracing::debug!(folder = %folder.display(), "damaged in the disk cache; removed");
                remove(root, &identity.name)?;
                Ok(None)
            }
        }
    }

    /// Makes an empty version below `root`, or opens the one that another process made meanwhile.
    pub fn create(root: &Path, identity: &Identity) -> io::Result<Self> {
        let making = root.join(format!("{NEW}{:016x}", rand::random::<u64>()));
        match Self::fill_folder(&making, identity)
            .and_then(|made| std::fs::rename(&making, root.join(&identity.name)).map(|()| made))
        {
            Ok(made) => Ok(made),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&making);
                match error.kind() {
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => {
                        Self::open(root, identity)?.ok_or(error)
                    }
                    _ => Err(error),
                }
            }
        }
    }

    fn fill_folder(folder: &Path, identity: &Identity) -> io::Result<Self> {
        make_folder(folder)?;
        let mut options = options();
        options.create_new(true);
        options
            .open(folder.join("identity"))?
            .write_all_at(identity.text.as_bytes(), 0)?;
        let data = options.open(folder.join("data"))?;
        let index = options.open(folder.join("index"))?;
        data.set_len(identity.size)?;
        index.set_len(identity.size.div_ceil(BLOCK_SIZE) * ENTRY_SIZE)?;
        Ok(Self::new(data, index, identity))
    }

    fn new(data: File, index: File, identity: &Identity) -> Self {
        Self {
            data: Arc::new(data),
            index,
            entries: Entries::of(&identity.text),
            size: identity.size,
            touched: Mutex::new(Instant::now()),
            checked: Mutex::new(Checked::new(identity.size.div_ceil(BLOCK_SIZE))),
        }
    }

    /// The object's bytes as a file, once this process has checked or written every block.
    pub fn whole(&self) -> Option<Arc<File>> {
        let whole = self.checked.lock().left == 0 && self.size > 0;
        whole.then(|| Arc::clone(&self.data))
    }

    /// Whether it can still be found by its name.
    pub fn is_linked(&self) -> bool {
        self.index
            .metadata()
            .is_ok_and(|metadata| metadata.nlink() > 0)
    }

    /// Bytes of disk that data and index take.
    pub fn disk_usage(&self) -> io::Result<u64> {
        Ok(usage(&self.data.metadata()?) + usage(&self.index.metadata()?))
    }

    /// What there is of `blocks` at their start. A block that is not what its entry says is
    /// forgotten.
    pub fn find(&self, blocks: Range<u64>) -> io::Result<Found> {
        self.touch()?;
        let near = blocks.start..blocks.end.min(blocks.start + RUN as u64);
        let sums: Vec<u32> = self
            .checksums(&near)?
            .into_iter()
            .map_while(|sum| sum)
            .collect();
        if !sums.is_empty() {
            let run = self.read(blocks.start, &sums)?;
            if !run.is_empty() {
                return Ok(Found::Run(run));
            }
        }
        let present: Vec<bool> = self
            .checksums(&blocks)?
            .iter()
            .map(Option::is_some)
            .collect();
        Ok(Found::Gap(
            blocks.start..blocks.start + gap_length(&present) as u64,
        ))
    }

    /// Those of `blocks` that have no entry, in runs.
    pub fn missing(&self, blocks: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut missing: Vec<Range<u64>> = Vec::new();
        let sums = self.checksums(blocks)?;
        for (index, _) in blocks.clone().zip(sums).filter(|(_, sum)| sum.is_none()) {
            match missing.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => missing.push(index..index + 1),
            }
        }
        Ok(missing)
    }

    /// The checksums of those blocks that are there.
    fn checksums(&self, blocks: &Range<u64>) -> io::Result<Vec<Option<u32>>> {
        let count = (blocks.end - blocks.start) as usize;
        let mut bytes = vec![0; count * ENTRY_SIZE as usize];
        read_up_to(&self.index, &mut bytes, blocks.start * ENTRY_SIZE)?;
        let entries = bytes.chunks_exact(ENTRY_SIZE as usize);
        Ok(blocks
            .clone()
            .zip(entries)
            .map(|(index, entry)| self.entries.checksum(index, entry))
            .collect())
    }

    /// The blocks from `first` on whose checksums are given, up to the first that is damaged.
    fn read(&self, first: u64, sums: &[u32]) -> io::Result<Vec<Bytes>> {
        let start = first * BLOCK_SIZE;
        let end = (start + sums.len() as u64 * BLOCK_SIZE).min(self.size);
        let mut run: Vec<Vec<u8>> = (start..end)
            .step_by(BLOCK_SIZE as usize)
            .map(|at| vec![0; BLOCK_SIZE.min(end - at) as usize])
            .collect();
        let mut there = read_scattered(&self.data, &mut run, start)?;
        let mut blocks = Vec::with_capacity(run.len());
        for ((index, sum), block) in (first..).zip(sums).zip(run) {
            if block.len() > there || crc32c(&block) != *sum {
                tracing::debug!(
                    index,
                    "a block of the disk cache is damaged; it is fetched again"
                );
                self.checked.lock().set(index, false);
                self.index.write_all_at(&ABSENT, index * ENTRY_SIZE)?;
                break;
            }
            self.checked.lock().set(index, true);
            there -= block.len();
            blocks.push(Bytes::from(block));
        }
        Ok(blocks)
    }

    /// Writes consecutive blocks from `first` on, then their entries. `buffer` is scratch.
    pub fn write(&self, first: u64, blocks: &[Arc<Block>], buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.clear();
        let mut entries = Vec::with_capacity(blocks.len() * ENTRY_SIZE as usize);
        for (index, block) in (first..).zip(blocks) {
            let start = buffer.len();
            for frame in &block.frames {
                buffer.extend_from_slice(frame);
            }
            let sum = crc32c(&buffer[start..]);
            entries.extend_from_slice(&self.entries.present(index, sum));
        }
        self.data.write_all_at(buffer, first * BLOCK_SIZE)?;
        self.index.write_all_at(&entries, first * ENTRY_SIZE)?;
        let mut checked = self.checked.lock();
        for index in (first..).take(blocks.len()) {
            checked.set(index, true);
        }
        Ok(())
    }

    /// Notes that it is in use, for whoever has to choose what is to go.
    pub fn touch(&self) -> io::Result<()> {
        {
            let mut touched = self.touched.lock();
            if touched.elapsed() < TOUCH {
                return Ok(());
            }
            *touched = Instant::now();
        }
        self.index.set_modified(SystemTime::now())
    }
}

/// Takes the version `name` out of sight, then deletes it. Whoever has it open can go on.
pub(super) fn remove(root: &Path, name: &str) -> io::Result<()> {
    let going = root.join(format!("{GONE}{:016x}", rand::random::<u64>()));
    let removed =
        std::fs::rename(root.join(name), &going).and_then(|()| std::fs::remove_dir_all(&going));
    match removed {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Makes a folder that is this user's alone, and those above it; it may be there already.
pub(super) fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Bytes of disk a file takes.
pub(super) fn usage(metadata: &std::fs::Metadata) -> u64 {
    metadata.blocks() * 512
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW);
    options
}

/// Reads until the buffer is full or the file ends; returns how much there was.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut there = 0;
    while there < buffer.len() {
        match file.read_at(&mut buffer[there..], offset + there as u64) {
            Ok(0) => break,
            Ok(count) => there += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(there)
}

/// Reads into each of `buffers` in turn, by one call; returns how much there was. Each block has a
/// buffer of its own: one for all would live, unaccounted for, as long as its last block.
fn read_scattered(file: &File, buffers: &mut [Vec<u8>], offset: u64) -> io::Result<usize> {
    let mut slices: Vec<IoSliceMut> = buffers
        .iter_mut()
        .map(|buffer| IoSliceMut::new(buffer))
        .collect();
    let (Ok(count), Ok(offset)) = (slices.len().try_into(), offset.try_into()) else {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    };
    loop {
        // SAFETY: `IoSliceMut` is laid out as an iovec; the slices are writable and outlive the
        // call.
        let outcome =
            unsafe { libc::preadv(file.as_raw_fd(), slices.as_mut_ptr().cast(), count, offset) };
        match usize::try_from(outcome) {
            Ok(there) => return Ok(there),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// How many blocks to ask the store for, where `present` says which are there and the first is
/// not, or not to be had.
fn gap_length(present: &[bool]) -> usize {
    let run = |from: usize, wanted: bool| {
        let rest = present[from..].iter();
        rest.take_while(|there| **there == wanted).count()
    };
    let mut end = 1;
    while end < present.len() {
        end += run(end, false);
        let there = run(end, true);
        if there >= BRIDGE || end + there >= present.len() {
            break;
        }
        end += there;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_ends_where_another_round_trip_pays() {
        let there = |runs: &[(bool, usize)]| -> Vec<bool> {
            let parts = runs.iter().map(|(there, count)| vec![*there; *count]);
            parts.collect::<Vec<_>>().concat()
        };
        assert_eq!(gap_length(&[false]), 1);
        assert_eq!(gap_length(&there(&[(false, 9)])), 9);
        assert_eq!(gap_length(&there(&[(false, 3), (true, BRIDGE)])), 3);
        assert_eq!(gap_length(&there(&[(false, 3), (true, 2)])), 3);
        assert_eq!(
            gap_length(&there(&[(false, 3), (true, 2), (false, 1)])),
            3 + 2 + 1
        );
        let long = [(false, 3), (true, BRIDGE), (false, 5)];
        assert_eq!(gap_length(&there(&long)), 3);
        // The first one's entry says that it is there, and it is damaged.
        assert_eq!(gap_length(&there(&[(true, 40)])), 1);
        assert_eq!(gap_length(&there(&[(true, 1), (false, 2), (true, 40)])), 3);
    }
}
