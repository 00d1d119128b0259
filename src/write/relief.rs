//! What gives way when memory is spent.
//!
//! In this order: blocks that readers cached (the budget sees to that itself); chunks of a
//! sequential writer that the store holds already, oldest first, keeping the first and the last; where
//! parts may come to nothing they go to disk instead; then a wait for what is on its way; then large
//! drafts that were held back for their name are sent after all; then chunks that nobody is sending go to
//! disk. When the spill, or the disk under it, is full too: chunks on disk that the store holds; small
//! drafts that were held back; and at last the first and last chunks that the store holds. A writer waits
//! meanwhile. Only when nothing is on its way and nothing can give way does a write fail.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Writer;
use super::chunk::Data;
use super::draft::Draft;
use super::error::WriteError;
use super::rename::WORTH_COPYING;
use super::send::task_lost;

/// How long to wait for bytes to come back before looking again at what could give way.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often in a row nothing may be on its way and nothing give way before a write fails.
const HOPELESS_ROUNDS: usize = 30;

/// Which chunks that the store holds may lose their local copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expendable {
    /// What is in memory, without a file's first and last chunk.
    Memory,
    /// What is on disk too.
    Disk,
    /// All of it.
    Ends,
}

/// Which chunks are moved to disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spilled {
    Any,
    /// Those that were sent, where that may come to nothing.
    Sent,
}

impl Writer {
    /// Makes some room for `draft`, or waits until there may be some.
    pub(super) async fn make_room(self: &Arc<Self>, draft: &Arc<Draft>) -> Result<(), WriteError> {
        let used = self.memory.used();
        let _relief = self.relief.lock().await;
        if self.memory.used() < used {
            return Ok(());
        }
        for _ in 0..HOPELESS_ROUNDS {
            // Before looking: what comes to be while we look is not missed.
            let freed = self.memory.freed();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if self.give_up_sent_chunk(Expendable::Memory)
                || matches!(self.spill_oldest(Spilled::Sent).await, Ok(true))
            {
                return Ok(());
            }
            let on_its_way = self.in_flight.load(Ordering::Relaxed) > 0;
            if !on_its_way && self.send_held(WORTH_COPYING) {
                return Ok(());
            }
            if !on_its_way {
                // The disk may be full, or fail: what the store has, or can have, need not lie on it.
                let spilled = self.spill_oldest(Spilled::Any).await;
                if matches!(spilled, Ok(true))
                    || self.give_up_sent_chunk(Expendable::Disk)
                    || self.send_held(1)
                    || self.give_up_sent_chunk(Expendable::Ends)
                {
                    return Ok(());
                }
                spilled?;
            }
            if tokio::time::timeout(PATIENCE, freed).await.is_ok() {
                return Ok(());
            }
        }
        if self.in_flight.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        Err(WriteError::NoRoom {
            object: draft.target().object(),
        })
    }

    /// Drops the local copy of the chunk, of those that the store holds, that was touched longest
    /// ago; false when there is none.
    fn give_up_sent_chunk(&self, expendable: Expendable) -> bool {
        let mut given = None;
        let mut oldest = u64::MAX;
        for draft in self.all_drafts() {
            let state = draft.state.lock();
            if !state.sequential || !state.counts_on_parts() {
                continue;
            }
            let last = state.chunks.keys().next_back().copied();
            for (index, chunk) in &state.chunks {
                let range = state.part(*index);
                let end = *index == 0 || Some(*index) == last;
                let keeps = end && expendable != Expendable::Ends;
                let on_disk = matches!(chunk.data, Data::Spilled(_));
                let there = chunk.memory() > 0 || on_disk && expendable != Expendable::Memory;
                let stored = chunk.is_sent(range.end - range.start) || state.lies_beneath(*index);
                let expendable = stored && !state.queued.contains(index);
                if !keeps && expendable && there && chunk.touched < oldest {
                    oldest = chunk.touched;
                    given = Some((Arc::clone(&draft), *index));
                }
            }
        }
        let Some((draft, index)) = given else {
            return false;
        };
        let mut state = draft.state.lock();
        if state.lies_beneath(index) {
            if let Some(misplaced) = &mut state.misplaced {
                misplaced.only_copy = true;
            }
            let dropped = state.chunks.remove(&index);
            drop(state);
            drop(dropped);
            return true;
        }
        let Some(chunk) = state.chunks.get_mut(&index) else {
            return true;
        };
        if chunk
            .sent
            .as_ref()
            .is_some_and(|sent| sent.version == chunk.version)
        {
            let kept = match (&chunk.data, chunk.on_disk()) {
                (Data::Memory(_), Some(file)) => Data::Spilled(Arc::clone(file)),
                _ => Data::GivenUp,
            };
            let copy = match kept {
                Data::GivenUp => chunk.copy.take(),
                _ => None,
            };
            let dropped = std::mem::replace(&mut chunk.data, kept);
            drop(state);
            drop((dropped, copy));
        }
        true
    }

    /// Moves the chunk that was touched longest ago to disk; false when the spill is full or
    /// there is none.
    async fn spill_oldest(self: &Arc<Self>, which: Spilled) -> Result<bool, WriteError> {
        let mut candidate = None;
        let mut oldest = u64::MAX;
        for draft in self.all_drafts() {
            let state = draft.state.lock();
            if which == Spilled::Sent && state.counts_on_parts() {
                continue;
            }
            for (index, chunk) in &state.chunks {
                let part = state.part(*index);
                let moves = which == Spilled::Any || chunk.is_sent(part.end - part.start);
                let is_free = moves && !state.queued.contains(index);
                if is_free && chunk.memory() > 0 && chunk.touched < oldest {
                    oldest = chunk.touched;
                    candidate = Some((Arc::clone(&draft), *index));
                }
            }
        }
        let Some((draft, index)) = candidate else {
            return Ok(false);
        };
        self.spill_chunk(&draft, index).await
    }

    /// Moves one chunk to disk; false when the spill is full.
    async fn spill_chunk(
        self: &Arc<Self>,
        draft: &Arc<Draft>,
        index: u32,
    ) -> Result<bool, WriteError> {
        let (bytes, local, version, copied) = {
            let state = draft.state.lock();
            let Some(chunk) = state.chunks.get(&index) else {
                return Ok(true);
            };
            if matches!(chunk.data, Data::GivenUp) {
                return Ok(true);
            }
            let copied = chunk.on_disk().cloned();
            (chunk.share(), chunk.local.clone(), chunk.version, copied)
        };
        let file = match copied {
            Some(file) => file,
            None => {
                let file = match self.spill.create(&draft.id, local.end) {
                    Some(file) => Arc::new(file?),
                    None => return Ok(false),
                };
                let written = Arc::clone(&file);
                let start = local.start;
                tokio::task::spawn_blocking(move || match bytes {
                    Some(bytes) => written.write(&bytes, start),
                    None => Ok(()),
                })
                .await
                .map_err(|error| task_lost(draft, &error))??;
                file
            }
        };
        let mut state = draft.state.lock();
        if let Some(chunk) = state.chunks.get_mut(&index)
            && chunk.version == version
            && chunk.local == local
            && matches!(chunk.data, Data::Memory(_))
        {
            let dropped = std::mem::replace(&mut chunk.data, Data::Spilled(file));
            drop(state);
            drop(dropped);
        }
        Ok(true)
    }

    /// Sends what was held back for a better name, of files of at least so many whole chunks.
    fn send_held(&self, least: usize) -> bool {
        let mut queued = 0;
        for draft in self.all_drafts() {
            let mut state = draft.state.lock();
            if state.held && !state.detached && state.whole_chunks() >= least {
                state.held = false;
                queued += draft.queue_full_chunks(&mut state);
            }
        }
        queued > 0
    }
}
