//! CRC32C (Castagnoli), the checksum that travels with every part; and S3's ETags.

use crc_fast::{CrcAlgorithm, Digest};
use md5::{Digest as _, Md5};

use super::PartReceipt;

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

/// The ETag, without quotes, that S3 gives an object made of these parts: the MD5 of theirs, and how
/// many there are. `None` where the parts' ETags are no MD5s.
pub fn composite(parts: &[PartReceipt]) -> Option<String> {
    let mut digest = Md5::new();
    for part in parts {
        digest.update(md5_of(part.etag.as_str())?);
    }
    let digest: [u8; 16] = digest.finalize().into();
    let hexadecimal = format!("{:032x}", u128::from_be_bytes(digest));
    Some(format!("{hexadecimal}-{}", parts.len()))
}

fn md5_of(etag: &str) -> Option<[u8; 16]> {
    let digits = etag.trim_matches('"');
    let plain = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let value = plain.then(|| u128::from_str_radix(digits, 16).ok())??;
    Some(value.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ETag;

    #[test]
    fn a_composite_etag_is_the_md5_of_the_parts_etags() {
        let part = |etag: &str| PartReceipt {
            number: 1,
            size: 1,
            etag: ETag::new(etag),
            crc32c: None,
        };
        // As S3 tells it of two parts of which each is the letter "a".
        let a = "\"0cc175b9c0f1b6a831c399e269772661\"";
        assert_eq!(
            composite(&[part(a), part(a)]).as_deref(),
            Some("7b3c799ee8b11a11c798c8b41bed8502-2")
        );
        assert_eq!(composite(&[part("\"opaque\"")]), None);
    }

    #[test]
    fn a_checksum_of_pieces_is_that_of_the_whole() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_update(crc32c(b"1234"), b"56789"), 0xe306_9283);
        assert_eq!(crc32c_update(crc32c(b""), b"123456789"), 0xe306_9283);
    }
}
