//! Which release of MLflow a server runs, by which route it takes uploads, and what follows from that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reqwest::Client;
use reqwest::header::CONTENT_LENGTH;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::access::{Access, Program};
use crate::store::StoreError;

/// Major and minor number.
type Version = (u32, u32);

/// The first that is known to.
const DELETES_EXACTLY: Version = (3, 17);
/// The first whose own route for uploads, under uvicorn, is handed a body as it comes. The route of those
/// before it, and of plugins that go on having it, takes a body without a length for an empty one.
const STREAMS: Version = (3, 15);
/// A name that both routes refuse before they look at anything else.
const REFUSED_NAME: &str = "a#b";
/// How the route that streams begins such a refusal: the other one has a space there.
const REFUSAL: &[u8] = b"{\"error_code\":\"";
/// For so long no body is begun before its end is known when one was not taken.
const REFUSED_FOR: Duration = Duration::from_secs(300);
/// So long what was learnt counts: another release may take the place of the one that answered.
const KNOWN_FOR: Duration = Duration::from_secs(120);

/// What one server runs.
#[derive(Debug)]
pub(super) struct Release {
    access: Access,
    version: OnceCell<Option<Version>>,
    /// Whether it takes bodies as they come, and when it was asked.
    streams: Mutex<Option<(Instant, bool)>>,
    /// Held by who asks that.
    asking: tokio::sync::Mutex<()>,
    /// It took one, and made something else of it.
    spoils: AtomicBool,
    /// A body without a length was not taken.
    refused: Mutex<Option<Instant>>,
}

impl Release {
    pub fn new(access: Access) -> Self {
        Self {
            access,
            version: OnceCell::new(),
            streams: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
            spoils: AtomicBool::new(false),
            refused: Mutex::default(),
        }
    }

    async fn version(&self) -> Option<Version> {
        let ask = async || {
            let url = self.access.address.version().ok_or(())?;
            let build = |client: &Client| client.get(&url);
            let answer = self.access.send(&url, self.access.patience, build).await;
            let text = timeout(self.access.patience, answer.map_err(drop)?.text()).await;
            let text = text.map_err(drop)?.map_err(drop)?;
            Ok::<_, ()>(parsed(&text))
        };
        self.version.get_or_try_init(ask).await.ok().copied()?
    }

    /// Whether the server removes just what it is told to. Servers before that version may remove
    /// all that begins so.
    pub async fn deletes_exactly(&self) -> bool {
        self.version()
            .await
            .is_some_and(|version| version >= DELETES_EXACTLY)
    }

    /// Asks what [`Self::streams`] tells, unless it is known.
    pub async fn learn(&self) {
        let _asking = self.asking.lock().await;
        let before = *self.streams.lock();
        if before.is_some_and(|(asked, _)| asked.elapsed() < KNOWN_FOR) || self.has_refused() {
            return;
        }
        let streams = self.takes_bodies_as_they_come().await;
        *self.streams.lock() = Some((Instant::now(), streams));
        if before.is_none_or(|(_, before)| before != streams) {
            let server = &self.access.address.base;
            let when = if streams {
                "while they are written"
            } else {
                "when they are closed"
            };
            tracing::info!(server, "it takes files {when}");
        }
    }

    async fn takes_bodies_as_they_come(&self) -> bool {
        if self.version().await.is_none_or(|version| version < STREAMS) {
            return false;
        }
        // Another program's name is a proxy's, which may keep a body until it has all of it, and would
        // pass on what broke off.
        if self.access.program() != Some(Program::Uvicorn) {
            return false;
        }
        let url = self.access.address.object(REFUSED_NAME);
        let build = |client: &Client| client.put(&url).header(CONTENT_LENGTH, 0);
        let answer = self.access.attempt(&url, self.access.patience, build).await;
        answer.is_err_and(|failed| failed.is(400) && failed.body.starts_with(REFUSAL))
    }

    /// Whether the server takes a body whose end is not known yet, and keeps nothing of one that breaks
    /// off; false as long as it has not been asked.
    pub fn streams(&self) -> bool {
        let known = *self.streams.lock();
        known.is_some_and(|(asked, streams)| streams && asked.elapsed() < KNOWN_FOR)
            && !self.has_refused()
    }

    /// Whether it did not take such a body, although it said it would, and is left alone with that.
    fn has_refused(&self) -> bool {
        let refused = *self.refused.lock();
        refused.is_some_and(|since| since.elapsed() < REFUSED_FOR)
            || self.spoils.load(Ordering::Relaxed)
    }

    /// Such a body came to nothing for this reason.
    pub fn note_failed_stream(&self, error: &StoreError) {
        match error {
            StoreError::Corrupt { .. } => self.spoils.store(true, Ordering::Relaxed),
            StoreError::Unsupported { .. }
            | StoreError::InvalidName { .. }
            | StoreError::Other { .. } => *self.refused.lock() = Some(Instant::now()),
            // Not for what it was.
            _ => {}
        }
    }
}

fn parsed(version: &str) -> Option<Version> {
    let mut numbers = version
        .trim()
        .trim_matches('"')
        .split('.')
        .map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::{DELETES_EXACTLY, parsed};

    #[test]
    fn versions_are_told_by_their_numbers() {
        assert_eq!(parsed("3.17.2\n"), Some((3, 17)));
        assert_eq!(parsed("\"4.0.0rc1\""), Some((4, 0)));
        assert!(parsed("3.9.0").unwrap() < DELETES_EXACTLY);
        assert_eq!(parsed("<html>"), None);
    }
}
