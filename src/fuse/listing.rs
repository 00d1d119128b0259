//! Answers that list a directory.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Errno, FileHandle, FileType, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::convert::{attributes, file_type};
use crate::vfs::{Batch, Inode, Vfs, VfsResult};

/// `.` and `..` come first, at positions 1 and 2.
const DOTS: usize = 2;
/// An inode number for entries that have none yet; the kernel only hands it on to `readdir`.
const UNKNOWN: INodeNo = INodeNo(0xffff_ffff);

type Listing = Pin<Box<dyn Future<Output = VfsResult<Batch>> + Send>>;

/// Asks for the names behind a position.
pub(super) fn list(handle: FileHandle, offset: u64) -> impl FnOnce(Arc<Vfs>) -> Listing {
    let from = names_before(offset);
    move |vfs| Box::pin(async move { vfs.read_directory(handle.0, from, offset == 0).await })
}

/// Answers with names.
pub(super) fn listed(
    vfs: Arc<Vfs>,
    directory: INodeNo,
    offset: u64,
    mut reply: ReplyDirectory,
) -> impl FnOnce(Result<Batch, Errno>) + Send + 'static {
    move |outcome| match outcome {
        Err(errno) => reply.error(errno),
        Ok(batch) => {
            let mut full = false;
            for (position, name, inode) in dots(&vfs, directory.0, offset) {
                full = full || reply.add(INodeNo(inode), position, FileType::Directory, name);
            }
            for (position, listed) in (first_position(offset)..).zip(batch.listed()) {
                let kind = file_type(listed.kind());
                // Numbers of what nobody looked up are not known, nor needed.
                full = full || reply.add(UNKNOWN, position, kind, &*listed.name);
                if full {
                    break;
                }
            }
            reply.ok();
        }
    }
}

/// Answers with names and their attributes.
pub(super) fn listed_plus(
    vfs: Arc<Vfs>,
    directory: INodeNo,
    offset: u64,
    mut reply: ReplyDirectoryPlus,
) -> impl FnOnce(Result<Batch, Errno>) + Send + 'static {
    move |outcome| match outcome {
        Err(errno) => reply.error(errno),
        Ok(batch) => {
            let mut full = false;
            for (position, name, dot) in dots(&vfs, directory.0, offset) {
                let Ok(entry) = vfs.attributes(dot) else {
                    continue;
                };
                let told = attributes(&entry.attributes);
                let ttl = Duration::ZERO;
                let inode = INodeNo(dot);
                full = full || reply.add(inode, position, name, &ttl, &told, Generation(0));
            }
            if !full {
                vfs.offer_attributes(directory.0, batch.listed(), |index, listed, entry| {
                    let position = first_position(offset) + index as u64;
                    let told = attributes(&entry.attributes);
                    let name = &*listed.name;
                    !reply.add(told.ino, position, name, &entry.ttl, &told, Generation(0))
                });
            }
            reply.ok();
        }
    }
}

fn names_before(offset: u64) -> usize {
    (offset as usize).saturating_sub(DOTS)
}

/// The position behind the first name after `offset`.
fn first_position(offset: u64) -> u64 {
    (names_before(offset) + 1 + DOTS) as u64
}

fn dots(vfs: &Vfs, inode: Inode, offset: u64) -> impl Iterator<Item = (u64, &'static str, Inode)> {
    let all = [(1, ".", inode), (2, "..", vfs.parent(inode))];
    all.into_iter()
        .filter(move |(position, _, _)| *position > offset)
}
