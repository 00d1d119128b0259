//! Comparing: an answer with the reference's, the store with what was closed, and, at the end,
//! everything with everything.

use std::time::Duration;

use mlfs::vfs::VfsError;
use tokio::time::{Instant, sleep};

use super::driver::{Driver, Outcome, PATIENCE};
use super::mount::{BUCKET, prefix};
use super::operations::SLOTS;
use super::reference::Id;

/// Compares what the vfs answered with what the reference says.
pub(super) fn compare<T>(
    what: &str,
    told: Result<T, VfsError>,
    expected: Result<(), i32>,
) -> Outcome {
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
pub(super) fn is_gone(error: &VfsError) -> bool {
    matches!(error.errno, libc::ENOENT | libc::ESTALE)
}

pub(super) fn require(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what()) }
}

/// Where two contents first differ, for messages.
pub(super) fn difference(told: &[u8], expected: &[u8]) -> String {
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
    pub(super) async fn drain(&mut self) -> Outcome {
        self.mount.vfs.begin_drain();
        let ids: Vec<Id> = self.model.files.values().copied().collect();
        for id in ids {
            self.settled(id).await?;
        }
        Ok(())
    }

    /// What the store shows under each name is what was last closed there, whole.
    pub(super) fn check_store(&self) -> Outcome {
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
    pub(super) async fn check_sizes(&mut self) -> Outcome {
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
    pub(super) async fn finish(&mut self) -> Outcome {
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
        // Of this sequence: one that failed before, with its mount, may have left some.
        let below = prefix(&self.run);
        while self.lab.s3.uploads_below(&below) > 0 {
            require(Instant::now() < deadline, || {
                let left = self.lab.s3.uploads_below(&below);
                format!("{left} uploads left behind")
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
