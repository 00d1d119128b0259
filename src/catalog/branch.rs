//! The part of the tree that names lead through: experiments, the runs in them, models, their versions.
//!
//! Every name is asked for by itself, so that it resolves however many others there are. An answer is
//! believed for the TTL, as those about runs are, and goes on counting while the server is away.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::cache::KnownRoot;
use super::naming;
use super::{Catalog, CatalogError, GRACE, PATIENCE, RootEntry, RootId};
use crate::tracking::{
    Experiment, LoggedModel, ModelVersion, RegisteredModel, Run, TrackingError, TrackingResult,
};

/// Names remembered at most. One takes some 250 bytes: 8 MiB when full.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(32_768).unwrap();
/// A server that could not tell of a run's models is not asked for them again for so long.
const FAILED_FOR: Duration = Duration::from_secs(5);
/// Runs whose models are remembered.
const RUNS: NonZeroUsize = NonZeroUsize::new(4_096).unwrap();

/// A directory of names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Branch {
    Experiments,
    /// The runs of an experiment, by their names; with its id.
    Experiment(Arc<str>),
    Models,
    /// The versions of a registered model.
    Versions(Arc<str>),
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Branch(Branch, SystemTime),
    /// A symbolic link with this target.
    Link(Arc<str>, SystemTime),
    Root(RootEntry),
}

/// An answer, and when it was asked for.
#[derive(Clone, Debug)]
struct Known<T> {
    answer: T,
    asked: Instant,
}

/// The models of a run, each under its name there.
type ModelsOfRun = Arc<[(Arc<str>, Item)]>;
/// Answers, the least recently used of which is forgotten first.
type Remembered<K, T> = Mutex<LruCache<K, Known<T>>>;

/// What the catalog was told of names.
#[derive(Debug)]
pub(super) struct Branches {
    names: Remembered<(Branch, Arc<str>), Option<Item>>,
    /// By the ids of runs; with when they could not be asked for again, if so.
    models: Remembered<Arc<str>, (ModelsOfRun, Option<Instant>)>,
}

impl Default for Branches {
    fn default() -> Self {
        Self {
            names: Mutex::new(LruCache::sparse(REMEMBERED)),
            models: Mutex::new(LruCache::sparse(RUNS)),
        }
    }
}

impl<T> Known<T> {
    fn is_younger_than(&self, longest: Duration) -> bool {
        self.asked.elapsed() < longest
    }
}

impl Branches {
    /// Remembers an answer, unless one to a later question is known.
    pub fn put(&self, branch: &Branch, name: &Arc<str>, answer: Option<Item>, asked: Instant) {
        let mut names = self.names.lock();
        let key = (branch.clone(), Arc::clone(name));
        if names.peek(&key).is_none_or(|known| known.asked <= asked) {
            names.put(key, Known { answer, asked });
        }
    }
}

impl Branches {
    pub fn forget(&self, branch: &Branch, name: &str) {
        let key = (branch.clone(), Arc::<str>::from(name));
        self.names.lock().pop(&key);
    }
}

impl Catalog {
    /// What `name` stands for in a branch.
    ///
    /// # Errors
    /// `NotFound`; the server's other failures.
    pub async fn find(self: &Arc<Self>, branch: &Branch, name: &str) -> Result<Item, CatalogError> {
        let key = (branch.clone(), Arc::<str>::from(name));
        let known = self.branches.names.lock().get(&key).cloned();
        if let Some(known) = &known
            && known.is_younger_than(self.ttl)
        {
            let answer = known.answer.clone();
            return answer.ok_or_else(|| self.missing(&name));
        }
        let longest = self.ttl.saturating_add(GRACE);
        let stale = known.filter(|known| known.is_younger_than(longest));
        let stale = stale.and_then(|known| known.answer);
        let asked = Instant::now();
        let asking = self.ask_in(branch, name);
        let answer = match self.within_patience(stale.is_some(), asking).await {
            Ok(item) => Some(item),
            Err(TrackingError::NotFound { .. }) => None,
            Err(error @ (TrackingError::Unavailable { .. } | TrackingError::Protocol { .. })) => {
                return stale.ok_or(error.into());
            }
            Err(error) => return Err(error.into()),
        };
        self.branches.put(branch, &key.1, answer.clone(), asked);
        answer.ok_or_else(|| self.missing(&name))
    }

    /// Asks; where there is another answer, not while the server is away, and not for long.
    async fn within_patience<T>(
        &self,
        has_other: bool,
        asking: impl Future<Output = TrackingResult<T>>,
    ) -> TrackingResult<T> {
        if !has_other {
            return self.noted(asking.await);
        }
        let away = |detail: String| TrackingError::Unavailable {
            server: self.tracking.name().to_owned(),
            detail,
        };
        if self.outage.is_known() && !self.outage.is_time_to_ask() {
            return Err(away("it did not answer before".to_owned()));
        }
        match timeout(PATIENCE, asking).await {
            Ok(answer) => self.noted(answer),
            Err(_) => {
                let error = away(format!("no answer for {} s", PATIENCE.as_secs()));
                self.outage.note_down(&error);
                Err(error)
            }
        }
    }

    /// What a name stands for, asked now, whatever is known.
    pub(super) async fn find_anew(
        self: &Arc<Self>,
        branch: &Branch,
        name: &str,
    ) -> Result<Item, CatalogError> {
        self.branches.forget(branch, name);
        self.find(branch, name).await
    }

    async fn ask_in(&self, branch: &Branch, name: &str) -> TrackingResult<Item> {
        let decoded = naming::decode(name);
        let nothing = || self.tracking.nothing(format!("{name:?}"));
        match branch {
            Branch::Experiments => self.ask_for_experiment(name, decoded).await,
            Branch::Experiment(id) => self.ask_for_run(id, name, decoded).await,
            Branch::Models if LoggedModel::is_id(name) => {
                match self.tracking.logged_model(name).await {
                    Ok(model) => Ok(self.model(&model, Instant::now())),
                    // A registered model may be called so.
                    Err(TrackingError::NotFound { .. }) => {
                        Ok(registered(&self.tracking.registered_model(name).await?))
                    }
                    Err(error) => Err(error),
                }
            }
            Branch::Models => {
                let name = decoded.ok_or_else(nothing)?;
                if let Some((model, alias)) = name.rsplit_once('@') {
                    match self.tracking.alias(model, alias).await {
                        Ok(version) => return Ok(alias_link(model, &version, None)),
                        // A registered model may be called so.
                        Err(TrackingError::NotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(registered(&self.tracking.registered_model(&name).await?))
            }
            Branch::Versions(model) => {
                let version = self.tracking.model_version(model, name).await?;
                Ok(self
                    .leading_somewhere(version_item(model, &version), model, name)
                    .await)
            }
        }
    }

    async fn ask_for_experiment(
        &self,
        name: &str,
        decoded: Option<String>,
    ) -> TrackingResult<Item> {
        let mut token = None;
        while let Some(id) = naming::id_of_cut(name) {
            let page = self.tracking.experiments(token.as_deref()).await?;
            let mut all = page.items.iter();
            let found = all.find(|it| {
                it.experiment_id == id && naming::fitting(&it.name, &it.experiment_id) == name
            });
            if let Some(found) = found {
                return Ok(experiment(found));
            }
            token = page.next;
            if token.is_none() {
                break;
            }
        }
        let name = decoded.ok_or_else(|| self.tracking.nothing(format!("{name:?}")))?;
        Ok(experiment(&self.tracking.experiment(&name).await?))
    }

    /// The oldest run of a name has it; others have the beginning of their ids behind it.
    async fn ask_for_run(
        &self,
        experiment: &str,
        name: &str,
        decoded: Option<String>,
    ) -> TrackingResult<Item> {
        let nothing = || self.tracking.nothing(format!("run {name:?}"));
        if let Some(id) = naming::id_of_cut(name) {
            match self.tracking.run(id).await {
                Ok(run)
                    if run.experiment_id == experiment
                        && naming::fitting(&run.run_name, &run.run_id) == name =>
                {
                    return Ok(run_link(&run));
                }
                // It may only look like one.
                Ok(_) | Err(TrackingError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let wanted = decoded.ok_or_else(nothing)?;
        let named = self.tracking.runs_named(experiment, &wanted).await?;
        if let Some(run) = named.first() {
            return Ok(run_link(run));
        }
        if let Some((base, short)) = naming::apart(&wanted) {
            let named = self.tracking.runs_named(experiment, base).await?;
            // The first goes by the name alone.
            let mut named = named.iter().skip(1);
            let found = named.find(|run| run.run_id.starts_with(short));
            return found.map(run_link).ok_or_else(nothing);
        }
        // One without a name goes by its id.
        let run = self.tracking.run(&wanted).await?;
        let fits = run.experiment_id == experiment && run.run_name.is_empty();
        fits.then(|| run_link(&run)).ok_or_else(nothing)
    }

    /// A link of a version, unless it leads to a run or model that is deleted: the files are there all the
    /// same, and MLflow gives them out.
    pub(super) async fn leading_somewhere(
        &self,
        item: Item,
        model: &Arc<str>,
        version: &str,
    ) -> Item {
        let Item::Link(target, modified) = &item else {
            return item;
        };
        let id = match target.strip_prefix("../../") {
            Some(place) => RootId::run(place.split('/').next().unwrap_or_default()),
            None => RootId::model(target.trim_start_matches("../")),
        };
        let known = self.cache.get(&id);
        let known = known.filter(|known| known.is_younger_than(self.ttl));
        let is_gone = match known {
            Some(known) => known.answer.is_none(),
            None => matches!(self.fetch(&id).await, Ok(None)),
        };
        match is_gone {
            true => version_root(model, version, *modified),
            false => item,
        }
    }

    /// A logged model, which is known from now on.
    pub(super) fn model(&self, model: &LoggedModel, asked: Instant) -> Item {
        let id = RootId::model(&model.model_id);
        let known = Arc::new(KnownRoot::of_model(model));
        let entry = known.entry(&id);
        self.cache.put(&id, Some(known), asked);
        Item::Root(entry)
    }

    /// The logged models of a run, by the names that they have in it. Where the server cannot tell, what
    /// it told before, or none: the run's own files are there all the same.
    pub async fn models_of_run(self: &Arc<Self>, run_id: &str) -> Arc<[(Arc<str>, Item)]> {
        let known = self.branches.models.lock().get(run_id).cloned();
        if let Some(known) = &known {
            let (models, failed) = &known.answer;
            let failed_lately = failed.is_some_and(|failed| failed.elapsed() < FAILED_FOR);
            if failed_lately || failed.is_none() && known.is_younger_than(self.ttl) {
                return Arc::clone(models);
            }
        }
        let asked = Instant::now();
        let asking = self.ask_for_models(run_id);
        let known = match self.within_patience(true, asking).await {
            Ok(models) => Known {
                answer: (models, None),
                asked,
            },
            Err(error) => {
                tracing::debug!(run_id, %error, "its models are not known");
                let longest = self.ttl.saturating_add(GRACE);
                let before = known.filter(|known| known.is_younger_than(longest));
                let nothing = || (Arc::from([]), asked);
                let (models, asked) =
                    before.map_or_else(nothing, |known| (known.answer.0, known.asked));
                Known {
                    answer: (models, Some(Instant::now())),
                    asked,
                }
            }
        };
        let models = Arc::clone(&known.answer.0);
        self.branches.models.lock().put(run_id.into(), known);
        models
    }

    async fn ask_for_models(&self, run_id: &str) -> TrackingResult<ModelsOfRun> {
        let known = self.cache.get(&RootId::run(run_id));
        let experiment = match known.and_then(|known| known.answer) {
            Some(root) => root.experiment_id.to_string(),
            None => self.tracking.run(run_id).await?.experiment_id,
        };
        let models = self.tracking.models_of_run(&experiment, run_id).await?;
        let mut named: Vec<(Arc<str>, Item)> = Vec::with_capacity(models.len());
        for model in &models {
            let name: Arc<str> = naming::fitting(&model.name, &model.model_id).into();
            let target = format!("../models/{}", model.model_id);
            let link = Item::Link(target.into(), time(model.modified));
            // Of one name the last counts, as for MLflow's client.
            named.retain(|(known, _)| *known != name);
            named.push((name, link));
        }
        Ok(named.into())
    }
}

fn time(told: Option<SystemTime>) -> SystemTime {
    told.unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(super) fn experiment(experiment: &Experiment) -> Item {
    let branch = Branch::Experiment(experiment.experiment_id.as_str().into());
    Item::Branch(branch, time(experiment.modified))
}

pub(super) fn run_link(run: &Run) -> Item {
    let target = format!("../../{}", run.run_id);
    Item::Link(target.into(), time(run.end_time.or(run.start_time)))
}

pub(super) fn registered(model: &RegisteredModel) -> Item {
    Item::Branch(
        Branch::Versions(model.name.as_str().into()),
        time(model.modified),
    )
}

pub(super) fn alias_link(model: &str, version: &str, modified: Option<SystemTime>) -> Item {
    let target = format!("{}/{version}", naming::encode(model));
    Item::Link(target.into(), time(modified))
}

/// A version is a link to the logged model or the place in a run that it was made from; with an artifact
/// root of its own only where that is neither.
pub(super) fn version_item(model: &Arc<str>, version: &ModelVersion) -> Item {
    let modified = time(version.modified);
    if let Some(target) = place_of(version) {
        return Item::Link(target.into(), modified);
    }
    version_root(model, &version.version, modified)
}

fn version_root(model: &Arc<str>, version: &str, modified: SystemTime) -> Item {
    Item::Root(RootEntry {
        id: RootId::Version {
            model: Arc::clone(model),
            version: version.into(),
        },
        created: modified,
        modified,
    })
}

/// Where the files of a version are in the mount, told by what it was made from.
fn place_of(version: &ModelVersion) -> Option<String> {
    let source = version.source.trim_end_matches('/');
    if let Some(id) = source.strip_prefix("models:/") {
        return LoggedModel::is_id(id).then(|| format!("../{id}"));
    }
    if let Some(place) = source.strip_prefix("runs:/") {
        return Some(format!("../../{place}")).filter(|_| is_plain(place));
    }
    // `…/models/m-<id>/artifacts`, as MLflow lays them out.
    if let Some((_, behind)) = source.split_once("/models/m-")
        && let Some(id) = behind.strip_suffix("/artifacts")
        && LoggedModel::is_id(&format!("m-{id}"))
    {
        return Some(format!("../m-{id}"));
    }
    // `…/<run id>/artifacts/<path>`.
    let run_id = Some(&version.run_id).filter(|id| !id.is_empty())?;
    let (_, path) = source.split_once(&format!("/{run_id}/artifacts/"))?;
    is_plain(path).then(|| format!("../../{run_id}/{path}"))
}

/// Whether a path is one below where it begins.
fn is_plain(path: &str) -> bool {
    let mut names = path.split('/');
    names.all(|name| !name.is_empty() && name != "." && name != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_leads_to_what_it_was_made_from() {
        let run = "0123456789abcdef0123456789abcdef";
        let id = format!("m-{run}");
        let target = |source: &str| {
            place_of(&ModelVersion {
                version: "1".to_owned(),
                source: source.to_owned(),
                run_id: run.to_owned(),
                modified: None,
            })
        };
        let model = Some(format!("../{id}"));
        assert_eq!(target(&format!("models:/{id}")), model);
        assert_eq!(
            target(&format!("s3://bucket/1/models/{id}/artifacts")),
            model
        );
        let place = Some(format!("../../{run}/some/model"));
        assert_eq!(target(&format!("runs:/{run}/some/model")), place);
        assert_eq!(
            target(&format!("s3://bucket/1/{run}/artifacts/some/model/")),
            place
        );
        for elsewhere in ["s3://bucket/some/model", "runs:/../x", "models:/name/1"] {
            assert_eq!(target(elsewhere), None, "{elsewhere}");
        }
    }
}
