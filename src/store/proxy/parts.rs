//! Parts that go straight to the store behind the server, which gives addresses for them.
//!
//! An address is good for an hour and cannot be renewed; how many there are is told when the upload
//! begins. So nothing may depend on what was sent until it is an object: where an address is of no use
//! any more, or never was, the upload is gone, and all goes through the server for a while.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use parking_lot::Mutex;
use reqwest::header::{CONTENT_LENGTH, ETAG};
use reqwest::{Body, Client, Response};
use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;

use super::MOST_PARTS;
use super::access::{Access, Failed, answer};
use super::sending::{ANSWER, Progress, slices};
use super::switches::Switches;
use crate::store::metrics::StoreMetrics;
use crate::store::{ETag, PartReceipt, Payload, StoreError, StoreResult};

/// Addresses that are asked for; where that was not enough, as many as there can be parts.
const PARTS: u32 = 1_000;
/// For so long everything goes through the server when addresses were of no use.
const REFUSED_FOR: Duration = Duration::from_secs(300);
/// Uploads that nobody ended are forgotten after that: their addresses are of no use.
const KEPT_FOR: Duration = Duration::from_secs(2 * 3600);
/// How often a part is sent.
const ATTEMPTS: u32 = 5;

/// What the server says of an upload that it has begun.
#[derive(Debug, Deserialize)]
struct Created {
    #[serde(default)]
    upload_id: Option<String>,
    #[serde(default)]
    credentials: Vec<Credential>,
}

/// Where a part is sent.
#[derive(Clone, Debug, Deserialize)]
struct Credential {
    url: String,
    part_number: u32,
    #[serde(default)]
    headers: Option<HashMap<String, String>>,
}

/// An upload that is under way.
#[derive(Debug)]
struct Upload {
    since: Instant,
    addresses: HashMap<u32, Credential>,
}

/// Uploads in parts to the store behind one server.
#[derive(Debug)]
pub(super) struct Parts {
    access: Access,
    metrics: Arc<StoreMetrics>,
    /// The server has such addresses, and they are wanted.
    offered: AtomicBool,
    /// When the server was asked for that.
    asked: Mutex<Option<Instant>>,
    is_known: AtomicBool,
    /// They were of no use.
    refused: Mutex<Option<Instant>>,
    /// The store behind the server has taken a part from here.
    reached: AtomicBool,
    /// Keys of objects that have more parts than addresses are asked for at first.
    large: Mutex<HashSet<String>>,
    /// By their ids.
    uploads: Mutex<HashMap<String, Arc<Upload>>>,
}

impl Parts {
    pub fn new(access: Access, switches: Switches, metrics: Arc<StoreMetrics>) -> Self {
        Self {
            access,
            metrics,
            offered: AtomicBool::new(switches.uploads.unwrap_or_default()),
            asked: Mutex::default(),
            is_known: AtomicBool::new(switches.uploads.is_some()),
            refused: Mutex::default(),
            reached: AtomicBool::new(false),
            large: Mutex::default(),
            uploads: Mutex::default(),
        }
    }

    /// Whether the server is to be asked for them now.
    pub fn are_to_be_asked_for(&self) -> bool {
        if self.is_known.load(Ordering::Relaxed) {
            return false;
        }
        let mut asked = self.asked.lock();
        if asked.is_some_and(|asked| asked.elapsed() < REFUSED_FOR) {
            return false;
        }
        *asked = Some(Instant::now());
        true
    }

    /// Whether the server has addresses for parts, by its own words.
    pub fn offer(&self, offered: bool) {
        self.offered.store(offered, Ordering::Relaxed);
        self.is_known.store(true, Ordering::Relaxed);
    }

    /// Whether parts can be sent.
    pub fn are_taken(&self) -> bool {
        self.offered.load(Ordering::Relaxed) && !is_recent(*self.refused.lock())
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// `UploadGone` where it has to go another way.
    pub async fn create(&self, key: &str, object: &str) -> StoreResult<String> {
        let (folder, name) = key.rsplit_once('/').unwrap_or(("", key));
        let url = self.access.address.upload("create", folder);
        let most = match self.large.lock().remove(key) {
            true => MOST_PARTS,
            false => PARTS,
        };
        let asked = json!({"path": name, "num_parts": most});
        let build = |client: &Client| client.post(&url).json(&asked);
        let created: Created = match self.access.ask(object, build).await {
            Ok(created) => created,
            Err(failed) => {
                if failed.is(501) || failed.is(405) || failed.is(404) {
                    self.offer(false);
                }
                // What else is wrong the server tells whoever sends it all.
                return Err(self.refuse(object, &failed.error.to_string()));
            }
        };
        // Azure's blocks belong to a name: two uploads at once would mix.
        let Some(id) = created.upload_id.filter(|id| !id.is_empty()) else {
            self.offer(false);
            return Err(gone(object, "the store has no uploads of their own"));
        };
        let addresses = created.credentials.into_iter();
        let upload = Upload {
            since: Instant::now(),
            addresses: addresses.map(|it| (it.part_number, it)).collect(),
        };
        let mut uploads = self.uploads.lock();
        uploads.retain(|_, upload| upload.since.elapsed() < KEPT_FOR);
        uploads.insert(id.clone(), Arc::new(upload));
        Ok(id)
    }

    /// Sends a part.
    ///
    /// # Errors
    /// `UploadGone` where everything has to go another way; the store's.
    pub async fn send(
        &self,
        key: &str,
        object: &str,
        id: &str,
        number: u32,
        payload: &Payload,
    ) -> StoreResult<PartReceipt> {
        let mut attempt = 1;
        loop {
            let address = match self.address(key, object, id, number) {
                Ok(address) => address,
                Err(gone) => {
                    self.give_up(key, object, id).await;
                    return Err(gone);
                }
            };
            let failed = match self.put(object, &address, &payload.bytes).await {
                Ok(etag) => {
                    self.reached.store(true, Ordering::Relaxed);
                    return Ok(PartReceipt {
                        number,
                        size: payload.bytes.len() as u64,
                        etag,
                        crc32c: Some(payload.crc32c),
                    });
                }
                Err(failed) => failed,
            };
            let reached = self.reached.load(Ordering::Relaxed);
            if !failed.is_passing() || failed.unreachable && !reached {
                let refused = self.refuse(object, &failed.error.to_string());
                self.give_up(key, object, id).await;
                return Err(refused);
            }
            if attempt >= failed.most.min(ATTEMPTS) {
                return Err(failed.error);
            }
            failed.pause(attempt).await;
            attempt += 1;
        }
    }

    /// Where a part is sent, while that is of use.
    fn address(&self, key: &str, object: &str, id: &str, number: u32) -> StoreResult<Credential> {
        let upload = self.uploads.lock().get(id).cloned();
        let Some(upload) = upload.filter(|_| self.are_taken()) else {
            return Err(gone(object, "its addresses are of no use any more"));
        };
        let address = upload.addresses.get(&number).cloned();
        address.ok_or_else(|| {
            self.large.lock().insert(key.to_owned());
            gone(object, "it has more parts than were asked for")
        })
    }

    /// The ETag of a part that was sent once. Who we are is not told.
    async fn put(&self, object: &str, to: &Credential, bytes: &Bytes) -> Result<ETag, Failed> {
        let progress = Arc::<Progress>::default();
        let (moving, metrics) = (Arc::clone(&progress), Arc::clone(&self.metrics));
        let frames = slices(bytes.clone()).map(move |frame| {
            let length = frame.len() as u64;
            moving.sent.fetch_add(length, Ordering::Relaxed);
            metrics.sent(length);
            Ok::<_, std::convert::Infallible>(frame)
        });
        let mut request = self
            .access
            .stranger()
            .put(&to.url)
            .header(CONTENT_LENGTH, bytes.len())
            .body(Body::wrap_stream(stream::iter(frames)));
        for (name, value) in to.headers.iter().flatten() {
            request = request.header(name, value);
        }
        let size = bytes.len() as u64;
        let sent = answer(object, Duration::MAX, request.send());
        let response = progress.watch(object, Some(size), self.access.patience, sent);
        let etag = etag_of(&response.await?);
        etag.ok_or_else(|| {
            Failed::last(StoreError::Unsupported {
                object: object.to_owned(),
                detail: "the store does not say which part it has".to_owned(),
            })
        })
    }

    /// Makes the object of its parts, once.
    pub async fn complete(
        &self,
        key: &str,
        object: &str,
        id: &str,
        parts: &[PartReceipt],
    ) -> Result<(), Failed> {
        let upload = self.uploads.lock().get(id).cloned();
        let url_of = |number| {
            let address = upload.as_ref()?.addresses.get(&number)?;
            Some(address.url.clone())
        };
        let told: Vec<_> = parts
            .iter()
            .map(|part| {
                json!({
                    "part_number": part.number,
                    "etag": part.etag.as_str(),
                    "url": url_of(part.number),
                })
            })
            .collect();
        let (folder, name) = key.rsplit_once('/').unwrap_or(("", key));
        let url = self.access.address.upload("complete", folder);
        let asked = json!({"path": name, "upload_id": id, "parts": told});
        let build = |client: &Client| client.post(&url).json(&asked);
        let patience = ANSWER.max(self.access.patience);
        let response = self.access.attempt(object, patience, build).await?;
        // To its end, so that the connection can be used again.
        let _ = timeout(self.access.patience, response.bytes()).await;
        self.uploads.lock().remove(id);
        Ok(())
    }

    /// Gives an upload up, as far as the server can be told.
    ///
    /// # Errors
    /// The server's.
    pub async fn abort(&self, key: &str, object: &str, id: &str) -> StoreResult<()> {
        self.uploads.lock().remove(id);
        let (folder, name) = key.rsplit_once('/').unwrap_or(("", key));
        let url = self.access.address.upload("abort", folder);
        let asked = json!({"path": name, "upload_id": id});
        let build = |client: &Client| client.post(&url).json(&asked);
        match self.access.send(object, self.access.patience, build).await {
            // It may be gone already: MLflow's server answers that with 500 and nothing else.
            Err(failed) if failed.status.is_some() => {
                tracing::info!(object, error = %failed.error,
                    "an unfinished upload was not aborted; if it is there still, the store's lifecycle \
                     rules remove it");
                Ok(())
            }
            outcome => Ok(outcome.map(|_| ())?),
        }
    }

    /// What is left of an upload that went another way.
    pub async fn give_up(&self, key: &str, object: &str, id: &str) {
        if self.uploads.lock().remove(id).is_none() {
            return;
        }
        if let Err(error) = self.abort(key, object, id).await {
            tracing::warn!(object, %error,
                "an unfinished upload could not be aborted; the store may keep its parts until its \
                 lifecycle rules remove them");
        }
    }

    /// Addresses are of no use: everything goes through the server for a while.
    pub fn refuse(&self, object: &str, why: &str) -> StoreError {
        let before = self.refused.lock().replace(Instant::now());
        if !is_recent(before) {
            let server = &self.access.address.base;
            tracing::warn!(
                server,
                why,
                "the store behind the MLflow server takes no parts from here; everything is sent \
                 through the server"
            );
        }
        gone(object, why)
    }
}

fn is_recent(refused: Option<Instant>) -> bool {
    refused.is_some_and(|refused| refused.elapsed() < REFUSED_FOR)
}

fn etag_of(response: &Response) -> Option<ETag> {
    let etag = response.headers().get(ETAG)?.to_str().ok()?;
    (!etag.is_empty()).then(|| ETag::new(etag))
}

fn gone(object: &str, detail: &str) -> StoreError {
    StoreError::UploadGone {
        object: object.to_owned(),
        detail: detail.to_owned(),
    }
}
