//! `mlfs cache`: what the disk cache holds, of all mounts that use it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use indicatif::BinaryBytes;

use crate::config::cache_folder;
use crate::read::{CacheUsage, cache_usage, clear_cache};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,

    /// The cache's folder, as the mounts were told [default: the user's cache folder, mlfs/blocks]
    #[arg(long, global = true, env = "MLFS_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show how much it holds
    Info {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete all that it holds; mounts that use it go on, and fetch anew
    Clear,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let folder = cache_folder(arguments.cache_dir.as_deref())?;
    let text = match arguments.action {
        Action::Info { json } => {
            let usage = cache_usage(&folder).map_err(|error| told(&folder, &error))?;
            if json {
                serde_json::to_string_pretty(&usage)?
            } else {
                format!("{}: {}", folder.display(), describe(&usage))
            }
        }
        Action::Clear => {
            let cleared = clear_cache(&folder).map_err(|error| told(&folder, &error))?;
            let Some(usage) = cleared else {
                bail!(
                    "{}: another process is deleting from it; try again",
                    folder.display()
                );
            };
            format!("{}: deleted {}", folder.display(), describe(&usage))
        }
    };
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}

fn describe(usage: &CacheUsage) -> String {
    let CacheUsage {
        versions, bytes, ..
    } = usage;
    format!("{} of {versions} versions of files", BinaryBytes(*bytes))
}

fn told(folder: &Path, error: &io::Error) -> anyhow::Error {
    let shown = folder.display();
    if error.kind() == io::ErrorKind::NotFound {
        return anyhow!(
            "{shown}: no disk cache here; name its folder with --cache-dir, as the mount was told"
        );
    }
    anyhow!("{shown}: {error}")
}
