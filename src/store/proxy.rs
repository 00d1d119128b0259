//! The artifact routes of an MLflow server, which keeps artifacts somewhere else and passes all bytes
//! through: `mlflow-artifacts:` URIs, and `http(s):` URIs of such routes.
//!
//! The protocol is MLflow 3.17's. Its listings tell names and sizes: there are no versions and no
//! times, and no conditions on a write but what a look before it tells. Who we are is told to the
//! tracking server alone.

mod access;
mod address;
mod listing;
mod parts;
mod read;
mod release;
mod sending;
mod switches;
mod upload;
mod whole;

use std::cmp::Reverse;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{Client, redirect};

pub use self::access::Courier;
pub use self::address::Address;
pub use self::switches::Switches;

use self::access::Access;
use self::address::check_name;
use self::parts::Parts;
use self::read::Reading;
use self::release::Release;
use self::upload::Upload;
use self::whole::Wholes;
use super::metrics::{Request, StoreMetrics};
use super::{
    Capabilities, Condition, ETag, ListPage, LongBody, ObjectMeta, PageStart, PartReceipt, Payload,
    RangeBody, Store, StoreError, StoreResult, Stored,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that nothing may move, where nobody says otherwise.
const PATIENCE: Duration = Duration::from_secs(60);
/// The stores behind servers that have addresses for parts are S3 and Google's: both take parts of 5 MiB
/// and more, and so many.
const SMALLEST_PART: u64 = 5 << 20;
const MOST_PARTS: u32 = 10_000;

/// How servers that proxy artifacts are reached.
#[derive(Clone, Debug)]
pub struct ProxySettings {
    /// The way to the tracking server, if there is one.
    pub courier: Option<Arc<dyn Courier>>,
    /// The longest that nothing may move.
    pub patience: Duration,
    /// Where objects lie that a server sends only whole, while they are read.
    pub folder: PathBuf,
    /// Whether the store behind a server is turned to.
    pub switches: Switches,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            courier: None,
            patience: PATIENCE,
            folder: std::env::temp_dir(),
            switches: Switches::default(),
        }
    }
}

impl ProxySettings {
    pub(super) fn server(&self) -> Option<&str> {
        self.courier.as_deref().map(Courier::server)
    }
}

/// What one server proxies.
#[derive(Debug)]
pub struct ProxyStore {
    name: String,
    access: Access,
    reading: Arc<Reading>,
    parts: Arc<Parts>,
    release: Arc<Release>,
    metrics: Arc<StoreMetrics>,
}

impl ProxyStore {
    /// Sends nothing.
    ///
    /// # Errors
    /// No HTTP client can be made.
    pub fn new(
        address: Address,
        settings: &ProxySettings,
        metrics: Arc<StoreMetrics>,
    ) -> StoreResult<Self> {
        let name = address.name();
        let courier = settings.courier.clone();
        let stranger = match &courier {
            // What the server gives out of one run comes from the server alone.
            Some(courier) if address.run.is_some() => courier.client().clone(),
            _ => stranger(&name)?,
        };
        let access = Access::new(address, courier, stranger, settings.patience);
        let wholes = Arc::new(Wholes::new(settings.folder.clone()));
        let switches = settings.switches;
        let reading = Reading::new(access.clone(), wholes, switches, Arc::clone(&metrics));
        let parts = Parts::new(access.clone(), switches, Arc::clone(&metrics));
        let release = Release::new(access.clone());
        Ok(Self {
            name,
            access,
            reading: Arc::new(reading),
            parts: Arc::new(parts),
            release: Arc::new(release),
            metrics,
        })
    }

    fn object(&self, key: &str) -> Arc<str> {
        format!("{}/{key}", self.name).into()
    }

    /// The server takes whatever it is sent: all that can be done is to look before.
    async fn check(&self, key: &str, condition: &Condition) -> StoreResult<()> {
        let object = self.object(key);
        check_name(&object, key)?;
        let conflicts = match condition {
            Condition::Always => false,
            Condition::IfAbsent => listing::find(&self.access, &object, key).await?.is_some(),
            Condition::IfMatch(_) => true,
        };
        match conflicts {
            true => Err(StoreError::Conflict {
                object: object.to_string(),
            }),
            false => Ok(()),
        }
    }

    fn cannot(&self, key: &str) -> StoreError {
        StoreError::Unsupported {
            object: self.object(key).to_string(),
            detail: "an MLflow server has no such route".to_owned(),
        }
    }

    fn upload(&self) -> Upload<'_> {
        Upload {
            access: &self.access,
            reading: &self.reading,
            metrics: &self.metrics,
        }
    }

    /// Asks, in the background, whether parts can go straight to the store behind the server, and
    /// whether it takes what is still being written, as far as that is not known.
    fn learn(&self) {
        if self.access.address.run.is_some() {
            return;
        }
        if self.parts.are_to_be_asked_for() {
            let (reading, parts) = (Arc::clone(&self.reading), Arc::clone(&self.parts));
            tokio::spawn(async move {
                if let Some(info) = reading.info().await {
                    parts.offer(info.multipart_uploads_enabled);
                }
            });
        }
    }

    async fn send(&self, key: &str, body: Arc<dyn LongBody>) -> StoreResult<Stored> {
        self.metrics.count(Request::Put);
        let grows = body.size().is_none();
        let outcome = self.upload().put(key, &self.object(key), &body).await;
        if let (true, Err(error)) = (grows, &outcome) {
            self.release.note_failed_stream(error);
        }
        outcome
    }
}

/// A client for hosts that must not be told who we are.
fn stranger(name: &str) -> StoreResult<Client> {
    let client = Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(redirect::Policy::none())
        .referer(false)
        .user_agent(concat!("mlfs/", env!("CARGO_PKG_VERSION")))
        .build();
    client.map_err(|error| StoreError::Other {
        object: name.to_owned(),
        detail: error.to_string(),
    })
}

/// A body that is in memory.
#[derive(Debug)]
struct Held(Bytes);

impl LongBody for Held {
    fn size(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }

    fn frames(&self) -> BoxStream<'static, StoreResult<Bytes>> {
        let bytes = self.0.clone();
        stream::once(async { Ok(bytes) }).boxed()
    }
}

/// A body that is another object of the server's.
#[derive(Debug)]
struct Copied {
    reading: Arc<Reading>,
    key: String,
    object: Arc<str>,
    size: u64,
    version: Option<ETag>,
}

impl LongBody for Copied {
    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn frames(&self) -> BoxStream<'static, StoreResult<Bytes>> {
        if self.size == 0 {
            return stream::empty().boxed();
        }
        let (reading, key) = (Arc::clone(&self.reading), self.key.clone());
        let (object, version) = (Arc::clone(&self.object), self.version.clone());
        let whole = 0..self.size;
        let body = async move {
            let body = reading.get(&key, &object, whole.clone(), version.as_ref());
            let body = body.await?;
            if body.object_size != whole.end || body.range != whole {
                return Err(StoreError::Changed {
                    object: object.to_string(),
                });
            }
            Ok(body.frames)
        };
        stream::once(body).try_flatten().boxed()
    }
}

#[async_trait]
impl Store for ProxyStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            multipart: self.parts.are_taken(),
            streams: self.release.streams(),
            copy: false,
            copy_part: false,
            list_parts: false,
            parts_expire: true,
            conditional_put: false,
            minimum_part_size: SMALLEST_PART,
            maximum_parts: MOST_PARTS,
            maximum_put_size: i64::MAX as u64,
            read_only: self.access.address.run.is_some(),
            scales: false,
            local: false,
        }
    }

    fn accepts(&self, key: &str) -> StoreResult<()> {
        check_name(&self.object(key), key)
    }

    async fn learn_whether_it_streams(&self) {
        self.release.learn().await;
    }

    async fn list(
        &self,
        prefix: &str,
        delimited: bool,
        start: PageStart<'_>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage> {
        self.metrics.count(Request::List);
        self.learn();
        let object = self.object(prefix);
        // What cannot be there is not asked for.
        if check_name(&object, prefix).is_err() {
            return Ok(ListPage::default());
        }
        listing::page(&self.access, &object, prefix, delimited, start, maximum).await
    }

    async fn head(&self, key: &str) -> StoreResult<ObjectMeta> {
        self.metrics.count(Request::Head);
        let object = self.object(key);
        let found = match check_name(&object, key) {
            Ok(()) => listing::find(&self.access, &object, key).await?,
            Err(_) => None,
        };
        found.ok_or_else(|| StoreError::NotFound {
            object: object.to_string(),
        })
    }

    async fn get(
        &self,
        key: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<RangeBody> {
        self.metrics.count(Request::Get);
        let object = self.object(key);
        check_name(&object, key)?;
        self.reading.get(key, &object, range, version).await
    }

    async fn put(&self, key: &str, payload: Payload, condition: Condition) -> StoreResult<Stored> {
        self.check(key, &condition).await?;
        self.send(key, Arc::new(Held(payload.bytes))).await
    }

    async fn put_long(
        &self,
        key: &str,
        body: Arc<dyn LongBody>,
        condition: Condition,
    ) -> StoreResult<Stored> {
        self.check(key, &condition).await?;
        self.send(key, body).await
    }

    async fn create_multipart(&self, key: &str) -> StoreResult<String> {
        self.metrics.count(Request::CreateMultipart);
        let object = self.object(key);
        check_name(&object, key)?;
        self.parts.create(key, &object).await
    }

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt> {
        self.metrics.count(Request::UploadPart);
        let (parts, object) = (&self.parts, self.object(key));
        parts.send(key, &object, upload_id, number, &payload).await
    }

    async fn copy_part(
        &self,
        key: &str,
        _upload_id: &str,
        _number: u32,
        _source: &str,
        _range: Range<u64>,
        _version: Option<&ETag>,
    ) -> StoreResult<PartReceipt> {
        Err(self.cannot(key))
    }

    async fn complete_multipart(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored> {
        self.check(key, &condition).await?;
        self.metrics.count(Request::CompleteMultipart);
        let (upload, object) = (self.upload(), self.object(key));
        upload
            .complete(&self.parts, key, &object, upload_id, parts)
            .await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> StoreResult<()> {
        self.metrics.count(Request::AbortMultipart);
        let object = self.object(key);
        self.parts.abort(key, &object, upload_id).await
    }

    async fn list_parts(&self, key: &str, _upload_id: &str) -> StoreResult<Vec<PartReceipt>> {
        Err(self.cannot(key))
    }

    /// Through this machine: the server copies nothing by itself.
    async fn copy(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored> {
        if target.ends_with('/') {
            // A directory is there as soon as something is in it.
            return Ok(Stored {
                etag: None,
                size: 0,
                modified: None,
            });
        }
        self.check(target, &Condition::Always).await?;
        check_name(&self.object(&source.key), &source.key)?;
        if source.size > 0 {
            // Before anything is sent: the server may need long to find the first byte.
            let (object, version) = (self.object(&source.key), source.etag.as_ref());
            self.reading
                .get(&source.key, &object, 0..1, version)
                .await?;
        }
        let body = Copied {
            reading: Arc::clone(&self.reading),
            key: source.key.clone(),
            object: self.object(&source.key),
            size: source.size,
            version: source.etag.clone(),
        };
        self.send(target, Arc::new(body)).await
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<()> {
        let mut keys: Vec<&String> = keys.iter().collect();
        // Directories when nothing is in them any more: the innermost first, after all files.
        keys.sort_by_key(|key| (key.ends_with('/'), Reverse(key.len())));
        for key in keys {
            self.metrics.count(Request::Delete);
            self.remove(key).await?;
        }
        Ok(())
    }
}

impl ProxyStore {
    /// Removes an object; of a directory (a key that ends in a slash) only an empty one, for the
    /// server removes all that is below.
    async fn remove(&self, key: &str) -> StoreResult<()> {
        let object = self.object(key);
        check_name(&object, key)?;
        let path = key.trim_end_matches('/');
        let siblings = listing::beginning_with(&self.access, &object, path).await?;
        let is_there = match key == path {
            true => siblings.iter().any(|sibling| sibling == key),
            false => listing::is_empty_directory(&self.access, &object, key).await?,
        };
        let others = siblings.iter().any(|sibling| sibling != key);
        if is_there && others && !self.release.deletes_exactly().await {
            return Err(StoreError::Unsupported {
                object: object.to_string(),
                detail: format!(
                    "this MLflow server may remove all names that begin so ({}); servers from 3.17 \
                     on do not",
                    siblings.join(", ")
                ),
            });
        }
        if !is_there {
            return Ok(());
        }
        let url = self.access.address.object(path);
        let patience = self.access.patience;
        let removed = self
            .access
            .send(&object, patience, |client| client.delete(&url));
        let removed = removed.await;
        self.reading.wholes.forget(key);
        match removed {
            Err(failed) if failed.is(404) => Ok(()),
            outcome => Ok(outcome.map(|_| ())?),
        }
    }
}
