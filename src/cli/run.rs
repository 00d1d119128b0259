//! `mlfs run end`: a run is over.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::wait::{self, Place};
use super::{WrongUsage, server};
use crate::catalog::RootId;
use crate::config::parse_duration;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Wait until a run is stored, then mark it as ended
    End(End),
}

#[derive(Debug, Args)]
struct End {
    /// The run's directory, by its id or by its name
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// How it has ended
    #[arg(
        long,
        value_name = "STATUS",
        default_value = "FINISHED",
        ignore_case = true
    )]
    status: Status,

    /// How long to wait for what is not stored yet (30s, 15m, 0, forever)
    #[arg(long, value_name = "DURATION", default_value = "forever", value_parser = parse_duration)]
    timeout: Duration,
}

/// MLflow's words.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "UPPER")]
enum Status {
    Finished,
    Failed,
    Killed,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Finished => "FINISHED",
            Self::Failed => "FAILED",
            Self::Killed => "KILLED",
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match &arguments.command {
        Command::End(arguments) => {
            let place = wait::place(&arguments.path)?;
            let run_id = run_of(&arguments.path, &place)?;
            let tracking = server::of_mount(&place)?;
            wait::until_stored(&arguments.path, &place, arguments.timeout)?;
            server::answer(tracking.end_run(&run_id, arguments.status.word()))
        }
    }
}

/// The id of the run that a path leads to.
pub(super) fn run_of(path: &std::path::Path, (_, below): &Place) -> anyhow::Result<String> {
    match below.to_str().and_then(RootId::of_path) {
        Some(RootId::Run(run_id)) if below.as_os_str() == &*run_id => Ok(run_id.to_string()),
        _ => Err(WrongUsage(format!(
            "{}: not a run's directory; give one like MOUNTPOINT/RUN_ID",
            path.display()
        ))
        .into()),
    }
}
