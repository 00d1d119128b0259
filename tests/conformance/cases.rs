//! The cases, each in a place of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use mlfs::store::{
    Condition, ETag, Location, LongBody, ObjectMeta, PageStart, PartReceipt, Payload, Store,
    StoreError, StoreResult, checksum::crc32c,
};

/// S3 takes no smaller part but the last.
const PART: usize = 5 << 20;

fn payload(bytes: impl Into<Bytes>) -> Payload {
    let bytes = bytes.into();
    let crc32c = crc32c(&bytes);
    Payload { bytes, crc32c }
}

fn noise(size: usize, seed: usize) -> Vec<u8> {
    let mut state = seed as u64 * 2 + 1;
    let next = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u8
    });
    next.take(size).collect()
}

/// A store, and a place in it that holds nothing.
pub struct Place {
    pub location: Location,
    /// Where objects are put that the store itself cannot be given: Google's emulator.
    pub by: Option<String>,
}

impl Place {
    /// Parts are blocks there: they belong to a name, not to an upload, and have no number.
    fn is_azure(&self) -> bool {
        self.store().name().starts_with("wasbs:")
    }

    /// It looks at neither ETags nor conditions when an upload is completed, and takes a backslash for a
    /// slash.
    fn is_seaweedfs(&self) -> bool {
        let name = self.store().name();
        let behind = std::env::var("MLFLOW_PROXY_S3");
        name == "s3://mlflow" || behind.is_ok_and(|server| name.starts_with(&server))
    }

    /// Waits until it is known that parts can be sent there.
    pub async fn learns_to_take_parts(&self) {
        self.names("", None).await;
        for _ in 0..1000 {
            if self.store().capabilities().multipart {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{} takes no parts", self.store().name());
    }

    fn store(&self) -> &Arc<dyn Store> {
        &self.location.store
    }

    fn key(&self, name: &str) -> String {
        self.location.key(name)
    }

    /// The version that is there now, where the store has versions.
    async fn put_some(&self, name: &str, bytes: &[u8]) -> Option<ETag> {
        let (key, payload) = (self.key(name), payload(bytes.to_vec()));
        if let Some(by) = &self.by {
            let asked = reqwest::Client::new().post(by);
            let asked = asked.query(&[("uploadType", "media"), ("name", &key)]);
            let answer = asked.body(bytes.to_vec()).send().await.unwrap();
            answer.error_for_status().unwrap();
            return self.store().head(&key).await.unwrap().etag;
        }
        let stored = self.store().put(&key, payload, Condition::Always).await;
        let stored = stored.unwrap();
        assert_eq!(stored.size, bytes.len() as u64);
        stored.etag
    }

    pub async fn put(&self, name: &str, bytes: &[u8]) -> ETag {
        self.put_some(name, bytes).await.unwrap()
    }

    async fn read(&self, name: &str, from: u64, to: u64) -> StoreResult<Vec<u8>> {
        self.read_version(name, from, to, None).await
    }

    async fn read_version(
        &self,
        name: &str,
        from: u64,
        to: u64,
        version: Option<&ETag>,
    ) -> StoreResult<Vec<u8>> {
        let body = self.store().get(&self.key(name), from..to, version).await?;
        let range = body.range.clone();
        let frames: Vec<Bytes> = body.frames.try_collect().await?;
        let bytes = frames.concat();
        assert_eq!(bytes.len() as u64, range.end - range.start);
        Ok(bytes)
    }

    async fn begin(&self, name: &str) -> String {
        let key = self.key(name);
        self.store().create_multipart(&key).await.unwrap()
    }

    async fn part(&self, name: &str, upload: &str, number: u32, bytes: &[u8]) -> PartReceipt {
        let (key, payload) = (self.key(name), payload(bytes.to_vec()));
        let sent = self.store().upload_part(&key, upload, number, payload);
        let receipt = sent.await.unwrap();
        assert_eq!((receipt.number, receipt.size), (number, bytes.len() as u64));
        receipt
    }

    /// Names of one level, directories with a slash, page by page.
    async fn names(&self, below: &str, maximum: Option<u32>) -> Vec<String> {
        let prefix = format!("{}/", self.key(below).trim_end_matches('/'));
        let mut names = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let start = token.as_deref().map_or(PageStart::First, PageStart::Token);
            let page = self.store().list(&prefix, true, start, maximum).await;
            let page = page.unwrap();
            let mut found: Vec<String> = page.objects.into_iter().map(|it| it.key).collect();
            found.extend(page.prefixes);
            assert!(found.len() <= maximum.unwrap_or(u32::MAX) as usize);
            found.sort();
            names.extend(
                found
                    .into_iter()
                    .map(|key| key.strip_prefix(&prefix).unwrap().to_owned())
                    .filter(|name| !name.is_empty()),
            );
            match page.next {
                Some(next) => token = Some(next),
                None => return names,
            }
        }
    }

    /// Keys of everything below, as object stores give them.
    async fn everything(&self, below: &str, maximum: u32) -> Vec<String> {
        let prefix = self.key(below);
        let mut names = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let start = token.as_deref().map_or(PageStart::First, PageStart::Token);
            let page = self.store().list(&prefix, false, start, Some(maximum));
            let page = page.await.unwrap();
            assert!(page.prefixes.is_empty());
            let keys = page.objects.into_iter().map(|it| it.key);
            names.extend(keys.filter(|key| !key.ends_with('/')));
            match page.next {
                Some(next) => token = Some(next),
                None => return names,
            }
        }
    }
}

pub async fn an_object_is_read_back_in_any_range(place: &Place) {
    let content = noise(3_000_000, 1);
    let etag = place.put_some("a/b/object", &content).await;
    let end = content.len() as u64;
    for (from, to) in [
        (0, 1),
        (0, end),
        (end - 1, end),
        (7, 2_000_009),
        (0, end + 9),
    ] {
        let expected = &content[from as usize..to.min(end) as usize];
        assert!(place.read("a/b/object", from, to).await.unwrap() == expected);
    }
    let behind = place.read("a/b/object", end, end + 1).await;
    assert!(behind.is_err());
    let meta = place.store().head(&place.key("a/b/object")).await.unwrap();
    assert_eq!((meta.size, meta.etag), (end, etag.clone()));
    assert_eq!(meta.modified.is_some(), etag.is_some());
    place.put_some("empty", b"").await;
    let empty = place.store().head(&place.key("empty")).await.unwrap();
    assert_eq!(empty.size, 0);
}

pub async fn a_pinned_read_sees_its_version_or_fails(place: &Place) {
    let old = place.put("object", b"old").await;
    let same = place.read_version("object", 0, 3, Some(&old)).await;
    assert_eq!(same.unwrap(), b"old");
    let new = place.put("object", b"new").await;
    assert_ne!(old, new);
    let failed = place.read_version("object", 0, 3, Some(&old)).await;
    assert!(
        matches!(failed, Err(StoreError::Changed { .. })),
        "{failed:?}"
    );
    assert_eq!(place.read("object", 0, 3).await.unwrap(), b"new");
}

pub async fn conditions_are_kept(place: &Place) {
    let write = |text: &'static str, condition| {
        let (store, key) = (Arc::clone(place.store()), place.key("object"));
        async move { store.put(&key, payload(text), condition).await }
    };
    let first = write("1", Condition::IfAbsent).await.unwrap().etag.unwrap();
    let conflict = |outcome: StoreResult<_>| {
        assert!(
            matches!(outcome, Err(StoreError::Conflict { .. })),
            "{outcome:?}"
        );
    };
    conflict(write("2", Condition::IfAbsent).await.map(drop));
    let second = write("22", Condition::IfMatch(first.clone())).await;
    let second = second.unwrap().etag.unwrap();
    conflict(write("3", Condition::IfMatch(first)).await.map(drop));
    assert_eq!(place.read("object", 0, 9).await.unwrap(), b"22");
    place.store().delete(&[place.key("object")]).await.unwrap();
    assert!(write("4", Condition::IfMatch(second)).await.is_err());
    assert!(place.read("object", 0, 1).await.is_err());
}

pub async fn parts_in_any_order_make_an_object_that_nobody_sees_before(place: &Place) {
    let before = place.put_some("d/object", b"before").await;
    let upload = place.begin("d/object").await;
    let parts = [noise(PART, 1), noise(PART, 2), noise(777, 3)];
    let mut receipts = vec![
        place.part("d/object", &upload, 3, &parts[2]).await,
        place.part("d/object", &upload, 2, &noise(PART, 9)).await,
        place.part("d/object", &upload, 1, &parts[0]).await,
    ];
    // Sent again under its number: the last one counts.
    let stale = std::mem::replace(
        &mut receipts[1],
        place.part("d/object", &upload, 2, &parts[1]).await,
    );
    receipts.sort_by_key(|receipt| receipt.number);
    let key = place.key("d/object");
    let marks = |receipts: &[PartReceipt]| -> Vec<(u32, u64, ETag)> {
        let marks = receipts.iter();
        marks
            .map(|it| (it.number, it.size, it.etag.clone()))
            .collect()
    };
    let tells_parts = place.store().capabilities().list_parts;
    if tells_parts {
        let held = place.store().list_parts(&key, &upload).await.unwrap();
        // Some list a part that was sent again twice.
        let held = marks(&held);
        assert!(marks(&receipts).iter().all(|part| held.contains(part)));
    }
    assert_eq!(place.names("d", None).await, ["object"]);
    assert_eq!(place.read("d/object", 0, 99).await.unwrap(), b"before");
    let mut wrong = receipts.clone();
    wrong[1] = stale;
    let complete = |parts: Vec<PartReceipt>, condition| {
        let (store, key, upload) = (Arc::clone(place.store()), key.clone(), upload.clone());
        async move {
            store
                .complete_multipart(&key, &upload, &parts, condition)
                .await
        }
    };
    // Where parts have no number, that is a part like the others.
    if !place.is_azure() && !place.is_seaweedfs() {
        let outcome = complete(wrong, Condition::Always).await;
        assert!(
            matches!(outcome, Err(StoreError::PartsDiffer { .. })),
            "{outcome:?}"
        );
    }
    if !place.is_seaweedfs() {
        let outcome = complete(receipts.clone(), Condition::IfAbsent).await;
        assert!(
            matches!(outcome, Err(StoreError::Conflict { .. })),
            "{outcome:?}"
        );
    }
    assert_eq!(place.read("d/object", 0, 99).await.unwrap(), b"before");
    // Where there are no versions there are no conditions on them.
    let condition = before.map_or(Condition::Always, Condition::IfMatch);
    let stored = complete(receipts, condition).await.unwrap();
    let whole = parts.concat();
    assert_eq!(stored.size, whole.len() as u64);
    let meta = place.store().head(&key).await.unwrap();
    assert_eq!(meta.etag, stored.etag);
    assert!(place.read("d/object", 0, stored.size).await.unwrap() == whole);
    assert_eq!(place.names("d", None).await, ["object"]);
    if tells_parts {
        let gone = place.store().list_parts(&key, &upload).await;
        assert!(
            matches!(gone, Err(StoreError::UploadGone { .. })),
            "{gone:?}"
        );
    }
}

pub async fn an_upload_that_is_given_up_leaves_nothing(place: &Place) {
    let upload = place.begin("d/object").await;
    place.part("d/object", &upload, 1, &noise(PART, 1)).await;
    let key = place.key("d/object");
    place.store().abort_multipart(&key, &upload).await.unwrap();
    place.store().abort_multipart(&key, &upload).await.unwrap();
    if !place.is_azure() {
        let part = place.store().upload_part(&key, &upload, 2, payload("x"));
        let sent = part.await;
        assert!(
            matches!(sent, Err(StoreError::UploadGone { .. })),
            "{sent:?}"
        );
    }
    assert!(place.names("d", None).await.is_empty());
    assert!(place.store().find(&key).await.unwrap().is_none());
}

pub async fn parts_are_copied_inside_the_store(place: &Place) {
    let content = noise(2 * PART + 10, 4);
    let etag = place.put("source", &content).await;
    let source = place.key("source");
    let upload = place.begin("target").await;
    let copied = |number, range, version| {
        let (store, source, upload) = (Arc::clone(place.store()), source.clone(), upload.clone());
        let key = place.key("target");
        async move {
            let copy = store.copy_part(&key, &upload, number, &source, range, version);
            copy.await
        }
    };
    let part = PART as u64;
    let first = copied(1, 0..part, Some(&etag)).await.unwrap();
    let changed = noise(PART, 5);
    let second = place.part("target", &upload, 2, &changed).await;
    let third = copied(3, 2 * part..2 * part + 10, None).await.unwrap();
    let other = ETag::new("\"0123456789abcdef0123456789abcdef\"");
    assert!(copied(1, 0..part, Some(&other)).await.is_err());
    let key = place.key("target");
    let parts = [first, second, third];
    let stored = place
        .store()
        .complete_multipart(&key, &upload, &parts, Condition::Always);
    assert_eq!(stored.await.unwrap().size, content.len() as u64);
    let expected = [&content[..PART], &changed, &content[2 * PART..]].concat();
    assert!(place.read("target", 0, u64::MAX >> 1).await.unwrap() == expected);
}

pub async fn objects_are_copied_inside_the_store(place: &Place) {
    let content = noise(2 * PART + 10, 4);
    place.put("source", &content).await;
    let source = place.key("source");
    let meta = place.store().head(&source).await.unwrap();
    let copy = place.key("new/place");
    let stored = place.store().copy(&meta, &copy).await.unwrap();
    assert_eq!(stored.size, content.len() as u64);
    let other = ETag::new("\"0123456789abcdef0123456789abcdef\"");
    let meta = ObjectMeta {
        etag: Some(other),
        ..meta
    };
    assert!(place.store().copy(&meta, &copy).await.is_err());
    place.store().delete(&[source]).await.unwrap();
    let found = place.store().head(&copy).await.unwrap();
    assert_eq!(found.etag, stored.etag);
    assert!(place.read("new/place", 0, u64::MAX >> 1).await.unwrap() == content);
}

pub async fn listings_of_many_pages_are_whole_and_in_order(place: &Place) {
    let names: Vec<String> = (0..1201).map(|index| format!("f{index:04}")).collect();
    for chunk in names.chunks(50) {
        let puts = chunk.iter().map(|name| place.put_some(name, b"x"));
        futures_util::future::join_all(puts).await;
    }
    place.put_some("f0100.d/below/deep", b"x").await;
    place.put_some("z/last", b"x").await;
    let mut expected = names.clone();
    expected.extend(["f0100.d/".to_owned(), "z/".to_owned()]);
    expected.sort();
    assert_eq!(place.names("", None).await, expected);
    assert_eq!(place.names("", Some(100)).await, expected);
    let mut expected: Vec<String> = names.iter().map(|name| place.key(name)).collect();
    expected.extend([place.key("f0100.d/below/deep"), place.key("z/last")]);
    expected.sort();
    assert_eq!(place.everything("", 500).await, expected);
    // From a key on that need not exist, and of keys that begin so.
    let prefix = format!("{}/", place.key(""));
    let after = format!("{prefix}f1198~");
    let page = place
        .store()
        .list(&prefix, true, PageStart::After(&after), None);
    let page = page.await.unwrap();
    assert_eq!(page.objects[0].key, place.key("f1199"));
    let begun = place.key("f0100");
    let page = place.store().list(&begun, true, PageStart::First, Some(10));
    let page = page.await.unwrap();
    assert_eq!(page.objects[0].key, place.key("f0100"));
    assert_eq!(page.prefixes, [place.key("f0100.d/")]);
}

/// A body in pieces, of which the third is not there the first time it is asked for.
#[derive(Debug)]
struct Pieces(Vec<Bytes>, AtomicBool);

impl LongBody for Pieces {
    fn size(&self) -> Option<u64> {
        Some(self.0.iter().map(|piece| piece.len() as u64).sum())
    }

    fn frames(&self) -> BoxStream<'static, StoreResult<Bytes>> {
        let mut pieces: Vec<StoreResult<Bytes>> = self.0.iter().cloned().map(Ok).collect();
        if !self.1.swap(true, Ordering::Relaxed) {
            pieces[2] = Err(StoreError::Full {
                object: "piece".to_owned(),
                detail: "on purpose".to_owned(),
            });
        }
        futures_util::stream::iter(pieces).boxed()
    }
}

pub async fn a_long_body_is_an_object_or_nothing(place: &Place) {
    let pieces: Vec<Bytes> = (0..5).map(|seed| noise(PART, seed).into()).collect();
    let content = pieces.concat();
    let body = Arc::new(Pieces(pieces, AtomicBool::new(false)));
    let key = place.key("d/long");
    let put = async || {
        let store = place.store();
        store
            .put_long(&key, body.clone(), Condition::IfAbsent)
            .await
    };
    // What is wrong with the body is told as it is.
    assert!(matches!(put().await, Err(StoreError::Full { .. })));
    assert!(place.names("d", None).await.is_empty());
    assert_eq!(put().await.unwrap().size, content.len() as u64);
    assert!(matches!(put().await, Err(StoreError::Conflict { .. })));
    assert!(place.read("d/long", 0, u64::MAX >> 1).await.unwrap() == content);
    let meta = place.store().head(&key).await.unwrap();
    let copy = place.key("new/place");
    place.store().copy(&meta, &copy).await.unwrap();
    place
        .store()
        .delete(std::slice::from_ref(&key))
        .await
        .unwrap();
    assert!(place.store().find(&key).await.unwrap().is_none());
    assert!(place.read("new/place", 0, u64::MAX >> 1).await.unwrap() == content);
}

pub async fn odd_names_are_names(place: &Place) {
    let mut names = vec![
        "with space",
        "percent%41",
        "plus+&=?#",
        "ünïcödé ✓",
        "quote'\"<>",
        "back\\slash",
        "new\nline",
        ".hidden",
        "~",
        "a:b",
        "x".repeat(200).leak(),
    ];
    names.retain(|name| place.store().accepts(&place.key(name)).is_ok());
    names.retain(|name| !(place.is_seaweedfs() && name.contains('\\')));
    for name in &names {
        place.put(&format!("odd/{name}"), name.as_bytes()).await;
    }
    names.sort_unstable();
    assert_eq!(place.names("odd", None).await, names);
    for name in names {
        let read = place.read(&format!("odd/{name}"), 0, 999).await.unwrap();
        assert_eq!(read, name.as_bytes());
    }
}

pub async fn what_is_not_there_is_told_and_deleted_in_peace(place: &Place) {
    let key = place.key("no/such");
    let missing = place.read("no/such", 0, 1).await.unwrap_err();
    assert!(matches!(missing, StoreError::NotFound { .. }));
    assert_eq!(missing.errno(), libc::ENOENT);
    assert!(place.store().find(&key).await.unwrap().is_none());
    let id = "0123456789abcdef0123456789abcdef";
    // A store that keeps no list of them says so.
    assert!(place.store().list_parts(&key, id).await.is_err());
    place.store().delete(&[key]).await.unwrap();
    assert!(place.names("no", None).await.is_empty());
}
