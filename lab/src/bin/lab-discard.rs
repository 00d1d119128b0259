//! A mount that throws away what is written to it: what the kernel's side of a mounted write
//! costs, before a filesystem does anything with the bytes. Mounted as `src/fuse` of mlfs mounts.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Parser;
use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr,
    ReplyCreate, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow,
    WriteFlags,
};
use parking_lot::Mutex;

/// Mounts a directory of files that have names and sizes, and no bytes; runs until it is unmounted
#[derive(Debug, Parser)]
struct Arguments {
    mountpoint: PathBuf,
}

// As in mlfs.
const THREADS: usize = 2;
const BACKGROUND: u16 = 64;
const LARGEST_WRITE: u32 = 1 << 20;
const PREFERRED_BLOCK: u32 = 1 << 20;
const TTL: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("lab-discard".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    config.acl = SessionACL::Owner;
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    Ok(fuser::mount(
        Discard::default(),
        &arguments.mountpoint,
        &config,
    )?)
}

#[derive(Debug, Default)]
struct Files {
    inodes: HashMap<OsString, INodeNo>,
    sizes: HashMap<INodeNo, u64>,
    last: u64,
}

impl Files {
    fn create(&mut self, name: &OsStr) -> INodeNo {
        self.last = self.last.max(INodeNo::ROOT.0) + 1;
        let inode = INodeNo(self.last);
        self.inodes.insert(name.to_owned(), inode);
        self.sizes.insert(inode, 0);
        inode
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        let (kind, size) = match self.sizes.get(&inode) {
            Some(size) => (FileType::RegularFile, *size),
            None if inode == INodeNo::ROOT => (FileType::Directory, 0),
            None => return Err(Errno::ENOENT),
        };
        let now = SystemTime::now();
        // SAFETY: neither has preconditions, and neither can fail.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        Ok(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm: 0o755,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            blksize: PREFERRED_BLOCK,
            flags: 0,
        })
    }
}

#[derive(Debug, Default)]
struct Discard {
    files: Mutex<Files>,
}

/// Nothing tells two openings of a file from each other.
const HANDLE: FileHandle = FileHandle(0);

impl Filesystem for Discard {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
        ];
        for flag in wanted {
            // A kernel that does not offer it does without.
            let _ = config.add_capabilities(flag);
        }
        // Each answers with the nearest value the kernel allows, which is then in force.
        let _ = config.set_max_write(LARGEST_WRITE);
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let files = self.files.lock();
        let inode = files.inodes.get(name).copied().ok_or(Errno::ENOENT);
        match inode.and_then(|inode| files.attributes(inode)) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.files.lock().attributes(inode) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(errno),
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
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut files = self.files.lock();
        if let (Some(size), Some(held)) = (size, files.sizes.get_mut(&inode)) {
            *held = size;
        }
        match files.attributes(inode) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let mut files = self.files.lock();
        let inode = files.create(name);
        let opened = FopenFlags::FOPEN_DIRECT_IO;
        match files.attributes(inode) {
            Ok(attributes) => reply.created(&TTL, &attributes, Generation(0), HANDLE, opened),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.0 & libc::O_TRUNC != 0 {
            self.files.lock().sizes.insert(inode, 0);
        }
        reply.opened(HANDLE, FopenFlags::FOPEN_DIRECT_IO);
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let end = offset + data.len() as u64;
        if let Some(size) = self.files.lock().sizes.get_mut(&inode) {
            *size = end.max(*size);
        }
        reply.written(data.len() as u32);
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}
