//! Takes a sequence through the vfs, and checks all that is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mlfs::budget::{Budget, Class};
use mlfs::read::DiskOptions;
use mlfs::store::Stores;
use mlfs::vfs::{Inode, VfsError};
use mlfs_lab::s3::{Kind, Rule, S3Server, ServerOptions};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::content::NAMES;
use super::damage::damage;
use super::history::History;
use super::mount::{BUCKET, Mount, access, prefix, stores};
use super::operations::{Change, Operation, Read, SLOTS, Setting};
use super::pages::Pages;

/// How long one operation may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of the first version of each file.
const FIRST_SIZE: u64 = 700_001;

pub type Outcome = Result<(), String>;

/// What all sequences share.
pub struct Lab {
    s3: S3Server,
    stores: Arc<Stores>,
    spill: tempfile::TempDir,
    runtime: Runtime,
    next: AtomicU64,
}

/// An open file, and the versions that it may be.
struct Slot {
    handle: u64,
    name: usize,
    found: Found,
}

/// What a lookup found.
#[derive(Clone)]
struct Found {
    inode: Inode,
    /// Inodes on the way, and its own.
    way: Vec<Inode>,
    /// Bytes.
    size: u64,
    versions: Vec<usize>,
}

struct Driver<'a> {
    lab: &'a Lab,
    run: String,
    setting: Setting,
    cache: tempfile::TempDir,
    memory: Arc<Budget>,
    mount: Mount,
    pages: Pages,
    files: Vec<History>,
    known: Vec<Option<Found>>,
    slots: [Option<Slot>; SLOTS],
}

impl Lab {
    pub fn new() -> Self {
        let s3 = S3Server::start(ServerOptions {
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
            spill: tempfile::tempdir().expect("a folder"),
            runtime,
            next: AtomicU64::new(1),
        }
    }

    /// Runs one sequence over a run of its own.
    pub fn run(&self, setting: Setting, operations: &[Operation]) -> Outcome {
        let run = format!("{:032x}", self.next.fetch_add(1, Ordering::Relaxed));
        self.runtime.block_on(async {
            let mut driver = Driver::new(self, run, setting);
            for (step, operation) in operations.iter().enumerate() {
                let done = timeout(PATIENCE, driver.perform(operation)).await;
                let told = |error| format!("step {step}, {operation:?}: {error}");
                done.unwrap_or_else(|_| Err("hangs".to_owned()))
                    .map_err(told)?;
            }
            let outcome = timeout(PATIENCE, driver.finish()).await;
            outcome
                .unwrap_or_else(|_| Err("hangs".to_owned()))
                .map_err(|error| format!("at the end: {error}"))
        })
    }
}

impl<'a> Driver<'a> {
    fn new(lab: &'a Lab, run: String, setting: Setting) -> Self {
        let cache = tempfile::tempdir().expect("a folder");
        let memory = Budget::new(setting.memory, 0, setting.memory / 2, 0);
        let mut driver = Self {
            mount: mount(lab, &run, setting, &memory, &cache),
            lab,
            run,
            setting,
            cache,
            memory,
            pages: Pages::default(),
            files: NAMES.into_iter().map(History::new).collect(),
            known: NAMES.iter().map(|_| None).collect(),
            slots: std::array::from_fn(|_| None),
        };
        for name in 0..NAMES.len() {
            driver.change(Change::Overwrite(name, Some(FIRST_SIZE)));
        }
        driver.files.iter_mut().for_each(History::remounted);
        driver
    }

    async fn perform(&mut self, operation: &Operation) -> Outcome {
        match operation {
            Operation::Lookup(name) => self.lookup(*name).await.map(drop),
            Operation::Open { slot, name, fresh } => self.open(*slot, *name, *fresh).await,
            Operation::Close(slot) => {
                self.close(*slot);
                Ok(())
            }
            Operation::Read(read) => {
                let read = self.placed(read).await?;
                self.read(&read).await
            }
            Operation::ReadPages(read) => {
                let read = self.placed(read).await?;
                self.read_pages(&read).await
            }
            Operation::Scan(read, pieces) => {
                let read = self.placed(read).await?;
                for piece in 0..*pieces {
                    let at = read.at + piece * u64::from(read.length);
                    self.read(&Read { at, ..read }).await?;
                }
                Ok(())
            }
            Operation::Change(change) => {
                self.change(*change);
                Ok(())
            }
            Operation::Race {
                reads,
                change,
                held,
                fault,
            } => {
                let rules = fault.clone().map(|fault| Rule::once(Kind::Get, fault));
                self.lab.s3.set_faults(1, rules.into_iter().collect());
                let outcome = self.race(reads, *change, *held).await;
                self.lab.s3.set_faults(1, Vec::new());
                outcome
            }
            Operation::Evict => {
                let all = self.memory.ceiling(Class::Write);
                drop(self.memory.try_reserve(Class::Write, all));
                Ok(())
            }
            Operation::DropPages => {
                self.pages.drop_all();
                Ok(())
            }
            Operation::Forget => {
                self.forget();
                Ok(())
            }
            Operation::Settle => {
                let reader = Arc::clone(&self.mount.reader);
                until(|| {
                    reader
                        .disk_status()
                        .is_none_or(|disk| disk.bytes_queued == 0)
                })
                .await;
                Ok(())
            }
            Operation::Damage(kind, one, other) => {
                damage(self.cache.path(), *kind, *one, *other);
                Ok(())
            }
            Operation::Remount => {
                self.remount().await;
                Ok(())
            }
        }
    }

    async fn lookup(&mut self, name: usize) -> Result<Option<Found>, String> {
        let found = self.find(name).await;
        let size = match &found {
            Ok((size, _)) => Some(*size),
            Err(error) if error.errno == libc::ENOENT => None,
            Err(error) => return Err(format!("looking up {}: {error}", NAMES[name])),
        };
        let versions = self.files[name].looked_up(size, self.setting.forever)?;
        self.known[name] = found.ok().map(|(size, way)| Found {
            inode: way.last().copied().unwrap_or_default(),
            way,
            size,
            versions,
        });
        Ok(self.known[name].clone())
    }

    /// A file's size, and the inodes on the way to it, its own as the last.
    async fn find(&mut self, name: usize) -> Result<(u64, Vec<Inode>), VfsError> {
        let (parent, last, mut way) = self.mount.walk(NAMES[name]).await?;
        let found = self.mount.lookup(parent, last).await?.attributes;
        way.push(found.inode);
        Ok((found.size, way))
    }

    async fn open(&mut self, slot: usize, name: usize, fresh: bool) -> Outcome {
        self.close(slot);
        let known = self.known[name].clone().filter(|_| !fresh);
        let found = match known {
            Some(known) => Some(known),
            None => self.lookup(name).await?,
        };
        let Some(found) = found else {
            return Ok(());
        };
        let opened = self.mount.vfs.open(found.inode, access(true, false)).await;
        let opened = opened.map_err(|error| format!("opening {}: {error}", NAMES[name]))?;
        if !opened.keep_cache {
            self.pages.drop_of(found.inode);
        }
        self.slots[slot] = Some(Slot {
            handle: opened.handle,
            name,
            found,
        });
        Ok(())
    }

    fn close(&mut self, slot: usize) {
        if let Some(slot) = self.slots[slot].take() {
            self.mount.vfs.release(slot.handle);
        }
    }

    /// The read as it can be made of what is open, or was opened for it.
    async fn placed(&mut self, read: &Read) -> Result<Read, String> {
        if self.slots[read.slot].is_none() {
            self.open(read.slot, read.slot % NAMES.len(), true).await?;
        }
        let size = self.slots[read.slot]
            .as_ref()
            .map_or(0, |slot| slot.found.size);
        let at = read.at % (size + 1);
        Ok(Read { at, ..*read })
    }

    async fn read(&mut self, read: &Read) -> Outcome {
        let Some(slot) = &self.slots[read.slot] else {
            return Ok(());
        };
        let outcome = self.mount.read(slot.handle, read.at, read.length).await;
        self.check(read, outcome)
    }

    async fn read_pages(&mut self, read: &Read) -> Outcome {
        let Some(slot) = &self.slots[read.slot] else {
            return Ok(());
        };
        let end = (read.at + u64::from(read.length)).min(slot.found.size);
        let range = read.at.min(end)..end;
        let file = (slot.found.inode, slot.handle);
        let outcome = self.pages.read(&self.mount, file, range).await;
        self.check(read, outcome)
    }

    /// What was read is of the one version that the file may be, or the reader was told that there
    /// is no more of it.
    fn check(&mut self, read: &Read, outcome: Result<Vec<u8>, VfsError>) -> Outcome {
        let Some(slot) = &mut self.slots[read.slot] else {
            return Ok(());
        };
        let range = read.at..read.at + u64::from(read.length);
        let file = &self.files[slot.name];
        slot.found.versions = file.check(&slot.found.versions, range, outcome)?;
        Ok(())
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Overwrite(name, size) => {
                let bytes = self.files[name].overwrite(size).to_vec();
                self.lab.s3.put(BUCKET, &key(&self.run, name), bytes);
            }
            Change::Delete(name) => {
                self.files[name].delete();
                self.lab.s3.delete(BUCKET, &key(&self.run, name));
            }
        }
    }

    async fn race(&mut self, reads: &[Read], change: Change, held: bool) -> Outcome {
        let mut placed = Vec::new();
        for read in reads {
            placed.push(self.placed(read).await?);
        }
        let before = self.lab.s3.stats().of(Kind::Get).requests;
        if held {
            self.lab.s3.hold(Kind::Get);
        }
        let mut tasks = Vec::new();
        for read in placed {
            let Some(slot) = &self.slots[read.slot] else {
                continue;
            };
            let (vfs, handle) = (Arc::clone(&self.mount.vfs), slot.handle);
            // Copied at once: what is not let go of keeps its memory.
            let task = tokio::spawn(async move {
                let segments = vfs.read(handle, 0, read.at, read.length).await?;
                Ok(segments.pieces().concat())
            });
            tasks.push((read, task));
        }
        if held {
            let asked = || self.lab.s3.stats().of(Kind::Get).requests > before;
            let done = || tasks.iter().all(|(_, task)| task.is_finished());
            until(|| asked() || done()).await;
        }
        self.change(change);
        self.lab.s3.release(Kind::Get);
        for (read, task) in tasks {
            let outcome = task.await.map_err(|error| error.to_string())?;
            self.check(&read, outcome)?;
        }
        Ok(())
    }

    fn forget(&mut self) {
        let open = self.slots.iter().flatten();
        let held: Vec<Inode> = open.flat_map(|slot| slot.found.way.clone()).collect();
        self.mount.forget_all_but(&held);
        self.pages.keep_only(&held);
        for known in &mut self.known {
            if known
                .as_ref()
                .is_some_and(|found| !held.contains(&found.inode))
            {
                *known = None;
            }
        }
    }

    async fn remount(&mut self) {
        (0..SLOTS).for_each(|slot| self.close(slot));
        let reader = Arc::clone(&self.mount.reader);
        let finished = tokio::task::spawn_blocking(move || reader.finish());
        finished.await.expect("the disk cache ends");
        self.memory = Budget::new(self.setting.memory, 0, self.setting.memory / 2, 0);
        self.mount = mount(self.lab, &self.run, self.setting, &self.memory, &self.cache);
        self.pages.drop_all();
        self.known.fill(None);
        self.files.iter_mut().for_each(History::remounted);
    }

    /// Whoever comes later gets what the store has, whatever the disk cache holds.
    async fn finish(mut self) -> Outcome {
        self.remount().await;
        for (name, file) in NAMES.into_iter().zip(&self.files) {
            match (self.mount.content(name).await, file.current()) {
                (Ok(bytes), Some(current)) if bytes == current => {}
                (Err(error), None) if error.errno == libc::ENOENT => {}
                (outcome, _) => {
                    let read = outcome.map(|bytes| bytes.len());
                    return Err(format!("{name} is not what the store has: {read:?}"));
                }
            }
        }
        self.remount().await;
        self.mount.reader.finish();
        Ok(())
    }
}

fn key(run: &str, name: usize) -> String {
    format!("{}/{}", prefix(run), NAMES[name])
}

fn mount(
    lab: &Lab,
    run: &str,
    setting: Setting,
    memory: &Arc<Budget>,
    cache: &tempfile::TempDir,
) -> Mount {
    let ttl = match setting.forever {
        true => Duration::MAX,
        false => Duration::ZERO,
    };
    let disk = DiskOptions {
        directory: cache.path().to_owned(),
        size: setting.disk,
    };
    let memory = Arc::clone(memory);
    Mount::with(&lab.stores, lab.spill.path(), run, ttl, memory, Some(disk))
}

/// Waits for a condition; whoever calls has a limit.
async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
