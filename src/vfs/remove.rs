//! Making directories, and taking files and directories away.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::closing::Item;
use super::error::{VfsError, VfsResult};
use super::file::File;
use super::lookup::{Place, exists_locally, item_node};
use super::names;
use super::tree::{Inode, Kind, ROOT};
use super::{EntryAttributes, Vfs};
use crate::catalog::{self, Branch};
use crate::store::PageStart;
use crate::write::Target;

/// For so long the name of a run that was made is the run's directory itself.
const JUST_MADE: Duration = Duration::from_secs(1);

impl Vfs {
    /// Makes a directory. It lives here until a file is in it: stores know no empty ones.
    pub async fn make_directory(&self, parent: Inode, name: &OsStr) -> VfsResult<EntryAttributes> {
        self.check_writable()?;
        let name = names::from_kernel(name)?;
        match self.resolve(parent, name).await {
            Ok(_) => return Err(VfsError::EXISTS),
            Err(error) if error.errno == libc::ENOENT => {}
            Err(error) => return Err(error),
        }
        if let Kind::Branch(branch) = self.kind(parent)? {
            return self.make_in_branch(parent, &branch, name).await;
        }
        let place = self.writable_place(parent).await?;
        names::check_key(&place.location.store, &place.key(name))?;
        let mut tree = self.tree.lock();
        if tree.child(parent, name).is_some() {
            return Err(VfsError::EXISTS);
        }
        let kind = Kind::Directory(Arc::default());
        let now = SystemTime::now();
        let inode = tree.insert(parent, name, kind, now);
        tree.touch_directory(parent, now);
        if let Some(node) = tree.get_mut(inode) {
            node.local = true;
        }
        tree.add_lookup(inode);
        let node = tree.get(inode).ok_or(VfsError::STALE)?;
        Ok(self.describe(inode, node, self.options.metadata_ttl))
    }

    /// Makes an experiment, or a run.
    async fn make_in_branch(
        &self,
        parent: Inode,
        branch: &Branch,
        name: &str,
    ) -> VfsResult<EntryAttributes> {
        let made = match branch {
            // Names of models are given when versions are made.
            Branch::Models | Branch::Versions(_) => return Err(VfsError::NOT_PERMITTED),
            Branch::Experiments | Branch::Experiment(_) => self.catalog.make(branch, name).await?,
        };
        let mut tree = self.tree.lock();
        let inode = match &made {
            // The kernel wants a directory now, and whoever makes more of them below enters it at once; the
            // name is a link to it when it is looked up next.
            catalog::Item::Root(run) => item_node(&mut tree, ROOT, run.id.name(), &made),
            _ => item_node(&mut tree, parent, name, &made),
        };
        tree.add_lookup(inode);
        let node = tree.get(inode).ok_or(VfsError::STALE)?;
        Ok(self.describe(inode, node, JUST_MADE))
    }

    /// Removes an empty directory.
    pub async fn remove_directory(&self, parent: Inode, name: &OsStr) -> VfsResult<()> {
        self.check_writable()?;
        let name = names::from_kernel(name)?;
        let (inode, _) = self.resolve(parent, name).await?;
        let kind = self.kind(inode)?;
        if !matches!(kind, Kind::Directory(_)) {
            return Err(match kind {
                Kind::File(_) | Kind::Link(_) => VfsError::NOT_DIRECTORY,
                _ => VfsError::NOT_PERMITTED,
            });
        }
        let place = self.writable_place(parent).await?;
        self.check_empty(inode, &place, name).await?;
        let marker = format!("{}/", place.key(name));
        if self.marker_exists(&place, &marker).await? {
            place.location.store.delete(&[marker]).await?;
        }
        place.directory.names.lock().change(name, None);
        let mut tree = self.tree.lock();
        tree.unlink(parent, name);
        keep_directory(&mut tree, parent);
        Ok(())
    }

    pub(super) fn kind(&self, inode: Inode) -> VfsResult<Kind> {
        self.tree
            .lock()
            .get(inode)
            .map(|node| node.kind.clone())
            .ok_or(VfsError::STALE)
    }

    /// Fails unless neither the store nor this mount has anything in the directory.
    pub(super) async fn check_empty(
        &self,
        inode: Inode,
        parent: &Place,
        name: &str,
    ) -> VfsResult<()> {
        {
            let tree = self.tree.lock();
            let node = tree.get(inode).ok_or(VfsError::STALE)?;
            let occupied =
                node.children
                    .values()
                    .any(|child| match tree.get(*child).map(|node| &node.kind) {
                        Some(Kind::File(file)) => file.is_dirty(),
                        _ => exists_locally(&tree, *child),
                    });
            if occupied {
                return Err(VfsError::NOT_EMPTY);
            }
        }
        let prefix = format!("{}/", parent.key(name));
        let page = parent
            .location
            .store
            .list(&prefix, true, PageStart::First, Some(2))
            .await?;
        let occupied =
            page.objects.iter().any(|object| object.key != prefix) || !page.prefixes.is_empty();
        if occupied {
            Err(VfsError::NOT_EMPTY)
        } else {
            Ok(())
        }
    }

    async fn marker_exists(&self, place: &Place, marker: &str) -> VfsResult<bool> {
        let page = place
            .location
            .store
            .list(marker, true, PageStart::First, Some(1))
            .await?;
        Ok(page.objects.iter().any(|object| object.key == marker))
    }

    /// Removes a file. What is open and unpublished of it can still be used, and is never
    /// published.
    pub async fn unlink(self: &Arc<Self>, parent: Inode, name: &OsStr) -> VfsResult<()> {
        self.check_writable()?;
        let name = names::from_kernel(name)?;
        let (inode, _) = self.resolve(parent, name).await?;
        let file = match self.kind(inode)? {
            Kind::File(file) => file,
            Kind::Status | Kind::Order(_) | Kind::Link(_) | Kind::Document(..) => {
                return Err(VfsError::NOT_PERMITTED);
            }
            _ => return Err(VfsError::IS_DIRECTORY),
        };
        let place = self.writable_place(parent).await?;
        let _moving = file.moving.lock().await;
        if file.state().published.is_some() {
            place.location.store.delete(&[place.key(name)]).await?;
        }
        self.detach(&file, &place.target(name)).await;
        place.directory.names.lock().change(name, None);
        {
            let mut tree = self.tree.lock();
            tree.unlink(parent, name);
            keep_directory(&mut tree, parent);
        }
        self.dropped(&Item::File(inode));
        Ok(())
    }

    /// The file has no name any more: nothing of it will be published.
    pub(super) async fn detach(&self, file: &File, target: &Target) {
        let draft = {
            let mut state = file.state();
            if state.handles > 0 && state.draft.is_none() {
                // Who has it open goes on to see this version of it.
                self.reader_of(&mut state, target);
            }
            state.published = None;
            state.unlinked = true;
            state.draft.clone()
        };
        if let Some(draft) = draft {
            draft.detach().await;
        }
        let mut state = file.state();
        if state.handles == 0 {
            // What was kept of it, because it could not be stored, is not needed any more.
            state.draft = None;
        }
    }
}

/// A directory outlives the last file in it.
pub(super) fn keep_directory(tree: &mut super::tree::Tree, inode: Inode) {
    if let Some(node) = tree.get_mut(inode)
        && matches!(node.kind, Kind::Directory(_))
    {
        node.local = true;
        node.modified = SystemTime::now();
    }
}
