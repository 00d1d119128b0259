//! `mlfs mount`.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use clap::Args;

use super::{background, mounts, serve};
use crate::config::{Config, MountArguments};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    mount: MountArguments,

    /// This is the background process of a mount; tell the parent on stdout
    #[arg(long, hide = true)]
    background_process: bool,
}

/// Mounts, in the background unless told otherwise.
pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = arguments.mount.validate()?;
    if arguments.background_process {
        return background::serve(&config);
    }
    check_mountpoint(&config.mountpoint)?;
    check_device(&config)?;
    if config.foreground {
        serve::run(&config, || Ok(()))
    } else {
        background::start(&config)
    }
}

/// The mount point must be an empty directory that nothing is mounted on.
fn check_mountpoint(mountpoint: &Path) -> anyhow::Result<()> {
    let shown = mountpoint.display();
    if let Some(kind) = mounts::mounted(mountpoint)? {
        if mounts::is_dead(mountpoint) {
            bail!(
                "mount point {shown}: a mount that ended without unmounting is still there; \
                 remove it with `mlfs unmount {shown}`"
            );
        }
        bail!("mount point {shown}: already mounted ({kind}); unmount it or choose another");
    }
    let metadata = match std::fs::metadata(mountpoint) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("mount point {shown}: there is no such directory; make it with mkdir");
        }
        Err(error) => {
            return Err(error).with_context(|| format!("mount point {shown}"));
        }
    };
    if !metadata.is_dir() {
        bail!("mount point {shown}: not a directory; choose an empty directory");
    }
    let mut entries =
        std::fs::read_dir(mountpoint).with_context(|| format!("mount point {shown}"))?;
    if entries.next().is_some() {
        bail!("mount point {shown}: not empty; choose an empty directory");
    }
    Ok(())
}

fn check_device(config: &Config) -> anyhow::Result<()> {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "/dev/fuse: there is no FUSE here; load the kernel's fuse module, or start the \
             container with --device /dev/fuse --cap-add SYS_ADMIN"
        ),
        Err(error) => bail!("/dev/fuse: {error}; ask for read and write permission on it"),
    }
    if config.allow_other && !root {
        let text = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
        if !text.lines().any(|line| line.trim() == "user_allow_other") {
            bail!("--allow-other: /etc/fuse.conf does not permit it; add a line user_allow_other");
        }
    }
    Ok(())
}
