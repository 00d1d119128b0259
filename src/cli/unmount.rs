//! `mlfs unmount`: nothing is unmounted before it is stored.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use super::mounts;
use crate::config::parse_duration;
use crate::fuse::unmount_path;
use crate::vfs::{Status, UploadStatus};

/// How often the mount is asked.
const LOOK: Duration = Duration::from_millis(100);
/// How often what failed is asked to be tried again.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How often progress is printed where there is no terminal.
const SAY: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,

    /// How long to wait for what is not stored yet (30s, 15m, forever)
    #[arg(long, env = "MLFS_UNMOUNT_TIMEOUT", value_name = "DURATION", default_value = "15m",
          value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let path = std::path::absolute(&arguments.mountpoint)?;
    let shown = path.display();
    mounts::check_mlfs(&path)?;
    if mounts::is_dead(&path) {
        unmount_path(&path, true).with_context(|| format!("unmounting {shown}"))?;
        eprintln!("mlfs: {shown}: its process was gone already; the dead mount is removed");
        return Ok(());
    }
    let deadline = Instant::now().checked_add(arguments.timeout);
    let expired = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    let status = wait_until_stored(&path, expired)?;
    wait_until_unmounted(&path, expired)?;
    wait_for_process(status.pid, expired)
}

fn wait_until_stored(path: &Path, expired: impl Fn() -> bool) -> anyhow::Result<Status> {
    let mut progress = Progress::new();
    mounts::drain(path).with_context(|| format!("asking {} to finish", path.display()))?;
    let mut asked = Instant::now();
    loop {
        let status = mounts::ask(path)?;
        if status.pending.is_empty() {
            progress.end();
            return Ok(status);
        }
        if expired() {
            progress.end();
            for file in &status.pending {
                eprintln!("mlfs: not stored: {}", describe(file));
            }
            bail!(
                "{}: {} files are not stored yet; the mount stays, and nothing is lost",
                path.display(),
                status.pending.len()
            );
        }
        progress.say(&status.pending);
        if asked.elapsed() > ASK_AGAIN {
            // What failed may succeed by now.
            mounts::drain(path).with_context(|| format!("asking {} to finish", path.display()))?;
            asked = Instant::now();
        }
        std::thread::sleep(LOOK);
    }
}

fn describe(file: &UploadStatus) -> String {
    let reason = file
        .reason
        .as_ref()
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    format!(
        "{} ({} bytes, {}{reason})",
        file.path, file.size, file.state
    )
}

fn wait_until_unmounted(path: &Path, expired: impl Fn() -> bool) -> anyhow::Result<()> {
    loop {
        match unmount_path(path, false) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && !expired() => {
                std::thread::sleep(LOOK);
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let users = users(path);
                let users = if users.is_empty() {
                    "unknown".to_owned()
                } else {
                    users.join(", ")
                };
                bail!(
                    "{}: in use by {users}; everything written is stored",
                    path.display()
                );
            }
            Err(error) => {
                return Err(error).with_context(|| format!("unmounting {}", path.display()));
            }
        }
    }
}

/// Processes that have something below `path` open, or stand in it.
fn users(path: &Path) -> Vec<String> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for process in processes.flatten() {
        let folder = process.path();
        let Some(pid) = folder
            .file_name()
            .and_then(|name| name.to_str()?.parse::<u32>().ok())
        else {
            continue;
        };
        let stands = std::fs::read_link(folder.join("cwd")).is_ok_and(|cwd| cwd.starts_with(path));
        let opened = std::fs::read_dir(folder.join("fd")).is_ok_and(|files| {
            files.flatten().any(|file| {
                std::fs::read_link(file.path()).is_ok_and(|target| target.starts_with(path))
            })
        });
        if stands || opened {
            let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
            found.push(format!("{} (pid {pid})", name.trim()));
        }
    }
    found
}

/// The mount's process ends by itself once the kernel has let it go.
fn wait_for_process(pid: u32, expired: impl Fn() -> bool) -> anyhow::Result<()> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    while process.exists() && !is_zombie(&process) {
        if expired() {
            bail!("unmounted, but its process (pid {pid}) is still at work; its log says on what");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn is_zombie(process: &Path) -> bool {
    std::fs::read_to_string(process.join("stat")).is_ok_and(|text| {
        text.rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" Z"))
    })
}

/// One line that is rewritten on a terminal, a line now and then elsewhere.
struct Progress {
    terminal: bool,
    said: Option<Instant>,
}

impl Progress {
    fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
            said: None,
        }
    }

    fn say(&mut self, pending: &[UploadStatus]) {
        let pause = if self.terminal { LOOK } else { SAY };
        if self.said.is_some_and(|said| said.elapsed() < pause) {
            return;
        }
        let bytes: u64 = pending.iter().map(|file| file.size).sum();
        let text = format!(
            "waiting for {} files ({bytes} bytes) to be stored",
            pending.len()
        );
        if self.terminal {
            eprint!("\r\x1b[K{text}");
            let _ = io::stderr().flush();
        } else if self.said.is_some() {
            eprintln!("mlfs: {text}");
        }
        self.said = Some(Instant::now());
    }

    fn end(&self) {
        if self.terminal && self.said.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}
