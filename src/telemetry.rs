//! Logs: to stderr in the foreground, else to a file; never a secret.

mod queue;
mod redact;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

use queue::Queue;

/// How long a program that ends waits for its last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(2);

/// A log that is running; dropping it waits for the last lines, for two seconds at most.
#[derive(Debug)]
#[must_use]
pub struct Log(Queue);

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(LAST_LINES);
    }
}

/// What is logged: `level`, or what the directives in `MLFS_LOG` say.
///
/// # Errors
/// Directives that are not understood.
pub fn filter(level: tracing::Level) -> anyhow::Result<EnvFilter> {
    let directives = std::env::var("MLFS_LOG")
        .ok()
        .filter(|text| !text.is_empty());
    // Libraries are heard only when something is wrong: at debug they print whole requests.
    let directives = directives.unwrap_or_else(|| format!("warn,fuser=error,mlfs={level}"));
    EnvFilter::try_new(&directives).map_err(|error| {
        anyhow!("MLFS_LOG {directives:?}: {error}; give directives like mlfs=debug,warn")
    })
}

/// Starts logging to `file` or to stderr.
///
/// # Errors
/// The log file cannot be opened and written to.
pub fn start(filter: EnvFilter, file: Option<&Path>) -> io::Result<Log> {
    let queue = match file {
        None => Queue::start(io::stderr())?,
        Some(path) => {
            let mut file = open(path)?;
            // Whether the disk takes anything shows now, while there is somebody to tell.
            writeln!(
                file,
                "mlfs {} (pid {})",
                env!("CARGO_PKG_VERSION"),
                std::process::id()
            )?;
            Queue::start(file)?
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false)
        // It would tell stderr, which may be the log itself.
        .log_internal_errors(false)
        .with_writer(queue.clone())
        .init();
    Ok(Log(queue))
}

/// Opens a log file for appending and makes its folder; what is new is for its owner's eyes only.
///
/// # Errors
/// What keeps the file or its folder from being made.
pub fn open(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}
