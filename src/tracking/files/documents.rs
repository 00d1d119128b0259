//! Runs and logged models as MLflow's server describes them, from its folders: a file for each
//! parameter, tag and metric.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde_json::{Value, json};

use super::models::{LoggedMeta, MODELS};
use super::{FileTracking, is_absence, plain};
use crate::tracking::documents::{model_status, number, run_info};
use crate::tracking::{Run, TrackingResult};

impl FileTracking {
    pub(super) fn describe_run(&self, run: &Run) -> TrackingResult<Value> {
        let folder = self.folder.join(&run.experiment_id).join(&run.run_id);
        let metrics = self.each(&folder.join("metrics"), |key, path| {
            Ok(latest(path)?.map(|(step, timestamp, value)| {
                json!({"key": key, "value": number(value), "timestamp": timestamp, "step": step})
            }))
        })?;
        Ok(json!({
            "info": run_info(run),
            "data": {
                "metrics": metrics,
                "params": self.pairs(&folder.join("params"))?,
                "tags": self.pairs(&folder.join("tags"))?,
            },
        }))
    }

    pub(super) fn describe_model(&self, model: &LoggedMeta) -> TrackingResult<Value> {
        let folder = self.folder.join(&model.experiment_id).join(MODELS);
        let folder = folder.join(&model.model_id);
        Ok(json!({
            "info": {
                "model_id": model.model_id,
                "name": model.name,
                "experiment_id": model.experiment_id,
                "artifact_uri": model.artifact_location,
                "status": model_status(model.status),
                "model_type": model.model_type,
                "source_run_id": model.source_run_id,
                "creation_timestamp_ms": model.creation_timestamp,
                "last_updated_timestamp_ms": model.last_updated_timestamp,
                "tags": self.pairs(&folder.join("tags"))?,
            },
            "data": {"params": self.pairs(&folder.join("params"))?},
        }))
    }

    /// Keys and values, of a folder with a file for each.
    fn pairs(&self, folder: &Path) -> TrackingResult<Vec<Value>> {
        self.each(folder, |key, path| {
            let value = fs::read_to_string(path)?;
            Ok(Some(json!({"key": key, "value": value})))
        })
    }

    /// What `read` finds in each file below a folder, in the order of their names, which may have
    /// slashes. What goes away meanwhile is left out.
    fn each(
        &self,
        folder: &Path,
        read: impl Fn(&str, &Path) -> io::Result<Option<Value>>,
    ) -> TrackingResult<Vec<Value>> {
        let mut keys = Vec::new();
        let mut folders = vec![String::new()];
        while let Some(inner) = folders.pop() {
            for name in self.names_in(&folder.join(&inner))? {
                let key = match inner.as_str() {
                    "" => name,
                    inner => format!("{inner}/{name}"),
                };
                match folder.join(&key).is_dir() {
                    true => folders.push(key),
                    false => keys.push(key),
                }
            }
        }
        keys.sort();
        let mut found = Vec::new();
        for key in keys {
            match read(&key, &folder.join(&key)) {
                Ok(value) => found.extend(value),
                Err(error) if is_absence(&error) => {}
                Err(error) => return Err(self.unavailable(format!("{key}: {}", plain(&error)))),
            }
        }
        Ok(found)
    }
}

/// Step, time and value that count of a metric, of which each line has one: those of the last step.
fn latest(path: &Path) -> io::Result<Option<(i64, i64, f64)>> {
    let mut latest: Option<(i64, i64, f64)> = None;
    for line in BufReader::new(File::open(path)?).lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let timestamp = words.next().and_then(|word| word.parse().ok());
        let value = words.next().and_then(|word| word.parse().ok());
        let (Some(timestamp), Some(value)) = (timestamp, value) else {
            continue;
        };
        let step = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let line = (step, timestamp, value);
        if latest.is_none_or(|latest| latest <= line || latest.2.is_nan()) {
            latest = Some(line);
        }
    }
    Ok(latest)
}
