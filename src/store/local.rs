//! Directories of this machine as a store: plain paths and `file://` URIs.
//!
//! One store for all of them; a key is an absolute path without its first slash. What is written
//! takes its name by a rename, synchronised before, so nobody sees half a file, whatever he reads it
//! with. A directory counts as a key that ends in a slash, as object stores' consoles make them. What
//! is under way hides behind MLflow's own mark for such files.
//!
//! A version is inode, size and time of change of content: it outlasts a rename, so renaming moves
//! no bytes. Conditions hold against other writers of this process; another program can come between
//! the look and the rename.

mod files;
mod listing;
mod multipart;
mod uri;

use std::cmp::Reverse;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use parking_lot::Mutex;

pub use self::uri::LocalUri;

use self::files::{Staged, explain, meta, object, path_of, version};
use super::metrics::{Request, StoreMetrics};
use super::{
    Capabilities, Condition, ETag, ListPage, ObjectMeta, PageStart, PartReceipt, Payload,
    RangeBody, Store, StoreError, StoreResult, Stored,
};
use crate::mount_table::{self, Place};

/// Bytes read at once.
const FRAME: u64 = 1 << 20;
/// As on S3, so that recovery and planning need know nothing of stores.
const MOST_PARTS: u32 = 10_000;

/// The files of this machine.
#[derive(Clone, Debug)]
pub struct LocalStore {
    metrics: Arc<StoreMetrics>,
    identity: Arc<str>,
    /// Held from the look at what a name stands for until something else takes it.
    names: Arc<Mutex<()>>,
}

impl LocalStore {
    pub fn new(metrics: Arc<StoreMetrics>) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            metrics,
            identity: format!("file://{}", host.trim()).into(),
            names: Arc::default(),
        }
    }

    /// Counts a request and answers it in a thread that may wait for a disk.
    async fn ask<T: Send + 'static>(
        &self,
        request: Request,
        work: impl FnOnce(&Self) -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        self.metrics.count(request);
        let this = self.clone();
        in_thread(move || work(&this)).await
    }
}

/// The key of a directory that artifacts may lie in.
///
/// # Errors
/// `Unsupported` where that is inside a mount of mlfs; `InvalidName` where it is no text.
pub(super) async fn check(path: PathBuf) -> StoreResult<String> {
    in_thread(move || {
        let whole = std::path::absolute(&path).map_err(explain(&path.to_string_lossy()))?;
        let key: PathBuf = whole.components().skip(1).collect();
        let key = key.into_os_string().into_string();
        let key = key.map_err(|key| StoreError::InvalidName {
            object: object(&key.to_string_lossy()),
            detail: "only UTF-8 names can be artifact paths".to_owned(),
        })?;
        match mount_table::locate(&whole) {
            Ok(Place::Mount(mountpoint) | Place::Inside(mountpoint, _)) => {
                Err(StoreError::Unsupported {
                    object: object(&key),
                    detail: format!(
                        "it lies inside the mount of mlfs on {}, which would have to ask itself for \
                         it; give MLflow another artifact root",
                        mountpoint.display()
                    ),
                })
            }
            // What is not there yet is in no mount. What else is wrong is told when it is used.
            Ok(Place::Foreign(..) | Place::Free(_)) | Err(_) => Ok(key),
        }
    })
    .await
}

async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> StoreResult<T> + Send + 'static,
) -> StoreResult<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        Err(StoreError::Other {
            object: object(""),
            detail: error.to_string(),
        })
    })
}

/// Opens a version of a file, and tells how large it is.
fn open(key: &str, pinned: Option<&ETag>) -> StoreResult<(File, ObjectMeta)> {
    // A pipe that somebody put there meanwhile would be waited for.
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path_of(key)).map_err(explain(key))?;
    let metadata = file.metadata().map_err(explain(key))?;
    if !metadata.is_file() {
        return Err(StoreError::NotFound {
            object: object(key),
        });
    }
    let meta = meta(key.to_owned(), &metadata);
    if pinned.is_some() && meta.etag.as_ref() != pinned {
        return Err(StoreError::Changed {
            object: object(key),
        });
    }
    Ok((file, meta))
}

/// Bytes of an open file, if it still is that version after they were read.
fn read(key: &str, file: &File, range: &Range<u64>, pinned: Option<&ETag>) -> StoreResult<Bytes> {
    let changed = || StoreError::Changed {
        object: object(key),
    };
    let mut bytes = vec![0; (range.end - range.start) as usize];
    match file.read_exact_at(&mut bytes, range.start) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Err(changed()),
        outcome => outcome.map_err(explain(key))?,
    }
    let metadata = file.metadata().map_err(explain(key))?;
    if Some(&version(&metadata)) == pinned {
        Ok(Bytes::from(bytes))
    } else {
        Err(changed())
    }
}

#[async_trait]
impl Store for LocalStore {
    fn name(&self) -> &str {
        "file://"
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
            minimum_part_size: 1,
            maximum_parts: MOST_PARTS,
            maximum_put_size: i64::MAX as u64,
            read_only: false,
            scales: false,
            local: true,
        }
    }

    async fn list(
        &self,
        prefix: &str,
        delimited: bool,
        start: PageStart<'_>,
        maximum: Option<u32>,
    ) -> StoreResult<ListPage> {
        let prefix = prefix.to_owned();
        let start = listing::Start::new(start);
        self.ask(Request::List, move |_| {
            listing::page(&prefix, delimited, &start, maximum)
        })
        .await
    }

    async fn head(&self, key: &str) -> StoreResult<ObjectMeta> {
        let key = key.to_owned();
        self.ask(Request::Head, move |_| files::head(&key)).await
    }

    async fn get(
        &self,
        key: &str,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<RangeBody> {
        let (name, pinned) = (key.to_owned(), version.cloned());
        let (file, meta) = self
            .ask(Request::Get, move |_| open(&name, pinned.as_ref()))
            .await?;
        if range.start >= meta.size {
            return Err(StoreError::Other {
                object: object(key),
                detail: format!("there is nothing at {}: it has {}", range.start, meta.size),
            });
        }
        let range = range.start..range.end.min(meta.size);
        let (file, metrics) = (Arc::new(file), Arc::clone(&self.metrics));
        let (key, etag, end) = (Arc::<str>::from(key), meta.etag.clone(), range.end);
        let frames = stream::try_unfold(range.start, move |at| {
            let (file, metrics) = (Arc::clone(&file), Arc::clone(&metrics));
            let (key, etag) = (Arc::clone(&key), etag.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let frame = at..end.min(at + FRAME);
                let next = frame.end;
                let bytes = in_thread(move || read(&key, &file, &frame, etag.as_ref())).await?;
                metrics.received(bytes.len() as u64);
                Ok(Some((bytes, next)))
            }
        });
        Ok(RangeBody {
            etag: meta.etag,
            object_size: meta.size,
            range,
            frames: Box::pin(frames),
        })
    }

    fn file_of(&self, key: &str, version: Option<&ETag>) -> Option<File> {
        open(key, version).ok().map(|(file, _)| file)
    }

    async fn put(&self, key: &str, payload: Payload, condition: Condition) -> StoreResult<Stored> {
        let key = key.to_owned();
        self.ask(Request::Put, move |this| {
            let staged = Staged::create(&key)?;
            staged.write(&payload.bytes)?;
            this.metrics.sent(payload.bytes.len() as u64);
            staged.publish(&condition, &this.names)
        })
        .await
    }

    async fn create_multipart(&self, key: &str) -> StoreResult<String> {
        let key = key.to_owned();
        self.ask(Request::CreateMultipart, move |_| multipart::create(&key))
            .await
    }

    async fn upload_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        payload: Payload,
    ) -> StoreResult<PartReceipt> {
        let (key, upload_id) = (key.to_owned(), upload_id.to_owned());
        self.ask(Request::UploadPart, move |this| {
            let upload = multipart::Upload::open(&key, &upload_id)?;
            let receipt = upload.store(number, &payload, &this.names)?;
            this.metrics.sent(receipt.size);
            Ok(receipt)
        })
        .await
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
        let (key, upload_id) = (key.to_owned(), upload_id.to_owned());
        let (source, version) = (source.to_owned(), version.cloned());
        self.ask(Request::CopyPart, move |this| {
            let upload = multipart::Upload::open(&key, &upload_id)?;
            let (file, meta) = open(&source, version.as_ref())?;
            let bytes = read(&source, &file, &range, meta.etag.as_ref())?;
            let crc32c = super::checksum::crc32c(&bytes);
            upload.store(number, &Payload { bytes, crc32c }, &this.names)
        })
        .await
    }

    async fn complete_multipart(
        &self,
        key: &str,
        upload_id: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> StoreResult<Stored> {
        let (key, upload_id) = (key.to_owned(), upload_id.to_owned());
        let parts = parts.to_vec();
        self.ask(Request::CompleteMultipart, move |this| {
            let upload = multipart::Upload::open(&key, &upload_id)?;
            let stored = upload.complete(&parts, &condition, &this.names)?;
            // What is left is hidden, and in nobody's way.
            let _ = upload.remove();
            Ok(stored)
        })
        .await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> StoreResult<()> {
        let (key, upload_id) = (key.to_owned(), upload_id.to_owned());
        self.ask(
            Request::AbortMultipart,
            move |_| match multipart::Upload::open(&key, &upload_id) {
                Ok(upload) => upload.remove(),
                Err(StoreError::UploadGone { .. }) => Ok(()),
                Err(error) => Err(error),
            },
        )
        .await
    }

    async fn list_parts(&self, key: &str, upload_id: &str) -> StoreResult<Vec<PartReceipt>> {
        let (key, upload_id) = (key.to_owned(), upload_id.to_owned());
        self.ask(Request::ListParts, move |_| {
            multipart::Upload::open(&key, &upload_id)?.parts()
        })
        .await
    }

    async fn copy(&self, source: &ObjectMeta, target: &str) -> StoreResult<Stored> {
        let (source, target) = (source.clone(), target.to_owned());
        self.ask(Request::Copy, move |this| {
            files::copy(&source, &target, &this.names)
        })
        .await
    }

    async fn delete(&self, keys: &[String]) -> StoreResult<()> {
        let mut keys = keys.to_vec();
        // Directories when nothing is in them any more: the innermost first, after all files.
        keys.sort_by_key(|key| (key.ends_with('/'), Reverse(key.len())));
        self.ask(Request::Delete, move |_| {
            keys.iter().try_for_each(|key| files::delete(key))
        })
        .await
    }
}
