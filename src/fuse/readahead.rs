//! How far ahead of a reader the kernel reads in this mount, and so how large its requests are.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use parking_lot::Mutex;

use crate::mount_table::Table;

/// The readahead of files that are opened from now on: the kernel takes that of the mount's backing
/// device when an open has been answered, for as long as the file is open. Of two that are answered at
/// once, one may get the other's, which costs speed only.
#[derive(Debug, Default)]
pub(super) struct Readahead {
    setting: Mutex<Option<Setting>>,
}

#[derive(Debug)]
struct Setting {
    /// `read_ahead_kb` of the backing device.
    file: PathBuf,
    /// What is in force, KiB.
    kib: u64,
    /// What the kernel chose, KiB.
    usual: u64,
}

impl Readahead {
    /// Looks whether it can be set for what is mounted at `mountpoint`: by root, where `/sys` can be
    /// written to.
    pub fn find(&self, mountpoint: &Path) {
        match Setting::of(mountpoint) {
            Ok(setting) => *self.setting.lock() = Some(setting),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::debug!(error, "the kernel's readahead stays as it is");
            }
        }
    }

    /// For the open that is answered next: so many bytes, or as usual.
    pub fn set(&self, bytes: Option<u64>) {
        let mut setting = self.setting.lock();
        let Some(known) = setting.as_mut() else {
            return;
        };
        let kib = bytes.map_or(known.usual, |bytes| bytes >> 10);
        if known.kib == kib {
            return;
        }
        match known.write(kib) {
            Ok(()) => known.kib = kib,
            Err(error) => {
                tracing::debug!(%error, "the kernel's readahead stays as it is");
                *setting = None;
            }
        }
    }
}

impl Setting {
    fn of(mountpoint: &Path) -> anyhow::Result<Self> {
        let table = Table::read()?;
        let device = table.device(mountpoint).context("not in the mount table")?;
        let file = PathBuf::from(format!("/sys/class/bdi/{device}/read_ahead_kb"));
        let kib = std::fs::read_to_string(&file)?.trim().parse()?;
        let setting = Self {
            file,
            kib,
            usual: kib,
        };
        setting.write(kib)?;
        Ok(setting)
    }

    fn write(&self, kib: u64) -> io::Result<()> {
        std::fs::write(&self.file, kib.to_string())
    }
}
