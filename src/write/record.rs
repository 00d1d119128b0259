//! Putting into the journal what a draft is, so that a crash finds it whole.

use std::sync::Arc;

use super::chunk::{Data, DiskCopy};
use super::draft::{Draft, State};
use super::error::WriteError;
use super::journal::{
    Base, Begin, ChunkRecord, Destination, Journal, Manifest, Record, now_precisely,
};
use super::send::task_lost;
use super::spill::SpillFile;
use crate::store::checksum;

/// A manifest is begun anew this often when the file changes under it.
const ATTEMPTS: usize = 4;

/// What became of a manifest.
pub(super) enum Appended {
    To(Arc<Journal>),
    /// There is no journal to append to, or no need.
    Nothing,
    /// The file changed meanwhile.
    Changed,
}

impl Draft {
    /// Writes down where every byte of the file is, after putting on disk what neither the disk
    /// nor the store has; with `durable`, a loss of power does not undo it. `closed` says that the
    /// writer is done: after a crash such a file is sent without anybody's word.
    ///
    /// False when the spill has no room for it, or when the file is written to all the time.
    ///
    /// # Errors
    /// The disk's.
    pub(super) async fn record(
        self: &Arc<Self>,
        closed: bool,
        durable: bool,
    ) -> Result<bool, WriteError> {
        for _ in 0..ATTEMPTS {
            // The last first: meanwhile the store may get the others.
            for index in self.unsafe_chunks().into_iter().rev() {
                if self.is_unsafe(index) && !self.copy_to_disk(index).await? {
                    return Ok(false);
                }
            }
            if durable {
                self.synchronise_files().await?;
            }
            match self.append_manifest(closed) {
                Appended::Changed => {}
                Appended::Nothing => return Ok(false),
                Appended::To(journal) if durable => {
                    self.blocking(move || journal.synchronise()).await?;
                    return Ok(true);
                }
                Appended::To(_) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Makes durable what is written down already; false when the file is another by now.
    pub(super) async fn synchronise_recorded(self: &Arc<Self>) -> Result<bool, WriteError> {
        let journal = {
            let state = self.state.lock();
            state.journal.clone().filter(|_| state.recorded)
        };
        let Some(journal) = journal else {
            return Ok(false);
        };
        self.synchronise_files().await?;
        self.blocking(move || journal.synchronise()).await?;
        Ok(true)
    }

    pub(super) fn append_manifest(&self, closed: bool) -> Appended {
        let mut state = self.state.lock();
        if state.detached || state.published == Some(state.generation) {
            return Appended::Nothing;
        }
        self.begin_journal(&mut state);
        let Some(manifest) = state.manifest(closed) else {
            return Appended::Changed;
        };
        state.note(&Record::Manifest(manifest));
        match &state.journal {
            Some(journal) => {
                let journal = Arc::clone(journal);
                state.recorded = true;
                state.recorded_closed = closed;
                Appended::To(journal)
            }
            None => Appended::Nothing,
        }
    }

    /// Chunks that a killed process would lose.
    fn unsafe_chunks(&self) -> Vec<u32> {
        let state = self.state.lock();
        let chunks = state.chunks.keys().copied();
        chunks.filter(|index| state.is_unsafe(*index)).collect()
    }

    fn is_unsafe(&self, index: u32) -> bool {
        self.state.lock().is_unsafe(index)
    }

    /// Puts a copy of chunk `index` on disk, with its checksum known; false when there is no room.
    async fn copy_to_disk(self: &Arc<Self>, index: u32) -> Result<bool, WriteError> {
        let (bytes, copy, on_disk) = {
            let state = self.state.lock();
            let Some(chunk) = state.chunks.get(&index) else {
                return Ok(true);
            };
            if matches!(chunk.data, Data::GivenUp) {
                return Ok(true);
            }
            let on_disk = chunk.on_disk().cloned();
            let file = match &on_disk {
                Some(file) => Arc::clone(file),
                None => match self.writer.spill.create(&self.id, chunk.local.end) {
                    Some(file) => Arc::new(file?),
                    None => return Ok(false),
                },
            };
            let copy = DiskCopy {
                version: chunk.version,
                local: chunk.local.clone(),
                file,
            };
            (chunk.share(), copy, on_disk.is_some())
        };
        let file = Arc::clone(&copy.file);
        let local = copy.local.clone();
        let crc32c = self
            .blocking(move || write_copy(&file, bytes.as_deref(), local, on_disk))
            .await?;
        let mut state = self.state.lock();
        if let Some(chunk) = state.chunks.get_mut(&index)
            && chunk.version == copy.version
            && chunk.local == copy.local
        {
            chunk.crc32c = Some(crc32c);
            // Another copy may be named in a manifest by now: it stays.
            if matches!(chunk.data, Data::Memory(_)) && chunk.on_disk().is_none() {
                chunk.copy = Some(copy);
            }
        }
        Ok(true)
    }

    async fn synchronise_files(self: &Arc<Self>) -> Result<(), WriteError> {
        let files: Vec<Arc<SpillFile>> = {
            let state = self.state.lock();
            state
                .chunks
                .values()
                .filter_map(|chunk| chunk.on_disk().cloned())
                .collect()
        };
        self.blocking(move || files.iter().try_for_each(|file| file.synchronise()))
            .await
    }

    /// Runs what waits for a disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, WriteError> + Send + 'static,
    ) -> Result<T, WriteError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| task_lost(self, &error))?
    }

    /// Begins the draft's journal, if it has none. A disk that takes none is told of once a draft;
    /// the file is then not safe from a crash before it is stored.
    pub(super) fn begin_journal(&self, state: &mut State) {
        if state.journal.is_some() || state.journal_failed {
            return;
        }
        let spill = &self.writer.spill;
        let begun =
            Journal::create(spill.directory(), &self.id, spill.number()).and_then(|journal| {
                journal.append(&Record::Begin(Begin {
                    tracking: self.writer.options.tracking.clone(),
                    since: self.since,
                }))?;
                journal.append(&state.destination())?;
                Ok(journal)
            });
        match begun {
            Ok(journal) => state.journal = Some(Arc::new(journal)),
            Err(error) => {
                state.journal_failed = true;
                tracing::warn!(object = state.target.object(), %error,
                    "no journal in --spill-dir: a crash before it is stored would lose this file");
            }
        }
    }
}

impl State {
    /// Whether a killed process would lose chunk `index`.
    fn is_unsafe(&self, index: u32) -> bool {
        let Some(chunk) = self.chunks.get(&index) else {
            return false;
        };
        let part = self.part(index);
        match (chunk.on_disk(), &chunk.data) {
            // Bytes that cannot be checked are not taken back.
            (Some(_), _) => chunk.crc32c.is_none(),
            (None, Data::GivenUp) => false,
            (None, _) => !chunk.is_sent(part.end - part.start),
        }
    }

    /// Appends to the journal, if there is one.
    pub(super) fn note(&mut self, record: &Record) {
        let Some(journal) = &self.journal else {
            return;
        };
        if let Err(error) = journal.append(record) {
            // What stands in it would be of another file than this becomes.
            tracing::warn!(object = self.target.object(), %error,
                "the journal in --spill-dir takes no more: it is given up");
            self.journal = None;
            self.journal_failed = true;
            self.recorded = false;
        }
    }

    pub(super) fn destination(&self) -> Record {
        Record::Destination(Destination {
            store: self.target.store.name().to_owned(),
            key: self.target.key.clone(),
            path: self.target.path.clone(),
        })
    }

    /// Where every byte is; `None` when some are in memory only.
    pub(super) fn manifest(&self, closed: bool) -> Option<Manifest> {
        let mut chunks = Vec::with_capacity(self.chunks.len());
        for (index, chunk) in &self.chunks {
            let part = self.part(*index);
            let file = chunk.on_disk();
            if file.is_none() && !chunk.is_sent(part.end - part.start) {
                return None;
            }
            chunks.push(ChunkRecord {
                index: *index,
                version: chunk.version,
                start: chunk.local.start,
                end: chunk.local.end,
                crc32c: chunk.crc32c,
                file: file.map(|file| file.name().to_owned()),
            });
        }
        let base = self.base.as_ref().filter(|_| self.base_limit > 0);
        let base = base.map(|base| Base::of(&base.source(), self.base_limit));
        Some(Manifest {
            closed,
            at: now_precisely(),
            size: self.size,
            part_size: self.geometry.first(),
            joint: self.geometry.joint(),
            base,
            chunks,
        })
    }
}

/// Writes a run to its file, unless it is there; returns its CRC32C.
fn write_copy(
    file: &SpillFile,
    bytes: Option<&[u8]>,
    local: std::ops::Range<u64>,
    on_disk: bool,
) -> Result<u32, WriteError> {
    match bytes {
        Some(bytes) => {
            if !on_disk {
                file.write(bytes, local.start)?;
            }
            Ok(checksum::crc32c(bytes))
        }
        None => file.checksum(local),
    }
}
