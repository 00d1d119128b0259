//! `mlfs status`: what a mount is doing.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{ask, mounts};
use crate::config::parse_duration;
use crate::vfs::Status;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,

    /// Print the whole document as JSON
    #[arg(long)]
    json: bool,

    /// How long to wait for the answer (500ms, 10s, 1m)
    #[arg(long, env = "MLFS_STATUS_TIMEOUT", value_name = "DURATION", default_value = "10s",
          value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let path = mounts::find(&arguments.mountpoint)?;
    let status =
        ask::status(&path, arguments.timeout).map_err(|error| mounts::unanswered(&path, &error))?;
    let mut text = if arguments.json {
        serde_json::to_string_pretty(&status)?
    } else {
        describe(&status)
    };
    text.push('\n');
    match io::stdout().write_all(text.as_bytes()) {
        // `mlfs status | head -1` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}

fn describe(status: &Status) -> String {
    let mut lines = vec![
        format!(
            "{} on {} (pid {})",
            status.tracking_uri, status.mountpoint, status.pid
        ),
        format!(
            "memory  {} of {} bytes",
            status.memory.used, status.memory.limit
        ),
        format!(
            "spill   {} of {} bytes",
            status.spill.used, status.spill.limit
        ),
        format!("read    {} bytes served", status.read.bytes_served),
    ];
    match &status.read.disk {
        Some(disk) if disk.on => lines.push(format!(
            "cache   {} of {} bytes on disk, {} bytes read from there",
            disk.bytes_stored, disk.limit, status.read.bytes_from_disk
        )),
        Some(_) => lines.push("cache   off: the disk failed, see the log".to_owned()),
        None => {}
    }
    if status.pending.is_empty() {
        lines.push("everything written is stored".to_owned());
    }
    lines.extend(status.pending.iter().map(|file| {
        let reason = match (&file.reason, &file.held_by) {
            (Some(reason), _) => reason.clone(),
            (None, Some(other)) => format!("comes after {other}"),
            (None, None) => String::new(),
        };
        format!("{:9} {:>14} {} {reason}", file.state, file.size, file.path)
    }));
    lines.join("\n")
}
