//! The thread that writes what was fetched, and keeps the cache under its limit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Disk;
use super::queue::{Batch, Next};
use super::space::{Space, folder_usage};
use super::version::Version;

/// A version that another process has deleted, and that is open here, is let go of after at most
/// so long: until then it takes room that nobody sees.
const SWEEP: Duration = Duration::from_secs(10);

/// Serves the queue until it is closed or the disk fails.
pub(super) fn run(disk: &Disk) {
    let mut writer = Writer {
        disk,
        space: Space::new(&disk.root, disk.limit),
        buffer: Vec::new(),
    };
    // What former mounts left may be more than this one's limit.
    if let Err(error) = writer.room(0, "") {
        disk.end(&error);
    }
    let mut swept = Instant::now();
    while disk.is_on() {
        match disk.queue.next(SWEEP) {
            Next::Write(batch) => writer.serve(batch),
            Next::Idle => {}
            Next::Closed => return,
        }
        if swept.elapsed() >= SWEEP {
            writer.sweep();
            swept = Instant::now();
        }
    }
}

struct Writer<'a> {
    disk: &'a Disk,
    space: Space,
    /// Scratch.
    buffer: Vec<u8>,
}

impl Writer<'_> {
    fn serve(&mut self, batch: Batch) {
        let bytes = batch.bytes();
        let counter = match self.write(&batch) {
            Ok(true) => &self.disk.written,
            Ok(false) => &self.disk.skipped,
            Err(error) => {
                self.disk.failed(&batch.identity, &error);
                &self.disk.skipped
            }
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
        self.disk.queue.done(batch);
    }

    /// Writes a batch, if there is room for it.
    fn write(&mut self, batch: &Batch) -> io::Result<bool> {
        if !self.room(batch.bytes(), &batch.identity.name)? {
            return Ok(false);
        }
        let version = self.version(batch)?;
        let before = version.disk_usage()?;
        let written = version.write(batch.first, &batch.blocks, &mut self.buffer);
        self.added(version.disk_usage()?.saturating_sub(before));
        written.map(|()| true)
    }

    /// The version to write to: one that can be found by its name, made if there is none.
    fn version(&mut self, batch: &Batch) -> io::Result<Arc<Version>> {
        let identity = &batch.identity;
        if let Some(version) = self.disk.version(identity)? {
            if version.is_linked() {
                return Ok(version);
            }
            self.disk.open.lock().pop(&identity.name);
            if let Some(version) = self.disk.version(identity)? {
                return Ok(version);
            }
        }
        let _changing = self.disk.changing.lock();
        let version = Version::create(&self.disk.root, identity)?;
        self.added(folder_usage(&self.disk.root, &identity.name)?);
        Ok(self.disk.keep_open(identity, version))
    }

    fn room(&mut self, bytes: u64, name: &str) -> io::Result<bool> {
        let mut gone = Vec::new();
        let outcome = self.space.room(bytes, name, &mut gone);
        let mut open = self.disk.open.lock();
        for name in gone {
            open.pop(&name);
        }
        drop(open);
        self.report();
        outcome
    }

    fn added(&mut self, bytes: u64) {
        self.space.add(bytes);
        self.report();
    }

    fn report(&self) {
        self.disk.stored.store(self.space.used(), Ordering::Relaxed);
    }

    fn sweep(&self) {
        let mut open = self.disk.open.lock();
        let deleted: Vec<String> = open
            .iter()
            .filter(|(_, version)| !version.is_linked())
            .map(|(name, _)| name.clone())
            .collect();
        for name in deleted {
            open.pop(&name);
        }
    }
}
