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
        })
    }
}
