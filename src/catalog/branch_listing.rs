//! Listing a directory of names, page by page.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::branch::{Branch, Item, alias_link, experiment, registered, run_link, version_item};
use super::listing::{EXPERIMENTS_PER_SEARCH, Next};
use super::{Catalog, CatalogError, naming};
use crate::tracking::{LoggedModel, Page, Run};

/// Of so many versions it is looked at where each leads; of more only when they are looked up.
const FEW_VERSIONS: usize = 50;

/// A listing under way; it holds all state, the server none. Pages may shift on the server while they
/// are read; no name shows twice. After an error, the next call goes on where this one failed.
#[derive(Debug)]
pub struct BranchListing {
    catalog: Arc<Catalog>,
    branch: Branch,
    next: Next,
    /// What was listed last needs no further look.
    is_certain: bool,
    /// Of models: the registered ones come first, then the logged ones, an experiment's after another's.
    logged: Option<Logged>,
    /// Grows with what was listed, as the listing does for whoever reads it.
    seen: HashSet<Arc<str>>,
    /// Runs that were listed, by their ids, and names that one has already.
    seen_runs: HashSet<Box<str>>,
    run_names: HashSet<Arc<str>>,
}

/// Logged models that are listed.
#[derive(Debug)]
struct Logged {
    /// Those that were not searched yet, and where to ask for more.
    experiments: Vec<String>,
    more: Next,
    searching: Vec<String>,
    next: Next,
}

impl Catalog {
    /// Begins a listing of a branch; asks for nothing yet.
    pub fn list(self: &Arc<Self>, branch: &Branch) -> BranchListing {
        BranchListing {
            catalog: Arc::clone(self),
            branch: branch.clone(),
            next: Next::First,
            is_certain: true,
            logged: None,
            seen: HashSet::new(),
            seen_runs: HashSet::new(),
            run_names: HashSet::new(),
        }
    }
}

impl BranchListing {
    /// The next names, at least one, in no order; `None` at the end. Looking one of them up next costs no
    /// request.
    ///
    /// # Errors
    /// The server's, after its retries.
    pub async fn next_page(&mut self) -> Result<Option<Vec<(Arc<str>, Item)>>, CatalogError> {
        loop {
            let asked = Instant::now();
            let items = if let Some(logged) = &mut self.logged {
                match logged.advance(&self.catalog).await? {
                    Some(models) => {
                        let models = models.iter();
                        models
                            .map(|model| {
                                let name = Arc::from(model.model_id.as_str());
                                (name, self.catalog.model(model, asked))
                            })
                            .collect()
                    }
                    None => return Ok(None),
                }
            } else if !self.next.is_end() {
                self.advance().await?
            } else if self.branch == Branch::Models {
                self.logged = Some(Logged {
                    experiments: Vec::new(),
                    more: Next::First,
                    searching: Vec::new(),
                    next: Next::End,
                });
                continue;
            } else {
                return Ok(None);
            };
            let mut fresh = Vec::with_capacity(items.len());
            for (name, item) in items {
                if self.seen.insert(Arc::clone(&name)) {
                    if self.is_certain {
                        let answer = Some(item.clone());
                        self.catalog
                            .branches
                            .put(&self.branch, &name, answer, asked);
                    }
                    fresh.push((name, item));
                }
            }
            if !fresh.is_empty() {
                return Ok(Some(fresh));
            }
        }
    }

    /// The next page of what is no logged model.
    async fn advance(&mut self) -> Result<Vec<(Arc<str>, Item)>, CatalogError> {
        let catalog = Arc::clone(&self.catalog);
        let (tracking, token) = (&catalog.tracking, self.next.token());
        match self.branch.clone() {
            Branch::Experiments => {
                let page = catalog.noted(tracking.experiments(token).await)?;
                let experiments = self.taken(page)?;
                let named = experiments.iter().map(|it| {
                    let name = naming::fitting(&it.name, &it.experiment_id);
                    (name.into(), experiment(it))
                });
                Ok(named.collect())
            }
            Branch::Experiment(id) => {
                let experiments = [id.to_string()];
                let page = catalog.noted(tracking.runs(&experiments, token).await)?;
                let runs = self.taken(page)?;
                Ok(runs.iter().filter_map(|run| self.name_run(run)).collect())
            }
            Branch::Models => {
                let page = catalog.noted(tracking.registered_models(token).await)?;
                let models = self.taken(page)?;
                let mut named = Vec::with_capacity(models.len());
                for model in &models {
                    // Names of the registry are no longer than those of paths, but with their escapes.
                    let name = naming::encode(&model.name);
                    for (alias, version) in &model.aliases {
                        let link = alias_link(&model.name, version, model.modified);
                        let alias = naming::encode(&format!("{}@{alias}", model.name));
                        named.push((alias.into(), link));
                    }
                    named.push((name.into(), registered(model)));
                }
                named.retain(|(name, _): &(Arc<str>, Item)| name.len() <= naming::LONGEST);
                Ok(named)
            }
            Branch::Versions(model) => {
                let page = catalog.noted(tracking.model_versions(&model, token).await)?;
                let versions = self.taken(page)?;
                let looks = versions.len() <= FEW_VERSIONS;
                self.is_certain = looks;
                let mut named = Vec::with_capacity(versions.len());
                for version in &versions {
                    let name: Arc<str> = version.version.as_str().into();
                    let mut item = version_item(&model, version);
                    if looks {
                        item = catalog.leading_somewhere(item, &model, &name).await;
                    }
                    named.push((name, item));
                }
                Ok(named)
            }
        }
    }

    fn taken<T>(&mut self, page: Page<T>) -> Result<Vec<T>, CatalogError> {
        self.next = self.catalog.following(&self.next, page.next)?;
        Ok(page.items)
    }

    /// The first of a name has it; others have the beginning of their ids behind it.
    fn name_run(&mut self, run: &Run) -> Option<(Arc<str>, Item)> {
        if !self.seen_runs.insert(run.run_id.as_str().into()) {
            return None;
        }
        let own: Arc<str> = naming::fitting(&run.run_name, &run.run_id).into();
        let name = match self.run_names.insert(Arc::clone(&own)) {
            true => own,
            false => naming::told_apart(&run.run_name, &run.run_id).into(),
        };
        Some((name, run_link(run)))
    }
}

impl Logged {
    /// The next logged models, perhaps none; `None` at the end.
    async fn advance(
        &mut self,
        catalog: &Arc<Catalog>,
    ) -> Result<Option<Vec<LoggedModel>>, CatalogError> {
        let tracking = &catalog.tracking;
        if !self.next.is_end() {
            let page = tracking.logged_models(&self.searching, self.next.token());
            let page = catalog.noted(page.await)?;
            self.next = catalog.following(&self.next, page.next)?;
            return Ok(Some(page.items));
        }
        if !self.experiments.is_empty() {
            let count = self.experiments.len().min(EXPERIMENTS_PER_SEARCH);
            self.searching = self.experiments.drain(..count).collect();
            self.next = Next::First;
            return Ok(Some(Vec::new()));
        }
        if self.more.is_end() {
            return Ok(None);
        }
        let page = catalog.noted(tracking.experiments(self.more.token()).await)?;
        self.more = catalog.following(&self.more, page.next)?;
        self.experiments = page.items.into_iter().map(|it| it.experiment_id).collect();
        Ok(Some(Vec::new()))
    }
}
