//! Uploads that somebody has to know of: what former mounts left, what failed, and what to do.
//!
//! When a mount begins, it takes over what mounts before it left in the spill directory. A file
//! whose writer had closed it is sent; anything else waits for a word: one that was never closed,
//! one whose run is gone, one in whose place something newer stands.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::Vfs;
use super::error::{VfsError, VfsResult};
use super::file::File;
use super::tree::{Inode, Order};
use crate::store::StoreError;
use crate::write::{Draft, Leftover, ResumeError};

/// An upload that is not done, as people see it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UploadStatus {
    pub id: String,
    /// Below the mount point.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// When it was begun, in seconds since 1970.
    pub since: u64,
    /// `open`, `uploading`, `waiting`, `failed`, or `left` by a former mount.
    pub state: String,
    /// Why it failed, or waits for a word.
    pub reason: Option<String>,
}

/// What a former mount left, and what became of it.
#[derive(Debug)]
enum Former {
    /// Not looked at yet.
    Found(Leftover),
    /// Waits for a word, and why.
    Left(Leftover, String),
    /// Being looked at or sent.
    Resumed(Arc<Draft>),
    Busy(UploadStatus),
}

/// Everything that former mounts left and that is not done, by id.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    former: Mutex<BTreeMap<String, Former>>,
}

impl Vfs {
    /// Takes over what former mounts left. Looks at the local disk, and at nothing else.
    pub fn take_over(&self) {
        let mut former = self.uploads.former.lock();
        for leftover in self.writer.leftovers() {
            tracing::info!(
                id = leftover.id(),
                path = leftover.path(),
                size = leftover.size(),
                "a former mount left this unsent"
            );
            former.insert(leftover.id().to_owned(), Former::Found(leftover));
        }
    }

    /// Sends what was taken over and can be sent without anybody's word. Of several files that were
    /// to have one name, only the one that was closed last.
    pub async fn recover(self: &Arc<Self>) {
        let mut found: Vec<(String, String, Option<u64>)> = {
            let former = self.uploads.former.lock();
            let found = former.iter().filter_map(|(id, former)| match former {
                Former::Found(leftover) => {
                    let name = format!("{}/{}", leftover.store(), leftover.key());
                    Some((id.clone(), name, leftover.closed_at()))
                }
                _ => None,
            });
            found.collect()
        };
        found.sort_by_key(|(_, _, closed)| std::cmp::Reverse(*closed));
        let mut names = HashSet::new();
        for (id, name, closed) in found {
            if closed.is_some() && !names.insert(name) {
                self.uploads
                    .hold(&id, "a later version of the same file was left too");
            } else {
                self.resume(&id, false).await;
            }
        }
    }

    /// Goes on with what a former mount left; `told` means whatever stands in its place.
    async fn resume(self: &Arc<Self>, id: &str, told: bool) {
        if let Some(leftover) = self.uploads.take(id) {
            self.go_on(id, leftover, told).await;
        }
    }

    async fn go_on(self: &Arc<Self>, id: &str, leftover: Leftover, told: bool) {
        let outcome = self.try_resume(leftover, told).await;
        match outcome {
            Ok(Some(draft)) => {
                let former = Former::Resumed(Arc::clone(&draft));
                self.uploads.former.lock().insert(id.to_owned(), former);
                self.send(draft);
            }
            Ok(None) => {
                self.uploads.former.lock().remove(id);
            }
            Err((leftover, reason)) => {
                tracing::warn!(
                    id,
                    path = leftover.path(),
                    reason,
                    "not sent; see `mlfs uploads`"
                );
                let former = Former::Left(leftover, reason);
                self.uploads.former.lock().insert(id.to_owned(), former);
            }
        }
    }

    /// `None` when the store has it already.
    async fn try_resume(
        &self,
        leftover: Leftover,
        told: bool,
    ) -> Result<Option<Arc<Draft>>, (Leftover, String)> {
        match leftover.obstacle() {
            _ if leftover.is_discarded() => {}
            None => {}
            Some(ResumeError::Unclosed) if told => {}
            Some(error) => return Err((leftover, error.to_string())),
        }
        let run = leftover.path().split('/').next().unwrap_or_default();
        if let Err(error) = self.catalog.run_entry(run).await {
            let reason = format!("its run: {error}");
            return Err((leftover, reason));
        }
        let store = match self.stores.locate(leftover.store()).await {
            Ok(location) => location.store,
            Err(error) => return Err((leftover, error.to_string())),
        };
        if leftover.is_discarded() {
            return match leftover.discard(&store).await {
                Ok(()) => Ok(None),
                Err((leftover, error)) => Err((leftover, format!("discarded, but {error}"))),
            };
        }
        let standing = match leftover.standing(&store).await {
            Ok(standing) => standing,
            Err(error) => return Err((leftover, error.to_string())),
        };
        if let Some(meta) = &standing {
            match leftover.is_stored(&store, meta).await {
                Ok(true) => {
                    tracing::info!(id = leftover.id(), path = leftover.path(), "stored already");
                    return match leftover.discard(&store).await {
                        Ok(()) => Ok(None),
                        Err((leftover, error)) => {
                            Err((leftover, format!("stored already, but {error}")))
                        }
                    };
                }
                Ok(false) if !told && leftover.is_overtaken_by(meta) => {
                    let reason = "something newer stands in its place: retry to overwrite it, or \
                                  discard this";
                    return Err((leftover, reason.to_owned()));
                }
                Ok(false) => {}
                Err(error) => return Err((leftover, error.to_string())),
            }
        }
        match leftover.resume(&self.writer, &store).await {
            Ok(draft) => {
                draft.replace_only(standing.and_then(|meta| meta.etag));
                Ok(Some(draft))
            }
            Err((leftover, error)) => Err((leftover, error.to_string())),
        }
    }

    /// Publishes what a former mount had not, in the background.
    fn send(self: &Arc<Self>, draft: Arc<Draft>) {
        draft.forget_failure();
        let vfs = Arc::clone(self);
        self.runtime.spawn(async move {
            let mut patience = vfs.writer.patience();
            let outcome = loop {
                match draft.publish().await {
                    Err(error) if patience.outlasts(&error, &draft).await => {}
                    outcome => break outcome,
                }
            };
            match outcome {
                Ok(_) => {
                    tracing::info!(
                        id = draft.id(),
                        path = draft.target().path,
                        "stored at last"
                    );
                    vfs.uploads.former.lock().remove(draft.id());
                    // Whoever looks sees it.
                    vfs.tree.lock().forget_listings();
                }
                Err(error) => {
                    tracing::error!(id = draft.id(), path = draft.target().path, %error,
                        "not stored; its bytes are kept: see `mlfs uploads`");
                }
            }
        });
    }

    /// Sends again what was taken over and has failed.
    pub(super) fn send_resumed(self: &Arc<Self>) {
        let failed: Vec<Arc<Draft>> = {
            let former = self.uploads.former.lock();
            let resumed = former.values().filter_map(|former| match former {
                Former::Resumed(draft) if draft.failure().is_some() => Some(Arc::clone(draft)),
                _ => None,
            });
            resumed.collect()
        };
        for draft in failed {
            self.send(draft);
        }
    }

    /// Everything that is not stored, of this mount and of those before it.
    pub fn uploads(&self) -> Vec<UploadStatus> {
        let mut all = self.pending();
        let former = self.uploads.former.lock();
        all.extend(former.values().map(Former::status));
        all.sort_by(|one, other| one.path.cmp(&other.path));
        all
    }

    /// What former mounts left and is on its way now.
    pub(super) fn resumed(&self) -> Vec<UploadStatus> {
        let former = self.uploads.former.lock();
        let resumed = former
            .values()
            .filter(|former| !matches!(former, Former::Left(..)));
        resumed.map(Former::status).collect()
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
        if let Some((inode, file)) = self.dirty_file(id) {
            self.publish_in_background(inode, file);
            return;
        }
        let (vfs, id) = (Arc::clone(self), id.to_owned());
        match self.uploads.draft(&id) {
            None => {
                // At once, so that whoever looks sees it on its way.
                let Some(leftover) = self.uploads.take(&id) else {
                    return;
                };
                self.runtime
                    .spawn(async move { vfs.go_on(&id, leftover, true).await });
            }
            Some(draft) => {
                draft.forget_failure();
                self.runtime.spawn(async move {
                    let target = draft.target();
                    match target.store.head(&target.key).await {
                        Ok(meta) => draft.replace_only(meta.etag),
                        Err(StoreError::NotFound { .. }) => draft.replace_only(None),
                        // Then the former condition holds.
                        Err(error) => tracing::debug!(id, %error, "not looked at"),
                    }
                    vfs.send(draft);
                });
            }
        }
    }

    async fn discard(self: &Arc<Self>, id: &str) -> VfsResult<()> {
        if let Some((inode, file)) = self.dirty_file(id) {
            return self.forget_changes(inode, &file).await;
        }
        if let Some(draft) = self.uploads.draft(id) {
            draft.detach().await;
            self.uploads.former.lock().remove(id);
            return Ok(());
        }
        let Some(leftover) = self.uploads.take(id) else {
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

impl UploadStatus {
    /// Whether nothing goes on with it by itself.
    pub fn waits_for_a_word(&self) -> bool {
        matches!(self.state.as_str(), "failed" | "left")
    }
}

impl Former {
    fn status(&self) -> UploadStatus {
        match self {
            Self::Busy(status) => status.clone(),
            Self::Found(leftover) => describe(leftover, "waiting", None),
            Self::Left(leftover, reason) => {
                let reason = match leftover.failure() {
                    Some(failure) => format!("{reason}; {failure}"),
                    None => reason.clone(),
                };
                describe(leftover, "left", Some(reason))
            }
            Self::Resumed(draft) => {
                let reason = draft.failure();
                UploadStatus {
                    id: draft.id().to_owned(),
                    path: draft.target().path,
                    size: draft.size(),
                    since: draft.since(),
                    state: if reason.is_some() {
                        "failed"
                    } else {
                        "uploading"
                    }
                    .to_owned(),
                    reason,
                }
            }
        }
    }
}

fn describe(leftover: &Leftover, state: &str, reason: Option<String>) -> UploadStatus {
    UploadStatus {
        id: leftover.id().to_owned(),
        path: leftover.path().to_owned(),
        size: leftover.size(),
        since: leftover.since(),
        state: state.to_owned(),
        reason,
    }
}

impl Uploads {
    /// Takes a leftover out, to be worked on; meanwhile it counts as on its way.
    fn take(&self, id: &str) -> Option<Leftover> {
        let mut former = self.former.lock();
        let entry = former.get_mut(id)?;
        let busy = Former::Busy(UploadStatus {
            state: "uploading".to_owned(),
            reason: None,
            ..entry.status()
        });
        match std::mem::replace(entry, busy) {
            Former::Found(leftover) | Former::Left(leftover, _) => Some(leftover),
            other => {
                *entry = other;
                None
            }
        }
    }

    /// Keeps a leftover until somebody says a word.
    fn hold(&self, id: &str, reason: &str) {
        if let Some(leftover) = self.take(id) {
            self.put_back(leftover, reason.to_owned());
        }
    }

    fn put_back(&self, leftover: Leftover, reason: String) {
        let id = leftover.id().to_owned();
        self.former
            .lock()
            .insert(id, Former::Left(leftover, reason));
    }

    fn draft(&self, id: &str) -> Option<Arc<Draft>> {
        match self.former.lock().get(id) {
            Some(Former::Resumed(draft)) => Some(Arc::clone(draft)),
            _ => None,
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
