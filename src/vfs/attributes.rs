//! What `stat` and `statfs` show.

use std::time::{Duration, SystemTime};

use super::error::{VfsError, VfsResult};
use super::tree::{Inode, Kind, Node};
use super::{Entry, Vfs};

/// `st_blksize` of a file that is written: buffered writers (Python's `open`, C's stdio) take it as
/// the size of their buffer, and few large writes are cheaper than many small ones.
const WRITERS_BLOCK: u32 = 1 << 20;
/// Of one that is not: buffered readers fill as much at each place they look at. torch looks at the
/// header of each member of a container, and a MiB at each was most of the file.
const READERS_BLOCK: u32 = 4096;
/// What an object store has room for, as far as a program needs to know, bytes.
const PRETENDED_CAPACITY: u64 = 1 << 50;
const USAGE_BLOCK: u32 = 1 << 20;
/// How long attributes of something that is changing are believed.
const MOVING_TTL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Directory,
    Regular,
    /// A symbolic link.
    Link,
}

#[derive(Clone, Debug)]
pub struct Attributes {
    pub inode: Inode,
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    pub modified: SystemTime,
    /// Permission bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub links: u32,
    /// Bytes.
    pub preferred_block: u32,
}

/// Attributes, and how long the kernel may believe them.
#[derive(Clone, Debug)]
pub struct EntryAttributes {
    pub attributes: Attributes,
    pub ttl: Duration,
}

/// `statfs`, in blocks of `block` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub block: u32,
    pub blocks: u64,
    pub free: u64,
}

impl Vfs {
    pub fn attributes(&self, inode: Inode) -> VfsResult<EntryAttributes> {
        let tree = self.tree.lock();
        let node = tree.get(inode).ok_or(VfsError::STALE)?;
        Ok(self.describe(inode, node, self.options.metadata_ttl))
    }

    pub(super) fn describe(&self, inode: Inode, node: &Node, ttl: Duration) -> EntryAttributes {
        let mut preferred_block = READERS_BLOCK;
        let (size, modified, ttl) = match &node.kind {
            Kind::File(file) => {
                if file.state().writers > 0 || file.is_dirty() {
                    preferred_block = WRITERS_BLOCK;
                }
                let (size, modified) = file.size_and_time();
                let ttl = if file.is_dirty() {
                    ttl.min(MOVING_TTL)
                } else {
                    ttl
                };
                (size, modified, ttl)
            }
            Kind::Artifacts(root, _) => (0, root.modified, ttl),
            Kind::Link(target) => (target.len() as u64, node.modified, ttl),
            _ => (0, node.modified, ttl),
        };
        let kind = if node.is_directory() {
            FileKind::Directory
        } else if matches!(node.kind, Kind::Link(_)) {
            FileKind::Link
        } else {
            FileKind::Regular
        };
        let permissions = match (kind, &node.kind) {
            (FileKind::Directory, Kind::Control | Kind::Branch(_) | Kind::Documents(_)) => 0o555,
            (FileKind::Link, _) => 0o777,
            (FileKind::Directory, _) => 0o777 & !self.options.umask as u16,
            (_, Kind::Status | Kind::Document(..)) => 0o444,
            (_, Kind::Order(_)) => 0o222,
            _ => 0o666 & !self.options.umask as u16,
        };
        EntryAttributes {
            attributes: Attributes {
                inode,
                kind,
                size,
                modified,
                mode: permissions,
                uid: self.options.uid,
                gid: self.options.gid,
                links: match kind {
                    _ if node.unlinked => 0,
                    FileKind::Directory => 2,
                    FileKind::Regular | FileKind::Link => 1,
                },
                preferred_block,
            },
            ttl,
        }
    }

    pub fn usage(&self) -> Usage {
        let blocks = PRETENDED_CAPACITY / u64::from(USAGE_BLOCK);
        Usage {
            block: USAGE_BLOCK,
            blocks,
            free: blocks,
        }
    }

    /// Sets a time of change; kept until the file changes or is forgotten, and not stored.
    pub fn set_modified(&self, inode: Inode, modified: SystemTime) -> VfsResult<()> {
        self.check_writable()?;
        let mut tree = self.tree.lock();
        let node = tree.get_mut(inode).ok_or(VfsError::STALE)?;
        match &node.kind {
            Kind::File(file) => file.state().modified = Some(modified),
            Kind::Branch(_) | Kind::Link(_) | Kind::Documents(_) | Kind::Document(..) => {
                return Err(VfsError::NOT_PERMITTED);
            }
            _ => node.modified = modified,
        }
        Ok(())
    }
}

impl Entry {
    pub fn kind(&self) -> FileKind {
        match self {
            Self::File(_) => FileKind::Regular,
            Self::Directory => FileKind::Directory,
        }
    }
}
