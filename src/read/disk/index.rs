//! What a version's `index` file says of each block: that it is there, and its checksum.

use crate::store::checksum::crc32c_update;

/// Bytes of an entry. Entry `i` lies at `i * ENTRY_SIZE`.
pub(super) const ENTRY_SIZE: u64 = 8;
/// What an absent block's entry is.
pub(super) const ABSENT: [u8; ENTRY_SIZE as usize] = [0; ENTRY_SIZE as usize];

/// The index of one version. Its entries are no other version's: each is sealed with a number
/// that comes from the identity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entries {
    salt: u32,
}

impl Entries {
    pub fn of(identity: &str) -> Self {
        Self {
            salt: crc32c_update(0, identity.as_bytes()),
        }
    }

    /// The entry of block `index`, whose bytes have the CRC32C `checksum`, both little-endian: the
    /// checksum, then a seal over it, the block's number and the identity.
    pub fn present(self, index: u64, checksum: u32) -> [u8; ENTRY_SIZE as usize] {
        let mut entry = ABSENT;
        entry[..4].copy_from_slice(&checksum.to_le_bytes());
        entry[4..].copy_from_slice(&self.seal(index, checksum).to_le_bytes());
        entry
    }

    /// The checksum of block `index`, if its entry says that it is there. An entry of zeros, of
    /// another block, or half written says no.
    pub fn checksum(self, index: u64, entry: &[u8]) -> Option<u32> {
        let (checksum, seal) = entry.split_at_checked(4)?;
        let checksum = u32::from_le_bytes(checksum.try_into().ok()?);
        let seal = u32::from_le_bytes(seal.try_into().ok()?);
        (seal == self.seal(index, checksum)).then_some(checksum)
    }

    /// Never zero: a hole in the file is no entry.
    fn seal(self, index: u64, checksum: u32) -> u32 {
        let seal = crc32c_update(self.salt, &index.to_le_bytes());
        crc32c_update(seal, &checksum.to_le_bytes()) | 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_its_own_blocks_checksum_and_nothing_else() {
        let entries = Entries::of("one");
        let entry = entries.present(7, 0xdead_beef);
        assert_eq!(entries.checksum(7, &entry), Some(0xdead_beef));
        assert_eq!(entries.checksum(8, &entry), None);
        assert_eq!(Entries::of("other").checksum(7, &entry), None);
        assert_eq!(entries.checksum(7, &entry[..5]), None);
    }

    #[test]
    fn zeros_and_torn_entries_are_absent() {
        for index in 0..10_000 {
            let entries = Entries::of("object");
            assert_eq!(entries.checksum(index, &ABSENT), None);
            let entry = entries.present(index, 0);
            for torn in 1..entry.len() {
                let mut half = ABSENT;
                half[..torn].copy_from_slice(&entry[..torn]);
                // The rest may have been zeros all along; then it is not torn.
                assert!(half == entry || entries.checksum(index, &half).is_none());
            }
        }
    }
}
