//! The kernel's types from the vfs's, and the other way.

use fuser::{FileAttr, FileType, FopenFlags, INodeNo, OpenAccMode, OpenFlags};

use crate::vfs::{Access, Attributes, FileKind, Opened};

pub(super) fn attributes(told: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(told.inode),
        size: told.size,
        blocks: told.size.div_ceil(512),
        atime: told.modified,
        mtime: told.modified,
        ctime: told.modified,
        crtime: told.modified,
        kind: file_type(told.kind),
        perm: told.mode,
        nlink: told.links,
        uid: told.uid,
        gid: told.gid,
        rdev: 0,
        blksize: told.preferred_block,
        flags: 0,
    }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::Regular => FileType::RegularFile,
        FileKind::Link => FileType::Symlink,
    }
}

pub(super) fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if opened.direct {
        flags |= FopenFlags::FOPEN_DIRECT_IO;
    } else if opened.keep_cache {
        flags |= FopenFlags::FOPEN_KEEP_CACHE;
    }
    flags
}

pub(super) fn access(flags: i32, thread: u32) -> Access {
    let mode = OpenFlags(flags).acc_mode();
    Access {
        read: mode != OpenAccMode::O_WRONLY,
        write: mode != OpenAccMode::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0,
        exclusive: flags & libc::O_EXCL != 0,
        thread,
    }
}
