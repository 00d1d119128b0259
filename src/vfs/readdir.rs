//! Listing directories, page by page, as the reader asks.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;

use super::directory::Entry;
use super::error::{VfsError, VfsResult};
use super::lookup::{Place, exists_locally};
use super::names::entries;
use super::tree::{CONTROL, CONTROLS, Inode, Kind};
use super::{EntryAttributes, FileInfo, Vfs};
use crate::catalog::{RunEntry, RunListing};

/// One name of a listing.
#[derive(Clone, Debug)]
pub struct Listed {
    pub name: String,
    pub entry: Entry,
    /// Set for the runs of the root.
    pub run: Option<RunEntry>,
}

/// Names given out by one call at most.
const BATCH: usize = 256;

/// An open directory: what was listed so far, and how to go on.
#[derive(Debug)]
pub(super) struct DirectoryStream {
    inode: Inode,
    state: tokio::sync::Mutex<Stream>,
}

#[derive(Debug)]
struct Stream {
    listed: Vec<Listed>,
    source: StreamSource,
}

#[derive(Debug)]
enum StreamSource {
    Unopened,
    Runs(RunListing),
    Store {
        place: Place,
        token: Option<String>,
        begun: Instant,
        names: BTreeMap<String, Entry>,
    },
    Finished,
}

impl DirectoryStream {
    fn new(inode: Inode) -> Arc<Self> {
        let stream = Stream {
            listed: Vec::new(),
            source: StreamSource::Unopened,
        };
        Arc::new(Self {
            inode,
            state: tokio::sync::Mutex::new(stream),
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The listing was given up halfway: it no longer counts as under way.
        if let StreamSource::Store { place, begun, .. } = &self.source {
            place.directory.names.lock().end_listing(*begun, None);
        }
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

    /// Names from position `from` on; empty at the end. Position 0 begins anew.
    pub async fn read_directory(&self, handle: u64, from: usize) -> VfsResult<Vec<Listed>> {
        let stream = self.handles.directory(handle)?;
        let mut state = stream.state.lock().await;
        if from == 0 && !state.listed.is_empty() {
            *state = Stream {
                listed: Vec::new(),
                source: StreamSource::Unopened,
            };
        }
        while state.listed.len() <= from && !matches!(state.source, StreamSource::Finished) {
            self.advance(stream.inode, &mut state).await?;
        }
        let end = state.listed.len().min(from + BATCH);
        Ok(state.listed.get(from..end).unwrap_or_default().to_vec())
    }

    async fn advance(&self, inode: Inode, stream: &mut Stream) -> VfsResult<()> {
        match &mut stream.source {
            StreamSource::Finished => {}
            StreamSource::Unopened => self.begin(inode, stream).await?,
            StreamSource::Runs(runs) => match runs.next_page().await? {
                Some(page) => stream.listed.extend(page.into_iter().map(|run| Listed {
                    name: run.run_id.clone(),
                    entry: Entry::Directory,
                    run: Some(run),
                })),
                None => stream.source = StreamSource::Finished,
            },
            StreamSource::Store {
                place,
                token,
                names,
                begun,
            } => {
                let prefix = place.prefix();
                let store = &place.location.store;
                let page = store.list(&prefix, true, token.as_deref(), None).await?;
                let mut listed = entries(&prefix, &page);
                let first = token.is_none();
                token.clone_from(&page.next);
                {
                    let mut known = place.directory.names.lock();
                    if first && token.is_some() {
                        known.note_large(*begun);
                    }
                    // What was deleted here meanwhile is not shown; what was made here is added
                    // at the end.
                    let before: HashSet<String> = listed.keys().cloned().collect();
                    known.overlay(&mut listed);
                    listed.retain(|name, _| before.contains(name));
                }
                for (name, entry) in &listed {
                    // A common prefix may be repeated on the next page.
                    if names.insert(name.clone(), entry.clone()).is_none() {
                        stream.listed.push(Listed {
                            name: name.clone(),
                            entry: entry.clone(),
                            run: None,
                        });
                    }
                }
                if token.is_none() {
                    let (directory, begun) = (Arc::clone(&place.directory), *begun);
                    let names = std::mem::take(names);
                    stream.source = StreamSource::Finished;
                    directory.names.lock().end_listing(begun, Some(names));
                    self.add_local(inode, &mut stream.listed);
                }
            }
        }
        Ok(())
    }

    async fn begin(&self, inode: Inode, stream: &mut Stream) -> VfsResult<()> {
        let kind = self.tree.lock().get(inode).map(|node| node.kind.clone());
        match kind.ok_or(VfsError::STALE)? {
            Kind::Root => stream.source = StreamSource::Runs(self.catalog.list_runs()),
            Kind::Control => {
                let tree = self.tree.lock();
                stream.listed = tree.get(CONTROL).map_or_else(Vec::new, |_| control_names());
                stream.source = StreamSource::Finished;
            }
            Kind::Run(..) | Kind::Directory(_) => {
                let place = self.place(inode).await?;
                let known = place
                    .directory
                    .names
                    .lock()
                    .complete(self.options.metadata_ttl);
                if let Some((names, _)) = known {
                    stream.listed = names
                        .into_iter()
                        .map(|(name, entry)| Listed {
                            name,
                            entry,
                            run: None,
                        })
                        .collect();
                    stream.source = StreamSource::Finished;
                    self.add_local(inode, &mut stream.listed);
                    return Ok(());
                }
                place.directory.names.lock().begin_listing();
                stream.source = StreamSource::Store {
                    place,
                    token: None,
                    begun: Instant::now(),
                    names: BTreeMap::new(),
                };
            }
            _ => return Err(VfsError::NOT_DIRECTORY),
        }
        Ok(())
    }

    /// Adds what exists only here: unpublished files and local directories.
    fn add_local(&self, inode: Inode, listed: &mut Vec<Listed>) {
        let tree = self.tree.lock();
        let Some(node) = tree.get(inode) else { return };
        let mut local: BTreeMap<&str, Entry> = BTreeMap::new();
        for (name, child) in &node.children {
            match tree.get(*child).map(|node| &node.kind) {
                Some(Kind::File(file)) if file.is_dirty() => {
                    let (size, modified) = file.size_and_time();
                    local.insert(
                        name,
                        Entry::File(FileInfo {
                            size,
                            etag: None,
                            modified,
                        }),
                    );
                }
                Some(Kind::Directory(_)) if exists_locally(&tree, *child) => {
                    local.insert(name, Entry::Directory);
                }
                _ => {}
            }
        }
        // Published here since the listing began.
        let directory = match &node.kind {
            Kind::Run(_, directory) | Kind::Directory(directory) => Some(directory),
            _ => None,
        };
        let known = directory
            .and_then(|directory| directory.names.lock().complete(self.options.metadata_ttl));
        let mut wanted: BTreeMap<String, Entry> = known.map_or_else(BTreeMap::new, |it| it.0);
        wanted.extend(
            local
                .into_iter()
                .map(|(name, entry)| (name.to_owned(), entry)),
        );
        for shown in listed.iter() {
            wanted.remove(&shown.name);
        }
        listed.extend(wanted.into_iter().map(|(name, entry)| Listed {
            name,
            entry,
            run: None,
        }));
    }

    /// Attributes of a listed name, for `readdirplus`. The lookup counts only once
    /// [`Vfs::accept_listed`] says that the kernel took the entry.
    pub fn listed_attributes(&self, parent: Inode, listed: &Listed) -> VfsResult<EntryAttributes> {
        let inode = self.listed_node(parent, listed);
        self.attributes(inode)
    }

    /// The kernel took the entry, or had no room for it.
    pub fn accept_listed(&self, inode: Inode, accepted: bool) {
        let mut tree = self.tree.lock();
        if accepted {
            tree.add_lookup(inode);
        } else {
            tree.reap(inode);
        }
    }
}

fn control_names() -> Vec<Listed> {
    CONTROLS
        .into_iter()
        .map(|(name, _, _)| Listed {
            name: name.to_owned(),
            entry: Entry::File(FileInfo {
                size: 0,
                etag: None,
                modified: std::time::SystemTime::UNIX_EPOCH,
            }),
            run: None,
        })
        .collect()
}
