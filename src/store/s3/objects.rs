//! Whole objects: listing, asking, writing, copying, deleting.

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{
    Delete, EncodingType, ObjectCannedAcl, ObjectIdentifier, ServerSideEncryption, StorageClass,
};

use std::time::SystemTime;

use super::errors::translate;
use super::wire::{copy_source, decode_key, encode_crc, headers, time};
use super::{S3Store, content_type, with_upload_arguments};
use crate::store::metrics::Request;
use crate::store::{
    Condition, ETag, ListPage, ObjectMeta, PageStart, Payload, StoreError, StoreResult, Stored,
};

/// Keys of one DeleteObjects request.
const DELETE_BATCH: usize = 1000;

impl S3Store {
    pub(super) async fn list_objects(
        &self,
        prefix: &str,
        delimited: bool,
        start: PageStart<'_>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage> {
        self.metrics.count(Request::List);
        let (token, after) = match start {
            PageStart::First => (None, None),
            PageStart::Token(token) => (Some(token), None),
            PageStart::After(key) => (None, Some(key)),
        };
        let answer = self
            .client
            .sdk
            .list_objects_v2()
            .bucket(&*self.bucket)
            .prefix(prefix)
            .set_delimiter(delimited.then(|| "/".to_owned()))
            .set_continuation_token(token.map(str::to_owned))
            .set_start_after(after.map(str::to_owned))
            .set_max_keys(maximum.map(|maximum| maximum as i32))
            // Keys may hold characters that XML cannot.
            .encoding_type(EncodingType::Url)
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .send()
            .await
            .map_err(|error| translate(self.object(prefix), error))?;
        let encoded = answer.encoding_type() == Some(&EncodingType::Url);
        let decode = |key: String| if encoded { decode_key(key) } else { key };
        let truncated = answer.is_truncated() == Some(true);
        let objects = answer.contents.unwrap_or_default().into_iter();
        let objects = objects.filter_map(|object| {
            Some(ObjectMeta {
                key: decode(object.key?),
                size: u64::try_from(object.size.unwrap_or(0)).unwrap_or(0),
                etag: object.e_tag.as_deref().map(ETag::quoted),
                modified: object.last_modified.as_ref().and_then(time),
            })
        });
        let prefixes = answer.common_prefixes.unwrap_or_default().into_iter();
        let prefixes = prefixes.filter_map(|it| it.prefix).map(decode);
        let next = answer.next_continuation_token.filter(|_| truncated);
        Ok(ListPage {
            objects: objects.collect(),
            prefixes: prefixes.collect(),
            next,
        })
    }

    pub(super) async fn head_object(&self, key: &str) -> StoreResult<ObjectMeta> {
        self.metrics.count(Request::Head);
        let answer = self
            .client
            .sdk
            .head_object()
            .bucket(&*self.bucket)
            .key(key)
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .send()
            .await
            .map_err(|error| translate(self.object(key), error))?;
        Ok(ObjectMeta {
            key: key.to_owned(),
            size: u64::try_from(answer.content_length().unwrap_or(0)).unwrap_or(0),
            etag: answer.e_tag().map(ETag::quoted),
            modified: answer.last_modified().and_then(time),
        })
    }

    pub(super) async fn put_object(
        &self,
        key: &str,
        payload: Payload,
        condition: Condition,
    ) -> StoreResult<Stored> {
        self.metrics.count(Request::Put);
        self.metrics.sent(payload.bytes.len() as u64);
        let sent = self
            .send_checked(|checksum| Box::pin(self.try_put(key, &payload, &condition, checksum)))
            .await;
        if let Err(StoreError::Conflict { object }) = &sent
            && let Some(stored) = self.put_anyway(key, &payload).await
        {
            tracing::info!(
                object,
                "the condition is broken by this very write, answered late"
            );
            return Ok(stored);
        }
        sent
    }

    async fn try_put(
        &self,
        key: &str,
        payload: &Payload,
        condition: &Condition,
        with_checksum: bool,
    ) -> StoreResult<Stored> {
        let (if_match, if_none_match) = headers(condition);
        let checksum = with_checksum.then(|| encode_crc(payload.crc32c));
        let operation = self
            .client
            .sdk
            .put_object()
            .bucket(&*self.bucket)
            .key(key)
            .body(ByteStream::from(payload.bytes.clone()))
            .content_type(content_type(key))
            .set_checksum_crc32_c(checksum)
            .set_if_match(if_match)
            .set_if_none_match(if_none_match)
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer());
        let operation = with_upload_arguments!(operation, self.client.settings.upload);
        let mut operation = operation.customize();
        if self.client.unsigned_payload {
            operation = operation.disable_payload_signing();
        }
        let answer = operation
            .send()
            .await
            .map_err(|error| translate(self.object(key), error).under(condition))?;
        let size = payload.bytes.len() as u64;
        if answer.checksum_crc32_c().is_some() {
            let etag = answer.e_tag().map(ETag::quoted);
            return Ok(Stored {
                etag,
                size,
                modified: Some(SystemTime::now()),
            });
        }
        self.verify(key, size, answer.e_tag()).await
    }

    pub(super) async fn copy_object(
        &self,
        source: &ObjectMeta,
        target: &str,
    ) -> StoreResult<Stored> {
        self.metrics.count(Request::Copy);
        let answer = self
            .client
            .sdk
            .copy_object()
            .bucket(&*self.bucket)
            .key(target)
            .copy_source(copy_source(&self.bucket, &source.key))
            .set_copy_source_if_match(source.etag.as_ref().map(|etag| etag.as_str().to_owned()))
            .set_expected_bucket_owner(self.owner())
            .set_request_payer(self.payer())
            .send()
            .await
            .map_err(|error| translate(self.object(&source.key), error))?;
        let result = answer.copy_object_result();
        let Some(etag) = result.and_then(|result| result.e_tag()) else {
            // An answer that tells nothing promises nothing.
            return self.verify(target, source.size, None).await;
        };
        Ok(Stored {
            etag: Some(ETag::quoted(etag)),
            size: source.size,
            modified: result
                .and_then(|result| result.last_modified())
                .and_then(time),
        })
    }

    pub(super) async fn delete_objects(&self, keys: &[String]) -> StoreResult<()> {
        if let [key] = keys {
            self.metrics.count(Request::Delete);
            let sent = self
                .client
                .sdk
                .delete_object()
                .bucket(&*self.bucket)
                .key(key)
                .set_expected_bucket_owner(self.owner())
                .set_request_payer(self.payer())
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
            .set_request_payer(self.payer())
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
