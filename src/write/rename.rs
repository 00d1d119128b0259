//! How a draft gets another name after parts of it were sent.
//!
//! Parts are bound to the name that their upload was begun with. A few are sent again under the new
//! one. Where many were sent, or the local copy of one was given up, the upload is completed under
//! the old name, its object copied inside the store, part by part, into an upload under the new
//! one, and removed. Local copies are kept until then, as far as there is room for them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::chunk::Data;
use super::draft::Draft;
use super::error::WriteError;
use super::growing::Following;
use super::journal::{Record, Spent};
use super::names::HeldNames;
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
        if state.target.key != target.key {
            state.following = Following::Not;
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
            let before = state.base.clone().map(|base| (base, state.base_limit));
            self.rebase(&mut state, from, stored.size, stored.etag.clone());
            let only_copy = state.let_go_of_spent(&versions, stored.size);
            state.misplaced = Some(Misplaced {
                target: from.clone(),
                etag: stored.etag.clone(),
                before,
                only_copy,
            });
            state.is_recorded_closed()
        };
        self.writer.names.leave(from.object(), self);
        // The former manifest speaks of parts that are spent.
        let _ = self.append_manifest(closed);
        Ok(None)
    }

    /// The file is stored: removes what it left under a name that it has no longer.
    pub(super) async fn remove_misplaced(&self, own: &Target) {
        let Some(misplaced) = self.state.lock().misplaced.take() else {
            return;
        };
        self.writer.names.clear(&misplaced.target.object());
        if misplaced.target.key != own.key {
            misplaced.remove().await;
        }
    }

    /// Every name that publishing the file has to do with, once nobody else has any of them.
    ///
    /// # Errors
    /// `InUse` when there is something under the file's name that another has nowhere else.
    pub(super) async fn hold_names(self: &Arc<Self>) -> Result<HeldNames, WriteError> {
        let (own, wanted) = {
            let state = self.state.lock();
            let own = state.target.object();
            let upload = state.upload.as_ref().map(|upload| upload.target.object());
            let misplaced = state.misplaced.as_ref().map(|it| it.target.object());
            let wanted: BTreeSet<String> = [Some(own.clone()), upload, misplaced]
                .into_iter()
                .flatten()
                .collect();
            (own, Vec::from_iter(wanted))
        };
        let names = &self.writer.names;
        let held = match names.try_hold(&wanted) {
            Some(held) => held,
            None => {
                self.record_close().await;
                names.hold(&wanted).await
            }
        };
        let left = names.left(&own).filter(|left| !Arc::ptr_eq(left, self));
        if let Some(left) = left {
            left.make_way(own).await?;
        }
        Ok(held)
    }

    /// Another file is about to take `name`, where an object of this one may be: it does without.
    async fn make_way(self: &Arc<Self>, name: String) -> Result<(), WriteError> {
        let closed = {
            let mut state = self.state.lock();
            let there = state.misplaced.as_ref();
            if there.is_none_or(|it| it.target.object() != name) {
                return Ok(());
            }
            let closed = state.is_recorded_closed();
            if !state.fall_back() {
                let file = state.target.path.clone();
                return Err(WriteError::InUse { object: name, file });
            }
            closed
        };
        self.writer.names.clear(&name);
        if closed {
            self.record_close().await;
        }
        Ok(())
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
    /// Whether what was sent under the former name, or is on its way, is to be copied inside the
    /// store.
    fn is_worth_bringing_over(&self) -> bool {
        if self.has_given_up() {
            return true;
        }
        let sent = self.chunks.iter().filter(|(index, chunk)| {
            let part = self.part(**index);
            chunk.is_sent(part.end - part.start) || self.queued.contains(index)
        });
        sent.count() >= WORTH_COPYING && self.target.store.capabilities().copy_part
    }

    /// `versions` of the chunks are in the object underneath, of `size` bytes. What is here too is
    /// kept until it is under its own name: somebody may take the former one. True when something
    /// is not here.
    fn let_go_of_spent(&mut self, versions: &Versions, size: u64) -> bool {
        let geometry = self.geometry;
        let mut only_copy = false;
        self.chunks.retain(|index, chunk| {
            let end = geometry.range(*index).start + chunk.local.end;
            if versions.get(index) != Some(&chunk.version) || end > size {
                return true;
            }
            chunk.beneath = Some(chunk.version);
            let here = !matches!(chunk.data, Data::GivenUp);
            only_copy |= !here;
            here
        });
        only_copy
    }

    /// What the parts have become is gone, or about to be: what is here counts again. False when
    /// not all of it is here.
    pub(super) fn fall_back(&mut self) -> bool {
        let Some(misplaced) = self.misplaced.take_if(|it| !it.only_copy) else {
            return false;
        };
        self.note_change();
        let (base, limit) = misplaced.before.unzip();
        self.base = base;
        self.base_limit = self.base_limit.min(limit.unwrap_or(0));
        for chunk in self.chunks.values_mut() {
            chunk.beneath = None;
        }
        true
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
    let etag = stored.etag.as_ref().map(ETag::as_str);
    remove_if_same(&from.store, &from.key, etag).await?;
    Ok(moved)
}
