//! `.mlfs/`: the running mount, as files.
//!
//! `status` is one JSON document, made when it is opened. Writing anything to `drain` asks for
//! everything closed and unpublished to be sent now; ids of uploads, or `all`, written to `retry`
//! or `discard` asks for that.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Vfs;
use super::closing::Item;
use super::queue::Standing;
use super::upload_status::UploadStatus;
use crate::read::DiskStatus;

/// Bytes of a budget.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct BudgetStatus {
    pub limit: u64,
    pub used: u64,
    pub peak: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ReadStatus {
    pub bytes_served: u64,
    pub bytes_demanded: u64,
    pub bytes_prefetched: u64,
    pub bytes_cached: u64,
    #[serde(default)]
    pub bytes_from_disk: u64,
    /// Openings of files whose reads the kernel serves from the disk cache by itself.
    #[serde(default)]
    pub opened_on_disk: u64,
    /// `None` without a disk cache.
    #[serde(default)]
    pub disk: Option<DiskStatus>,
}

/// `.mlfs/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub mountpoint: String,
    pub tracking_uri: String,
    pub read_only: bool,
    pub uptime_seconds: u64,
    /// What this mount stores before it ends.
    pub pending: Vec<UploadStatus>,
    /// That, and what former mounts left.
    pub uploads: Vec<UploadStatus>,
    pub memory: BudgetStatus,
    pub spill: BudgetStatus,
    pub read: ReadStatus,
    /// Requests by kind and bytes each way, as the stores count them.
    pub store: serde_json::Value,
    pub inodes: usize,
    /// Names that directories are known to hold.
    pub names: usize,
}

impl Vfs {
    /// Every file of this mount that the store lacks something of.
    pub(super) fn pending(&self) -> Vec<UploadStatus> {
        self.dirty_files()
            .into_iter()
            .filter_map(|(inode, file)| {
                let (size, _) = file.size_and_time();
                let item = Item::File(inode);
                let queued = self.standing(&item).0;
                let held_by = self.held_by(&item);
                let state = file.state();
                let draft = Arc::clone(state.draft.as_ref()?);
                let name = match draft.failure() {
                    _ if state.writers > 0 => "open",
                    _ if state.publishing > 0 => "uploading",
                    _ if queued == Some(Standing::Waiting) => "waiting",
                    Some(_) => "failed",
                    None => "waiting",
                };
                drop(state);
                Some(UploadStatus {
                    id: draft.id().to_owned(),
                    path: self.path(inode),
                    size,
                    since: draft.since(),
                    state: name.to_owned(),
                    reason: draft.failure(),
                    sent: draft.sent(),
                    held_by,
                })
            })
            .collect()
    }

    /// Everything that this mount has to store before it may end.
    pub fn unstored(&self) -> Vec<UploadStatus> {
        let mut unstored = self.pending();
        unstored.extend(self.resumed());
        unstored.sort_by(|one, other| one.path.cmp(&other.path));
        unstored
    }

    pub fn status(&self) -> Status {
        let (inodes, names) = {
            let tree = self.tree.lock();
            (tree.len(), tree.names())
        };
        let budget = |budget: &crate::budget::Budget| BudgetStatus {
            limit: budget.limit(),
            used: budget.used(),
            peak: budget.peak(),
        };
        let read = self.reader.metrics();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            mountpoint: self.options.mountpoint.display().to_string(),
            tracking_uri: self.options.tracking_uri.clone(),
            read_only: self.options.read_only,
            uptime_seconds: SystemTime::now()
                .duration_since(self.started)
                .map_or(0, |uptime| uptime.as_secs()),
            pending: self.unstored(),
            uploads: self.uploads(),
            memory: budget(self.writer.memory()),
            spill: budget(self.writer.spill().budget()),
            read: ReadStatus {
                bytes_served: read.bytes_served.load(Ordering::Relaxed),
                bytes_demanded: read.bytes_demanded.load(Ordering::Relaxed),
                bytes_prefetched: read.bytes_prefetched.load(Ordering::Relaxed),
                bytes_cached: self.reader.cached_bytes(),
                bytes_from_disk: read.bytes_from_disk.load(Ordering::Relaxed),
                opened_on_disk: self.local.opened(),
                disk: self.reader.disk_status(),
            },
            store: self.stores.metrics(),
            inodes,
            names,
        }
    }

    pub(super) fn status_document(&self) -> Bytes {
        match serde_json::to_vec_pretty(&self.status()) {
            Ok(mut document) => {
                document.push(b'\n');
                document.into()
            }
            Err(error) => format!("{{\"error\": \"{error}\"}}\n").into(),
        }
    }
}
