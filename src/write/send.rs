//! Sending parts while the writer goes on, and the upload they belong to.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::chunk::{Data, Sent};
use super::draft::Draft;
use super::error::WriteError;
use super::growing::Following;
use super::journal::{Part, Record};
use super::spill::SpillFile;
use super::state::{State, Upload};
use super::target::Target;
use crate::budget::{Class, Reservation};
use crate::store::{PartReceipt, Payload, StoreError, checksum};

/// A version of a chunk, ready to be sent.
pub(super) struct Outgoing {
    pub version: u64,
    body: Body,
    crc32c: Option<u32>,
    length: u64,
}

enum Body {
    Memory(Bytes),
    Spilled(Arc<SpillFile>),
}

impl Outgoing {
    /// Chunk `index` cut to `length` bytes, if its run covers them.
    pub fn of(state: &State, index: u32, length: u64) -> Option<Self> {
        let chunk = state.chunks.get(&index)?;
        if chunk.local.start > 0 || chunk.local.end < length {
            return None;
        }
        let body = match &chunk.data {
            Data::Memory(_) => Body::Memory(chunk.share()?.slice(..length as usize)),
            Data::Spilled(file) => Body::Spilled(Arc::clone(file)),
            Data::GivenUp => return None,
        };
        let crc32c = chunk.crc32c.filter(|_| chunk.local.end == length);
        Some(Self {
            version: chunk.version,
            body,
            crc32c,
            length,
        })
    }

    /// The request's body; the reservation is for one that had to be read from disk.
    pub async fn payload(
        self,
        draft: &Draft,
    ) -> Result<(Payload, Option<Reservation>), WriteError> {
        let (bytes, reservation) = match self.body {
            Body::Memory(bytes) => (bytes, None),
            Body::Spilled(file) => {
                let reservation = draft
                    .writer
                    .memory
                    .reserve(Class::Transfer, self.length)
                    .await;
                let length = self.length as usize;
                let read = tokio::task::spawn_blocking(move || {
                    let mut bytes = vec![0; length];
                    file.read(&mut bytes, 0).map(|()| Bytes::from(bytes))
                });
                (
                    read.await.map_err(|error| task_lost(draft, &error))??,
                    Some(reservation),
                )
            }
        };
        let crc32c = self.crc32c.unwrap_or_else(|| checksum::crc32c(&bytes));
        Ok((Payload { bytes, crc32c }, reservation))
    }
}

pub(super) fn task_lost(draft: &Draft, error: &tokio::task::JoinError) -> WriteError {
    StoreError::Other {
        object: draft.target().object(),
        detail: error.to_string(),
    }
    .into()
}

impl Draft {
    /// Sends chunk `index`, which is full, in the background.
    pub(super) fn queue(self: &Arc<Self>, state: &mut State, index: u32) {
        let capabilities = state.target.store.capabilities();
        if !capabilities.multipart {
            // It is one PUT, which may begin while it is written.
            self.follow(state);
            return;
        }
        if state.following.is_under_way() {
            // By now there are parts.
            state.following = Following::Ended;
        }
        if !state.queued.insert(index) {
            return;
        }
        let length = {
            let range = state.geometry.range(index);
            range.end - range.start
        };
        let draft = Arc::clone(self);
        draft.writer.in_flight.fetch_add(1, Ordering::Relaxed);
        self.writer.runtime.spawn(async move {
            if let Err(error) = draft.send_in_background(index, length).await {
                // Publishing sends it again, and reports what then goes wrong.
                tracing::debug!(object = draft.target().object(), index, %error,
                    "part not sent in the background");
            }
            draft.writer.in_flight.fetch_sub(1, Ordering::Relaxed);
            draft.sent_in_background(index);
        });
    }

    /// Queues every full chunk that the store lacks, except the one being written to.
    pub(super) fn queue_full_chunks(self: &Arc<Self>, state: &mut State) -> usize {
        if !state.target.store.capabilities().multipart {
            return 0;
        }
        let geometry = state.geometry;
        let full: Vec<u32> = state
            .chunks
            .iter()
            .filter(|(index, chunk)| {
                let range = geometry.range(**index);
                let length = range.end - range.start;
                chunk.local == (0..length)
                    && !state.queued.contains(index)
                    && !matches!(chunk.data, Data::GivenUp)
                    && !chunk.is_sent(length)
                    && !state.lies_beneath(**index)
            })
            .map(|(index, _)| *index)
            .collect();
        for index in &full {
            self.queue(state, *index);
        }
        full.len()
    }

    /// Nobody has part `index` in hand any more. An upload that was begun for it after all was
    /// published, or unlinked, is of no use.
    fn sent_in_background(&self, index: u32) {
        {
            let mut state = self.state.lock();
            state.queued.remove(&index);
            if state.detached || state.published == Some(state.generation) {
                self.abandon_upload(&mut state);
            }
        }
        self.sent.notify_waiters();
        // Its local copy can be given up now: who waits for room looks again.
        self.writer.memory.note_reclaimable();
    }

    async fn send_in_background(
        self: &Arc<Self>,
        index: u32,
        length: u64,
    ) -> Result<(), WriteError> {
        let _permit = self.permit().await?;
        {
            let state = self.state.lock();
            let sent = state
                .chunks
                .get(&index)
                .is_some_and(|chunk| chunk.is_sent(length));
            if state.detached || sent {
                return Ok(());
            }
        }
        self.send(index, length).await.map(|_| ())
    }

    pub(super) async fn permit(&self) -> Result<tokio::sync::OwnedSemaphorePermit, WriteError> {
        let acquired = Arc::clone(&self.writer.transfers).acquire_owned().await;
        acquired.map_err(|error| {
            StoreError::Other {
                object: self.target().object(),
                detail: error.to_string(),
            }
            .into()
        })
    }

    /// Sends chunk `index` as it is now; nothing when its run does not cover `length` bytes.
    pub(super) async fn send(
        self: &Arc<Self>,
        index: u32,
        length: u64,
    ) -> Result<Option<(u64, PartReceipt)>, WriteError> {
        let upload = self.upload().await?;
        let outgoing = Outgoing::of(&self.state.lock(), index, length);
        let Some(outgoing) = outgoing else {
            return Ok(None);
        };
        let version = outgoing.version;
        let (payload, _reservation) = outgoing.payload(self).await?;
        let Target { store, key, .. } = &upload.target;
        let receipt = store
            .upload_part(key, &upload.id, index + 1, payload)
            .await?;
        self.confirmed.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock();
        let current = state
            .upload
            .as_ref()
            .is_some_and(|current| current.id == upload.id);
        if current
            && let Some(chunk) = state.chunks.get_mut(&index)
            && chunk.version == version
        {
            chunk.sent = Some(Sent {
                version,
                receipt: receipt.clone(),
            });
            state.note(&Record::Part(Part::new(index, version, &receipt)));
        }
        Ok(current.then_some((version, receipt)))
    }

    /// The upload, begun if there is none.
    pub(super) async fn upload(&self) -> Result<Upload, WriteError> {
        let _creating = self.creating.lock().await;
        let target = {
            let state = self.state.lock();
            if let Some(upload) = &state.upload {
                return Ok(upload.clone());
            }
            state.target.clone()
        };
        let id = target.store.create_multipart(&target.key).await?;
        let upload = Upload { target, id };
        let mut state = self.state.lock();
        if !state.detached && state.published != Some(state.generation) {
            self.begin_journal(&mut state);
        }
        state.note(&Record::Upload {
            key: upload.target.key.clone(),
            id: upload.id.clone(),
        });
        state.upload = Some(upload.clone());
        Ok(upload)
    }

    /// Gives the upload up, if there is one, in the background. What it held is no longer sent.
    pub(super) fn abandon_upload(&self, state: &mut State) {
        state.unsend(|_| true);
        let Some(Upload { target, id }) = state.upload.take() else {
            return;
        };
        // A manifest may count on parts of it.
        state.note_change();
        self.writer.runtime.spawn(async move {
            if let Err(error) = target.store.abort_multipart(&target.key, &id).await {
                tracing::warn!(object = target.object(), %error,
                    "an unfinished upload could not be aborted; the store may keep its parts \
                     until its lifecycle rules remove them");
            }
        });
    }
}
