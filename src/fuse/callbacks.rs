//! fuser's callbacks, each a vfs call and its reply.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;

use super::answer::{Answering, attr, done, entry, xattr};
use super::backing::{self, Backing};
use super::convert::{access, attributes, open_flags};
use super::listing::{list, listed, listed_plus};
use super::readahead::Readahead;
use crate::vfs::{EntryAttributes, Opened, RenameMode, Vfs, WriteOutcome};

/// Requests the kernel may have in flight beyond those somebody waits for (readahead).
const BACKGROUND: u16 = 64;
/// Bytes of the largest write request; the kernel's limit without tuning.
const LARGEST_WRITE: u32 = 1 << 20;
const LONGEST_NAME: u32 = 255;

pub(super) struct Callbacks {
    answering: Answering,
    backing: Arc<Backing>,
    readahead: Arc<Readahead>,
    /// The kernel maps files whose pages it does not keep.
    maps_direct: bool,
}

impl Callbacks {
    pub fn new(vfs: Arc<Vfs>, runtime: Handle, readahead: Arc<Readahead>) -> Self {
        Self {
            answering: Answering { vfs, runtime },
            backing: Arc::default(),
            readahead,
            maps_direct: false,
        }
    }
}

thread_local! {
    /// Where an answer of several frames is put together; as large as the largest read.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Callbacks {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            // No file has privileges to lose: the kernel need not ask for them at each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel does not offer this");
            }
        }
        let maps_direct = InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        self.maps_direct = config.add_capabilities(maps_direct).is_ok();
        if self.answering.vfs.may_be_local() {
            backing::ask(config);
        }
        // Each answers with the nearest value the kernel allows, which is then in force.
        let _ = config.set_max_write(LARGEST_WRITE);
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.answering.call(
            "lookup",
            parent.0,
            |vfs| async move { vfs.lookup(parent.0, &name).await },
            entry(reply),
        );
    }

    fn forget(&self, _request: &Request, inode: INodeNo, count: u64) {
        self.answering.vfs.forget(inode.0, count);
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.answering.vfs.attributes(inode.0) {
            Ok(entry) => reply.attr(&entry.ttl, &attributes(&entry.attributes)),
            Err(error) => reply.error(self.answering.errno("getattr", inode.0, &error)),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let call = |vfs: Arc<Vfs>| async move {
            if let Some(size) = size {
                let handle = handle.map(|handle| handle.0);
                vfs.set_size(inode.0, handle, size).await?;
            }
            if let Some(time) = mtime {
                let time = match time {
                    TimeOrNow::SpecificTime(time) => time,
                    TimeOrNow::Now => SystemTime::now(),
                };
                vfs.set_modified(inode.0, time)?;
            }
            vfs.attributes(inode.0)
        };
        self.answering.call("setattr", inode.0, call, attr(reply));
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        match self.answering.vfs.read_link(inode.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(self.answering.errno("readlink", inode.0, &error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            reply.error(Errno::EPERM);
            return;
        }
        let name = name.to_owned();
        let access = access(libc::O_WRONLY | libc::O_EXCL, request.pid());
        let call = |vfs: Arc<Vfs>| async move {
            let (entry, opened) = vfs.create(parent.0, &name, access).await?;
            vfs.release(opened.handle);
            Ok(entry)
        };
        self.answering.call("mknod", parent.0, call, entry(reply));
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = name.to_owned();
        self.answering.call(
            "mkdir",
            parent.0,
            |vfs| async move { vfs.make_directory(parent.0, &name).await },
            entry(reply),
        );
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.answering.call(
            "unlink",
            parent.0,
            |vfs| async move { vfs.unlink(parent.0, &name).await },
            done(reply),
        );
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.answering.call(
            "rmdir",
            parent.0,
            |vfs| async move { vfs.remove_directory(parent.0, &name).await },
            done(reply),
        );
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            flags if flags.is_empty() => RenameMode::Replace,
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            _ => {
                reply.error(Errno::EINVAL);
                return;
            }
        };
        let (name, to_name) = (name.to_owned(), to_name.to_owned());
        let call = |vfs: Arc<Vfs>| async move {
            vfs.rename(parent.0, &name, to_parent.0, &to_name, mode)
                .await
        };
        self.answering.call("rename", parent.0, call, done(reply));
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let access = access(flags.0, request.pid());
        let (vfs, backing) = (Arc::clone(&self.answering.vfs), Arc::clone(&self.backing));
        let readahead = Arc::clone(&self.readahead);
        self.answering.call(
            "open",
            inode.0,
            |vfs| async move { vfs.open(inode.0, access).await },
            move |outcome| match outcome {
                Ok(opened) => {
                    readahead.set(opened.readahead);
                    backing.answer(&vfs, inode.0, &opened, reply);
                }
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = name.to_owned();
        let access = access(flags, request.pid());
        // A file that is surely new is written before it is read: its writes need no pages.
        let direct = access.exclusive && self.maps_direct;
        let call = |vfs: Arc<Vfs>| async move { vfs.create(parent.0, &name, access).await };
        let readahead = Arc::clone(&self.readahead);
        let answer = move |outcome: Result<(EntryAttributes, Opened), Errno>| match outcome {
            Ok((entry, mut opened)) => {
                opened.direct |= direct;
                readahead.set(opened.readahead);
                reply.created(
                    &entry.ttl,
                    &attributes(&entry.attributes),
                    Generation(0),
                    FileHandle(opened.handle),
                    open_flags(&opened),
                );
            }
            Err(errno) => reply.error(errno),
        };
        self.answering.call("create", parent.0, call, answer);
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let thread = request.pid();
        self.answering.call(
            "read",
            inode.0,
            |vfs| async move { vfs.read(handle.0, thread, offset, size).await },
            |outcome| match outcome {
                Ok(segments) => SCRATCH.with_borrow_mut(|scratch| {
                    reply.data(segments.contiguous(scratch));
                }),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn write(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // Page writeback comes from the kernel's own threads.
        let from_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let thread = if from_cache { 0 } else { request.pid() };
        let written = data.len() as u32;
        let taken = match self.answering.vfs.try_write(handle.0, offset, data, thread) {
            Ok(WriteOutcome::Done) => return reply.written(written),
            Ok(WriteOutcome::Partial(taken)) => taken,
            Err(error) => return reply.error(self.answering.errno("write", inode.0, &error)),
        };
        let rest = Bytes::copy_from_slice(&data[taken..]);
        let offset = offset + taken as u64;
        self.answering.call(
            "write",
            inode.0,
            |vfs| async move { vfs.write(handle.0, offset, rest).await },
            move |outcome| match outcome {
                Ok(()) => reply.written(written),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn flush(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let thread = request.pid();
        self.answering.call(
            "close",
            inode.0,
            |vfs| async move { vfs.flush(handle.0, thread).await },
            done(reply),
        );
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.backing.release(inode.0, handle.0);
        self.answering.vfs.release(handle.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.answering.call(
            "fsync",
            inode.0,
            |vfs| async move { vfs.synchronise(handle.0).await },
            done(reply),
        );
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.answering.vfs.open_directory(inode.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(self.answering.errno("opendir", inode.0, &error)),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let call = list(handle, offset);
        let answer = listed(Arc::clone(&self.answering.vfs), inode, offset, reply);
        self.answering.call("readdir", inode.0, call, answer);
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let call = list(handle, offset);
        let answer = listed_plus(Arc::clone(&self.answering.vfs), inode, offset, reply);
        self.answering.call("readdir", inode.0, call, answer);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.answering.call(
            "fsyncdir",
            inode.0,
            |vfs| async move { vfs.synchronise_directory(inode.0).await },
            done(reply),
        );
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.answering.vfs.release_directory(handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let usage = self.answering.vfs.usage();
        let files = u64::from(u32::MAX);
        reply.statfs(
            usage.blocks,
            usage.free,
            usage.free,
            files,
            files,
            usage.block,
            LONGEST_NAME,
            usage.block,
        );
    }

    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn getxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let name = name.to_owned();
        self.answering.call(
            "getxattr",
            inode.0,
            |vfs| async move { vfs.attribute(inode.0, &name).await },
            xattr(size, reply),
        );
    }

    // Answered ENOSYS once, it is not asked again: programs then see EOPNOTSUPP, and copy none.
    fn listxattr(&self, _request: &Request, _inode: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let refused = self.answering.vfs.refuse_attribute(name);
        reply.error(self.answering.errno("setxattr", inode.0, &refused));
    }

    fn removexattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let refused = self.answering.vfs.refuse_attribute(name);
        reply.error(self.answering.errno("removexattr", inode.0, &refused));
    }

    fn ioctl(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        command: u32,
        data: &[u8],
        _size: u32,
        reply: ReplyIoctl,
    ) {
        self.answering.ioctl(inode.0, command, data, reply);
    }

    fn fallocate(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode != 0 {
            reply.error(Errno::EOPNOTSUPP);
            return;
        }
        let end = offset.saturating_add(length);
        self.answering.call(
            "fallocate",
            inode.0,
            |vfs| async move { vfs.allocate(inode.0, handle.0, end).await },
            done(reply),
        );
    }
}
