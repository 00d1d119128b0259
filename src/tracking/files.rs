//! MLflow's file store: a folder with one for each experiment, in it one for each run, each with a
//! `meta.yaml`. MLflow 3 goes on to read it and recommends the database.

mod documents;
mod models;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::rest::is_run_id;
use super::source::plain;
use super::wire::since_1970;
use super::{
    Experiment, Lifecycle, LoggedModel, ModelVersion, Page, RegisteredModel, Run, Tracking,
    TrackingError, TrackingResult,
};

const META: &str = "meta.yaml";
/// A description of a run or a model is far smaller, bytes.
const LARGEST_META: u64 = 1 << 20;
/// Runs or models of one page.
const PER_PAGE: usize = 1000;

/// Whether MLflow's client would take the folder: an experiment is described in it.
pub(super) fn holds_experiments(folder: &Path) -> bool {
    names(folder).is_ok_and(|names| {
        names.iter().any(|name| {
            name.bytes().all(|letter| letter.is_ascii_digit())
                && folder.join(name).join(META).symlink_metadata().is_ok()
        })
    })
}

/// A folder of this machine.
#[derive(Clone, Debug)]
pub struct FileTracking {
    folder: PathBuf,
    name: String,
}

/// Why a run or a model is not told of.
enum Trouble {
    None,
    File(io::Error),
    Text(String),
}

#[derive(Deserialize)]
struct Meta {
    #[serde(alias = "run_uuid")]
    run_id: String,
    #[serde(default, alias = "name")]
    run_name: Option<String>,
    artifact_uri: Option<String>,
    #[serde(default)]
    lifecycle_stage: Option<String>,
    #[serde(default)]
    status: Option<u8>,
    start_time: Option<u64>,
    end_time: Option<u64>,
}

#[derive(Deserialize, Default)]
struct ExperimentMeta {
    name: Option<String>,
    last_update_time: Option<u64>,
}

impl FileTracking {
    /// The folder, which must be absolute. Nothing is read yet.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            name: format!("file://{}", folder.display()),
            folder,
        }
    }

    /// Asks in a thread that may wait.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(Self) -> TrackingResult<T> + Send + 'static,
    ) -> TrackingResult<T> {
        let this = self.clone();
        let asked = tokio::task::spawn_blocking(move || question(this));
        match asked.await {
            Ok(answer) => answer,
            Err(error) => Err(self.unavailable(error.to_string())),
        }
    }

    fn unavailable(&self, detail: String) -> TrackingError {
        TrackingError::Unavailable {
            server: self.name.clone(),
            detail,
        }
    }

    /// Experiments that are not deleted: those are moved away.
    fn active_experiments(&self) -> TrackingResult<Vec<String>> {
        let names = names(&self.folder).map_err(|error| self.unavailable(plain(&error)))?;
        let described =
            |name: &String| !name.starts_with('.') && self.folder.join(name).join(META).is_file();
        Ok(names.into_iter().filter(described).collect())
    }

    /// An experiment as its file has it; one whose file cannot be read goes by its id.
    fn describe(&self, experiment_id: String) -> Experiment {
        let path = self.folder.join(&experiment_id).join(META);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let told: ExperimentMeta = serde_saphyr::from_str(&text).unwrap_or_default();
        Experiment {
            name: told.name.unwrap_or_else(|| experiment_id.clone()),
            modified: told.last_update_time.and_then(since_1970),
            experiment_id,
        }
    }

    fn read(&self, experiment: &str, run_id: &str) -> Result<Run, Trouble> {
        let meta: Meta = read_meta(&self.folder.join(experiment).join(run_id))?;
        if meta.run_id != run_id {
            return Err(Trouble::Text("it describes another run".to_owned()));
        }
        Ok(Run {
            run_id: meta.run_id,
            run_name: meta.run_name.unwrap_or_default(),
            experiment_id: experiment.to_owned(),
            artifact_uri: meta.artifact_uri.unwrap_or_default(),
            lifecycle: Lifecycle::of(&meta.lifecycle_stage.unwrap_or_default()),
            status: status(meta.status).to_owned(),
            start_time: meta.start_time.and_then(since_1970),
            end_time: meta.end_time.and_then(since_1970),
        })
    }

    fn find(&self, run_id: &str) -> TrackingResult<Run> {
        let what = format!("run {run_id}");
        if is_run_id(run_id) {
            for experiment in self.active_experiments()? {
                if let Some(run) = self.told(&what, self.read(&experiment, run_id))? {
                    return Ok(run);
                }
            }
        }
        Err(self.nothing(what))
    }

    /// What was read, if there is such a thing.
    fn told<T>(&self, what: &str, read: Result<T, Trouble>) -> TrackingResult<Option<T>> {
        match read {
            Ok(found) => Ok(Some(found)),
            Err(Trouble::None) => Ok(None),
            Err(Trouble::File(error)) => {
                Err(self.unavailable(format!("{what}: {}", plain(&error))))
            }
            Err(Trouble::Text(detail)) => Err(TrackingError::Protocol {
                server: self.name.clone(),
                what: what.to_owned(),
                detail: format!("its {META}: {detail}"),
            }),
        }
    }

    /// What was read for a listing, which leaves out what cannot be.
    fn listed<T>(&self, what: &str, read: Result<T, Trouble>) -> Option<T> {
        match read {
            Ok(found) => return Some(found),
            Err(Trouble::None) => {}
            Err(Trouble::File(error)) => {
                tracing::warn!(server = self.name, what, %error, "not shown");
            }
            Err(Trouble::Text(error)) => {
                tracing::warn!(server = self.name, what, error, "not shown");
            }
        }
        None
    }

    /// Active runs behind the one that `token` names, in the order of experiments and ids.
    fn page(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        self.page_of(experiments, "", token, |experiment, run_id| {
            if !is_run_id(run_id) {
                return None;
            }
            let run = self.listed(&format!("run {run_id}"), self.read(experiment, run_id))?;
            (run.lifecycle == Lifecycle::Active).then_some(run)
        })
    }

    /// What `read` finds under the names in a folder of each experiment, behind the one that `token`
    /// names, in the order of experiments and names.
    fn page_of<T>(
        &self,
        experiments: &[String],
        folder: &str,
        token: Option<&str>,
        read: impl Fn(&str, &str) -> Option<T>,
    ) -> TrackingResult<Page<T>> {
        let (from, after) = token.and_then(|it| it.split_once('/')).unwrap_or_default();
        let begin = experiments.iter().position(|it| it == from).unwrap_or(0);
        let mut items = Vec::new();
        for experiment in &experiments[begin..] {
            for name in self.names_in(&self.folder.join(experiment).join(folder))? {
                if experiment == from && *name <= *after {
                    continue;
                }
                items.extend(read(experiment, &name));
                if items.len() >= PER_PAGE {
                    let next = Some(format!("{experiment}/{name}"));
                    return Ok(Page { items, next });
                }
            }
        }
        Ok(Page { items, next: None })
    }

    /// Names in a folder, in order; none where there is no such folder.
    fn names_in(&self, folder: &Path) -> TrackingResult<Vec<String>> {
        match names(folder) {
            Err(error) if is_absence(&error) => Ok(Vec::new()),
            names => names.map_err(|error| self.unavailable(plain(&error))),
        }
    }
}

#[async_trait]
impl Tracking for FileTracking {
    fn name(&self) -> &str {
        &self.name
    }

    async fn probe(&self) -> TrackingResult<()> {
        self.ask(|this| this.active_experiments().map(drop)).await
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        let run_id = run_id.to_owned();
        self.ask(move |this| this.find(&run_id)).await
    }

    async fn experiments(&self, _token: Option<&str>) -> TrackingResult<Page<Experiment>> {
        let items = self.ask(|this| {
            let experiments = this.active_experiments()?;
            Ok(experiments
                .into_iter()
                .map(|id| this.describe(id))
                .collect())
        });
        Ok(Page {
            items: items.await?,
            next: None,
        })
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let (experiments, token) = (experiments.to_vec(), token.map(str::to_owned));
        self.ask(move |this| this.page(&experiments, token.as_deref()))
            .await
    }

    async fn logged_model(&self, model_id: &str) -> TrackingResult<LoggedModel> {
        let model_id = model_id.to_owned();
        self.ask(move |this| Ok(this.find_logged(&model_id)?.into()))
            .await
    }

    async fn logged_models(
        &self,
        experiments: &[String],
        token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        let (experiments, token) = (experiments.to_vec(), token.map(str::to_owned));
        self.ask(move |this| this.page_of_logged(&experiments, token.as_deref()))
            .await
    }

    async fn models_of_run(
        &self,
        experiment: &str,
        run_id: &str,
    ) -> TrackingResult<Vec<LoggedModel>> {
        let (experiment, run_id) = (experiment.to_owned(), run_id.to_owned());
        self.ask(move |this| this.logged_by(&experiment, &run_id))
            .await
    }

    async fn registered_model(&self, name: &str) -> TrackingResult<RegisteredModel> {
        let name = name.to_owned();
        self.ask(move |this| this.find_registered(&name)).await
    }

    async fn registered_models(
        &self,
        token: Option<&str>,
    ) -> TrackingResult<Page<RegisteredModel>> {
        let token = token.map(str::to_owned);
        self.ask(move |this| this.page_of_registered(token.as_deref()))
            .await
    }

    async fn alias(&self, name: &str, alias: &str) -> TrackingResult<String> {
        let (name, alias) = (name.to_owned(), alias.to_owned());
        self.ask(move |this| this.find_alias(&name, &alias)).await
    }

    async fn model_version(&self, name: &str, version: &str) -> TrackingResult<ModelVersion> {
        let (name, version) = (name.to_owned(), version.to_owned());
        self.ask(move |this| Ok(this.find_version(&name, &version)?.0))
            .await
    }

    async fn model_versions(
        &self,
        name: &str,
        _token: Option<&str>,
    ) -> TrackingResult<Page<ModelVersion>> {
        let name = name.to_owned();
        let items = self.ask(move |this| this.versions(&name)).await?;
        Ok(Page { items, next: None })
    }

    async fn version_location(&self, name: &str, version: &str) -> TrackingResult<String> {
        let (name, version) = (name.to_owned(), version.to_owned());
        self.ask(move |this| Ok(this.find_version(&name, &version)?.1))
            .await
    }

    async fn run_document(&self, run_id: &str) -> TrackingResult<Value> {
        let run_id = run_id.to_owned();
        self.ask(move |this| this.describe_run(&this.find(&run_id)?))
            .await
    }

    async fn model_document(&self, model_id: &str) -> TrackingResult<Value> {
        let model_id = model_id.to_owned();
        self.ask(move |this| this.describe_model(&this.find_logged(&model_id)?))
            .await
    }
}

/// What the `meta.yaml` of a folder says.
fn read_meta<T: DeserializeOwned>(folder: &Path) -> Result<T, Trouble> {
    let text = read_small(&folder.join(META))?;
    serde_saphyr::from_str(&text).map_err(|error| Trouble::Text(first_line(&error.to_string())))
}

/// The text of a file.
fn read_small(path: &Path) -> Result<String, Trouble> {
    let size = match path.metadata() {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        Ok(_) => return Err(Trouble::None),
        Err(error) if is_absence(&error) => return Err(Trouble::None),
        Err(error) => return Err(Trouble::File(error)),
    };
    if size > LARGEST_META {
        return Err(Trouble::Text(format!("{size} bytes are too many")));
    }
    fs::read_to_string(path).map_err(Trouble::File)
}

/// Names in a folder, in order; those that are no text are not MLflow's.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// The file store writes the numbers of its protocol.
fn status(number: Option<u8>) -> &'static str {
    match number {
        Some(1) => "RUNNING",
        Some(2) => "SCHEDULED",
        Some(3) => "FINISHED",
        Some(4) => "FAILED",
        Some(5) => "KILLED",
        _ => "",
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
