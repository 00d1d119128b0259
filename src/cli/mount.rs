//! `mlfs mount`.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{anyhow, bail};
use clap::Args;

use super::{WrongUsage, background, mounts, serve};
use crate::config::{Config, MountArguments};
use crate::telemetry;

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
    let mut config = arguments.mount.validate().map_err(WrongUsage::new)?;
    // What is wrong with the environment is wrong usage too, also in the background.
    telemetry::filter(config.log_level).map_err(WrongUsage::new)?;
    let source = serve::tracking_source(&config).map_err(WrongUsage::new)?;
    serve::store_settings(&config, &source).map_err(WrongUsage::new)?;
    let outcome = check_mountpoint(&config.mountpoint);
    if arguments.background_process {
        // Checked by the parent; told to it if it has changed since.
        config.mountpoint = outcome.unwrap_or(config.mountpoint);
        return background::serve(&config);
    }
    config.mountpoint = outcome?;
    check_outside(&config)?;
    check_device(&config)?;
    if config.foreground {
        let _log = serve::start_log(&config)?;
        serve::run(&config, || Ok(()))
    } else {
        background::start(&config)
    }
}

/// The mount point, without symlinks: an empty directory that nothing is mounted on.
fn check_mountpoint(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let shown = mountpoint.display();
    let found = mounts::check_free(mountpoint)?;
    let mut entries = match std::fs::read_dir(&found) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            bail!("mount point {shown}: not a directory; choose an empty directory");
        }
        Err(error) => {
            bail!("mount point {shown}: {error}; choose an empty directory that is yours")
        }
    };
    if entries.next().is_some() {
        // What is seen may be another mlfs, which came between.
        mounts::check_free(mountpoint)?;
        bail!("mount point {shown}: not empty; choose an empty directory");
    }
    Ok(found)
}

/// What mlfs itself writes must not lie in its own mount, which would wait for itself.
fn check_outside(config: &Config) -> anyhow::Result<()> {
    let log_file = config.log_file.as_deref();
    let cache = config.cache.as_ref();
    let named = [
        ("--spill-dir", Some(config.spill_dir.as_path())),
        ("--cache-dir", cache.map(|cache| cache.directory.as_path())),
        ("--log-file", log_file),
    ];
    for (flag, path) in named {
        let Some(path) = path else { continue };
        // What does not exist yet is looked for where it will be.
        let existing = path.ancestors().find_map(|it| it.canonicalize().ok());
        if existing.is_some_and(|it| it.starts_with(&config.mountpoint)) {
            let error = anyhow!(
                "{flag} {}: it lies inside the mount point; give one outside",
                path.display()
            );
            return Err(WrongUsage::new(error).into());
        }
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
    // Only root mounts without this helper.
    if !root && let Err(error) = Command::new("fusermount3").arg("-V").output() {
        bail!("fusermount3: {error}; install your distribution's fuse3");
    }
    if config.allow_other && !root {
        let text = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
        if !text.lines().any(|line| line.trim() == "user_allow_other") {
            bail!("--allow-other: /etc/fuse.conf does not permit it; add a line user_allow_other");
        }
    }
    Ok(())
}
