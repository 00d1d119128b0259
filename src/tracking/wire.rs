//! The documents of MLflow's REST API 2.0, as far as a mount looks at them.

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::Value;

use super::{Lifecycle, Run};

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
}

#[derive(Deserialize)]
pub(super) struct ExperimentsAnswer {
    #[serde(default)]
    pub experiments: Vec<ExperimentDocument>,
    pub next_page_token: Option<String>,
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
