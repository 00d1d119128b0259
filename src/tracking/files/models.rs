//! Logged models and the model registry in MLflow's folders: `<experiment>/models/<model id>`, and
//! `models/<name>` with a folder for each version and a file for each alias.

use serde::Deserialize;

use super::{
    FileTracking, PER_PAGE, Trouble, first_line, is_absence, names, read_meta, read_small,
};
use crate::tracking::wire::since_1970;
use crate::tracking::{
    Lifecycle, LoggedModel, ModelVersion, Page, RegisteredModel, Tracking, TrackingResult,
};

/// The folder of an experiment's logged models, and beside the experiments that of the registry.
pub(super) const MODELS: &str = "models";
const ALIASES: &str = "aliases";
const VERSION: &str = "version-";
/// What MLflow calls the stage of a version that was deleted.
const DELETED: &str = "Deleted_Internal";

/// A logged model as its file has it.
#[derive(Deserialize)]
pub(super) struct LoggedMeta {
    pub model_id: String,
    pub name: String,
    pub experiment_id: String,
    pub artifact_location: String,
    #[serde(default)]
    pub source_run_id: Option<String>,
    #[serde(default)]
    pub model_type: Option<String>,
    #[serde(default)]
    pub status: Option<i64>,
    pub creation_timestamp: Option<u64>,
    pub last_updated_timestamp: Option<u64>,
    #[serde(default)]
    lifecycle_stage: Option<String>,
}

#[derive(Deserialize)]
struct RegisteredMeta {
    name: String,
    last_updated_timestamp: Option<u64>,
}

#[derive(Deserialize)]
struct VersionMeta {
    version: u64,
    #[serde(default)]
    source: Option<String>,
    #[serde(default)]
    storage_location: Option<String>,
    #[serde(default)]
    run_id: Option<String>,
    #[serde(default)]
    current_stage: Option<String>,
    last_updated_timestamp: Option<u64>,
}

impl From<LoggedMeta> for LoggedModel {
    fn from(meta: LoggedMeta) -> Self {
        Self {
            model_id: meta.model_id,
            name: meta.name,
            experiment_id: meta.experiment_id,
            artifact_uri: meta.artifact_location,
            created: meta.creation_timestamp.and_then(since_1970),
            modified: meta.last_updated_timestamp.and_then(since_1970),
        }
    }
}

impl FileTracking {
    /// A logged model that is not deleted.
    pub(super) fn find_logged(&self, model_id: &str) -> TrackingResult<LoggedMeta> {
        let what = format!("logged model {model_id}");
        if LoggedModel::is_id(model_id) {
            for experiment in self.active_experiments()? {
                let read = self.read_logged(&experiment, model_id);
                if let Some(model) = self.told(&what, read)? {
                    return Ok(model);
                }
            }
        }
        Err(self.nothing(what))
    }

    fn read_logged(&self, experiment: &str, model_id: &str) -> Result<LoggedMeta, Trouble> {
        let folder = self.folder.join(experiment).join(MODELS).join(model_id);
        let meta: LoggedMeta = read_meta(&folder)?;
        if meta.model_id != model_id {
            return Err(Trouble::Text("it describes another model".to_owned()));
        }
        let stage = meta.lifecycle_stage.as_deref().unwrap_or_default();
        if Lifecycle::of(stage) == Lifecycle::Deleted {
            return Err(Trouble::None);
        }
        Ok(meta)
    }

    pub(super) fn page_of_logged(
        &self,
        experiments: &[String],
        token: Option<&str>,
    ) -> TrackingResult<Page<LoggedModel>> {
        self.page_of(experiments, MODELS, token, |experiment, model_id| {
            if !LoggedModel::is_id(model_id) {
                return None;
            }
            let read = self.read_logged(experiment, model_id);
            let model = self.listed(&format!("logged model {model_id}"), read);
            model.map(LoggedModel::from)
        })
    }

    /// What a run has logged, in the order in which it was made.
    pub(super) fn logged_by(
        &self,
        experiment: &str,
        run_id: &str,
    ) -> TrackingResult<Vec<LoggedModel>> {
        let folder = self.folder.join(experiment).join(MODELS);
        let ids = self.names_in(&folder)?.into_iter();
        let models = ids.filter(|id| LoggedModel::is_id(id)).filter_map(|id| {
            let read = self.read_logged(experiment, &id);
            self.listed(&format!("logged model {id}"), read)
        });
        let of_run = models.filter(|model| model.source_run_id.as_deref() == Some(run_id));
        let mut found: Vec<LoggedModel> = of_run.map(LoggedModel::from).collect();
        found.sort_by_key(|model| model.created);
        Ok(found)
    }

    pub(super) fn find_registered(&self, name: &str) -> TrackingResult<RegisteredModel> {
        let what = format!("registered model {name:?}");
        let found = self.told(&what, self.read_registered(name))?;
        found.ok_or_else(|| self.nothing(what))
    }

    fn read_registered(&self, name: &str) -> Result<RegisteredModel, Trouble> {
        if !is_component(name) {
            return Err(Trouble::None);
        }
        let folder = self.folder.join(MODELS).join(name);
        let meta: RegisteredMeta = read_meta(&folder)?;
        if meta.name != name {
            return Err(Trouble::Text("it describes another model".to_owned()));
        }
        let aliases = match names(&folder.join(ALIASES)) {
            Err(error) if is_absence(&error) => Vec::new(),
            aliases => aliases.map_err(Trouble::File)?,
        };
        let aliases = aliases.into_iter().filter_map(|alias| {
            let version = self.read_alias(name, &alias);
            let version = self.listed(&format!("alias {alias:?} of model {name:?}"), version);
            Some((alias, version?))
        });
        Ok(RegisteredModel {
            name: meta.name,
            aliases: aliases.collect(),
            modified: meta.last_updated_timestamp.and_then(since_1970),
        })
    }

    /// Registered models behind the one that `token` names, in the order of their names.
    pub(super) fn page_of_registered(
        &self,
        token: Option<&str>,
    ) -> TrackingResult<Page<RegisteredModel>> {
        let mut items = Vec::new();
        for name in self.names_in(&self.folder.join(MODELS))? {
            if token.is_some_and(|after| *name <= *after) {
                continue;
            }
            let read = self.read_registered(&name);
            items.extend(self.listed(&format!("registered model {name:?}"), read));
            if items.len() >= PER_PAGE {
                let next = Some(name);
                return Ok(Page { items, next });
            }
        }
        Ok(Page { items, next: None })
    }

    pub(super) fn find_alias(&self, name: &str, alias: &str) -> TrackingResult<String> {
        let what = format!("alias {alias:?} of model {name:?}");
        let found = self.told(&what, self.read_alias(name, alias))?;
        found.ok_or_else(|| self.nothing(what))
    }

    fn read_alias(&self, name: &str, alias: &str) -> Result<String, Trouble> {
        if !is_component(name) || !is_component(alias) {
            return Err(Trouble::None);
        }
        let folder = self.folder.join(MODELS).join(name);
        let text = read_small(&folder.join(ALIASES).join(alias))?;
        let version = text.trim();
        match version.parse::<u64>() {
            Ok(_) => Ok(version.to_owned()),
            Err(_) => Err(Trouble::Text(format!(
                "{:?} is no version",
                first_line(version)
            ))),
        }
    }

    /// A version, and where its files lie.
    pub(super) fn find_version(
        &self,
        name: &str,
        version: &str,
    ) -> TrackingResult<(ModelVersion, String)> {
        let what = format!("version {version} of model {name:?}");
        let read = match ModelVersion::number(version) {
            Some(number) => self.read_version(name, number),
            None => Err(Trouble::None),
        };
        self.told(&what, read)?.ok_or_else(|| self.nothing(what))
    }

    fn read_version(&self, name: &str, number: u64) -> Result<(ModelVersion, String), Trouble> {
        if !is_component(name) {
            return Err(Trouble::None);
        }
        let folder = self.folder.join(MODELS).join(name);
        let meta: VersionMeta = read_meta(&folder.join(format!("{VERSION}{number}")))?;
        if meta.version != number {
            return Err(Trouble::Text("it describes another version".to_owned()));
        }
        if meta.current_stage.as_deref() == Some(DELETED) {
            return Err(Trouble::None);
        }
        let version = ModelVersion {
            version: number.to_string(),
            source: meta.source.unwrap_or_default(),
            run_id: meta.run_id.unwrap_or_default(),
            modified: meta.last_updated_timestamp.and_then(since_1970),
        };
        let location = meta.storage_location.filter(|told| !told.is_empty());
        let location = location.unwrap_or_else(|| version.source.clone());
        Ok((version, location))
    }

    /// All versions of a registered model, the first one first.
    pub(super) fn versions(&self, name: &str) -> TrackingResult<Vec<ModelVersion>> {
        if !is_component(name) {
            return Ok(Vec::new());
        }
        let folders = self.names_in(&self.folder.join(MODELS).join(name))?;
        let numbers = folders.iter().filter_map(|folder| {
            let number = folder.strip_prefix(VERSION)?;
            number.parse::<u64>().ok()
        });
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        let versions = numbers.into_iter().filter_map(|number| {
            let what = format!("version {number} of model {name:?}");
            Some(self.listed(&what, self.read_version(name, number))?.0)
        });
        Ok(versions.collect())
    }
}

/// Whether a name is one of something in a folder, and leads nowhere else.
fn is_component(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}
