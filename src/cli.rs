//! The command line: one file per subcommand.

mod ask;
mod background;
mod cache;
mod log_model;
mod mount;
mod mounts;
mod prefetch;
mod processes;
mod progress;
mod run;
mod serve;
mod server;
mod status;
mod unmount;
mod uploads;
mod wait;
mod warmer;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit codes: 0 done, 1 failed, 2 wrong usage (clap's own).
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage";

/// MLflow runs as directories: save models with ordinary file writes, read only what you touch.
#[derive(Debug, Parser)]
#[command(name = "mlfs", version, about, max_term_width = 100, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a tracking server's runs
    Mount(Box<mount::Arguments>),
    /// Wait until everything written is stored, then unmount
    Unmount(unmount::Arguments),
    /// Wait until everything written below a path is stored
    Wait(wait::Arguments),
    /// Show what a mount is doing
    Status(status::Arguments),
    /// Show, send again or discard what is not stored
    Uploads(uploads::Arguments),
    /// Fetch files before they are read, into the disk cache if there is one
    Prefetch(prefetch::Arguments),
    /// End a run whose files were written here
    Run(run::Arguments),
    /// Make a logged model of a run and print the directory to save it into; or mark one as done
    LogModel(log_model::Arguments),
    /// Show or empty the disk cache
    Cache(cache::Arguments),
    /// The child of another subcommand; it may hang where that one must not
    #[command(name = ask::NAME, hide = true)]
    Ask(ask::Arguments),
    /// The same for a prefetch
    #[command(name = warmer::NAME, hide = true)]
    Warm(warmer::Arguments),
}

/// An error that a different command line, or a different environment, would not have.
#[derive(Debug)]
struct WrongUsage(String);

impl WrongUsage {
    fn new(error: impl Into<anyhow::Error>) -> Self {
        Self(format!("{:#}", error.into()))
    }
}

impl fmt::Display for WrongUsage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// An error that stands in the log and has been told to whom it concerns.
#[derive(Debug)]
struct AlreadyTold;

impl fmt::Display for AlreadyTold {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("see the log")
    }
}

impl std::error::Error for AlreadyTold {}

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.command {
        Command::Mount(arguments) => mount::run(arguments),
        Command::Unmount(arguments) => unmount::run(arguments),
        Command::Wait(arguments) => wait::run(arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Uploads(arguments) => uploads::run(arguments),
        Command::Prefetch(arguments) => prefetch::run(arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::LogModel(arguments) => log_model::run(arguments),
        Command::Cache(arguments) => cache::run(arguments),
        Command::Ask(arguments) => ask::run(arguments),
        Command::Warm(arguments) => warmer::run(arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is told that standard error is closed or full.
            if !error.is::<AlreadyTold>() {
                let _ = writeln!(io::stderr(), "mlfs: {error:#}");
            }
            let usage = error.is::<WrongUsage>();
            ExitCode::from(if usage { USAGE } else { FAILED })
        }
    }
}
