//! A listing of one directory of a store, a page at a time.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::Vfs;
use super::directory::{Name, Present};
use super::error::{VfsError, VfsResult};
use super::lookup::Place;
use super::names::entries;
use super::tree::DirectoryNode;
use crate::store::{ListPage, PageStart};

/// Names that are stale are dropped no more often than this.
const OFTEN: Duration = Duration::from_secs(1);

/// A listing under way. While it lives, its directory drops nothing.
#[derive(Debug)]
pub(super) struct Listing {
    place: Place,
    pub begun: Instant,
    ttl: Duration,
    runtime: Runtime,
}

/// Names of one page that are there.
#[derive(Debug)]
pub(super) struct Page {
    pub present: Vec<Present>,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
    /// The next page, where it was asked for already.
    following: Option<Asked>,
}

/// A page that is on its way.
type Asked = JoinHandle<VfsResult<Page>>;

/// The pages of a listing, in order. One page is asked for ahead of the reader, so that the store
/// works while a page is handed out; more would be kept for readers that stop at the first names.
#[derive(Debug)]
pub(super) struct Pages {
    listing: Arc<Listing>,
    token: Option<String>,
    ahead: Option<Asked>,
    /// The reader waits for the page that is on its way.
    awaited: Arc<AtomicBool>,
    /// A name may come twice: a common prefix on two pages, or an object and a prefix.
    seen: HashSet<Name>,
    pub finished: bool,
}

impl Vfs {
    pub(super) fn begin_listing(&self, place: &Place) -> Listing {
        place.directory.names.lock().begin_listing();
        Listing {
            place: place.clone(),
            begun: Instant::now(),
            ttl: self.options.metadata_ttl,
            runtime: self.runtime.clone(),
        }
    }
}

impl Listing {
    /// Asks for a page; its directory knows it then.
    pub async fn page(&self, start: PageStart<'_>) -> VfsResult<Page> {
        let asked = Instant::now();
        let page = self.ask(start).await?;
        Ok(self.note(page, asked))
    }

    async fn ask(&self, start: PageStart<'_>) -> VfsResult<ListPage> {
        let store = &self.place.location.store;
        let prefix = self.place.prefix();
        Ok(store.list(&prefix, true, start, None).await?)
    }

    fn note(&self, page: ListPage, asked: Instant) -> Page {
        let entries = entries(&self.place.prefix(), page.objects, &page.prefixes);
        let present = self.place.directory.names.lock().note_page(entries, asked);
        Page {
            present,
            next: page.next,
            following: None,
        }
    }
}

/// Asks for a page of a listing in a task of its own. If it is `awaited` when it comes, the next one
/// is asked for before anything else is done with it.
fn ask(listing: Arc<Listing>, token: Option<String>, awaited: Arc<AtomicBool>) -> Asked {
    let runtime = listing.runtime.clone();
    runtime.spawn(async move {
        let asked = Instant::now();
        let start = token.as_deref().map_or(PageStart::First, PageStart::Token);
        let page = listing.ask(start).await?;
        let mut following = None;
        if page.next.is_some() && awaited.swap(false, Ordering::Relaxed) {
            let next = page.next.clone();
            following = Some(ask(Arc::clone(&listing), next, Arc::clone(&awaited)));
        }
        let page = listing.note(page, asked);
        Ok(Page { following, ..page })
    })
}

impl Drop for Listing {
    fn drop(&mut self) {
        let directory = &self.place.directory;
        if directory.names.lock().end_listing() {
            let directory = Arc::downgrade(directory);
            self.runtime.spawn(drop_stale(directory, self.ttl));
        }
    }
}

/// What a large listing took is given back when it is no longer believed.
async fn drop_stale(directory: Weak<DirectoryNode>, ttl: Duration) {
    loop {
        sleep(ttl.max(OFTEN)).await;
        let Some(directory) = directory.upgrade() else {
            return;
        };
        if !directory.names.lock().drop_stale_again(ttl) {
            return;
        }
    }
}

impl Pages {
    pub fn of(listing: Listing) -> Self {
        Self {
            listing: Arc::new(listing),
            token: None,
            ahead: None,
            awaited: Arc::default(),
            seen: HashSet::new(),
            finished: false,
        }
    }

    /// The next names, perhaps none. After an error the next call asks for the same page again.
    pub async fn next(&mut self) -> VfsResult<Vec<Present>> {
        self.ask();
        let Some(asked) = &mut self.ahead else {
            return Ok(Vec::new());
        };
        self.awaited.store(true, Ordering::Relaxed);
        let answer = asked.await;
        self.awaited.store(false, Ordering::Relaxed);
        self.ahead = None;
        // Only a panic, or the end of the program, ends a task without an answer.
        let page = answer.unwrap_or_else(|_| Err(VfsError::plain(libc::EIO)))?;
        let is_first = self.token.is_none();
        self.token = page.next;
        self.ahead = page.following;
        let mut present = page.present;
        if self.token.is_some() {
            self.ask();
            if is_first {
                let directory = &self.listing.place.directory;
                directory.names.lock().note_large(self.listing.begun);
            }
        }
        present.retain(|it| self.seen.insert(Arc::clone(&it.name)));
        if self.token.is_none() {
            self.finished = true;
        }
        Ok(present)
    }

    /// Asks for the next page, unless that was done.
    fn ask(&mut self) {
        if self.ahead.is_none() && !self.finished {
            let (listing, awaited) = (Arc::clone(&self.listing), Arc::clone(&self.awaited));
            self.ahead = Some(ask(listing, self.token.clone(), awaited));
        }
    }

    /// Notes that there is nothing else, and returns what came to be there while pages were asked for
    /// that do not show it.
    pub fn end(&mut self) -> Vec<Present> {
        let begun = self.listing.begun;
        let mut names = self.listing.place.directory.names.lock();
        names.note_complete(begun);
        if names.len() == self.seen.len() {
            return Vec::new();
        }
        let others = names.others(begun, |name| self.seen.contains(name));
        drop(names);
        self.seen
            .extend(others.iter().map(|it| Arc::clone(&it.name)));
        others
    }

    /// Whether a name was among those given out.
    pub fn has(&self, name: &str) -> bool {
        self.seen.contains(name)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Some(asked) = &self.ahead {
            asked.abort();
        }
    }
}
