//! Logs: to stderr in the foreground, else to a file; never a secret.

mod redact;

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use redact::Redacting;

/// Starts logging at `level` (or with `MLFS_LOG`'s directives), to `file` or to stderr.
///
/// # Errors
/// The log file cannot be opened for appending.
pub fn start(level: tracing::Level, file: Option<&Path>) -> io::Result<()> {
    let directives = std::env::var("MLFS_LOG")
        .ok()
        .filter(|text| !text.is_empty());
    // Libraries are heard only when something is wrong: at debug they print whole requests.
    let directives = directives.unwrap_or_else(|| format!("warn,fuser=error,mlfs={level}"));
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("MLFS_LOG {directives:?}: {error}"),
        )
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false);
    match file {
        None => builder.with_ansi(false).with_writer(Stderr).init(),
        Some(path) => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            builder
                .with_ansi(false)
                .with_writer(ToFile(Arc::new(file)))
                .init();
        }
    }
    Ok(())
}

struct Stderr;

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Redacting<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Redacting::new(io::stderr())
    }
}

struct ToFile(Arc<std::fs::File>);

impl<'a> MakeWriter<'a> for ToFile {
    type Writer = Redacting<Arc<std::fs::File>>;

    fn make_writer(&'a self) -> Self::Writer {
        Redacting::new(Arc::clone(&self.0))
    }
}
