//! Running a vfs call and replying: inline when it is ready at once, else in a task.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::task::{Context, Waker};

use fuser::{Errno, Generation, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyXattr};
use tokio::runtime::Handle;

use super::convert::attributes;
use crate::vfs::{EntryAttributes, Inode, Prefetch, Vfs, VfsError, VfsResult};

/// Whom to ask, and where to wait.
pub(super) struct Answering {
    pub vfs: Arc<Vfs>,
    pub runtime: Handle,
}

impl Answering {
    /// Runs `call`, named `name` in the log and about `inode`, and hands its outcome to `reply`.
    ///
    /// The call is polled once here; only if it has to wait does it move, with its reply, into a
    /// task. No thread that takes the kernel's requests ever waits.
    pub fn call<T, F>(
        &self,
        name: &'static str,
        inode: Inode,
        call: impl FnOnce(Arc<Vfs>) -> F,
        reply: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) where
        F: Future<Output = VfsResult<T>> + Send + 'static,
        T: Send + 'static,
    {
        let vfs = Arc::clone(&self.vfs);
        let call = call(Arc::clone(&vfs));
        let _runtime = self.runtime.enter();
        let mut task = Box::pin(async move {
            let outcome = call.await;
            reply(outcome.map_err(|error| errno(&vfs, name, inode, &error)));
        });
        let mut context = Context::from_waker(Waker::noop());
        if task.as_mut().poll(&mut context).is_pending() {
            self.runtime.spawn(task);
        }
    }

    /// Answers an ioctl.
    pub fn ioctl(&self, inode: Inode, command: u32, data: &[u8], reply: ReplyIoctl) {
        let wanted = Prefetch::from_bytes(data).filter(|_| command == Prefetch::COMMAND);
        let Some(wanted) = wanted else {
            // Programs ask every file whether it is a terminal.
            return reply.error(Errno::ENOTTY);
        };
        let call = move |vfs: Arc<Vfs>| async move { vfs.prefetch(inode, wanted).await };
        self.call("prefetch", inode, call, |outcome| match outcome {
            Ok(()) => reply.ioctl(0, &[]),
            Err(errno) => reply.error(errno),
        });
    }

    /// The errno to answer for a call that was made directly.
    pub fn errno(&self, call: &'static str, inode: Inode, error: &VfsError) -> Errno {
        errno(&self.vfs, call, inode, error)
    }
}

/// The errno to answer; an unusual one is logged with its cause.
fn errno(vfs: &Vfs, call: &'static str, inode: Inode, error: &VfsError) -> Errno {
    if let Some(cause) = &error.cause {
        let errno = io::Error::from_raw_os_error(error.errno);
        tracing::warn!(call, path = vfs.path(inode), %errno, %cause, "failed");
    }
    Errno::from_i32(error.errno)
}

/// Answers with an extended attribute, or with the size of one to who asks for that.
pub(super) fn xattr(
    size: u32,
    reply: ReplyXattr,
) -> impl FnOnce(Result<Vec<u8>, Errno>) + Send + 'static {
    move |outcome| match outcome {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(errno) => reply.error(errno),
    }
}

/// Answers that it is done.
pub(super) fn done(reply: ReplyEmpty) -> impl FnOnce(Result<(), Errno>) + Send + 'static {
    move |outcome| match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

/// Answers with an entry.
pub(super) fn entry(
    reply: ReplyEntry,
) -> impl FnOnce(Result<EntryAttributes, Errno>) + Send + 'static {
    move |outcome| match outcome {
        Ok(entry) => reply.entry(&entry.ttl, &attributes(&entry.attributes), Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

/// Answers with attributes.
pub(super) fn attr(
    reply: ReplyAttr,
) -> impl FnOnce(Result<EntryAttributes, Errno>) + Send + 'static {
    move |outcome| match outcome {
        Ok(entry) => reply.attr(&entry.ttl, &attributes(&entry.attributes)),
        Err(errno) => reply.error(errno),
    }
}
