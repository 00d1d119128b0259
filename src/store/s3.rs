//! S3 and S3-compatible stores, through the AWS SDK.

mod body;
mod client;
mod errors;
mod settings;

use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::complete_multipart_upload::CompleteMultipartUploadError;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, Delete, EncodingType,
    ObjectCannedAcl, ObjectIdentifier, RequestPayer, ServerSideEncryption, StorageClass,
};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{StreamExt, TryStreamExt, stream};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::metrics::{Request, StoreMetrics};
use super::{
    Capabilities, Condition, ETag, ListPage, ObjectMeta, PartReceipt, Payload, RangeBody, Store,
    StoreError, StoreResult, Stored,
};
use body::RangeRequest;
use errors::translate;

pub use client::S3Client;
pub use settings::{S3Settings, SettingError, SignPayload, UploadArguments};

/// S3's limits.
const MINIMUM_PART: u64 = 5 << 20;
const MAXIMUM_PUT: u64 = 5 << 30;
const MAXIMUM_PARTS: u32 = 10_000;
/// Keys of one DeleteObjects request.
const DELETE_BATCH: usize = 1000;
/// Part copies of one large object under way at once, and their size.
const COPIES: usize = 16;
const COPY_PART: u64 = 512 << 20;

/// What stays as it is in the copy source header.
const KEY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// One bucket.
#[derive(Debug)]
pub struct S3Store {
    client: Arc<S3Client>,
    bucket: Arc<str>,
    name: String,
    identity: String,
    metrics: Arc<StoreMetrics>,
}

impl S3Store {
    pub fn new(client: Arc<S3Client>, bucket: &str, metrics: Arc<StoreMetrics>) -> Self {
        Self {
            bucket: bucket.into(),
            name: format!("s3://{bucket}"),
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

    fn copy_source(&self, key: &str) -> String {
        format!("{}/{}", self.bucket, utf8_percent_encode(key, KEY))
    }

    fn payer(&self) -> Option<RequestPayer> {
        self.client
            .settings
            .upload
            .request_payer
            .as_deref()
            .map(RequestPayer::from)
    }

    /// Size, ETag and time of an object just written, compared with what was answered.
    async fn verify(&self, key: &str, size: u64, etag: Option<&str>) -> StoreResult<Stored> {
        let meta = self.head(key).await?;
        let same = etag.is_none_or(|etag| {
            meta.etag
                .as_ref()
                .is_none_or(|found| unquoted(found.as_str()) == unquoted(etag))
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

    async fn try_put(
        &self,
        key: &str,
        payload: &Payload,
        condition: &Condition,
    ) -> StoreResult<Stored> {
        let arguments = &self.client.settings.upload;
        let (if_match, if_none_match) = headers(condition);
        let checksum = self.client.checksums().then(|| encode_crc(payload.crc32c));
        let mut operation = self
            .client
            .sdk
            .put_object()
            .bucket(&*self.bucket)
            .key(key)
            .body(ByteStream::from(payload.bytes.clone()))
            .content_type(
                mime_guess::from_path(key)
                    .first_or_octet_stream()
                    .to_string(),
            )
            .set_checksum_crc32_c(checksum)
            .set_if_match(if_match)
            .set_if_none_match(if_none_match)
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .set_tagging(arguments.tagging.clone())
            .set_ssekms_key_id(arguments.kms_key_id.clone());
        if let Some(encryption) = &arguments.server_side_encryption {
            operation =
                operation.server_side_encryption(ServerSideEncryption::from(encryption.as_str()));
        }
        if let Some(class) = &arguments.storage_class {
            operation = operation.storage_class(StorageClass::from(class.as_str()));
        }
        if let Some(acl) = &arguments.acl {
            operation = operation.acl(ObjectCannedAcl::from(acl.as_str()));
        }
        let mut operation = operation.customize();
        if self.client.unsigned_payload {
            operation = operation.disable_payload_signing();
        }
        let answer = operation
            .send()
            .await
            .map_err(|error| as_conflict(translate(self.object(key), error), condition))?;
        let size = payload.bytes.len() as u64;
        if answer.checksum_crc32_c().is_some() {
            let etag = answer.e_tag().map(ETag::new);
            return Ok(Stored {
                etag,
                size,
                modified: Some(SystemTime::now()),
            });
        }
        self.verify(key, size, answer.e_tag()).await
    }

    async fn try_upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: &Payload,
    ) -> StoreResult<PartReceipt> {
        let checksum = self.client.checksums().then(|| encode_crc(payload.crc32c));
        let mut operation = self
            .client
            .sdk
            .upload_part()
            .bucket(&*self.bucket)
            .key(key)
            .upload_id(upload_id)
            .part_number(number as i32)
            .body(ByteStream::from(payload.bytes.clone()))
            .set_checksum_crc32_c(checksum.clone())
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .customize();
        if self.client.unsigned_payload {
            operation = operation.disable_payload_signing();
        }
        let answer = operation
            .send()
            .await
            .map_err(|error| translate(self.object(key), error))?;
        Ok(PartReceipt {
            number,
            size: payload.bytes.len() as u64,
            etag: self.part_etag(key, answer.e_tag())?,
            crc32c: answer
                .checksum_crc32_c()
                .and(checksum)
                .map(|_| payload.crc32c),
        })
    }

    fn part_etag(&self, key: &str, etag: Option<&str>) -> StoreResult<ETag> {
        etag.map(ETag::new).ok_or_else(|| StoreError::Other {
            object: self.object(key),
            detail: "the store told no ETag for a part".to_owned(),
        })
    }

    /// Sends with a checksum; once more without, when the store refuses checksums as such.
    fn refused(&self, error: &StoreError) -> bool {
        let refused = match error {
            StoreError::Unsupported { .. } => true,
            StoreError::Other { detail, .. } => {
                detail.starts_with("HTTP 400 NotImplemented")
                    || detail.starts_with("HTTP 400 InvalidRequest")
                    || detail.starts_with("HTTP 400 InvalidArgument")
            }
            _ => false,
        };
        if refused && self.client.checksums() {
            self.client.refuse_checksums();
            return true;
        }
        false
    }

    /// Whether a completion that failed has taken place all the same. The upload must be gone
    /// (nobody else ends it), and the object must be one of these parts, just made.
    async fn completed_anyway(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        since: SystemTime,
    ) -> bool {
        let gone = self.list_parts(key, upload_id).await;
        if !matches!(gone, Err(StoreError::UploadGone { .. })) {
            return false;
        }
        let Ok(meta) = self.head(key).await else {
            return false;
        };
        let size: u64 = parts.iter().map(|part| part.size).sum();
        let composite = format!("-{}", parts.len());
        let shaped = meta
            .etag
            .as_ref()
            .is_some_and(|etag| unquoted(etag.as_str()).ends_with(composite.as_str()));
        let recent = meta.modified.is_some_and(|modified| modified >= since);
        meta.size == size && shaped && recent
    }

    async fn copy_large(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored> {
        let upload = self.create_multipart(target).await?;
        let parts = source.size.div_ceil(COPY_PART) as u32;
        let copied: StoreResult<Vec<PartReceipt>> = stream::iter(0..parts)
            .map(|index| {
                let start = u64::from(index) * COPY_PART;
                let range = start..(start + COPY_PART).min(source.size);
                let etag = source.etag.as_ref();
                self.copy_part(target, &upload, index + 1, &source.key, range, etag)
            })
            .buffered(COPIES)
            .try_collect()
            .await;
        let finished = match copied {
            Ok(parts) => {
                self.complete_multipart(target, &upload, &parts, Condition::Always)
                    .await
            }
            Err(error) => Err(error),
        };
        if finished.is_err()
            && let Err(error) = self.abort_multipart(target, &upload).await
        {
            tracing::warn!(%error, "the upload of a copy that failed could not be aborted");
        }
        finished
    }

    async fn delete_batch(&self, keys: &[String]) -> StoreResult<()> {
        let identifiers = keys
            .iter()
            .map(|key| ObjectIdentifier::builder().key(key).build())
            .collect::<Result<Vec<_>, _>>()
            .and_then(|objects| {
                Delete::builder()
                    .set_objects(Some(objects))
                    .quiet(true)
                    .build()
            });
        let delete = identifiers.map_err(|error| StoreError::Other {
            object: self.name.clone(),
            detail: error.to_string(),
        })?;
        self.metrics.count(Request::Delete);
        let answer = self
            .client
            .sdk
            .delete_objects()
            .bucket(&*self.bucket)
            .delete(delete)
            .set_expected_bucket_owner(self.owner())
            .send()
            .await
            .map_err(|error| translate(self.name.clone(), error))?;
        match answer.errors().first() {
            None => Ok(()),
            Some(failed) => Err(StoreError::Other {
                object: self.object(failed.key().unwrap_or_default()),
                detail: format!(
                    "not deleted: {} {}",
                    failed.code().unwrap_or_default(),
                    failed.message().unwrap_or_default()
                ),
            }),
        }
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
            copy: true,
            copy_part: true,
            list_parts: true,
            conditional_put: true,
            minimum_part_size: MINIMUM_PART,
            maximum_parts: MAXIMUM_PARTS,
            maximum_put_size: MAXIMUM_PUT,
        }
    }

    async fn list(
        &self,
        prefix: &str,
        delimited: bool,
        token: Option<&str>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage> {
        self.metrics.count(Request::List);
        let answer = self
            .client
            .sdk
            .list_objects_v2()
            .bucket(&*self.bucket)
            .prefix(prefix)
            .set_delimiter(delimited.then(|| "/".to_owned()))
            .set_continuation_token(token.map(str::to_owned))
            .set_max_keys(maximum.map(|maximum| maximum as i32))
            // Keys may hold characters that XML cannot.
            .encoding_type(EncodingType::Url)
            .set_expected_bucket_owner(self.owner())
            .send()
            .await
            .map_err(|error| translate(self.object(prefix), error))?;
        let encoded = answer.encoding_type() == Some(&EncodingType::Url);
        let decode = |key: &str| {
            if encoded {
                decode_key(key)
            } else {
                key.to_owned()
            }
        };
        let objects = answer
            .contents()
            .iter()
            .filter_map(|object| {
                Some(ObjectMeta {
                    key: decode(object.key()?),
                    size: u64::try_from(object.size().unwrap_or(0)).unwrap_or(0),
                    etag: object.e_tag().map(ETag::new),
                    modified: object.last_modified().and_then(time),
                })
            })
            .collect();
        let prefixes = answer
            .common_prefixes()
            .iter()
            .filter_map(|it| it.prefix())
            .map(decode)
            .collect();
        let truncated = answer.is_truncated() == Some(true);
        let next = answer.next_continuation_token.filter(|_| truncated);
        Ok(ListPage {
            objects,
            prefixes,
            next,
        })
    }

    async fn head(&self, key: &str) -> StoreResult<ObjectMeta> {
        self.metrics.count(Request::Head);
        let answer = self
            .client
            .sdk
            .head_object()
            .bucket(&*self.bucket)
            .key(key)
            .set_expected_bucket_owner(self.owner())
            .send()
            .await
            .map_err(|error| translate(self.object(key), error))?;
        Ok(ObjectMeta {
            key: key.to_owned(),
            size: u64::try_from(answer.content_length().unwrap_or(0)).unwrap_or(0),
            etag: answer.e_tag().map(ETag::new),
            modified: answer.last_modified().and_then(time),
        })
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
        self.metrics.count(Request::Put);
        self.metrics.sent(payload.bytes.len() as u64);
        match self.try_put(key, &payload, &condition).await {
            Err(error) if self.refused(&error) => self.try_put(key, &payload, &condition).await,
            outcome => outcome,
        }
    }

    async fn create_multipart(&self, key: &str) -> StoreResult<String> {
        self.metrics.count(Request::CreateMultipart);
        let arguments = &self.client.settings.upload;
        let mut operation = self
            .client
            .sdk
            .create_multipart_upload()
            .bucket(&*self.bucket)
            .key(key)
            .content_type(
                mime_guess::from_path(key)
                    .first_or_octet_stream()
                    .to_string(),
            )
            .set_checksum_algorithm(self.client.checksums().then_some(ChecksumAlgorithm::Crc32C))
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .set_tagging(arguments.tagging.clone())
            .set_ssekms_key_id(arguments.kms_key_id.clone());
        if let Some(encryption) = &arguments.server_side_encryption {
            operation =
                operation.server_side_encryption(ServerSideEncryption::from(encryption.as_str()));
        }
        if let Some(class) = &arguments.storage_class {
            operation = operation.storage_class(StorageClass::from(class.as_str()));
        }
        if let Some(acl) = &arguments.acl {
            operation = operation.acl(ObjectCannedAcl::from(acl.as_str()));
        }
        let answer = operation
            .send()
            .await
            .map_err(|error| translate(self.object(key), error))?;
        answer.upload_id.ok_or_else(|| StoreError::Other {
            object: self.object(key),
            detail: "the store told no upload id".to_owned(),
        })
    }

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt> {
        self.metrics.count(Request::UploadPart);
        self.metrics.sent(payload.bytes.len() as u64);
        match self.try_upload_part(key, upload_id, number, &payload).await {
            Err(error) if self.refused(&error) => {
                self.try_upload_part(key, upload_id, number, &payload).await
            }
            outcome => outcome,
        }
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
        self.metrics.count(Request::CopyPart);
        let answer = self
            .client
            .sdk
            .upload_part_copy()
            .bucket(&*self.bucket)
            .key(key)
            .upload_id(upload_id)
            .part_number(number as i32)
            .copy_source(self.copy_source(source))
            .copy_source_range(format!("bytes={}-{}", range.start, range.end - 1))
            .set_copy_source_if_match(version.map(|etag| etag.as_str().to_owned()))
            .set_expected_bucket_owner(self.owner())
            .send()
            .await
            .map_err(|error| translate(self.object(source), error))?;
        let result = answer.copy_part_result();
        Ok(PartReceipt {
            number,
            size: range.end - range.start,
            etag: self.part_etag(key, result.and_then(|result| result.e_tag()))?,
            crc32c: result
                .and_then(|result| result.checksum_crc32_c())
                .and_then(decode_crc),
        })
    }

    async fn complete_multipart(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored> {
        self.metrics.count(Request::CompleteMultipart);
        // Stores tell times in whole seconds.
        let since = SystemTime::now() - std::time::Duration::from_secs(2);
        let (if_match, if_none_match) = headers(&condition);
        let completed = parts
            .iter()
            .map(|part| {
                CompletedPart::builder()
                    .part_number(part.number as i32)
                    .e_tag(part.etag.as_str())
                    .set_checksum_crc32_c(part.crc32c.map(encode_crc))
                    .build()
            })
            .collect();
        let sent = self
            .client
            .sdk
            .complete_multipart_upload()
            .bucket(&*self.bucket)
            .key(key)
            .upload_id(upload_id)
            .multipart_upload(
                CompletedMultipartUpload::builder()
                    .set_parts(Some(completed))
                    .build(),
            )
            .set_if_match(if_match)
            .set_if_none_match(if_none_match)
            .set_expected_bucket_owner(self.owner())
            .send()
            .await;
        let size = parts.iter().map(|part| part.size).sum();
        match sent {
            Ok(answer) => self.verify(key, size, answer.e_tag()).await,
            Err(error) => {
                let doubtful = is_doubtful(&error);
                let error = as_conflict(translate(self.object(key), error), &condition);
                if doubtful && self.completed_anyway(key, upload_id, parts, since).await {
                    tracing::info!(object = self.object(key), %error,
                        "the completion was answered with an error, but has taken place");
                    return self.verify(key, size, None).await;
                }
                Err(error)
            }
        }
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> StoreResult<()> {
        self.metrics.count(Request::AbortMultipart);
        let sent = self
            .client
            .sdk
            .abort_multipart_upload()
            .bucket(&*self.bucket)
            .key(key)
            .upload_id(upload_id)
            .set_expected_bucket_owner(self.owner())
            .send()
            .await;
        match sent.map_err(|error| translate(self.object(key), error)) {
            Ok(_) | Err(StoreError::UploadGone { .. } | StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn list_parts(&self, key: &str, upload_id: &str) -> StoreResult<Vec<PartReceipt>> {
        let mut parts = Vec::new();
        let mut marker = None;
        loop {
            self.metrics.count(Request::ListParts);
            let answer = self
                .client
                .sdk
                .list_parts()
                .bucket(&*self.bucket)
                .key(key)
                .upload_id(upload_id)
                .set_part_number_marker(marker)
                .set_expected_bucket_owner(self.owner())
                .send()
                .await
                .map_err(|error| translate(self.object(key), error))?;
            for part in answer.parts() {
                parts.push(PartReceipt {
                    number: part
                        .part_number()
                        .and_then(|it| it.try_into().ok())
                        .unwrap_or(0),
                    size: part.size().and_then(|it| it.try_into().ok()).unwrap_or(0),
                    etag: self.part_etag(key, part.e_tag())?,
                    crc32c: part.checksum_crc32_c().and_then(decode_crc),
                });
            }
            marker = answer.next_part_number_marker().map(str::to_owned);
            if answer.is_truncated() != Some(true) || marker.is_none() {
                return Ok(parts);
            }
        }
    }

    async fn copy(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored> {
        if source.size > MAXIMUM_PUT {
            return self.copy_large(source, target).await;
        }
        self.metrics.count(Request::Copy);
        let answer = self
            .client
            .sdk
            .copy_object()
            .bucket(&*self.bucket)
            .key(target)
            .copy_source(self.copy_source(&source.key))
            .set_copy_source_if_match(source.etag.as_ref().map(|etag| etag.as_str().to_owned()))
            .set_expected_bucket_owner(self.owner())
            .send()
            .await
            .map_err(|error| translate(self.object(&source.key), error))?;
        let result = answer.copy_object_result();
        Ok(Stored {
            etag: result.and_then(|result| result.e_tag()).map(ETag::new),
            size: source.size,
            modified: result
                .and_then(|result| result.last_modified())
                .and_then(time),
        })
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<()> {
        if let [key] = keys {
            self.metrics.count(Request::Delete);
            let sent = self
                .client
                .sdk
                .delete_object()
                .bucket(&*self.bucket)
                .key(key)
                .set_expected_bucket_owner(self.owner())
                .send()
                .await;
            return match sent.map_err(|error| translate(self.object(key), error)) {
                Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            };
        }
        for batch in keys.chunks(DELETE_BATCH) {
            self.delete_batch(batch).await?;
        }
        Ok(())
    }
}

fn headers(condition: &Condition) -> (Option<String>, Option<String>) {
    match condition {
        Condition::Always => (None, None),
        Condition::IfMatch(etag) => (Some(etag.as_str().to_owned()), None),
        Condition::IfAbsent => (None, Some("*".to_owned())),
    }
}

/// A condition of ours that failed is a conflict of writers.
fn as_conflict(error: StoreError, condition: &Condition) -> StoreError {
    match error {
        StoreError::Changed { object } if *condition != Condition::Always => {
            StoreError::Conflict { object }
        }
        StoreError::NotFound { object } if matches!(condition, Condition::IfMatch(_)) => {
            StoreError::Conflict { object }
        }
        error => error,
    }
}

/// Whether the request may have taken effect although it was answered with an error.
fn is_doubtful(error: &SdkError<CompleteMultipartUploadError, HttpResponse>) -> bool {
    match error {
        SdkError::ServiceError(service) => {
            let gone = service.err().meta().code() == Some("NoSuchUpload");
            service.raw().status().is_server_error() || gone
        }
        SdkError::ConstructionFailure(_) => false,
        _ => true,
    }
}

fn encode_crc(crc32c: u32) -> String {
    BASE64_STANDARD.encode(crc32c.to_be_bytes())
}

fn decode_crc(text: &str) -> Option<u32> {
    let bytes = BASE64_STANDARD.decode(text).ok()?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// `encoding-type=url` writes a space as `+`.
fn decode_key(key: &str) -> String {
    percent_decode_str(&key.replace('+', " "))
        .decode_utf8_lossy()
        .into_owned()
}

fn unquoted(etag: &str) -> &str {
    etag.trim_matches('"')
}

fn time(time: &DateTime) -> Option<SystemTime> {
    SystemTime::try_from(*time).ok()
}
