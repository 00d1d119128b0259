//! The vfs without a mount: over the in-memory S3 server, with what a kernel does in front of it
//! (walking paths, counting lookups) in as few lines as possible.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use mlfs::budget::Budget;
use mlfs::catalog::Catalog;
use mlfs::read::{DiskOptions, ReadOptions, Reader};
use mlfs::store::Stores;
use mlfs::store::s3::S3Settings;
use mlfs::tracking::{Experiment, Lifecycle, Page, Run, Tracking, TrackingResult};
use mlfs::vfs::{
    Access, CloseMode, EntryAttributes, FileKind, Inode, ROOT, Vfs, VfsError, VfsOptions,
};
use mlfs::write::{Spill, WriteOptions, Writer};

use super::operations::PART;

pub const BUCKET: &str = "bucket";
/// Little enough that writers, who get what the floors leave, spill all the time.
const MEMORY: u64 = 20 * PART;
/// What readers fetch at once fits, as it does below any `--memory` that is accepted.
const READ_FLOOR: u64 = 10 * PART;
const TRANSFER_FLOOR: u64 = 2 * PART;
const SPILL: u64 = 1 << 30;

/// Every run there could be, each with a prefix of its own.
#[derive(Debug)]
struct AnyRun;

pub fn prefix(run: &str) -> String {
    format!("root/{run}/artifacts")
}

#[async_trait]
impl Tracking for AnyRun {
    fn name(&self) -> &str {
        "a stand-in"
    }

    async fn probe(&self) -> TrackingResult<()> {
        Ok(())
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        Ok(Run {
            run_id: run_id.to_owned(),
            run_name: String::new(),
            experiment_id: "0".to_owned(),
            artifact_uri: format!("s3://{BUCKET}/{}", prefix(run_id)),
            lifecycle: Lifecycle::Active,
            status: "RUNNING".to_owned(),
            start_time: Some(SystemTime::UNIX_EPOCH),
            end_time: None,
        })
    }

    async fn experiments(&self, _token: Option<&str>) -> TrackingResult<Page<Experiment>> {
        Ok(Page {
            items: Vec::new(),
            next: None,
        })
    }

    async fn runs(
        &self,
        _experiments: &[String],
        _token: Option<&str>,
    ) -> TrackingResult<Page<Run>> {
        Ok(Page {
            items: Vec::new(),
            next: None,
        })
    }
}

pub fn stores(endpoint: &str) -> Arc<Stores> {
    Arc::new(Stores::new(S3Settings {
        endpoint: Some(endpoint.to_owned()),
        path_style: Some(true),
        anonymous: true,
        ..S3Settings::default()
    }))
}

/// A mount of one run.
pub struct Mount {
    pub vfs: Arc<Vfs>,
    pub writer: Arc<Writer>,
    #[allow(dead_code, reason = "not every test looks at it")]
    pub reader: Arc<Reader>,
    run: String,
    lookups: HashMap<Inode, u64>,
}

impl Mount {
    pub fn new(stores: &Arc<Stores>, spill: &Path, run: &str, ttl: Duration) -> Self {
        let memory = Budget::new(MEMORY, 0, READ_FLOOR, TRANSFER_FLOOR);
        Self::with(stores, spill, run, ttl, memory, None)
    }

    pub fn with(
        stores: &Arc<Stores>,
        spill: &Path,
        run: &str,
        ttl: Duration,
        memory: Arc<Budget>,
        disk: Option<DiskOptions>,
    ) -> Self {
        let runtime = tokio::runtime::Handle::current();
        let shared: Arc<Stores> = Arc::clone(stores);
        let catalog = Catalog::new(Arc::new(AnyRun), shared, Duration::MAX);
        let reader = Reader::new(
            Arc::clone(&memory),
            runtime.clone(),
            ReadOptions {
                transfers: 4,
                far_prefetches: 0,
                disk,
            },
        );
        let spill = Spill::open(spill, SPILL).expect("a spill directory");
        let options = WriteOptions {
            tracking: "http://model".to_owned(),
            part_size: PART,
            transfers: 4,
            // What fails is to fail at once: the reference has no patience.
            close_timeout: Duration::ZERO,
        };
        let writer = Writer::new(memory, spill, Arc::clone(&reader), runtime.clone(), options);
        let options = VfsOptions {
            mountpoint: "/nowhere".into(),
            tracking_uri: String::new(),
            uid: 0,
            gid: 0,
            umask: 0o022,
            metadata_ttl: ttl,
            read_only: false,
            close: CloseMode::Stored,
            side_by_side: 4,
            most_queued: 100,
        };
        let stores = Arc::clone(stores);
        let vfs = Vfs::new(
            catalog,
            stores,
            Arc::clone(&reader),
            Arc::clone(&writer),
            runtime,
            options,
        );
        Self {
            vfs,
            writer,
            reader,
            run: run.to_owned(),
            lookups: HashMap::new(),
        }
    }

    pub async fn lookup(&mut self, parent: Inode, name: &str) -> Result<EntryAttributes, VfsError> {
        let found = self.vfs.lookup(parent, OsStr::new(name)).await?;
        self.count(found.attributes.inode);
        Ok(found)
    }

    pub fn count(&mut self, inode: Inode) {
        *self.lookups.entry(inode).or_default() += 1;
    }

    /// Walks to the directory a path lies in; returns it with the inodes on the way.
    pub async fn walk<'a>(
        &mut self,
        path: &'a str,
    ) -> Result<(Inode, &'a str, Vec<Inode>), VfsError> {
        let run = self.run.clone();
        let mut parent = self.lookup(ROOT, &run).await?.attributes.inode;
        let mut way = vec![parent];
        let mut names: Vec<&str> = path.split('/').collect();
        let last = names.pop().unwrap_or_default();
        for name in names {
            let found = self.lookup(parent, name).await?.attributes;
            if found.kind != FileKind::Directory {
                return Err(VfsError::NOT_DIRECTORY);
            }
            parent = found.inode;
            way.push(parent);
        }
        Ok((parent, last, way))
    }

    /// The inode of a path; the run's own for an empty one.
    pub async fn find(&mut self, path: &str) -> Result<EntryAttributes, VfsError> {
        let run = self.run.clone();
        if path.is_empty() {
            return self.lookup(ROOT, &run).await;
        }
        let (parent, name, _) = self.walk(path).await?;
        self.lookup(parent, name).await
    }

    /// The kernel forgets all but the inodes `held`.
    pub fn forget_all_but(&mut self, held: &[Inode]) {
        for (inode, count) in std::mem::take(&mut self.lookups) {
            let kept = u64::from(held.contains(&inode));
            if kept > 0 {
                self.lookups.insert(inode, kept);
            }
            self.vfs.forget(inode, count - kept);
        }
    }

    /// The whole of a file.
    pub async fn content(&mut self, path: &str) -> Result<Vec<u8>, VfsError> {
        let found = self.find(path).await?.attributes;
        let access = access(true, false);
        let handle = self.vfs.open(found.inode, access).await?.handle;
        let outcome = self.read(handle, 0, u32::MAX).await;
        self.vfs.release(handle);
        outcome
    }

    pub async fn read(&self, handle: u64, at: u64, length: u32) -> Result<Vec<u8>, VfsError> {
        let segments = self.vfs.read(handle, 0, at, length).await?;
        Ok(segments.pieces().concat())
    }
}

pub fn access(read: bool, write: bool) -> Access {
    Access {
        read,
        write,
        truncate: false,
        exclusive: false,
        thread: std::process::id(),
    }
}
