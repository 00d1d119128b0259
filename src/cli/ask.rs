//! Asking a running mount, through its `.mlfs/` files, without the risk of hanging.
//!
//! A call into a mount whose process is stopped does not return, and may not even be killed. So a
//! child process makes it: this program again, with a subcommand of its own. Who asked goes on, or
//! ends, whatever becomes of the child.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::catalog::EXPERIMENTS;
use crate::vfs::Status;

/// The hidden subcommand.
pub(super) const NAME: &str = "ask-mount";

/// How often, and for how long each time, it is waited for the name of a run to be a link.
const LOOKS: usize = 30;
const LOOK: Duration = Duration::from_millis(100);
/// Names above that of a run: `experiments`, and the experiment's.
const NAMES_OF_RUN: usize = 2;
/// A question that says it all.
const NOTHING: &[&str] = &[];

#[derive(Debug, Args)]
pub(super) struct Arguments {
    question: Question,
    mountpoint: PathBuf,
    /// Of uploads; or a path below the mount point.
    ids: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Question {
    /// What it is doing.
    Status,
    /// That it send what is closed and unsent.
    Drain,
    /// That it send these uploads again.
    Retry,
    /// That it give these uploads up.
    Discard,
    /// Where a path leads.
    Place,
}

impl Question {
    fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Drain => "drain",
            Self::Retry => "retry",
            Self::Discard => "discard",
            Self::Place => "place",
        }
    }
}

/// What the child says: a document, or an errno.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    Document(String),
    Error(i32),
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// Its process is gone.
    Dead,
    /// Its process is there and says nothing.
    Silent,
    Failed(io::Error),
}

impl fmt::Display for Unanswered {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dead => formatter.write_str("its process is gone"),
            Self::Silent => formatter.write_str("its process does not answer"),
            Self::Failed(error) => error.fmt(formatter),
        }
    }
}

impl std::error::Error for Unanswered {}

/// What the mount at `path` is doing.
pub(super) fn status(path: &Path, patience: Duration) -> Result<Status, Unanswered> {
    let document = ask(path, Question::Status, NOTHING, patience)?;
    serde_json::from_str(&document).map_err(|error| {
        let text = format!("its status is not understood, is it another version's? ({error})");
        Unanswered::Failed(io::Error::other(text))
    })
}

/// Asks the mount at `path` to send what is closed and unsent. One that is read-only cannot be told
/// anything, and has nothing to send.
pub(super) fn drain(path: &Path, patience: Duration) -> Result<(), Unanswered> {
    match ask(path, Question::Drain, NOTHING, patience) {
        Err(Unanswered::Failed(error)) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            Ok(())
        }
        answer => answer.map(drop),
    }
}

/// Asks the mount at `path` to send these uploads again.
pub(super) fn retry(
    path: &Path,
    ids: &[impl AsRef<OsStr>],
    patience: Duration,
) -> Result<(), Unanswered> {
    ask(path, Question::Retry, ids, patience).map(drop)
}

/// Asks the mount at `path` to give these uploads up.
pub(super) fn discard(
    path: &Path,
    ids: &[impl AsRef<OsStr>],
    patience: Duration,
) -> Result<(), Unanswered> {
    ask(path, Question::Discard, ids, patience).map(drop)
}

/// Where `below` leads in the mount at `path`: names of models and experiments are links.
pub(super) fn place(path: &Path, below: &Path, patience: Duration) -> Result<PathBuf, Unanswered> {
    ask(path, Question::Place, &[below], patience).map(PathBuf::from)
}

fn ask(
    path: &Path,
    question: Question,
    ids: &[impl AsRef<OsStr>],
    patience: Duration,
) -> Result<String, Unanswered> {
    let program = std::env::current_exe().map_err(Unanswered::Failed)?;
    let mut child = Command::new(program)
        .args([NAME, question.name(), "--"])
        .arg(path)
        .args(ids)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Who reads ours to its end does not wait for a child that hangs.
        .stderr(Stdio::null())
        .spawn()
        .map_err(Unanswered::Failed)?;
    let (send, answer) = mpsc::channel();
    let pipe = child.stdout.take();
    std::thread::spawn(move || {
        let mut text = String::new();
        let outcome = pipe.map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut text));
        // Nobody may be waiting any more.
        let _ = send.send(outcome.map(|_| text));
    });
    let Ok(text) = answer.recv_timeout(patience) else {
        let _ = child.kill();
        // It may not die; nobody but this thread waits for that.
        std::thread::spawn(move || child.wait());
        return Err(Unanswered::Silent);
    };
    let _ = child.wait();
    let text = text.map_err(Unanswered::Failed)?;
    match serde_json::from_str(&text) {
        Ok(Said::Document(document)) => Ok(document),
        Ok(Said::Error(libc::ENOTCONN | libc::ECONNABORTED)) => Err(Unanswered::Dead),
        Ok(Said::Error(code)) => Err(Unanswered::Failed(io::Error::from_raw_os_error(code))),
        Err(_) => Err(Unanswered::Failed(io::Error::other(
            "the process that asked it ended without a word",
        ))),
    }
}

/// Asks; this is the child.
pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let file = arguments
        .mountpoint
        .join(".mlfs")
        .join(arguments.question.name());
    let outcome = match arguments.question {
        Question::Status => std::fs::read_to_string(file),
        Question::Drain => std::fs::write(file, b"now\n").map(|()| String::new()),
        Question::Place => {
            let below: PathBuf = arguments.ids.iter().collect();
            place_of(&arguments.mountpoint, &below)
        }
        Question::Retry | Question::Discard => {
            let ids = arguments.ids.join(OsStr::new(" "));
            std::fs::write(file, ids.as_encoded_bytes()).map(|()| String::new())
        }
    };
    let said = match outcome {
        Ok(document) => Said::Document(document),
        Err(error) => Said::Error(error.raw_os_error().unwrap_or(libc::EIO)),
    };
    Ok(io::stdout().write_all(&serde_json::to_vec(&said)?)?)
}

/// The path below the mount point that `below` leads to.
fn place_of(mountpoint: &Path, below: &Path) -> io::Result<String> {
    let mut place = mountpoint.join(below).canonicalize()?;
    for _ in 0..LOOKS {
        let names = place
            .strip_prefix(mountpoint)
            .map_or(0, |below| below.components().count());
        if names <= NAMES_OF_RUN || !place.starts_with(mountpoint.join(EXPERIMENTS)) {
            break;
        }
        // The name of a run that was just made is the run's directory itself for a moment.
        std::thread::sleep(LOOK);
        place = mountpoint.join(below).canonicalize()?;
    }
    let below = place.strip_prefix(mountpoint).map_err(io::Error::other)?;
    let name = below.to_str();
    // mlfs has no other names.
    Ok(name.ok_or(io::ErrorKind::InvalidData)?.to_owned())
}
