//! Renaming files and directories.
//!
//! What is not published yet just gets another name to be published under. What is published is
//! copied inside the store and deleted under its old name: the copy first, so that at every
//! moment one of the two names has the whole file. Of a directory, what makes it loadable is copied
//! last and deleted first.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::MutexGuard;

use super::Vfs;
use super::closing::Item;
use super::directory::{Entry, FileInfo};
use super::error::{VfsError, VfsResult};
use super::file::File;
use super::lookup::Place;
use super::names;
use super::queue::Rank;
use super::remove::keep_directory;
use super::tree::{Inode, Kind};
use crate::read::Source;
use crate::store::{ObjectMeta, PageStart, Store};
use crate::write::Target;

/// Objects of one directory copied at once.
const COPIES: usize = 32;

/// `renameat2`'s flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    Replace,
    /// `RENAME_NOREPLACE`.
    NoReplace,
}

/// One end of a rename.
struct End<'a> {
    place: Place,
    name: &'a str,
}

impl End<'_> {
    fn key(&self) -> String {
        self.place.key(self.name)
    }

    fn target(&self) -> Target {
        self.place.target(self.name)
    }
}

impl Vfs {
    pub async fn rename(
        self: &Arc<Self>,
        parent: Inode,
        name: &OsStr,
        to_parent: Inode,
        to_name: &OsStr,
        mode: RenameMode,
    ) -> VfsResult<()> {
        self.check_writable()?;
        let name = names::from_kernel(name)?;
        let to_name = names::from_kernel(to_name)?;
        let from = End {
            place: self.writable_place(parent).await?,
            name,
        };
        let to = End {
            place: self.writable_place(to_parent).await?,
            name: to_name,
        };
        if !Arc::ptr_eq(&from.place.location.store, &to.place.location.store) {
            return Err(VfsError::OTHER_STORE);
        }
        names::check_key(&to.place.location.store, &to.key())?;
        let (inode, _) = self.resolve(parent, name).await?;
        let replaced = match self.resolve(to_parent, to_name).await {
            Ok((other, _)) => Some(other),
            Err(error) if error.errno == libc::ENOENT => None,
            Err(error) => return Err(error),
        };
        if replaced.is_some() && mode == RenameMode::NoReplace {
            return Err(VfsError::EXISTS);
        }
        if replaced == Some(inode) {
            return Ok(());
        }
        let replaced = match replaced {
            Some(other) => Some((other, self.kind(other)?)),
            None => None,
        };
        match self.kind(inode)? {
            Kind::File(file) => self.rename_file((inode, &file), replaced, &from, &to).await,
            Kind::Directory(_) => self.rename_directory(inode, replaced, &from, &to).await,
            _ => Err(VfsError::NOT_PERMITTED),
        }
    }

    async fn rename_file(
        self: &Arc<Self>,
        (inode, file): (Inode, &Arc<File>),
        replaced: Option<(Inode, Kind)>,
        from: &End<'_>,
        to: &End<'_>,
    ) -> VfsResult<()> {
        let replaced = match replaced {
            None => None,
            Some((other, Kind::File(file))) => Some((other, file)),
            Some((_, Kind::Link(_) | Kind::Document(..))) => return Err(VfsError::NOT_PERMITTED),
            Some(_) => return Err(VfsError::IS_DIRECTORY),
        };
        // Neither is published meanwhile; locked in one order, as for directories.
        let mut both: Vec<(Inode, &Arc<File>)> = vec![(inode, file)];
        both.extend(replaced.as_ref().map(|(other, file)| (*other, file)));
        both.sort_by_key(|(inode, _)| *inode);
        let path = to.target().path;
        let _moving = loop {
            if !file.is_dirty() {
                self.wait_for_turn(&path).await?;
            }
            let mut moving: Vec<MutexGuard<'_, ()>> = Vec::with_capacity(both.len());
            for (_, file) in &both {
                moving.push(file.moving.lock().await);
            }
            // It may have been stored before it could be locked.
            if file.is_dirty() || self.is_its_turn(&path) {
                break moving;
            }
        };
        let (published, draft) = {
            let state = file.state();
            (state.published.clone(), state.draft.clone())
        };
        let own = draft.as_ref().is_none_or(|draft| draft.was_stored());
        match &published {
            Some(info) if own => self.move_published(file, info, from, to).await?,
            Some(_) => self.delete_covered(file, from).await?,
            None => {}
        }
        if let Some(draft) = draft {
            draft.retarget(to.target()).await;
            self.journal_again(file, &draft).await;
        }
        if let Some((_, other)) = &replaced {
            let covered = other.state().published.clone();
            self.detach(other, &to.target()).await;
            let mut state = file.state();
            // The object of the replaced file stays until this one takes its place.
            state.published = state.published.take().or(covered);
        }
        {
            let mut tree = self.tree.lock();
            tree.rename(from.place.inode, from.name, to.place.inode, to.name);
            keep_directory(&mut tree, from.place.inode);
            tree.touch_directory(to.place.inode, SystemTime::now());
        }
        if let Some((other, _)) = &replaced {
            self.dropped(&Item::File(*other));
        }
        self.moved(inode);
        Ok(())
    }

    /// Under the old name is what a file left that this one replaced, unpublished: it goes.
    async fn delete_covered(&self, file: &File, from: &End<'_>) -> VfsResult<()> {
        let store = &from.place.location.store;
        store.delete(&[from.key()]).await?;
        let mut names = from.place.directory.names.lock();
        names.change(from.name, None);
        file.state().published = None;
        Ok(())
    }

    /// Moves the object of a published file, and points its readers to the new place.
    async fn move_published(
        &self,
        file: &File,
        info: &FileInfo,
        from: &End<'_>,
        to: &End<'_>,
    ) -> VfsResult<()> {
        let store = &from.place.location.store;
        let source = object(&from.key(), info);
        let moved = copy(store, &source, &to.key()).await?;
        let entry = Entry::File(moved.clone());
        to.place.directory.names.lock().change(to.name, Some(entry));
        store.delete(&[source.key]).await?;
        from.place.directory.names.lock().change(from.name, None);
        self.repoint(file, store, &to.key(), &moved);
        Ok(())
    }

    fn repoint(&self, file: &File, store: &Arc<dyn Store>, key: &str, moved: &FileInfo) {
        let source = Source {
            store: Arc::clone(store),
            key: key.to_owned(),
            etag: moved.etag.clone(),
            size: moved.size,
        };
        let mut state = file.state();
        state.published = Some(moved.clone());
        if let Some(reader) = &state.reader {
            reader.repoint(source.clone());
        }
        if let Some(draft) = &state.draft {
            draft.repoint_base(source);
        }
    }

    async fn rename_directory(
        self: &Arc<Self>,
        inode: Inode,
        replaced: Option<(Inode, Kind)>,
        from: &End<'_>,
        to: &End<'_>,
    ) -> VfsResult<()> {
        let below = format!("{}/", from.key());
        let onto = format!("{}/", to.key());
        if onto.starts_with(&below) {
            return Err(VfsError::INVALID);
        }
        match replaced {
            None => {}
            Some((other, Kind::Directory(_))) => {
                self.check_empty(other, &to.place, to.name).await?;
            }
            Some(_) => return Err(VfsError::NOT_DIRECTORY),
        }
        let files = {
            let mut files = self.tree.lock().files_below(inode);
            // Always in one order, so that two renames cannot wait for each other.
            files.sort_by_key(|(inode, _)| *inode);
            files
        };
        let mut moving: Vec<MutexGuard<'_, ()>> = Vec::with_capacity(files.len());
        for (_, file) in &files {
            moving.push(file.moving.lock().await);
        }
        let store = &from.place.location.store;
        let objects = all_objects(store, &below).await?;
        let copied = copy_all(store, &objects, &below, &onto).await?;
        let old: Vec<String> = objects.into_iter().map(|object| object.key).collect();
        delete_all(store, old).await?;
        for (file_inode, file) in &files {
            self.retarget_below(*file_inode, file, &below, &to.target(), &copied)
                .await?;
        }
        from.place.directory.names.lock().change(from.name, None);
        if !copied.is_empty() {
            to.place
                .directory
                .names
                .lock()
                .change(to.name, Some(Entry::Directory));
        }
        {
            let mut tree = self.tree.lock();
            forget_listings(&tree, inode);
            tree.rename(from.place.inode, from.name, to.place.inode, to.name);
            keep_directory(&mut tree, inode);
            keep_directory(&mut tree, from.place.inode);
            tree.touch_directory(to.place.inode, SystemTime::now());
        }
        self.moved(inode);
        Ok(())
    }

    /// A file below a directory that moves: its draft and its readers follow.
    async fn retarget_below(
        &self,
        inode: Inode,
        file: &File,
        below: &str,
        onto: &Target,
        copied: &[(String, FileInfo)],
    ) -> VfsResult<()> {
        let Target { store, key, .. } = self.target(inode).await?;
        let Some(relative) = key.strip_prefix(below) else {
            return Ok(());
        };
        let target = Target {
            store,
            key: format!("{}/{relative}", onto.key),
            path: format!("{}/{relative}", onto.path),
        };
        if let Some((_, info)) = copied.iter().find(|(copied, _)| *copied == target.key) {
            self.repoint(file, &target.store, &target.key, info);
        }
        let draft = file.state().draft.clone();
        if let Some(draft) = draft {
            draft.retarget(target).await;
            self.journal_again(file, &draft).await;
        }
        Ok(())
    }
}

fn object(key: &str, info: &FileInfo) -> ObjectMeta {
    ObjectMeta {
        key: key.to_owned(),
        size: info.size,
        etag: info.etag.clone(),
        modified: Some(info.modified),
    }
}

async fn copy(store: &Arc<dyn Store>, source: &ObjectMeta, to: &str) -> VfsResult<FileInfo> {
    let stored = store.copy(source, to).await?;
    Ok(FileInfo {
        size: source.size,
        etag: stored.etag,
        modified: stored
            .modified
            .or(source.modified)
            .unwrap_or_else(std::time::SystemTime::now),
    })
}

async fn all_objects(store: &Arc<dyn Store>, prefix: &str) -> VfsResult<Vec<ObjectMeta>> {
    let mut objects = Vec::new();
    let mut token: Option<String> = None;
    loop {
        let start = token.as_deref().map_or(PageStart::First, PageStart::Token);
        let page = store.list(prefix, false, start, None).await?;
        objects.extend(page.objects);
        token = page.next;
        if token.is_none() {
            return Ok(objects);
        }
    }
}

/// Files in the order in which they may become visible, in stages of which each is complete before
/// the next begins: ordinary ones, then what makes directories loadable, from the innermost out.
fn stages<T>(files: impl IntoIterator<Item = T>, key: impl Fn(&T) -> &str) -> Vec<Vec<T>> {
    let mut stages: BTreeMap<(bool, Reverse<usize>, Rank), Vec<T>> = BTreeMap::new();
    for file in files {
        let key = key(&file);
        let rank = Rank::of(key);
        let depth = if rank.is_manifest() {
            key.matches('/').count()
        } else {
            0
        };
        let stage = (rank.is_manifest(), Reverse(depth), rank);
        stages.entry(stage).or_default().push(file);
    }
    stages.into_values().collect()
}

/// Copies every object; when one cannot be copied, the copies made so far are removed again.
async fn copy_all(
    store: &Arc<dyn Store>,
    objects: &[ObjectMeta],
    below: &str,
    onto: &str,
) -> VfsResult<Vec<(String, FileInfo)>> {
    let pairs = objects.iter().filter_map(|source| {
        let relative = source.key.strip_prefix(below)?;
        Some((source.clone(), format!("{onto}{relative}")))
    });
    let mut copied = Vec::with_capacity(objects.len());
    let mut begun: Vec<String> = Vec::with_capacity(objects.len());
    for stage in stages(pairs, |(source, _)| &source.key) {
        begun.extend(stage.iter().map(|(_, key)| key.clone()));
        let copies = stream::iter(stage).map(|(source, key)| {
            let store = Arc::clone(store);
            async move {
                let info = copy(&store, &source, &key).await?;
                Ok::<_, VfsError>((key, info))
            }
        });
        let outcome: VfsResult<Vec<_>> = copies.buffer_unordered(COPIES).try_collect().await;
        match outcome {
            Ok(stage) => copied.extend(stage),
            Err(error) => {
                if let Err(error) = delete_all(store, begun).await {
                    tracing::warn!(%error,
                        "a directory was not renamed, and copies of its files remain");
                }
                return Err(error);
            }
        }
    }
    Ok(copied)
}

/// Deletes in the opposite order: what is not whole any more is not loadable.
async fn delete_all(store: &Arc<dyn Store>, keys: Vec<String>) -> VfsResult<()> {
    for stage in stages(keys, |key| key).into_iter().rev() {
        store.delete(&stage).await?;
    }
    Ok(())
}

/// What was listed below a directory that moved is asked for again.
fn forget_listings(tree: &super::tree::Tree, inode: Inode) {
    let Some(node) = tree.get(inode) else { return };
    if let Kind::Directory(directory) = &node.kind {
        directory.names.lock().forget();
    }
    for child in node.children.values() {
        forget_listings(tree, *child);
    }
}
