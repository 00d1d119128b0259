//! Log lines on their way out, written by a thread of their own: a full disk, a terminal that is
//! held or a pipe that nobody reads costs lines, and never holds up or ends who serves.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

use super::redact::redact;

/// Lines that wait; those that find no place are counted and lost.
const LINES: usize = 1024;
/// Bytes of a line; what is longer loses its end.
const LONGEST_LINE: usize = 16 << 10;
/// What fuser says at the level of errors though nothing failed: it answers a request's interruption
/// with ENOSYS, and the kernel has no such request any more when its answer was quicker.
const NO_ERROR: &[u8] = b"Failed to send FUSE reply: No such file or directory";
/// How often a queue that is full is looked at, by who waits for its end.
const LOOK: Duration = Duration::from_millis(10);

/// A handle to the thread that writes.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    waiting: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Item {
    Line(Vec<u8>),
    /// Everything before it has been written.
    Reached(SyncSender<()>),
}

impl Queue {
    /// Starts the thread.
    pub fn start(output: impl Write + Send + 'static) -> io::Result<Self> {
        let (waiting, lines) = sync_channel(LINES);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        std::thread::Builder::new()
            .name("mlfs-log".to_owned())
            .spawn(move || pass_on(&lines, &counted, output))?;
        Ok(Self { waiting, lost })
    }

    /// Waits until what was logged so far is written, for at most `patience`.
    pub fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let (reached, wait) = sync_channel(1);
        while self
            .waiting
            .try_send(Item::Reached(reached.clone()))
            .is_err()
        {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(LOOK);
        }
        let _ = wait.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

fn pass_on(lines: &Receiver<Item>, lost: &AtomicU64, mut output: impl Write) {
    for item in lines {
        match item {
            // What cannot be written is lost as well: there is nobody to tell.
            Item::Line(line) => {
                let written = output.write_all(redact(&String::from_utf8_lossy(&line)).as_bytes());
                if written.is_err() {
                    lost.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            }
            Item::Reached(reached) => {
                let _ = output.flush();
                let _ = reached.try_send(());
                continue;
            }
        }
        let gone = lost.swap(0, Ordering::Relaxed);
        let told = format!("({gone} log lines could not be written here)\n");
        if gone > 0 && output.write_all(told.as_bytes()).is_err() {
            lost.fetch_add(gone, Ordering::Relaxed);
        }
    }
}

/// One event: the formatter hands it over whole.
impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if line.windows(NO_ERROR.len()).any(|part| part == NO_ERROR) {
            return Ok(line.len());
        }
        let item = if line.len() > LONGEST_LINE {
            Item::Line([&line[..LONGEST_LINE], " …\n".as_bytes()].concat())
        } else {
            Item::Line(line.to_vec())
        };
        if self.waiting.try_send(item).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Self;

    fn make_writer(&'a self) -> Self::Writer {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Passes on what it is told to write, once it may.
    struct Held {
        may: Receiver<io::Result<()>>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.may.recv().unwrap_or(Ok(()))?;
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_stands_still_or_is_full_costs_lines_and_holds_up_nobody() {
        let (let_go, may) = mpsc::channel();
        let (written, lines) = mpsc::channel();
        let mut queue = Queue::start(Held { may, written }).unwrap();
        for _ in 0..2 * LINES {
            queue.write_all(b"line\n").unwrap();
        }
        let_go.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        drop(let_go);
        assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), b"line\n");
        let told = lines.recv_timeout(PATIENCE).unwrap();
        assert!(told.ends_with(b" log lines could not be written here)\n"));
    }

    #[test]
    fn a_flush_waits_for_what_was_logged_before_it_without_secrets_and_without_what_is_no_error() {
        let (written, lines) = mpsc::channel();
        let (_, may) = mpsc::channel();
        let mut queue = Queue::start(Held { may, written }).unwrap();
        let interrupted =
            "ERROR Failed to send FUSE reply: No such file or directory (os error 2)\n";
        queue.write_all(interrupted.as_bytes()).unwrap();
        queue.write_all(b"token=hunter2\n").unwrap();
        let long = vec![b'x'; 2 * LONGEST_LINE];
        queue.write_all(&long).unwrap();
        Queue::flush(&queue, PATIENCE);
        assert_eq!(lines.try_recv().unwrap(), b"token=[hidden]\n");
        let cut = lines.try_recv().unwrap();
        assert!(cut.len() < LONGEST_LINE + 8 && cut.ends_with(b"\n"));
    }
}
