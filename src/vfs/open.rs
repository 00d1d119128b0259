//! Open, create, read, write, truncate, flush, fsync, release.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::Bytes;

use super::directory::{Entry, FileInfo};
use super::error::{VfsError, VfsResult};
use super::file::{File, FileState};
use super::handles::FileHandle;
use super::lookup::check_store;
use super::names;
use super::tree::{Inode, Kind};
use super::{EntryAttributes, Vfs};
use crate::read::{ObjectReader, Segments, Source};
use crate::write::{Draft, Progress, Target, WriteError};

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub read: bool,
    pub write: bool,
    /// `O_TRUNC`.
    pub truncate: bool,
    /// `O_EXCL`; `create` only.
    pub exclusive: bool,
    /// The calling thread.
    pub thread: u32,
}

/// An open file, and what the kernel should do with its pages.
#[derive(Clone, Debug)]
pub struct Opened {
    pub handle: u64,
    /// The kernel may read this instead, but then for all handles of the inode; where it cannot,
    /// [`Vfs::not_local`] wants to be told before the handle is used.
    pub local: Option<Arc<std::fs::File>>,
    /// Bypass the page cache: for write-only opens, which cannot be mapped anyway.
    pub direct: bool,
    /// What the kernel has cached of this inode is still true.
    pub keep_cache: bool,
    /// How far ahead of its readers the kernel should read, bytes; `None`: as usual.
    pub readahead: Option<u64>,
}

/// What a write that must not wait achieved.
#[derive(Debug)]
pub enum WriteOutcome {
    Done,
    /// This many bytes were taken; give the rest to [`Vfs::write`].
    Partial(usize),
}

impl Vfs {
    pub(super) fn file(&self, inode: Inode) -> VfsResult<Arc<File>> {
        match self.tree.lock().get(inode).map(|node| &node.kind) {
            Some(Kind::File(file)) => Ok(Arc::clone(file)),
            Some(Kind::Link(_) | Kind::Document(..)) => Err(VfsError::NOT_PERMITTED),
            Some(_) => Err(VfsError::IS_DIRECTORY),
            None => Err(VfsError::STALE),
        }
    }

    /// Where a file is published: its store and key. `None` once it was unlinked.
    pub(super) async fn target(&self, inode: Inode) -> VfsResult<Target> {
        let (parent, name) = {
            let tree = self.tree.lock();
            let node = tree.get(inode).ok_or(VfsError::STALE)?;
            (node.parent, node.name.clone())
        };
        let place = self.place(parent).await?;
        let target = place.target(&name);
        names::check_key(&target.store, &target.key)?;
        Ok(target)
    }

    pub async fn open(&self, inode: Inode, access: Access) -> VfsResult<Opened> {
        let kind = {
            let tree = self.tree.lock();
            tree.get(inode)
                .map(|node| node.kind.clone())
                .ok_or(VfsError::STALE)?
        };
        let file = match kind {
            Kind::File(file) => file,
            Kind::Status => {
                let handle = self.handles.add_document(self.status_document());
                return Ok(Opened {
                    handle,
                    local: None,
                    direct: true,
                    keep_cache: false,
                    readahead: None,
                });
            }
            Kind::Document(id, document) => {
                if access.write {
                    return Err(VfsError::NOT_PERMITTED);
                }
                let content = self.catalog.document(&id, document).await?;
                return Ok(Opened {
                    handle: self.handles.add_document(content),
                    local: None,
                    direct: true,
                    keep_cache: false,
                    readahead: None,
                });
            }
            Kind::Order(order) => {
                let handle = self.handles.add_order(order);
                return Ok(Opened {
                    handle,
                    local: None,
                    direct: true,
                    keep_cache: false,
                    readahead: None,
                });
            }
            _ => return Err(VfsError::IS_DIRECTORY),
        };
        if access.write {
            self.check_writable()?;
        }
        // A published file's reader and a draft need to know where the file is.
        let target = self.target(inode).await?;
        if access.write {
            check_store(&target.store)?;
        }
        let (keep_cache, local, readahead) = {
            let mut state = file.state();
            if state.unlinked && state.draft.is_none() && state.reader.is_none() {
                // Removed or replaced since the kernel looked it up: it looks again.
                return Err(VfsError::STALE);
            }
            let local = self.local_bytes(&mut state, &target);
            state.handles += 1;
            state.writers += usize::from(access.write);
            let keep_cache = self.note_kernel_version(&mut state, &target);
            let readahead = state.reader.as_ref().and_then(|reader| reader.readahead());
            (keep_cache, local, readahead)
        };
        let writable = access.write;
        let handle = FileHandle::new(inode, Arc::clone(&file), writable, access.thread);
        handle.local.store(local.is_some(), Ordering::Relaxed);
        let handle = self.handles.add_file(handle);
        if access.write && access.truncate {
            self.draft(&file, &target).truncate_at_open()?;
            file.state().modified = Some(SystemTime::now());
        }
        Ok(Opened {
            handle,
            local,
            direct: access.write && !access.read,
            keep_cache,
            readahead,
        })
    }

    /// Whether the kernel's pages of this inode are of the version that is opened now; remembers
    /// that they will be.
    fn note_kernel_version(&self, state: &mut FileState, target: &Target) -> bool {
        if state.draft.is_some() {
            state.kernel_version = None;
            return false;
        }
        let Some(reader) = self.reader_of(state, target) else {
            return false;
        };
        let version = Some(reader.content());
        let keep = state.kernel_version == version;
        state.kernel_version = version;
        keep
    }

    pub(super) fn reader_of(
        &self,
        state: &mut FileState,
        target: &Target,
    ) -> Option<Arc<ObjectReader>> {
        if let Some(reader) = &state.reader {
            return Some(Arc::clone(reader));
        }
        let info = state.published.as_ref()?;
        let reader = self.reader.open(Source {
            store: Arc::clone(&target.store),
            key: target.key.clone(),
            etag: info.etag.clone(),
            size: info.size,
        });
        state.reader = Some(Arc::clone(&reader));
        Some(reader)
    }

    /// The file's draft, begun if there is none.
    pub(super) fn draft(&self, file: &File, target: &Target) -> Arc<Draft> {
        let mut state = file.state();
        if let Some(draft) = &state.draft {
            return Arc::clone(draft);
        }
        let draft = match self.reader_of(&mut state, target) {
            Some(base) => Draft::over(&self.writer, target.clone(), base),
            None => Draft::new(&self.writer, target.clone()),
        };
        if state.unlinked {
            draft.keep_local();
        }
        state.draft = Some(Arc::clone(&draft));
        state.reader = None;
        state.kernel_version = None;
        draft
    }

    pub async fn create(
        &self,
        parent: Inode,
        name: &OsStr,
        access: Access,
    ) -> VfsResult<(EntryAttributes, Opened)> {
        self.check_writable()?;
        let text = names::from_kernel(name)?;
        match self.resolve(parent, text).await {
            Ok(_) if access.exclusive => return Err(VfsError::EXISTS),
            Ok((inode, believed)) => {
                let opened = self.open(inode, access).await?;
                let mut tree = self.tree.lock();
                tree.add_lookup(inode);
                let node = tree.get(inode).ok_or(VfsError::STALE)?;
                return Ok((self.describe(inode, node, believed), opened));
            }
            Err(error) if error.errno == libc::ENOENT => {}
            Err(error) => return Err(error),
        }
        let place = self.writable_place(parent).await?;
        let target = place.target(text);
        names::check_key(&target.store, &target.key)?;
        let file = File::new(None);
        let now = SystemTime::now();
        {
            let mut state = file.state();
            state.draft = Some(Draft::new(&self.writer, target));
            state.handles = 1;
            state.writers = 1;
            state.modified = Some(now);
        }
        let mut tree = self.tree.lock();
        // Two programs may create the same name at once; the second opens what the first made.
        if let Some((inode, node)) = tree.child(parent, text)
            && let Kind::File(other) = &node.kind
            && other.is_dirty()
        {
            if access.exclusive {
                return Err(VfsError::EXISTS);
            }
            let other = Arc::clone(other);
            {
                let mut state = other.state();
                state.handles += 1;
                state.writers += 1;
            }
            return Ok(self.finish_create(&mut tree, inode, other, access));
        }
        let inode = tree.insert(parent, text, Kind::File(Arc::clone(&file)), now);
        tree.touch_directory(parent, now);
        Ok(self.finish_create(&mut tree, inode, file, access))
    }

    fn finish_create(
        &self,
        tree: &mut super::tree::Tree,
        inode: Inode,
        file: Arc<File>,
        access: Access,
    ) -> (EntryAttributes, Opened) {
        let handle = FileHandle::new(inode, file, true, access.thread);
        let handle = self.handles.add_file(handle);
        tree.add_lookup(inode);
        let attributes = match tree.get(inode) {
            Some(node) => self.describe(inode, node, self.options.metadata_ttl),
            None => unreachable!("the node was inserted under this lock"),
        };
        (
            attributes,
            Opened {
                handle,
                local: None,
                direct: !access.read,
                keep_cache: false,
                readahead: None,
            },
        )
    }

    /// Up to `length` bytes at `offset`; fewer only at the end. `thread` is the one that asks, 0 if
    /// that is not known.
    pub async fn read(
        &self,
        handle: u64,
        thread: u32,
        offset: u64,
        length: u32,
    ) -> VfsResult<Segments> {
        if let Some(document) = self.handles.document(handle) {
            let mut segments = Segments::default();
            let start = (offset as usize).min(document.len());
            let end = (start + length as usize).min(document.len());
            segments.push(document.slice(start..end));
            return Ok(segments);
        }
        let handle = self.handles.file(handle)?;
        let (draft, reader) = {
            let state = handle.file.state();
            (state.draft.clone(), state.reader.clone())
        };
        if let Some(draft) = draft {
            return Ok(draft.read(offset, u64::from(length)).await?);
        }
        let reader = match reader {
            Some(reader) => reader,
            None => {
                let target = self.target(handle.inode).await?;
                let reader = self.reader_of(&mut handle.file.state(), &target);
                let Some(reader) = reader else {
                    return Ok(Segments::default());
                };
                reader
            }
        };
        Ok(reader.read(thread, offset, u64::from(length)).await?)
    }

    /// Writes what can be written without waiting.
    pub fn try_write(
        &self,
        handle: u64,
        offset: u64,
        data: &[u8],
        thread: u32,
    ) -> VfsResult<WriteOutcome> {
        if self.handles.order(handle).is_some() {
            return Ok(WriteOutcome::Partial(0));
        }
        let handle = self.handles.file(handle)?;
        if !handle.writable {
            return Err(VfsError::BAD_HANDLE);
        }
        handle.note_publisher(thread);
        let draft = {
            let mut state = handle.file.state();
            handle.note_use(&mut state);
            state.modified = Some(SystemTime::now());
            state.draft.clone()
        };
        let Some(draft) = draft else {
            return Ok(WriteOutcome::Partial(0));
        };
        match draft.try_write(offset, data)? {
            Progress::Done => Ok(WriteOutcome::Done),
            Progress::Partial(taken) => Ok(WriteOutcome::Partial(taken)),
        }
    }

    /// Writes all of `data`, waiting for room if need be.
    pub async fn write(self: &Arc<Self>, handle: u64, offset: u64, data: Bytes) -> VfsResult<()> {
        if let Some(order) = self.handles.order(handle) {
            return self.obey(order, &data).await;
        }
        let handle = self.handles.file(handle)?;
        let target = self.target(handle.inode).await?;
        let draft = self.draft(&handle.file, &target);
        loop {
            match draft.write(offset, data.clone()).await {
                // What is published in the background gives room in the end.
                Err(WriteError::NoRoom { .. }) if self.queue.lock().is_moving() => {}
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Sets a file's size, through a handle of it or by its path. Without an open writer this is a
    /// close, too.
    pub async fn set_size(
        self: &Arc<Self>,
        inode: Inode,
        handle: Option<u64>,
        size: u64,
    ) -> VfsResult<()> {
        self.check_writable()?;
        if self
            .tree
            .lock()
            .get(inode)
            .is_some_and(|node| matches!(node.kind, Kind::Order(_)))
        {
            return Ok(());
        }
        let file = self.file(inode)?;
        let target = self.target(inode).await?;
        check_store(&target.store)?;
        // The draft may be one that is just being published, and must not go with that.
        let publishing = file.begin_publishing();
        self.draft(&file, &target).truncate(size)?;
        let handle = handle.and_then(|handle| self.handles.file(handle).ok());
        let open = {
            let mut state = file.state();
            if let Some(handle) = handle.filter(|handle| handle.inode == inode) {
                handle.note_use(&mut state);
            }
            state.modified = Some(SystemTime::now());
            state.writers > state.closing
        };
        if !open {
            self.close(inode, &file).await?;
        }
        drop(publishing);
        self.settle(inode, &file);
        Ok(())
    }

    /// Makes sure that `offset..offset + length` exists (`fallocate` without flags).
    pub async fn allocate(self: &Arc<Self>, inode: Inode, handle: u64, end: u64) -> VfsResult<()> {
        let (size, _) = self.file(inode)?.size_and_time();
        if end > size {
            self.set_size(inode, Some(handle), end).await
        } else {
            Ok(())
        }
    }

    /// A descriptor was closed. Publishes when the closing process opened the file or wrote to
    /// it, and something was written; the answer is the truth about the store.
    pub async fn flush(self: &Arc<Self>, handle: u64, thread: u32) -> VfsResult<()> {
        let Ok(handle) = self.handles.file(handle) else {
            return Ok(());
        };
        if !handle.writable {
            return Ok(());
        }
        if !handle.may_publish(thread) {
            return Ok(());
        }
        handle.note_close();
        let draft = handle.file.state().draft.clone();
        let Some(draft) = draft.filter(|draft| draft.has_changes()) else {
            return Ok(());
        };
        let generation = draft.generation();
        let outcome = self.close(handle.inode, &handle.file).await;
        if outcome.is_err() {
            draft.note_failed_close(generation);
        }
        outcome
    }

    /// The last descriptor of a handle is gone. What no flush has published is published now,
    /// unless a flush has told that it could not be.
    pub fn release(self: &Arc<Self>, handle: u64) {
        let Some(handle) = self.handles.remove(handle) else {
            return;
        };
        let (inode, file) = (handle.inode, Arc::clone(&handle.file));
        let (last_writer, known) = {
            let mut state = file.state();
            self.close_local(&mut state, &handle);
            handle.note_use(&mut state);
            state.handles -= 1;
            state.writers -= usize::from(handle.writable);
            let draft = state.draft.as_ref();
            let known = draft.is_some_and(|draft| draft.is_known_to_have_failed());
            (handle.writable && state.writers == 0, known)
        };
        if last_writer && file.is_dirty() && !known {
            self.close_in_background(inode, file);
        } else {
            self.settle(inode, &file);
        }
        // A manifest may have waited for this.
        self.publish_ready();
    }

    pub(super) fn publish_in_background(self: &Arc<Self>, inode: Inode, file: Arc<File>) {
        let publishing = file.begin_publishing();
        let vfs = Arc::clone(self);
        self.runtime.spawn(async move {
            if let Err(error) = vfs.publish(inode, &file).await {
                tracing::error!(path = vfs.path(inode), %error,
                    "not stored, and nobody waits for it: its bytes are kept; \
                     `mlfs unmount` will try again");
            }
            drop(publishing);
            vfs.settle(inode, &file);
        });
    }

    /// Publishes a file under the name it has, and notes what the store now has there. While the
    /// store is in trouble it is tried again; in between the file can be moved and removed.
    pub(super) async fn publish(&self, inode: Inode, file: &Arc<File>) -> VfsResult<()> {
        let mut patience = self.writer.patience();
        loop {
            let draft = file.state().draft.clone();
            let Some(draft) = draft else { return Ok(()) };
            match self.publish_once(inode, file, &draft).await {
                Err(error) if patience.outlasts(&error, &draft).await => {}
                outcome => {
                    let outcome = outcome.map_err(VfsError::from);
                    file.state().failed = outcome.as_ref().err().cloned();
                    return outcome;
                }
            }
        }
    }

    async fn publish_once(
        &self,
        inode: Inode,
        file: &File,
        draft: &Arc<Draft>,
    ) -> Result<(), WriteError> {
        let _moving = file.moving.lock().await;
        file.state().storing = draft.is_dirty();
        let outcome = self.publish_draft(inode, file, draft).await;
        file.state().storing = false;
        outcome
    }

    async fn publish_draft(
        &self,
        inode: Inode,
        file: &File,
        draft: &Arc<Draft>,
    ) -> Result<(), WriteError> {
        let Some(stored) = draft.publish().await? else {
            return Ok(());
        };
        let info = FileInfo {
            size: stored.size,
            etag: stored.etag,
            modified: stored.modified.unwrap_or_else(SystemTime::now),
        };
        {
            let mut state = file.state();
            state.published = Some(info.clone());
            state.reader = None;
            if !draft.is_dirty() {
                state.modified = Some(info.modified);
            }
        }
        self.note_published(inode, info);
        self.forget_older(inode);
        Ok(())
    }

    fn note_published(&self, inode: Inode, info: FileInfo) {
        let tree = self.tree.lock();
        let Some(node) = tree.get(inode).filter(|node| !node.unlinked) else {
            return;
        };
        if let Some(Kind::Artifacts(_, directory) | Kind::Directory(directory)) =
            tree.get(node.parent).map(|parent| &parent.kind)
        {
            directory
                .names
                .lock()
                .change(&node.name, Some(Entry::File(info)));
        }
    }

    /// Lets go of what nobody needs any more of a file that is closed or published.
    pub(super) fn settle(&self, inode: Inode, file: &File) {
        {
            let mut state = file.state();
            let clean = state.draft.as_ref().is_some_and(|draft| !draft.is_dirty());
            // Nothing but the draft has what an unlinked file holds: its readers need it, too.
            let users = if state.unlinked {
                state.handles
            } else {
                state.writers
            };
            if clean && users == 0 && state.publishing == 0 {
                state.draft = None;
                state.closed = None;
            }
            if state.handles == 0 {
                state.reader = None;
            }
        }
        self.tree.lock().reap(inode);
        self.settled.notify_waiters();
    }
}
