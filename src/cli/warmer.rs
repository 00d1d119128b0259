//! Finds the files that are to be prefetched, and asks the mount for their bytes.
//!
//! A process of its own, for the reason that [`super::ask`] gives: calls into a mount that is
//! stopped do not return. What it does, it says line by line.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;

use clap::Args;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::vfs::Prefetch;

/// The hidden subcommand.
pub(super) const NAME: &str = "warm-mount";

/// Ranges that the mount is asked for at a time: together with [`RANGE`], enough to keep all its
/// requests busy, of large files and of small ones.
const SIDE_BY_SIDE: usize = 16;
/// Bytes of such a range.
const RANGE: u64 = 16 << 20;
/// Files that are read at a time where there is no disk cache: each is read ahead by itself.
const READ_SIDE_BY_SIDE: usize = 8;
/// Bytes of one of those reads.
const PIECE: usize = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Into the disk cache; else the files are read, for the kernel to keep
    #[arg(long)]
    disk: bool,

    /// Most bytes to prefetch
    #[arg(long, default_value_t = u64::MAX)]
    room: u64,

    mountpoint: PathBuf,
    /// Below the mount point.
    paths: Vec<PathBuf>,
}

/// A line of its output.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    /// So far.
    Found {
        files: u64,
        bytes: u64,
    },
    /// What was found does not fit; nothing is fetched.
    TooLarge,
    /// So many bytes more are there.
    Done {
        bytes: u64,
    },
    Failed {
        path: PathBuf,
        reason: String,
    },
}

/// A file and its bytes.
type Found = (PathBuf, u64);
/// A range of an open file.
type Task = (Arc<Opened>, u64, u64);

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    file: File,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mountpoint = &arguments.mountpoint;
    let paths = arguments.paths.iter();
    let found = find(paths.map(|below| mountpoint.join(below)).collect());
    let bytes: u64 = found.iter().map(|(_, size)| size).sum();
    if bytes > arguments.room {
        say(&Said::TooLarge);
        return Ok(());
    }
    if arguments.disk {
        each_range(found, RANGE, SIDE_BY_SIDE, |(opened, offset, length)| {
            let wanted = Prefetch {
                offset: *offset,
                length: *length,
            };
            ask(&opened.file, wanted)
        });
    } else {
        each_range(found, u64::MAX, READ_SIDE_BY_SIDE, |(opened, ..)| {
            let mut piece = vec![0; PIECE];
            let mut at = 0;
            loop {
                match opened.file.read_at(&mut piece, at)? {
                    0 => return Ok(()),
                    count => at += count as u64,
                }
            }
        });
    }
    Ok(())
}

/// Returns when it is done.
fn ask(file: &File, wanted: Prefetch) -> io::Result<()> {
    let bytes = wanted.to_bytes();
    let command = libc::Ioctl::from(Prefetch::COMMAND);
    // SAFETY: the kernel reads as many bytes there as the command's number says, which is how many
    // there are.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), command, bytes.as_ptr()) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What is told of an error: the kernel's words, without its number.
pub(super) fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the disk cache is off, the mount's log says why".to_owned(),
        Some(libc::ENOSPC) => "the disk cache has no room for it".to_owned(),
        Some(libc::ENOTCONN | libc::ECONNABORTED) => "the mount is gone".to_owned(),
        _ => {
            let text = error.to_string();
            let words = text.split(" (os error").next();
            words.unwrap_or_default().to_owned()
        }
    }
}

fn say(said: &Said) {
    let said = serde_json::to_vec(said).map_err(io::Error::from);
    let outcome = said.and_then(|mut line| {
        line.push(b'\n');
        io::stdout().lock().write_all(&line)
    });
    if outcome.is_err() {
        // Nobody listens any more: nobody wants what is fetched.
        std::process::exit(1);
    }
}

fn say_failed(path: &Path, error: &io::Error) {
    say(&Said::Failed {
        path: path.to_owned(),
        reason: reason(error),
    });
}

/// Every file at or below `paths`, once.
fn find(mut paths: Vec<PathBuf>) -> Vec<Found> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    while let Some(path) = paths.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let outcome = path.symlink_metadata().and_then(|metadata| {
            if metadata.is_dir() {
                for entry in fs::read_dir(&path)? {
                    paths.push(entry?.path());
                }
            } else if metadata.is_symlink() {
                // The only links of a mount are its own names for what is elsewhere in it.
                paths.push(path.canonicalize()?);
            } else {
                bytes += metadata.len();
                found.push((path.clone(), metadata.len()));
                let files = found.len() as u64;
                say(&Said::Found { files, bytes });
            }
            Ok(())
        });
        if let Err(error) = outcome {
            say_failed(&path, &error);
        }
    }
    found.sort();
    found
}

/// Does `work` on each range of `length` bytes of each file, so many at a time.
fn each_range(
    files: Vec<Found>,
    length: u64,
    at_a_time: usize,
    work: impl Fn(&Task) -> io::Result<()> + Sync,
) {
    // Whoever asks first opens a file; few are open at a time.
    let (send, tasks) = mpsc::sync_channel::<Task>(at_a_time);
    let tasks = Mutex::new(tasks);
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                loop {
                    let task = tasks.lock().recv();
                    let Ok(task) = task else { return };
                    match work(&task) {
                        Ok(()) => say(&Said::Done { bytes: task.2 }),
                        Err(error) => say_failed(&task.0.path, &error),
                    }
                }
            });
        }
        for (path, size) in files {
            match File::open(&path) {
                Ok(file) => {
                    let opened = Arc::new(Opened { path, file });
                    let mut offset = 0;
                    while offset < size {
                        let length = length.min(size - offset);
                        // The workers live until this end is closed.
                        let _ = send.send((Arc::clone(&opened), offset, length));
                        offset += length;
                    }
                }
                Err(error) => say_failed(&path, &error),
            }
        }
        drop(send);
    });
}
