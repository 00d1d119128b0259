//! Closing files, and publishing in the background what was closed, in the order of the queue.
//!
//! With `--close=stored` a close is the publication. With `--close=journaled` it makes the file
//! durable on local disk and leaves the rest to the queue; where that cannot be done, it waits for
//! the queue to store it. What former mounts left goes through the same queue, in either mode.

use std::sync::Arc;

use super::error::{VfsError, VfsResult};
use super::file::File;
use super::queue::{Rank, Standing};
use super::tree::{Inode, Kind, ROOT};
use super::{CloseMode, Vfs};
use crate::write::Draft;

/// Something in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Item {
    File(Inode),
    /// What a former mount left, by its id.
    Former(String),
}

impl Vfs {
    /// A writer has closed the file: it is stored, or durable on local disk, when this returns.
    pub(super) async fn close(self: &Arc<Self>, inode: Inode, file: &Arc<File>) -> VfsResult<()> {
        if self.options.close == CloseMode::Stored {
            return self.publish(inode, file).await;
        }
        let draft = file.state().draft.clone();
        let Some(draft) = draft.filter(|draft| draft.is_dirty()) else {
            return Ok(());
        };
        // Before it is written down: what is written meanwhile belongs to the next close.
        let generation = draft.generation();
        if self.is_on_its_way(inode, file, generation) {
            return Ok(());
        }
        if self.queue.lock().len() >= self.options.most_queued {
            tracing::debug!(
                path = self.path(inode),
                "many files wait for the store: so does this"
            );
        } else {
            match draft.keep(true).await {
                Ok(()) => {
                    self.enqueue(inode, file, &draft, generation, false);
                    return Ok(());
                }
                Err(error) => tracing::info!(path = self.path(inode), %error,
                    "not on local disk: its close waits until it is stored"),
            }
        }
        self.enqueue(inode, file, &draft, generation, true);
        self.wait_until_stored(inode, file).await
    }

    /// A file has another name, under which parts that were sent may count no longer: if it is
    /// closed, it is made durable anew.
    pub(super) async fn journal_again(&self, file: &File, draft: &Arc<Draft>) {
        let closed = file.state().closed == Some(draft.generation()) && draft.is_dirty();
        if closed && let Err(error) = draft.keep(true).await {
            tracing::warn!(path = draft.target().path, %error,
                "renamed after its close, and not safe on local disk until it is stored");
        }
    }

    /// The last writer is gone, and nobody waits for what it left.
    pub(super) fn close_in_background(self: &Arc<Self>, inode: Inode, file: Arc<File>) {
        if self.options.close == CloseMode::Stored {
            self.publish_in_background(inode, file);
            return;
        }
        let Some(draft) = file.state().draft.clone() else {
            return;
        };
        let generation = draft.generation();
        if self.is_on_its_way(inode, &file, generation) {
            self.settle(inode, &file);
            return;
        }
        // At once, for the order; a crash before it is written down forgets what nobody was told.
        self.enqueue(inode, &file, &draft, generation, false);
        let vfs = Arc::clone(self);
        self.runtime.spawn(async move {
            if draft.is_dirty()
                && let Err(error) = draft.keep(true).await
            {
                tracing::debug!(path = vfs.path(inode), %error, "not on local disk");
            }
        });
    }

    /// Whether just this content is in the queue already.
    fn is_on_its_way(&self, inode: Inode, file: &File, generation: u64) -> bool {
        let queued = self.standing(&Item::File(inode)).0;
        let moves = matches!(queued, Some(Standing::Waiting | Standing::Trying));
        moves && file.state().closed == Some(generation)
    }

    fn enqueue(
        self: &Arc<Self>,
        inode: Inode,
        file: &File,
        draft: &Draft,
        generation: u64,
        urgent: bool,
    ) {
        {
            let mut state = file.state();
            state.closed = Some(generation);
            state.failed = None;
        }
        draft.forget_failure();
        {
            let mut queue = self.queue.lock();
            // Under the queue's lock: whoever renames it looks there afterwards.
            let path = self.path(inode);
            queue.add(Item::File(inode), &path, urgent);
        }
        self.publish_ready();
    }

    /// Where an item stands in the queue, and whether it stands behind something that has failed.
    pub(super) fn standing(&self, item: &Item) -> (Option<Standing>, bool) {
        let queue = self.queue.lock();
        (queue.standing(item), queue.is_stuck(item))
    }

    /// The path of what a manifest in the queue waits for.
    pub(super) fn held_by(&self, item: &Item) -> Option<String> {
        let queue = self.queue.lock();
        if queue.standing(item) != Some(Standing::Waiting) {
            return None;
        }
        if let Some(other) = queue.held_by(item) {
            return queue.path(other).map(str::to_owned);
        }
        let path = queue.path(item)?;
        let (directory, rank) = (path.rsplit_once('/')?.0, Rank::of(path));
        if !rank.is_manifest() {
            return None;
        }
        self.dirty_below(directory, rank, &|inode| {
            queue.standing(&Item::File(inode)).is_some()
        })
    }

    /// Whether a manifest in the queue waits, in the end, for a file that is open for writing.
    pub(super) fn waits_for_open(&self, item: &Item) -> bool {
        let mut at = item.clone();
        // A manifest waits for one of lower rank, or deeper down: this ends.
        loop {
            let before = self.queue.lock().held_by(&at).cloned();
            match before {
                Some(before) => at = before,
                None => return self.held_by(&at).is_some(),
            }
        }
    }

    /// Something dirty in `directory` or below that is not in the queue and comes before a
    /// manifest of this rank.
    fn dirty_below(
        &self,
        directory: &str,
        rank: Rank,
        queued: &dyn Fn(Inode) -> bool,
    ) -> Option<String> {
        let tree = self.tree.lock();
        let mut at = ROOT;
        for name in directory.split('/') {
            at = tree.child(at, name)?.0;
        }
        let files = tree.files_below(at);
        let found = files.into_iter().find(|(inode, file)| {
            let after = tree.get(*inode).is_some_and(|node| {
                node.unlinked || (node.parent == at && Rank::of(&node.name) > rank)
            });
            !after && !queued(*inode) && file.is_dirty()
        });
        found.map(|(inode, _)| tree.path(inode))
    }

    /// Begins to publish whatever the order allows.
    pub(super) fn publish_ready(self: &Arc<Self>) {
        let ready = {
            let mut queue = self.queue.lock();
            if queue.len() == 0 {
                return;
            }
            queue.ready(|directory, rank, queued| {
                let queued = |inode| queued(&Item::File(inode));
                self.dirty_below(directory, rank, &queued).is_some()
            })
        };
        for item in ready {
            match item {
                Item::File(inode) => {
                    let kind = self.tree.lock().get(inode).map(|node| node.kind.clone());
                    let Some(Kind::File(file)) = kind else {
                        // It was removed: nothing of it is published any more.
                        self.finished(&Item::File(inode), true);
                        continue;
                    };
                    let publishing = file.begin_publishing();
                    let vfs = Arc::clone(self);
                    self.runtime.spawn(async move {
                        let done = vfs.publish_closed(inode, &file).await;
                        drop(publishing);
                        vfs.finished(&Item::File(inode), done);
                        vfs.settle(inode, &file);
                    });
                }
                Item::Former(id) => {
                    let vfs = Arc::clone(self);
                    self.runtime.spawn(async move {
                        let done = vfs.publish_former(&id).await;
                        vfs.finished(&Item::Former(id), done);
                    });
                }
            }
        }
    }

    fn finished(self: &Arc<Self>, item: &Item, done: bool) {
        self.queue.lock().finished(item, done);
        self.settled.notify_waiters();
        self.publish_ready();
    }

    /// Publishes a file as it was closed; true when nothing is left to do for it. One that is
    /// written to again is left to its next close.
    async fn publish_closed(&self, inode: Inode, file: &Arc<File>) -> bool {
        let urgent = self.queue.lock().is_urgent(&Item::File(inode));
        let (draft, closed) = {
            let state = file.state();
            (state.draft.clone(), state.closed)
        };
        let Some(draft) = draft else { return true };
        draft.publish_only(closed.filter(|_| !urgent));
        let outcome = self.publish(inode, file).await;
        draft.publish_only(None);
        match outcome {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(path = self.path(inode), %error,
                    "not stored, although it is closed: its bytes are kept, see `mlfs uploads`");
                false
            }
        }
    }

    /// Waits until a file is stored that is in the queue and not on local disk.
    async fn wait_until_stored(&self, inode: Inode, file: &File) -> VfsResult<()> {
        let item = Item::File(inode);
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            match self.standing(&item) {
                (None, _) => return Ok(()),
                (Some(Standing::Failed), _) => {
                    let failed = file.state().failed.clone();
                    return Err(failed.unwrap_or(VfsError::plain(libc::EIO)));
                }
                (Some(_), true) => {
                    let behind = self.held_by(&item).unwrap_or_default();
                    let cause = format!(
                        "it makes its directory loadable, and {behind} could not be stored; its \
                         bytes are kept in memory: see `mlfs uploads`"
                    );
                    return Err(VfsError::because(libc::EIO, &cause));
                }
                (Some(_), false) => settled.await,
            }
        }
    }

    /// The file is stored: versions of it that a former mount left matter no more.
    pub(super) fn forget_older(&self, inode: Inode) {
        let mut queue = self.queue.lock();
        let path = self.path(inode);
        queue.supersede(&path, |item| matches!(item, Item::Former(_)));
    }

    /// The file has another path now; so have those below, if it is a directory.
    pub(super) fn moved(self: &Arc<Self>, inode: Inode) {
        {
            let mut queue = self.queue.lock();
            if queue.len() > 0 {
                let tree = self.tree.lock();
                for (inode, _) in tree.files_below(inode) {
                    queue.moved(&Item::File(inode), &tree.path(inode));
                }
            }
        }
        self.publish_ready();
    }

    /// Nothing of it will be published.
    pub(super) fn dropped(self: &Arc<Self>, item: &Item) {
        self.queue.lock().remove(item);
        self.settled.notify_waiters();
        self.publish_ready();
    }

    /// Tries again what failed, in its old place.
    pub(super) fn retry_file(self: &Arc<Self>, inode: Inode, file: Arc<File>) {
        let item = Item::File(inode);
        let known = self.standing(&item).0;
        if self.options.close == CloseMode::Stored {
            self.publish_in_background(inode, file);
        } else if known.is_some() {
            if let Some(draft) = file.state().draft.clone() {
                draft.forget_failure();
            }
            file.state().failed = None;
            self.queue.lock().retry(&item);
            self.publish_ready();
        } else {
            self.close_in_background(inode, file);
        }
    }

    /// Where something stands that is to be stored before a manifest becomes visible at `path`.
    fn before(&self, path: &str) -> Option<Standing> {
        if self.options.close == CloseMode::Stored || !Rank::of(path).is_manifest() {
            return None;
        }
        self.queue.lock().before(path)
    }

    /// Whether a stored file can be shown at `path` at once.
    pub(super) fn is_its_turn(&self, path: &str) -> bool {
        self.before(path).is_none()
    }

    /// Waits until a manifest may become visible at `path`: until everything closed that comes
    /// before it is stored.
    ///
    /// # Errors
    /// `EIO` when something there could not be stored.
    pub(super) async fn wait_for_turn(&self, path: &str) -> VfsResult<()> {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            match self.before(path) {
                None => return Ok(()),
                Some(Standing::Failed) => {
                    return Err(VfsError::because(
                        libc::EIO,
                        "it would make its directory loadable, and something there could not be \
                         stored: see `mlfs uploads`",
                    ));
                }
                Some(_) => settled.await,
            }
        }
    }
}
