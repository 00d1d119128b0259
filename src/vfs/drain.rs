//! Getting everything that was written into the store.

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
                self.publish_in_background(inode, file);
            }
        }
    }
}
