//! S3 and S3-compatible stores, through the AWS SDK.

mod backlog;
mod body;
mod client;
mod doubt;
mod errors;
mod multipart;
mod objects;
mod pace;
mod retry;
mod settings;
mod transport;
mod uri;
mod watch;
mod wire;

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_s3::types::RequestPayer;
use futures_util::future::BoxFuture;

use super::metrics::StoreMetrics;
use super::{
    Capabilities, Condition, ETag, ListPage, ObjectMeta, PageStart, PartReceipt, Payload,
    RangeBody, Store, StoreError, StoreResult, Stored, content_type,
};
use body::RangeRequest;

pub use client::S3Client;
pub use settings::{S3Settings, SettingError, SignPayload, UploadArguments};
pub(super) use uri::S3Uri;

/// S3's limits.
const MINIMUM_PART: u64 = 5 << 20;
const MAXIMUM_PUT: u64 = 5 << 30;
const MAXIMUM_PARTS: u32 = 10_000;
/// How often a body that arrives damaged is sent.
const DAMAGED_ATTEMPTS: usize = 3;

/// One bucket.
#[derive(Debug)]
pub struct S3Store {
    client: Arc<S3Client>,
    bucket: Arc<str>,
    name: String,
    identity: String,
    metrics: Arc<StoreMetrics>,
}

/// Sets what `MLFLOW_S3_UPLOAD_EXTRA_ARGS` asks for. A macro, for the SDK's builders share no trait.
macro_rules! with_upload_arguments {
    ($operation:expr, $arguments:expr) => {{
        let arguments = &$arguments;
        let encryption = arguments.server_side_encryption.as_deref();
        $operation
            .set_server_side_encryption(encryption.map(ServerSideEncryption::from))
            .set_ssekms_key_id(arguments.kms_key_id.clone())
            .set_storage_class(arguments.storage_class.as_deref().map(StorageClass::from))
            .set_acl(arguments.acl.as_deref().map(ObjectCannedAcl::from))
            .set_tagging(arguments.tagging.clone())
    }};
}
use with_upload_arguments;

impl S3Store {
    pub(super) fn new(client: Arc<S3Client>, uri: &S3Uri, metrics: Arc<StoreMetrics>) -> Self {
        let bucket = uri.bucket.as_str();
        Self {
            bucket: bucket.into(),
            name: uri.name.clone(),
            identity: format!("{}/{bucket}", client.endpoint),
            client,
            metrics,
        }
    }

    fn object(&self, key: &str) -> String {
        format!("{}/{key}", self.name)
    }

    fn owner(&self) -> Option<String> {
        self.client.settings.expected_bucket_owner.clone()
    }

    fn payer(&self) -> Option<RequestPayer> {
        self.client.payer()
    }

    /// Sends a body: again when it arrives damaged, and without a checksum header where the store
    /// takes it only so.
    async fn send_checked<'a, T>(
        &self,
        send: impl Fn(bool) -> BoxFuture<'a, StoreResult<T>>,
    ) -> StoreResult<T> {
        let with_checksum = self.client.checksums();
        let mut attempt = 1;
        let refusal = loop {
            match send(with_checksum).await {
                Err(StoreError::Corrupt { object, detail }) if attempt < DAMAGED_ATTEMPTS => {
                    tracing::warn!(object, detail, attempt, "damaged on the way; sent again");
                    attempt += 1;
                }
                Err(error) if with_checksum && may_be_the_checksum(&error) => break error,
                outcome => return outcome,
            }
        };
        match send(false).await {
            Ok(sent) => {
                self.client.refuse_checksums();
                Ok(sent)
            }
            Err(_) => Err(refusal),
        }
    }

    /// Size, ETag and time of an object just written, compared with what was answered.
    async fn verify(&self, key: &str, size: u64, etag: Option<&str>) -> StoreResult<Stored> {
        let meta = self.head_object(key).await?;
        let same = etag.is_none_or(|etag| {
            let found = meta.etag.as_ref();
            found.is_none_or(|found| wire::same(found, etag))
        });
        if !same {
            return Err(StoreError::Conflict {
                object: self.object(key),
            });
        }
        if meta.size != size {
            let detail = format!("{} bytes stored of {size}", meta.size);
            return Err(StoreError::Corrupt {
                object: self.object(key),
                detail,
            });
        }
        Ok(Stored {
            etag: meta.etag,
            size,
            modified: meta.modified,
        })
    }
}

/// Whether a store may have refused a body because of its checksum header. Those that do not know
/// the header say so in different ways, none of which says that it was the header.
fn may_be_the_checksum(error: &StoreError) -> bool {
    match error {
        StoreError::Unsupported { .. } => true,
        StoreError::Other { detail, .. } => ["NotImplemented", "InvalidRequest", "InvalidArgument"]
            .iter()
            .any(|code| detail.starts_with(&format!("HTTP 400 {code}"))),
        _ => false,
    }
}

#[async_trait]
impl Store for S3Store {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> &str {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            multipart: true,
            streams: false,
            copy: true,
            copy_part: true,
            list_parts: true,
            parts_expire: false,
            conditional_put: true,
            minimum_part_size: MINIMUM_PART,
            maximum_parts: MAXIMUM_PARTS,
            maximum_put_size: MAXIMUM_PUT,
            read_only: false,
            scales: true,
            local: false,
        }
    }

    async fn list(
        &self,
        prefix: &str,
        delimited: bool,
        start: PageStart<'_>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage> {
        self.list_objects(prefix, delimited, start, maximum).await
    }

    async fn head(&self, key: &str) -> StoreResult<ObjectMeta> {
        self.head_object(key).await
    }

    async fn get(
        &self,
        key: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<RangeBody> {
        let request = RangeRequest {
            client: Arc::clone(&self.client),
            metrics: Arc::clone(&self.metrics),
            bucket: Arc::clone(&self.bucket),
            object: self.object(key).into(),
            key: key.to_owned(),
            version: version.cloned(),
        };
        request.send(range).await
    }

    async fn put(&self, key: &str, payload: Payload, condition: Condition) -> StoreResult<Stored> {
        self.put_object(key, payload, condition).await
    }

    async fn create_multipart(&self, key: &str) -> StoreResult<String> {
        self.create_upload(key).await
    }

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt> {
        self.send_part(key, upload_id, number, payload).await
    }

    async fn copy_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        source: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<PartReceipt> {
        self.copy_one_part(key, upload_id, number, source, range, version)
            .await
    }

    async fn complete_multipart(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored> {
        self.complete_upload(key, upload_id, parts, condition).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> StoreResult<()> {
        self.abort_upload(key, upload_id).await
    }

    async fn list_parts(&self, key: &str, upload_id: &str) -> StoreResult<Vec<PartReceipt>> {
        self.list_held_parts(key, upload_id).await
    }

    async fn copy(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored> {
        if source.size > MAXIMUM_PUT {
            self.copy_large(source, target).await
        } else {
            self.copy_object(source, target).await
        }
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<()> {
        self.delete_objects(keys).await
    }
}
