//! Open files and directories.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use super::error::{VfsError, VfsResult};
use super::file::{File, FileState};
use super::readdir::DirectoryStream;
use super::tree::{Inode, Order};

/// An open file.
#[derive(Debug)]
pub(super) struct FileHandle {
    pub inode: Inode,
    pub file: Arc<File>,
    pub writable: bool,
    /// The kernel reads local disk.
    pub local: AtomicBool,
    /// It counts among those that are closing. Changed under the file's lock.
    closing: AtomicBool,
    /// Processes (thread groups) that opened the file through this handle or wrote through it:
    /// their close publishes, that of a child which merely inherited the descriptor does not.
    publishers: Mutex<Publishers>,
}

#[derive(Debug, Default)]
struct Publishers {
    groups: HashSet<u32>,
    /// The thread seen last, so that a run of writes asks for its group once.
    last_thread: u32,
}

impl FileHandle {
    pub fn new(inode: Inode, file: Arc<File>, writable: bool, thread: u32) -> Self {
        let handle = Self {
            inode,
            file,
            writable,
            local: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            publishers: Mutex::default(),
        };
        if writable {
            handle.note_publisher(thread);
        }
        handle
    }

    /// A descriptor was closed by somebody who may publish: it may have been the last.
    pub fn note_close(&self) {
        let mut state = self.file.state();
        if self.writable && !self.closing.swap(true, Ordering::Relaxed) {
            state.closing += 1;
        }
    }

    /// It is used to write, so that it was not the last; or the handle is at its end.
    pub fn note_use(&self, state: &mut FileState) {
        if self.closing.swap(false, Ordering::Relaxed) {
            state.closing -= 1;
        }
    }

    /// The process of `thread` has a part in the file's content.
    pub fn note_publisher(&self, thread: u32) {
        let mut publishers = self.publishers.lock();
        if publishers.last_thread != thread {
            publishers.last_thread = thread;
            publishers.groups.insert(thread_group(thread));
        }
    }

    pub fn may_publish(&self, thread: u32) -> bool {
        let publishers = self.publishers.lock();
        publishers.last_thread == thread || publishers.groups.contains(&thread_group(thread))
    }
}

/// The process a thread belongs to; the thread itself where that cannot be told.
fn thread_group(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))
        .and_then(|group| group.trim().parse().ok())
        .unwrap_or(thread)
}

/// Something open.
#[derive(Clone, Debug)]
enum Open {
    File(Arc<FileHandle>),
    Directory(Arc<DirectoryStream>),
    /// A control file's content, as it was when it was opened.
    Document(Bytes),
    Order(Order),
}

/// All open handles, by number.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: RwLock<HashMap<u64, Open>>,
    next: AtomicU64,
}

impl Handles {
    fn add(&self, open: Open) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(handle, open);
        handle
    }

    pub fn add_file(&self, handle: FileHandle) -> u64 {
        self.add(Open::File(Arc::new(handle)))
    }

    pub fn add_directory(&self, stream: Arc<DirectoryStream>) -> u64 {
        self.add(Open::Directory(stream))
    }

    pub fn add_document(&self, content: Bytes) -> u64 {
        self.add(Open::Document(content))
    }

    pub fn add_order(&self, order: Order) -> u64 {
        self.add(Open::Order(order))
    }

    pub fn file(&self, handle: u64) -> VfsResult<Arc<FileHandle>> {
        match self.open.read().get(&handle) {
            Some(Open::File(file)) => Ok(Arc::clone(file)),
            _ => Err(VfsError::BAD_HANDLE),
        }
    }

    pub fn directory(&self, handle: u64) -> VfsResult<Arc<DirectoryStream>> {
        match self.open.read().get(&handle) {
            Some(Open::Directory(stream)) => Ok(Arc::clone(stream)),
            _ => Err(VfsError::BAD_HANDLE),
        }
    }

    pub fn document(&self, handle: u64) -> Option<Bytes> {
        match self.open.read().get(&handle) {
            Some(Open::Document(content)) => Some(content.clone()),
            _ => None,
        }
    }

    pub fn order(&self, handle: u64) -> Option<Order> {
        match self.open.read().get(&handle) {
            Some(Open::Order(order)) => Some(*order),
            _ => None,
        }
    }

    /// Closes a handle; returns the file's, if it was a file's.
    pub fn remove(&self, handle: u64) -> Option<Arc<FileHandle>> {
        match self.open.write().remove(&handle) {
            Some(Open::File(file)) => Some(file),
            _ => None,
        }
    }
}
