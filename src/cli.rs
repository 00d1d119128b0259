//! The command line: one file per subcommand.

mod background;
mod mount;
mod mounts;
mod serve;
mod status;
mod unmount;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit codes: 0 done, 1 failed, 2 wrong usage (clap's own).
const FAILED: u8 = 1;

/// MLflow runs as directories: save models with ordinary file writes, read only what you touch.
#[derive(Debug, Parser)]
#[command(name = "mlfs", version, about, max_term_width = 100)]
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
    /// Show what a mount is doing
    Status(status::Arguments),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.command {
        Command::Mount(arguments) => mount::run(arguments),
        Command::Unmount(arguments) => unmount::run(arguments),
        Command::Status(arguments) => status::run(arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mlfs: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}
