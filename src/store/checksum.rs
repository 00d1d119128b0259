//! CRC32C (Castagnoli), the checksum that travels with every part.

use crc_fast::{CrcAlgorithm, Digest};

const XOR_OUT: u32 = 0xffff_ffff;

/// CRC32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C of what `crc` was computed over, followed by `more`.
pub fn crc32c_update(crc: u32, more: &[u8]) -> u32 {
    let state = u64::from(crc ^ XOR_OUT);
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, state);
    digest.update(more);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_of_pieces_is_that_of_the_whole() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_update(crc32c(b"1234"), b"56789"), 0xe306_9283);
        assert_eq!(crc32c_update(crc32c(b""), b"123456789"), 0xe306_9283);
    }
}
