//! What the stores were asked, by kind.

use std::sync::atomic::{AtomicU64, Ordering};

/// The kinds of requests a store is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    List,
    Head,
    Get,
    Put,
    CreateMultipart,
    UploadPart,
    CopyPart,
    CompleteMultipart,
    AbortMultipart,
    ListParts,
    Copy,
    Delete,
}

const NAMES: [&str; 12] = [
    "list",
    "head",
    "get",
    "put",
    "create_multipart",
    "upload_part",
    "copy_part",
    "complete_multipart",
    "abort_multipart",
    "list_parts",
    "copy",
    "delete",
];

/// Counters of one process; calls count once, however often they were retried.
#[derive(Debug, Default)]
pub struct StoreMetrics {
    requests: [AtomicU64; NAMES.len()],
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    /// 0: no limit.
    places: AtomicU64,
    throttled: AtomicU64,
    waiting: AtomicU64,
}

/// One that waits, until it is dropped.
pub struct Waiting<'a>(&'a AtomicU64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StoreMetrics {
    pub fn count(&self, request: Request) {
        self.requests[request as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn received(&self, bytes: u64) {
        self.bytes_in.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sent(&self, bytes: u64) {
        self.bytes_out.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many requests the store is sent at once for now; `None`: as many as there are.
    pub fn set_places(&self, places: Option<usize>) {
        let places = places.map_or(0, |places| places as u64);
        self.places.store(places, Ordering::Relaxed);
    }

    /// An attempt that the store refused with 503 or 429.
    pub fn count_throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    /// A request that waits because the store takes no more at once.
    pub fn waiting(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(&self.waiting)
    }

    pub fn to_json(&self) -> serde_json::Value {
        let requests: serde_json::Map<String, serde_json::Value> = NAMES
            .iter()
            .zip(&self.requests)
            .map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed).into()))
            .collect();
        serde_json::json!({
            "requests": requests,
            "bytes_in": self.bytes_in.load(Ordering::Relaxed),
            "bytes_out": self.bytes_out.load(Ordering::Relaxed),
            "places": Some(self.places.load(Ordering::Relaxed)).filter(|places| *places > 0),
            "waiting": self.waiting.load(Ordering::Relaxed),
            "throttled": self.throttled.load(Ordering::Relaxed),
        })
    }
}
