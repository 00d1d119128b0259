//! Does each operation to the vfs and to the reference, and compares.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mlfs::store::Stores;
use mlfs::vfs::{FileKind, Inode, RenameMode, VfsError, WriteOutcome};
use mlfs_lab::s3::{Rule, S3Server, ServerOptions};
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep, timeout};

use super::mount::{BUCKET, Mount, access, prefix, stores};
use super::operations::{LARGEST, Opening, Operation, PART, SLOTS, noise};
use super::reference::{Found, Id, Reference, parent};

/// How long one operation may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(20);

type Outcome = Result<(), String>;

/// What all sequences share.
pub struct Lab {
    s3: S3Server,
    stores: Arc<Stores>,
    folder: tempfile::TempDir,
    runtime: Runtime,
    next: AtomicU64,
}

struct Slot {
    handle: u64,
    id: Id,
    readable: bool,
    writable: bool,
    /// Inodes the kernel holds while it is open.
    held: Vec<Inode>,
}

struct Driver<'a> {
    lab: &'a Lab,
    run: String,
    forever: bool,
    mount: Mount,
    model: Reference,
    slots: [Option<Slot>; SLOTS],
    /// Faults may hit this operation.
    troubled: bool,
}

impl Lab {
    pub fn new() -> Self {
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
        Self {
            stores: stores(&s3.endpoint()),
            s3,
            folder: tempfile::tempdir().expect("a folder"),
            runtime,
            next: AtomicU64::new(1),
        }
    }

    /// Runs one sequence over an empty run.
    pub fn run(&self, forever: bool, operations: &[Operation]) -> Outcome {
        let run = format!("{:032x}", self.next.fetch_add(1, Ordering::Relaxed));
        self.runtime.block_on(async {
            let mut driver = Driver {
                lab: self,
                mount: self.mount(&run, forever),
                run,
                forever,
                model: Reference::default(),
                slots: std::array::from_fn(|_| None),
                troubled: false,
            };
            for (step, operation) in operations.iter().enumerate() {
                let told = |error| format!("step {step}, {operation:?}: {error}");
                driver.step(operation).await.map_err(told)?;
            }
            let outcome = timeout(PATIENCE, driver.finish()).await;
            outcome
                .unwrap_or_else(|_| Err("hangs".to_owned()))
                .map_err(|error| format!("at the end: {error}"))
        })
    }

    fn mount(&self, run: &str, forever: bool) -> Mount {
        let ttl = if forever {
            Duration::MAX
        } else {
            Duration::ZERO
        };
        Mount::new(&self.stores, self.folder.path(), run, ttl)
    }
}

/// Compares what the vfs answered with what the reference says.
fn compare<T>(what: &str, told: Result<T, VfsError>, expected: Result<(), i32>) -> Outcome {
    match (told, expected) {
        (Ok(_), Ok(())) => Ok(()),
        (Err(error), Err(errno)) if error.errno == errno => Ok(()),
        (told, expected) => {
            let told = told.map(|_| ());
            Err(format!("{what}: answered {told:?}, expected {expected:?}"))
        }
    }
}

/// An error that says the version is not to be had any more.
fn is_gone(error: &VfsError) -> bool {
    matches!(error.errno, libc::ENOENT | libc::ESTALE)
}

fn require(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what()) }
}

/// Where two contents first differ, for messages.
fn difference(told: &[u8], expected: &[u8]) -> String {
    let at = told
        .iter()
        .zip(expected)
        .position(|(one, other)| one != other);
    format!(
        "{} bytes instead of {}, first difference at {at:?}",
        told.len(),
        expected.len()
    )
}

impl Driver<'_> {
    async fn step(&mut self, operation: &Operation) -> Outcome {
        if let Operation::Trouble { kind, fault, times } = operation {
            let rule = Rule {
                times: Some(*times),
                ..Rule::every(*kind, fault.clone())
            };
            self.lab.s3.set_faults(1, vec![rule]);
            self.troubled = true;
            return Ok(());
        }
        let done = timeout(PATIENCE, self.perform(operation)).await;
        done.map_err(|_| "hangs".to_owned())??;
        self.calm();
        self.check_store()?;
        self.check_sizes().await
    }

    fn calm(&mut self) {
        self.lab.s3.set_faults(1, Vec::new());
        self.troubled = false;
    }

    /// Whether a fault may be the reason.
    fn excused<T>(&self, outcome: &Result<T, VfsError>) -> bool {
        let trouble = |errno| matches!(errno, libc::EACCES | libc::EIO);
        self.troubled
            && outcome
                .as_ref()
                .is_err_and(|error| error.cause.is_some() && trouble(error.errno))
    }

    async fn perform(&mut self, operation: &Operation) -> Outcome {
        match operation {
            Operation::Open(opening) => self.open(opening).await,
            Operation::Write {
                slot,
                at,
                length,
                seed,
            } => self.write(*slot, *at, *length, *seed).await,
            Operation::Append { slot, length, seed } => {
                let Some(open) = &self.slots[*slot] else {
                    return Ok(());
                };
                let end = self.model.nodes[open.id].content.len() as u64;
                self.write(*slot, end, *length, *seed).await
            }
            Operation::Read { slot, at, length } => self.read(*slot, *at, *length).await,
            Operation::Resize { slot, size } => self.resize(*slot, *size).await,
            Operation::ResizePath { path, size } => self.resize_path(path, *size).await,
            Operation::Close(slot) => self.close(*slot).await,
            Operation::Synchronise(slot) => self.synchronise(*slot).await,
            Operation::Save { path, length, seed } => self.save(path, *length, *seed).await,
            Operation::Rename { from, to } => self.rename(from, to).await,
            Operation::Unlink(path) => self.unlink(path).await,
            Operation::MakeDirectory(path) => self.make_directory(path).await,
            Operation::RemoveDirectory(path) => self.remove_directory(path).await,
            Operation::List(path) => self.list(path).await,
            Operation::Forget => {
                let held: Vec<Inode> = self
                    .slots
                    .iter()
                    .flatten()
                    .flat_map(|slot| slot.held.iter().copied())
                    .collect();
                self.mount.forget_all_but(&held);
                Ok(())
            }
            Operation::Drain => self.drain().await,
            Operation::OutsidePut { path, length, seed } => {
                self.outside(path, Some(noise(*seed, *length)))
            }
            Operation::OutsideDelete(path) => self.outside(path, None),
            Operation::Trouble { .. } => Ok(()),
        }
    }

    async fn open(&mut self, opening: &Opening) -> Outcome {
        if self.slots[opening.slot].is_some() {
            return Ok(());
        }
        let expected = match self.model.find(opening.path) {
            Ok(Found::Directory) if opening.exclusive => Err(libc::EEXIST),
            Ok(Found::Directory) => Err(libc::EISDIR),
            Ok(Found::File(_)) if opening.exclusive => Err(libc::EEXIST),
            Ok(Found::File(id)) => Ok(id),
            Err(libc::ENOENT)
                if opening.create
                    && self.model.find(parent(opening.path)) == Ok(Found::Directory) =>
            {
                Ok(self.model.nodes.len())
            }
            Err(errno) => Err(errno),
        };
        let told = self.open_path(opening).await;
        if self.excused(&told) {
            return Ok(());
        }
        let (told, opened) = match told {
            Ok(slot) => (Ok(()), Some(slot)),
            Err(error) => (Err(error), None),
        };
        compare("open", told, expected.map(|_| ()))?;
        if let (Some((handle, held)), Ok(id)) = (opened, expected) {
            let created = id == self.model.nodes.len();
            if created {
                self.model.create(opening.path);
            }
            let node = &mut self.model.nodes[id];
            node.writers += usize::from(opening.write);
            if opening.truncate && !node.content.is_empty() {
                node.content.clear();
                node.dirty = true;
            }
            self.slots[opening.slot] = Some(Slot {
                handle,
                id,
                readable: opening.read,
                writable: opening.write,
                held,
            });
        }
        Ok(())
    }

    /// What the kernel does: a lookup, then `open` or `create`.
    async fn open_path(&mut self, opening: &Opening) -> Result<(u64, Vec<Inode>), VfsError> {
        let mut wanted = access(opening.read, opening.write);
        wanted.truncate = opening.truncate;
        wanted.exclusive = opening.exclusive;
        let (parent, name, mut held) = self.mount.walk(opening.path).await?;
        match self.mount.lookup(parent, name).await {
            Ok(_) if opening.exclusive => Err(VfsError::EXISTS),
            Ok(found) if found.attributes.kind == FileKind::Directory => {
                Err(VfsError::IS_DIRECTORY)
            }
            Ok(found) => {
                let inode = found.attributes.inode;
                let opened = self.mount.vfs.open(inode, wanted).await?;
                held.push(inode);
                Ok((opened.handle, held))
            }
            Err(error) if error.errno == libc::ENOENT && opening.create => {
                let created = self.mount.vfs.create(parent, OsStr::new(name), wanted);
                let (entry, opened) = created.await?;
                self.mount.count(entry.attributes.inode);
                held.push(entry.attributes.inode);
                Ok((opened.handle, held))
            }
            Err(error) => Err(error),
        }
    }

    async fn write(&mut self, slot: usize, at: u64, length: u64, seed: u64) -> Outcome {
        let Some(slot) = &self.slots[slot] else {
            return Ok(());
        };
        let (handle, id) = (slot.handle, slot.id);
        let length = length.min(LARGEST.saturating_sub(at));
        if !slot.writable || length == 0 || self.model.nodes[id].foreign {
            return Ok(());
        }
        let data = noise(seed, length);
        let told = self.write_all(handle, at, &data).await;
        match told {
            Ok(()) => {
                self.model.write(id, at, &data);
                self.check_handle(handle, id, at, length).await
            }
            Err(ref error) if self.excused(&told) || error.errno == libc::ENOSPC => {
                self.calm();
                self.adopt(handle, id, at, &data).await
            }
            Err(error) if self.model.nodes[id].lost && is_gone(&error) => {
                self.model.nodes[id].doubtful = true;
                Ok(())
            }
            Err(error) => Err(format!("write: {error:?}")),
        }
    }

    async fn write_all(&self, handle: u64, at: u64, data: &[u8]) -> Result<(), VfsError> {
        let vfs = &self.mount.vfs;
        let taken = match vfs.try_write(handle, at, data, std::process::id())? {
            WriteOutcome::Done => return Ok(()),
            WriteOutcome::Partial(taken) => taken,
        };
        let rest = Bytes::copy_from_slice(&data[taken..]);
        vfs.write(handle, at + taken as u64, rest).await
    }

    /// A write failed on its way: each part's piece of it was written or not, and the reference
    /// takes what is there. A piece that cannot be read was not written.
    async fn adopt(&mut self, handle: u64, id: Id, at: u64, data: &[u8]) -> Outcome {
        let mut done = 0;
        while done < data.len() {
            let from = at + done as u64;
            let length = ((PART - from % PART) as usize).min(data.len() - done);
            let piece = &data[done..done + length];
            match self.mount.read(handle, from, length as u32).await {
                Ok(bytes) if bytes == piece => self.model.write(id, from, piece),
                Ok(_) => return Ok(()),
                Err(error) if error.errno == libc::ENOSPC => return Ok(()),
                Err(error) => return Err(format!("read after a write that failed: {error:?}")),
            }
            done += length;
        }
        Ok(())
    }

    async fn read(&mut self, slot: usize, at: u64, length: u64) -> Outcome {
        match &self.slots[slot] {
            Some(slot) if slot.readable => {
                self.check_handle(slot.handle, slot.id, at, length).await
            }
            _ => Ok(()),
        }
    }

    /// A range read through a handle is what the reference has there.
    async fn check_handle(&self, handle: u64, id: Id, at: u64, length: u64) -> Outcome {
        let node = &self.model.nodes[id];
        if node.doubtful {
            return Ok(());
        }
        let told = self.mount.read(handle, at, length as u32).await;
        let size = node.content.len() as u64;
        let expected = &node.content[at.min(size) as usize..(at + length).min(size) as usize];
        match told {
            Ok(bytes) => require(bytes == expected, || {
                let difference = difference(&bytes, expected);
                format!("read {length} bytes at {at}: {difference}")
            }),
            // Parts given up under pressure, and what others replaced, say so.
            Err(error) if error.errno == libc::ENOSPC && size > 2 * PART => Ok(()),
            Err(error) if (node.foreign || node.lost) && is_gone(&error) => Ok(()),
            told if self.excused(&told) => Ok(()),
            Err(error) => Err(format!("read {length} bytes at {at}: {error:?}")),
        }
    }

    async fn resize(&mut self, slot: usize, size: u64) -> Outcome {
        let Some(slot) = &self.slots[slot] else {
            return Ok(());
        };
        let (id, inode) = (slot.id, slot.held[slot.held.len() - 1]);
        if !slot.writable || self.model.nodes[id].foreign {
            return Ok(());
        }
        let told = self.mount.vfs.set_size(inode, size).await;
        if told
            .as_ref()
            .is_err_and(|error| error.errno == libc::ENOSPC)
        {
            // It would cut a part whose local copy was given up.
            return Ok(());
        }
        compare("ftruncate", told, Ok(()))?;
        self.model.resize(id, size);
        Ok(())
    }

    async fn resize_path(&mut self, path: &str, size: u64) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::File(id)) => Ok(id),
            Ok(Found::Directory) => Err(libc::EISDIR),
            Err(errno) => Err(errno),
        };
        let found = self.mount.find(path).await;
        if self.excused(&found) {
            return Ok(());
        }
        let told = match found {
            Ok(found) => self.mount.vfs.set_size(found.attributes.inode, size).await,
            Err(error) => Err(error),
        };
        let Ok(id) = expected else {
            return compare("truncate", told, expected.map(|_| ()));
        };
        let closed = self.model.nodes[id].writers == 0;
        if told
            .as_ref()
            .is_err_and(|error| error.errno == libc::ENOSPC)
        {
            return Ok(());
        }
        if self.excused(&told) {
            // The size is changed here, and not, or perhaps, in the store.
            self.model.resize(id, size);
            self.model.publish_perhaps(id);
            return self.settled(id).await;
        }
        compare("truncate", told, Ok(()))?;
        self.model.resize(id, size);
        if closed && self.model.nodes[id].dirty {
            self.model.publish(id);
        }
        Ok(())
    }

    async fn close(&mut self, slot: usize) -> Outcome {
        let Some(slot) = self.slots[slot].take() else {
            return Ok(());
        };
        let vfs = Arc::clone(&self.mount.vfs);
        let told = vfs.flush(slot.handle, std::process::id()).await;
        let node = &self.model.nodes[slot.id];
        let publishes = slot.writable && node.changed && node.path.is_some();
        if self.excused(&told) {
            require(publishes, || "close fails with nothing to store".to_owned())?;
            self.model.publish_perhaps(slot.id);
        } else if node.foreign {
            // Nothing was written to it since it was replaced.
            compare("close", told, Ok(()))?;
        } else {
            compare("close", told, Ok(()))?;
            if publishes {
                self.model.publish(slot.id);
                self.check_store()?;
            }
        }
        vfs.release(slot.handle);
        self.model.nodes[slot.id].writers -= usize::from(slot.writable);
        self.settled(slot.id).await
    }

    /// Waits for what the release publishes in the background, and takes over how it ended.
    async fn settled(&mut self, id: Id) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let uploading = || {
            let pending = self.mount.vfs.unstored();
            pending.iter().any(|file| file.state == "uploading")
        };
        while uploading() {
            require(Instant::now() < deadline, || {
                "a publication in the background hangs".to_owned()
            })?;
            sleep(Duration::from_millis(1)).await;
        }
        let node = &self.model.nodes[id];
        let Some(path) = node.path.clone() else {
            return Ok(());
        };
        if node.writers > 0 || !node.dirty {
            return Ok(());
        }
        let shown = format!("{}/{path}", self.run);
        let pending = self.mount.vfs.unstored();
        match pending.iter().find(|file| file.path == shown) {
            None => self.model.publish(id),
            Some(file) => {
                require(self.troubled, || format!("not stored: {file:?}"))?;
                self.model.publish_perhaps(id);
            }
        }
        Ok(())
    }

    async fn synchronise(&mut self, slot: usize) -> Outcome {
        let Some(slot) = &self.slots[slot] else {
            return Ok(());
        };
        let told = self.mount.vfs.synchronise(slot.handle).await;
        compare("fsync", told, Ok(()))
    }

    async fn save(&mut self, path: &'static str, length: u64, seed: u64) -> Outcome {
        let Some(slot) = self.slots.iter().position(Option::is_none) else {
            return Ok(());
        };
        let opening = Opening {
            slot,
            path,
            read: false,
            write: true,
            create: true,
            truncate: true,
            exclusive: false,
        };
        self.open(&opening).await?;
        let length = length.min(LARGEST);
        let step = 128 * 1024;
        for at in (0..length).step_by(step) {
            let piece = (length - at).min(step as u64);
            self.write(slot, at, piece, seed + at).await?;
        }
        self.close(slot).await
    }

    /// Does `call` again without faults when a fault was the reason that it failed.
    async fn rename(&mut self, from: &str, to: &str) -> Outcome {
        if self.model.find(from) == Ok(Found::Directory) {
            self.calm();
        }
        let expected = self.model.rename(from, to);
        let mut told = self.rename_path(from, to).await;
        if self.excused(&told) {
            self.calm();
            told = self.rename_path(from, to).await;
        }
        compare("rename", told, expected)
    }

    async fn rename_path(&mut self, from: &str, to: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(from).await?;
        self.mount.lookup(parent, name).await?;
        let (to_parent, to_name, _) = self.mount.walk(to).await?;
        let (name, to_name) = (OsStr::new(name), OsStr::new(to_name));
        let mode = RenameMode::Replace;
        let vfs = &self.mount.vfs;
        vfs.rename(parent, name, to_parent, to_name, mode).await
    }

    async fn unlink(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::File(_)) => {
                self.model.unlink(path);
                Ok(())
            }
            Ok(Found::Directory) => Err(libc::EISDIR),
            Err(errno) => Err(errno),
        };
        let mut told = self.unlink_path(path).await;
        if self.excused(&told) {
            self.calm();
            told = self.unlink_path(path).await;
        }
        compare("unlink", told, expected)
    }

    async fn unlink_path(&mut self, path: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(path).await?;
        self.mount.vfs.unlink(parent, OsStr::new(name)).await
    }

    async fn make_directory(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(_) => Err(libc::EEXIST),
            Err(libc::ENOENT) if self.model.find(parent(path)) == Ok(Found::Directory) => Ok(()),
            Err(errno) => Err(errno),
        };
        let mut told = self.make_directory_path(path).await;
        if self.excused(&told) {
            self.calm();
            told = self.make_directory_path(path).await;
        }
        if expected.is_ok() {
            self.model.directories.insert(path.to_owned());
        }
        compare("mkdir", told, expected)
    }

    async fn make_directory_path(&mut self, path: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(path).await?;
        let made = self.mount.vfs.make_directory(parent, OsStr::new(name));
        let inode = made.await?.attributes.inode;
        self.mount.count(inode);
        Ok(())
    }

    async fn remove_directory(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::Directory) if self.model.is_empty(path) => {
                self.model.directories.remove(path);
                Ok(())
            }
            Ok(Found::Directory) => Err(libc::ENOTEMPTY),
            Ok(Found::File(_)) => Err(libc::ENOTDIR),
            Err(errno) => Err(errno),
        };
        let mut told = self.remove_directory_path(path).await;
        if self.excused(&told) {
            self.calm();
            told = self.remove_directory_path(path).await;
        }
        compare("rmdir", told, expected)
    }

    async fn remove_directory_path(&mut self, path: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(path).await?;
        let vfs = &self.mount.vfs;
        vfs.remove_directory(parent, OsStr::new(name)).await
    }

    async fn list(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::Directory) => Ok(()),
            Ok(Found::File(_)) => Err(libc::ENOTDIR),
            Err(errno) => Err(errno),
        };
        let told = self.names(path).await;
        if self.excused(&told) {
            return Ok(());
        }
        if let Ok(names) = &told {
            let wanted = self.model.list(path).into_iter().collect::<Vec<_>>();
            require(*names == wanted, || format!("{names:?}, not {wanted:?}"))?;
        }
        compare("readdir", told, expected)
    }

    async fn names(&mut self, path: &str) -> Result<Vec<String>, VfsError> {
        let inode = self.mount.find(path).await?.attributes.inode;
        let vfs = &self.mount.vfs;
        let handle = vfs.open_directory(inode)?;
        let listed = vfs.read_directory(handle, 0).await;
        vfs.release_directory(handle);
        let mut names: Vec<String> = listed?.into_iter().map(|entry| entry.name).collect();
        names.sort();
        Ok(names)
    }

    async fn drain(&mut self) -> Outcome {
        self.mount.vfs.begin_drain();
        let ids: Vec<Id> = self.model.files.values().copied().collect();
        for id in ids {
            self.settled(id).await?;
        }
        Ok(())
    }

    /// Somebody else changes an object: only where this mount believes nothing for long, and
    /// where nothing unpublished would be in conflict with it.
    fn outside(&mut self, path: &str, bytes: Option<Vec<u8>>) -> Outcome {
        let found = self.model.find(path);
        let possible = match found {
            Ok(Found::File(id)) => !self.model.nodes[id].dirty,
            Err(libc::ENOENT) => {
                bytes.is_some() && self.model.find(parent(path)) == Ok(Found::Directory)
            }
            _ => false,
        };
        if self.forever || !possible {
            return Ok(());
        }
        let key = format!("{}/{path}", prefix(&self.run));
        match &bytes {
            Some(bytes) => self.lab.s3.put(BUCKET, &key, bytes.clone()),
            None => self.lab.s3.delete(BUCKET, &key),
        }
        self.model.outside(path, bytes);
        Ok(())
    }

    /// What the store shows under each name is what was last closed there, whole.
    fn check_store(&self) -> Outcome {
        let below = format!("{}/", prefix(&self.run));
        let keys = self.lab.s3.keys(BUCKET);
        let shown: Vec<&str> = keys
            .iter()
            .filter_map(|key| key.strip_prefix(&below))
            .collect();
        for path in &shown {
            let told = self.lab.s3.bytes(BUCKET, &format!("{below}{path}"));
            let told = told.unwrap_or_default();
            let expected = self.model.store.get(*path);
            let perhaps = self.model.perhaps.get(*path);
            let good =
                expected == Some(&told) || perhaps.is_some_and(|versions| versions.contains(&told));
            require(good, || match expected {
                Some(expected) => {
                    format!("the store shows {path}: {}", difference(&told, expected))
                }
                None => format!("the store shows {path}, which nobody stored"),
            })?;
        }
        for path in self.model.store.keys() {
            let there = shown.contains(&path.as_str());
            require(there, || format!("the store has lost {path}"))?;
        }
        Ok(())
    }

    /// Names and sizes, as `stat` tells them.
    async fn check_sizes(&mut self) -> Outcome {
        let files: Vec<(String, Id)> = self.model.files.clone().into_iter().collect();
        for (path, id) in files {
            let told = self.mount.find(&path).await;
            let told = told.map_err(|error| format!("stat {path}: {error:?}"))?;
            let size = self.model.nodes[id].content.len() as u64;
            require(told.attributes.size == size, || {
                format!("stat {path}: {} bytes, not {size}", told.attributes.size)
            })?;
        }
        Ok(())
    }

    /// Everything closed: the store, this mount and a new one all show the reference.
    async fn finish(&mut self) -> Outcome {
        self.calm();
        for slot in 0..SLOTS {
            self.close(slot).await?;
        }
        self.drain().await?;
        self.check_store()?;
        let left = self.mount.vfs.unstored();
        require(left.is_empty(), || format!("still pending: {left:?}"))?;
        self.check_contents().await?;
        let deadline = Instant::now() + PATIENCE;
        while self.lab.s3.uploads() > 0 {
            require(Instant::now() < deadline, || {
                format!("{} uploads left behind", self.lab.s3.uploads())
            })?;
            sleep(Duration::from_millis(1)).await;
        }
        let spilled = self.mount.writer.spill().budget().used();
        require(spilled == 0, || {
            format!("{spilled} bytes left in the spill")
        })?;
        self.mount = self.lab.mount(&self.run, false);
        self.check_contents().await
    }

    async fn check_contents(&mut self) -> Outcome {
        let files: Vec<(String, Id)> = self.model.files.clone().into_iter().collect();
        for (path, id) in files {
            let told = self.mount.content(&path).await;
            let told = told.map_err(|error| format!("read {path}: {error:?}"))?;
            let expected = &self.model.nodes[id].content;
            require(told == *expected, || {
                format!("read {path}: {}", difference(&told, expected))
            })?;
        }
        Ok(())
    }
}
