//! Uploads that somebody has to know of: what former mounts left, what failed, and what to do.
//!
//! When a mount begins, it takes over what mounts before it left in the spill directory. A file
//! whose writer had closed it is sent; anything else waits for a word: one that was never closed,
//! one whose run is gone, one in whose place something newer stands.

use std::collections::HashMap;
use std::sync::Arc;

use super::Vfs;
use super::closing::Item;
use super::error::{VfsError, VfsResult};
use super::file::File;
use super::former::Former;
use super::queue::Standing;
use super::tree::{Inode, Order};
use super::upload_status::UploadStatus;
use crate::catalog::RootId;
use crate::write::{Draft, Leftover, ResumeError};

/// Why something is not sent without a word.
struct Refusal {
    reason: String,
    /// Something newer has taken its place: nobody misses it.
    overtaken: bool,
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self {
            reason,
            overtaken: false,
        }
    }
}

fn name_of(leftover: &Leftover) -> String {
    format!("{}/{}", leftover.store(), leftover.key())
}

impl Vfs {
    /// Takes over what former mounts left. Looks at the local disk, and at nothing else. What was
    /// closed goes into the queue, in the order of the closes; of several files that were to have
    /// one name, only the one that was closed last.
    pub fn take_over(&self) {
        let mut found = self.writer.leftovers();
        found.sort_by_key(Leftover::closed_at);
        let mut last: HashMap<String, String> = HashMap::new();
        for leftover in found.iter().filter(|it| it.closed_at().is_some()) {
            last.insert(name_of(leftover), leftover.id().to_owned());
        }
        for leftover in found {
            let (id, path) = (leftover.id().to_owned(), leftover.path().to_owned());
            tracing::info!(
                id,
                path,
                size = leftover.size(),
                "a former mount left this unsent"
            );
            let overtaken = leftover.closed_at().is_some()
                && last.get(&name_of(&leftover)).is_some_and(|it| *it != id);
            let discarded = leftover.is_discarded();
            let obstacle = leftover.obstacle().filter(|_| !discarded);
            let unclosed = obstacle.is_some();
            let queued = !unclosed && !discarded;
            let former = match obstacle {
                Some(obstacle) => {
                    let reason = obstacle.to_string();
                    tracing::warn!(id, path, reason, "not sent; see `mlfs uploads`");
                    Former::Left(leftover, reason)
                }
                None if overtaken => {
                    let reason = "a later version of the same file was left too";
                    Former::Left(leftover, reason.to_owned())
                }
                None => Former::Found(leftover),
            };
            self.uploads.former.lock().insert(id.clone(), former);
            let mut queue = self.queue.lock();
            if unclosed {
                // Its directory is incomplete until somebody says what is to become of it.
                queue.add_failed(Item::Former(id), &path);
            } else if queued && !overtaken {
                queue.add(Item::Former(id), &path, false);
            }
        }
    }

    /// Sends what was taken over and can be sent without anybody's word, and gives up in the store
    /// what was discarded when it could not be reached.
    pub async fn recover(self: &Arc<Self>) {
        let discarded: Vec<String> = {
            let former = self.uploads.former.lock();
            let found = former.iter().filter_map(|(id, former)| match former {
                Former::Found(it) if it.is_discarded() => Some(id),
                _ => None,
            });
            found.cloned().collect()
        };
        for id in discarded {
            // Somebody may have said a word meanwhile: then it is in the queue.
            if let Some(leftover) = self.uploads.take_found(&id) {
                self.go_on(&id, leftover, false).await;
            }
        }
        self.publish_ready();
    }

    /// Goes on with what a former mount left, as far as making it a draft again; `told` means
    /// whatever stands in its place. True when it is done with.
    async fn go_on(self: &Arc<Self>, id: &str, leftover: Leftover, told: bool) -> bool {
        match self.try_resume(leftover, told).await {
            Ok(Some(draft)) => {
                let former = Former::Resumed { draft, told: false };
                self.uploads.former.lock().insert(id.to_owned(), former);
                false
            }
            Ok(None) => {
                self.uploads.former.lock().remove(id);
                true
            }
            Err((leftover, refusal)) => {
                tracing::warn!(
                    id,
                    path = leftover.path(),
                    reason = refusal.reason,
                    "not sent; see `mlfs uploads`"
                );
                self.uploads.put_back(leftover, refusal.reason);
                refusal.overtaken
            }
        }
    }

    /// `None` when the store has it already.
    async fn try_resume(
        &self,
        leftover: Leftover,
        told: bool,
    ) -> Result<Option<Arc<Draft>>, (Leftover, Refusal)> {
        match leftover.obstacle() {
            _ if leftover.is_discarded() => {}
            None => {}
            Some(ResumeError::Unclosed) if told => {}
            Some(error) => return Err((leftover, error.to_string().into())),
        }
        let Some(root) = RootId::of_path(leftover.path()) else {
            let reason = "its path leads through no run or model".to_owned();
            return Err((leftover, reason.into()));
        };
        if let Err(error) = self.catalog.root_entry(&root).await {
            let reason = format!("its {}: {error}", root.kind());
            return Err((leftover, reason.into()));
        }
        let store = match self.stores.locate(leftover.store()).await {
            Ok(location) => location.store,
            Err(error) => return Err((leftover, error.to_string().into())),
        };
        if leftover.is_discarded() {
            return match leftover.discard(&store).await {
                Ok(()) => Ok(None),
                Err((leftover, error)) => Err((leftover, format!("discarded, but {error}").into())),
            };
        }
        let standing = match store.find(leftover.key()).await {
            Ok(standing) => standing,
            Err(error) => return Err((leftover, error.to_string().into())),
        };
        if let Some(meta) = &standing {
            match leftover.is_stored(&store, meta).await {
                Ok(true) => {
                    tracing::info!(id = leftover.id(), path = leftover.path(), "stored already");
                    return match leftover.discard(&store).await {
                        Ok(()) => Ok(None),
                        Err((leftover, error)) => {
                            Err((leftover, format!("stored already, but {error}").into()))
                        }
                    };
                }
                Ok(false) if !told && leftover.is_overtaken_by(meta) => {
                    let reason = "something newer stands in its place: retry to overwrite it, or \
                                  discard this";
                    let refusal = Refusal {
                        reason: reason.to_owned(),
                        overtaken: true,
                    };
                    return Err((leftover, refusal));
                }
                Ok(false) => {}
                Err(error) => return Err((leftover, error.to_string().into())),
            }
        }
        match leftover.resume(&self.writer, &store).await {
            Ok(draft) => {
                draft.replace_only(standing);
                Ok(Some(draft))
            }
            Err((leftover, error)) => Err((leftover, error.to_string().into())),
        }
    }

    /// Publishes what a former mount had not; true when nothing is left to do for it.
    pub(super) async fn publish_former(self: &Arc<Self>, id: &str) -> bool {
        if let Some((leftover, told)) = self.uploads.take(id) {
            if self.go_on(id, leftover, told).await {
                return true;
            }
        } else if let Some(draft) = self.uploads.take_word(id) {
            let target = draft.target();
            match target.store.find(&target.key).await {
                Ok(standing) => draft.replace_only(standing),
                // Then the former condition holds.
                Err(error) => tracing::debug!(id, %error, "not looked at"),
            }
        }
        let Some(draft) = self.uploads.draft(id) else {
            // It was discarded, or waits for a word.
            return self.uploads.status(id).is_none();
        };
        draft.forget_failure();
        let mut patience = self.writer.patience();
        let outcome = loop {
            match draft.publish().await {
                Err(error) if patience.outlasts(&error, &draft).await => {}
                outcome => break outcome,
            }
        };
        match outcome {
            Ok(_) => {
                let path = draft.target().path;
                tracing::info!(id, path, "stored at last");
                self.uploads.former.lock().remove(id);
                // Whoever looks sees it.
                self.tree.lock().forget_listings();
                true
            }
            Err(error) => {
                tracing::error!(id, path = draft.target().path, %error,
                    "not stored; its bytes are kept: see `mlfs uploads`");
                false
            }
        }
    }

    /// Sends again what was taken over and has failed.
    pub(super) fn send_resumed(self: &Arc<Self>) {
        let failed: Vec<String> = {
            let former = self.uploads.former.lock();
            let resumed = former.iter().filter_map(|(id, former)| match former {
                Former::Resumed { draft, .. } if draft.failure().is_some() => Some(id.clone()),
                _ => None,
            });
            resumed.collect()
        };
        for id in failed {
            self.retry_former(&id, false);
        }
    }

    /// Puts what a former mount left into the queue again; `told` means whatever stands in its
    /// place by now.
    fn retry_former(self: &Arc<Self>, id: &str, told: bool) {
        // At once, so that whoever looks sees it on its way.
        let Some(status) = self.uploads.set_waiting(id, told) else {
            return;
        };
        let item = Item::Former(id.to_owned());
        {
            let mut queue = self.queue.lock();
            match queue.standing(&item) {
                Some(_) => queue.retry(&item),
                None => queue.add(item, &status.path, false),
            }
        }
        self.publish_ready();
    }

    /// Everything that is not stored, of this mount and of those before it.
    pub fn uploads(&self) -> Vec<UploadStatus> {
        let mut all = self.pending();
        all.extend(self.former(|_| true));
        all.sort_by(|one, other| one.path.cmp(&other.path));
        all
    }

    /// What former mounts left and is on its way now.
    pub(super) fn resumed(&self) -> Vec<UploadStatus> {
        self.former(|former| !matches!(former, Former::Left(..)))
    }

    fn former(&self, which: impl Fn(&Former) -> bool) -> Vec<UploadStatus> {
        let mut all: Vec<UploadStatus> = {
            let former = self.uploads.former.lock();
            let meant = former.values().filter(|former| which(former));
            meant.map(Former::status).collect()
        };
        for upload in &mut all {
            let item = Item::Former(upload.id.clone());
            upload.held_by = self.held_by(&item);
            // It may have failed, and be tried again.
            if self.standing(&item).0 == Some(Standing::Trying) {
                "uploading".clone_into(&mut upload.state);
            }
        }
        all
    }

    /// Does what was written to a control file: `drain` anything; `retry` and `discard` ids, or
    /// `all`.
    ///
    /// # Errors
    /// `ENOENT` when there is no upload of an id; `EBUSY` for one that is being written.
    pub(super) async fn obey(self: &Arc<Self>, order: Order, text: &[u8]) -> VfsResult<()> {
        if order == Order::Drain {
            self.begin_drain();
            return Ok(());
        }
        let text = String::from_utf8_lossy(text);
        let all = self.uploads();
        let named: Vec<&UploadStatus> = match text.trim() {
            // What somebody can have been shown.
            "all" => all.iter().filter(|it| it.waits_for_a_word()).collect(),
            ids => {
                let find = |id| all.iter().find(|upload| upload.id == id);
                let found: Option<Vec<_>> = ids.split_whitespace().map(find).collect();
                found.ok_or(VfsError::NOT_FOUND)?
            }
        };
        for upload in named {
            if !upload.waits_for_a_word() {
                return Err(VfsError::BUSY);
            }
            match order {
                Order::Drain => {}
                Order::Retry => self.retry(&upload.id),
                Order::Discard => self.discard(&upload.id).await?,
            }
        }
        self.recover_more();
        Ok(())
    }

    fn dirty_file(&self, id: &str) -> Option<(Inode, Arc<File>)> {
        let mut files = self.dirty_files().into_iter();
        files.find(|(_, file)| {
            let state = file.state();
            state.draft.as_ref().is_some_and(|draft| draft.id() == id)
        })
    }

    /// Takes over what mounts left that ended since this one began.
    pub(super) fn recover_more(self: &Arc<Self>) {
        if self.options.read_only {
            return;
        }
        self.take_over();
        let vfs = Arc::clone(self);
        self.runtime.spawn(async move { vfs.recover().await });
    }

    /// Sends one again, in the background; whatever stands in its place by now.
    fn retry(self: &Arc<Self>, id: &str) {
        match self.dirty_file(id) {
            Some((inode, file)) => self.retry_file(inode, file),
            None => self.retry_former(id, true),
        }
    }

    /// Gives one up. A manifest may have waited for it.
    async fn discard(self: &Arc<Self>, id: &str) -> VfsResult<()> {
        if let Some((inode, file)) = self.dirty_file(id) {
            self.forget_changes(inode, &file).await?;
            self.dropped(&Item::File(inode));
            return Ok(());
        }
        self.discard_former(id).await?;
        self.dropped(&Item::Former(id.to_owned()));
        Ok(())
    }

    async fn discard_former(&self, id: &str) -> VfsResult<()> {
        if let Some(draft) = self.uploads.draft(id) {
            draft.detach().await;
            self.uploads.former.lock().remove(id);
            return Ok(());
        }
        let Some((leftover, _)) = self.uploads.take(id) else {
            return Err(VfsError::NOT_FOUND);
        };
        let store = match self.stores.locate(leftover.store()).await {
            Ok(location) => location.store,
            Err(error) => {
                self.uploads.put_back(leftover, error.to_string());
                return Err(error.into());
            }
        };
        tracing::info!(id, path = leftover.path(), "discarded");
        match leftover.discard(&store).await {
            Ok(()) => {
                self.uploads.former.lock().remove(id);
                Ok(())
            }
            Err((leftover, error)) => {
                let reason = format!("discarded, but {error}");
                self.uploads.put_back(leftover, reason);
                Err(error.into())
            }
        }
    }
}

impl Vfs {
    /// Drops what was written to a file since it was last stored.
    async fn forget_changes(&self, inode: Inode, file: &Arc<File>) -> VfsResult<()> {
        let _moving = file.moving.lock().await;
        let draft = {
            let mut state = file.state();
            if state.writers > 0 || state.publishing > 0 {
                return Err(VfsError::BUSY);
            }
            state.reader = None;
            state.kernel_version = None;
            state.modified = None;
            state.draft.take()
        };
        if let Some(draft) = draft {
            draft.detach().await;
        }
        let mut tree = self.tree.lock();
        if file.state().published.is_none() {
            let place = tree.get(inode).map(|node| (node.parent, node.name.clone()));
            if let Some((parent, name)) = place {
                tree.unlink(parent, &name);
            }
        }
        tree.forget_listings();
        tree.reap(inode);
        Ok(())
    }
}
