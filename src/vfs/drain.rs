//! Getting everything that was written into the store.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

use super::Vfs;
use super::file::File;
use super::tree::Inode;

impl Vfs {
    /// Files that the store lacks something of.
    pub(super) fn dirty_files(&self) -> Vec<(Inode, Arc<File>)> {
        let files = self.tree.lock().files();
        files
            .into_iter()
            .filter(|(_, file)| file.is_dirty())
            .collect()
    }

    /// Starts publishing every closed file that is not wholly in the store; returns at once.
    /// Files that are open for writing are published by their close.
    pub fn begin_drain(self: &Arc<Self>) {
        for (inode, file) in self.dirty_files() {
            let idle = {
                let state = file.state();
                state.writers == 0 && state.publishing == 0
            };
            if idle {
                self.publish_in_background(inode, file);
            }
        }
    }

    /// Writes what could not be stored into plain files below `folder`, under the paths they have
    /// in the mount, so that nothing is lost when the mount ends. Returns where each went.
    pub async fn keep_pending(&self, folder: &Path) -> Vec<(String, anyhow::Result<PathBuf>)> {
        let mut kept = Vec::new();
        for (inode, file) in self.dirty_files() {
            let path = self.path(inode);
            let target = folder.join(&path);
            let outcome = keep(&file, &target).await.map(|()| target);
            kept.push((path, outcome));
        }
        kept
    }
}

/// Bytes copied at once.
const STEP: u64 = 4 << 20;

async fn keep(file: &File, target: &Path) -> anyhow::Result<()> {
    let draft = file
        .state()
        .draft
        .clone()
        .context("it is not being written")?;
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut copy = std::fs::File::create(target)?;
    let mut offset = 0;
    loop {
        let piece = draft.read(offset, STEP).await?;
        if piece.is_empty() {
            break;
        }
        for bytes in piece.pieces() {
            copy.write_all(bytes)?;
        }
        offset += piece.len() as u64;
    }
    Ok(copy.sync_all()?)
}
