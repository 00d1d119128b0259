//! Azure Blob Storage and Google Cloud Storage, through the `object_store` crate.
//!
//! Neither copies parts or tells which parts it holds by way of that crate, and an upload in parts is
//! completed without conditions there: they are looked at right before. Everything else is as with
//! S3.

mod azure;
mod body;
mod clouds;
mod errors;
mod google;
mod transport;
mod upload;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{CopyOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt};

use super::metrics::{Request, StoreMetrics};
use super::{
    Capabilities, Condition, ETag, ListPage, ObjectMeta, PageStart, PartReceipt, Payload,
    RangeBody, Store, StoreError, StoreResult, Stored,
};
use body::Body;
use errors::translate;

pub use azure::AzureSettings;
pub(super) use clouds::Clouds;
pub use google::GoogleSettings;

/// Neither needs parts as large as this; smaller ones are not worth a request.
const MINIMUM_PART: u64 = 5 << 20;
/// Google's limit; Azure takes 50 000.
const MAXIMUM_PARTS: u32 = 10_000;
/// Azure's limit for a block, nearly; Google takes 5 GiB.
const MAXIMUM_PUT: u64 = 4000 << 20;
/// Characters of the longest name; Google counts bytes.
const LONGEST_KEY: usize = 1024;
/// Longest wait for an answer, and for the next bytes of one, where nobody says.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests at once where one call needs many.
const SIDE_BY_SIDE: usize = 16;
/// Longest that a copy inside the store may go on after it was answered.
const LONGEST_COPY: Duration = Duration::from_secs(600);
const COPY_PAUSE: Duration = Duration::from_secs(1);

/// What `object_store` offers of both.
trait Backend: ObjectStore + MultipartStore + PaginatedListStore {}

impl<T: ObjectStore + MultipartStore + PaginatedListStore> Backend for T {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Azure,
    Google,
}

/// One container of Azure's, or one bucket of Google's.
#[derive(Debug)]
pub struct CloudStore {
    backend: Arc<dyn Backend>,
    kind: Kind,
    name: String,
    identity: String,
    metrics: Arc<StoreMetrics>,
}

impl CloudStore {
    fn object(&self, key: &str) -> String {
        format!("{}/{key}", self.name)
    }

    fn path(&self, key: &str) -> StoreResult<Path> {
        let invalid = |detail: String| StoreError::InvalidName {
            object: self.object(key),
            detail,
        };
        let path = Path::parse(key).map_err(|error| invalid(error.to_string()))?;
        if path.as_ref() != key {
            return Err(invalid("a name begins or ends with a slash".to_owned()));
        }
        if key.chars().count() > LONGEST_KEY || self.kind == Kind::Google && key.len() > LONGEST_KEY
        {
            return Err(invalid(format!("longer than {LONGEST_KEY}")));
        }
        if self.kind == Kind::Azure && key.contains('\\') {
            return Err(invalid("Azure takes a backslash for a slash".to_owned()));
        }
        Ok(path)
    }

    /// What an error means for the object.
    fn failed(&self, key: &str) -> impl Fn(object_store::Error) -> StoreError + use<> {
        let object = self.object(key);
        move |error| translate(object.clone(), error)
    }

    /// What is there, as `object_store` tells it.
    async fn ask(&self, key: &str) -> StoreResult<object_store::ObjectMeta> {
        self.metrics.count(Request::Head);
        let path = self.path(key)?;
        self.backend.head(&path).await.map_err(self.failed(key))
    }

    /// Waits until a copy is there: Azure may answer before.
    async fn await_copy(&self, key: &str, size: u64) -> StoreResult<Stored> {
        let patience = tokio::time::Instant::now() + LONGEST_COPY;
        loop {
            let meta = self.head(key).await?;
            let readable = match size {
                0 => Ok(()),
                size => {
                    let last = self.get(key, size - 1..size, meta.etag.as_ref()).await;
                    match last {
                        Ok(body) => body.frames.try_collect::<Vec<_>>().await.map(drop),
                        Err(error) => Err(error),
                    }
                }
            };
            match readable {
                Ok(()) if meta.size == size => {
                    return Ok(Stored {
                        etag: meta.etag,
                        size,
                        modified: meta.modified,
                    });
                }
                Ok(()) => {
                    return Err(StoreError::Corrupt {
                        object: self.object(key),
                        detail: format!("{} bytes copied of {size}", meta.size),
                    });
                }
                Err(error) if tokio::time::Instant::now() > patience => return Err(error),
                Err(_) => tokio::time::sleep(COPY_PAUSE).await,
            }
        }
    }
}

fn described(meta: object_store::ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        key: meta.location.into(),
        size: meta.size,
        etag: meta.e_tag.as_deref().map(ETag::quoted),
        modified: Some(SystemTime::from(meta.last_modified)),
    }
}

#[async_trait]
impl Store for CloudStore {
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
            copy_part: false,
            list_parts: false,
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

    fn accepts(&self, key: &str) -> StoreResult<()> {
        self.path(key).map(drop)
    }

    async fn list(
        &self,
        prefix: &str,
        delimited: bool,
        start: PageStart<'_>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage> {
        self.metrics.count(Request::List);
        let (token, after) = match start {
            PageStart::First => (None, None),
            PageStart::Token(token) => (Some(token.to_owned()), None),
            PageStart::After(key) => (None, Some(key.to_owned())),
        };
        let options = PaginatedListOptions {
            offset: after.clone(),
            delimiter: delimited.then(|| "/".into()),
            max_keys: maximum.map(|maximum| maximum as usize),
            page_token: token,
            ..PaginatedListOptions::default()
        };
        let below = (!prefix.is_empty()).then_some(prefix);
        let page = self.backend.list_paginated(below, options);
        // `object_store` leaves it out of Azure's listings.
        let is_key = !prefix.is_empty() && !prefix.ends_with('/');
        let itself = async {
            match self.kind == Kind::Azure && is_key && start == PageStart::First {
                true => self.find(prefix).await,
                false => Ok(None),
            }
        };
        let (page, itself) = tokio::join!(page, itself);
        let page = page.map_err(self.failed(prefix))?;
        // What marks a directory loses its slash on the way, and is none of the names in it. Not
        // every server knows where to begin.
        let is_meant =
            |key: &str| key.starts_with(prefix) && after.as_deref().is_none_or(|after| key > after);
        let objects = page.result.objects.into_iter().map(described);
        let mut objects: Vec<ObjectMeta> = objects.filter(|it| is_meant(&it.key)).collect();
        objects.extend(itself?);
        objects.sort_by(|one, other| one.key.cmp(&other.key));
        let prefixes = page.result.common_prefixes.into_iter();
        let prefixes = prefixes.map(|path| format!("{path}/"));
        let mut prefixes: Vec<String> = prefixes.filter(|it| is_meant(it)).collect();
        prefixes.sort();
        Ok(ListPage {
            objects,
            prefixes,
            next: page.page_token,
        })
    }

    async fn head(&self, key: &str) -> StoreResult<ObjectMeta> {
        self.ask(key).await.map(described)
    }

    async fn get(
        &self,
        key: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<RangeBody> {
        self.metrics.count(Request::Get);
        let options = GetOptions {
            if_match: version.map(|etag| etag.as_str().to_owned()),
            range: Some(GetRange::Bounded(range.clone())),
            ..GetOptions::default()
        };
        let path = self.path(key)?;
        let answer = self.backend.get_opts(&path, options).await;
        let answer = answer.map_err(self.failed(key))?;
        let found = answer.meta.e_tag.as_deref().map(ETag::quoted);
        if version.is_some() && found.is_some() && version != found.as_ref() {
            return Err(StoreError::Changed {
                object: self.object(key),
            });
        }
        let object_size = answer.meta.size;
        let wanted = range.start..range.end.min(object_size);
        if answer.range != wanted {
            return Err(StoreError::Corrupt {
                object: self.object(key),
                detail: "the answer carries another range than was asked for".to_owned(),
            });
        }
        let body = Body {
            rest: wanted.end - wanted.start,
            frames: answer.into_stream(),
            object: self.object(key),
            metrics: Arc::clone(&self.metrics),
        };
        Ok(RangeBody {
            etag: found,
            object_size,
            range: wanted,
            frames: body.frames(),
        })
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
        _upload_id: &str,
        _number: u32,
        _source: &str,
        _range: Range<u64>,
        _version: Option<&ETag>,
    ) -> StoreResult<PartReceipt> {
        Err(self.cannot(key, "copy parts"))
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

    async fn list_parts(&self, key: &str, _upload_id: &str) -> StoreResult<Vec<PartReceipt>> {
        Err(self.cannot(key, "tell which parts it holds"))
    }

    async fn copy(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored> {
        let found = match self.head(&source.key).await {
            // What marks a directory lost its slash in the listing: there is nothing to copy.
            Err(StoreError::NotFound { .. }) if source.size == 0 => {
                return Ok(Stored {
                    etag: source.etag.clone(),
                    size: 0,
                    modified: source.modified,
                });
            }
            found => found?,
        };
        if source.etag.is_some() && found.etag != source.etag || found.size != source.size {
            return Err(StoreError::Changed {
                object: self.object(&source.key),
            });
        }
        self.metrics.count(Request::Copy);
        let (from, to) = (self.path(&source.key)?, self.path(target)?);
        let copied = self.backend.copy_opts(&from, &to, CopyOptions::default());
        copied.await.map_err(self.failed(&source.key))?;
        self.await_copy(target, source.size).await
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<()> {
        let deletions = keys.iter().cloned().map(|key| self.delete_one(key));
        let mut deletions = stream::iter(deletions).buffer_unordered(SIDE_BY_SIDE);
        while deletions.try_next().await?.is_some() {}
        Ok(())
    }
}

impl CloudStore {
    async fn delete_one(&self, key: String) -> StoreResult<()> {
        self.metrics.count(Request::Delete);
        let path = self.path(&key)?;
        match self.backend.delete(&path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(&key)(error)),
        }
    }

    fn cannot(&self, key: &str, what: &str) -> StoreError {
        StoreError::Unsupported {
            object: self.object(key),
            detail: format!("this store cannot {what}"),
        }
    }
}
