//! What the calls of a POSIX program mean: inodes, handles, attributes, names.
//!
//! The room knows nothing of fuser's types and runs without a mount. Every call is an async
//! function that is ready at once when no network is needed; the `fuse` room polls it inline and
//! moves it to a task only when it has to wait.
//!
//! Lock order: queue → tree → directory or file → draft → budget. None is held across an await.

mod attributes;
mod closing;
mod control;
mod directory;
mod drain;
mod error;
mod file;
mod former;
mod handles;
mod listing;
mod local;
mod lookup;
mod names;
mod open;
mod prefetch;
mod queue;
mod readdir;
mod remove;
mod rename;
mod synchronise;
mod tree;
mod upload_status;
mod uploads;
mod xattrs;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::runtime::Handle as Runtime;
use tokio::sync::Notify;

use crate::catalog::Catalog;
use crate::read::Reader;
use crate::store::Stores;
use crate::write::Writer;
use closing::Item;
use former::Uploads;
use handles::Handles;
use local::Local;
use queue::Queue;
use tree::Tree;

pub use attributes::{Attributes, EntryAttributes, FileKind, Usage};
pub use control::Status;
pub use directory::{Entry, FileInfo};
pub use error::{VfsError, VfsResult};
pub use open::{Access, Opened, WriteOutcome};
pub use prefetch::Prefetch;
pub use readdir::{Batch, Listed};
pub use rename::RenameMode;
pub use tree::{Inode, ROOT};
pub use upload_status::{UploadStatus, moving};

/// When a close returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseMode {
    /// When the file is in the store.
    Stored,
    /// When the file is durable on local disk; the store is reached in the background.
    Journaled,
}

/// How this mount presents itself.
#[derive(Clone, Debug)]
pub struct VfsOptions {
    pub mountpoint: PathBuf,
    /// Without credentials.
    pub tracking_uri: String,
    pub uid: u32,
    pub gid: u32,
    pub umask: u32,
    /// How long names, sizes and times are believed.
    pub metadata_ttl: Duration,
    pub read_only: bool,
    pub close: CloseMode,
    /// Most directories whose closed files are published side by side in the background.
    pub side_by_side: usize,
    /// Most files that are closed and not stored; a further close waits until its file is.
    pub most_queued: usize,
}

/// The filesystem, without a kernel.
#[derive(Debug)]
pub struct Vfs {
    catalog: Arc<Catalog>,
    stores: Arc<Stores>,
    reader: Arc<Reader>,
    writer: Arc<Writer>,
    options: VfsOptions,
    runtime: Runtime,
    tree: Mutex<Tree>,
    handles: Handles,
    local: Local,
    uploads: Uploads,
    /// What is to be published in the background, in order.
    queue: Mutex<Queue<Item>>,
    /// Something was published, or failed to be, or need not be any more.
    settled: Notify,
    started: SystemTime,
}

impl Vfs {
    pub fn new(
        catalog: Arc<Catalog>,
        stores: Arc<Stores>,
        reader: Arc<Reader>,
        writer: Arc<Writer>,
        runtime: Runtime,
        options: VfsOptions,
    ) -> Arc<Self> {
        let started = SystemTime::now();
        let queue = Queue::new(options.side_by_side);
        Arc::new(Self {
            catalog,
            stores,
            reader,
            writer,
            options,
            runtime,
            tree: Mutex::new(Tree::new(started)),
            handles: Handles::default(),
            local: Local::default(),
            uploads: Uploads::default(),
            queue: Mutex::new(queue),
            settled: Notify::new(),
            started,
        })
    }

    /// The path of an inode below the mount point, for messages.
    pub fn path(&self, inode: Inode) -> String {
        self.tree.lock().path(inode)
    }

    /// The kernel forgets `count` lookups of an inode.
    pub fn forget(&self, inode: Inode, count: u64) {
        self.tree.lock().forget(inode, count);
    }

    /// The mount has ended: what was read is cached as far as that is soon done. Blocks.
    pub fn finish_reading(&self) {
        self.reader.finish();
    }

    fn check_writable(&self) -> VfsResult<()> {
        if self.options.read_only {
            Err(VfsError::READ_ONLY)
        } else {
            Ok(())
        }
    }
}
