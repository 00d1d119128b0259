//! The kernel's pages, as far as they matter: kept by inode, until the kernel is told otherwise.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use mlfs::vfs::{Inode, VfsError};

use super::mount::Mount;

const PAGE: u64 = 4096;

#[derive(Default)]
pub struct Pages {
    cached: HashMap<Inode, BTreeMap<u64, Vec<u8>>>,
}

impl Pages {
    pub fn drop_all(&mut self) {
        self.cached.clear();
    }

    pub fn drop_of(&mut self, inode: Inode) {
        self.cached.remove(&inode);
    }

    pub fn keep_only(&mut self, held: &[Inode]) {
        self.cached.retain(|inode, _| held.contains(inode));
    }

    /// The bytes of `range`: of the pages that are there, and of those that are fetched.
    pub async fn read(
        &mut self,
        mount: &Mount,
        (inode, handle): (Inode, u64),
        range: Range<u64>,
    ) -> Result<Vec<u8>, VfsError> {
        let cached = self.cached.entry(inode).or_default();
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        let mut bytes = Vec::new();
        let mut page = pages.start;
        while page < pages.end {
            if let Some(there) = cached.get(&page) {
                bytes.extend_from_slice(there);
                page += 1;
                continue;
            }
            let missing = (page..pages.end).take_while(|page| !cached.contains_key(page));
            let count = missing.count() as u64;
            let length = (count * PAGE) as u32;
            let fetched = mount.read(handle, page * PAGE, length).await?;
            for (number, bytes) in (page..).zip(fetched.chunks(PAGE as usize)) {
                cached.insert(number, bytes.to_vec());
            }
            bytes.extend_from_slice(&fetched);
            if fetched.len() < length as usize {
                break;
            }
            page += count;
        }
        let from = (range.start - pages.start * PAGE) as usize;
        let to = (range.end - pages.start * PAGE) as usize;
        let to = to.min(bytes.len());
        Ok(bytes.get(from..to).unwrap_or_default().to_vec())
    }
}
