//! Files that are to be on local disk before they are read.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Vfs;
use super::error::{VfsError, VfsResult};
use super::handles::OrderHandle;
use super::tree::Inode;
use crate::read::Segments;

/// What is written to `.mlfs/prefetch`: bytes of a file, which whoever asks has open. The next read
/// of the same descriptor fetches them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Prefetch {
    pub inode: Inode,
    pub offset: u64,
    pub length: u64,
}

/// What a read says of what it has done.
const DONE: &[u8] = b"done\n";

impl OrderHandle {
    /// Keeps what is wanted, for a read to do.
    pub(super) fn want(&self, order: &[u8]) -> VfsResult<()> {
        let order = serde_json::from_slice(order).map_err(|_| VfsError::INVALID)?;
        *self.wanted.lock() = Some(order);
        Ok(())
    }
}

impl Vfs {
    /// Does what was written, once; nothing to be read when there is nothing to be done.
    pub(super) async fn do_wanted(&self, handle: &OrderHandle) -> VfsResult<Segments> {
        let wanted = handle.wanted.lock().take();
        let mut answer = Segments::default();
        if let Some(wanted) = wanted {
            self.prefetch(wanted).await?;
            answer.push(Bytes::from_static(DONE));
        }
        Ok(answer)
    }

    /// Puts bytes of a stored file into the disk cache. Of a file that is not stored, all is here.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without a disk cache, or with one that has failed; `ENOSPC` when it has no room;
    /// the store's.
    async fn prefetch(&self, wanted: Prefetch) -> VfsResult<()> {
        let file = self.file(wanted.inode)?;
        let target = self.target(wanted.inode).await?;
        let reader = {
            let mut state = file.state();
            match state.draft {
                Some(_) => None,
                None => self.reader_of(&mut state, &target),
            }
        };
        let Some(reader) = reader else {
            return Ok(());
        };
        let end = wanted.offset.saturating_add(wanted.length);
        match reader.warm(wanted.offset..end).await? {
            Some(0) => Ok(()),
            Some(_) => Err(VfsError::plain(libc::ENOSPC)),
            None => Err(VfsError::plain(libc::EOPNOTSUPP)),
        }
    }
}
