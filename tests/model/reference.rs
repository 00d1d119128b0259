//! The reference: what a filesystem in memory would say, and what the store has to show.

use std::collections::{BTreeMap, BTreeSet};

/// A file, named or not.
#[derive(Clone, Debug, Default)]
pub struct Node {
    pub content: Vec<u8>,
    /// `None` once it was unlinked or replaced.
    pub path: Option<String>,
    /// The store has a version of it under its name.
    pub published: bool,
    /// The store lacks something of it.
    pub dirty: bool,
    /// Something was written, beyond creating it or emptying it by its opening.
    pub changed: bool,
    /// Somebody was told that it could not be stored: it waits for another close, or for a word.
    pub refused: bool,
    pub writers: usize,
    /// Somebody else replaced it in the store: it can be read as far as it was fetched.
    pub foreign: bool,
    /// The same, because it was unlinked or replaced here: it can be written, too.
    pub lost: bool,
    /// What it holds is not known, because a write to a lost file failed on its way.
    pub doubtful: bool,
}

pub type Id = usize;

impl Node {
    fn lose(&mut self) {
        self.path = None;
        self.dirty = false;
        self.lost = self.published;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    File(Id),
    Directory,
}

#[derive(Debug, Default)]
pub struct Reference {
    pub nodes: Vec<Node>,
    pub files: BTreeMap<String, Id>,
    pub directories: BTreeSet<String>,
    /// What the store shows.
    pub store: BTreeMap<String, Vec<u8>>,
    /// What it may show instead, after a publication that was answered with an error.
    pub perhaps: BTreeMap<String, Vec<Vec<u8>>>,
}

pub fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

pub fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory)
        .is_some_and(|rest| rest.starts_with('/'))
}

impl Reference {
    pub fn find(&self, path: &str) -> Result<Found, i32> {
        if path.is_empty() {
            return Ok(Found::Directory);
        }
        if self.find(parent(path))? != Found::Directory {
            return Err(libc::ENOTDIR);
        }
        if self.directories.contains(path) {
            return Ok(Found::Directory);
        }
        self.files
            .get(path)
            .map(|id| Found::File(*id))
            .ok_or(libc::ENOENT)
    }

    pub fn create(&mut self, path: &str) -> Id {
        self.nodes.push(Node {
            path: Some(path.to_owned()),
            dirty: true,
            ..Node::default()
        });
        let id = self.nodes.len() - 1;
        self.files.insert(path.to_owned(), id);
        id
    }

    pub fn write(&mut self, id: Id, at: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let node = &mut self.nodes[id];
        let end = at as usize + data.len();
        if node.content.len() < end {
            node.content.resize(end, 0);
        }
        node.content[at as usize..end].copy_from_slice(data);
        node.dirty = true;
        node.changed = true;
    }

    pub fn resize(&mut self, id: Id, size: u64) {
        let node = &mut self.nodes[id];
        if node.content.len() as u64 != size {
            node.content.resize(size as usize, 0);
            node.dirty = true;
            node.changed = true;
        }
    }

    /// Everything of the file is in the store, under its name.
    pub fn publish(&mut self, id: Id) {
        let node = &mut self.nodes[id];
        node.dirty = false;
        node.changed = false;
        node.refused = false;
        if let Some(path) = node.path.clone() {
            node.published = true;
            self.perhaps.remove(&path);
            self.store.insert(path, node.content.clone());
        }
    }

    /// Perhaps it is in the store, perhaps not.
    pub fn publish_perhaps(&mut self, id: Id) {
        let node = &mut self.nodes[id];
        node.refused = true;
        if let Some(path) = node.path.clone() {
            let versions = self.perhaps.entry(path).or_default();
            versions.push(node.content.clone());
        }
    }

    /// The file loses its name, and with it its place in the store.
    pub fn unlink(&mut self, path: &str) {
        if let Some(id) = self.files.remove(path) {
            self.nodes[id].lose();
        }
        self.store.remove(path);
        self.perhaps.remove(path);
    }

    pub fn rename(&mut self, from: &str, to: &str) -> Result<(), i32> {
        let source = self.find(from)?;
        let target = match self.find(to) {
            Ok(found) => Some(found),
            Err(libc::ENOENT) if self.find(parent(to)) == Ok(Found::Directory) => None,
            Err(errno) => return Err(errno),
        };
        if from == to {
            return Ok(());
        }
        match (source, target) {
            (Found::Directory, _) if is_below(to, from) => return Err(libc::EINVAL),
            (Found::File(_), Some(Found::Directory)) => return Err(libc::EISDIR),
            (Found::Directory, Some(Found::File(_))) => return Err(libc::ENOTDIR),
            (Found::Directory, Some(Found::Directory)) if !self.is_empty(to) => {
                return Err(libc::ENOTEMPTY);
            }
            _ => {}
        }
        match source {
            Found::File(id) => self.rename_file(id, from, to),
            Found::Directory => self.rename_directory(from, to),
        }
        Ok(())
    }

    fn rename_file(&mut self, id: Id, from: &str, to: &str) {
        if let Some(replaced) = self.files.insert(to.to_owned(), id) {
            self.nodes[replaced].lose();
        }
        self.files.remove(from);
        self.nodes[id].path = Some(to.to_owned());
        // What is published moves; what is not leaves the replaced file's object until its close.
        let moved = self.store.remove(from);
        let perhaps = self.perhaps.remove(from);
        if self.nodes[id].published {
            self.store.extend(moved.map(|bytes| (to.to_owned(), bytes)));
            self.perhaps.remove(to);
        }
        // Whether a publication that was answered with an error took place is not known here.
        if let Some(perhaps) = perhaps {
            self.perhaps
                .entry(to.to_owned())
                .or_default()
                .extend(perhaps);
        }
    }

    fn rename_directory(&mut self, from: &str, to: &str) {
        let moved = |path: &String| {
            (path == from || is_below(path, from)).then(|| format!("{to}{}", &path[from.len()..]))
        };
        self.directories = std::mem::take(&mut self.directories)
            .into_iter()
            .map(|path| moved(&path).unwrap_or(path))
            .collect();
        self.files = rekey(std::mem::take(&mut self.files), moved);
        self.store = rekey(std::mem::take(&mut self.store), moved);
        self.perhaps = rekey(std::mem::take(&mut self.perhaps), moved);
        for (path, id) in &self.files {
            self.nodes[*id].path = Some(path.clone());
        }
    }

    pub fn is_empty(&self, directory: &str) -> bool {
        let mut paths = self.files.keys().chain(&self.directories);
        !paths.any(|path| is_below(path, directory))
    }

    pub fn list(&self, directory: &str) -> BTreeSet<String> {
        let paths = self.files.keys().chain(&self.directories);
        paths
            .filter(|path| parent(path) == directory)
            .map(|path| path.rsplit('/').next().unwrap_or_default().to_owned())
            .collect()
    }

    /// Somebody else put or deleted the object: the mount's file of that name is another now.
    pub fn outside(&mut self, path: &str, bytes: Option<Vec<u8>>) {
        if let Some(id) = self.files.remove(path) {
            self.nodes[id].path = None;
            self.nodes[id].foreign = true;
        }
        self.perhaps.remove(path);
        match bytes {
            Some(bytes) => {
                self.nodes.push(Node {
                    content: bytes.clone(),
                    path: Some(path.to_owned()),
                    published: true,
                    ..Node::default()
                });
                self.files.insert(path.to_owned(), self.nodes.len() - 1);
                self.store.insert(path.to_owned(), bytes);
            }
            None => {
                self.store.remove(path);
            }
        }
    }
}

fn rekey<T>(
    map: BTreeMap<String, T>,
    moved: impl Fn(&String) -> Option<String>,
) -> BTreeMap<String, T> {
    map.into_iter()
        .map(|(path, value)| (moved(&path).unwrap_or(path), value))
        .collect()
}
