//! What descriptions of runs and models have in common, wherever they are read from.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Run;

/// A run, in MLflow's own words.
pub(super) fn run_info(run: &Run) -> Value {
    let milliseconds = |time: Option<SystemTime>| {
        let since = time?.duration_since(UNIX_EPOCH).ok()?;
        Some(since.as_millis() as u64)
    };
    json!({
        "run_id": run.run_id,
        "run_name": run.run_name,
        "experiment_id": run.experiment_id,
        "status": run.status,
        "start_time": milliseconds(run.start_time),
        "end_time": milliseconds(run.end_time),
        "artifact_uri": run.artifact_uri,
        "lifecycle_stage": "active",
    })
}

/// MLflow's word for a number of its protocol.
pub(super) fn model_status(number: Option<i64>) -> &'static str {
    match number {
        Some(1) => "LOGGED_MODEL_PENDING",
        Some(2) => "LOGGED_MODEL_READY",
        Some(3) => "LOGGED_MODEL_UPLOAD_FAILED",
        _ => "LOGGED_MODEL_STATUS_UNSPECIFIED",
    }
}

/// The value of a metric; what JSON has no numbers for, as the server writes it.
pub(super) fn number(value: f64) -> Value {
    if value.is_nan() {
        json!("NaN")
    } else if value.is_infinite() {
        json!(if value > 0.0 { "Infinity" } else { "-Infinity" })
    } else {
        json!(value)
    }
}
