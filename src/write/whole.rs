//! A file as the body of one PUT, for stores that take no parts.
//!
//! It is sent when it is closed, and waits in memory and on disk until then; but see
//! [`stream`](super::stream). Its pieces are looked up when they are sent, not before, so that memory is
//! given back between them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::draft::Draft;
use super::error::WriteError;
use super::growing::Piece;
use super::publish::{Action, UNTOUCHED, Versions};
use super::send::Outgoing;
use super::target::Target;
use crate::budget::Reservation;
use crate::store::checksum::crc32c_update;
use crate::store::{Condition, LongBody, StoreError, StoreResult, Stored};

/// Why a body came to an end before its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// Somebody wrote to the file meanwhile.
    Changed,
    Error(WriteError),
}

/// All of a file, as it was at one moment.
#[derive(Debug)]
struct WholeFile {
    draft: Arc<Draft>,
    size: u64,
    pieces: Arc<[Piece]>,
    /// Some of it comes from elsewhere than the chunks that the journal knows of.
    mixed: bool,
    broken: Arc<Mutex<Option<Broken>>>,
}

impl Draft {
    /// One PUT of a file that is larger than a part; `None` when the file is another by now.
    pub(super) async fn put_whole(
        self: &Arc<Self>,
        target: &Target,
        size: u64,
        condition: Condition,
    ) -> Result<Option<(Stored, Versions)>, WriteError> {
        let followed = self.end_following(target, size, &condition).await?;
        if followed.is_some() {
            return Ok(followed);
        }
        let _permit = (self.recorded_unless_soon(Instant::now(), self.permit())).await?;
        let Some(pieces) = self.pieces(size).await? else {
            return Ok(None);
        };
        let versions = pieces
            .iter()
            .map(|piece| (piece.index, piece.version.unwrap_or(UNTOUCHED)))
            .collect();
        if self.has_later(&versions) {
            return Ok(None);
        }
        // What it lies over is spent with the last byte: what it will be is written down before.
        let mixed = pieces.iter().any(|piece| piece.version.is_none());
        if mixed {
            self.record_close().await;
        }
        let broken = Arc::new(Mutex::new(None));
        let body = Arc::new(WholeFile {
            draft: Arc::clone(self),
            size,
            pieces: pieces.into(),
            mixed,
            broken: Arc::clone(&broken),
        });
        // Side by side: of one request the store has all or nothing.
        let put = target.store.put_long(&target.key, body, condition);
        let (outcome, ()) = tokio::join!(put, self.record_close());
        match (outcome, broken.lock().take()) {
            (Ok(stored), _) => Ok(Some((stored, versions))),
            (Err(_), Some(Broken::Changed)) => Ok(None),
            (Err(_), Some(Broken::Error(error))) => Err(error),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// What the file consists of, once all that is here of each chunk is complete.
    pub(super) async fn pieces(
        self: &Arc<Self>,
        size: u64,
    ) -> Result<Option<Vec<Piece>>, WriteError> {
        let chunks = self.state.lock().geometry.chunks(size);
        let mut pieces = Vec::new();
        for index in chunks {
            let version = loop {
                let (action, range) = {
                    let state = self.state.lock();
                    let bounds = state.geometry.range(index);
                    let range = bounds.start..bounds.end.min(size);
                    (state.action(index, size), range)
                };
                match action {
                    Action::Copy(_, version) if version != UNTOUCHED => break Some(version),
                    Action::Copy(..) | Action::Load => break None,
                    Action::Send | Action::Have(..) | Action::Wait => {
                        let state = self.state.lock();
                        break state.chunks.get(&index).map(|chunk| chunk.version);
                    }
                    Action::Fill(range) => self.fill(range).await?,
                    Action::Shrunk => return Ok(None),
                    Action::GivenUp => return Err(self.given_up(range)),
                }
            };
            let bounds = self.state.lock().geometry.range(index);
            pieces.push(Piece {
                index,
                range: bounds.start..bounds.end.min(size),
                version,
            });
        }
        Ok(Some(pieces))
    }

    /// The bytes of a piece, if it is what it was.
    pub(super) async fn piece(
        self: &Arc<Self>,
        piece: &Piece,
    ) -> Result<(Bytes, Option<Reservation>), Broken> {
        let Some(version) = piece.version else {
            let loaded = self.load(piece.range.clone()).await;
            let (payload, reservation) = loaded.map_err(Broken::Error)?;
            return Ok((payload.bytes, reservation));
        };
        let length = piece.range.end - piece.range.start;
        let outgoing = Outgoing::of(&self.state.lock(), piece.index, length);
        let outgoing = outgoing.filter(|it| it.version == version);
        let payload = outgoing.ok_or(Broken::Changed)?.payload(self).await;
        let (payload, reservation) = payload.map_err(Broken::Error)?;
        Ok((payload.bytes, reservation))
    }

    /// Whether all that is here is what it was when the first piece was sent.
    pub(super) fn is_as_it_was(&self, pieces: &[Piece]) -> bool {
        let state = self.state.lock();
        pieces.iter().all(|piece| {
            let chunk = state.chunks.get(&piece.index);
            chunk.map(|chunk| chunk.version) == piece.version
        })
    }
}

impl LongBody for WholeFile {
    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn frames(&self) -> BoxStream<'static, StoreResult<Bytes>> {
        let (draft, pieces) = (Arc::clone(&self.draft), Arc::clone(&self.pieces));
        let broken = Arc::clone(&self.broken);
        *broken.lock() = None;
        let (mixed, size) = (self.mixed, self.size);
        // The memory of a piece is given back when the next one is asked for.
        let first: (usize, u32, Option<Reservation>) = (0, 0, None);
        Box::pin(stream::try_unfold(
            first,
            move |(at, crc32c, reservation)| {
                let (draft, pieces) = (Arc::clone(&draft), Arc::clone(&pieces));
                let broken = Arc::clone(&broken);
                async move {
                    drop(reservation);
                    let Some(piece) = pieces.get(at) else {
                        return Ok(None);
                    };
                    let mut got = draft.piece(piece).await;
                    // With the last byte it counts.
                    if at + 1 == pieces.len() && got.is_ok() && !draft.is_as_it_was(&pieces) {
                        got = Err(Broken::Changed);
                    }
                    match got {
                        Ok((bytes, reservation)) => {
                            let crc32c = match mixed {
                                true => crc32c_update(crc32c, &bytes),
                                false => 0,
                            };
                            if mixed && at + 1 == pieces.len() {
                                draft.note_completing(size, None, Some(crc32c));
                            }
                            Ok(Some((bytes, (at + 1, crc32c, reservation))))
                        }
                        Err(reason) => {
                            let error = StoreError::Other {
                                object: draft.target().object(),
                                detail: match &reason {
                                    Broken::Changed => "written to while it was sent".to_owned(),
                                    Broken::Error(error) => error.to_string(),
                                },
                            };
                            *broken.lock() = Some(reason);
                            Err(error)
                        }
                    }
                }
            },
        ))
    }
}
