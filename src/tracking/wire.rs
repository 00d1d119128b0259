//! The documents of MLflow's REST API 2.0, as far as a mount looks at them.

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::Value;

use super::{Experiment, Lifecycle, LoggedModel, ModelVersion, RegisteredModel, Run};

#[derive(Deserialize)]
pub(super) struct RunInfo {
    pub run_id: String,
    #[serde(default)]
    run_name: String,
    experiment_id: String,
    #[serde(default)]
    artifact_uri: String,
    #[serde(default)]
    lifecycle_stage: String,
    #[serde(default)]
    status: String,
    start_time: Option<Value>,
    end_time: Option<Value>,
}

/// A run; its parameters, metrics and tags are skipped while parsing.
#[derive(Deserialize)]
pub(super) struct RunDocument {
    pub info: RunInfo,
}

#[derive(Deserialize)]
pub(super) struct RunAnswer {
    pub run: RunDocument,
}

/// An empty result is `{}`.
#[derive(Deserialize)]
pub(super) struct RunsAnswer {
    #[serde(default)]
    pub runs: Vec<RunDocument>,
    pub next_page_token: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct ExperimentDocument {
    pub experiment_id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    lifecycle_stage: String,
    last_update_time: Option<Value>,
}

#[derive(Deserialize)]
pub(super) struct ExperimentAnswer {
    pub experiment: ExperimentDocument,
}

#[derive(Deserialize)]
pub(super) struct ExperimentsAnswer {
    #[serde(default)]
    pub experiments: Vec<ExperimentDocument>,
    pub next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct LoggedModelInfo {
    model_id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    experiment_id: String,
    #[serde(default)]
    artifact_uri: String,
    creation_timestamp_ms: Option<Value>,
    last_updated_timestamp_ms: Option<Value>,
}

/// A logged model; its parameters, metrics and tags are skipped while parsing.
#[derive(Deserialize)]
pub(super) struct LoggedModelDocument {
    info: LoggedModelInfo,
}

#[derive(Deserialize)]
pub(super) struct LoggedModelAnswer {
    pub model: LoggedModelDocument,
}

#[derive(Deserialize)]
pub(super) struct LoggedModelsAnswer {
    #[serde(default)]
    pub models: Vec<LoggedModelDocument>,
    pub next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct AliasDocument {
    alias: String,
    version: String,
}

#[derive(Deserialize)]
pub(super) struct RegisteredModelDocument {
    name: String,
    #[serde(default)]
    aliases: Vec<AliasDocument>,
    last_updated_timestamp: Option<Value>,
}

#[derive(Deserialize)]
pub(super) struct RegisteredModelAnswer {
    pub registered_model: RegisteredModelDocument,
}

#[derive(Deserialize)]
pub(super) struct RegisteredModelsAnswer {
    #[serde(default)]
    pub registered_models: Vec<RegisteredModelDocument>,
    pub next_page_token: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct ModelVersionDocument {
    version: String,
    #[serde(default)]
    source: String,
    #[serde(default)]
    run_id: String,
    #[serde(default)]
    current_stage: String,
    last_updated_timestamp: Option<Value>,
}

#[derive(Deserialize)]
pub(super) struct ModelVersionAnswer {
    pub model_version: ModelVersionDocument,
}

#[derive(Deserialize)]
pub(super) struct ModelVersionsAnswer {
    #[serde(default)]
    pub model_versions: Vec<ModelVersionDocument>,
    pub next_page_token: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct LocationAnswer {
    pub artifact_uri: String,
}

impl ExperimentDocument {
    pub fn is_active(&self) -> bool {
        Lifecycle::of(&self.lifecycle_stage) == Lifecycle::Active
    }
}

impl From<ExperimentDocument> for Experiment {
    fn from(told: ExperimentDocument) -> Self {
        Self {
            modified: told.last_update_time.as_ref().and_then(milliseconds),
            experiment_id: told.experiment_id,
            name: told.name,
        }
    }
}

impl From<LoggedModelDocument> for LoggedModel {
    fn from(LoggedModelDocument { info }: LoggedModelDocument) -> Self {
        Self {
            created: info.creation_timestamp_ms.as_ref().and_then(milliseconds),
            modified: info
                .last_updated_timestamp_ms
                .as_ref()
                .and_then(milliseconds),
            model_id: info.model_id,
            name: info.name,
            experiment_id: info.experiment_id,
            artifact_uri: info.artifact_uri,
        }
    }
}

impl From<RegisteredModelDocument> for RegisteredModel {
    fn from(told: RegisteredModelDocument) -> Self {
        let aliases = told.aliases.into_iter();
        Self {
            modified: told.last_updated_timestamp.as_ref().and_then(milliseconds),
            aliases: aliases.map(|it| (it.alias, it.version)).collect(),
            name: told.name,
        }
    }
}

impl ModelVersionDocument {
    /// MLflow keeps deleted versions, in a stage of this name.
    pub fn is_deleted(&self) -> bool {
        self.current_stage == "Deleted_Internal"
    }

    pub fn version(&self) -> &str {
        &self.version
    }
}

impl From<ModelVersionDocument> for ModelVersion {
    fn from(told: ModelVersionDocument) -> Self {
        Self {
            modified: told.last_updated_timestamp.as_ref().and_then(milliseconds),
            version: told.version,
            source: told.source,
            run_id: told.run_id,
        }
    }
}

impl From<RunInfo> for Run {
    fn from(info: RunInfo) -> Self {
        Self {
            lifecycle: Lifecycle::of(&info.lifecycle_stage),
            start_time: info.start_time.as_ref().and_then(milliseconds),
            end_time: info.end_time.as_ref().and_then(milliseconds),
            run_id: info.run_id,
            run_name: info.run_name,
            experiment_id: info.experiment_id,
            artifact_uri: info.artifact_uri,
            status: info.status,
        }
    }
}

/// Protobuf's own JSON writes 64-bit numbers as strings.
fn milliseconds(value: &Value) -> Option<SystemTime> {
    since_1970(value.as_u64().or_else(|| value.as_str()?.parse().ok())?)
}

/// Of milliseconds, as MLflow keeps times; 0 is "not set".
pub(super) fn since_1970(milliseconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_millis(milliseconds))
        .filter(|_| milliseconds > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_or_strings_and_nothing_where_unset() {
        let at = |text: &str| milliseconds(&serde_json::from_str(text).unwrap());
        let expected = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        assert_eq!(at("1700000000123"), Some(expected));
        assert_eq!(at("\"1700000000123\""), Some(expected));
        for unset in ["0", "-1", "null", "\"\"", "18446744073709551615000"] {
            assert_eq!(at(unset), None, "{unset}");
        }
    }
}
