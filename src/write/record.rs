//! Putting into the journal what a draft is, so that a crash finds it whole.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::chunk::{Chunk, Data, DiskCopy};
use super::draft::Draft;
use super::error::WriteError;
use super::journal::{
    Base, Begin, ChunkRecord, Destination, Journal, Manifest, Record, now_precisely,
};
use super::send::task_lost;
use super::spill::SpillFile;
use super::state::State;
use crate::store::checksum;

/// So many bytes are written to disk without a thread of their own: that costs less than waking one.
const WRITTEN_AT_ONCE: u64 = 256 * 1024;
/// A manifest is begun anew this often when the file changes under it.
const ATTEMPTS: usize = 4;

/// What is all sent by then need not be copied to disk for the next mount to find: measured, that takes
/// two or three times the processor time of sending it. Nobody has been told yet that it is closed.
const SOON: Duration = Duration::from_secs(10);

/// What the manifest of a file may do without that others write to meanwhile: it is to hold what was
/// written before it was asked for, and newer bytes only where it happens to.
struct Tolerance {
    /// The chunks there were when it was asked for.
    present: BTreeSet<u32>,
    /// Those that were copied to disk since.
    copied: BTreeSet<u32>,
    /// The file's size then, bytes.
    size: u64,
}

/// What became of a manifest.
pub(super) enum Appended {
    /// To this journal; the files of its former manifest go with the value.
    To(Arc<Journal>, Vec<Arc<SpillFile>>),
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
    /// False when the spill has no room for it, or when a file that is to be closed is written to
    /// all the time.
    ///
    /// # Errors
    /// The disk's.
    pub(super) async fn record(
        self: &Arc<Self>,
        closed: bool,
        durable: bool,
    ) -> Result<bool, WriteError> {
        let mut tolerance = (!closed).then(|| self.tolerance());
        let mut attempts = 0;
        while attempts < ATTEMPTS {
            // The last first: meanwhile the store may get the others.
            for index in self.unsafe_chunks().into_iter().rev() {
                let wanted = tolerance.as_ref().is_none_or(|it| it.lacks(index));
                if !wanted || !self.is_unsafe(index) {
                    continue;
                }
                if !self.copy_to_disk(index).await? {
                    return Ok(false);
                }
                if let Some(tolerance) = &mut tolerance {
                    tolerance.copied.insert(index);
                }
            }
            if durable {
                self.synchronise_files().await?;
            }
            match self.append(closed, tolerance.as_ref()) {
                // Each of its chunks is copied once, so that this comes to an end.
                Appended::Changed if tolerance.is_some() => {}
                Appended::Changed => attempts += 1,
                Appended::Nothing => return Ok(false),
                Appended::To(journal, former) if durable => {
                    // Some chunk may have moved to disk since.
                    self.synchronise_files().await?;
                    self.blocking(move || journal.synchronise()).await?;
                    drop(former);
                    return Ok(true);
                }
                Appended::To(..) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Sends what is closed, and writes it down as [`Self::record_close`] does some seconds `since` then, or
    /// when it fails: where no part that the store has taken is safe, all of it is copied to disk.
    ///
    /// # Errors
    /// Those of `sending`.
    pub(super) async fn recorded_unless_soon<T, E>(
        self: &Arc<Self>,
        since: Instant,
        sending: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let recorded = async {
            sleep_until(since + SOON).await;
            self.record_close().await;
            std::future::pending().await
        };
        let outcome = tokio::select! {
            sent = sending => sent,
            never = recorded => never,
        };
        if outcome.is_err() {
            // It is tried again for a while.
            self.record_close().await;
        }
        outcome
    }

    fn tolerance(&self) -> Tolerance {
        let state = self.state.lock();
        Tolerance {
            present: state.chunks.keys().copied().collect(),
            copied: BTreeSet::new(),
            size: state.size,
        }
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

    /// Appends a manifest of the file just as it is.
    pub(super) fn append_manifest(&self, closed: bool) -> Appended {
        self.append(closed, None)
    }

    fn append(&self, closed: bool, tolerance: Option<&Tolerance>) -> Appended {
        let mut state = self.state.lock();
        if state.detached || state.published == Some(state.generation) {
            return Appended::Nothing;
        }
        self.begin_journal(&mut state);
        let Some(noted) = state.manifest(closed, tolerance) else {
            return Appended::Changed;
        };
        state.note(&Record::Manifest(noted.manifest));
        let Some(journal) = state.journal.clone() else {
            return Appended::Nothing;
        };
        state.recorded = noted.exact;
        state.recorded_closed = closed;
        state.rewritten.clear();
        let former = std::mem::replace(&mut state.named, noted.files);
        Appended::To(journal, former)
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
                crc32c: 0,
                file,
            };
            (chunk.share(), copy, on_disk.is_some())
        };
        let file = Arc::clone(&copy.file);
        let local = copy.local.clone();
        let small = local.end - local.start <= WRITTEN_AT_ONCE;
        let write = move || write_copy(&file, bytes.as_deref(), local, on_disk);
        let crc32c = if small {
            write()?
        } else {
            self.blocking(write).await?
        };
        let mut state = self.state.lock();
        if let Some(chunk) = state.chunks.get_mut(&index) {
            if chunk.version == copy.version && chunk.local == copy.local {
                chunk.crc32c = Some(crc32c);
            }
            // Even of a version that is no longer the last: it has what was written till then.
            if matches!(chunk.data, Data::Memory(_)) && chunk.on_disk().is_none() {
                chunk.copy = Some(DiskCopy { crc32c, ..copy });
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
                .flat_map(|chunk| chunk.files().cloned())
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
            (None, _) if self.lies_beneath(index) => false,
            (None, _) => !self.counts_on_parts() || !chunk.is_sent(part.end - part.start),
        }
    }

    /// Whether a part that the store has taken will be there when the upload is completed.
    pub(super) fn counts_on_parts(&self) -> bool {
        !self.target.store.capabilities().parts_expire
    }

    /// The file is another than the journal has it, or about to be.
    pub(super) fn note_change(&mut self) {
        if std::mem::take(&mut self.recorded) {
            self.note(&Record::Changed);
        }
    }

    /// A chunk that is on disk only is written to where it lies: before its bytes change, the
    /// journal says so.
    pub(super) fn note_rewriting(&mut self, index: u32) {
        let Some(Data::Spilled(file)) = self.chunks.get(&index).map(|chunk| &chunk.data) else {
            return;
        };
        let named = self.named.iter().any(|named| Arc::ptr_eq(named, file));
        self.note_change();
        if named && self.rewritten.insert(index) {
            self.note(&Record::Rewritten { index });
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
            self.drop_journal();
            self.journal_failed = true;
        }
    }

    /// Nothing that is in the journal counts any more.
    pub(super) fn drop_journal(&mut self) {
        // Before the files it names.
        self.journal = None;
        self.named.clear();
        self.rewritten.clear();
        self.recorded = false;
    }

    pub(super) fn destination(&self) -> Record {
        Record::Destination(Destination {
            store: self.target.store.name().to_owned(),
            key: self.target.key.clone(),
            path: self.target.path.clone(),
        })
    }

    /// Where every byte is; `None` when some are in memory only.
    fn manifest(&self, closed: bool, tolerance: Option<&Tolerance>) -> Option<Noted> {
        let mut chunks = Vec::with_capacity(self.chunks.len());
        let mut files = Vec::with_capacity(self.chunks.len());
        let mut exact = true;
        for (index, chunk) in &self.chunks {
            if self.lies_beneath(*index) {
                continue;
            }
            let (record, file) = match self.record_of(*index, chunk, tolerance) {
                Where::Now(record, file) => (record, file),
                Where::Before(record, file) => {
                    exact = false;
                    (record, Some(file))
                }
                Where::Later => {
                    exact = false;
                    continue;
                }
                Where::Nowhere => return None,
            };
            chunks.push(record);
            files.extend(file);
        }
        let size = match (tolerance, chunks.last()) {
            (Some(tolerance), last) if !exact => {
                let written = last.map_or(0, |it| self.geometry.range(it.index).start + it.end);
                tolerance.size.max(written).min(self.size)
            }
            _ => self.size,
        };
        let base = self.base.as_ref().filter(|_| self.base_limit > 0);
        let base = base.map(|base| Base::of(&base.source(), self.base_limit));
        let manifest = Manifest {
            closed,
            at: now_precisely(),
            size,
            part_size: self.geometry.first(),
            joint: self.geometry.joint(),
            base,
            chunks,
        };
        Some(Noted {
            manifest,
            files,
            exact,
        })
    }

    fn record_of(&self, index: u32, chunk: &Chunk, tolerance: Option<&Tolerance>) -> Where {
        let part = self.part(index);
        let file = chunk.on_disk();
        let unchecked = file.is_some() && chunk.crc32c.is_none();
        if (file.is_some() && !unchecked)
            || (file.is_none() && self.counts_on_parts() && chunk.is_sent(part.end - part.start))
        {
            return Where::Now(chunk_record(index, chunk), file.cloned());
        }
        let Some(tolerance) = tolerance else {
            return Where::Nowhere;
        };
        if !tolerance.present.contains(&index) {
            return Where::Later;
        }
        if !tolerance.copied.contains(&index) {
            return Where::Nowhere;
        }
        match (file, &chunk.copy) {
            // It is written to in place: what is there is what was, or newer.
            (Some(file), _) => Where::Before(chunk_record(index, chunk), Arc::clone(file)),
            (None, Some(copy)) => {
                let record = ChunkRecord {
                    index,
                    version: copy.version,
                    start: copy.local.start,
                    end: copy.local.end,
                    crc32c: Some(copy.crc32c),
                    file: Some(copy.file.name().to_owned()),
                };
                Where::Before(record, Arc::clone(&copy.file))
            }
            (None, None) => Where::Nowhere,
        }
    }
}

/// A manifest, and the files that it names.
struct Noted {
    manifest: Manifest,
    files: Vec<Arc<SpillFile>>,
    /// It is of the file as it is.
    exact: bool,
}

/// Where the bytes of a chunk are that a crash would leave.
enum Where {
    /// All of them on disk, or in the unfinished upload.
    Now(ChunkRecord, Option<Arc<SpillFile>>),
    /// On disk, as they were after the manifest was asked for.
    Before(ChunkRecord, Arc<SpillFile>),
    /// There was no such chunk when the manifest was asked for.
    Later,
    /// In memory only.
    Nowhere,
}

fn chunk_record(index: u32, chunk: &Chunk) -> ChunkRecord {
    ChunkRecord {
        index,
        version: chunk.version,
        start: chunk.local.start,
        end: chunk.local.end,
        crc32c: chunk.crc32c,
        file: chunk.on_disk().map(|file| file.name().to_owned()),
    }
}

impl Tolerance {
    /// Whether the manifest needs a copy of this chunk, and there is none yet.
    fn lacks(&self, index: u32) -> bool {
        self.present.contains(&index) && !self.copied.contains(&index)
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
