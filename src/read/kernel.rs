//! What the kernel is told of an object: the file that it can read by itself, and how far to read
//! ahead.

use std::fs::File;
use std::sync::Arc;

use super::READAHEAD;
use super::object::ObjectReader;
use super::plan::Format;

/// Bytes of readahead in a file whose tensors are read as a whole. `load_file` takes 1.1 times as long
/// with the kernel's usual 128 KiB. More is faster still where the store takes its time (384 KiB: 1.2
/// times), but gets more of a tensor's neighbours: 1.25 MiB with one of 16 MiB. torch has the kernel
/// double it for what it maps.
const IN_TENSORS: u64 = 256 << 10;
/// Bytes of readahead in a file that is whole on local disk, where too much costs no request.
const ON_DISK: u64 = 1 << 20;

impl ObjectReader {
    /// All of the object as a file: the store's own where it is one of this machine, or that of the
    /// disk cache, if it has it whole, and this process has checked or written every block of it.
    pub fn on_disk(&self) -> Option<Arc<File>> {
        let source = self.source();
        if let Some(file) = source.store.file_of(&source.key, source.etag.as_ref()) {
            return Some(Arc::new(file));
        }
        let disk = self.reader().disk.as_ref()?;
        disk.object(&source)?.whole()
    }

    /// How far it pays if the kernel reads ahead of whoever opens it now, bytes; `None`: as usual.
    pub fn readahead(&self) -> Option<u64> {
        let disk = self.reader().disk.as_ref();
        let cached = disk.and_then(|disk| disk.object(&self.source()));
        if cached.is_some_and(|cached| cached.is_whole()) {
            return Some(ON_DISK);
        }
        match self.format() {
            // The members of a container are mapped by torch alone, which has the kernel read twice as
            // far ahead.
            Some(Format::Zip) => None,
            Some(_) => Some(IN_TENSORS),
            None => Some(READAHEAD),
        }
    }
}
