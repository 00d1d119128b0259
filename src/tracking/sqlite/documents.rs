//! Runs and models as MLflow's server describes them, from its database.

use rusqlite::{Connection, OptionalExtension, Row};
use serde_json::{Value, json};

use super::SqliteTracking;
use crate::tracking::documents::{model_status, number, run_info};
use crate::tracking::{LoggedModel, Run, Tracking, TrackingResult};

impl SqliteTracking {
    pub(super) async fn describe_run(&self, run: &Run) -> TrackingResult<Value> {
        let run_id = run.run_id.clone();
        let data = self.ask("a run", move |connection| {
            let columns = ("run_uuid", "key", "value");
            let params = pairs(connection, "params", columns, &run_id)?;
            let tags = pairs(connection, "tags", columns, &run_id)?;
            let metrics = rows(
                connection,
                "latest_metrics",
                "SELECT key, value, timestamp, step, is_nan FROM latest_metrics \
                 WHERE run_uuid = ?1 ORDER BY key",
                &run_id,
                |row| {
                    let is_nan: Option<bool> = row.get(4)?;
                    let value = match is_nan {
                        Some(true) => number(f64::NAN),
                        _ => json!(row.get::<_, Option<f64>>(1)?.map(number)),
                    };
                    Ok(json!({
                        "key": row.get::<_, String>(0)?,
                        "value": value,
                        "timestamp": row.get::<_, Option<i64>>(2)?,
                        "step": row.get::<_, Option<i64>>(3)?,
                    }))
                },
            )?;
            Ok(json!({"metrics": metrics, "params": params, "tags": tags}))
        });
        let data = data.await?;
        Ok(json!({"info": run_info(run), "data": data}))
    }

    pub(super) async fn describe_model(&self, model: &LoggedModel) -> TrackingResult<Value> {
        let what = format!("logged model {}", model.model_id);
        let model_id = model.model_id.clone();
        let found = self.ask(&what, move |connection| {
            let columns = ("model_id", "param_key", "param_value");
            let params = pairs(connection, "logged_model_params", columns, &model_id)?;
            let columns = ("model_id", "tag_key", "tag_value");
            let tags = pairs(connection, "logged_model_tags", columns, &model_id)?;
            let info = connection.query_row(
                "SELECT model_id, name, experiment_id, artifact_location, status, model_type, \
                 source_run_id, creation_timestamp_ms, last_updated_timestamp_ms \
                 FROM logged_models WHERE model_id = ?1",
                [&model_id],
                |row| {
                    Ok(json!({
                        "model_id": row.get::<_, String>(0)?,
                        "name": row.get::<_, String>(1)?,
                        "experiment_id": row.get::<_, i64>(2)?.to_string(),
                        "artifact_uri": row.get::<_, String>(3)?,
                        "status": model_status(row.get(4)?),
                        "model_type": row.get::<_, Option<String>>(5)?,
                        "source_run_id": row.get::<_, Option<String>>(6)?,
                        "creation_timestamp_ms": row.get::<_, i64>(7)?,
                        "last_updated_timestamp_ms": row.get::<_, i64>(8)?,
                        "tags": tags,
                    }))
                },
            );
            let info = info.optional()?;
            Ok(info.map(|info| json!({"info": info, "data": {"params": params}})))
        });
        found.await?.ok_or_else(|| self.nothing(what))
    }
}

/// Keys and values, in these columns, of a table that has those of many owners.
fn pairs(
    connection: &Connection,
    table: &str,
    (owner, key, value): (&str, &str, &str),
    id: &str,
) -> rusqlite::Result<Value> {
    let query = format!("SELECT {key}, {value} FROM {table} WHERE {owner} = ?1 ORDER BY {key}");
    let found = rows(connection, table, &query, id, |row| {
        Ok(json!({
            "key": row.get::<_, String>(0)?,
            "value": row.get::<_, Option<String>>(1)?,
        }))
    })?;
    Ok(Value::Array(found))
}

/// The rows of a table that an older database may not have.
fn rows(
    connection: &Connection,
    table: &str,
    query: &str,
    id: &str,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<Value>,
) -> rusqlite::Result<Vec<Value>> {
    if !connection.table_exists(None, table)? {
        return Ok(Vec::new());
    }
    let mut query = connection.prepare(query)?;
    query.query_map([id], read)?.collect()
}
