//! What the store has of a former mount's file already.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use futures_util::TryStreamExt;

use super::geometry::Geometry;
use super::journal::Manifest;
use super::recovery::Leftover;
use crate::store::{ETag, ObjectMeta, Store, StoreError, checksum};

/// The store's clock may be behind ours by this much without an object passing for older.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

impl Leftover {
    /// Whether what stands there is this very file: its mount ended between the store's doing and
    /// its own noting. Told by reading the object, for there may be another of that size.
    ///
    /// # Errors
    /// The store's.
    pub async fn is_stored(
        &self,
        store: &Arc<dyn Store>,
        meta: &ObjectMeta,
    ) -> Result<bool, StoreError> {
        let Some(manifest) = &self.replayed.manifest else {
            return Ok(false);
        };
        if meta.size != manifest.size {
            return Ok(false);
        }
        if let Some(completing) = &self.replayed.completing {
            let told = meta.etag.as_ref().map(ETag::as_str);
            if same_etag(told, completing.etag.as_deref()) {
                return Ok(true);
            }
            if let Some(crc32c) = completing.crc32c {
                let all = 0..manifest.size;
                return Ok(self.stored_checksum(store, meta, all).await? == crc32c);
            }
        }
        self.has_content(store, meta, manifest).await
    }

    /// Whether an object has all the bytes of which the manifest knows the checksum, and no others.
    async fn has_content(
        &self,
        store: &Arc<dyn Store>,
        meta: &ObjectMeta,
        manifest: &Manifest,
    ) -> Result<bool, StoreError> {
        let geometry = Geometry::of(manifest.part_size, manifest.joint);
        let mut compared = 0;
        for record in &manifest.chunks {
            let start = geometry.range(record.index).start;
            let range = start + record.start..start + record.end;
            if range.is_empty() {
                continue;
            }
            compared += range.end - range.start;
            let crc32c = self.stored_checksum(store, meta, range).await?;
            if Some(crc32c) != record.crc32c {
                return Ok(false);
            }
        }
        // What came from the object underneath is not known here.
        Ok(compared == manifest.size)
    }

    /// CRC32C of what the store has in `range`.
    async fn stored_checksum(
        &self,
        store: &Arc<dyn Store>,
        meta: &ObjectMeta,
        range: Range<u64>,
    ) -> Result<u32, StoreError> {
        let mut crc = checksum::crc32c(&[]);
        if range.is_empty() {
            return Ok(crc);
        }
        let mut body = store
            .get(&meta.key, range, meta.etag.as_ref())
            .await?
            .frames;
        while let Some(frame) = body.try_next().await? {
            crc = checksum::crc32c_update(crc, &frame);
        }
        Ok(crc)
    }

    /// The object that the parts of an upload have become under a former name, if they have.
    pub(super) async fn spent(
        &self,
        store: &Arc<dyn Store>,
        manifest: &Manifest,
    ) -> Result<Option<ObjectMeta>, StoreError> {
        let Some(spent) = &self.replayed.spent else {
            return Ok(None);
        };
        let Some(meta) = store.find(&spent.key).await? else {
            return Ok(None);
        };
        let told = meta.etag.as_ref().map(ETag::as_str);
        let same = meta.size == spent.size
            && (same_etag(told, spent.etag.as_deref())
                || self.has_content(store, &meta, manifest).await?);
        Ok(same.then_some(meta))
    }

    /// Whether what stands there was put there after this file's writer had closed it.
    pub fn is_overtaken_by(&self, meta: &ObjectMeta) -> bool {
        let Some(closed) = self.closed_at() else {
            return false;
        };
        let closed = UNIX_EPOCH + Duration::from_millis(closed);
        meta.modified
            .is_some_and(|modified| modified > closed + CLOCK_SLACK)
    }

    /// Removes what the parts of an upload became under a former name.
    pub(super) async fn remove_spent(&self, store: &Arc<dyn Store>) -> Result<(), StoreError> {
        let spent = self.replayed.spent.as_ref();
        let Some(spent) = spent.filter(|it| it.key != self.key()) else {
            return Ok(());
        };
        remove_if_same(store, &spent.key, spent.etag.as_deref()).await
    }
}

/// Removes the object under `key`, unless it is not known to be the one that has `etag`.
pub(super) async fn remove_if_same(
    store: &Arc<dyn Store>,
    key: &str,
    etag: Option<&str>,
) -> Result<(), StoreError> {
    let standing = store.find(key).await?;
    let told = standing.and_then(|meta| meta.etag);
    if !same_etag(told.as_ref().map(ETag::as_str), etag) {
        return Ok(());
    }
    store.delete(&[key.to_owned()]).await
}

/// Whether both are known, and the same with or without quotes.
fn same_etag(one: Option<&str>, other: Option<&str>) -> bool {
    let plain = |etag: &str| etag.trim_matches('"').to_owned();
    one.is_some() && one.map(plain) == other.map(plain)
}
