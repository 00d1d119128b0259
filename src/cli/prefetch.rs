//! `mlfs prefetch`: files on local disk before they are read.
//!
//! A child ([`warmer`]) finds the files and asks the mount for their bytes, a range at a time, so
//! that whoever is interrupted leaves nothing behind that goes on fetching.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use indicatif::{BinaryBytes, ProgressBar};

use super::ask::{self, Unanswered};
use super::progress::bar;
use super::{mounts, warmer};
use crate::config::parse_duration;
use crate::read::DiskStatus;

/// How often progress is printed where there is no terminal.
const SAY: Duration = Duration::from_secs(5);
/// Where a cache makes room it makes an eighth of its size free: what is to stay leaves that out.
const SPARED_SHARE: u64 = 8;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files and directories on a mount; of a directory, all below it
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,

    /// How long to wait for the mount to say what it is (500ms, 10s, 1m)
    #[arg(long, env = "MLFS_PREFETCH_TIMEOUT", value_name = "DURATION", default_value = "10s",
          value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut below: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for path in &arguments.paths {
        let (mountpoint, inside) = mounts::find_below(path)?;
        let told = |error: Unanswered| match error {
            Unanswered::Failed(error) => anyhow!("{}: {}", path.display(), warmer::reason(&error)),
            error => mounts::unanswered(&mountpoint, &error),
        };
        let inside = ask::place(&mountpoint, &inside, arguments.timeout).map_err(told)?;
        let paths = below.entry(mountpoint).or_default();
        paths.push(inside);
    }
    for (mountpoint, paths) in below {
        let status = ask::status(&mountpoint, arguments.timeout);
        let status = status.map_err(|error| mounts::unanswered(&mountpoint, &error))?;
        one_mount(&mountpoint, &paths, status.read.disk)?;
    }
    Ok(())
}

fn one_mount(mountpoint: &Path, paths: &[PathBuf], disk: Option<DiskStatus>) -> anyhow::Result<()> {
    let disk = disk.filter(|disk| disk.on);
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(warmer::NAME);
    if let Some(disk) = disk {
        command.arg("--disk");
        let room = disk.limit - disk.limit / SPARED_SHARE;
        command.args(["--room", &room.to_string()]);
    }
    let mut child = command
        .arg("--")
        .arg(mountpoint)
        .args(paths)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the process that asks the mount")?;
    let pipe = child.stdout.take().context("its output is not there")?;
    let mut progress = Progress::new();
    for line in BufReader::new(pipe).lines() {
        let said = serde_json::from_str(&line?).context("the process that asks the mount")?;
        progress.hear(said);
    }
    progress.end();
    let ended = child.wait()?;
    let Progress {
        files,
        bytes,
        failed,
        too_large,
        ..
    } = progress;
    if let (Some(needed), Some(disk)) = (too_large, disk) {
        bail!(
            "{} of files do not fit into a disk cache of {}, of which an eighth is kept free for \
             others: nothing was fetched; name fewer, or mount with a larger --cache-size",
            BinaryBytes(needed),
            BinaryBytes(disk.limit)
        );
    }
    for (path, reason) in &failed {
        // Nobody is told that standard error is closed.
        let _ = writeln!(io::stderr(), "mlfs: {}: {reason}", path.display());
    }
    if !failed.is_empty() {
        bail!("{} of {files} files are not prefetched", failed.len());
    }
    if !ended.success() {
        bail!(
            "{}: the process that asked it ended early",
            mountpoint.display()
        );
    }
    let whereto = match disk {
        Some(_) => "in the disk cache",
        None => {
            "in the kernel's cache, while it has room and the mount lasts (a disk cache keeps it: \
             mount with --cache-dir)"
        }
    };
    let text = format!("{files} files, {}, are {whereto}", BinaryBytes(bytes));
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}

/// What the child has said so far, and who is shown it.
struct Progress {
    bar: Option<ProgressBar>,
    said: Instant,
    files: u64,
    bytes: u64,
    done: u64,
    failed: BTreeMap<PathBuf, String>,
    /// Bytes in all, if they are more than the cache holds.
    too_large: Option<u64>,
}

impl Progress {
    fn new() -> Self {
        Self {
            bar: io::stderr().is_terminal().then(bar),
            said: Instant::now(),
            files: 0,
            bytes: 0,
            done: 0,
            failed: BTreeMap::new(),
            too_large: None,
        }
    }

    fn hear(&mut self, said: warmer::Said) {
        match said {
            warmer::Said::Found { files, bytes } => (self.files, self.bytes) = (files, bytes),
            warmer::Said::TooLarge => self.too_large = Some(self.bytes),
            warmer::Said::Done { bytes } => self.done += bytes,
            warmer::Said::Failed { path, reason } => {
                self.failed.entry(path).or_insert(reason);
            }
        }
        if let Some(bar) = &self.bar {
            bar.set_length(self.bytes);
            bar.set_position(self.done);
            bar.set_message(format!("{} files", self.files));
        } else if self.said.elapsed() > SAY {
            eprintln!(
                "mlfs: {} of {} bytes of {} files fetched",
                self.done, self.bytes, self.files
            );
            self.said = Instant::now();
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
