//! Mount points: whose they are, and taking one.
//!
//! Nothing here touches an mlfs mount: of one whose process is gone nothing can be asked, and a
//! call into one whose process is stopped never returns.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};

use super::ask::Unanswered;
use super::processes;
use crate::mount_table::{Place, Table, locate};

/// Where mlfs is mounted, of a path that leads there.
///
/// # Errors
/// It leads somewhere else.
pub(super) fn find(path: &Path) -> anyhow::Result<PathBuf> {
    let shown = path.display();
    match locate(path)? {
        Place::Mount(mountpoint) => Ok(mountpoint),
        Place::Inside(mountpoint, _) => bail!(
            "{shown}: this lies inside the mount on {mountpoint}; give that path",
            mountpoint = mountpoint.display()
        ),
        Place::Foreign(_, kind) => {
            bail!("{shown}: mounted by {kind}, not by mlfs; `mlfs` only knows its own mounts")
        }
        Place::Free(_) => bail!(
            "{shown}: nothing is mounted here; `grep mlfs /proc/self/mounts` lists what mlfs has \
             mounted"
        ),
    }
}

/// Where mlfs is mounted, and what is meant below it, of a path that leads there or inside.
///
/// # Errors
/// It leads somewhere else.
pub(super) fn find_below(path: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    match locate(path)? {
        Place::Inside(mountpoint, inside) => Ok((mountpoint, inside)),
        Place::Mount(mountpoint) => Ok((mountpoint, PathBuf::new())),
        Place::Foreign(..) | Place::Free(_) => bail!(
            "{}: not on a mount of mlfs; `grep mlfs /proc/self/mounts` lists what mlfs has mounted",
            path.display()
        ),
    }
}

/// The only mount of mlfs there is.
///
/// # Errors
/// There is none, or more than one.
pub(super) fn only() -> anyhow::Result<PathBuf> {
    let mounts = Table::read()?.of_mlfs();
    match mounts.as_slice() {
        [mountpoint] => Ok(mountpoint.clone()),
        [] => bail!("mlfs has nothing mounted here; mount first: mlfs mount MOUNTPOINT"),
        _ => bail!(
            "mlfs has {} mounts here; say which with --mount MOUNTPOINT",
            mounts.len()
        ),
    }
}

/// The error of a mount that does not say what it is asked.
pub(super) fn unanswered(mountpoint: &Path, error: &Unanswered) -> anyhow::Error {
    let shown = mountpoint.display();
    match error {
        Unanswered::Dead => anyhow!("{shown}: {error}; remove the mount: mlfs unmount {shown}"),
        Unanswered::Silent => {
            let pid = processes::server(mountpoint);
            let pid = pid.map_or_else(|| "PID".to_owned(), |pid| pid.to_string());
            anyhow!(
                "{shown}: {error}; the mount stays. If it is stopped, continue it: kill -CONT \
                 {pid}. To give it up with what it has not stored: kill -9 {pid}, then mlfs \
                 unmount {shown}"
            )
        }
        // The kernel lets nobody else in, not even root.
        Unanswered::Failed(cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
            anyhow!("{shown}: it is another user's; ask as the one who mounted it")
        }
        Unanswered::Failed(_) => anyhow!("{shown}: it cannot be asked: {error}"),
    }
}

/// A mount point that belongs to this process alone. Dropping it lets others have it.
#[derive(Debug)]
pub(super) struct Claim {
    /// The directory below the mount, locked. Another process that mounts on it takes the lock
    /// first as well, so no two of them do.
    _directory: File,
}

/// Takes a mount point for this process.
///
/// # Errors
/// Another process has it; something is mounted there by now.
pub(super) fn claim(mountpoint: &Path) -> anyhow::Result<Claim> {
    let shown = mountpoint.display();
    let directory = File::open(mountpoint).with_context(|| format!("mount point {shown}"))?;
    match directory.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => bail!(
            "mount point {shown}: another mlfs is mounting it or has not ended yet; wait for it, \
             or choose another directory"
        ),
        // A filesystem without locks: two mounts at once are then told apart by nobody.
        Err(std::fs::TryLockError::Error(error)) => {
            tracing::warn!(mountpoint = %shown, %error, "the mount point cannot be locked");
        }
    }
    // Looked at before the lock was taken, this would say nothing.
    check_free(mountpoint)?;
    Ok(Claim {
        _directory: directory,
    })
}

/// The directory at `path`, without symlinks, if something can be mounted on it.
///
/// # Errors
/// Something is mounted there, or on the way there by mlfs.
pub(super) fn check_free(path: &Path) -> anyhow::Result<PathBuf> {
    let shown = path.display();
    match locate(path) {
        Ok(Place::Free(found)) => Ok(found),
        Ok(Place::Mount(_)) => bail!(
            "mount point {shown}: mlfs is already mounted here; see `mlfs status {shown}`, and \
             remove it with `mlfs unmount {shown}`, also if its process is gone"
        ),
        Ok(Place::Foreign(_, kind)) => bail!(
            "mount point {shown}: already mounted ({kind}); unmount it or choose another directory"
        ),
        Ok(Place::Inside(mountpoint, _)) => bail!(
            "mount point {shown}: this lies inside the mount on {}; choose a directory elsewhere",
            mountpoint.display()
        ),
        Err(error) => match error.downcast_ref::<io::Error>() {
            Some(cause) if cause.kind() == io::ErrorKind::NotFound => {
                bail!("mount point {shown}: there is no such directory; make it with mkdir -p")
            }
            Some(cause) => bail!("mount point {shown}: {cause}; choose a directory of your own"),
            None => Err(error),
        },
    }
}
