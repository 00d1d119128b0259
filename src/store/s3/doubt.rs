//! Whether what was answered with an error has taken place all the same.
//!
//! An answer can be lost after the store has done what it was asked. The SDK then asks again, and
//! what is done already is refused: the upload is gone, or the condition is broken, by ourselves.

use std::time::SystemTime;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use futures_util::TryStreamExt;

use super::S3Store;
use super::wire::unquoted;
use crate::store::checksum::composite;
use crate::store::{ETag, PartReceipt, Payload, Store, StoreError, StoreResult, Stored};

/// Whether a completion may have taken effect although it was answered with this error.
pub(super) fn is_doubtful<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    match error {
        SdkError::ServiceError(service) => {
            let gone = service.err().code() == Some("NoSuchUpload");
            let status = service.raw().status();
            status.is_server_error() || matches!(status.as_u16(), 409 | 412) || gone
        }
        SdkError::ConstructionFailure(_) => false,
        _ => true,
    }
}

impl S3Store {
    /// The object, if it has just these bytes. It is read back: ETags and checksums tell something
    /// else in one store or another, and a condition is seldom broken.
    pub(super) async fn put_anyway(&self, key: &str, payload: &Payload) -> Option<Stored> {
        let meta = self.head_object(key).await.ok()?;
        if meta.size != payload.bytes.len() as u64 {
            return None;
        }
        let same = meta.size == 0
            || self
                .has_bytes(key, meta.etag.as_ref(), payload)
                .await
                .ok()?;
        same.then_some(Stored {
            etag: meta.etag,
            size: meta.size,
            modified: meta.modified,
        })
    }

    async fn has_bytes(
        &self,
        key: &str,
        version: Option<&ETag>,
        payload: &Payload,
    ) -> StoreResult<bool> {
        let mut rest = payload.bytes.clone();
        let mut body = self.get(key, 0..rest.len() as u64, version).await?;
        while let Some(frame) = body.frames.try_next().await? {
            if !rest.starts_with(&frame) {
                return Ok(false);
            }
            rest = rest.split_off(frame.len());
        }
        Ok(rest.is_empty())
    }

    /// Whether a completion that failed has taken place all the same. The upload must be gone
    /// (nobody else ends it), and the object must be one of these parts: by its ETag, where the
    /// store makes it of theirs as S3 does, else by its size, its number of parts and its age.
    pub(super) async fn completed_anyway(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        since: SystemTime,
    ) -> bool {
        let gone = self.list_held_parts(key, upload_id).await;
        if !matches!(gone, Err(StoreError::UploadGone { .. })) {
            return false;
        }
        let Ok(meta) = self.head_object(key).await else {
            return false;
        };
        let size: u64 = parts.iter().map(|part| part.size).sum();
        if meta.size != size {
            return false;
        }
        let etag = meta
            .etag
            .as_ref()
            .map_or("", |etag| unquoted(etag.as_str()));
        if composite(parts).is_some_and(|composite| composite == etag) {
            return true;
        }
        let recent = meta.modified.is_some_and(|modified| modified >= since);
        recent && etag.ends_with(&format!("-{}", parts.len()))
    }
}
