//! What former mounts left in the spill directory, and going on with it.
//!
//! A folder is taken over with its lock, so that no two mounts ever go on with the same journal.
//! Nothing here is sent without somebody's decision: [`Writer::leftovers`] tells what there is,
//! [`Leftover::resume`] makes a draft of it again, [`Leftover::discard`] gives it up.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::Writer;
use super::chunk::{Chunk, Data, Sent};
use super::draft::Draft;
use super::geometry::Geometry;
use super::growing::Following;
use super::journal::{self, ChunkRecord, Journal, Manifest, Record, Replayed};
use super::spill::{SpillDirectory, SpillFile};
use super::state::{Misplaced, State, Upload};
use super::target::Target;
use crate::read::{ObjectReader, Source};
use crate::store::{ETag, PartReceipt, Store, StoreError};

/// A draft of a mount that is gone.
#[derive(Debug)]
pub struct Leftover {
    id: String,
    pub(super) replayed: Replayed,
    journal: PathBuf,
    /// Names of the draft's chunk files.
    files: Vec<String>,
    /// Bytes of them.
    on_disk: u64,
    directory: Arc<SpillDirectory>,
}

/// Why a leftover cannot be made a draft again. It stays where it is.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    #[error("not closed by its writer when the mount ended, and some of it was in memory only")]
    Unfinished,
    #[error("not closed by its writer when the mount ended: retry to store it as it was")]
    Unclosed,
    #[error("bytes {}..{} are neither on disk nor in the store any more", .0.start, .0.end)]
    Lost(Range<u64>),
    #[error("spill file: {0}")]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Writer {
    /// What former mounts of this server left. Their folders are this mount's from now on. Files
    /// that no journal speaks of are removed: nobody could say what they were.
    pub fn leftovers(&self) -> Vec<Leftover> {
        let mut found = Vec::new();
        for directory in self.spill.abandoned() {
            match leftovers_in(&directory, &self.options.tracking) {
                Ok(leftovers) => found.extend(leftovers),
                Err(error) => tracing::warn!(directory = %directory.path().display(), %error,
                    "what a former mount left here cannot be read; it stays"),
            }
        }
        found
    }
}

fn leftovers_in(directory: &Arc<SpillDirectory>, tracking: &str) -> io::Result<Vec<Leftover>> {
    let names = directory.names()?;
    let mut found = Vec::new();
    let mut chunks: HashMap<&str, Vec<&str>> = HashMap::new();
    for name in names.iter().filter(|name| !journal::is_journal(name)) {
        chunks.entry(journal::id_of(name)).or_default().push(name);
    }
    for name in names.iter().filter(|name| journal::is_journal(name)) {
        let path = directory.path().join(name);
        let (records, _) = journal::read(&path)?;
        let Some(replayed) = Replayed::from_records(records) else {
            let torn = !std::fs::read(&path)?.contains(&b'\n');
            if torn {
                // Before it said what it is of: nothing was sent, nothing was promised.
                directory.remove(&path);
            } else {
                tracing::warn!(journal = %path.display(),
                    "not understood: it stays, with its chunks; is it another version's?");
                chunks.remove(journal::id_of(name));
            }
            continue;
        };
        if replayed.begin.tracking != tracking {
            // One mount is of one server: all of the folder is another's.
            return Ok(Vec::new());
        }
        let id = journal::id_of(name);
        let files: Vec<String> = chunks
            .remove(id)
            .unwrap_or_default()
            .into_iter()
            .map(str::to_owned)
            .collect();
        let on_disk = files
            .iter()
            .filter_map(|file| Some(directory.path().join(file).metadata().ok()?.len()))
            .sum();
        found.push(Leftover {
            id: id.to_owned(),
            replayed,
            journal: path,
            files,
            on_disk,
            directory: Arc::clone(directory),
        });
    }
    for name in chunks.into_values().flatten() {
        directory.remove(&directory.path().join(name));
    }
    Ok(found)
}

impl Leftover {
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Below the mount point.
    pub fn path(&self) -> &str {
        &self.replayed.destination.path
    }

    /// `s3://bucket`.
    pub fn store(&self) -> &str {
        &self.replayed.destination.store
    }

    pub fn key(&self) -> &str {
        &self.replayed.destination.key
    }

    /// When it was begun, in seconds since 1970.
    pub fn since(&self) -> u64 {
        self.replayed.begin.since
    }

    /// Bytes of the file, or as many as are known of.
    pub fn size(&self) -> u64 {
        match &self.replayed.manifest {
            Some(manifest) => manifest.size,
            None => {
                self.replayed
                    .parts
                    .iter()
                    .map(|part| part.size)
                    .sum::<u64>()
                    + self.on_disk
            }
        }
    }

    /// When its writer closed it, in milliseconds since 1970; `None` if that did not happen.
    pub fn closed_at(&self) -> Option<u64> {
        let manifest = self.replayed.manifest.as_ref();
        manifest.filter(|it| it.closed).map(|it| it.at)
    }

    /// What keeps it from being sent without anybody's word, whatever the store says.
    pub fn obstacle(&self) -> Option<ResumeError> {
        match &self.replayed.manifest {
            None => Some(ResumeError::Unfinished),
            Some(manifest) if !manifest.closed => Some(ResumeError::Unclosed),
            Some(_) => None,
        }
    }

    /// Why it was not stored when its mount lived, if that was tried.
    pub fn failure(&self) -> Option<&str> {
        self.replayed.failure.as_deref()
    }

    /// Makes it a draft again: what its disk and its upload still hold is checked, and is not sent
    /// again where the store has it. Publishing it is the caller's.
    ///
    /// # Errors
    /// Gives the leftover back, unchanged, with the reason.
    pub async fn resume(
        self,
        writer: &Arc<Writer>,
        store: &Arc<dyn Store>,
    ) -> Result<Arc<Draft>, (Self, ResumeError)> {
        match self.rebuild(writer, store).await {
            Ok(draft) => Ok(draft),
            Err(error) => Err((self, error)),
        }
    }

    async fn rebuild(
        &self,
        writer: &Arc<Writer>,
        store: &Arc<dyn Store>,
    ) -> Result<Arc<Draft>, ResumeError> {
        let manifest = self.replayed.manifest.clone();
        let manifest = manifest.ok_or(ResumeError::Unfinished)?;
        let held = self.held_parts(store).await?;
        let spent = match (&self.replayed.upload, &self.replayed.spent) {
            // It still is what was to be spent.
            (Some((key, _)), Some(spent))
                if held.is_some() && store.capabilities().list_parts && *key == spent.key =>
            {
                None
            }
            _ => self.spent(store, &manifest).await?,
        };
        let geometry = Geometry::of(manifest.part_size, manifest.joint);
        let mut chunks = BTreeMap::new();
        for record in &manifest.chunks {
            if spent.is_some() && self.part(record).is_some() {
                // It is part of that object.
                continue;
            }
            let receipt = held.as_ref().and_then(|held| self.receipt(record, held));
            let file = self.chunk_file(writer, &manifest, record).await?;
            let data = match (file, &receipt) {
                (Some(file), _) => Data::Spilled(Arc::new(file)),
                (None, Some(_)) => Data::GivenUp,
                (None, None) => {
                    let range = geometry.range(record.index);
                    return Err(ResumeError::Lost(
                        range.start + record.start..range.start + record.end,
                    ));
                }
            };
            let checked = self.is_checked(&manifest, record);
            chunks.insert(record.index, chunk(record, checked, data, receipt));
        }
        let reopened = Journal::reopen(&self.directory, self.journal.clone())?;
        // Nothing can fail any more.
        for chunk in chunks.values() {
            if let Data::Spilled(file) = &chunk.data {
                file.own();
            }
        }
        let mut state = self.state(writer, store, manifest, chunks, reopened);
        if held.is_none() {
            state.upload = None;
        }
        if let Some(spent) = spent {
            let key = spent.key.clone();
            let lies_over_it = |base: &Arc<ObjectReader>| base.source().key == key;
            if !state.base.as_ref().is_some_and(lies_over_it) {
                state.base_limit = spent.size.min(state.size);
                state.base = Some(writer.reader.open(Source {
                    store: Arc::clone(store),
                    key: spent.key,
                    etag: spent.etag,
                    size: spent.size,
                }));
            }
            let base = state.base.as_ref();
            state.misplaced = Some(Misplaced {
                etag: base.and_then(|base| base.source().etag),
                before: None,
                only_copy: true,
                target: Target {
                    key,
                    ..state.target.clone()
                },
            });
        }
        let misplaced = state.misplaced.as_ref();
        let former = misplaced.map(|misplaced| misplaced.target.object());
        let draft = Draft::with_state(writer, self.id.clone(), self.since(), state);
        if let Some(former) = former {
            writer.names.leave(former, &draft);
        }
        Ok(draft)
    }

    fn state(
        &self,
        writer: &Arc<Writer>,
        store: &Arc<dyn Store>,
        manifest: Manifest,
        chunks: BTreeMap<u32, Chunk>,
        journal: Journal,
    ) -> State {
        let target = |key: &str| Target {
            store: Arc::clone(store),
            key: key.to_owned(),
            path: self.path().to_owned(),
        };
        let upload = self.replayed.upload.as_ref().map(|(key, id)| Upload {
            target: target(key),
            id: id.clone(),
        });
        let base_limit = manifest.base.as_ref().map_or(0, |base| base.limit);
        let base = manifest.base.map(|base| {
            writer.reader.open(Source {
                store: Arc::clone(store),
                key: base.key,
                etag: base.etag.map(ETag::new),
                size: base.size,
            })
        });
        let generation = chunks.values().map(|chunk| chunk.version).max();
        State {
            target: target(self.key()),
            base,
            base_limit,
            low_water: manifest.size,
            size: manifest.size,
            geometry: Geometry::of(manifest.part_size, manifest.joint),
            chunks,
            queued: BTreeSet::new(),
            generation: generation.unwrap_or(0) + 1,
            opened: 0,
            published: None,
            upload,
            following: Following::Not,
            sequential: true,
            cursor: 0,
            held: false,
            detached: false,
            failure: self.replayed.failure.clone(),
            failed_close: None,
            only: None,
            guard: None,
            journal: Some(Arc::new(journal)),
            journal_failed: false,
            recorded: true,
            recorded_closed: manifest.closed,
            named: Vec::new(),
            rewritten: BTreeSet::new(),
            misplaced: None,
        }
    }

    /// The parts that the upload really holds, by number; of a part sent twice, the last. `None`
    /// without an upload.
    async fn held_parts(
        &self,
        store: &Arc<dyn Store>,
    ) -> Result<Option<HashMap<u32, PartReceipt>>, ResumeError> {
        let Some((key, id)) = &self.replayed.upload else {
            return Ok(None);
        };
        if store.capabilities().parts_expire {
            // All of it is here.
            if let Err(error) = store.abort_multipart(key, id).await {
                tracing::debug!(id = self.id, %error, "its former upload was not aborted");
            }
            return Ok(None);
        }
        if !store.capabilities().list_parts {
            // What was confirmed is believed; should it be gone, the completion fails.
            let parts = self.replayed.parts.iter();
            let parts = parts.map(|part| (part.index + 1, part.receipt()));
            return Ok(Some(parts.collect()));
        }
        match store.list_parts(key, id).await {
            Ok(parts) => {
                let parts = parts.into_iter().map(|part| (part.number, part));
                Ok(Some(parts.collect()))
            }
            Err(StoreError::UploadGone { .. } | StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The chunk, as the manifest has it, as a part that was sent.
    fn part(&self, record: &ChunkRecord) -> Option<&journal::Part> {
        let mut parts = self.replayed.parts.iter();
        parts.find(|part| part.index == record.index && part.version == record.version)
    }

    /// The receipt of a chunk as the manifest has it, if the store still holds that part.
    fn receipt(
        &self,
        record: &ChunkRecord,
        held: &HashMap<u32, PartReceipt>,
    ) -> Option<PartReceipt> {
        let part = self.part(record)?;
        let found = held.get(&(record.index + 1))?;
        let same = found.etag.as_str().trim_matches('"') == part.etag.trim_matches('"')
            && found.size == part.size;
        same.then(|| part.receipt())
    }

    /// Whether the bytes of the chunk's file must be those that the manifest has a checksum of, and
    /// not newer ones.
    fn is_checked(&self, manifest: &Manifest, record: &ChunkRecord) -> bool {
        manifest.closed
            || (record.crc32c.is_some() && !self.replayed.rewritten.contains(&record.index))
    }

    /// The chunk's file, if it is there and its bytes are what the manifest says.
    async fn chunk_file(
        &self,
        writer: &Arc<Writer>,
        manifest: &Manifest,
        record: &ChunkRecord,
    ) -> Result<Option<SpillFile>, ResumeError> {
        let Some(name) = &record.file else {
            return Ok(None);
        };
        let file = match writer.spill.adopt(&self.directory, name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let range = record.start..record.end;
        let told = record.crc32c;
        let must_be_told = self.is_checked(manifest, record);
        let looked_at = tokio::task::spawn_blocking(move || {
            let found = file.checksum(range).ok();
            (file, found)
        });
        let (file, found) = looked_at.await.map_err(io::Error::other)?;
        if found.is_some() && (found == told || !must_be_told) {
            return Ok(Some(file));
        }
        tracing::warn!(
            id = self.id,
            file = name,
            "a spill file is not what was written to it"
        );
        Ok(None)
    }

    /// Whether somebody has given it up, and not all of it is removed yet.
    pub fn is_discarded(&self) -> bool {
        self.replayed.discarded
    }

    /// Gives it up: its bytes are deleted, and its upload, if the store knows it.
    ///
    /// # Errors
    /// Gives the leftover back when its upload cannot be aborted.
    pub async fn discard(self, store: &Arc<dyn Store>) -> Result<(), (Self, StoreError)> {
        // Written down first: whatever comes between, it is not sent any more.
        match Journal::reopen(&self.directory, self.journal.clone()) {
            Ok(journal) => {
                let noted = journal.append(&Record::Discarded);
                journal.leave();
                if let Err(error) = noted {
                    tracing::warn!(id = self.id, %error, "not written down as discarded");
                }
            }
            Err(error) => tracing::warn!(id = self.id, %error, "not written down as discarded"),
        }
        if let Some((key, id)) = &self.replayed.upload
            && let Err(error) = store.abort_multipart(key, id).await
        {
            return Err((self, error));
        }
        if let Err(error) = self.remove_spent(store).await {
            return Err((self, error));
        }
        for file in &self.files {
            self.directory.remove(&self.directory.path().join(file));
        }
        self.directory.remove(&self.journal);
        Ok(())
    }
}

fn chunk(record: &ChunkRecord, checked: bool, data: Data, receipt: Option<PartReceipt>) -> Chunk {
    Chunk {
        data,
        local: record.start..record.end,
        crc32c: record.crc32c.filter(|_| checked),
        version: record.version,
        sent: receipt.map(|receipt| Sent {
            version: record.version,
            receipt,
        }),
        beneath: None,
        touched: 0,
        copy: None,
    }
}
