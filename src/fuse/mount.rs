//! Mounting, tuning what the kernel lets tune, and unmounting.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fuser::{Config, MountOption, Session, SessionACL};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::callbacks::Callbacks;
use super::readahead::Readahead;
use crate::vfs::Vfs;

/// Threads that take requests from the kernel.
const THREADS: usize = 2;

#[derive(Clone, Debug)]
pub struct FuseOptions {
    pub mountpoint: PathBuf,
    pub allow_other: bool,
    pub read_only: bool,
}

/// A mount that answers.
#[derive(Debug)]
pub struct Mounted {
    mountpoint: PathBuf,
    finished: oneshot::Receiver<io::Result<()>>,
}

/// Mounts; returns when the kernel has been answered.
pub fn mount(vfs: Arc<Vfs>, runtime: &Handle, options: &FuseOptions) -> io::Result<Mounted> {
    let mut mount_options = vec![
        MountOption::FSName("mlfs".to_owned()),
        MountOption::Subtype("mlfs".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    if options.read_only {
        mount_options.push(MountOption::RO);
    }
    let mut config = Config::default();
    config.mount_options = mount_options;
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let readahead = Arc::new(Readahead::default());
    let callbacks = Callbacks::new(vfs, runtime.clone(), Arc::clone(&readahead));
    let session = Session::new(callbacks, &options.mountpoint, &config)?;
    readahead.find(&options.mountpoint);
    let (finish, finished) = oneshot::channel();
    std::thread::Builder::new()
        .name("mlfs-session".to_owned())
        .spawn(move || {
            // Nobody may be waiting any more.
            let _ = finish.send(session.run());
        })?;
    let mounted = Mounted {
        mountpoint: options.mountpoint.clone(),
        finished,
    };
    Ok(mounted)
}

impl Mounted {
    /// Unmounts; `EBUSY` while something in it is in use, unless `lazily`.
    pub fn unmount(&self, lazily: bool) -> io::Result<()> {
        unmount_path(&self.mountpoint, lazily)
    }

    /// Waits until the kernel has let go of the mount. To be awaited to its end only once.
    pub async fn finished(&mut self) -> io::Result<()> {
        match (&mut self.finished).await {
            Ok(outcome) => outcome,
            Err(_) => Err(io::Error::other("the session panicked")),
        }
    }
}

/// Unmounts whatever is mounted at `path`; `lazily` even while it is in use.
pub fn unmount_path(path: &Path, lazily: bool) -> io::Result<()> {
    // SAFETY: geteuid has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        let text = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
        let flags = if lazily { libc::MNT_DETACH } else { 0 };
        // SAFETY: `text` is a valid C string that outlives the call.
        let outcome = unsafe { libc::umount2(text.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) };
        return if outcome == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        };
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazily {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).output()?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if message.contains("busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(message))
}
