//! Which release of MLflow a server runs, and what follows from that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reqwest::Client;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::access::{Access, Program};

/// Major and minor number.
type Version = (u32, u32);

/// The first that is known to.
const DELETES_EXACTLY: Version = (3, 17);
/// The first whose route for uploads is handed a body as it comes, under uvicorn. Those before it take
/// one without a length for an empty one.
const STREAMS: Version = (3, 15);
/// For so long no body is begun before its end is known when one was not taken.
const REFUSED_FOR: Duration = Duration::from_secs(300);

/// What one server runs.
#[derive(Debug)]
pub(super) struct Release {
    access: Access,
    version: OnceCell<Option<Version>>,
    streams: AtomicBool,
    /// A body without a length was not taken.
    refused: Mutex<Option<Instant>>,
}

impl Release {
    pub fn new(access: Access) -> Self {
        Self {
            access,
            version: OnceCell::new(),
            streams: AtomicBool::new(false),
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

    /// Asks what [`Self::streams`] tells.
    pub async fn learn(&self) {
        let version = self.version().await;
        let streams = version.is_some_and(|version| version >= STREAMS);
        // Another program's name is a proxy's, which may keep a body until it has all of it, and would
        // pass on what broke off.
        let direct = self.access.program() == Some(Program::Uvicorn);
        let streams = streams && direct;
        if streams && !self.streams.swap(true, Ordering::Relaxed) {
            let server = &self.access.address.base;
            tracing::info!(server, "it takes files while they are written");
        }
    }

    /// Whether the server takes a body whose end is not known yet, and keeps nothing of one that breaks
    /// off; false as long as it has not been asked.
    pub fn streams(&self) -> bool {
        let refused = *self.refused.lock();
        let refused = refused.is_some_and(|refused| refused.elapsed() < REFUSED_FOR);
        self.streams.load(Ordering::Relaxed) && !refused
    }

    /// Such a body was not taken after all.
    pub fn note_failed_stream(&self) {
        *self.refused.lock() = Some(Instant::now());
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
