//! The disk cache: blocks that outlive the mount.
//!
//! Below the cache folder, `v1/` has a folder for each version of an object ([`version`]), named
//! after everything that makes the version ([`identity`]), with a checksum for each block
//! ([`index`]). What it gives is checked, and what is not right is not there: a fetch then asks
//! the store. So nothing needs to be synced, and several mounts may use one folder at a time: they
//! write the same bytes to the same places, and deleting a version takes nothing from who has it
//! open.
//!
//! Reading happens in whole runs of blocks, in threads that may block. Blocks that came from the
//! store are handed to one thread ([`writer`]) through a bounded queue ([`queue`]); what does not
//! fit there is not cached. That thread also keeps the cache under its limit ([`space`]).
//!
//! A disk that fails, or is full, ends the cache for the life of the mount with one log line;
//! reading goes on without it.

mod identity;
mod index;
mod queue;
mod space;
mod version;
mod writer;

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::Source;
use super::block::Block;
use identity::Identity;
use queue::{Batch, Queue};
use space::Space;
use version::{RUN, Version};

pub use space::CacheUsage;
pub(super) use version::Found;

/// The layout's version; another one's folder is left alone.
const LAYOUT: &str = "v1";
/// Most versions kept open, with two descriptors each.
const OPEN_VERSIONS: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// A disk that has not answered for so long has failed: it is as long as the store may stall, and
/// the folder may be another machine's.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the end of a mount waits for what is queued.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// Where to cache, and how much.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    pub directory: PathBuf,
    /// Most disk space, bytes.
    pub size: u64,
}

/// What the disk cache has done so far; all but the first are bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct DiskStatus {
    /// False once the disk has failed.
    pub on: bool,
    pub limit: u64,
    /// On disk, by this and other mounts, as last seen.
    pub bytes_stored: u64,
    /// Waiting to be written.
    pub bytes_queued: u64,
    pub bytes_written: u64,
    /// Fetched and not cached: the queue or the cache had no room.
    pub bytes_skipped: u64,
}

/// What the cache in `directory` holds, of all mounts that use it.
///
/// # Errors
/// The disk's; `NotFound` when there is no cache.
pub fn cache_usage(directory: &Path) -> io::Result<CacheUsage> {
    existing(directory)?.usage()
}

/// Empties the cache in `directory`, and tells what it held. Mounts that use it go on, and fetch
/// anew. `None` while another process deletes from it.
///
/// # Errors
/// The disk's; `NotFound` when there is no cache.
pub fn clear_cache(directory: &Path) -> io::Result<Option<CacheUsage>> {
    existing(directory)?.clear()
}

fn existing(directory: &Path) -> io::Result<Space> {
    let root = directory.join(LAYOUT);
    root.symlink_metadata()?;
    Ok(Space::new(&root, u64::MAX))
}

/// The disk cache of one mount.
#[derive(Debug)]
pub(super) struct Disk {
    /// The folder that holds the versions.
    root: PathBuf,
    limit: u64,
    on: AtomicBool,
    open: Mutex<LruCache<String, Arc<Version>>>,
    /// Held while a folder of a version is opened, removed for it is damaged, or made.
    changing: Mutex<()>,
    queue: Queue,
    stored: AtomicU64,
    written: AtomicU64,
    skipped: AtomicU64,
}

impl Disk {
    /// A cache in `options.directory`; when that cannot be used, one that is off. At most `queued`
    /// bytes wait to be written.
    pub fn open(options: &DiskOptions, queued: u64) -> Arc<Self> {
        let disk = Arc::new(Self {
            root: options.directory.join(LAYOUT),
            limit: options.size,
            on: AtomicBool::new(true),
            open: Mutex::new(LruCache::new(OPEN_VERSIONS)),
            changing: Mutex::new(()),
            queue: Queue::new(queued),
            stored: AtomicU64::new(0),
            written: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
        });
        let started = prepare(&disk.root).and_then(|()| {
            let disk = Arc::clone(&disk);
            std::thread::Builder::new()
                .name("mlfs-disk".to_owned())
                .spawn(move || writer::run(&disk))
        });
        if let Err(error) = started {
            disk.end(&error);
        }
        disk
    }

    /// Takes no more, and waits a little until what is queued is written.
    pub fn finish(&self) {
        self.queue.close();
        if !self.queue.wait_until_empty(LAST_WRITES) {
            tracing::debug!("the disk cache was not written to the end");
        }
    }

    pub fn status(&self) -> DiskStatus {
        DiskStatus {
            on: self.is_on(),
            limit: self.limit,
            bytes_stored: self.stored.load(Ordering::Relaxed),
            bytes_queued: self.queue.bytes(),
            bytes_written: self.written.load(Ordering::Relaxed),
            bytes_skipped: self.skipped.load(Ordering::Relaxed),
        }
    }

    /// The cache's part for one version; `None` when it cannot be cached.
    pub fn object(self: &Arc<Self>, source: &Source) -> Option<DiskObject> {
        if !self.is_on() || source.store.capabilities().local {
            return None;
        }
        Some(DiskObject {
            disk: Arc::clone(self),
            identity: Arc::new(Identity::of(source)?),
        })
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn find(&self, identity: &Identity, blocks: Range<u64>) -> Found {
        let found = self.version(identity).and_then(|version| match version {
            Some(version) => version.find(blocks.clone()),
            None => Ok(Found::Gap(blocks.clone())),
        });
        found.unwrap_or_else(|error| {
            self.failed(identity, &error);
            Found::Gap(blocks)
        })
    }

    fn missing(&self, identity: &Identity, blocks: Range<u64>) -> Vec<Range<u64>> {
        if !self.is_on() {
            return vec![blocks];
        }
        let missing = self.version(identity).and_then(|version| match version {
            Some(version) => version.missing(&blocks),
            None => Ok(vec![blocks.clone()]),
        });
        missing.unwrap_or_else(|error| {
            self.failed(identity, &error);
            vec![blocks]
        })
    }

    /// The open version, or the one on disk.
    fn version(&self, identity: &Identity) -> io::Result<Option<Arc<Version>>> {
        let known = || self.open.lock().get(&identity.name).map(Arc::clone);
        if let Some(version) = known() {
            return Ok(Some(version));
        }
        // What is damaged is removed: nobody must have made it anew since it was looked at.
        let _changing = self.changing.lock();
        if let Some(version) = known() {
            return Ok(Some(version));
        }
        let opened = Version::open(&self.root, identity)?;
        Ok(opened.map(|version| self.keep_open(identity, version)))
    }

    fn keep_open(&self, identity: &Identity, version: Version) -> Arc<Version> {
        let version = Arc::new(version);
        let kept = Arc::clone(&version);
        self.open.lock().put(identity.name.clone(), kept);
        version
    }

    /// A call to the disk failed: it is told from what can happen to a disk that is well.
    fn failed(&self, identity: &Identity, error: &io::Error) {
        self.open.lock().pop(&identity.name);
        if is_harmless(error) {
            tracing::debug!(%error, "not cached on disk");
        } else {
            self.end(error);
        }
    }

    /// Turns the cache off for good, and says so once.
    fn end(&self, error: &io::Error) {
        if self.on.swap(false, Ordering::Relaxed) {
            tracing::error!(directory = %self.root.display(), %error,
                "the disk cache is off until the next mount, reading goes on without it: make \
                 room, or see to the disk, or name another folder with --cache-dir");
        }
        self.queue.abandon();
        self.open.lock().clear();
    }
}

/// The disk cache's part for one version.
#[derive(Debug)]
pub(super) struct DiskObject {
    disk: Arc<Disk>,
    identity: Arc<Identity>,
}

impl DiskObject {
    /// What there is of `blocks`, which must not be empty, at their start.
    pub async fn find(&self, blocks: Range<u64>) -> Found {
        if !self.disk.is_on() {
            return Found::Gap(blocks);
        }
        let (disk, identity) = (Arc::clone(&self.disk), Arc::clone(&self.identity));
        let wanted = blocks.clone();
        let finding = tokio::task::spawn_blocking(move || disk.find(&identity, wanted));
        match tokio::time::timeout(PATIENCE, finding).await {
            Ok(Ok(found)) => found,
            // The runtime is ending.
            Ok(Err(_)) => Found::Gap(blocks),
            Err(_) => {
                self.disk.end(&io::Error::from(io::ErrorKind::TimedOut));
                Found::Gap(blocks)
            }
        }
    }

    /// Offers consecutive blocks from `first` on, to be cached when there is room.
    pub fn offer(&self, first: u64, blocks: &[Arc<Block>]) {
        if !self.disk.is_on() {
            return;
        }
        for batch in self.batches(first, blocks, None) {
            if let Err(batch) = self.disk.queue.push(batch) {
                let skipped = &self.disk.skipped;
                skipped.fetch_add(batch.bytes(), Ordering::Relaxed);
            }
        }
    }

    /// Hands over consecutive blocks from `first` on, as the queue has room for them, and waits
    /// until they are written, or are not going to be.
    pub async fn keep(&self, first: u64, blocks: &[Arc<Block>]) {
        let (waiter, mut written) = mpsc::channel(1);
        for mut batch in self.batches(first, blocks, Some(&waiter)) {
            loop {
                let moved = self.disk.queue.moved();
                tokio::pin!(moved);
                moved.as_mut().enable();
                match self.disk.queue.push(batch) {
                    Ok(()) => break,
                    Err(refused) if self.disk.queue.is_closed() => {
                        let skipped = &self.disk.skipped;
                        skipped.fetch_add(refused.bytes(), Ordering::Relaxed);
                        return;
                    }
                    Err(refused) => batch = refused,
                }
                self.wait_for_disk(moved).await;
            }
        }
        drop(waiter);
        loop {
            let moved = self.disk.queue.moved();
            tokio::select! {
                _ = written.recv() => return,
                () = self.wait_for_disk(moved) => {}
            }
        }
    }

    /// A disk on which nothing moves has failed.
    async fn wait_for_disk(&self, moved: impl Future<Output = ()>) {
        if tokio::time::timeout(PATIENCE, moved).await.is_err() {
            self.disk.end(&io::Error::from(io::ErrorKind::TimedOut));
        }
    }

    /// Whether all of the object is there and right as far as this process has seen.
    pub fn is_whole(&self) -> bool {
        let open = self.disk.open.lock();
        open.peek(&self.identity.name)
            .is_some_and(|version| version.whole().is_some())
    }

    /// The object's bytes as a file, if all are there and right as far as this process has seen.
    pub fn whole(&self) -> Option<Arc<File>> {
        let version = self.disk.open.lock().get(&self.identity.name).cloned()?;
        let file = version.whole()?;
        // Whoever reads the file is not seen.
        tokio::task::spawn_blocking(move || version.touch());
        Some(file)
    }

    /// Those of `blocks` that are not on disk, in runs; all of them when the disk has failed.
    pub async fn missing(&self, blocks: Range<u64>) -> Vec<Range<u64>> {
        let (disk, identity) = (Arc::clone(&self.disk), Arc::clone(&self.identity));
        let wanted = blocks.clone();
        let looking = tokio::task::spawn_blocking(move || disk.missing(&identity, wanted));
        match tokio::time::timeout(PATIENCE, looking).await {
            Ok(Ok(missing)) => missing,
            Ok(Err(_)) => vec![blocks],
            Err(_) => {
                self.disk.end(&io::Error::from(io::ErrorKind::TimedOut));
                vec![blocks]
            }
        }
    }

    fn batches(
        &self,
        first: u64,
        blocks: &[Arc<Block>],
        waiter: Option<&mpsc::Sender<()>>,
    ) -> impl Iterator<Item = Batch> {
        let runs = (first..).step_by(RUN).zip(blocks.chunks(RUN));
        runs.map(move |(first, blocks)| Batch {
            identity: Arc::clone(&self.identity),
            first,
            blocks: blocks.to_vec(),
            _waiter: waiter.cloned(),
        })
    }
}

/// Makes the folder, and checks that nobody else can write there: checksums guard against damage,
/// not against forgery.
fn prepare(root: &Path) -> io::Result<()> {
    version::make_folder(root)?;
    let metadata = root.symlink_metadata()?;
    // SAFETY: geteuid has no preconditions and cannot fail.
    let own = metadata.uid() == unsafe { libc::geteuid() };
    if !metadata.is_dir() || !own || metadata.mode() & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "not a folder of this user's alone (mode 0700)",
        ));
    }
    Ok(())
}

/// What happens on a disk that is well: a version deleted meanwhile, descriptors or memory short
/// for a moment, an object larger than the filesystem's largest file.
fn is_harmless(error: &io::Error) -> bool {
    let harmless = [
        libc::ENOENT,
        libc::ESTALE,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::EINTR,
        libc::EAGAIN,
        libc::EFBIG,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| harmless.contains(&code))
}

#[cfg(test)]
mod tests;
