//! Whether bytes that come are those of which only sizes and checksums are known.

use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;

use bytes::Bytes;

use super::checksum::crc32c_update;
use super::{PartReceipt, StoreResult};

/// A part of an object, or all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Bytes.
    pub size: u64,
    pub crc32c: u32,
}

/// Those that the receipts tell of; `None` where one tells no checksum.
pub(super) fn of_parts(parts: &[PartReceipt]) -> Option<Vec<Piece>> {
    let pieces = parts.iter().map(|part| {
        Some(Piece {
            size: part.size,
            crc32c: part.crc32c?,
        })
    });
    pieces.collect()
}

/// Whether `frames` are these pieces, in order, and nothing else.
///
/// # Errors
/// Those of `frames`.
pub(super) async fn are_made_of(
    mut frames: BoxStream<'static, StoreResult<Bytes>>,
    pieces: &[Piece],
) -> StoreResult<bool> {
    let mut pieces = pieces.iter().filter(|piece| piece.size > 0);
    let mut piece = pieces.next();
    let (mut filled, mut crc32c) = (0, 0);
    while let Some(mut frame) = frames.try_next().await? {
        while !frame.is_empty() {
            let Some(wanted) = piece else {
                return Ok(false);
            };
            let taken = (wanted.size - filled).min(frame.len() as u64);
            crc32c = crc32c_update(crc32c, &frame.split_to(taken as usize));
            filled += taken;
            if filled < wanted.size {
                continue;
            }
            if crc32c != wanted.crc32c {
                return Ok(false);
            }
            piece = pieces.next();
            (filled, crc32c) = (0, 0);
        }
    }
    Ok(piece.is_none())
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, stream};

    use super::*;
    use crate::store::checksum::crc32c;

    async fn compared(frames: &[&'static [u8]], pieces: &[&[u8]]) -> bool {
        let frames: Vec<_> = frames.iter().map(|it| Ok(Bytes::from_static(it))).collect();
        let pieces: Vec<Piece> = pieces
            .iter()
            .map(|piece| Piece {
                size: piece.len() as u64,
                crc32c: crc32c(piece),
            })
            .collect();
        let same = are_made_of(stream::iter(frames).boxed(), &pieces).await;
        same.unwrap()
    }

    #[tokio::test]
    async fn pieces_are_told_however_the_bytes_come() {
        assert!(compared(&[], &[]).await);
        assert!(compared(&[b"abcdef"], &[b"ab", b"", b"cdef"]).await);
        assert!(compared(&[b"a", b"bc", b"", b"def"], &[b"ab", b"cdef"]).await);
        assert!(!compared(&[b"abcdef"], &[b"ab", b"cdeX"]).await);
        assert!(!compared(&[b"abcde"], &[b"ab", b"cdef"]).await);
        assert!(!compared(&[b"abcdefg"], &[b"ab", b"cdef"]).await);
    }
}
