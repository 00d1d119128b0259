//! Files that are whole in the disk cache, or lie in a local directory: the kernel can read them
//! there by itself.
//!
//! Only where nobody writes, on a mount that is read-only: a handle whose reads go to the disk cache
//! would not see what another writes. The kernel serves all handles of an inode that way or none.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Vfs;
use super::file::FileState;
use super::handles::FileHandle;
use crate::write::Target;

/// Whether the kernel has been asked, and what it said.
#[derive(Debug, Default)]
pub(super) struct Local {
    /// Handles that were opened so.
    opened: AtomicU64,
    refused: AtomicU64,
}

impl Local {
    /// Handles that the kernel serves, or served, from local disk.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }
}

impl Vfs {
    /// Whether there can be such files.
    pub fn may_be_local(&self) -> bool {
        self.options.read_only
    }

    /// What the next handle is to be served from; counts it.
    pub(super) fn local_bytes(&self, state: &mut FileState, target: &Target) -> Option<Arc<File>> {
        let others = state.handles > state.local;
        let refused = self.local.refused.load(Ordering::Relaxed) > 0;
        if !self.options.read_only || others || (refused && state.local == 0) {
            return None;
        }
        if state.local_bytes.is_none() {
            state.local_bytes = self.reader_of(state, target)?.on_disk();
        }
        let bytes = state.local_bytes.clone()?;
        state.local += 1;
        self.local.opened.fetch_add(1, Ordering::Relaxed);
        Some(bytes)
    }

    /// The kernel cannot read the local bytes of `handle`, which was just opened: it is served like
    /// any other, and so will be whatever is opened from now on.
    pub fn not_local(&self, handle: u64, error: &std::io::Error) {
        if self.local.refused.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::info!(%error, "files that are whole on local disk are read through mlfs, not by \
                the kernel alone");
        }
        if let Ok(handle) = self.handles.file(handle) {
            self.local.opened.fetch_sub(1, Ordering::Relaxed);
            self.close_local(&mut handle.file.state(), &handle);
        }
    }

    /// The handle is closed, or served otherwise.
    pub(super) fn close_local(&self, state: &mut FileState, handle: &FileHandle) {
        if handle.local.swap(false, Ordering::Relaxed) {
            state.local -= 1;
            if state.local == 0 {
                state.local_bytes = None;
            }
        }
    }
}
