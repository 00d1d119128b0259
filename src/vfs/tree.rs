//! Inodes: which there are, where they hang, and how long they live.
//!
//! The tree holds what the kernel has looked up and what exists only locally; nothing else. A
//! node lives while the kernel counts lookups of it, while it has children, and while it holds
//! bytes that the store lacks.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::directory::{Directory, Name};
use super::file::File;
use crate::catalog::{Branch, Document, EXPERIMENTS, MODELS, RootEntry, RootId};
use crate::store::Location;

/// An inode number, as the kernel knows it.
pub type Inode = u64;

/// The mount's own directory.
pub const ROOT: Inode = 1;
/// `.mlfs`, the control directory.
pub const CONTROL: Inode = 2;
/// `.mlfs/status`.
pub const STATUS: Inode = 3;
/// `.mlfs/drain`, `.mlfs/retry`, `.mlfs/discard`.
const DRAIN: Inode = 4;
const RETRY: Inode = 5;
const DISCARD: Inode = 6;
/// `experiments` and `models`.
const BRANCHES: [(&str, Inode, Branch); 2] = [
    (EXPERIMENTS, 7, Branch::Experiments),
    (MODELS, 8, Branch::Models),
];
const FIRST_FREE: Inode = 16;

/// What a running mount can be told, by writing to a file in `.mlfs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Send everything that is closed and not stored.
    Drain,
    /// Send these uploads again.
    Retry,
    /// Give these uploads up.
    Discard,
}

/// The files of `.mlfs`: name, inode, and what they are.
pub const CONTROLS: [(&str, Inode, Kind); 4] = [
    ("status", STATUS, Kind::Status),
    ("drain", DRAIN, Kind::Order(Order::Drain)),
    ("retry", RETRY, Kind::Order(Order::Retry)),
    ("discard", DISCARD, Kind::Order(Order::Discard)),
];

/// The inode of a name that is always there.
pub fn fixed(name: &str) -> Option<Inode> {
    if name == ".mlfs" {
        return Some(CONTROL);
    }
    let mut branches = BRANCHES.into_iter();
    branches.find_map(|(branch, inode, _)| (branch == name).then_some(inode))
}

/// The names of the root that are no runs, as it lists them.
pub fn branches() -> impl Iterator<Item = (&'static str, Branch)> {
    BRANCHES.into_iter().map(|(name, _, branch)| (name, branch))
}

/// The state of a directory inside an artifact root, shared by those who list it.
#[derive(Debug, Default)]
pub struct DirectoryNode {
    pub names: Mutex<Directory>,
    /// One listing of the first page at a time.
    pub gate: tokio::sync::Mutex<()>,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Root,
    /// `.mlfs`.
    Control,
    Status,
    /// What is written to it is done.
    Order(Order),
    /// A directory of names that the catalog knows.
    Branch(Branch),
    /// A symbolic link, with its target.
    Link(Name),
    /// `.mlflow` in an artifact root, and a file in it.
    Documents(RootId),
    Document(RootId, Document),
    /// An artifact root: a run's, or a model's. Its location is opened when somebody enters it.
    Artifacts(RootEntry, Arc<DirectoryNode>),
    Directory(Arc<DirectoryNode>),
    File(Arc<File>),
}

#[derive(Debug)]
pub struct Node {
    pub parent: Inode,
    pub name: Name,
    pub kind: Kind,
    /// Lookups the kernel has not forgotten yet.
    pub lookups: u64,
    pub children: BTreeMap<Name, Inode>,
    /// A directory that exists whether or not the store has a file in it.
    pub local: bool,
    /// No longer at its name.
    pub unlinked: bool,
    pub modified: SystemTime,
    /// Where the files of an artifact root are, once it was entered.
    pub location: Option<Location>,
}

#[derive(Debug)]
pub struct Tree {
    nodes: HashMap<Inode, Node>,
    next: Inode,
}

impl Node {
    fn new(parent: Inode, name: Name, kind: Kind, modified: SystemTime) -> Self {
        Self {
            parent,
            name,
            kind,
            lookups: 0,
            children: BTreeMap::new(),
            local: false,
            unlinked: false,
            modified,
            location: None,
        }
    }

    /// Whether it must stay though the kernel has forgotten it.
    fn is_needed(&self) -> bool {
        match &self.kind {
            Kind::Root | Kind::Control | Kind::Status | Kind::Order(_) => true,
            Kind::File(file) => file.is_needed(),
            Kind::Link(_) | Kind::Document(..) => false,
            Kind::Branch(_) | Kind::Documents(_) | Kind::Artifacts(..) => !self.children.is_empty(),
            Kind::Directory(_) => (self.local && !self.unlinked) || !self.children.is_empty(),
        }
    }

    pub fn is_directory(&self) -> bool {
        matches!(
            self.kind,
            Kind::Root
                | Kind::Control
                | Kind::Branch(_)
                | Kind::Documents(_)
                | Kind::Artifacts(..)
                | Kind::Directory(_)
        )
    }
}

impl Tree {
    pub fn new(now: SystemTime) -> Self {
        let mut nodes = HashMap::from([
            (ROOT, Node::new(ROOT, "".into(), Kind::Root, now)),
            (CONTROL, Node::new(ROOT, ".mlfs".into(), Kind::Control, now)),
        ]);
        nodes.extend(
            CONTROLS.map(|(name, inode, kind)| (inode, Node::new(CONTROL, name.into(), kind, now))),
        );
        nodes.extend(BRANCHES.map(|(name, inode, branch)| {
            (
                inode,
                Node::new(ROOT, name.into(), Kind::Branch(branch), now),
            )
        }));
        Self {
            nodes,
            next: FIRST_FREE,
        }
    }

    pub fn get(&self, inode: Inode) -> Option<&Node> {
        self.nodes.get(&inode)
    }

    pub fn get_mut(&mut self, inode: Inode) -> Option<&mut Node> {
        self.nodes.get_mut(&inode)
    }

    pub fn child(&self, parent: Inode, name: &str) -> Option<(Inode, &Node)> {
        let inode = *self.nodes.get(&parent)?.children.get(name)?;
        Some((inode, self.nodes.get(&inode)?))
    }

    /// Hangs a new node at `parent`/`name`, in place of what was there.
    pub fn insert(
        &mut self,
        parent: Inode,
        name: impl Into<Name>,
        kind: Kind,
        modified: SystemTime,
    ) -> Inode {
        let name = name.into();
        let inode = self.next;
        self.next += 1;
        let node = Node::new(parent, Arc::clone(&name), kind, modified);
        self.nodes.insert(inode, node);
        let parent = self.nodes.get_mut(&parent);
        let before = parent.and_then(|parent| parent.children.insert(name, inode));
        if let Some(before) = before {
            self.unlinked(before);
        }
        inode
    }

    /// Takes the name away; the node lives on while it is needed.
    pub fn unlink(&mut self, parent: Inode, name: &str) -> Option<Inode> {
        let inode = self.nodes.get_mut(&parent)?.children.remove(name)?;
        self.unlinked(inode);
        Some(inode)
    }

    /// The node has lost its name.
    fn unlinked(&mut self, inode: Inode) {
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.unlinked = true;
        }
        self.reap(inode);
    }

    /// Moves a node to another name, in place of what was there.
    pub fn rename(&mut self, parent: Inode, name: &str, to: Inode, to_name: &str) {
        let Some(inode) = self
            .nodes
            .get_mut(&parent)
            .and_then(|node| node.children.remove(name))
        else {
            return;
        };
        self.unlink(to, to_name);
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.parent = to;
            node.name = to_name.into();
        }
        if let Some(node) = self.nodes.get_mut(&to) {
            node.children.insert(to_name.into(), inode);
        }
        self.reap(parent);
    }

    /// A name was made or taken away in the directory. An artifact root shows the time the server tells.
    pub fn touch_directory(&mut self, inode: Inode, now: SystemTime) {
        if let Some(node) = self.nodes.get_mut(&inode)
            && matches!(node.kind, Kind::Directory(_))
        {
            node.modified = now;
        }
    }

    pub fn add_lookup(&mut self, inode: Inode) {
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.lookups += 1;
        }
    }

    pub fn forget(&mut self, inode: Inode, count: u64) {
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.reap(inode);
    }

    /// Removes the node, and then its parents, if nothing needs them any more.
    pub fn reap(&mut self, mut inode: Inode) {
        while inode >= FIRST_FREE {
            let Some(node) = self.nodes.get(&inode) else {
                return;
            };
            if node.lookups > 0 || node.is_needed() {
                return;
            }
            let parent = node.parent;
            let name = Arc::clone(&node.name);
            let linked = !node.unlinked;
            self.nodes.remove(&inode);
            if linked && let Some(parent) = self.nodes.get_mut(&parent) {
                parent.children.remove(&name);
            }
            inode = parent;
        }
    }

    /// The node of the artifact root and the path below it (`""` for the root itself).
    pub fn place(&self, mut inode: Inode) -> Option<(Inode, String)> {
        let mut names = Vec::new();
        loop {
            let node = self.nodes.get(&inode)?;
            if matches!(node.kind, Kind::Artifacts(..)) {
                names.reverse();
                return Some((inode, names.join("/")));
            }
            if inode < FIRST_FREE {
                return None;
            }
            names.push(&*node.name);
            inode = node.parent;
        }
    }

    /// The path below the mount point, for messages.
    pub fn path(&self, inode: Inode) -> String {
        let mut names = Vec::new();
        let mut at = inode;
        while at != ROOT
            && let Some(node) = self.nodes.get(&at)
        {
            names.push(&*node.name);
            at = node.parent;
        }
        names.reverse();
        names.join("/")
    }

    /// What directories were listed to hold is asked for again.
    pub fn forget_listings(&self) {
        for node in self.nodes.values() {
            if let Kind::Artifacts(_, directory) | Kind::Directory(directory) = &node.kind {
                directory.names.lock().forget();
            }
        }
    }

    /// Every file node in the tree.
    pub fn files(&self) -> Vec<(Inode, Arc<File>)> {
        self.nodes
            .iter()
            .filter_map(|(inode, node)| match &node.kind {
                Kind::File(file) => Some((*inode, Arc::clone(file))),
                _ => None,
            })
            .collect()
    }

    /// Every file node below `inode`, itself included.
    pub fn files_below(&self, inode: Inode) -> Vec<(Inode, Arc<File>)> {
        let mut found = Vec::new();
        let mut waiting = vec![inode];
        while let Some(inode) = waiting.pop() {
            let Some(node) = self.nodes.get(&inode) else {
                continue;
            };
            waiting.extend(node.children.values().copied());
            if let Kind::File(file) = &node.kind {
                found.push((inode, Arc::clone(file)));
            }
        }
        found
    }

    /// Names that directories are known to hold, for `.mlfs/status`.
    pub fn names(&self) -> usize {
        let directories = self.nodes.values().filter_map(|node| match &node.kind {
            Kind::Artifacts(_, directory) | Kind::Directory(directory) => Some(directory),
            _ => None,
        });
        directories.map(|it| it.names.lock().len()).sum()
    }

    /// Nodes held, for `.mlfs/status`.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }
}
