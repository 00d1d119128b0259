//! Files that the kernel reads from local disk by itself (`FOPEN_PASSTHROUGH`).

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};

use fuser::{BackingId, FileHandle, FopenFlags, InitFlags, KernelConfig, ReplyOpen};
use parking_lot::Mutex;

use super::convert::open_flags;
use crate::vfs::{Inode, Opened, Vfs};

/// The kernel's numbers of local files, which live as long as a handle is open.
#[derive(Debug, Default)]
pub(super) struct Backing {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    handles: HashMap<u64, Arc<BackingId>>,
    /// All handles of an inode must have the same.
    inodes: HashMap<Inode, Weak<BackingId>>,
}

/// Asks the kernel for it. A file system that is itself stacked on another cannot hold the files, and
/// one more can be stacked on the mount.
pub(super) fn ask(config: &mut KernelConfig) {
    if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
        // One is always allowed.
        let _ = config.set_max_stack_depth(1);
    }
}

impl Backing {
    /// Answers an open; where the kernel does not take the local file, as if there were none.
    pub fn answer(&self, vfs: &Vfs, inode: Inode, opened: &Opened, reply: ReplyOpen) {
        let handle = FileHandle(opened.handle);
        let Some(local) = &opened.local else {
            return reply.opened(handle, open_flags(opened));
        };
        match self.register(inode, opened.handle, || reply.open_backing(local)) {
            // With any other flag the kernel fails the open.
            Ok(backing) => reply.opened_passthrough(handle, FopenFlags::empty(), &backing),
            Err(error) => {
                vfs.not_local(opened.handle, &error);
                reply.opened(handle, open_flags(opened));
            }
        }
    }

    fn register(
        &self,
        inode: Inode,
        handle: u64,
        open: impl FnOnce() -> io::Result<BackingId>,
    ) -> io::Result<Arc<BackingId>> {
        let mut state = self.state.lock();
        let known = state.inodes.get(&inode).and_then(Weak::upgrade);
        let backing = match known {
            Some(backing) => backing,
            None => Arc::new(open()?),
        };
        state.inodes.insert(inode, Arc::downgrade(&backing));
        state.handles.insert(handle, Arc::clone(&backing));
        Ok(backing)
    }

    /// The handle is closed.
    pub fn release(&self, inode: Inode, handle: u64) {
        let mut state = self.state.lock();
        if state.handles.remove(&handle).is_some() {
            let known = state.inodes.get(&inode);
            if known.is_some_and(|backing| backing.strong_count() == 0) {
                state.inodes.remove(&inode);
            }
        }
    }
}
