//! Operations on names, and what others do to them.

use std::ffi::OsStr;

use mlfs::vfs::{RenameMode, VfsError};

use super::checks::{compare, require};
use super::driver::{Driver, Outcome};
use super::mount::{BUCKET, prefix};
use super::reference::{Found, parent};

impl Driver<'_> {
    /// Does `call` again without faults when a fault was the reason that it failed.
    pub(super) async fn rename(&mut self, from: &str, to: &str) -> Outcome {
        if self.model.find(from) == Ok(Found::Directory) {
            self.calm();
        }
        let expected = self.model.rename(from, to);
        let mut told = self.rename_path(from, to).await;
        if self.excused(&told) {
            self.calm();
            told = self.rename_path(from, to).await;
        }
        compare("rename", told, expected)
    }

    async fn rename_path(&mut self, from: &str, to: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(from).await?;
        self.mount.lookup(parent, name).await?;
        let (to_parent, to_name, _) = self.mount.walk(to).await?;
        let (name, to_name) = (OsStr::new(name), OsStr::new(to_name));
        let mode = RenameMode::Replace;
        let vfs = &self.mount.vfs;
        vfs.rename(parent, name, to_parent, to_name, mode).await
    }

    pub(super) async fn unlink(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::File(_)) => {
                self.model.unlink(path);
                Ok(())
            }
            Ok(Found::Directory) => Err(libc::EISDIR),
            Err(errno) => Err(errno),
        };
        let mut told = self.unlink_path(path).await;
        if self.excused(&told) {
            self.calm();
            told = self.unlink_path(path).await;
        }
        compare("unlink", told, expected)
    }

    async fn unlink_path(&mut self, path: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(path).await?;
        self.mount.vfs.unlink(parent, OsStr::new(name)).await
    }

    pub(super) async fn make_directory(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(_) => Err(libc::EEXIST),
            Err(libc::ENOENT) if self.model.find(parent(path)) == Ok(Found::Directory) => Ok(()),
            Err(errno) => Err(errno),
        };
        let mut told = self.make_directory_path(path).await;
        if self.excused(&told) {
            self.calm();
            told = self.make_directory_path(path).await;
        }
        if expected.is_ok() {
            self.model.directories.insert(path.to_owned());
        }
        compare("mkdir", told, expected)
    }

    async fn make_directory_path(&mut self, path: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(path).await?;
        let made = self.mount.vfs.make_directory(parent, OsStr::new(name));
        let inode = made.await?.attributes.inode;
        self.mount.count(inode);
        Ok(())
    }

    pub(super) async fn remove_directory(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::Directory) if self.model.is_empty(path) => {
                self.model.directories.remove(path);
                Ok(())
            }
            Ok(Found::Directory) => Err(libc::ENOTEMPTY),
            Ok(Found::File(_)) => Err(libc::ENOTDIR),
            Err(errno) => Err(errno),
        };
        let mut told = self.remove_directory_path(path).await;
        if self.excused(&told) {
            self.calm();
            told = self.remove_directory_path(path).await;
        }
        compare("rmdir", told, expected)
    }

    async fn remove_directory_path(&mut self, path: &str) -> Result<(), VfsError> {
        let (parent, name, _) = self.mount.walk(path).await?;
        let vfs = &self.mount.vfs;
        vfs.remove_directory(parent, OsStr::new(name)).await
    }

    pub(super) async fn list(&mut self, path: &str) -> Outcome {
        let expected = match self.model.find(path) {
            Ok(Found::Directory) => Ok(()),
            Ok(Found::File(_)) => Err(libc::ENOTDIR),
            Err(errno) => Err(errno),
        };
        let told = self.names(path).await;
        if self.excused(&told) {
            return Ok(());
        }
        if let Ok(names) = &told {
            let wanted = self.model.list(path).into_iter().collect::<Vec<_>>();
            require(*names == wanted, || format!("{names:?}, not {wanted:?}"))?;
        }
        compare("readdir", told, expected)
    }

    async fn names(&mut self, path: &str) -> Result<Vec<String>, VfsError> {
        let inode = self.mount.find(path).await?.attributes.inode;
        let vfs = &self.mount.vfs;
        let handle = vfs.open_directory(inode)?;
        let listed = vfs.read_directory(handle, 0, true).await;
        vfs.release_directory(handle);
        let mut names: Vec<String> = listed?
            .listed()
            .iter()
            .map(|entry| entry.name.to_string())
            .collect();
        names.sort();
        Ok(names)
    }

    /// Somebody else changes an object: only where this mount believes nothing for long, and
    /// where nothing unpublished would be in conflict with it.
    pub(super) fn outside(&mut self, path: &str, bytes: Option<Vec<u8>>) -> Outcome {
        let found = self.model.find(path);
        let possible = match found {
            Ok(Found::File(id)) => !self.model.nodes[id].dirty,
            Err(libc::ENOENT) => {
                bytes.is_some() && self.model.find(parent(path)) == Ok(Found::Directory)
            }
            _ => false,
        };
        if self.forever || !possible {
            return Ok(());
        }
        let key = format!("{}/{path}", prefix(&self.run));
        match &bytes {
            Some(bytes) => self.lab.s3.put(BUCKET, &key, bytes.clone()),
            None => self.lab.s3.delete(BUCKET, &key),
        }
        self.model.outside(path, bytes);
        Ok(())
    }
}
