//! Artifact stores: one trait, one file per backend.
//!
//! A store knows objects, ranges and multipart uploads; it knows nothing of files, inodes, runs
//! or MLflow. Keys are `/`-separated UTF-8 strings without a leading slash.

pub mod checksum;
pub mod cloud;
mod error;
pub mod local;
mod location;
mod metrics;
mod pieces;
pub mod proxy;
pub mod s3;

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

pub use error::{StoreError, StoreResult};
pub use location::{Location, StoreSettings, Stores};
pub use metrics::StoreMetrics;

/// An opaque version mark of an object, exactly as the store wrote it (quotes included).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ETag(Arc<str>);

impl ETag {
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// With quotes, as headers have it: some stores leave them out elsewhere.
    pub fn quoted(text: &str) -> Self {
        if text.contains('"') {
            Self::new(text)
        } else {
            Self::new(format!("\"{text}\""))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ETag {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What a store says of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// `None` where listings carry none (the MLflow proxy).
    pub etag: Option<ETag>,
    pub modified: Option<SystemTime>,
}

/// One page of a listing.
#[derive(Clone, Debug, Default)]
pub struct ListPage {
    pub objects: Vec<ObjectMeta>,
    /// Common prefixes up to the delimiter `/`, each with its trailing slash.
    pub prefixes: Vec<String>,
    /// The continuation token, when there is more.
    pub next: Option<String>,
}

/// Where a page of a listing begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageStart<'a> {
    First,
    /// Where a former page ended: its [`ListPage::next`].
    Token(&'a str),
    /// Behind a key, which need not exist.
    After(&'a str),
}

/// The body of a ranged GET: frames in order, as they came off the wire, never copied together.
/// The store has checked status, Content-Range and ETag; the stream yields exactly
/// `range.end - range.start` bytes or ends with an error (never silently short).
pub struct RangeBody {
    pub etag: Option<ETag>,
    /// Size of the whole object as Content-Range told it, bytes.
    pub object_size: u64,
    /// The bytes this body carries (clipped to the object's end).
    pub range: Range<u64>,
    pub frames: BoxStream<'static, StoreResult<Bytes>>,
}

/// The body of a PUT or of a part, with the checksum computed while it was written.
#[derive(Clone, Debug)]
pub struct Payload {
    pub bytes: Bytes,
    /// CRC32C (Castagnoli) of `bytes`.
    pub crc32c: u32,
}

/// The body of a PUT that is larger than what is held in memory at once.
pub trait LongBody: fmt::Debug + Send + Sync {
    /// Bytes; `None` for one that is still being written, whose frames come as it grows. Only stores
    /// that [stream](Capabilities::streams) take those, once, and without a condition.
    fn size(&self) -> Option<u64>;

    /// All of it, in order. Each call begins anew, for a body that has to be sent again.
    fn frames(&self) -> BoxStream<'static, StoreResult<Bytes>>;
}

/// When a write may take effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    Always,
    /// Only over this version; otherwise [`StoreError::Conflict`].
    IfMatch(ETag),
    /// Only where nothing is; otherwise [`StoreError::Conflict`].
    IfAbsent,
}

/// A part the store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartReceipt {
    /// 1..=10000.
    pub number: u32,
    /// Bytes.
    pub size: u64,
    pub etag: ETag,
    pub crc32c: Option<u32>,
}

/// An object as it is after a completed write. The store has verified it: by a checksum it
/// checked itself, or by comparing size and ETag after completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub etag: Option<ETag>,
    pub size: u64,
    pub modified: Option<SystemTime>,
}

/// What a store can do beyond the minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Objects in parts; where it is false, [`Store::put_long`] takes them.
    pub multipart: bool,
    /// [`Store::put_long`] takes bodies that are still being written. It may cease to, and be false
    /// until [`Store::learn_whether_it_streams`] was called.
    pub streams: bool,
    /// `copy` inside the store.
    pub copy: bool,
    /// `copy_part` inside the store.
    pub copy_part: bool,
    pub list_parts: bool,
    /// Parts may come to nothing before they are an object, and so may the way to send them: what was
    /// sent is kept here until then. Whether there is [`Self::multipart`] may then change.
    pub parts_expire: bool,
    /// `Condition` other than `Always` is honoured.
    pub conditional_put: bool,
    /// Smallest part but the last, bytes (5 MiB on S3).
    pub minimum_part_size: u64,
    /// Most parts of one upload (10 000 on S3).
    pub maximum_parts: u32,
    /// Largest body of one PUT or part, bytes (5 GiB on S3).
    pub maximum_put_size: u64,
    /// Nothing can be changed in it.
    pub read_only: bool,
    /// It is a service, to which more requests at once bring more; not one server that hands all bodies
    /// through, or a disk.
    pub scales: bool,
    /// Its objects are files of this machine: [`Store::file_of`] opens them, and a copy of them on
    /// local disk is of no use.
    pub local: bool,
}

/// The type that MLflow's own client would tell for a file of this name.
fn content_type(key: &str) -> String {
    mime_guess::from_path(key)
        .first_or_octet_stream()
        .to_string()
}

/// An object store. Every call retries what can be retried, within bounds, before it fails.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// For messages: `s3://bucket`. No secrets, no trailing slash.
    fn name(&self) -> &str;

    /// For cache keys: tells this store from every other one there is, in any process. Where its
    /// name is not enough (two endpoints may each have a bucket of one name), more. No secrets.
    fn identity(&self) -> &str;

    fn capabilities(&self) -> Capabilities;

    /// Whether an object may have this key.
    ///
    /// # Errors
    /// `InvalidName`, with what is wrong with it.
    fn accepts(&self, _key: &str) -> StoreResult<()> {
        Ok(())
    }

    /// Asks the server whether it [streams](Capabilities::streams), where only it can tell, unless it
    /// has told not long ago.
    async fn learn_whether_it_streams(&self) {}

    /// Objects (and, with `delimited`, common prefixes up to `/`) whose keys start with `prefix`,
    /// in key order, from `start` on.
    async fn list(
        &self,
        prefix: &str,
        delimited: bool,
        start: PageStart<'_>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage>;

    async fn head(&self, key: &str) -> StoreResult<ObjectMeta>;

    /// As [`Self::head`], but that nothing is there is an answer.
    async fn find(&self, key: &str) -> StoreResult<Option<ObjectMeta>> {
        match self.head(key).await {
            Ok(meta) => Ok(Some(meta)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Bytes `range` of the object; with `version`, only if it still is that version
    /// ([`StoreError::Changed`] otherwise). `range` must not be empty.
    async fn get(
        &self,
        key: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<RangeBody>;

    /// The object as a file, where it is one of this machine and still that version.
    fn file_of(&self, _key: &str, _version: Option<&ETag>) -> Option<File> {
        None
    }

    /// Writes a whole object atomically.
    async fn put(&self, key: &str, payload: Payload, condition: Condition) -> StoreResult<Stored>;

    /// As [`Self::put`], for bodies of any size: how stores without multipart take large objects.
    async fn put_long(
        &self,
        key: &str,
        _body: Arc<dyn LongBody>,
        _condition: Condition,
    ) -> StoreResult<Stored> {
        Err(StoreError::Unsupported {
            object: format!("{}/{key}", self.name()),
            detail: "it takes large objects in parts only".to_owned(),
        })
    }

    /// Starts a multipart upload and returns its id.
    async fn create_multipart(&self, key: &str) -> StoreResult<String>;

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt>;

    /// Fills a part from `range` of another object of this store, if that is still `version`.
    async fn copy_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        source: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<PartReceipt>;

    /// Makes the object of the parts, which must be in rising order of number, and verifies it.
    async fn complete_multipart(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored>;

    /// Gives an upload up; success also when it is gone already.
    async fn abort_multipart(&self, key: &str, upload_id: &str) -> StoreResult<()>;

    async fn list_parts(&self, key: &str, upload_id: &str) -> StoreResult<Vec<PartReceipt>>;

    /// Copies a whole object of any size inside the store.
    async fn copy(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored>;

    /// Deletes objects; success also for those that are gone already.
    async fn delete(&self, keys: &[String]) -> StoreResult<()>;
}
