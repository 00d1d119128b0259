//! Objects written at once or in parts, under conditions.

use std::time::SystemTime;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::multipart::PartId;
use object_store::{
    Attribute, Attributes, PutMode, PutMultipartOptions, PutOptions, UpdateVersion,
};

use super::{CloudStore, Kind, described};
use crate::store::metrics::Request;
use crate::store::{
    Condition, ETag, ObjectMeta, PartReceipt, Payload, Store, StoreError, StoreResult, Stored,
};

impl CloudStore {
    pub(super) async fn put_object(
        &self,
        key: &str,
        payload: Payload,
        condition: Condition,
    ) -> StoreResult<Stored> {
        let path = self.path(key)?;
        let mode = self.mode(key, &condition).await?;
        self.metrics.count(Request::Put);
        self.metrics.sent(payload.bytes.len() as u64);
        let options = PutOptions {
            mode,
            attributes: attributes(key),
            ..PutOptions::default()
        };
        let sent = self
            .backend
            .put_opts(&path, payload.bytes.clone().into(), options);
        match sent.await.map_err(self.failed(key)) {
            Ok(stored) => Ok(Stored {
                etag: stored.e_tag.as_deref().map(ETag::quoted),
                size: payload.bytes.len() as u64,
                modified: Some(SystemTime::now()),
            }),
            Err(error) => match as_conflict(error, &condition) {
                StoreError::Conflict { object } => {
                    let found = self.put_anyway(key, &payload).await;
                    found.ok_or(StoreError::Conflict { object })
                }
                error => Err(error),
            },
        }
    }

    /// How `object_store` is told of a condition. Google compares generations, not ETags: each
    /// generation has an ETag of its own.
    async fn mode(&self, key: &str, condition: &Condition) -> StoreResult<PutMode> {
        let version = match condition {
            Condition::Always => return Ok(PutMode::Overwrite),
            Condition::IfAbsent => return Ok(PutMode::Create),
            Condition::IfMatch(etag) if self.kind == Kind::Azure => UpdateVersion {
                e_tag: Some(etag.as_str().to_owned()),
                version: None,
            },
            Condition::IfMatch(wanted) => {
                let found = self.ask(key).await;
                let found = found.map_err(|error| as_conflict(error, condition))?;
                if found.e_tag.as_deref().map(ETag::quoted).as_ref() != Some(wanted) {
                    return Err(StoreError::Conflict {
                        object: self.object(key),
                    });
                }
                UpdateVersion {
                    e_tag: found.e_tag,
                    version: found.version,
                }
            }
        };
        Ok(PutMode::Update(version))
    }

    /// What is there, if it is what was to be put: the condition is then broken by this very write,
    /// whose answer was lost.
    async fn put_anyway(&self, key: &str, payload: &Payload) -> Option<Stored> {
        let meta = self.head(key).await.ok()?;
        let size = payload.bytes.len() as u64;
        if meta.size != size {
            return None;
        }
        if size > 0 {
            let body = self.get(key, 0..size, meta.etag.as_ref()).await.ok()?;
            let frames: Vec<Bytes> = body.frames.try_collect().await.ok()?;
            if frames.concat() != payload.bytes {
                return None;
            }
        }
        tracing::info!(
            object = self.object(key),
            "the condition is broken by this very write, answered late"
        );
        Some(stored(meta))
    }

    pub(super) async fn create_upload(&self, key: &str) -> StoreResult<String> {
        self.metrics.count(Request::CreateMultipart);
        let path = self.path(key)?;
        if self.kind == Kind::Azure {
            // Blocks belong to a name, not to an upload; each has a number of its own.
            return Ok(format!("{:032x}", rand::random::<u128>()));
        }
        let options = PutMultipartOptions {
            attributes: attributes(key),
            ..PutMultipartOptions::default()
        };
        let created = self.backend.create_multipart_opts(&path, options);
        created.await.map_err(self.failed(key))
    }

    pub(super) async fn send_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt> {
        self.metrics.count(Request::UploadPart);
        let size = payload.bytes.len() as u64;
        self.metrics.sent(size);
        let path = self.path(key)?;
        let id = upload_id.to_owned();
        let index = number.saturating_sub(1) as usize;
        let sent = self
            .backend
            .put_part(&path, &id, index, payload.bytes.into());
        let part = sent.await.map_err(|error| self.of_upload(key, error))?;
        Ok(PartReceipt {
            number,
            size,
            etag: ETag::new(part.content_id),
            crc32c: None,
        })
    }

    pub(super) async fn complete_upload(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored> {
        let path = self.path(key)?;
        let before = self.find_version(key).await?;
        let is_kept = match &condition {
            Condition::Always => true,
            Condition::IfAbsent => before.is_none(),
            Condition::IfMatch(etag) => before.as_ref() == Some(etag),
        };
        if !is_kept {
            return Err(StoreError::Conflict {
                object: self.object(key),
            });
        }
        self.metrics.count(Request::CompleteMultipart);
        let size: u64 = parts.iter().map(|part| part.size).sum();
        let ids = parts.iter().map(|part| PartId {
            content_id: part.etag.as_str().to_owned(),
        });
        let id = upload_id.to_owned();
        let completed = self.backend.complete_multipart(&path, &id, ids.collect());
        match completed.await {
            Ok(made) => {
                let made = made.e_tag.as_deref().map(ETag::quoted);
                self.verify(key, size, made).await
            }
            // Sent twice, since the first answer was lost, it fails too: whether what is there is ours
            // cannot be told from its size.
            Err(error) => Err(self.of_upload(key, error)),
        }
    }

    pub(super) async fn abort_upload(&self, key: &str, upload_id: &str) -> StoreResult<()> {
        self.metrics.count(Request::AbortMultipart);
        let path = self.path(key)?;
        let id = upload_id.to_owned();
        match self.backend.abort_multipart(&path, &id).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(key)(error)),
        }
    }

    async fn head_of(&self, key: &str) -> StoreResult<Option<ObjectMeta>> {
        match self.ask(key).await {
            Ok(meta) => Ok(Some(described(meta))),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn find_version(&self, key: &str) -> StoreResult<Option<ETag>> {
        Ok(self.head_of(key).await?.and_then(|meta| meta.etag))
    }

    /// Size and version of an object just made, compared with what was answered.
    async fn verify(&self, key: &str, size: u64, made: Option<ETag>) -> StoreResult<Stored> {
        let meta = described(self.ask(key).await?);
        let object = self.object(key);
        if made.is_some() && meta.etag.is_some() && made != meta.etag {
            return Err(StoreError::Conflict { object });
        }
        if meta.size != size {
            let detail = format!("{} bytes stored of {size}", meta.size);
            return Err(StoreError::Corrupt { object, detail });
        }
        Ok(stored(meta))
    }

    /// What an error means for an upload: that nothing is there means that the upload is not.
    fn of_upload(&self, key: &str, error: object_store::Error) -> StoreError {
        match self.failed(key)(error) {
            StoreError::NotFound { object } => StoreError::UploadGone {
                object,
                detail: "the store knows it no longer".to_owned(),
            },
            error => error,
        }
    }
}

fn stored(meta: ObjectMeta) -> Stored {
    Stored {
        etag: meta.etag,
        size: meta.size,
        modified: meta.modified,
    }
}

/// The type that MLflow's own client would tell for a file of this name.
fn attributes(key: &str) -> Attributes {
    let kind = mime_guess::from_path(key).first_or_octet_stream();
    Attributes::from_iter([(Attribute::ContentType, kind.to_string())])
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
