//! The background process: a re-execution of this program, never a fork of a running one.
//!
//! The child's standard output is a pipe to the parent. The child writes one line when the mount
//! answers, or what went wrong, and then lets go of the pipe.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::{AlreadyTold, serve};
use crate::config::Config;
use crate::telemetry;

const READY: &str = "ready";

/// Starts the background process and waits until its mount answers.
pub(super) fn start(config: &Config) -> anyhow::Result<()> {
    let log_file = config
        .log_file
        .as_ref()
        .context("a background mount needs a log file")?;
    // What the process says before it logs goes there too, and a panic.
    let log = serve::about_log(config, telemetry::open(log_file))?;
    let program = std::env::current_exe().context("this program's own path")?;
    let mut child = Command::new(program)
        // Behind the subcommand, before anything that may end the flags.
        .args(std::env::args_os().skip(1).take(1))
        .arg("--background-process")
        .args(std::env::args_os().skip(2))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("the background process could not be started")?;
    let mut told = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut told)
            .context("the background process")?;
    }
    match told.trim() {
        READY => Ok(()),
        "" => {
            let status = child.wait().context("the background process")?;
            bail!(
                "the background process ended without a word ({status}); see {}",
                log_file.display()
            )
        }
        message => bail!("{message}"),
    }
}

/// Serves in the background process.
pub(super) fn serve(config: &Config) -> anyhow::Result<()> {
    // SAFETY: setsid has no preconditions; the process is no group leader, having been spawned.
    unsafe { libc::setsid() };
    let _log = match serve::start_log(config) {
        Ok(log) => log,
        Err(error) => {
            tell(&format!("{error:#}"))?;
            return Err(AlreadyTold.into());
        }
    };
    let mut heard = false;
    let outcome = serve::run(config, || {
        heard = true;
        tell(READY)
    });
    outcome.map_err(|error| {
        let message = format!("{error:#}");
        tracing::error!("{message}");
        if !heard {
            // A parent that is gone has no use for it.
            let _ = tell(&message);
        }
        AlreadyTold.into()
    })
}

/// Writes the one line for the parent and lets go of the pipe.
fn tell(message: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{message}").context("telling the parent process")?;
    output.flush().context("telling the parent process")?;
    let null = OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .context("/dev/null")?;
    // SAFETY: both descriptors are open; standard output is replaced, not closed.
    if unsafe { libc::dup2(null.as_raw_fd(), libc::STDOUT_FILENO) } < 0 {
        return Err(std::io::Error::last_os_error()).context("standard output");
    }
    Ok(())
}
