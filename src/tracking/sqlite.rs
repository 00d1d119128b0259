//! MLflow's own SQLite database, read directly while MLflow may be writing to it.
//!
//! Each question opens the file anew: it may be replaced while a mount lives, and opening it takes
//! less than a millisecond. Nothing is ever written. Tables as of MLflow 1.0 to 3.17.

mod documents;
mod models;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rusqlite::types::Value as Bound;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, params_from_iter};

use serde_json::Value;

use super::rest::is_run_id;
use super::source::plain;
use super::wire::since_1970;
use super::{
    Experiment, Lifecycle, LoggedModel, ModelVersion, Page, RegisteredModel, Run, Tracking,
    TrackingError, TrackingResult,
};

/// How long a question waits for a writer to end its transaction.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Rows of one page.
const PER_PAGE: i64 = 1000;

/// A database of this machine.
#[derive(Debug)]
pub struct SqliteTracking {
    path: PathBuf,
    name: String,
    /// Only experiments of this one are shown, where the database knows of workspaces.
    workspace: Option<String>,
}

impl SqliteTracking {
    /// The database at `path`, which must be absolute. Nothing is opened yet.
    pub fn new(path: PathBuf, workspace: Option<String>) -> Self {
        Self {
            name: format!("sqlite:///{}", path.display()),
            path,
            workspace,
        }
    }

    /// Asks in a thread that may wait.
    async fn ask<T: Send + 'static>(
        &self,
        what: &str,
        question: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> TrackingResult<T> {
        let path = self.path.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(path, flags)?;
            connection.busy_timeout(LONGEST_WAIT)?;
            question(&connection)
        });
        match asked.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.explain(what, &error)),
            Err(error) => Err(self.unavailable(error.to_string())),
        }
    }

    fn explain(&self, what: &str, error: &rusqlite::Error) -> TrackingError {
        match error.sqlite_error_code() {
            Some(ErrorCode::CannotOpen) => {
                // SQLite does not say why.
                let cause = std::fs::File::open(&self.path).err();
                self.unavailable(cause.map_or_else(|| error.to_string(), |it| plain(&it)))
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                self.unavailable(format!("somebody else writes to it: {error}"))
            }
            Some(ErrorCode::ReadOnly) => self.unavailable(format!(
                "whoever wrote to it was interrupted; let MLflow open it once ({error})"
            )),
            Some(ErrorCode::SystemIoFailure | ErrorCode::OutOfMemory) => {
                self.unavailable(error.to_string())
            }
            Some(ErrorCode::NotADatabase) => self.protocol(what, "this is no SQLite database"),
            _ if error.to_string().contains("no such table") => {
                self.protocol(what, "this is no database of MLflow's")
            }
            _ => self.protocol(what, &error.to_string()),
        }
    }

    fn unavailable(&self, detail: String) -> TrackingError {
        TrackingError::Unavailable {
            server: self.name.clone(),
            detail,
        }
    }

    fn protocol(&self, what: &str, detail: &str) -> TrackingError {
        TrackingError::Protocol {
            server: self.name.clone(),
            what: what.to_owned(),
            detail: detail.to_owned(),
        }
    }
}

#[async_trait]
impl Tracking for SqliteTracking {
    fn name(&self) -> &str {
        &self.name
    }

    async fn probe(&self) -> TrackingResult<()> {
        self.experiments(None).await?;
        Ok(())
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        let what = format!("run {run_id}");
        let found = if is_run_id(run_id) {
            let (run_id, workspace) = (run_id.to_owned(), self.workspace.clone());
            self.ask(&what, move |connection| {
                let inside = workspace_of("runs.experiment_id", connection, workspace.as_deref())?;
                let query = format!("{SELECT} WHERE run_uuid = ?1{inside}");
                let bound = [Some(run_id), workspace_if(&inside, workspace)];
                let bound = bound.into_iter().flatten();
                let row = connection.query_row(&query, params_from_iter(bound), run);
                row.optional()
            })
            .await?
        } else {
            None
        };
        found.ok_or_else(|| TrackingError::NotFound {
            server: self.name.clone(),
            what,
        })
    }

    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<Experiment>> {
        let after = row_number(token);
        let workspace = self.workspace.clone();
        let rows: Vec<(i64, Experiment)> = self
            .ask("experiments", move |connection| {
                let inside = workspace_of("experiment_id", connection, workspace.as_deref())?;
                let select = select_experiments(connection)?;
                let query = format!(
                    "{select} AND experiment_id > ?1{inside} ORDER BY experiment_id LIMIT {PER_PAGE}"
                );
                let workspace = workspace_if(&inside, workspace).map(Bound::from);
                let bound = [Some(Bound::from(after)), workspace].into_iter().flatten();
                let mut query = connection.prepare(&query)?;
                let rows = query.query_map(params_from_iter(bound), |row| {
                    Ok((row.get(0)?, experiment(row)?))
                })?;
                rows.collect()
            })
            .await?;
        Ok(Page {
            next: following(&rows, rows.last().map(|(number, _)| number)),
            items: rows.into_iter().map(|(_, experiment)| experiment).collect(),
        })
    }

    async fn experiment(&self, name: &str) -> TrackingResult<Experiment> {
        let what = format!("experiment {name:?}");
        let (name, workspace) = (name.to_owned(), self.workspace.clone());
        let found = self.ask(&what, move |connection| {
            let inside = workspace_of("experiment_id", connection, workspace.as_deref())?;
            let select = select_experiments(connection)?;
            let query = format!("{select} AND name = ?1{inside}");
            let bound = [Some(name), workspace_if(&inside, workspace)];
            let bound = bound.into_iter().flatten();
            let row = connection.query_row(&query, params_from_iter(bound), experiment);
            row.optional()
        });
        found.await?.ok_or_else(|| self.nothing(what))
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let after = row_number(token);
        let experiments: Vec<i64> = experiments
            .iter()
            .filter_map(|experiment| experiment.parse().ok())
            .collect();
        let rows: Vec<(i64, Run)> = self
            .ask("runs", move |connection| {
                let places = vec!["?"; experiments.len()].join(", ");
                // In the order in which they were made: no index has another.
                let query = format!(
                    "{SELECT} WHERE lifecycle_stage = 'active' AND runs.rowid > ? \
                     AND experiment_id IN ({places}) ORDER BY runs.rowid LIMIT {PER_PAGE}"
                );
                let bound = params_from_iter(std::iter::once(&after).chain(&experiments));
                let mut query = connection.prepare(&query)?;
                let rows = query.query_map(bound, |row| Ok((row.get(ROW_NUMBER)?, run(row)?)))?;
                rows.collect()
            })
            .await?;
        let next = following(&rows, rows.last().map(|(number, _)| number));
        let runs = rows.into_iter().map(|(_, run)| run);
        Ok(Page {
            items: runs.filter(|run| is_run_id(&run.run_id)).collect(),
            next,
        })
    }

    async fn runs_named(&self, experiment: &str, name: &str) -> TrackingResult<Vec<Run>> {
        let Ok(experiment) = experiment.parse::<i64>() else {
            return Ok(Vec::new());
        };
        let name = name.to_owned();
        let runs = self.ask("runs", move |connection| {
            let query = format!(
                "{SELECT} WHERE lifecycle_stage = 'active' AND experiment_id = ?1 AND name = ?2 \
                 ORDER BY runs.rowid"
            );
            let mut query = connection.prepare(&query)?;
            let rows = query.query_map((experiment, name), run)?;
            rows.collect::<rusqlite::Result<Vec<Run>>>()
        });
        let mut runs = runs.await?;
        runs.retain(|run| is_run_id(&run.run_id));
        Ok(runs)
    }

    async fn logged_model(&self, model_id: &str) -> TrackingResult<LoggedModel> {
        self.find_logged_model(model_id).await
    }

    async fn logged_models(
        &self,
        experiments: &[String],
        token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        self.page_of_logged_models(experiments, token).await
    }

    async fn models_of_run(
        &self,
        _experiment: &str,
        run_id: &str,
    ) -> TrackingResult<Vec<LoggedModel>> {
        self.logged_by(run_id).await
    }

    async fn registered_model(&self, name: &str) -> TrackingResult<RegisteredModel> {
        self.find_registered_model(name).await
    }

    async fn registered_models(
        &self,
        token: Option<&str>,
    ) -> TrackingResult<Page<RegisteredModel>> {
        self.page_of_registered_models(token).await
    }

    async fn alias(&self, name: &str, alias: &str) -> TrackingResult<String> {
        let model = self.find_registered_model(name).await?;
        let mut aliases = model.aliases.into_iter();
        let found = aliases.find(|(known, _)| known == alias);
        let found = found.map(|(_, version)| version);
        found.ok_or_else(|| self.nothing(format!("alias {alias:?} of model {name:?}")))
    }

    async fn model_version(&self, name: &str, version: &str) -> TrackingResult<ModelVersion> {
        Ok(self.find_version(name, version).await?.0)
    }

    async fn model_versions(
        &self,
        name: &str,
        token: Option<&str>,
    ) -> TrackingResult<Page<ModelVersion>> {
        self.page_of_versions(name, token).await
    }

    async fn version_location(&self, name: &str, version: &str) -> TrackingResult<String> {
        Ok(self.find_version(name, version).await?.1)
    }

    async fn run_document(&self, run_id: &str) -> TrackingResult<Value> {
        let run = self.run(run_id).await?;
        self.describe_run(&run).await
    }

    async fn model_document(&self, model_id: &str) -> TrackingResult<Value> {
        let model = self.find_logged_model(model_id).await?;
        self.describe_model(&model).await
    }
}

/// Active experiments, with the places that [`experiment`] reads.
fn select_experiments(connection: &Connection) -> rusqlite::Result<String> {
    let time = match connection.column_exists(None, "experiments", "last_update_time")? {
        true => "last_update_time",
        false => "NULL",
    };
    Ok(format!(
        "SELECT experiment_id, name, {time} FROM experiments WHERE lifecycle_stage = 'active'"
    ))
}

fn experiment(row: &Row<'_>) -> rusqlite::Result<Experiment> {
    Ok(Experiment {
        experiment_id: row.get::<_, i64>(0)?.to_string(),
        name: row.get(1)?,
        modified: time(row, 2)?,
    })
}

/// A time of a column that may have none.
fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<SystemTime>> {
    let number: Option<i64> = row.get(column)?;
    let number = number.and_then(|number| u64::try_from(number).ok());
    Ok(number.and_then(since_1970))
}

const SELECT: &str = "SELECT run_uuid, name, experiment_id, artifact_uri, lifecycle_stage, status, \
                      start_time, end_time, runs.rowid FROM runs";
/// The column of it that pages are told by.
const ROW_NUMBER: usize = 8;

fn run(row: &Row<'_>) -> rusqlite::Result<Run> {
    let text = |column: usize| -> rusqlite::Result<String> {
        Ok(row.get::<_, Option<String>>(column)?.unwrap_or_default())
    };
    let lifecycle: String = text(4)?;
    Ok(Run {
        run_id: row.get(0)?,
        run_name: text(1)?,
        experiment_id: row.get::<_, Option<i64>>(2)?.unwrap_or(0).to_string(),
        artifact_uri: text(3)?,
        lifecycle: Lifecycle::of(&lifecycle),
        status: text(5)?,
        start_time: time(row, 6)?,
        end_time: time(row, 7)?,
    })
}

/// The condition that an experiment is in a workspace, with a place for its name; nothing where that
/// does not matter. Older databases know of none.
fn workspace_of(
    experiment: &str,
    connection: &Connection,
    workspace: Option<&str>,
) -> rusqlite::Result<String> {
    if workspace.is_none() || !connection.column_exists(None, "experiments", "workspace")? {
        return Ok(String::new());
    }
    Ok(format!(
        " AND {experiment} IN (SELECT experiment_id FROM experiments WHERE workspace = ?2)"
    ))
}

fn workspace_if(condition: &str, workspace: Option<String>) -> Option<String> {
    workspace.filter(|_| !condition.is_empty())
}

fn row_number(token: Option<&str>) -> i64 {
    let number = token.and_then(|token| token.parse().ok());
    number.unwrap_or(i64::MIN)
}

/// The token of the next page, if this one is full.
fn following<T>(page: &[T], last: Option<&i64>) -> Option<String> {
    let last = last.filter(|_| page.len() as i64 >= PER_PAGE);
    last.map(ToString::to_string)
}
