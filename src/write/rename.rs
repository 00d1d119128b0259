//! How a draft gets another name after parts of it were sent.
//!
//! Parts are bound to the name that their upload was begun with. A few are sent again under the new
//! one. Where many were sent, or the local copy of one was given up, the upload is completed under
//! the old name, its object copied inside the store, part by part, into an upload under the new
//! one, and removed.

use std::sync::Arc;

use super::draft::Draft;
use super::error::WriteError;
use super::journal::{Record, Spent};
use super::publish::Versions;
use super::recognise::remove_if_same;
use super::state::{Misplaced, State};
use super::target::Target;
use crate::store::{ETag, ObjectMeta, Stored};

/// From so many parts on they are copied inside the store rather than sent again.
pub(super) const WORTH_COPYING: usize = 4;

impl Draft {
    /// The file will be published under another name. Waits for a publication that is under way.
    pub async fn retarget(self: &Arc<Self>, target: Target) {
        let _publishing = self.publishing.lock().await;
        let _creating = self.creating.lock().await;
        if self.bind(target) {
            self.record_close().await;
        }
    }

    /// Sets the name; true when the file was closed for the journal, and must be made so again.
    fn bind(self: &Arc<Self>, target: Target) -> bool {
        let mut state = self.state.lock();
        let closed = state.is_recorded_closed();
        let elsewhere = state
            .upload
            .as_ref()
            .is_some_and(|upload| upload.target.key != target.key);
        if elsewhere && !state.is_worth_bringing_over() {
            self.abandon_upload(&mut state);
        }
        state.held = target.looks_temporary();
        state.target = target;
        let destination = state.destination();
        state.note(&destination);
        if !state.held && !state.detached {
            self.queue_full_chunks(&mut state);
        }
        closed && !state.recorded
    }

    /// Writes down what the parts are about to become, and under which name.
    pub(super) fn note_spending(&self, begun: &Target, size: u64, etag: Option<String>) {
        let mut state = self.state.lock();
        state.note(&Record::Spent(Spent {
            key: begun.key.clone(),
            size,
            etag,
        }));
    }

    /// The file is an object, under a name that is no longer its own: it lies over that object from
    /// now on, which is copied by the next attempt, that `None` asks for, and removed when the file
    /// is stored.
    pub(super) async fn bring_over(
        self: &Arc<Self>,
        from: &Target,
        to: &Target,
        stored: &Stored,
        versions: Versions,
    ) -> Result<Option<(Stored, Versions)>, WriteError> {
        let copies_parts = to.store.capabilities().copy_part;
        if !copies_parts && let Ok(moved) = move_object(from, to, stored).await {
            return Ok(Some((moved, versions)));
        }
        let etag = stored.etag.as_ref().map(|etag| etag.as_str().to_owned());
        self.note_spending(from, stored.size, etag);
        let closed = {
            let mut state = self.state.lock();
            self.rebase(
                &mut state,
                from,
                stored.size,
                stored.etag.clone(),
                &versions,
            );
            state.misplaced = Some(Misplaced {
                target: from.clone(),
                etag: stored.etag.clone(),
            });
            state.is_recorded_closed()
        };
        // The former manifest speaks of parts that are spent.
        let _ = self.append_manifest(closed);
        Ok(None)
    }

    /// The file is stored: removes what it left under a name that it has no longer.
    pub(super) async fn remove_misplaced(&self, own: &Target) {
        let misplaced = self.state.lock().misplaced.take();
        if let Some(misplaced) = misplaced.filter(|it| it.target.key != own.key) {
            misplaced.remove().await;
        }
    }
}

impl Misplaced {
    /// Removes it, unless another object stands there by now.
    pub(super) async fn remove(self) {
        let Target { store, key, .. } = &self.target;
        let etag = self.etag.as_ref().map(ETag::as_str);
        if let Err(error) = remove_if_same(store, key, etag).await {
            tracing::warn!(key, %error, "left behind under a name that the file has no longer");
        }
    }
}

impl State {
    /// Whether what was sent under the former name is to be copied inside the store.
    fn is_worth_bringing_over(&self) -> bool {
        if self.has_given_up() {
            return true;
        }
        let sent = self.chunks.iter().filter(|(index, chunk)| {
            let part = self.part(**index);
            chunk.is_sent(part.end - part.start)
        });
        sent.count() >= WORTH_COPYING && self.target.store.capabilities().copy_part
    }
}

async fn move_object(from: &Target, to: &Target, stored: &Stored) -> Result<Stored, WriteError> {
    let source = ObjectMeta {
        key: from.key.clone(),
        size: stored.size,
        etag: stored.etag.clone(),
        modified: stored.modified,
    };
    let moved = to.store.copy(&source, &to.key).await?;
    from.store.delete(std::slice::from_ref(&from.key)).await?;
    Ok(moved)
}
