//! One file: what is published of it, what is being written, who has it open.

use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::directory::FileInfo;
use super::error::VfsError;
use crate::read::ObjectReader;
use crate::write::Draft;

/// A file's state. Shared by its node and its handles; lives as long as either.
#[derive(Debug)]
pub struct File {
    state: Mutex<FileState>,
    /// One change of name, or removal, at a time.
    pub moving: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
pub struct FileState {
    /// What the store has under the file's name: a version of this file or, as long as none of
    /// it was stored, the object of the file it replaced.
    pub published: Option<FileInfo>,
    pub draft: Option<Arc<Draft>>,
    /// The reader of the published version that is open, shared by all handles.
    pub reader: Option<Arc<ObjectReader>>,
    /// Open handles.
    pub handles: usize,
    /// Those of them whose reads the kernel serves from local disk.
    pub local: usize,
    /// What it serves them from, as long as there are any: the kernel wants one for all.
    pub local_bytes: Option<Arc<std::fs::File>>,
    /// Open handles that may write.
    pub writers: usize,
    /// Those of them that were closed and not written through since: the kernel tells of their end
    /// some time after close has returned.
    pub closing: usize,
    /// Publications under way, but for closes.
    pub publishing: usize,
    /// It is on its way into the store, or there and not yet known to be: until the directory
    /// knows, its name counts as unpublished.
    pub storing: bool,
    /// The draft's generation at the close that is to be published in the background.
    pub closed: Option<u64>,
    /// Why the last publication failed.
    pub failed: Option<VfsError>,
    /// Set by `utimens`, or by a write.
    pub modified: Option<SystemTime>,
    /// Removed or replaced: nothing of it will be published any more.
    pub unlinked: bool,
    /// The version whose pages the kernel may hold.
    pub kernel_version: Option<u64>,
}

impl FileState {
    /// Whether the store lacks something of the file.
    pub fn is_dirty(&self) -> bool {
        self.storing || self.draft.as_ref().is_some_and(|draft| draft.is_dirty())
    }
}

/// A publication under way. As long as it lives, the file's draft stays.
#[derive(Debug)]
pub(super) struct Publishing(Arc<File>);

impl Drop for Publishing {
    fn drop(&mut self) {
        self.0.state().publishing -= 1;
    }
}

impl File {
    /// Begins a publication.
    pub(super) fn begin_publishing(self: &Arc<Self>) -> Publishing {
        self.state().publishing += 1;
        Publishing(Arc::clone(self))
    }

    pub fn new(published: Option<FileInfo>) -> Arc<Self> {
        let state = FileState {
            published,
            ..FileState::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            moving: tokio::sync::Mutex::new(()),
        })
    }

    pub fn state(&self) -> parking_lot::MutexGuard<'_, FileState> {
        self.state.lock()
    }

    /// Whether it must be kept though nobody looks: open, or not (wholly) in the store.
    pub fn is_needed(&self) -> bool {
        let state = self.state.lock();
        state.handles > 0
            || state.publishing > 0
            || state.draft.as_ref().is_some_and(|draft| draft.is_dirty())
    }

    /// Whether the store lacks something of it.
    pub fn is_dirty(&self) -> bool {
        self.state.lock().is_dirty()
    }

    /// Bytes and time of last change, as `stat` shows them.
    pub fn size_and_time(&self) -> (u64, SystemTime) {
        let state = self.state.lock();
        let published = state.published.as_ref();
        let size = match &state.draft {
            Some(draft) => draft.size(),
            None => match (&state.reader, published) {
                // Who has it open goes on to see what was removed or replaced since.
                (Some(reader), _) => reader.size(),
                (None, Some(info)) => info.size,
                (None, None) => 0,
            },
        };
        let time = state
            .modified
            .or(published.map(|info| info.modified))
            .unwrap_or(SystemTime::UNIX_EPOCH);
        (size, time)
    }
}
