//! Listing the active runs of all active experiments, page by page.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::{Catalog, CatalogError, RunEntry, entry};

/// Experiments searched by one request: their ids travel in its body.
const EXPERIMENTS_PER_SEARCH: usize = 100;

/// A listing under way. Pages may shift on the server while they are read; no run shows twice.
#[derive(Debug)]
pub struct RunListing {
    catalog: Arc<Catalog>,
    /// Experiments not searched yet, and where to ask for more.
    experiments: Vec<String>,
    more_experiments: More,
    searching: Option<(Vec<String>, Option<String>)>,
    seen: HashSet<String>,
}

#[derive(Debug)]
enum More {
    First,
    From(String),
    None,
}

impl RunListing {
    pub(super) fn new(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            experiments: Vec::new(),
            more_experiments: More::First,
            searching: None,
            seen: HashSet::new(),
        }
    }

    /// The next runs; `None` at the end.
    pub async fn next_page(&mut self) -> Result<Option<Vec<RunEntry>>, CatalogError> {
        loop {
            if let Some((experiments, token)) = &self.searching {
                let asked = Instant::now();
                let page = self
                    .catalog
                    .tracking
                    .runs(experiments, token.as_deref())
                    .await?;
                self.searching = page.next.map(|next| (experiments.clone(), Some(next)));
                let mut entries = Vec::with_capacity(page.items.len());
                for run in page.items {
                    if self.seen.insert(run.run_id.clone()) {
                        entries.push(entry(&run));
                        let run_id = run.run_id.clone();
                        self.catalog.remember(&run_id, Some(Arc::new(run)), asked);
                    }
                }
                return Ok(Some(entries));
            }
            if !self.experiments.is_empty() {
                let count = self.experiments.len().min(EXPERIMENTS_PER_SEARCH);
                let batch = self.experiments.drain(..count).collect();
                self.searching = Some((batch, None));
                continue;
            }
            let token = match &self.more_experiments {
                More::None => return Ok(None),
                More::First => None,
                More::From(token) => Some(token.clone()),
            };
            let page = self.catalog.tracking.experiments(token.as_deref()).await?;
            self.experiments = page.items;
            self.more_experiments = page.next.map_or(More::None, More::From);
        }
    }
}
