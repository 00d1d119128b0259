//! MLflow's tracking REST API (`/api/2.0`), as of MLflow 3.17.

mod making;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::Method;
use serde_json::{Value, json};

use super::failure::{Failure, Subject};
use super::settings::{SettingError, TrackingSettings};
use super::transport::{Call, Patience, Transport, settle};
use super::wire::{
    ExperimentAnswer, ExperimentDocument, ExperimentsAnswer, LocationAnswer, LoggedModelAnswer,
    LoggedModelsAnswer, ModelVersionAnswer, ModelVersionsAnswer, RegisteredModelAnswer,
    RegisteredModelsAnswer, RunAnswer, RunsAnswer,
};
use super::{
    Experiment, LoggedModel, ModelVersion, Page, RegisteredModel, Run, Tracking, TrackingError,
    TrackingResult,
};

/// Runs of one page; MLflow's limit is 50 000. The smaller sizes are for servers whose runs are so
/// large (parameters, metrics and tags come along) that a page exceeds what is read of an answer.
const RUNS_PER_PAGE: [u32; 3] = [1000, 100, 10];
/// Experiments of one page; MLflow's limit is 50 000.
const EXPERIMENTS_PER_PAGE: u32 = 1000;
/// Models of one page; MLflow's limit for registered ones.
const MODELS_PER_PAGE: u32 = 1000;
/// Versions of one page; MLflow's limit is 200 000.
const VERSIONS_PER_PAGE: u32 = 1000;
/// Longest run id, bytes: MLflow's own limit.
const LONGEST_RUN_ID: usize = 256;
/// At start-up somebody waits for the mount: a server that refuses connections is told within a
/// second, one that does not answer within ten.
const PROBE: Patience = Patience {
    longest: Duration::from_secs(10),
    retries: 2,
};

/// A tracking server.
#[derive(Debug)]
pub struct RestTracking {
    transport: Transport,
    /// Index into [`RUNS_PER_PAGE`]; only grows.
    page_size: AtomicUsize,
}

impl RestTracking {
    /// A client for the server; sends nothing.
    ///
    /// # Errors
    /// A certificate file that cannot be used, a token or workspace that fits no header.
    pub fn new(settings: TrackingSettings) -> Result<Self, SettingError> {
        Ok(Self {
            transport: Transport::new(settings)?,
            page_size: AtomicUsize::new(0),
        })
    }

    fn not_found(&self, run_id: &str) -> TrackingError {
        TrackingError::NotFound {
            server: self.transport.name().to_owned(),
            what: Subject::Run(run_id).to_string(),
        }
    }

    async fn search<T: serde::de::DeserializeOwned>(
        &self,
        subject: Subject<'_>,
        path: &str,
        body: Value,
    ) -> Result<T, Failure> {
        let call = Call {
            subject,
            method: Method::POST,
            path,
            query: &[],
            body: Some(body),
        };
        self.transport.call(&call, self.transport.patience()).await
    }

    /// Asks for a document.
    async fn get<T: serde::de::DeserializeOwned>(
        &self,
        subject: Subject<'_>,
        path: &str,
        query: &[(&str, &str)],
    ) -> TrackingResult<T> {
        let call = Call {
            subject,
            method: Method::GET,
            path,
            query,
            body: None,
        };
        settle(self.transport.call(&call, self.transport.patience()).await)
    }

    async fn search_models(
        &self,
        experiments: &[String],
        filter: Option<String>,
        token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        let body = json!({
            "experiment_ids": experiments,
            "filter": filter.unwrap_or_default(),
            "max_results": MODELS_PER_PAGE,
            "order_by": [{"field_name": "creation_timestamp", "ascending": true}],
            "page_token": token.unwrap_or_default(),
        });
        let subject = Subject::LoggedModels;
        let answer = self.search(subject, "logged-models/search", body).await;
        let answer: LoggedModelsAnswer = settle(answer)?;
        let mut page: Page<LoggedModel> = page(answer.models, answer.next_page_token);
        page.items
            .retain(|model| LoggedModel::is_id(&model.model_id));
        Ok(page)
    }

    /// Runs of a name that no filter can say.
    async fn runs_picked(&self, experiments: &[String], name: &str) -> TrackingResult<Vec<Run>> {
        let mut named = Vec::new();
        let mut token = None;
        loop {
            let page = self.runs(experiments, token.as_deref()).await?;
            named.extend(page.items.into_iter().filter(|run| run.run_name == name));
            token = page.next;
            if token.is_none() {
                return Ok(named);
            }
        }
    }

    async fn search_runs(
        &self,
        experiments: &[String],
        token: Option<&str>,
        maximum: u32,
    ) -> Result<RunsAnswer, Failure> {
        let body = json!({
            "experiment_ids": experiments,
            "run_view_type": "ACTIVE_ONLY",
            "max_results": maximum,
            // Pages are offsets on the server: an order in which new runs come last keeps them
            // from shifting while they are read.
            "order_by": ["start_time ASC", "run_id ASC"],
            "page_token": token.unwrap_or_default(),
        });
        self.search(Subject::Runs, "runs/search", body).await
    }
}

#[async_trait]
impl Tracking for RestTracking {
    fn name(&self) -> &str {
        self.transport.name()
    }

    async fn probe(&self) -> TrackingResult<()> {
        let call = Call {
            subject: Subject::Experiments,
            method: Method::GET,
            path: "experiments/search",
            query: &[("max_results", "1")],
            body: None,
        };
        settle(self.transport.call::<ExperimentsAnswer>(&call, PROBE).await)?;
        Ok(())
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        if !is_run_id(run_id) {
            return Err(self.not_found(run_id));
        }
        let call = Call {
            subject: Subject::Run(run_id),
            method: Method::GET,
            path: "runs/get",
            query: &[("run_id", run_id)],
            body: None,
        };
        let patience = self.transport.patience();
        let answer: RunAnswer = settle(self.transport.call(&call, patience).await)?;
        let run = Run::from(answer.run.info);
        // Some databases compare without regard to case: only its own name is a run's name.
        if run.run_id != run_id {
            return Err(self.not_found(run_id));
        }
        Ok(run)
    }

    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<Experiment>> {
        let body = json!({
            "max_results": EXPERIMENTS_PER_PAGE,
            "view_type": "ACTIVE_ONLY",
            "order_by": ["experiment_id ASC"],
            "page_token": token.unwrap_or_default(),
        });
        let subject = Subject::Experiments;
        let answer = self.search(subject, "experiments/search", body).await;
        let answer: ExperimentsAnswer = settle(answer)?;
        Ok(page(answer.experiments, answer.next_page_token))
    }

    async fn experiment(&self, name: &str) -> TrackingResult<Experiment> {
        let subject = Subject::Experiment(name);
        let query = [("experiment_name", name)];
        let answer: ExperimentAnswer = self.get(subject, "experiments/get-by-name", &query).await?;
        // Some databases compare without regard to case.
        let found = Some(answer.experiment).filter(ExperimentDocument::is_active);
        let found = found.map(Experiment::from).filter(|it| it.name == name);
        found.ok_or_else(|| self.nothing(subject.to_string()))
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let mut index = self.page_size.load(Ordering::Relaxed);
        let answer = loop {
            let maximum = RUNS_PER_PAGE[index];
            let answer = self.search_runs(experiments, token, maximum).await;
            if matches!(answer, Err(Failure::TooLarge(_))) && index + 1 < RUNS_PER_PAGE.len() {
                // The token says where the page begins, not how long it is.
                index += 1;
                self.page_size.fetch_max(index, Ordering::Relaxed);
                continue;
            }
            break settle(answer)?;
        };
        let runs = answer.runs.into_iter().map(|run| Run::from(run.info));
        Ok(Page {
            // What is no run id could not be looked up again, and might be no file name either.
            items: runs.filter(|run| is_run_id(&run.run_id)).collect(),
            next: answer.next_page_token.filter(|token| !token.is_empty()),
        })
    }

    async fn runs_named(&self, experiment: &str, name: &str) -> TrackingResult<Vec<Run>> {
        let Some(name_in_quotes) = quoted(name) else {
            let experiments = [experiment.to_owned()];
            return self.runs_picked(&experiments, name).await;
        };
        let body = json!({
            "experiment_ids": [experiment],
            "run_view_type": "ACTIVE_ONLY",
            "max_results": RUNS_PER_PAGE[0],
            "order_by": ["start_time ASC", "run_id ASC"],
            "filter": format!("attributes.run_name = {name_in_quotes}"),
        });
        let answer = self.search(Subject::Runs, "runs/search", body).await;
        let answer: RunsAnswer = settle(answer)?;
        let runs = answer.runs.into_iter().map(|run| Run::from(run.info));
        // Some databases compare without regard to case.
        Ok(runs
            .filter(|run| run.run_name == name && is_run_id(&run.run_id))
            .collect())
    }

    async fn logged_model(&self, model_id: &str) -> TrackingResult<LoggedModel> {
        let subject = Subject::LoggedModel(model_id);
        if !LoggedModel::is_id(model_id) {
            return Err(self.nothing(subject.to_string()));
        }
        let path = format!("logged-models/{model_id}");
        let answer: LoggedModelAnswer = self.get(subject, &path, &[]).await?;
        let model = LoggedModel::from(answer.model);
        let found = Some(model).filter(|model| model.model_id == model_id);
        found.ok_or_else(|| self.nothing(subject.to_string()))
    }

    async fn logged_models(
        &self,
        experiments: &[String],
        token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        match self.search_models(experiments, None, token).await {
            // Servers before MLflow 3 have none.
            Err(TrackingError::NotFound { .. }) if token.is_none() => Ok(Page::default()),
            answer => answer,
        }
    }

    async fn models_of_run(
        &self,
        experiment: &str,
        run_id: &str,
    ) -> TrackingResult<Vec<LoggedModel>> {
        let filter = quoted(run_id).map(|run_id| format!("source_run_id = {run_id}"));
        let Some(filter) = filter else {
            return Ok(Vec::new());
        };
        let experiments = [experiment.to_owned()];
        let mut models = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let (filter, from) = (Some(filter.clone()), token.as_deref());
            let page = self.search_models(&experiments, filter, from).await?;
            models.extend(page.items);
            // A server that answers with the token it was asked with would be asked for ever.
            if page.next.is_none() || page.next == token {
                return Ok(models);
            }
            token = page.next;
        }
    }

    async fn registered_model(&self, name: &str) -> TrackingResult<RegisteredModel> {
        let subject = Subject::RegisteredModel(name);
        let query = [("name", name)];
        let answer: RegisteredModelAnswer =
            self.get(subject, "registered-models/get", &query).await?;
        let model = RegisteredModel::from(answer.registered_model);
        let found = Some(model).filter(|model| model.name == name);
        found.ok_or_else(|| self.nothing(subject.to_string()))
    }

    async fn registered_models(
        &self,
        token: Option<&str>,
    ) -> TrackingResult<Page<RegisteredModel>> {
        let most = MODELS_PER_PAGE.to_string();
        let mut query = vec![("max_results", most.as_str()), ("order_by", "name ASC")];
        query.extend(token.map(|token| ("page_token", token)));
        let subject = Subject::RegisteredModels;
        let answer: RegisteredModelsAnswer = self
            .get(subject, "registered-models/search", &query)
            .await?;
        Ok(page(answer.registered_models, answer.next_page_token))
    }

    async fn alias(&self, name: &str, alias: &str) -> TrackingResult<String> {
        let subject = Subject::Alias(name, alias);
        let query = [("name", name), ("alias", alias)];
        let answer: ModelVersionAnswer =
            self.get(subject, "registered-models/alias", &query).await?;
        Ok(answer.model_version.version().to_owned())
    }

    async fn model_version(&self, name: &str, version: &str) -> TrackingResult<ModelVersion> {
        let subject = Subject::Version(name, version);
        let query = [("name", name), ("version", version)];
        let answer: ModelVersionAnswer = self.get(subject, "model-versions/get", &query).await?;
        let found = Some(answer.model_version)
            .filter(|found| !found.is_deleted() && found.version() == version);
        let found = found.map(ModelVersion::from);
        found.ok_or_else(|| self.nothing(subject.to_string()))
    }

    async fn model_versions(
        &self,
        name: &str,
        token: Option<&str>,
    ) -> TrackingResult<Page<ModelVersion>> {
        let subject = Subject::Versions(name);
        let Some(quoted_name) = quoted(name) else {
            return Err(TrackingError::Protocol {
                server: self.name().to_owned(),
                what: subject.to_string(),
                detail: "a name with both quotes cannot be searched for".to_owned(),
            });
        };
        let filter = format!("name = {quoted_name}");
        let most = VERSIONS_PER_PAGE.to_string();
        let mut query = vec![
            ("filter", filter.as_str()),
            ("max_results", &most),
            ("order_by", "version_number ASC"),
        ];
        query.extend(token.map(|token| ("page_token", token)));
        let answer: ModelVersionsAnswer =
            self.get(subject, "model-versions/search", &query).await?;
        let versions = answer.model_versions.into_iter();
        let versions = versions.filter(|version| !version.is_deleted());
        Ok(page(versions.collect(), answer.next_page_token))
    }

    async fn version_location(&self, name: &str, version: &str) -> TrackingResult<String> {
        let subject = Subject::Version(name, version);
        let query = [("name", name), ("version", version)];
        let path = "model-versions/get-download-uri";
        let answer: LocationAnswer = self.get(subject, path, &query).await?;
        Ok(answer.artifact_uri)
    }

    async fn run_document(&self, run_id: &str) -> TrackingResult<Value> {
        if !is_run_id(run_id) {
            return Err(self.not_found(run_id));
        }
        let query = [("run_id", run_id)];
        let answer: Value = self.get(Subject::Run(run_id), "runs/get", &query).await?;
        Ok(answer["run"].clone())
    }

    async fn model_document(&self, model_id: &str) -> TrackingResult<Value> {
        let subject = Subject::LoggedModel(model_id);
        if !LoggedModel::is_id(model_id) {
            return Err(self.nothing(subject.to_string()));
        }
        let path = format!("logged-models/{model_id}");
        let answer: Value = self.get(subject, &path, &[]).await?;
        Ok(answer["model"].clone())
    }

    async fn create_experiment(&self, name: &str) -> TrackingResult<Experiment> {
        self.make_experiment(name).await
    }

    async fn create_run(&self, experiment: &str, name: &str) -> TrackingResult<Run> {
        self.make_run(experiment, name).await
    }

    async fn end_run(&self, run_id: &str, status: &str) -> TrackingResult<()> {
        self.finish_run(run_id, status).await
    }

    async fn create_logged_model(&self, run: &Run, name: &str) -> TrackingResult<LoggedModel> {
        self.make_logged_model(run, name).await
    }

    async fn finish_logged_model(&self, model_id: &str, ready: bool) -> TrackingResult<()> {
        self.mark_logged_model(model_id, ready).await
    }
}

/// What a page of documents says.
fn page<D, T: From<D>>(documents: Vec<D>, next: Option<String>) -> Page<T> {
    Page {
        items: documents.into_iter().map(T::from).collect(),
        next: next.filter(|token| !token.is_empty()),
    }
}

/// A text as MLflow's filters take one; `None` where they cannot say it.
fn quoted(text: &str) -> Option<String> {
    let is_plain = |letter: char| !letter.is_control() && letter != '\\';
    let quote = match (text.contains('\''), text.contains('"')) {
        (false, _) => '\'',
        (true, false) => '"',
        (true, true) => return None,
    };
    text.chars()
        .all(is_plain)
        .then(|| format!("{quote}{text}{quote}"))
}

/// What can be a run id; anything else is not asked for.
pub(super) fn is_run_id(text: &str) -> bool {
    (1..=LONGEST_RUN_ID).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests;
