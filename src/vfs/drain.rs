//! Getting everything that was written into the store, or at least onto the disk.

use std::sync::Arc;

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
                self.retry_file(inode, file);
            }
        }
        self.send_resumed();
        self.recover_more();
    }

    /// Puts what is not stored on disk, where the next mount goes on with it. Returns the paths of
    /// those for which that could not be done, and why.
    pub async fn keep_pending(&self) -> Vec<(String, String)> {
        let mut lost = Vec::new();
        for (inode, file) in self.dirty_files() {
            let (draft, closed) = {
                let state = file.state();
                (state.draft.clone(), state.writers == 0)
            };
            let Some(draft) = draft else { continue };
            if let Err(error) = draft.keep(closed).await {
                lost.push((self.path(inode), error.to_string()));
            }
        }
        self.keep_files();
        lost
    }

    /// The mount is about to end: what cannot be stored now is left to the next one.
    pub fn end(&self) {
        self.writer.end();
    }

    /// Files of the spill directory stay from now on, whoever lets go of them.
    pub fn keep_files(&self) {
        self.writer.keep();
    }
}
