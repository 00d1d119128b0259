//! Files of more parts than a store takes of one size: the part size grows on the way.
//!
//! Without a mount, whose smallest part makes 2 000 of them 10 GiB: the write room over the
//! in-memory server, with parts of 1 KiB that this server is told to accept.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mlfs::budget::Budget;
use mlfs::read::{ReadOptions, Reader, Source};
use mlfs::store::s3::S3Settings;
use mlfs::store::{Store, Stores};
use mlfs::write::{Draft, Spill, Target, WriteOptions, Writer};
use mlfs_lab::s3::{Kind, S3Server, ServerOptions};

const PART: u64 = 1 << 10;
/// Parts of one size, as ARCHITECTURE.md states.
const STEP: u64 = 2_000;
const BUCKET: &str = "bucket";
/// Far less than the file, so that parts in the store give up their local copies.
const MEMORY: u64 = 4 << 20;
const SPILL: u64 = 1 << 20;

struct Room {
    s3: S3Server,
    store: Arc<dyn Store>,
    reader: Arc<Reader>,
    writer: Arc<Writer>,
    _folder: tempfile::TempDir,
}

/// Runs `test` over a server of its own.
fn with_room<F: Future<Output = ()>>(test: impl FnOnce(Room) -> F) {
    let s3 = S3Server::start(ServerOptions {
        minimum_part_size: PART,
        verify_auth: false,
        ..ServerOptions::default()
    })
    .expect("the S3 server");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async { test(room(s3).await).await });
}

async fn room(s3: S3Server) -> Room {
    let stores = Stores::new(S3Settings {
        endpoint: Some(s3.endpoint()),
        path_style: Some(true),
        anonymous: true,
        ..S3Settings::default()
    });
    let located = stores.locate(&format!("s3://{BUCKET}/root")).await;
    let runtime = tokio::runtime::Handle::current();
    let memory = Budget::new(MEMORY, 0, MEMORY / 8, MEMORY / 8);
    let options = ReadOptions {
        transfers: 8,
        far_prefetches: 0,
        disk: None,
    };
    let reader = Reader::new(Arc::clone(&memory), runtime.clone(), options);
    let folder = tempfile::tempdir().expect("a folder");
    let spill = Spill::open(folder.path(), SPILL).expect("a spill directory");
    let options = WriteOptions {
        close_timeout: Duration::ZERO,
        part_size: PART,
        transfers: 8,
        tracking: "http://growth".to_owned(),
    };
    Room {
        store: located.expect("a store").store,
        writer: Writer::new(memory, spill, Arc::clone(&reader), runtime, options),
        reader,
        s3,
        _folder: folder,
    }
}

impl Room {
    fn target(&self) -> Target {
        Target {
            store: Arc::clone(&self.store),
            key: "f".to_owned(),
            path: "f".to_owned(),
        }
    }

    fn stored(&self) -> Vec<u8> {
        self.s3.bytes(BUCKET, "f").expect("it is stored")
    }
}

/// Bytes that are nowhere alike, as each says where it is.
fn content(length: u64) -> Vec<u8> {
    let words = (0..length.div_ceil(8)).flat_map(|word| word.to_le_bytes());
    let mut bytes: Vec<u8> = words.collect();
    bytes.truncate(length as usize);
    bytes
}

#[test]
fn a_file_of_more_than_ten_thousand_times_the_part_size_is_stored_whole() {
    with_room(grow);
}

async fn grow(room: Room) {
    let data = content(10_001 * PART + 77);
    let draft = Draft::new(&room.writer, room.target());
    for (index, piece) in data.chunks(100_000).enumerate() {
        let piece = Bytes::copy_from_slice(piece);
        draft.write(index as u64 * 100_000, piece).await.unwrap();
    }
    draft.publish().await.unwrap();
    assert!(room.stored() == data);
    // 2 000 parts of one size, 2 000 of twice that, and the rest of four times that.
    let rest = (data.len() as u64 - STEP * PART - STEP * 2 * PART).div_ceil(4 * PART);
    let sent = room.s3.stats().of(Kind::UploadPart);
    assert_eq!(sent.requests, 2 * STEP + rest);
    assert_eq!(sent.bytes_in, data.len() as u64);
    assert_eq!(room.s3.uploads(), 0);
    assert!(room.writer.memory().peak() <= MEMORY);
    assert!(room.writer.spill().budget().peak() <= SPILL);
}

#[test]
fn a_stored_file_can_be_changed_and_appended_to_on_both_sides_of_a_step() {
    with_room(change);
}

async fn change(room: Room) {
    let size = STEP * PART + 5 * PART + 9;
    room.s3.put(BUCKET, "f", content(size));
    let meta = room.store.head("f").await.unwrap();
    let base = room.reader.open(Source {
        store: Arc::clone(&room.store),
        key: "f".to_owned(),
        etag: meta.etag,
        size,
    });
    let draft = Draft::over(&room.writer, room.target(), base);
    let mut expected = content(size + 30 * PART);
    let appended = Bytes::copy_from_slice(&expected[size as usize..]);
    draft.write(size, appended).await.unwrap();
    for at in [STEP * PART - 3, STEP * PART + 3 * PART, 10] {
        draft
            .write(at, Bytes::from_static(b"changed"))
            .await
            .unwrap();
        expected[at as usize..at as usize + 7].copy_from_slice(b"changed");
    }
    draft.publish().await.unwrap();
    assert!(room.stored() == expected);
    assert_eq!(room.s3.uploads(), 0);
}
