//! Takes a sequence through the vfs and the reference, and compares them after every step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mlfs::store::Stores;
use mlfs::vfs::{Inode, VfsError};
use mlfs_lab::s3::{Rule, S3Server, ServerOptions};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::mount::{Mount, stores};
use super::operations::{Operation, PART, SLOTS, noise};
use super::reference::{Id, Reference};

/// How long one operation may take before it counts as hung.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub type Outcome = Result<(), String>;

/// What all sequences share.
pub struct Lab {
    pub(super) s3: S3Server,
    stores: Arc<Stores>,
    folder: tempfile::TempDir,
    runtime: Runtime,
    next: AtomicU64,
}

pub(super) struct Slot {
    pub(super) handle: u64,
    pub(super) id: Id,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Inodes the kernel holds while it is open.
    pub(super) held: Vec<Inode>,
}

pub(super) struct Driver<'a> {
    pub(super) lab: &'a Lab,
    pub(super) run: String,
    pub(super) forever: bool,
    pub(super) mount: Mount,
    pub(super) model: Reference,
    pub(super) slots: [Option<Slot>; SLOTS],
    /// Faults may hit this operation.
    pub(super) troubled: bool,
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

    pub(super) fn mount(&self, run: &str, forever: bool) -> Mount {
        let ttl = if forever {
            Duration::MAX
        } else {
            Duration::ZERO
        };
        Mount::new(&self.stores, self.folder.path(), run, ttl)
    }
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

    pub(super) fn calm(&mut self) {
        self.lab.s3.set_faults(1, Vec::new());
        self.troubled = false;
    }

    /// Whether a fault may be the reason.
    pub(super) fn excused<T>(&self, outcome: &Result<T, VfsError>) -> bool {
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
}
