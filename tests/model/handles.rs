//! Operations on open files.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mlfs::vfs::{FileKind, Inode, VfsError, WriteOutcome};
use tokio::time::{Instant, sleep};

use super::checks::{compare, difference, is_gone, require};
use super::driver::{Driver, Outcome, PATIENCE, Slot};
use super::mount::access;
use super::operations::{LARGEST, Opening, PART, noise};
use super::reference::{Found, Id, parent};

impl Driver<'_> {
    pub(super) async fn open(&mut self, opening: &Opening) -> Outcome {
        if self.slots[opening.slot].is_some() {
            return Ok(());
        }
        let expected = match self.model.find(opening.path) {
            Ok(Found::Directory) if opening.exclusive => Err(libc::EEXIST),
            Ok(Found::Directory) => Err(libc::EISDIR),
            Ok(Found::File(_)) if opening.exclusive => Err(libc::EEXIST),
            Ok(Found::File(id)) => Ok(id),
            Err(libc::ENOENT)
                if opening.create
                    && self.model.find(parent(opening.path)) == Ok(Found::Directory) =>
            {
                Ok(self.model.nodes.len())
            }
            Err(errno) => Err(errno),
        };
        let told = self.open_path(opening).await;
        if self.excused(&told) {
            return Ok(());
        }
        let (told, opened) = match told {
            Ok(slot) => (Ok(()), Some(slot)),
            Err(error) => (Err(error), None),
        };
        compare("open", told, expected.map(|_| ()))?;
        if let (Some((handle, held)), Ok(id)) = (opened, expected) {
            let created = id == self.model.nodes.len();
            if created {
                self.model.create(opening.path);
            }
            let node = &mut self.model.nodes[id];
            node.writers += usize::from(opening.write);
            if opening.truncate && !node.content.is_empty() {
                node.content.clear();
                node.dirty = true;
            }
            self.slots[opening.slot] = Some(Slot {
                handle,
                id,
                readable: opening.read,
                writable: opening.write,
                held,
            });
        }
        Ok(())
    }

    /// What the kernel does: a lookup, then `open` or `create`.
    async fn open_path(&mut self, opening: &Opening) -> Result<(u64, Vec<Inode>), VfsError> {
        let mut wanted = access(opening.read, opening.write);
        wanted.truncate = opening.truncate;
        wanted.exclusive = opening.exclusive;
        let (parent, name, mut held) = self.mount.walk(opening.path).await?;
        match self.mount.lookup(parent, name).await {
            Ok(_) if opening.exclusive => Err(VfsError::EXISTS),
            Ok(found) if found.attributes.kind == FileKind::Directory => {
                Err(VfsError::IS_DIRECTORY)
            }
            Ok(found) => {
                let inode = found.attributes.inode;
                let opened = self.mount.vfs.open(inode, wanted).await?;
                held.push(inode);
                Ok((opened.handle, held))
            }
            Err(error) if error.errno == libc::ENOENT && opening.create => {
                let created = self.mount.vfs.create(parent, OsStr::new(name), wanted);
                let (entry, opened) = created.await?;
                self.mount.count(entry.attributes.inode);
                held.push(entry.attributes.inode);
                Ok((opened.handle, held))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) async fn write(&mut self, slot: usize, at: u64, length: u64, seed: u64) -> Outcome {
        let Some(slot) = &self.slots[slot] else {
            return Ok(());
        };
        let (handle, id) = (slot.handle, slot.id);
        let length = length.min(LARGEST.saturating_sub(at));
        if !slot.writable || length == 0 || self.model.nodes[id].foreign {
            return Ok(());
        }
        let data = noise(seed, length);
        let told = self.write_all(handle, at, &data).await;
        match told {
            Ok(()) => {
                self.model.write(id, at, &data);
                self.check_handle(handle, id, at, length).await
            }
            Err(ref error) if self.excused(&told) || error.errno == libc::ENOSPC => {
                self.calm();
                let refused = refused_at(error);
                self.adopt(handle, id, at, &data, refused).await
            }
            Err(error) if self.model.nodes[id].lost && is_gone(&error) => {
                self.model.nodes[id].doubtful = true;
                Ok(())
            }
            Err(error) => Err(format!("write: {error:?}")),
        }
    }

    async fn write_all(&self, handle: u64, at: u64, data: &[u8]) -> Result<(), VfsError> {
        let vfs = &self.mount.vfs;
        let taken = match vfs.try_write(handle, at, data, std::process::id())? {
            WriteOutcome::Done => return Ok(()),
            WriteOutcome::Partial(taken) => taken,
        };
        let rest = Bytes::copy_from_slice(&data[taken..]);
        vfs.write(handle, at + taken as u64, rest).await
    }

    /// A write failed on its way: each part's piece of it was written or not, and the reference
    /// takes what is there, up to where the write was `refused`. A piece that cannot be read was
    /// written, and then given up to make room: had it been given up before, that would have been
    /// refused.
    async fn adopt(
        &mut self,
        handle: u64,
        id: Id,
        at: u64,
        data: &[u8],
        refused: Option<u64>,
    ) -> Outcome {
        for (from, length) in pieces(at, data.len() as u64) {
            if refused.is_some_and(|refused| refused <= from) {
                return Ok(());
            }
            let start = (from - at) as usize;
            let piece = &data[start..start + length as usize];
            match self.mount.read(handle, from, length as u32).await {
                Ok(bytes) if bytes == piece => self.model.write(id, from, piece),
                Ok(_) => return Ok(()),
                Err(error) if error.errno == libc::ENOSPC => self.model.write(id, from, piece),
                Err(error) => return Err(format!("read after a write that failed: {error:?}")),
            }
        }
        Ok(())
    }

    pub(super) async fn read(&mut self, slot: usize, at: u64, length: u64) -> Outcome {
        match &self.slots[slot] {
            Some(slot) if slot.readable => {
                self.check_handle(slot.handle, slot.id, at, length).await
            }
            _ => Ok(()),
        }
    }

    /// A range read through a handle is what the reference has there.
    async fn check_handle(&self, handle: u64, id: Id, at: u64, length: u64) -> Outcome {
        let node = &self.model.nodes[id];
        if node.doubtful {
            return Ok(());
        }
        let told = self.mount.read(handle, at, length as u32).await;
        let size = node.content.len() as u64;
        let expected = &node.content[at.min(size) as usize..(at + length).min(size) as usize];
        match told {
            Ok(bytes) => require(bytes == expected, || {
                let difference = difference(&bytes, expected);
                format!("read {length} bytes at {at}: {difference}")
            }),
            // Parts given up under pressure, and what others replaced, say so.
            Err(error) if error.errno == libc::ENOSPC && size > 2 * PART => Ok(()),
            Err(error) if (node.foreign || node.lost) && is_gone(&error) => Ok(()),
            told if self.excused(&told) => Ok(()),
            Err(error) => Err(format!("read {length} bytes at {at}: {error:?}")),
        }
    }

    pub(super) async fn resize(&mut self, slot: usize, size: u64) -> Outcome {
        let Some(slot) = &self.slots[slot] else {
            return Ok(());
        };
        let (id, inode) = (slot.id, slot.held[slot.held.len() - 1]);
        if !slot.writable || self.model.nodes[id].foreign {
            return Ok(());
        }
        let handle = Some(slot.handle);
        let told = self.mount.vfs.set_size(inode, handle, size).await;
        if told
            .as_ref()
            .is_err_and(|error| error.errno == libc::ENOSPC)
        {
            // It would cut a part whose local copy was given up.
            return Ok(());
        }
        compare("ftruncate", told, Ok(()))?;
        self.model.resize(id, size);
        Ok(())
    }

    pub(super) async fn resize_path(&mut self, path: &str, size: u64) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::File(id)) => Ok(id),
            Ok(Found::Directory) => Err(libc::EISDIR),
            Err(errno) => Err(errno),
        };
        let found = self.mount.find(path).await;
        if self.excused(&found) {
            return Ok(());
        }
        let told = match found {
            Ok(found) => {
                let inode = found.attributes.inode;
                self.mount.vfs.set_size(inode, None, size).await
            }
            Err(error) => Err(error),
        };
        let Ok(id) = expected else {
            return compare("truncate", told, expected.map(|_| ()));
        };
        let closed = self.model.nodes[id].writers == 0;
        if told
            .as_ref()
            .is_err_and(|error| error.errno == libc::ENOSPC)
        {
            return Ok(());
        }
        if self.excused(&told) {
            // The size is changed here, and not, or perhaps, in the store.
            self.model.resize(id, size);
            self.model.publish_perhaps(id);
            return self.settled(id).await;
        }
        compare("truncate", told, Ok(()))?;
        self.model.resize(id, size);
        if closed && self.model.nodes[id].dirty {
            self.model.publish(id);
        }
        Ok(())
    }

    pub(super) async fn close(&mut self, slot: usize) -> Outcome {
        let Some(slot) = self.slots[slot].take() else {
            return Ok(());
        };
        let vfs = Arc::clone(&self.mount.vfs);
        let told = vfs.flush(slot.handle, std::process::id()).await;
        let node = &self.model.nodes[slot.id];
        let publishes = slot.writable && node.changed && node.path.is_some();
        if self.excused(&told) {
            require(publishes, || "close fails with nothing to store".to_owned())?;
            self.model.publish_perhaps(slot.id);
        } else if node.foreign {
            // Nothing was written to it since it was replaced.
            compare("close", told, Ok(()))?;
        } else {
            compare("close", told, Ok(()))?;
            if publishes {
                self.model.publish(slot.id);
                self.check_store()?;
            }
        }
        vfs.release(slot.handle);
        self.model.nodes[slot.id].writers -= usize::from(slot.writable);
        self.settled(slot.id).await
    }

    /// Waits for what the release publishes in the background, and takes over how it ended.
    pub(super) async fn settled(&mut self, id: Id) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let uploading = || {
            let pending = self.mount.vfs.unstored();
            pending.iter().any(|file| file.state == "uploading")
        };
        while uploading() {
            require(Instant::now() < deadline, || {
                "a publication in the background hangs".to_owned()
            })?;
            sleep(Duration::from_millis(1)).await;
        }
        let node = &self.model.nodes[id];
        let Some(path) = node.path.clone() else {
            return Ok(());
        };
        if node.writers > 0 || !node.dirty {
            return Ok(());
        }
        let shown = format!("{}/{path}", self.run);
        let pending = self.mount.vfs.unstored();
        match pending.iter().find(|file| file.path == shown) {
            None => self.model.publish(id),
            Some(file) => {
                let told = self.troubled || node.refused;
                require(told, || format!("not stored: {file:?}"))?;
                self.model.publish_perhaps(id);
            }
        }
        Ok(())
    }

    pub(super) async fn synchronise(&mut self, slot: usize) -> Outcome {
        let Some(slot) = &self.slots[slot] else {
            return Ok(());
        };
        let told = self.mount.vfs.synchronise(slot.handle).await;
        compare("fsync", told, Ok(()))
    }

    pub(super) async fn save(&mut self, path: &'static str, length: u64, seed: u64) -> Outcome {
        let Some(slot) = self.slots.iter().position(Option::is_none) else {
            return Ok(());
        };
        let opening = Opening {
            slot,
            path,
            read: false,
            write: true,
            create: true,
            truncate: true,
            exclusive: false,
        };
        self.open(&opening).await?;
        let length = length.min(LARGEST);
        let step = 128 * 1024;
        for at in (0..length).step_by(step) {
            let piece = (length - at).min(step as u64);
            self.write(slot, at, piece, seed + at).await?;
        }
        self.close(slot).await
    }
}

/// Where a write met a part of which no copy is here, if that is why it failed.
fn refused_at(error: &VfsError) -> Option<u64> {
    let (_, rest) = error.cause.as_deref()?.split_once(": bytes ")?;
    rest.split_once("..")?.0.parse().ok()
}

/// A range cut where parts begin: where each piece begins, and its length.
fn pieces(at: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = at + length;
    let starts = std::iter::successors(Some(at), move |from| {
        let next = (from / PART + 1) * PART;
        (next < end).then_some(next)
    });
    starts.map(move |from| (from, (PART - from % PART).min(end - from)))
}
