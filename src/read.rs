//! Reading: ranged, lazy, cached, ahead of the reader where that pays.
//!
//! The room knows objects, versions and byte ranges. It knows nothing of files, the kernel or
//! MLflow, and runs against any store.
//!
//! An object is read in **blocks** of [`BLOCK_SIZE`]. A block is in memory, on its way, on disk
//! ([`disk`], when asked for), or in the store, and is fetched once, whoever waits for it. The
//! first touch of a place fetches just the blocks that were asked for; [`pattern`] watches the
//! offsets and says how far to run ahead; a format plan ([`plan`]) tells where a tensor or member
//! ends, so that running ahead does not run past it, and which headers are looked at next
//! ([`look`]). Somebody may also ask for an object to be on disk before it is read ([`warm`]).

mod block;
mod disk;
mod distance;
mod fetch;
mod kernel;
mod look;
mod object;
mod pattern;
pub mod plan;
mod warm;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::budget::{Budget, Class};
use crate::store::{ETag, Store};
use block::BlockCache;
use disk::Disk;
use look::Looks;

pub use block::Segments;
pub use disk::{CacheUsage, DiskOptions, DiskStatus, cache_usage, clear_cache};
pub use object::ObjectReader;

/// Bytes of a block. The kernel's requests are pages, not blocks: a random read fetches up to one
/// block too many at each end, and this is small beside what the kernel's own readahead adds.
pub const BLOCK_SIZE: u64 = 32 * 1024;

/// The kernel's page, bytes.
const PAGE: u64 = 4096;

/// Bytes of the kernel's readahead in a file that may be read at random: it gets about so many beyond
/// the end of each read, in vain, and whole readaheads in between. A MiB that begins anywhere lies on 257
/// pages, which is little less than six of these: 256 random reads of 1 MiB fetch 1.20 times their bytes.
/// With the kernel's usual 128 KiB they fetch 1.27 times, with 208 KiB 1.24 times; with 132 KiB 1.19
/// times, but a reader of the whole file asks more often, and gets a twentieth less a second.
const READAHEAD: u64 = 172 << 10;

/// Most object versions whose identity is remembered (a hundred bytes or so each).
const IDENTITIES: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();

/// Blocks that wait to be written to the disk cache hold memory: at most this share of what
/// readers may have, and no more than this, bytes.
const QUEUE_SHARE: u64 = 8;
const LONGEST_QUEUE: u64 = 64 << 20;

/// How this mount reads.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Most prefetch requests in flight, over all objects.
    pub transfers: usize,
    /// So many more from stores that are far away, where each connection carries little.
    pub far_prefetches: usize,
    /// `None`: no disk cache.
    pub disk: Option<DiskOptions>,
}

/// A version of an object, and where it is.
#[derive(Clone, Debug)]
pub struct Source {
    pub store: Arc<dyn Store>,
    pub key: String,
    /// `None` where the store tells none; then size is all that pins the version.
    pub etag: Option<ETag>,
    /// Bytes.
    pub size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Identity {
    store: String,
    key: String,
    etag: Option<ETag>,
    size: u64,
}

impl Source {
    fn identity(&self) -> Identity {
        Identity {
            store: self.store.identity().to_owned(),
            key: self.key.clone(),
            etag: self.etag.clone(),
            size: self.size,
        }
    }
}

/// What reading has cost so far.
#[derive(Debug, Default)]
pub struct ReadMetrics {
    /// Bytes that callers asked for and got.
    pub bytes_served: AtomicU64,
    /// Bytes asked of the store because somebody waited.
    pub bytes_demanded: AtomicU64,
    /// Bytes asked of the store ahead of anybody.
    pub bytes_prefetched: AtomicU64,
    /// Bytes that the disk cache had.
    pub bytes_from_disk: AtomicU64,
}

/// Everything that readers share: the budget, the caches, the limit on requests.
#[derive(Debug)]
pub struct Reader {
    budget: Arc<Budget>,
    cache: Arc<BlockCache>,
    looks: Looks,
    disk: Option<Arc<Disk>>,
    prefetches: Arc<Semaphore>,
    /// For stores that are far away only, when there is none of the others left.
    far_prefetches: Arc<Semaphore>,
    /// Bytes fetched ahead, or being fetched, that nobody has read yet.
    unread: Arc<AtomicU64>,
    runtime: Handle,
    options: ReadOptions,
    contents: Mutex<LruCache<Identity, u64>>,
    next_content: AtomicU64,
    metrics: ReadMetrics,
}

impl Reader {
    pub fn new(budget: Arc<Budget>, runtime: Handle, options: ReadOptions) -> Arc<Self> {
        let cache = BlockCache::new(budget.ceiling(Class::Read));
        let as_reclaimer: std::sync::Weak<BlockCache> = Arc::downgrade(&cache);
        budget.add_reclaimer(as_reclaimer);
        let queued = (budget.ceiling(Class::Read) / QUEUE_SHARE).min(LONGEST_QUEUE);
        let disk = options.disk.as_ref();
        let disk = disk.map(|disk| Disk::open(disk, queued));
        Arc::new(Self {
            budget,
            cache,
            looks: Looks::new(options.transfers),
            disk,
            prefetches: Arc::new(Semaphore::new(options.transfers)),
            far_prefetches: Arc::new(Semaphore::new(options.far_prefetches)),
            unread: Arc::default(),
            runtime,
            options,
            contents: Mutex::new(LruCache::new(IDENTITIES)),
            next_content: AtomicU64::new(1),
            metrics: ReadMetrics::default(),
        })
    }

    /// Opens a version of an object for reading. Nothing is fetched.
    pub fn open(self: &Arc<Self>, source: Source) -> Arc<ObjectReader> {
        let content = {
            let mut contents = self.contents.lock();
            *contents.get_or_insert(source.identity(), || {
                self.next_content.fetch_add(1, Ordering::Relaxed)
            })
        };
        ObjectReader::new(Arc::clone(self), source, content)
    }

    /// Tells the caches that the version `from` now also lies at `to` (a copy inside the store),
    /// so that what was cached of it still serves.
    pub fn alias(&self, from: &Source, to: &Source) {
        let mut contents = self.contents.lock();
        if let Some(content) = contents.get(&from.identity()).copied() {
            contents.put(to.identity(), content);
        }
    }

    pub fn metrics(&self) -> &ReadMetrics {
        &self.metrics
    }

    /// Caches no more on disk, and waits a little until what was read is there. Blocks.
    pub fn finish(&self) {
        if let Some(disk) = &self.disk {
            disk.finish();
        }
    }

    /// What the disk cache does, if there is one.
    pub fn disk_status(&self) -> Option<DiskStatus> {
        self.disk.as_ref().map(|disk| disk.status())
    }

    /// Bytes of blocks in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.cache.bytes()
    }
}
