//! How a draft becomes an object: complete, verified, or not at all.
//!
//! A draft that fits one part is one PUT. Anything larger is a multipart upload: parts already
//! sent count if they still are what the file holds; parts nobody touched are copied inside the
//! store; the rest is sent now. Then the upload is completed and verified. Until that moment the
//! store shows what it showed before.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use super::chunk::Data;
use super::draft::Draft;
use super::error::WriteError;
use super::growing::Following;
use super::journal::{Completing, Record};
use super::send::Outgoing;
use super::state::State;
use super::target::Target;
use crate::budget::Class;
use crate::read::Source;
use crate::store::{Condition, ETag, PartReceipt, Payload, StoreError, Stored, checksum};

/// A publication is begun anew this often when the file is truncated under it.
const ATTEMPTS: usize = 8;

/// The state that is being published.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    generation: u64,
    size: u64,
}

/// What was published: which version of which chunk.
pub(super) type Versions = BTreeMap<u32, u64>;
/// A part that the store holds: its chunk, the version, the receipt.
type SentPart = (u32, u64, PartReceipt);

/// What to do for one part.
pub(super) enum Action {
    Have(u64, PartReceipt),
    Send,
    /// A sender has it: wait.
    Wait,
    /// These bytes (file offsets) must be filled in first.
    Fill(Range<u64>),
    /// Nothing local, or the same as underneath: copy it inside the store. With the version.
    Copy(Source, u64),
    /// Nothing local: fetch it, or make zeros, and send that.
    Load,
    /// The file is shorter than the snapshot by now.
    Shrunk,
    GivenUp,
}

impl Draft {
    /// Puts the file, as it is now, into the store under its name. `None` when there is nothing
    /// that the store lacks.
    ///
    /// # Errors
    /// Whatever kept it from being stored. The draft then keeps every byte, and publishing can be
    /// tried again.
    pub async fn publish(self: &Arc<Self>) -> Result<Option<Stored>, WriteError> {
        let _publishing = self.publishing.lock().await;
        if self.snapshot().is_none() {
            return Ok(None);
        }
        let names = self.hold_names().await;
        let _names = names.inspect_err(|error| self.note_failure(error))?;
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let Some(snapshot) = self.snapshot() else {
                return Ok(None);
            };
            match self.publish_snapshot(snapshot).await {
                Ok(Some((stored, versions))) => {
                    // While the journal knows of it.
                    let target = self.target();
                    self.remove_misplaced(&target).await;
                    self.settle(snapshot, &stored, &versions);
                    return Ok(Some(stored));
                }
                Ok(None) => {}
                Err(error) => {
                    let error = self.as_conflict(error);
                    self.note_failure(&error);
                    // Once.
                    if last.is_some() || !self.sends_again(&error) {
                        return Err(error);
                    }
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| {
            let object = self.target().object();
            StoreError::Other {
                object,
                detail: "it is truncated all the time".into(),
            }
            .into()
        }))
    }

    fn snapshot(&self) -> Option<Snapshot> {
        let mut state = self.state.lock();
        if state.detached || state.published == Some(state.generation) || state.is_another() {
            return None;
        }
        state.low_water = state.size;
        Some(Snapshot {
            generation: state.generation,
            size: state.size,
        })
    }

    async fn publish_snapshot(
        self: &Arc<Self>,
        snapshot: Snapshot,
    ) -> Result<Option<(Stored, Versions)>, WriteError> {
        let (target, condition, single, over) = {
            let state = self.state.lock();
            // An upload of no parts cannot be completed, begun or not.
            let fits = state.upload.is_none() && snapshot.size <= state.geometry.range(0).end;
            let single = fits || snapshot.size == 0;
            let over = state.base.is_some() && state.base_limit > 0;
            (state.target.clone(), state.condition(), single, over)
        };
        if single && over {
            // What it will be is written down before it can be.
            self.record_close().await;
            self.put(&target, snapshot.size, condition).await
        } else if single {
            // Side by side: of one request the store has all or nothing.
            let put = self.put(&target, snapshot.size, condition);
            tokio::join!(put, self.record_close()).0
        } else if !target.store.capabilities().multipart {
            self.put_whole(&target, snapshot.size, condition).await
        } else {
            self.complete(&target, snapshot.size, condition).await
        }
    }

    /// Whether these versions of its chunks are of a later generation than may be published.
    pub(super) fn has_later(&self, versions: &Versions) -> bool {
        let Some(only) = self.state.lock().only else {
            return false;
        };
        let mut versions = versions.values();
        versions.any(|version| *version != UNTOUCHED && *version > only)
    }

    /// One PUT.
    async fn put(
        self: &Arc<Self>,
        target: &Target,
        size: u64,
        condition: Condition,
    ) -> Result<Option<(Stored, Versions)>, WriteError> {
        let _permit = self.permit().await?;
        let mut versions = Versions::new();
        // Whether some of it came from elsewhere than the chunk that the journal knows of.
        let mut mixed = false;
        let payload = loop {
            let action = self.state.lock().action(0, size);
            let action = match action {
                // It is here too.
                Action::Copy(_, version) if version != UNTOUCHED => Action::Send,
                other => other,
            };
            match action {
                Action::Send | Action::Have(..) | Action::Wait => {
                    let outgoing = Outgoing::of(&self.state.lock(), 0, size);
                    let Some(outgoing) = outgoing else {
                        return Ok(None);
                    };
                    versions.insert(0, outgoing.version);
                    break outgoing.payload(self).await?;
                }
                Action::Fill(range) => {
                    mixed = true;
                    self.fill(range).await?;
                }
                Action::Copy(..) | Action::Load => {
                    mixed = size > 0;
                    break self.load(0..size).await?;
                }
                Action::Shrunk => return Ok(None),
                Action::GivenUp => return Err(self.given_up(0..size)),
            }
        };
        let (payload, _reservation) = payload;
        if self.has_later(&versions) {
            return Ok(None);
        }
        if mixed {
            self.note_completing(size, None, Some(payload.crc32c));
        }
        let stored = target.store.put(&target.key, payload, condition).await?;
        Ok(Some((stored, versions)))
    }

    /// A multipart upload: whatever is missing is sent, then it is completed.
    async fn complete(
        self: &Arc<Self>,
        target: &Target,
        size: u64,
        condition: Condition,
    ) -> Result<Option<(Stored, Versions)>, WriteError> {
        let upload = self.upload().await?;
        let begun_at = Instant::now();
        let parts_expire = target.store.capabilities().parts_expire;
        let parts = if parts_expire {
            self.recorded_unless_soon(begun_at, self.parts(size))
                .await?
        } else {
            // Side by side; the file must be in the journal before the store has it under its name.
            tokio::join!(self.parts(size), self.record_close()).0?
        };
        let Some(parts) = parts else {
            return Ok(None);
        };
        let unrecorded = {
            let state = self.state.lock();
            !state.recorded && !state.is_another()
        };
        if unrecorded {
            // The disk had no room; by now it needs none.
            let _ = self.append_manifest(true);
        }
        let versions = parts
            .iter()
            .map(|(index, version, _)| (*index, *version))
            .collect();
        if self.has_later(&versions) {
            return Ok(None);
        }
        let receipts: Vec<PartReceipt> = parts.into_iter().map(|(_, _, receipt)| receipt).collect();
        let begun = &upload.target;
        let renamed = begun.key != target.key;
        let etag = checksum::composite(&receipts);
        let condition = if renamed {
            self.note_spending(begun, size, etag);
            // There it is only on its way: whatever came under that name meanwhile stays.
            Condition::IfAbsent
        } else {
            self.note_completing(size, etag, None);
            condition
        };
        let completed = begun
            .store
            .complete_multipart(&begun.key, &upload.id, &receipts, condition);
        let stored = match parts_expire {
            true => self.recorded_unless_soon(begun_at, completed).await?,
            false => completed.await?,
        };
        self.state.lock().upload = None;
        if !renamed {
            return Ok(Some((stored, versions)));
        }
        self.bring_over(begun, target, &stored, versions).await
    }

    /// Writes down what the object will be, so that it is recognised if this process ends before
    /// it knows that it is stored.
    pub(super) fn note_completing(&self, size: u64, etag: Option<String>, crc32c: Option<u32>) {
        let mut state = self.state.lock();
        if state.recorded {
            state.note(&Record::Completing(Completing { size, etag, crc32c }));
        }
    }

    /// The content of the draft, at some moment, is an object now: the file lies over that.
    pub(super) fn rebase(&self, state: &mut State, object: &Target, size: u64, etag: Option<ETag>) {
        state.base = Some(self.writer.reader.open(Source {
            store: Arc::clone(&object.store),
            key: object.key.clone(),
            etag,
            size,
        }));
        state.base_limit = size.min(state.low_water);
        state.unsend(|_| true);
    }

    /// Writes down that the file is closed and where its bytes are, so that the next mount stores
    /// it if this one is killed. Where that cannot be done it is stored all the same.
    pub(super) async fn record_close(self: &Arc<Self>) {
        let written = {
            let state = self.state.lock();
            state.is_recorded_closed() || state.is_another()
        };
        if written {
            return;
        }
        if let Err(error) = self.record(true, false).await {
            tracing::warn!(object = self.target().object(), %error,
                "not in the journal: a crash before it is stored would lose this file");
        }
    }

    /// Makes sure that the store holds every part of a file of `size` bytes; `None` when the file
    /// has become shorter.
    async fn parts(self: &Arc<Self>, size: u64) -> Result<Option<Vec<SentPart>>, WriteError> {
        let chunks = self.state.lock().geometry.chunks(size);
        let parts: Vec<Option<SentPart>> = stream::iter(chunks)
            .map(|index| {
                let draft = Arc::clone(self);
                async move { draft.part(index, size).await }
            })
            .buffered(self.writer.options.transfers.max(1) * 2)
            .try_collect()
            .await?;
        Ok(parts.into_iter().collect())
    }

    /// Makes sure that the store holds part `index` of a file of `size` bytes.
    async fn part(self: Arc<Self>, index: u32, size: u64) -> Result<Option<SentPart>, WriteError> {
        loop {
            let waiting = self.sent.notified();
            tokio::pin!(waiting);
            waiting.as_mut().enable();
            let (action, range) = {
                let state = self.state.lock();
                let bounds = state.geometry.range(index);
                let action = if state.queued.contains(&index) {
                    Action::Wait
                } else {
                    state.action(index, size)
                };
                (action, bounds.start..bounds.end.min(size))
            };
            match action {
                Action::Have(version, receipt) => return Ok(Some((index, version, receipt))),
                Action::Wait => waiting.await,
                Action::Fill(range) => self.fill(range).await?,
                Action::Shrunk => return Ok(None),
                Action::GivenUp => return Err(self.given_up(range)),
                Action::Send => {
                    let _permit = self.permit().await?;
                    let sent = self.send(index, range.end - range.start).await?;
                    if let Some((version, receipt)) = sent {
                        return Ok(Some((index, version, receipt)));
                    }
                }
                Action::Copy(base, version) => {
                    let receipt = self.copy_part(index, &base, range).await?;
                    return Ok(Some((index, version, receipt)));
                }
                Action::Load => {
                    let _permit = self.permit().await?;
                    let upload = self.upload().await?;
                    let (payload, _reservation) = self.load(range).await?;
                    let Target { store, key, .. } = &upload.target;
                    let receipt = store
                        .upload_part(key, &upload.id, index + 1, payload)
                        .await?;
                    self.confirmed.fetch_add(1, Ordering::Relaxed);
                    return Ok(Some((index, UNTOUCHED, receipt)));
                }
            }
        }
    }

    async fn copy_part(
        &self,
        index: u32,
        base: &Source,
        range: Range<u64>,
    ) -> Result<PartReceipt, WriteError> {
        let _permit = self.permit().await?;
        let upload = self.upload().await?;
        let Target { store, key, .. } = &upload.target;
        let etag = base.etag.as_ref();
        let receipt = store
            .copy_part(key, &upload.id, index + 1, &base.key, range, etag)
            .await?;
        self.confirmed.fetch_add(1, Ordering::Relaxed);
        Ok(receipt)
    }

    /// The bytes `range` of a file that has nothing local there.
    pub(super) async fn load(
        &self,
        range: Range<u64>,
    ) -> Result<(Payload, Option<crate::budget::Reservation>), WriteError> {
        let length = range.end - range.start;
        let reservation = self.writer.memory.reserve(Class::Transfer, length).await;
        let bytes = self.underlying(range).await?;
        let crc32c = checksum::crc32c(&bytes);
        Ok((Payload { bytes, crc32c }, Some(reservation)))
    }

    /// The snapshot is in the store: what it held locally is let go, what was written since stays.
    fn settle(&self, snapshot: Snapshot, stored: &Stored, versions: &Versions) {
        let mut state = self.state.lock();
        let recorded = state.recorded;
        state.drop_journal();
        // One that a sender began although all went in one PUT.
        self.abandon_upload(&mut state);
        let target = state.target.clone();
        self.rebase(&mut state, &target, snapshot.size, stored.etag.clone());
        let geometry = state.geometry;
        state.chunks.retain(|index, chunk| {
            // What another writer appended while it was sent is beyond the object's end.
            let end = geometry.range(*index).start + chunk.local.end;
            versions.get(index) != Some(&chunk.version) || end > snapshot.size
        });
        state.published = Some(snapshot.generation);
        state.following = Following::Not;
        state.failure = None;
        state.guard = None;
        // What was written since, and made durable already, stays so.
        if recorded && state.generation != snapshot.generation {
            drop(state);
            let _ = self.append_manifest(false);
        }
    }

    /// An object underneath that is gone is one that somebody else has changed.
    fn as_conflict(&self, error: WriteError) -> WriteError {
        let over = self.state.lock().base.is_some();
        match error {
            WriteError::Store(StoreError::NotFound { object }) if over => {
                StoreError::Changed { object }.into()
            }
            error => error,
        }
    }

    fn note_failure(&self, error: &WriteError) {
        let mut state = self.state.lock();
        let reason = error.to_string();
        state.note(&Record::Failed {
            reason: reason.clone(),
        });
        state.failure = Some(reason);
    }

    /// Whether sending parts again can mend what went wrong; then they no longer count as sent.
    fn sends_again(&self, error: &WriteError) -> bool {
        let WriteError::Store(error) = error else {
            return false;
        };
        let mut state = self.state.lock();
        let renamed = state.upload.as_ref().is_some_and(|upload| {
            // Whoever took the former name keeps it.
            upload.target.key != state.target.key
        });
        match error {
            StoreError::UploadGone { .. } => {
                state.upload = None;
                state.unsend(|_| true);
            }
            // A request that was given up reached the store after the one that took its place.
            StoreError::PartsDiffer { .. } => {
                state.unsend(|chunk| !matches!(chunk.data, Data::GivenUp));
            }
            StoreError::Conflict { .. } if renamed && !state.has_given_up() => {
                self.abandon_upload(&mut state);
            }
            StoreError::Changed { .. } => return state.fall_back(),
            _ => return false,
        }
        true
    }

    /// The file was unlinked: it can still be written and read, and is never published.
    pub async fn detach(&self) {
        let _publishing = self.publishing.lock().await;
        let _creating = self.creating.lock().await;
        let mut state = self.state.lock();
        state.detached = true;
        state.following = Following::Ended;
        state.failure = None;
        state.drop_journal();
        self.abandon_upload(&mut state);
        let misplaced = state.misplaced.take();
        drop(state);
        if let Some(misplaced) = misplaced {
            self.writer.runtime.spawn(misplaced.remove());
        }
    }

    /// Puts the file on disk, for the next mount to go on with; `closed` says that nobody writes to
    /// it any more. What was written down as closed stays so while it is the same.
    ///
    /// # Errors
    /// As [`Self::synchronise`].
    pub async fn keep(self: &Arc<Self>, closed: bool) -> Result<(), WriteError> {
        let closed = closed || self.state.lock().is_recorded_closed();
        self.record_durably(closed).await
    }

    async fn record_durably(self: &Arc<Self>, closed: bool) -> Result<(), WriteError> {
        if self.record(closed, true).await? {
            return Ok(());
        }
        let object = self.target().object();
        Err(WriteError::NoRoom { object })
    }

    /// Makes what was written durable, on local disk or in the unfinished upload.
    ///
    /// # Errors
    /// `NoRoom` when the spill has none for what is in memory only.
    pub async fn synchronise(self: &Arc<Self>) -> Result<(), WriteError> {
        if !self.is_dirty() || self.synchronise_recorded().await? {
            return Ok(());
        }
        self.record_durably(false).await
    }
}

/// The version of a part that was never a chunk.
pub(super) const UNTOUCHED: u64 = u64::MAX;

impl State {
    /// Whether the file is another by now than may be published.
    fn is_another(&self) -> bool {
        self.only.is_some_and(|only| only != self.generation)
    }

    /// A modification counts only over the version it started from; a new file wins always.
    pub(super) fn condition(&self) -> Condition {
        let base = self.base.as_ref().filter(|_| self.base_limit > 0);
        // One that lies elsewhere was brought there only to be copied from.
        let own = base
            .map(|base| base.source())
            .filter(|source| source.key == self.target.key);
        let Some(source) = own else {
            return self.guard.clone().unwrap_or(Condition::Always);
        };
        match source.etag {
            Some(etag) if self.target.store.capabilities().conditional_put => {
                Condition::IfMatch(etag)
            }
            _ => Condition::Always,
        }
    }

    pub(super) fn action(&self, index: u32, size: u64) -> Action {
        let bounds = self.geometry.range(index);
        let part = bounds.start..bounds.end.min(size);
        let length = part.end - part.start;
        if self.size < size {
            return Action::Shrunk;
        }
        let Some(chunk) = self.chunks.get(&index) else {
            return self.action_without(part);
        };
        if chunk.is_sent(length)
            && let Some(sent) = &chunk.sent
        {
            return Action::Have(sent.version, sent.receipt.clone());
        }
        if matches!(chunk.data, Data::GivenUp) {
            return Action::GivenUp;
        }
        if self.lies_beneath(index)
            && let Some(source) = self.copied_from(&part)
        {
            return Action::Copy(source, chunk.version);
        }
        if chunk.local.start > 0 {
            return Action::Fill(bounds.start..bounds.start + chunk.local.start);
        }
        if chunk.local.end < length {
            return Action::Fill(bounds.start + chunk.local.end..part.end);
        }
        Action::Send
    }

    fn action_without(&self, part: Range<u64>) -> Action {
        match self.copied_from(&part) {
            Some(source) => Action::Copy(source, UNTOUCHED),
            None => Action::Load,
        }
    }

    /// What has this part and can be copied inside the store.
    fn copied_from(&self, part: &Range<u64>) -> Option<Source> {
        let base = self.base.as_ref().filter(|_| part.end <= self.base_limit)?;
        let source = base.source();
        let same_store = Arc::ptr_eq(&source.store, &self.target.store);
        (same_store && self.target.store.capabilities().copy_part).then_some(source)
    }
}
