//! Logged models and the model registry in MLflow's database.

use rusqlite::{Connection, OptionalExtension, Row, params_from_iter};

use super::{PER_PAGE, SqliteTracking, following, row_number, time, workspace_of};
use crate::tracking::{LoggedModel, ModelVersion, Page, RegisteredModel, Tracking, TrackingResult};

const LOGGED: &str = "SELECT model_id, name, experiment_id, artifact_location, \
                      creation_timestamp_ms, last_updated_timestamp_ms, rowid FROM logged_models \
                      WHERE lifecycle_stage = 'active'";
/// The column of it that pages are told by.
const ROW_NUMBER: usize = 6;
/// What MLflow calls the stage of a version that was deleted.
const VERSIONS: &str = "SELECT version, source, run_id, last_updated_time, storage_location \
                        FROM model_versions WHERE current_stage != 'Deleted_Internal'";

impl SqliteTracking {
    pub(super) async fn find_logged_model(&self, model_id: &str) -> TrackingResult<LoggedModel> {
        let what = format!("logged model {model_id}");
        let (model_id, workspace) = (model_id.to_owned(), self.workspace.clone());
        let found = self.ask(&what, move |connection| {
            if !connection.table_exists(None, "logged_models")? {
                return Ok(None);
            }
            let inside = workspace_of("experiment_id", connection, workspace.as_deref())?;
            let query = format!("{LOGGED} AND model_id = ?1{inside}");
            let bound = [Some(model_id), workspace.filter(|_| !inside.is_empty())];
            let bound = params_from_iter(bound.into_iter().flatten());
            connection.query_row(&query, bound, logged).optional()
        });
        found.await?.ok_or_else(|| self.nothing(what))
    }

    pub(super) async fn page_of_logged_models(
        &self,
        experiments: &[String],
        token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        let after = row_number(token);
        let experiments = experiments.iter();
        let experiments: Vec<i64> = experiments.filter_map(|id| id.parse().ok()).collect();
        let rows = self.ask("logged models", move |connection| {
            if !connection.table_exists(None, "logged_models")? {
                return Ok(Vec::new());
            }
            let places = vec!["?"; experiments.len()].join(", ");
            let query = format!(
                "{LOGGED} AND rowid > ? AND experiment_id IN ({places}) ORDER BY rowid \
                 LIMIT {PER_PAGE}"
            );
            let bound = params_from_iter(std::iter::once(&after).chain(&experiments));
            let mut query = connection.prepare(&query)?;
            let rows = query.query_map(bound, |row| Ok((row.get(ROW_NUMBER)?, logged(row)?)))?;
            rows.collect::<rusqlite::Result<Vec<(i64, LoggedModel)>>>()
        });
        let rows = rows.await?;
        Ok(Page {
            next: following(&rows, rows.last().map(|(number, _)| number)),
            items: rows.into_iter().map(|(_, model)| model).collect(),
        })
    }

    /// What a run has logged, in the order in which it was made.
    pub(super) async fn logged_by(&self, run_id: &str) -> TrackingResult<Vec<LoggedModel>> {
        let run_id = run_id.to_owned();
        let found = self.ask("logged models", move |connection| {
            if !connection.table_exists(None, "logged_models")? {
                return Ok(Vec::new());
            }
            let query = format!("{LOGGED} AND source_run_id = ?1 ORDER BY creation_timestamp_ms");
            let mut query = connection.prepare(&query)?;
            let rows = query.query_map([run_id], logged)?;
            rows.collect()
        });
        found.await
    }

    pub(super) async fn find_registered_model(
        &self,
        name: &str,
    ) -> TrackingResult<RegisteredModel> {
        let what = format!("registered model {name:?}");
        let (name, workspace) = (name.to_owned(), self.workspace.clone());
        let found = self.ask(&what, move |connection| {
            if !connection.table_exists(None, "registered_models")? {
                return Ok(None);
            }
            let inside = within(connection, "registered_models", workspace.as_deref())?;
            let query = format!(
                "SELECT name, last_updated_time FROM registered_models WHERE name = ?1{inside}"
            );
            let found = connection
                .query_row(&query, [&name], registered)
                .optional()?;
            let Some(mut model) = found else {
                return Ok(None);
            };
            model.aliases = aliases(connection, &name, workspace.as_deref())?;
            Ok(Some(model))
        });
        found.await?.ok_or_else(|| self.nothing(what))
    }

    pub(super) async fn page_of_registered_models(
        &self,
        token: Option<&str>,
    ) -> TrackingResult<Page<RegisteredModel>> {
        let after = token.unwrap_or_default().to_owned();
        let workspace = self.workspace.clone();
        let items = self.ask("registered models", move |connection| {
            if !connection.table_exists(None, "registered_models")? {
                return Ok(Vec::new());
            }
            let inside = within(connection, "registered_models", workspace.as_deref())?;
            let query = format!(
                "SELECT name, last_updated_time FROM registered_models WHERE name > ?1{inside} \
                 ORDER BY name LIMIT {PER_PAGE}"
            );
            let mut query = connection.prepare(&query)?;
            let rows = query.query_map([after], registered)?;
            let mut models = rows.collect::<rusqlite::Result<Vec<RegisteredModel>>>()?;
            for model in &mut models {
                model.aliases = aliases(connection, &model.name, workspace.as_deref())?;
            }
            Ok(models)
        });
        let items = items.await?;
        let last = items.last().filter(|_| items.len() as i64 >= PER_PAGE);
        Ok(Page {
            next: last.map(|model| model.name.clone()),
            items,
        })
    }

    /// A version, and where its files lie.
    pub(super) async fn find_version(
        &self,
        name: &str,
        version: &str,
    ) -> TrackingResult<(ModelVersion, String)> {
        let what = format!("version {version} of model {name:?}");
        let number = ModelVersion::number(version).and_then(|number| i64::try_from(number).ok());
        let Some(number) = number else {
            return Err(self.nothing(what));
        };
        let (name, workspace) = (name.to_owned(), self.workspace.clone());
        let found = self.ask(&what, move |connection| {
            if !connection.table_exists(None, "registered_models")? {
                return Ok(None);
            }
            let inside = within(connection, "model_versions", workspace.as_deref())?;
            let query = format!("{VERSIONS} AND name = ?1 AND version = ?2{inside}");
            let found = connection.query_row(&query, (name, number), |row| {
                let version = self::version(row)?;
                let location: Option<String> = row.get(4)?;
                let location = location.filter(|location| !location.is_empty());
                let location = location.unwrap_or_else(|| version.source.clone());
                Ok((version, location))
            });
            found.optional()
        });
        found.await?.ok_or_else(|| self.nothing(what))
    }

    pub(super) async fn page_of_versions(
        &self,
        name: &str,
        token: Option<&str>,
    ) -> TrackingResult<Page<ModelVersion>> {
        let after = row_number(token);
        let (name, workspace) = (name.to_owned(), self.workspace.clone());
        let items = self.ask("versions", move |connection| {
            if !connection.table_exists(None, "registered_models")? {
                return Ok(Vec::new());
            }
            let inside = within(connection, "model_versions", workspace.as_deref())?;
            let query = format!(
                "{VERSIONS} AND name = ?1 AND version > ?2{inside} ORDER BY version \
                 LIMIT {PER_PAGE}"
            );
            let mut query = connection.prepare(&query)?;
            let rows = query.query_map((name, after), version)?;
            rows.collect::<rusqlite::Result<Vec<ModelVersion>>>()
        });
        let items = items.await?;
        let last = items.last().filter(|_| items.len() as i64 >= PER_PAGE);
        Ok(Page {
            next: last.map(|version| version.version.clone()),
            items,
        })
    }
}

/// The condition that a row of the registry is in a workspace; nothing where that does not matter.
/// Older databases know of none.
fn within(
    connection: &Connection,
    table: &str,
    workspace: Option<&str>,
) -> rusqlite::Result<String> {
    let Some(workspace) = workspace else {
        return Ok(String::new());
    };
    if !connection.column_exists(None, table, "workspace")? {
        return Ok(String::new());
    }
    Ok(format!(
        " AND workspace = '{}'",
        workspace.replace('\'', "''")
    ))
}

fn aliases(
    connection: &Connection,
    name: &str,
    workspace: Option<&str>,
) -> rusqlite::Result<Vec<(String, String)>> {
    // MLflow before 2.3 has none.
    if !connection.table_exists(None, "registered_model_aliases")? {
        return Ok(Vec::new());
    }
    let inside = within(connection, "registered_model_aliases", workspace)?;
    let query = format!(
        "SELECT alias, version FROM registered_model_aliases WHERE name = ?1{inside} ORDER BY alias"
    );
    let mut query = connection.prepare_cached(&query)?;
    let rows = query.query_map([name], |row| {
        Ok((row.get(0)?, row.get::<_, i64>(1)?.to_string()))
    })?;
    rows.collect()
}

fn logged(row: &Row<'_>) -> rusqlite::Result<LoggedModel> {
    Ok(LoggedModel {
        model_id: row.get(0)?,
        name: row.get(1)?,
        experiment_id: row.get::<_, i64>(2)?.to_string(),
        artifact_uri: row.get(3)?,
        created: time(row, 4)?,
        modified: time(row, 5)?,
    })
}

fn registered(row: &Row<'_>) -> rusqlite::Result<RegisteredModel> {
    Ok(RegisteredModel {
        name: row.get(0)?,
        aliases: Vec::new(),
        modified: time(row, 1)?,
    })
}

fn version(row: &Row<'_>) -> rusqlite::Result<ModelVersion> {
    let text = |column: usize| -> rusqlite::Result<String> {
        Ok(row.get::<_, Option<String>>(column)?.unwrap_or_default())
    };
    Ok(ModelVersion {
        version: row.get::<_, i64>(0)?.to_string(),
        source: text(1)?,
        run_id: text(2)?,
        modified: time(row, 3)?,
    })
}
