//! MLflow's metadata: what runs there are, and where their artifacts lie.

mod authentication;
mod courier;
mod credentials_file;
mod documents;
mod error;
mod failure;
mod files;
mod models;
mod rest;
pub mod settings;
mod sigv4;
mod source;
mod sqlite;
mod transport;
mod wire;

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;
use serde_json::Value;

pub use authentication::Authentication;
pub use courier::ArtifactCourier;
pub use error::{TrackingError, TrackingResult};
pub use files::FileTracking;
pub use models::{LoggedModel, ModelVersion, RegisteredModel};
pub use rest::RestTracking;
pub use settings::TrackingSettings;
pub use source::TrackingSource;
pub use sqlite::SqliteTracking;

/// MLflow's lifecycle of a run: deleted ones are not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    Active,
    Deleted,
}

impl Lifecycle {
    /// MLflow's word for it.
    fn of(stage: &str) -> Self {
        if stage == "deleted" {
            Self::Deleted
        } else {
            Self::Active
        }
    }
}

/// A run as the tracking server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub run_id: String,
    pub run_name: String,
    pub experiment_id: String,
    pub artifact_uri: String,
    pub lifecycle: Lifecycle,
    /// RUNNING, SCHEDULED, FINISHED, FAILED or KILLED.
    pub status: String,
    pub start_time: Option<SystemTime>,
    pub end_time: Option<SystemTime>,
}

/// An experiment that is not deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    pub experiment_id: String,
    pub name: String,
    pub modified: Option<SystemTime>,
}

/// One page of something, with the token of the next.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next: Option<String>,
}

impl<T> Default for Page<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            next: None,
        }
    }
}

/// A source of MLflow metadata. What a source has none of is not found there.
#[async_trait]
pub trait Tracking: fmt::Debug + Send + Sync + 'static {
    /// For messages: the tracking URI without credentials.
    fn name(&self) -> &str;

    /// One cheap request that tells whether server and credentials are good.
    async fn probe(&self) -> TrackingResult<()>;

    async fn run(&self, run_id: &str) -> TrackingResult<Run>;

    /// The active experiments.
    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<Experiment>>;

    /// An active experiment, by its name.
    async fn experiment(&self, name: &str) -> TrackingResult<Experiment> {
        let mut token = None;
        loop {
            let page = self.experiments(token.as_deref()).await?;
            let mut found = page.items.into_iter();
            if let Some(found) = found.find(|experiment| experiment.name == name) {
                return Ok(found);
            }
            token = page.next;
            if token.is_none() {
                return Err(self.nothing(format!("experiment {name:?}")));
            }
        }
    }

    /// Active runs of the experiments, in an order in which no later page shifts when one is made.
    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>>;

    /// Active runs of that name in an experiment, in the order of [`Self::runs`].
    async fn runs_named(&self, experiment: &str, name: &str) -> TrackingResult<Vec<Run>> {
        let experiments = [experiment.to_owned()];
        let mut named = Vec::new();
        let mut token = None;
        loop {
            let page = self.runs(&experiments, token.as_deref()).await?;
            let of_name = page.items.into_iter().filter(|run| run.run_name == name);
            named.extend(of_name);
            token = page.next;
            if token.is_none() {
                return Ok(named);
            }
        }
    }

    /// A logged model, by its id.
    async fn logged_model(&self, model_id: &str) -> TrackingResult<LoggedModel> {
        Err(self.nothing(format!("logged model {model_id}")))
    }

    /// Logged models of the experiments, in an order in which no later page shifts when one is made.
    async fn logged_models(
        &self,
        _experiments: &[String],
        _token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        Ok(Page::default())
    }

    /// Logged models that a run has made, in that order.
    async fn models_of_run(
        &self,
        _experiment: &str,
        _run_id: &str,
    ) -> TrackingResult<Vec<LoggedModel>> {
        Ok(Vec::new())
    }

    /// A registered model, by its name.
    async fn registered_model(&self, name: &str) -> TrackingResult<RegisteredModel> {
        Err(self.nothing(format!("registered model {name:?}")))
    }

    /// The registered models.
    async fn registered_models(
        &self,
        _token: Option<&str>,
    ) -> TrackingResult<Page<RegisteredModel>> {
        Ok(Page::default())
    }

    /// The version that an alias of a registered model names.
    async fn alias(&self, name: &str, alias: &str) -> TrackingResult<String> {
        Err(self.nothing(format!("alias {alias:?} of model {name:?}")))
    }

    /// A version of a registered model.
    async fn model_version(&self, name: &str, version: &str) -> TrackingResult<ModelVersion> {
        Err(self.nothing(format!("version {version} of model {name:?}")))
    }

    /// The versions of a registered model.
    async fn model_versions(
        &self,
        _name: &str,
        _token: Option<&str>,
    ) -> TrackingResult<Page<ModelVersion>> {
        Ok(Page::default())
    }

    /// Where the files of a version lie: an artifact URI.
    async fn version_location(&self, name: &str, version: &str) -> TrackingResult<String> {
        Ok(self.model_version(name, version).await?.source)
    }

    /// All that is known of a run: `info` and `data` with its parameters, metrics and tags, in MLflow's
    /// own words.
    async fn run_document(&self, run_id: &str) -> TrackingResult<Value> {
        Err(self.nothing(format!("the description of run {run_id}")))
    }

    /// All that is known of a logged model, in MLflow's own words.
    async fn model_document(&self, model_id: &str) -> TrackingResult<Value> {
        Err(self.nothing(format!("the description of logged model {model_id}")))
    }

    /// Makes an experiment.
    async fn create_experiment(&self, name: &str) -> TrackingResult<Experiment> {
        Err(self.read_only(format!("making experiment {name:?}")))
    }

    /// Makes a run, which is running then.
    async fn create_run(&self, _experiment: &str, name: &str) -> TrackingResult<Run> {
        Err(self.read_only(format!("making run {name:?}")))
    }

    /// Ends a run with one of MLflow's words for how: FINISHED, FAILED, KILLED.
    async fn end_run(&self, run_id: &str, _status: &str) -> TrackingResult<()> {
        Err(self.read_only(format!("ending run {run_id}")))
    }

    /// Makes a logged model of a run, which is pending then.
    async fn create_logged_model(&self, run: &Run, name: &str) -> TrackingResult<LoggedModel> {
        let run_id = &run.run_id;
        Err(self.read_only(format!("making model {name:?} of run {run_id}")))
    }

    /// Marks a logged model as ready, or as one whose upload has failed.
    async fn finish_logged_model(&self, model_id: &str, _ready: bool) -> TrackingResult<()> {
        Err(self.read_only(format!("marking model {model_id}")))
    }

    /// The error that nothing can be changed.
    fn read_only(&self, what: String) -> TrackingError {
        TrackingError::ReadOnly {
            server: self.name().to_owned(),
            what,
        }
    }

    /// The error that something is not there.
    fn nothing(&self, what: String) -> TrackingError {
        TrackingError::NotFound {
            server: self.name().to_owned(),
            what,
        }
    }
}
