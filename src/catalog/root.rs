//! Whose artifact root it is.

use std::sync::Arc;
use std::time::SystemTime;

use super::naming;
use crate::tracking::LoggedModel;

/// The directory of everything about models, below the mount point.
pub const MODELS: &str = "models";
/// That of experiments.
pub const EXPERIMENTS: &str = "experiments";

/// What has an artifact root of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RootId {
    Run(Arc<str>),
    /// A logged model.
    Model(Arc<str>),
    /// A version of a registered model whose files lie neither in a run nor in a logged model.
    Version {
        model: Arc<str>,
        version: Arc<str>,
    },
}

impl RootId {
    pub fn run(run_id: &str) -> Self {
        Self::Run(run_id.into())
    }

    pub fn model(model_id: &str) -> Self {
        Self::Model(model_id.into())
    }

    /// Whose root a path below the mount point begins with, if it begins with one.
    pub fn of_path(path: &str) -> Option<Self> {
        let mut names = path.split('/');
        match names.next()? {
            MODELS => {
                let name = names.next()?;
                if LoggedModel::is_id(name) {
                    return Some(Self::model(name));
                }
                let model = naming::decode(name)?;
                Some(Self::Version {
                    model: model.into(),
                    version: names.next()?.into(),
                })
            }
            EXPERIMENTS => None,
            name if name.is_empty() || name.starts_with('.') => None,
            run_id => Some(Self::run(run_id)),
        }
    }

    /// What it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Run(_) => "run",
            Self::Model(_) | Self::Version { .. } => "model",
        }
    }

    /// The last name of its path.
    pub fn name(&self) -> &Arc<str> {
        match self {
            Self::Run(id) | Self::Model(id) | Self::Version { version: id, .. } => id,
        }
    }
}

/// For messages.
impl std::fmt::Display for RootId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Run(id) => write!(formatter, "run {id}"),
            Self::Model(id) => write!(formatter, "logged model {id}"),
            Self::Version { model, version } => {
                write!(formatter, "version {version} of model {model:?}")
            }
        }
    }
}

/// An artifact root as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootEntry {
    pub id: RootId,
    pub created: SystemTime,
    pub modified: SystemTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_tells_whose_root_it_is_in() {
        let model = format!("m-{}", "0".repeat(32));
        assert_eq!(RootId::of_path("abc/x"), Some(RootId::run("abc")));
        let path = format!("models/{model}/data/x");
        assert_eq!(RootId::of_path(&path), Some(RootId::model(&model)));
        let version = RootId::Version {
            model: ".odd".into(),
            version: "3".into(),
        };
        assert_eq!(RootId::of_path("models/%2Eodd/3/x"), Some(version));
        assert_eq!(RootId::of_path("models/name"), None);
        assert_eq!(RootId::of_path("experiments/x"), None);
        assert_eq!(RootId::of_path(""), None);
        assert_eq!(RootId::of_path(".mlfs/status"), None);
    }
}
