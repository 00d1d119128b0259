//! `mlfs wait`: until everything below a path is stored.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use clap::Args;

use super::ask::{self, Unanswered};
use super::mounts;
use super::progress::Progress;
use crate::config::parse_duration;
use crate::vfs::{UploadStatus, moving};

/// How often the mount is asked.
const LOOK: Duration = Duration::from_millis(100);
/// How long one question may stay without an answer.
const LONGEST_SILENCE: Duration = Duration::from_secs(10);
const SHORTEST_SILENCE: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A mount point, or a directory or file on it
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// How long to wait (30s, 15m, 0, forever)
    #[arg(long, env = "MLFS_WAIT_TIMEOUT", value_name = "DURATION", default_value = "forever",
          value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let place = place(&arguments.path)?;
    until_stored(&arguments.path, &place, arguments.timeout)
}

/// Where a path leads: a mount point, and the path below it.
pub(super) type Place = (PathBuf, PathBuf);

/// Where `path` leads.
///
/// # Errors
/// It is on no mount; there is nothing; the mount does not answer.
pub(super) fn place(path: &Path) -> anyhow::Result<Place> {
    let (mountpoint, below) = mounts::find_below(path)?;
    let below = ask::place(&mountpoint, &below, LONGEST_SILENCE);
    let below = below.map_err(|error| match error {
        Unanswered::Failed(error) => anyhow!("{}: {error}", path.display()),
        error => mounts::unanswered(&mountpoint, &error),
    })?;
    Ok((mountpoint, below))
}

/// Waits until everything at `place` and below is stored.
///
/// # Errors
/// Something is not, and does not get any further; the time is over; the mount does not answer.
pub(super) fn until_stored(
    path: &Path,
    (mountpoint, below): &Place,
    timeout: Duration,
) -> anyhow::Result<()> {
    let shown = path.display();
    let deadline = Instant::now().checked_add(timeout);
    let told = |error: Unanswered| match error {
        Unanswered::Failed(error) => anyhow!("{shown}: {error}"),
        error => mounts::unanswered(mountpoint, &error),
    };
    let mut progress = Progress::new();
    loop {
        let asked = ask::status(mountpoint, patience(deadline));
        let status = asked.inspect_err(|_| progress.end()).map_err(told)?;
        let all = status.uploads;
        let meant = |upload: &&UploadStatus| Path::new(&upload.path).starts_with(below);
        let left: Vec<&UploadStatus> = all.iter().filter(meant).collect();
        let moves = moving(&all, true).iter().any(meant);
        if left.is_empty() {
            progress.show(&left);
            progress.end();
            return Ok(());
        }
        let over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if !moves || over {
            progress.end();
            for upload in &left {
                // Nobody is told that standard error is closed.
                let _ = writeln!(io::stderr(), "mlfs: not stored: {}", describe(upload));
            }
            bail!(
                "{shown}: {} files are not stored; their bytes are kept",
                left.len()
            );
        }
        progress.show(&left);
        std::thread::sleep(LOOK);
    }
}

/// For one question: also who waits for nothing is given an answer.
fn patience(deadline: Option<Instant>) -> Duration {
    let left = deadline.map_or(LONGEST_SILENCE, |deadline| {
        deadline.saturating_duration_since(Instant::now())
    });
    left.clamp(SHORTEST_SILENCE, LONGEST_SILENCE)
}

fn describe(upload: &UploadStatus) -> String {
    let why = match (&upload.reason, &upload.held_by) {
        (Some(reason), _) => format!(": {reason}"),
        (None, Some(other)) => format!(": comes after {other}"),
        (None, None) => String::new(),
    };
    let UploadStatus {
        path, size, state, ..
    } = upload;
    format!("{path} ({size} bytes, {state}{why})")
}
