//! `mlfs unmount`: nothing is unmounted before it is stored.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use super::ask::{self, Unanswered};
use super::progress::Progress;
use super::{mounts, processes};
use crate::config::parse_duration;
use crate::fuse::unmount_path;
use crate::vfs::{Status, UploadStatus};

/// How often the mount is asked.
const LOOK: Duration = Duration::from_millis(100);
/// How long one question may stay without an answer; then it is said that there is none.
const LONGEST_SILENCE: Duration = Duration::from_secs(10);
const SHORTEST_SILENCE: Duration = Duration::from_secs(1);
/// How often what failed is asked to be tried again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,

    /// How long to wait for what is not stored yet, then for who uses the mount (30s, 15m, 0,
    /// forever)
    #[arg(long, env = "MLFS_UNMOUNT_TIMEOUT", value_name = "DURATION", default_value = "15m",
          value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let path = mounts::find(&arguments.mountpoint)?;
    let patience = Patience::new(arguments.timeout);
    let Some(status) = wait_until_stored(&path, &patience)? else {
        unmount_path(&path, true).with_context(|| format!("unmounting {}", path.display()))?;
        eprintln!(
            "mlfs: {}: its process was gone already; the dead mount is removed",
            path.display()
        );
        return Ok(());
    };
    wait_until_unmounted(&path, status.pid, &patience)?;
    wait_for_process(status.pid, &patience)
}

/// How long to go on.
struct Patience {
    /// `None`: for ever.
    deadline: Option<Instant>,
}

impl Patience {
    fn new(timeout: Duration) -> Self {
        Self {
            deadline: Instant::now().checked_add(timeout),
        }
    }

    fn is_over(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// For one question: also a mount that is told to wait for nothing is given a moment.
    fn for_answer(&self) -> Duration {
        let left = self.deadline.map_or(LONGEST_SILENCE, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        left.clamp(SHORTEST_SILENCE, LONGEST_SILENCE)
    }
}

/// The last status of the mount, when nothing is pending any more; `None` when its process is gone.
fn wait_until_stored(path: &Path, patience: &Patience) -> anyhow::Result<Option<Status>> {
    let mut progress = Progress::new();
    let mut asked: Option<Instant> = None;
    let mut silent = false;
    loop {
        // Again and again: what failed may succeed by now.
        let mut answer = Ok(());
        if asked.is_none_or(|asked| asked.elapsed() > ASK_AGAIN) {
            answer = ask::drain(path, patience.for_answer());
            asked = Some(Instant::now());
        }
        match answer.and_then(|()| ask::status(path, patience.for_answer())) {
            Ok(status) if status.pending.is_empty() => {
                progress.end();
                return Ok(Some(status));
            }
            Ok(status) if patience.is_over() => {
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
            Ok(status) => {
                progress.show(&status.pending.iter().collect::<Vec<_>>());
                std::thread::sleep(LOOK);
            }
            Err(Unanswered::Dead) => return Ok(None),
            Err(Unanswered::Silent) if !patience.is_over() => {
                if !silent {
                    progress.end();
                    eprintln!(
                        "mlfs: {}: its process does not answer; waiting",
                        path.display()
                    );
                }
                (silent, asked) = (true, None);
            }
            Err(error) => {
                progress.end();
                return Err(mounts::unanswered(path, &error));
            }
        }
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

fn wait_until_unmounted(path: &Path, server: u32, patience: &Patience) -> anyhow::Result<()> {
    loop {
        match unmount_path(path, false) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && !patience.is_over() => {
                std::thread::sleep(LOOK);
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let users = processes::users(path, server);
                let users = if users.is_empty() {
                    "a process that cannot be told".to_owned()
                } else {
                    users.join(", ")
                };
                bail!(
                    "{}: in use by {users}; everything written is stored; end what uses it and \
                     unmount again",
                    path.display()
                );
            }
            Err(error) => {
                return Err(error).with_context(|| format!("unmounting {}", path.display()));
            }
        }
    }
}

/// The mount's process ends by itself once the kernel has let it go.
fn wait_for_process(pid: u32, patience: &Patience) -> anyhow::Result<()> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    while process.exists() && !is_zombie(&process) {
        if patience.is_over() {
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
