//! Writing: one PUT of all the bytes, streamed, and taken for done only when the server lists it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Body, Client, RequestBuilder, Response};
use tokio::time::{Instant, sleep, sleep_until};

use super::access::{Access, Failed};
use super::listing;
use super::read::Reading;
use crate::store::checksum::crc32c_update;
use crate::store::metrics::StoreMetrics;
use crate::store::{LongBody, StoreError, StoreResult, Stored};

/// How often a body is sent. A proxy that gives requests too little time gives each too little.
const ATTEMPTS: u32 = 3;
/// Bytes that are handed over at once: each is progress.
const FRAME: usize = 256 << 10;
/// A server may have to bring all of a body to where it keeps it before it answers.
const ANSWER: Duration = Duration::from_secs(600);
/// A body that broke off is held back for so long when it is sent again: a proxy that refuses it by its
/// size says so at once, and may break the connection before anybody has read that.
const HELD_BACK: Duration = Duration::from_millis(500);
/// How often a body that is on its way is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What a PUT has done so far.
#[derive(Debug, Default)]
struct Sending {
    bytes: AtomicU64,
    /// It is the body that is waited for, not the server.
    waiting: AtomicBool,
    /// CRC32C of them.
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
    /// Sends a body until the server has all of it.
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
            let failed = match outcome {
                Ok(_) => return self.verify(key, object, body.size()).await,
                // Nothing can be missing where something is put: the store behind the server lost its
                // way, as SeaweedFS does once in a while.
                Err(failed) if failed.is(404) => failed.passing(object),
                Err(failed) => failed,
            };
            if failed.is_passing() && self.has_taken(key, object, body.size(), &sending).await {
                tracing::info!(object = &**object, error = %failed.error,
                    "it is stored, whatever was answered");
                return Ok(stored(body.size()));
            }
            if attempt >= failed.most.min(ATTEMPTS) {
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
            if !in_chunks {
                // So that a proxy that takes no body of that size says so before it is sent.
                request = request.header(CONTENT_LENGTH, size);
            }
            request
                .header(CONTENT_TYPE, kind.as_ref())
                .body(self.body(body, sending, held_back))
        };
        let sent = self.access.attempt(object, Duration::MAX, build);
        tokio::pin!(sent);
        let mut moved = (0, Instant::now());
        loop {
            tokio::select! {
                outcome = &mut sent => return outcome,
                () = sleep_until(Instant::now() + LOOK) => {}
            }
            let bytes = sending.bytes.load(Ordering::Relaxed);
            if bytes > moved.0 {
                moved = (bytes, Instant::now());
            }
            let waiting = sending.waiting.load(Ordering::Relaxed);
            let patience = match bytes < size && !waiting {
                true => self.access.patience,
                false => ANSWER.max(self.access.patience),
            };
            if moved.1.elapsed() > patience {
                return Err(Failed::silent(object, patience));
            }
        }
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
                    sending.waiting.store(true, Ordering::Relaxed);
                    let next = frames.next().await;
                    sending.waiting.store(false, Ordering::Relaxed);
                    next.map(|next| (next, frames))
                }
            },
        );
        let frames = frames.map_ok(|mut bytes| {
            let slices = std::iter::from_fn(move || {
                let length = bytes.len().min(FRAME);
                (length > 0).then(|| Ok(bytes.split_to(length)))
            });
            stream::iter(slices)
        });
        let frames = frames.try_flatten().inspect_ok(move |frame: &Bytes| {
            let mut crc32c = sending.crc32c.lock();
            *crc32c = crc32c_update(*crc32c, frame);
            drop(crc32c);
            sending
                .bytes
                .fetch_add(frame.len() as u64, Ordering::Relaxed);
            metrics.sent(frame.len() as u64);
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

    /// Whether the server has this very body, though it did not say so. Told by reading it: there may
    /// have been another of that size.
    async fn has_taken(&self, key: &str, object: &Arc<str>, size: u64, sending: &Sending) -> bool {
        if sending.bytes.load(Ordering::Relaxed) < size {
            return false;
        }
        let found = listing::find(self.access, object, key).await;
        if !matches!(found, Ok(Some(meta)) if meta.size == size) {
            return false;
        }
        if size == 0 {
            return true;
        }
        let read = async {
            let mut read = 0;
            let body = self.reading.get(key, object, 0..size, None).await?;
            let mut frames = body.frames;
            while let Some(frame) = frames.try_next().await? {
                read = crc32c_update(read, &frame);
            }
            StoreResult::Ok(read)
        };
        read.await.is_ok_and(|read| read == *sending.crc32c.lock())
    }
}

fn stored(size: u64) -> Stored {
    Stored {
        etag: None,
        size,
        modified: None,
    }
}
