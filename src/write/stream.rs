//! A file that is sent while it is written, to a store that takes no parts but a body whose end is not
//! known yet.
//!
//! The body follows the writer from one full chunk to the next, and closing the file tells it where it
//! ends. Where something changes that has gone already it is broken off, so that the store has nothing
//! of it, and the file is one PUT when it is closed, as all others are there.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use tokio::time::Instant;

use super::draft::Draft;
use super::error::WriteError;
use super::growing::{Following, Growing, Piece, Stream};
use super::publish::Versions;
use super::state::{State, Step};
use super::target::Target;
use crate::budget::Reservation;
use crate::store::{Condition, LongBody, StoreError, StoreResult, Stored};

/// Full chunks of which a file must have so many: one of a chunk or little more is soon sent when it is
/// closed.
const WORTH_FOLLOWING: usize = 2;
/// Bytes of the head of a member of a zip container, up to its name.
const ZIP_HEAD: u64 = 30;

/// A file that grows, as the body of a PUT.
#[derive(Clone, Debug)]
struct Body {
    growing: Arc<Growing>,
    /// A body that is on its way does not keep the file.
    draft: Weak<Draft>,
}

impl Draft {
    /// Another chunk is full: sends it, if the file is one to send while it is written.
    pub(super) fn follow(self: &Arc<Self>, state: &mut State) {
        match &state.following {
            Following::Under(stream) => stream.growing.woken.notify_one(),
            Following::Not if !state.can_be_followed() => {}
            Following::Not if !state.target.store.capabilities().streams => {
                self.follow_once_it_is_known(state);
            }
            Following::Not => {
                let permits = self.writer.try_permit_to_follow();
                let Some(permits) = permits else {
                    return;
                };
                let target = state.target.clone();
                let growing = Arc::<Growing>::default();
                let body = Arc::new(Body {
                    growing: Arc::clone(&growing),
                    draft: Arc::downgrade(self),
                });
                let to = target.clone();
                let task = self.writer.runtime.spawn(async move {
                    let _permits = permits;
                    let put = to.store.put_long(&to.key, body.clone(), Condition::Always);
                    let outcome = put.await;
                    body.growing.break_off();
                    outcome
                });
                tracing::debug!(object = target.object(), "sent while it is written");
                state.following = Following::Under(Stream {
                    target,
                    growing,
                    task,
                });
            }
            Following::Ended => {}
        }
    }

    /// Asks whether the store takes the file while it is written, and sends it so if it does.
    fn follow_once_it_is_known(self: &Arc<Self>, state: &State) {
        let store = Arc::clone(&state.target.store);
        let draft = Arc::downgrade(self);
        self.writer.runtime.spawn(async move {
            store.learn_whether_it_streams().await;
            let capabilities = store.capabilities();
            let takes_it = capabilities.streams && !capabilities.multipart;
            if let Some(draft) = draft.upgrade().filter(|_| takes_it) {
                draft.follow(&mut draft.state.lock());
            }
        });
    }

    /// Ends the body that has followed the file, if there is one and it is of the file as it is now:
    /// `None` where the file has to be sent.
    pub(super) async fn end_following(
        self: &Arc<Self>,
        target: &Target,
        size: u64,
        condition: &Condition,
    ) -> Result<Option<(Stored, Versions)>, WriteError> {
        let following = {
            let mut state = self.state.lock();
            std::mem::replace(&mut state.following, Following::Ended)
        };
        let Following::Under(mut stream) = following else {
            return Ok(None);
        };
        if stream.target.key != target.key || *condition != Condition::Always {
            return Ok(None);
        }
        let Some(pieces) = self.pieces(size).await? else {
            return Ok(None);
        };
        let versions: Option<Versions> = pieces
            .iter()
            .map(|piece| Some((piece.index, piece.version?)))
            .collect();
        let Some(versions) = versions.filter(|versions| !self.has_later(versions)) else {
            return Ok(None);
        };
        stream.growing.end(pieces.into());
        let task = &mut stream.task;
        let sent = async move { task.await.map_err(|error| error.to_string()) };
        let outcome = self.recorded_unless_soon(Instant::now(), sent).await;
        let error = match outcome {
            Ok(Ok(stored)) if stored.size == size => return Ok(Some((stored, versions))),
            Ok(Ok(stored)) => format!("{} bytes stored of {size}", stored.size),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error,
        };
        tracing::debug!(object = target.object(), error, "to be sent again, whole");
        Ok(None)
    }
}

impl Draft {
    /// Piece `at`, if its chunk is full.
    fn full_piece(&self, at: usize) -> Option<Piece> {
        let state = self.state.lock();
        let index = u32::try_from(at).ok()?;
        let range = state.geometry.range(index);
        let chunk = state.chunks.get(&index)?;
        let is_full = chunk.local == (0..range.end - range.start);
        let version = Some(chunk.version);
        is_full.then_some(Piece {
            index,
            range,
            version,
        })
    }
}

impl State {
    /// Whether it is a new file that grows at its end.
    fn can_be_followed(&self) -> bool {
        self.base_limit == 0
            && self.upload.is_none()
            && self.only.is_none()
            && self.sequential
            && !self.target.looks_temporary()
            && self.condition() == Condition::Always
            && self.whole_chunks() >= WORTH_FOLLOWING
            && self.is_full_before(self.geometry.range(0).end)
            && !self.begins_with_unfinished_member()
    }

    /// Whether it is a zip container whose writer comes back to the head of its first member: neither
    /// its checksum is known yet, nor is there a flag that it will stand behind the member. So writes
    /// Python's zipfile, and numpy with it.
    fn begins_with_unfinished_member(&self) -> bool {
        match self.read_step(0..ZIP_HEAD) {
            Step::Bytes(head) if head.len() as u64 == ZIP_HEAD => {
                let told_behind = head[6] & 8 != 0;
                head.starts_with(b"PK\x03\x04") && !told_behind && head[14..18] == [0; 4]
            }
            _ => false,
        }
    }
}

impl Body {
    /// Piece `at`, once it is there; `None` at the end.
    async fn next(&self, at: usize) -> StoreResult<Option<(Bytes, Option<Reservation>)>> {
        loop {
            let draft = self.draft.upgrade();
            let Some(draft) = draft.filter(|_| !self.growing.is_broken_off()) else {
                return Err(changed(String::new()));
            };
            let object = draft.target().object();
            let piece = match self.growing.whole() {
                // With its end it counts.
                Some(pieces) => {
                    if !self.growing.is_beginning_of(&pieces) || !draft.is_as_it_was(&pieces) {
                        return Err(changed(object));
                    }
                    match pieces.get(at) {
                        None => return Ok(None),
                        piece => piece.cloned(),
                    }
                }
                None if !draft.is_as_it_was(&self.growing.gone()) => return Err(changed(object)),
                None => draft.full_piece(at),
            };
            let Some(piece) = piece else {
                drop(draft);
                self.growing.woken.notified().await;
                continue;
            };
            // What its disk says is told when the file is sent as a whole.
            let got = draft.piece(&piece).await.map_err(|_| changed(object))?;
            self.growing.note_gone(piece);
            return Ok(Some(got));
        }
    }
}

fn changed(object: String) -> StoreError {
    StoreError::Changed { object }
}

impl LongBody for Body {
    fn size(&self) -> Option<u64> {
        None
    }

    fn frames(&self) -> BoxStream<'static, StoreResult<Bytes>> {
        let body = self.clone();
        // The memory of a piece is given back when the next one is asked for.
        let first: (usize, Option<Reservation>) = (0, None);
        Box::pin(stream::try_unfold(first, move |(at, reservation)| {
            let body = body.clone();
            async move {
                drop(reservation);
                let next = body.next(at).await?;
                Ok(next.map(|(bytes, reservation)| (bytes, (at + 1, reservation))))
            }
        }))
    }
}
