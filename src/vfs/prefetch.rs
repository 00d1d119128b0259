//! Files that are to be on local disk before they are read.
//!
//! An ioctl of a file that is open asks for it: it needs no right to write, as a control file would,
//! also where the mount is read-only, and the kernel lets any number through at a time.

use super::Vfs;
use super::error::{VfsError, VfsResult};
use super::tree::Inode;

/// Bytes of a file that are to be in the disk cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetch {
    pub offset: u64,
    pub length: u64,
}

impl Prefetch {
    /// The ioctl's number, as Linux makes them: what it hands over goes in, its size, whose it is.
    pub const COMMAND: u32 = (1 << 30) | ((Self::SIZE as u32) << 16) | ((b'm' as u32) << 8) | 1;
    /// Bytes of what is handed over.
    pub const SIZE: usize = 16;

    /// What is handed over.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let (offset, length) = bytes.split_at_mut(8);
        offset.copy_from_slice(&self.offset.to_ne_bytes());
        length.copy_from_slice(&self.length.to_ne_bytes());
        bytes
    }

    /// What was handed over; `None` where that is something else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (offset, rest) = bytes.split_first_chunk()?;
        let length = rest.try_into().ok()?;
        Some(Self {
            offset: u64::from_ne_bytes(*offset),
            length: u64::from_ne_bytes(length),
        })
    }
}

impl Vfs {
    /// Puts bytes of a stored file into the disk cache. Of a file that is not stored, all is here.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without a disk cache, or with one that has failed; `ENOSPC` when it has no room;
    /// the store's.
    pub async fn prefetch(&self, inode: Inode, wanted: Prefetch) -> VfsResult<()> {
        let file = self.file(inode)?;
        let target = self.target(inode).await?;
        let reader = {
            let mut state = file.state();
            match state.draft {
                Some(_) => None,
                None => self.reader_of(&mut state, &target),
            }
        };
        let Some(reader) = reader else {
            return Ok(());
        };
        let end = wanted.offset.saturating_add(wanted.length);
        match reader.warm(wanted.offset..end).await? {
            Some(0) => Ok(()),
            Some(_) => Err(VfsError::plain(libc::ENOSPC)),
            None => Err(VfsError::plain(libc::EOPNOTSUPP)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_over_is_what_arrives() {
        let wanted = Prefetch {
            offset: 1 << 40,
            length: 77,
        };
        assert_eq!(Prefetch::from_bytes(&wanted.to_bytes()), Some(wanted));
        assert_eq!(Prefetch::from_bytes(&[0; 15]), None);
        assert_eq!(Prefetch::from_bytes(&[0; 17]), None);
    }
}
