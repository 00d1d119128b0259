//! MLflow's file store: a folder with one for each experiment, in it one for each run, each with a
//! `meta.yaml`. MLflow 3 goes on to read it and recommends the database.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::Deserialize;

use super::rest::is_run_id;
use super::source::plain;
use super::wire::since_1970;
use super::{Experiment, Lifecycle, Page, Run, Tracking, TrackingError, TrackingResult};

const META: &str = "meta.yaml";
/// A description of a run is far smaller, bytes.
const LARGEST_META: u64 = 1 << 20;
/// Runs of one page.
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

/// Why a run is not told of.
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
        let path = self.folder.join(experiment).join(run_id).join(META);
        let size = match path.metadata() {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Ok(_) => return Err(Trouble::None),
            Err(error) if is_absence(&error) => return Err(Trouble::None),
            Err(error) => return Err(Trouble::File(error)),
        };
        if size > LARGEST_META {
            return Err(Trouble::Text(format!("{size} bytes are too many")));
        }
        let text = fs::read_to_string(&path).map_err(Trouble::File)?;
        let meta: Meta = serde_saphyr::from_str(&text)
            .map_err(|error| Trouble::Text(first_line(&error.to_string())))?;
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
        let server = self.name.clone();
        let experiments = if is_run_id(run_id) {
            self.active_experiments()?
        } else {
            Vec::new()
        };
        for experiment in experiments {
            match self.read(&experiment, run_id) {
                Ok(run) => return Ok(run),
                Err(Trouble::None) => {}
                Err(Trouble::File(error)) => {
                    return Err(self.unavailable(format!("{what}: {}", plain(&error))));
                }
                Err(Trouble::Text(detail)) => {
                    return Err(TrackingError::Protocol {
                        server,
                        what,
                        detail: format!("its {META}: {detail}"),
                    });
                }
            }
        }
        Err(TrackingError::NotFound { server, what })
    }

    /// Active runs behind the one that `token` names, in the order of experiments and ids.
    fn page(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let (from, after) = token.and_then(|it| it.split_once('/')).unwrap_or_default();
        let begin = experiments.iter().position(|it| it == from).unwrap_or(0);
        let mut items = Vec::new();
        for experiment in &experiments[begin..] {
            let names = match names(&self.folder.join(experiment)) {
                Ok(names) => names,
                Err(error) if is_absence(&error) => continue,
                Err(error) => return Err(self.unavailable(plain(&error))),
            };
            for run_id in names {
                if (experiment == from && *run_id <= *after) || !is_run_id(&run_id) {
                    continue;
                }
                match self.read(experiment, &run_id) {
                    Ok(run) if run.lifecycle == Lifecycle::Active => items.push(run),
                    Ok(_) | Err(Trouble::None) => continue,
                    Err(Trouble::File(error)) => {
                        tracing::warn!(server = self.name, run_id, %error, "a run is not shown");
                    }
                    Err(Trouble::Text(error)) => {
                        tracing::warn!(server = self.name, run_id, error, "a run is not shown");
                    }
                }
                if items.len() >= PER_PAGE {
                    let next = Some(format!("{experiment}/{run_id}"));
                    return Ok(Page { items, next });
                }
            }
        }
        Ok(Page { items, next: None })
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
