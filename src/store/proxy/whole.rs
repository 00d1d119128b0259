//! Objects of servers that send all of it or nothing: one body, consumed in order into a file without
//! a name, from which everybody is served while it arrives.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use parking_lot::Mutex;
use reqwest::Response;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::store::metrics::StoreMetrics;
use crate::store::{StoreError, StoreResult};

/// Bytes written to disk, and read from it, at once.
const PIECE: usize = 1 << 20;
/// A copy that nobody has read from for so long is removed.
const IDLE: Duration = Duration::from_secs(60);
/// The server is asked again whether an object still has the size of its copy after so long.
const FRESH: Duration = Duration::from_secs(5);

/// How far a copy is.
#[derive(Clone, Debug)]
enum Progress {
    /// Bytes that are there.
    Arrived(u64),
    Failed(StoreError),
}

/// The copy of one object.
#[derive(Debug)]
pub(super) struct Whole {
    object: Arc<str>,
    file: File,
    pub size: u64,
    progress: watch::Sender<Progress>,
    used: Mutex<Instant>,
    /// When the server was asked last.
    checked: Mutex<Instant>,
}

/// The copies there are, by key.
#[derive(Debug)]
pub(super) struct Wholes {
    folder: PathBuf,
    kept: Mutex<HashMap<String, Arc<Whole>>>,
    /// How often anything was written or removed.
    changes: AtomicU64,
    /// Keys of which somebody may be about to begin a copy.
    beginning: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl Wholes {
    /// Copies that lie in `folder`, without names.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            kept: Mutex::default(),
            changes: AtomicU64::new(0),
            beginning: Mutex::default(),
        }
    }

    /// How often anything was written or removed so far: to be asked for before an object is.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// To be held by whoever may begin a copy of an object.
    pub fn beginning(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut beginning = self.beginning.lock();
        if let Some(lock) = beginning.get(key).and_then(Weak::upgrade) {
            return lock;
        }
        beginning.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        beginning.insert(key.to_owned(), Arc::downgrade(&lock));
        lock
    }

    /// The copy of an object, if there is one that has not failed.
    pub fn get(&self, key: &str) -> Option<Arc<Whole>> {
        let mut kept = self.kept.lock();
        let whole = kept.get(key)?;
        if matches!(&*whole.progress.borrow(), Progress::Failed(_)) {
            kept.remove(key);
            return None;
        }
        *whole.used.lock() = Instant::now();
        Some(Arc::clone(whole))
    }

    /// Nobody is to be served from a copy of this any more: it is written, or removed.
    pub fn forget(&self, key: &str) {
        let mut kept = self.kept.lock();
        self.changes.fetch_add(1, Ordering::Relaxed);
        kept.remove(key);
    }

    /// Consumes a body of `size` bytes in the background. It was asked for after so many `changes`;
    /// if there was another one since, only who asked is served from it.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn begin(
        self: &Arc<Self>,
        key: &str,
        object: Arc<str>,
        size: u64,
        (changes, response): (u64, Response),
        patience: Duration,
        metrics: Arc<StoreMetrics>,
    ) -> StoreResult<Arc<Whole>> {
        let file = nameless(&self.folder).map_err(|error| disk(&object, &error))?;
        let (progress, _) = watch::channel(Progress::Arrived(0));
        let whole = Arc::new(Whole {
            object,
            file,
            size,
            progress,
            used: Mutex::new(Instant::now()),
            checked: Mutex::new(Instant::now()),
        });
        let mut kept = self.kept.lock();
        if self.changes() == changes {
            kept.insert(key.to_owned(), Arc::clone(&whole));
        }
        drop(kept);
        let (this, key, filled) = (Arc::clone(self), key.to_owned(), Arc::clone(&whole));
        tokio::spawn(async move {
            if let Err(error) = filled.fill(response, patience, &metrics).await {
                tracing::debug!(object = &*filled.object, %error, "not all of it came");
                filled
                    .progress
                    .send_modify(|progress| *progress = Progress::Failed(error));
                // Who reads it is told; the room is for another attempt.
                let _ = filled.file.set_len(0);
                return this.remove(&key, &filled);
            }
            this.remove_idle(&key, filled).await;
        });
        Ok(whole)
    }

    async fn remove_idle(&self, key: &str, whole: Arc<Whole>) {
        loop {
            let idle = whole.used.lock().elapsed();
            // The table, and we.
            if idle >= IDLE && Arc::strong_count(&whole) <= 2 {
                break;
            }
            tokio::time::sleep(IDLE.saturating_sub(idle).max(IDLE / 10)).await;
        }
        self.remove(key, &whole);
    }

    fn remove(&self, key: &str, whole: &Arc<Whole>) {
        let mut kept = self.kept.lock();
        if kept.get(key).is_some_and(|other| Arc::ptr_eq(other, whole)) {
            kept.remove(key);
        }
    }
}

/// A file that goes when it is closed.
fn nameless(folder: &Path) -> std::io::Result<File> {
    std::fs::create_dir_all(folder)?;
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(folder) {
        // Not every filesystem has such files.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let path = folder.join(format!("whole-{:032x}", rand::random::<u128>()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(path)?;
            Ok(file)
        }
        outcome => outcome,
    }
}

fn disk(object: &str, error: &std::io::Error) -> StoreError {
    let object = object.to_owned();
    let detail = format!(
        "this server sends only whole objects, which wait in --spill-dir until they are read: {error}"
    );
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StoreError::Full { object, detail },
        _ => StoreError::Other { object, detail },
    }
}

impl Whole {
    /// Whether the server was asked of the object a moment ago.
    pub fn is_fresh(&self) -> bool {
        self.checked.lock().elapsed() < FRESH
    }

    /// The server was asked, and has an object of this size.
    pub fn refresh(&self) {
        *self.checked.lock() = Instant::now();
    }

    async fn fill(
        self: &Arc<Self>,
        mut response: Response,
        patience: Duration,
        metrics: &StoreMetrics,
    ) -> StoreResult<()> {
        let unavailable = |detail: String| StoreError::Unavailable {
            object: self.object.to_string(),
            detail,
        };
        let mut at = 0;
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            let frame = match timeout(patience, response.chunk()).await {
                Ok(frame) => frame.map_err(|error| unavailable(error.without_url().to_string()))?,
                Err(_) => {
                    let seconds = patience.as_secs();
                    return Err(unavailable(format!("no byte came for {seconds} s")));
                }
            };
            let ends = frame.is_none();
            if let Some(frame) = frame {
                metrics.received(frame.len() as u64);
                piece.extend_from_slice(&frame);
            }
            if at + piece.len() as u64 > self.size {
                return Err(StoreError::Changed {
                    object: self.object.to_string(),
                });
            }
            if piece.len() >= PIECE || ends && !piece.is_empty() {
                let (this, full) = (Arc::clone(self), std::mem::take(&mut piece));
                let length = full.len() as u64;
                let written =
                    tokio::task::spawn_blocking(move || this.file.write_all_at(&full, at));
                let written = written
                    .await
                    .map_err(|error| unavailable(error.to_string()))?;
                written.map_err(|error| disk(&self.object, &error))?;
                at += length;
                self.progress
                    .send_modify(|progress| *progress = Progress::Arrived(at));
            }
            if ends {
                break;
            }
        }
        if at < self.size {
            return Err(unavailable(format!(
                "the answer ended {} bytes early",
                self.size - at
            )));
        }
        Ok(())
    }

    /// The bytes of `range`, as they come.
    pub fn frames(self: Arc<Self>, range: Range<u64>) -> BoxStream<'static, StoreResult<Bytes>> {
        let end = range.end;
        Box::pin(stream::try_unfold(range.start, move |at| {
            let whole = Arc::clone(&self);
            async move {
                if at >= end {
                    return Ok(None);
                }
                let arrived = whole.arrived(at).await?.min(end);
                let length = ((arrived - at) as usize).min(PIECE);
                *whole.used.lock() = Instant::now();
                let object = Arc::clone(&whole.object);
                let read = tokio::task::spawn_blocking(move || {
                    let mut bytes = vec![0; length];
                    whole.file.read_exact_at(&mut bytes, at).map(|()| bytes)
                });
                let read = read.await.map_err(|error| StoreError::Other {
                    object: object.to_string(),
                    detail: error.to_string(),
                })?;
                let read = read.map_err(|error| match error.kind() {
                    ErrorKind::UnexpectedEof => StoreError::Unavailable {
                        object: object.to_string(),
                        detail: "not all of it came".to_owned(),
                    },
                    _ => disk(&object, &error),
                });
                let bytes = Bytes::from(read?);
                Ok(Some((bytes, at + length as u64)))
            }
        }))
    }

    /// How many bytes are there, once that is more than `at`.
    async fn arrived(&self, at: u64) -> StoreResult<u64> {
        let mut progress = self.progress.subscribe();
        loop {
            match &*progress.borrow_and_update() {
                Progress::Arrived(arrived) if *arrived > at => return Ok(*arrived),
                Progress::Arrived(_) => {}
                Progress::Failed(error) => return Err(error.clone()),
            }
            if progress.changed().await.is_err() {
                return Err(StoreError::Unavailable {
                    object: self.object.to_string(),
                    detail: "it was given up".to_owned(),
                });
            }
        }
    }
}
