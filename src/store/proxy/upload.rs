//! Writing: one PUT of all the bytes, streamed, or parts made one; taken for done only when the server
//! lists it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Body, Client, RequestBuilder, Response};
use tokio::time::sleep;

use super::access::{Access, Failed};
use super::listing;
use super::parts::Parts;
use super::read::Reading;
use super::sending::{Progress, slices};
use crate::store::checksum::crc32c_update;
use crate::store::metrics::StoreMetrics;
use crate::store::pieces::{self, Piece};
use crate::store::{LongBody, PartReceipt, StoreError, StoreResult, Stored};

/// How often a body is sent. A proxy that gives requests too little time gives each too little.
const ATTEMPTS: u32 = 3;
/// A body that broke off is held back for so long when it is sent again: a proxy that refuses it by its
/// size says so at once, and may break the connection before anybody has read that.
const HELD_BACK: Duration = Duration::from_millis(500);

/// What a PUT has done so far.
#[derive(Debug, Default)]
struct Sending {
    progress: Progress,
    /// CRC32C of what has gone.
    crc32c: Mutex<u32>,
    /// The body itself came to an end for this reason.
    broken: Mutex<Option<StoreError>>,
}

/// Writes objects of one server.
#[derive(Debug)]
pub(super) struct Upload<'a> {
    pub access: &'a Access,
    pub reading: &'a Arc<Reading>,
    pub metrics: &'a Arc<StoreMetrics>,
}

impl Upload<'_> {
    /// Sends a body until the server has all of it; one that is still being written once.
    ///
    /// # Errors
    /// The body's; the server's.
    pub async fn put(
        &self,
        key: &str,
        object: &Arc<str>,
        body: &Arc<dyn LongBody>,
    ) -> StoreResult<Stored> {
        let mut attempt = 1;
        loop {
            let sending = Arc::<Sending>::default();
            self.reading.wholes.forget(key);
            let held_back = if attempt == 1 {
                Duration::ZERO
            } else {
                HELD_BACK
            };
            let outcome = self.send(key, object, body, &sending, held_back).await;
            self.reading.wholes.forget(key);
            if let Some(error) = sending.broken.lock().take() {
                return Err(error);
            }
            let sent = sending.progress.sent.load(Ordering::Relaxed);
            let size = body.size().unwrap_or(sent);
            let failed = match outcome {
                // All of it is stored only when all of it has gone.
                Ok(_) if !sending.progress.is_whole(body.size()) => {
                    Failed::last(StoreError::Corrupt {
                        object: object.to_string(),
                        detail: "taken for whole before its end".to_owned(),
                    })
                }
                Ok(_) => return self.verify(key, object, size).await,
                // Nothing can be missing where something is put: the store behind the server lost its
                // way, as SeaweedFS does once in a while.
                Err(failed) if failed.is(404) => failed.passing(object),
                Err(failed) => failed,
            };
            let whole = sending.progress.is_whole(body.size());
            if failed.is_passing() && whole && self.has_taken(key, object, size, &sending).await {
                tracing::info!(object = &**object, error = %failed.error,
                    "it is stored, whatever was answered");
                return Ok(stored(size));
            }
            if attempt >= failed.most.min(ATTEMPTS) || body.size().is_none() {
                return Err(failed.error);
            }
            failed.pause(attempt).await;
            attempt += 1;
        }
    }

    async fn send(
        &self,
        key: &str,
        object: &Arc<str>,
        body: &Arc<dyn LongBody>,
        sending: &Arc<Sending>,
        held_back: Duration,
    ) -> Result<Response, Failed> {
        let url = self.access.address.object(key);
        let kind = mime_guess::from_path(key).first_or_octet_stream();
        let size = body.size();
        let in_chunks = self.access.takes_halves(object).await?;
        let build = |client: &Client| -> RequestBuilder {
            let mut request = client.put(&url);
            if let Some(size) = size
                && !in_chunks
            {
                // So that a proxy that takes no body of that size says so before it is sent.
                request = request.header(CONTENT_LENGTH, size);
            }
            request
                .header(CONTENT_TYPE, kind.as_ref())
                .body(self.body(body, sending, held_back))
        };
        let sent = self.access.attempt(object, Duration::MAX, build);
        let (progress, patience) = (&sending.progress, self.access.patience);
        progress.watch(object, size, patience, sent).await
    }

    fn body(&self, body: &Arc<dyn LongBody>, sending: &Arc<Sending>, held_back: Duration) -> Body {
        let (sending, failing) = (Arc::clone(sending), Arc::clone(sending));
        let metrics = Arc::clone(self.metrics);
        let frames = body.frames();
        let frames = async move {
            sleep(held_back).await;
            StoreResult::Ok(frames)
        };
        let waiting = Arc::clone(&sending);
        let frames = stream::unfold(
            Box::pin(stream::once(frames).try_flatten()),
            move |mut frames| {
                let sending = Arc::clone(&waiting);
                async move {
                    let waiting = &sending.progress.waiting;
                    waiting.store(true, Ordering::Relaxed);
                    let next = frames.next().await;
                    waiting.store(false, Ordering::Relaxed);
                    let ended = &sending.progress.ended;
                    ended.store(next.is_none(), Ordering::Relaxed);
                    next.map(|next| (next, frames))
                }
            },
        );
        let frames = frames.map_ok(|bytes| stream::iter(slices(bytes).map(Ok)));
        let frames = frames.try_flatten().inspect_ok(move |frame: &Bytes| {
            let mut crc32c = sending.crc32c.lock();
            *crc32c = crc32c_update(*crc32c, frame);
            drop(crc32c);
            let length = frame.len() as u64;
            sending.progress.sent.fetch_add(length, Ordering::Relaxed);
            metrics.sent(length);
        });
        Body::wrap_stream(frames.map_err(move |error| failing.broken.lock().insert(error).clone()))
    }

    /// The server lists it with all its bytes.
    async fn verify(&self, key: &str, object: &Arc<str>, size: u64) -> StoreResult<Stored> {
        let found = listing::find(self.access, object, key).await?;
        let there = found.map(|meta| meta.size);
        if there == Some(size) {
            return Ok(stored(size));
        }
        Err(StoreError::Corrupt {
            object: object.to_string(),
            detail: format!("{there:?} bytes stored of {size}"),
        })
    }

    /// Whether the server has this very body, though it did not say so.
    async fn has_taken(&self, key: &str, object: &Arc<str>, size: u64, sending: &Sending) -> bool {
        let crc32c = *sending.crc32c.lock();
        self.is_made_of(key, object, &[Piece { size, crc32c }])
            .await
    }

    /// Makes an object of parts that the store behind the server has.
    ///
    /// # Errors
    /// `UploadGone` and `PartsDiffer` where sending it again can help; the server's.
    pub async fn complete(
        &self,
        parts: &Parts,
        key: &str,
        object: &Arc<str>,
        id: &str,
        receipts: &[PartReceipt],
    ) -> StoreResult<Stored> {
        let size = receipts.iter().map(|part| part.size).sum();
        let pieces = pieces::of_parts(receipts).unwrap_or_default();
        let mut attempt = 1;
        loop {
            self.reading.wholes.forget(key);
            let outcome = parts.complete(key, object, id, receipts).await;
            self.reading.wholes.forget(key);
            let Err(failed) = outcome else {
                return self.verify(key, object, size).await;
            };
            if failed.is_passing() && self.is_made_of(key, object, &pieces).await {
                tracing::info!(object = &**object, error = %failed.error,
                    "it is stored, whatever was answered");
                return Ok(stored(size));
            }
            if failed.says("InvalidPart") {
                return Err(StoreError::PartsDiffer {
                    object: object.to_string(),
                    detail: failed.error.to_string(),
                });
            }
            if failed.is_passing() && attempt < failed.most.min(ATTEMPTS) {
                failed.pause(attempt).await;
                attempt += 1;
                continue;
            }
            if failed.status.is_none() {
                return Err(failed.error);
            }
            // The server does not say whether the store has lost the upload. All of the file is here: it
            // can go through the server, which then tells what else is wrong.
            let refused = parts.refuse(object, &failed.error.to_string());
            parts.give_up(key, object, id).await;
            return Err(refused);
        }
    }

    /// Whether the server has an object of these pieces. Told by reading it: there may have been another
    /// of that size.
    async fn is_made_of(&self, key: &str, object: &Arc<str>, pieces: &[Piece]) -> bool {
        let size: u64 = pieces.iter().map(|piece| piece.size).sum();
        let found = listing::find(self.access, object, key).await;
        if !matches!(found, Ok(Some(meta)) if meta.size == size) {
            return false;
        }
        if size == 0 {
            return true;
        }
        let Ok(body) = self.reading.get(key, object, 0..size, None).await else {
            return false;
        };
        let same = pieces::are_made_of(body.frames, pieces).await;
        same.unwrap_or_default()
    }
}

fn stored(size: u64) -> Stored {
    Stored {
        etag: None,
        size,
        modified: None,
    }
}
