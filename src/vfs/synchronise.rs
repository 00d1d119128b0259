//! fsync, of a file and of a directory.

use std::sync::Arc;
use std::time::Duration;

use super::CloseMode;
use super::Vfs;
use super::closing::Item;
use super::error::{VfsError, VfsResult};
use super::file::File;
use super::queue::Standing;
use super::tree::Inode;

/// How often what is waited for is looked at, if nobody says that it has moved.
const LOOK: Duration = Duration::from_secs(1);

/// What fsync of a directory has to wait for.
enum Stored {
    Yes,
    NotYet,
    Never(VfsError),
}

impl Vfs {
    /// Makes what was written durable on local disk. Where close does not wait for the store, this
    /// also tells that the file failed to get there.
    pub async fn synchronise(&self, handle: u64) -> VfsResult<()> {
        let Ok(handle) = self.handles.file(handle) else {
            return Ok(());
        };
        let (draft, failed) = {
            let state = handle.file.state();
            (state.draft.clone(), state.failed.clone())
        };
        if let Some(draft) = draft {
            draft.synchronise().await?;
        }
        match failed {
            Some(error) if self.options.close == CloseMode::Journaled => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until every file below that is closed by now is in the store. Files that are open for
    /// writing, and manifests that wait for those, do not hold it up.
    ///
    /// # Errors
    /// Why one of them could not be stored.
    pub async fn synchronise_directory(&self, inode: Inode) -> VfsResult<()> {
        let files = self.tree.lock().files_below(inode);
        let closed = |(_, file): &(Inode, Arc<File>)| is_closed(file);
        let files: Vec<_> = files.into_iter().filter(closed).collect();
        let former = self.uploads.below(&self.path(inode));
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            let files = files
                .iter()
                .map(|(inode, file)| self.is_stored(*inode, file));
            let former = former.iter().map(|id| self.is_former_stored(id));
            let mut failure = None;
            let mut waits = false;
            for stored in files.chain(former) {
                match stored {
                    Stored::Yes => {}
                    Stored::NotYet => waits = true,
                    Stored::Never(error) => failure = failure.or(Some(error)),
                }
            }
            match failure {
                _ if waits => {}
                Some(error) => return Err(error),
                None => return Ok(()),
            }
            // However it ends, it ends: what is tried is stored or fails in the end.
            let _ = tokio::time::timeout(LOOK, settled).await;
        }
    }

    fn is_stored(&self, inode: Inode, file: &File) -> Stored {
        if !is_closed(file) {
            return Stored::Yes;
        }
        let item = Item::File(inode);
        let (standing, stuck) = self.standing(&item);
        match standing {
            Some(Standing::Waiting) if stuck => Stored::Never(VfsError::plain(libc::EIO)),
            Some(Standing::Waiting) if self.waits_for_open(&item) => Stored::Yes,
            Some(Standing::Waiting | Standing::Trying) => Stored::NotYet,
            Some(Standing::Failed) | None => {
                let state = file.state();
                match &state.failed {
                    Some(error) if state.publishing == 0 => Stored::Never(error.clone()),
                    _ => Stored::NotYet,
                }
            }
        }
    }

    fn is_former_stored(&self, id: &str) -> Stored {
        let item = Item::Former(id.to_owned());
        match self.standing(&item) {
            (None, _) => Stored::Yes,
            (Some(Standing::Waiting), true) => Stored::Never(VfsError::plain(libc::EIO)),
            (Some(Standing::Waiting), _) if self.waits_for_open(&item) => Stored::Yes,
            (Some(Standing::Waiting | Standing::Trying), _) => Stored::NotYet,
            (Some(Standing::Failed), _) if self.uploads.was_closed(id) => {
                Stored::Never(VfsError::plain(libc::EIO))
            }
            // What its writer never closed is no closed file.
            (Some(Standing::Failed), _) => Stored::Yes,
        }
    }
}

/// Whether a file is dirty and nobody writes to it.
fn is_closed(file: &File) -> bool {
    file.is_dirty() && file.state().writers == 0
}
