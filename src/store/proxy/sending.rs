//! A body that is on its way: how much of it has gone, and when it is given up.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::access::Failed;

/// Bytes that are handed over at once: each is progress.
const FRAME: usize = 256 << 10;
/// A server may have to bring all of a body to where it keeps it before it answers.
pub(super) const ANSWER: Duration = Duration::from_secs(600);
/// How often a body that is on its way is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What has gone of a body.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Bytes.
    pub sent: AtomicU64,
    /// It is the body that is waited for, not the server.
    pub waiting: AtomicBool,
    /// There is no more of it.
    pub ended: AtomicBool,
}

impl Progress {
    /// Whether all of a body has gone, of `size` bytes if that is known.
    pub fn is_whole(&self, size: Option<u64>) -> bool {
        match size {
            // Nobody asks for more.
            Some(size) => self.sent.load(Ordering::Relaxed) >= size,
            None => self.ended.load(Ordering::Relaxed),
        }
    }

    /// Waits for the answer to a request with a body, of `size` bytes if that is known, until nothing of it has moved for
    /// `patience`, or no answer has come for longer than a server may need.
    pub async fn watch<T>(
        &self,
        object: &str,
        size: Option<u64>,
        patience: Duration,
        sent: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        tokio::pin!(sent);
        let mut moved = (0, Instant::now());
        loop {
            tokio::select! {
                outcome = &mut sent => return outcome,
                () = sleep(LOOK) => {}
            }
            let bytes = self.sent.load(Ordering::Relaxed);
            if bytes > moved.0 {
                moved = (bytes, Instant::now());
            }
            let waiting = self.waiting.load(Ordering::Relaxed);
            let patience = match !self.is_whole(size) && !waiting {
                true => patience,
                false => ANSWER.max(patience),
            };
            if moved.1.elapsed() > patience {
                return Err(Failed::silent(object, patience));
            }
        }
    }
}

/// The bytes in slices, each of which is progress.
pub(super) fn slices(mut bytes: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let length = bytes.len().min(FRAME);
        (length > 0).then(|| bytes.split_to(length))
    })
}
