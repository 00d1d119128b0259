//! Multipart uploads, and what is made by them.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, ObjectCannedAcl,
    ServerSideEncryption, StorageClass,
};
use futures_util::{StreamExt, TryStreamExt, stream};

use super::doubt::is_doubtful;
use super::errors::translate;
use super::wire::{copy_source, decode_crc, encode_crc, headers};
use super::{S3Store, content_type, with_upload_arguments};
use crate::store::metrics::Request;
use crate::store::{
    Condition, ETag, ObjectMeta, PartReceipt, Payload, StoreError, StoreResult, Stored,
};

/// Part copies of one large object under way at once, and their size, bytes.
const COPIES: usize = 16;
const COPY_PART: u64 = 512 << 20;
/// Stores tell times in whole seconds, by clocks of their own.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

impl S3Store {
    pub(super) async fn create_upload(&self, key: &str) -> StoreResult<String> {
        self.metrics.count(Request::CreateMultipart);
        let operation = self
            .client
            .sdk
            .create_multipart_upload()
            .bucket(&*self.bucket)
            .key(key)
            .content_type(content_type(key))
            .set_checksum_algorithm(self.client.checksums().then_some(ChecksumAlgorithm::Crc32C))
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer());
        let operation = with_upload_arguments!(operation, self.client.settings.upload);
        let answer = operation
            .send()
            .await
            .map_err(|error| translate(self.object(key), error))?;
        answer.upload_id.ok_or_else(|| StoreError::Other {
            object: self.object(key),
            detail: "the store told no upload id".to_owned(),
        })
    }

    pub(super) async fn send_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt> {
        self.metrics.count(Request::UploadPart);
        self.metrics.sent(payload.bytes.len() as u64);
        self.send_checked(|checksum| {
            Box::pin(self.try_send_part(key, upload_id, number, &payload, checksum))
        })
        .await
    }

    async fn try_send_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: &Payload,
        with_checksum: bool,
    ) -> StoreResult<PartReceipt> {
        let checksum = with_checksum.then(|| encode_crc(payload.crc32c));
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

    pub(super) async fn copy_one_part(
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
            .copy_source(copy_source(&self.bucket, source))
            .copy_source_range(format!("bytes={}-{}", range.start, range.end - 1))
            .set_copy_source_if_match(version.map(|etag| etag.as_str().to_owned()))
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
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

    pub(super) async fn complete_upload(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored> {
        self.metrics.count(Request::CompleteMultipart);
        let since = SystemTime::now() - CLOCK_SLACK;
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
            .set_request_payer(self.payer())
            .send()
            .await;
        let size = parts.iter().map(|part| part.size).sum();
        match sent {
            Ok(answer) => self.verify(key, size, answer.e_tag()).await,
            Err(error) => {
                let doubtful = is_doubtful(&error);
                let error = translate(self.object(key), error).under(&condition);
                if doubtful && self.completed_anyway(key, upload_id, parts, since).await {
                    tracing::info!(object = self.object(key), %error,
                        "the completion was answered with an error, but has taken place");
                    return self.verify(key, size, None).await;
                }
                Err(error)
            }
        }
    }

    pub(super) async fn abort_upload(&self, key: &str, upload_id: &str) -> StoreResult<()> {
        self.metrics.count(Request::AbortMultipart);
        let sent = self
            .client
            .sdk
            .abort_multipart_upload()
            .bucket(&*self.bucket)
            .key(key)
            .upload_id(upload_id)
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .send()
            .await;
        match sent.map_err(|error| translate(self.object(key), error)) {
            Ok(_) | Err(StoreError::UploadGone { .. } | StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn list_held_parts(
        &self,
        key: &str,
        upload_id: &str,
    ) -> StoreResult<Vec<PartReceipt>> {
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
                .set_request_payer(self.payer())
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

    /// Copies an object that is too large for one request.
    pub(super) async fn copy_large(
        &self,
        source: &ObjectMeta,
        target: &str,
    ) -> StoreResult<Stored> {
        let upload = self.create_upload(target).await?;
        let parts = source.size.div_ceil(COPY_PART) as u32;
        let copied: StoreResult<Vec<PartReceipt>> = stream::iter(0..parts)
            .map(|index| {
                let start = u64::from(index) * COPY_PART;
                let range = start..(start + COPY_PART).min(source.size);
                let etag = source.etag.as_ref();
                self.copy_one_part(target, &upload, index + 1, &source.key, range, etag)
            })
            .buffered(COPIES)
            .try_collect()
            .await;
        let finished = match copied {
            Ok(parts) => {
                self.complete_upload(target, &upload, &parts, Condition::Always)
                    .await
            }
            Err(error) => Err(error),
        };
        if finished.is_err()
            && let Err(error) = self.abort_upload(target, &upload).await
        {
            tracing::warn!(%error, "the upload of a copy that failed could not be aborted");
        }
        finished
    }
}
