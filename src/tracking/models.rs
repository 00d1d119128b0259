//! Logged models, registered models and their versions.

use std::time::SystemTime;

/// Letters and digits of a logged model's id behind its `m-`.
const ID_LENGTH: usize = 32;

/// A model as a run logged it; its files have an artifact root of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedModel {
    pub model_id: String,
    pub name: String,
    pub experiment_id: String,
    pub artifact_uri: String,
    pub created: Option<SystemTime>,
    pub modified: Option<SystemTime>,
}

impl LoggedModel {
    /// Whether a text can be the id of one, as MLflow tells ids from names of registered models.
    pub fn is_id(text: &str) -> bool {
        text.strip_prefix("m-").is_some_and(|id| {
            id.len() == ID_LENGTH && id.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
    }
}

/// A name in the model registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredModel {
    pub name: String,
    /// Each with the version that it names.
    pub aliases: Vec<(String, String)>,
    pub modified: Option<SystemTime>,
}

/// A version of a registered model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelVersion {
    pub version: String,
    /// What it was made from: `models:/m-…`, `runs:/…`, or an artifact URI.
    pub source: String,
    /// Empty where no run made it.
    pub run_id: String,
    pub modified: Option<SystemTime>,
}

impl ModelVersion {
    /// The number of a version, if a text is one as MLflow writes it: `01` is none.
    pub(super) fn number(text: &str) -> Option<u64> {
        let number = text.parse::<u64>().ok();
        number.filter(|number| number.to_string() == text)
    }
}
