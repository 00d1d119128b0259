//! Listing directories, page by page, as the reader asks.

use std::sync::Arc;

use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::directory::{Entry, Name, Present};
use super::error::{VfsError, VfsResult};
use super::listing::Pages;
use super::lookup::{exists_locally, listed_node};
use super::tree::{CONTROL, CONTROLS, Inode, Kind, branches};
use super::{EntryAttributes, FileInfo, FileKind, Vfs};
use crate::catalog::{BranchListing, Item, RootId, RunListing};

/// One name of a listing.
#[derive(Clone, Debug)]
pub struct Listed {
    pub name: Name,
    pub entry: Entry,
    /// What the catalog has under that name, where it is no name of a store's.
    pub(super) item: Option<Box<Item>>,
    /// When it was asked for: it is believed for the TTL from then on.
    pub(super) at: Instant,
}

/// Names from a position of an open directory on; empty at its end. The directory waits while this
/// is looked at.
#[derive(Debug)]
pub struct Batch {
    stream: OwnedMutexGuard<Stream>,
    from: usize,
}

/// An open directory: what was listed so far, and how to go on.
#[derive(Debug)]
pub(super) struct DirectoryStream {
    inode: Inode,
    state: Arc<tokio::sync::Mutex<Stream>>,
}

#[derive(Debug, Default)]
struct Stream {
    listed: Vec<Listed>,
    source: StreamSource,
}

#[derive(Debug, Default)]
enum StreamSource {
    #[default]
    Unopened,
    Runs(RunListing),
    Branch(BranchListing),
    /// Names of the run's models come first, and count.
    Store(Pages, Vec<Name>),
    Finished,
}

impl Batch {
    pub fn listed(&self) -> &[Listed] {
        self.stream.listed.get(self.from..).unwrap_or_default()
    }
}

impl Listed {
    fn of_item(name: Name, item: Item, at: Instant) -> Self {
        Self {
            name,
            entry: Entry::Directory,
            item: Some(Box::new(item)),
            at,
        }
    }

    pub fn kind(&self) -> FileKind {
        match self.item.as_deref() {
            Some(Item::Link(..)) => FileKind::Link,
            Some(Item::Branch(..) | Item::Root(_)) => FileKind::Directory,
            None => self.entry.kind(),
        }
    }
}

impl From<Present> for Listed {
    fn from(present: Present) -> Self {
        Self {
            name: present.name,
            entry: present.entry,
            item: None,
            at: present.at,
        }
    }
}

impl DirectoryStream {
    fn new(inode: Inode) -> Arc<Self> {
        Arc::new(Self {
            inode,
            state: Arc::default(),
        })
    }
}

impl Vfs {
    pub fn open_directory(&self, inode: Inode) -> VfsResult<u64> {
        let tree = self.tree.lock();
        let node = tree.get(inode).ok_or(VfsError::STALE)?;
        if !node.is_directory() {
            return Err(VfsError::NOT_DIRECTORY);
        }
        Ok(self.handles.add_directory(DirectoryStream::new(inode)))
    }

    pub fn release_directory(&self, handle: u64) {
        self.handles.remove(handle);
    }

    /// The inode above, for `..`.
    pub fn parent(&self, inode: Inode) -> Inode {
        self.tree
            .lock()
            .get(inode)
            .map_or(super::ROOT, |node| node.parent)
    }

    /// Names from position `from` on, listed `anew` or as they were at the last call.
    pub async fn read_directory(&self, handle: u64, from: usize, anew: bool) -> VfsResult<Batch> {
        let stream = self.handles.directory(handle)?;
        let mut state = Arc::clone(&stream.state).lock_owned().await;
        if anew && !state.listed.is_empty() {
            *state = Stream::default();
        }
        while state.listed.len() <= from && !matches!(state.source, StreamSource::Finished) {
            self.advance(stream.inode, &mut state).await?;
        }
        Ok(Batch {
            stream: state,
            from,
        })
    }

    async fn advance(&self, inode: Inode, stream: &mut Stream) -> VfsResult<()> {
        match &mut stream.source {
            StreamSource::Finished => {}
            StreamSource::Unopened => self.begin(inode, stream).await?,
            StreamSource::Runs(runs) => {
                let at = Instant::now();
                match runs.next_page().await? {
                    Some(page) => stream.listed.extend(page.into_iter().map(|run| {
                        let name = Arc::clone(run.id.name());
                        Listed::of_item(name, Item::Root(run), at)
                    })),
                    None => stream.source = StreamSource::Finished,
                }
            }
            StreamSource::Branch(names) => {
                let at = Instant::now();
                match names.next_page().await? {
                    Some(page) => stream.listed.extend(
                        page.into_iter()
                            .map(|(name, item)| Listed::of_item(name, item, at)),
                    ),
                    None => stream.source = StreamSource::Finished,
                }
            }
            StreamSource::Store(pages, models) => {
                let present = pages.next().await?;
                let present = present.into_iter().filter(|it| !models.contains(&it.name));
                stream.listed.extend(present.map(Listed::from));
                if pages.finished {
                    // First: what is published meanwhile is among those that are known then.
                    let local = self.local_names(inode);
                    let others = pages.end().into_iter();
                    let others = others.filter(|it| !models.contains(&it.name));
                    stream.listed.extend(others.map(Listed::from));
                    let missing = local
                        .into_iter()
                        .filter(|it| !pages.has(&it.name) && !models.contains(&it.name));
                    stream.listed.extend(missing);
                    stream.source = StreamSource::Finished;
                }
            }
        }
        Ok(())
    }

    async fn begin(&self, inode: Inode, stream: &mut Stream) -> VfsResult<()> {
        let kind = self.tree.lock().get(inode).map(|node| node.kind.clone());
        match kind.ok_or(VfsError::STALE)? {
            Kind::Root => {
                let at = Instant::now();
                stream.listed = branches()
                    .map(|(name, branch)| {
                        let item = Item::Branch(branch, self.started);
                        Listed::of_item(name.into(), item, at)
                    })
                    .collect();
                stream.source = StreamSource::Runs(self.catalog.list_runs());
            }
            Kind::Documents(id) => {
                let documents = id.documents().iter();
                stream.listed = documents.map(|(name, _)| document(name)).collect();
                stream.source = StreamSource::Finished;
            }
            Kind::Branch(branch) => {
                stream.source = StreamSource::Branch(self.catalog.list(&branch));
            }
            Kind::Control => {
                let tree = self.tree.lock();
                stream.listed = tree.get(CONTROL).map_or_else(Vec::new, |_| control_names());
                stream.source = StreamSource::Finished;
            }
            kind @ (Kind::Artifacts(..) | Kind::Directory(_)) => {
                let place = self.place(inode).await?;
                let mut models = Vec::new();
                if let Kind::Artifacts(root, _) = &kind
                    && let RootId::Run(run_id) = &root.id
                {
                    let at = Instant::now();
                    for (name, item) in self.catalog.models_of_run(run_id).await.iter() {
                        models.push(Arc::clone(name));
                        let listed = Listed::of_item(Arc::clone(name), item.clone(), at);
                        stream.listed.push(listed);
                    }
                }
                let ttl = self.options.metadata_ttl;
                // First: what is published meanwhile is among those that are known then.
                let mut local = self.local_names(inode);
                let known = place.directory.names.lock().complete(ttl);
                stream.source = match known {
                    None => StreamSource::Store(Pages::of(self.begin_listing(&place)), models),
                    Some(known) => {
                        local.retain(|it| {
                            let found = known.binary_search_by(|known| known.name.cmp(&it.name));
                            found.is_err()
                        });
                        local.splice(0..0, known.into_iter().map(Listed::from));
                        local.retain(|it| !models.contains(&it.name));
                        stream.listed.append(&mut local);
                        StreamSource::Finished
                    }
                };
            }
            _ => return Err(VfsError::NOT_DIRECTORY),
        }
        Ok(())
    }

    /// What exists only here: unpublished files and local directories.
    fn local_names(&self, inode: Inode) -> Vec<Listed> {
        let tree = self.tree.lock();
        let Some(node) = tree.get(inode) else {
            return Vec::new();
        };
        let at = Instant::now();
        let local = node.children.iter().filter_map(|(name, child)| {
            let entry = match tree.get(*child).map(|node| &node.kind) {
                Some(Kind::File(file)) if file.is_dirty() => {
                    let (size, modified) = file.size_and_time();
                    Entry::File(FileInfo {
                        size,
                        etag: None,
                        modified,
                    })
                }
                Some(Kind::Directory(_)) if exists_locally(&tree, *child) => Entry::Directory,
                _ => return None,
            };
            Some(Listed {
                name: Arc::clone(name),
                entry,
                item: None,
                at,
            })
        });
        local.collect()
    }

    /// Offers the attributes of listed names, with their place in the list, to `take`, one after the
    /// other, until that says that it had no room for one. A lookup of each that was taken is
    /// counted.
    pub fn offer_attributes(
        &self,
        parent: Inode,
        listed: &[Listed],
        mut take: impl FnMut(usize, &Listed, &EntryAttributes) -> bool,
    ) {
        let ttl = self.options.metadata_ttl;
        let now = Instant::now();
        let mut tree = self.tree.lock();
        for (index, it) in listed.iter().enumerate() {
            let Some((inode, at)) = listed_node(&mut tree, parent, it) else {
                continue;
            };
            let Some(node) = tree.get(inode) else {
                continue;
            };
            let believed = ttl.saturating_sub(now.duration_since(at));
            if !take(index, it, &self.describe(inode, node, believed)) {
                tree.reap(inode);
                return;
            }
            tree.add_lookup(inode);
        }
    }
}

fn control_names() -> Vec<Listed> {
    let names = CONTROLS.into_iter().map(|(name, _, _)| name);
    names.map(document).collect()
}

/// A file that is made when it is opened.
fn document(name: &str) -> Listed {
    Listed {
        name: name.into(),
        entry: Entry::File(FileInfo {
            size: 0,
            etag: None,
            modified: std::time::SystemTime::UNIX_EPOCH,
        }),
        item: None,
        at: Instant::now(),
    }
}
