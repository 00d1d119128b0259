//! `mlfs uploads`: what is not stored yet, and what to do with it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use clap::{Args, Subcommand};

use super::ask::{self, Unanswered};
use super::mounts;
use super::progress::Progress;
use crate::config::parse_duration;
use crate::vfs::{UploadStatus, moving};

/// How often the mount is asked how far it is.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,

    /// The mount to ask [default: the only one there is]
    #[arg(long, global = true, env = "MLFS_MOUNT", value_name = "MOUNTPOINT")]
    mount: Option<PathBuf>,

    /// How long to wait for an answer (500ms, 10s, 1m)
    #[arg(long, global = true, env = "MLFS_UPLOADS_TIMEOUT", value_name = "DURATION",
          default_value = "1m", value_parser = parse_duration)]
    timeout: Duration,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show every file that is not wholly in the store, and why
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Send again what failed or was left by a former mount, and wait for it
    Retry {
        /// Which ones, as `list` shows them [default: all that failed or were left]
        ids: Vec<String>,
    },
    /// Delete the bytes of uploads that nobody wants any more
    Discard {
        /// Which ones, as `list` shows them
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,

        /// All that failed or were left by a former mount
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let path = match &arguments.mount {
        Some(path) => mounts::find(path)?,
        None => mounts::only()?,
    };
    let patience = arguments.timeout;
    let told = |error: Unanswered| match error {
        Unanswered::Failed(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            anyhow::anyhow!("no such upload; `mlfs uploads list` shows those there are")
        }
        Unanswered::Failed(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            anyhow::anyhow!("it is being written or sent; close it, or wait")
        }
        error => mounts::unanswered(&path, &error),
    };
    let list = || Ok(ask::status(&path, patience).map_err(told)?.uploads);
    match &arguments.action {
        Action::List { json } => show(&list()?, *json),
        Action::Retry { ids } => {
            let waiting = list()?.into_iter().filter(UploadStatus::waits_for_a_word);
            let meant: Vec<String> = match ids.as_slice() {
                [] => waiting.map(|upload| upload.id).collect(),
                ids => ids.to_vec(),
            };
            if meant.is_empty() {
                return Ok(());
            }
            ask::retry(&path, &meant, patience).map_err(told)?;
            wait(&meant, list)
        }
        Action::Discard { ids, .. } => ask::discard(&path, &named(ids), patience).map_err(told),
    }
}

/// What the mount is told: none are all.
fn named(ids: &[String]) -> Vec<String> {
    match ids {
        [] => vec!["all".to_owned()],
        ids => ids.to_vec(),
    }
}

/// Waits until what was sent again is stored, or has failed again.
fn wait(
    ids: &[String],
    list: impl Fn() -> anyhow::Result<Vec<UploadStatus>>,
) -> anyhow::Result<()> {
    let meant = |upload: &&UploadStatus| ids.contains(&upload.id);
    let mut progress = Progress::new();
    loop {
        let all = list().inspect_err(|_| progress.end())?;
        let uploads: Vec<&UploadStatus> = all.iter().filter(meant).collect();
        progress.show(&uploads);
        // One that somebody writes to again is stored by its close.
        if moving(&all, false).iter().any(meant) {
            std::thread::sleep(LOOK);
            continue;
        }
        progress.end();
        let stuck: Vec<String> = uploads
            .iter()
            .filter(|upload| upload.waits_for_a_word())
            .map(|upload| {
                let reason = upload.reason.as_deref().unwrap_or("no reason told");
                format!("{} {}: {reason}", upload.id, upload.path)
            })
            .collect();
        if stuck.is_empty() {
            return Ok(());
        }
        bail!("not stored: {}", stuck.join("; "));
    }
}

fn show(uploads: &[UploadStatus], json: bool) -> anyhow::Result<()> {
    let mut text = if json {
        serde_json::to_string_pretty(uploads)?
    } else {
        describe(uploads)
    };
    text.push('\n');
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}

fn describe(uploads: &[UploadStatus]) -> String {
    if uploads.is_empty() {
        return "everything written is stored".to_owned();
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let lines = uploads.iter().map(|upload| {
        format!(
            "{}  {:9}  {:>9}  {:>4}  {}{}",
            upload.id,
            upload.state,
            size(upload.size),
            age(now.saturating_sub(upload.since)),
            upload.path,
            upload
                .reason
                .as_ref()
                .map_or_else(String::new, |reason| format!("\n          {reason}"))
        )
    });
    let heading = format!(
        "{:8}  {:9}  {:>9}  {:>4}  {}",
        "ID", "STATE", "SIZE", "AGE", "PATH"
    );
    std::iter::once(heading)
        .chain(lines)
        .collect::<Vec<_>>()
        .join("\n")
}

/// `12 B`, `3.4 GiB`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `40s`, `5m`, `3h`, `12d`.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_short() {
        assert_eq!(size(12), "12 B");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
        assert_eq!(
            [age(59), age(60), age(7200), age(200_000)],
            ["59s", "1m", "2h", "2d"]
        );
    }
}
