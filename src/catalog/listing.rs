//! Listing the active runs of all active experiments, page by page.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::cache::KnownRoot;
use super::{Catalog, CatalogError, RootEntry, RootId};
use crate::tracking::{Page, Run, TrackingError};

/// Experiments searched by one request: their ids travel in its body.
pub(super) const EXPERIMENTS_PER_SEARCH: usize = 100;

/// A listing under way; it holds all state, the server none. Pages may shift on the server while
/// they are read; no run shows twice.
///
/// After an error, the next call goes on where this one failed.
#[derive(Debug)]
pub struct RunListing {
    catalog: Arc<Catalog>,
    /// Experiments not searched yet, and where to ask for more.
    experiments: Vec<String>,
    more_experiments: Next,
    searching: Option<Search>,
    seen_experiments: HashSet<String>,
    /// Grows with what was listed, as the listing does for whoever reads it; gone at its end.
    seen_runs: HashSet<Box<str>>,
}

/// Where the next page begins.
#[derive(Debug)]
pub(super) enum Next {
    First,
    From(String),
    End,
}

#[derive(Debug)]
struct Search {
    experiments: Vec<String>,
    next: Next,
}

impl Next {
    pub fn token(&self) -> Option<&str> {
        match self {
            Self::From(token) => Some(token),
            Self::First | Self::End => None,
        }
    }

    pub fn is_end(&self) -> bool {
        matches!(self, Self::End)
    }
}

impl RunListing {
    pub(super) fn new(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            experiments: Vec::new(),
            more_experiments: Next::First,
            searching: None,
            seen_experiments: HashSet::new(),
            seen_runs: HashSet::new(),
        }
    }

    /// The next runs, at least one; `None` at the end. What is returned is known to the catalog:
    /// looking it up next costs no request.
    ///
    /// # Errors
    /// The server's, after its retries.
    pub async fn next_page(&mut self) -> Result<Option<Vec<RootEntry>>, CatalogError> {
        loop {
            if self.searching.as_ref().is_some_and(|it| !it.next.is_end()) {
                let entries = self.search().await?;
                if !entries.is_empty() {
                    return Ok(Some(entries));
                }
            } else if !self.experiments.is_empty() {
                let count = self.experiments.len().min(EXPERIMENTS_PER_SEARCH);
                self.searching = Some(Search {
                    experiments: self.experiments.drain(..count).collect(),
                    next: Next::First,
                });
            } else if self.more_experiments.is_end() {
                self.seen_runs = HashSet::new();
                return Ok(None);
            } else {
                self.ask_for_experiments().await?;
            }
        }
    }

    async fn search(&mut self) -> Result<Vec<RootEntry>, CatalogError> {
        let Some(search) = &mut self.searching else {
            return Ok(Vec::new());
        };
        let asked = Instant::now();
        let tracking = &self.catalog.tracking;
        let page = tracking
            .runs(&search.experiments, search.next.token())
            .await;
        let page = self.catalog.noted(page)?;
        search.next = self.catalog.following(&search.next, page.next)?;
        Ok(self.take(page.items, asked))
    }

    /// The runs that are new to this listing, as entries; the catalog remembers them.
    fn take(&mut self, runs: Vec<Run>, asked: Instant) -> Vec<RootEntry> {
        let mut entries = Vec::with_capacity(runs.len());
        for run in runs {
            if self.seen_runs.insert(run.run_id.as_str().into()) {
                let (id, known) = (RootId::run(&run.run_id), Arc::new(KnownRoot::of_run(&run)));
                entries.push(known.entry(&id));
                self.catalog.cache.put(&id, Some(known), asked);
            }
        }
        entries
    }

    async fn ask_for_experiments(&mut self) -> Result<(), CatalogError> {
        let token = self.more_experiments.token();
        let page = self.catalog.tracking.experiments(token).await;
        let Page { items, next } = self.catalog.noted(page)?;
        self.more_experiments = self.catalog.following(&self.more_experiments, next)?;
        let seen = &mut self.seen_experiments;
        self.experiments = items.into_iter().map(|it| it.experiment_id).collect();
        self.experiments.retain(|id| seen.insert(id.clone()));
        Ok(())
    }
}

impl Catalog {
    /// What follows a page. A server that answers with the token it was asked with would be asked
    /// for ever.
    pub(super) fn following(
        &self,
        current: &Next,
        token: Option<String>,
    ) -> Result<Next, CatalogError> {
        match token {
            None => Ok(Next::End),
            Some(token) if current.token() == Some(token.as_str()) => {
                Err(CatalogError::Tracking(TrackingError::Protocol {
                    server: self.tracking.name().to_owned(),
                    what: "a listing".to_owned(),
                    detail: "the page after this one is this one".to_owned(),
                }))
            }
            Some(token) => Ok(Next::From(token)),
        }
    }
}
