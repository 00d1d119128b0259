//! Where MLflow's metadata comes from: a server, a local database, or a folder of files.
//!
//! With nothing said it is what MLflow's 3.17 client takes: the folder `mlruns` where that holds
//! experiments, else the database `mlflow.db`, both in the working directory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Tracking;
use super::courier::ArtifactCourier;
use super::files::{self, FileTracking};
use super::rest::RestTracking;
use super::settings::{SettingError, TrackingSettings, Variables};
use super::sqlite::SqliteTracking;
use crate::store::local::LocalUri;
use crate::store::proxy::Courier;

/// The folder MLflow keeps files in when it is told of no other.
const DEFAULT_FILES: &str = "mlruns";
/// The database it makes otherwise.
const DEFAULT_DATABASE: &str = "mlflow.db";

/// A source of metadata that was chosen and not asked yet.
#[derive(Clone, Debug)]
pub enum TrackingSource {
    Server(Box<TrackingSettings>),
    /// A SQLite database, and the workspace to show, if only one.
    Database {
        path: PathBuf,
        workspace: Option<String>,
    },
    /// A folder of experiments, runs and their `meta.yaml`.
    Files(PathBuf),
}

impl TrackingSource {
    /// The source that `uri` names; without one what lies in `folder`, the working directory. The
    /// rest comes from the environment (through `variable`) and, for a server, from the credentials
    /// file below `home`.
    ///
    /// # Errors
    /// A URI of no source, nothing in the folder, settings that cannot be obeyed.
    pub fn choose(
        uri: Option<&str>,
        folder: &Path,
        variable: impl Fn(&str) -> Option<String>,
        home: Option<&Path>,
    ) -> Result<Self, SettingError> {
        let uri = uri.map(str::trim).filter(|uri| !uri.is_empty());
        let workspace = Variables::new(&variable).workspace();
        let Some(uri) = uri else {
            return Self::found_in(folder, workspace);
        };
        if let Some(path) = database(uri)? {
            let path = folder.join(path);
            return Ok(Self::Database { path, workspace });
        }
        if let Some(path) = files(uri)? {
            return Ok(Self::Files(tidy(&folder.join(path))));
        }
        let settings = TrackingSettings::new(uri, variable, home)?;
        Ok(Self::Server(Box::new(settings)))
    }

    fn found_in(folder: &Path, workspace: Option<String>) -> Result<Self, SettingError> {
        let files = folder.join(DEFAULT_FILES);
        if files::holds_experiments(&files) {
            return Ok(Self::Files(files));
        }
        let path = folder.join(DEFAULT_DATABASE);
        if path.is_file() {
            return Ok(Self::Database { path, workspace });
        }
        Err(SettingError::new(format!(
            "no tracking server: set MLFLOW_TRACKING_URI or give --tracking-uri, such as \
             http://localhost:5000; without one mlfs looks for MLflow's own files, and there is \
             neither {DEFAULT_DATABASE} nor {DEFAULT_FILES} with experiments in {}",
            folder.display()
        )))
    }

    /// The way to its server for artifacts, if it is one.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn courier(&self) -> Result<Option<Arc<dyn Courier>>, SettingError> {
        let Self::Server(settings) = self else {
            return Ok(None);
        };
        let courier = ArtifactCourier::new(settings.as_ref().clone())?;
        Ok(Some(Arc::new(courier)))
    }

    /// Opens the source; asks it for nothing.
    ///
    /// # Errors
    /// A certificate file that cannot be used, a token or workspace that fits no header.
    pub fn open(self) -> Result<Arc<dyn Tracking>, SettingError> {
        Ok(match self {
            Self::Server(settings) => Arc::new(RestTracking::new(*settings)?),
            Self::Database { path, workspace } => Arc::new(SqliteTracking::new(path, workspace)),
            Self::Files(folder) => Arc::new(FileTracking::new(folder)),
        })
    }
}

/// The file of a SQLite URI as SQLAlchemy reads it: `sqlite:///relative`, `sqlite:////absolute`.
fn database(uri: &str) -> Result<Option<PathBuf>, SettingError> {
    let Some((scheme, rest)) = uri.split_once(':') else {
        return Ok(None);
    };
    let dialect = scheme.split('+').next().unwrap_or(scheme);
    if !dialect.eq_ignore_ascii_case("sqlite") {
        return Ok(None);
    }
    let rest = rest.split('?').next().unwrap_or_default();
    let path = rest.strip_prefix("///").unwrap_or_default();
    if path.is_empty() || path == ":memory:" {
        return Err(SettingError::new(
            "the tracking URI names no database file; give one like sqlite:///mlflow.db \
             (relative) or sqlite:////srv/mlflow.db (absolute)",
        ));
    }
    Ok(Some(PathBuf::from(path)))
}

/// The folder of a path, or of a `file` URI of this machine.
fn files(uri: &str) -> Result<Option<PathBuf>, SettingError> {
    match LocalUri::parse(uri) {
        // A server's address without its scheme, perhaps with a password in it.
        LocalUri::Path(_) if uri.contains('@') && !uri.starts_with(['/', '.']) => Ok(None),
        LocalUri::Path(path) => Ok(Some(path)),
        LocalUri::Elsewhere => Err(SettingError::new(
            "the tracking URI names files of another machine; give file:///folder or a path",
        )),
        LocalUri::Other => Ok(None),
    }
}

/// Without `.` components, which a name for messages does not need.
fn tidy(path: &Path) -> PathBuf {
    path.components().collect()
}

/// What an error of the file system says, and what to do.
pub(super) fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "no such file or directory; name another with --tracking-uri or \
                                    MLFLOW_TRACKING_URI"
                .to_owned()
        }
        io::ErrorKind::PermissionDenied => "no permission to read it".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(uri: Option<&str>, folder: &Path) -> Result<TrackingSource, SettingError> {
        TrackingSource::choose(uri, folder, |_| None, None)
    }

    fn path_of(uri: &str) -> PathBuf {
        match choose(Some(uri), Path::new("/home/me")).unwrap() {
            TrackingSource::Database { path, .. } | TrackingSource::Files(path) => path,
            TrackingSource::Server(settings) => panic!("{uri}: {}", settings.url),
        }
    }

    #[test]
    fn local_uris_name_files_as_mlflow_reads_them() {
        for (uri, path) in [
            ("sqlite:///mlflow.db", "/home/me/mlflow.db"),
            ("sqlite:////srv/my.db?timeout=3", "/srv/my.db"),
            ("sqlite+pysqlite:///x.db", "/home/me/x.db"),
            ("./mlruns", "/home/me/mlruns"),
            ("mlruns", "/home/me/mlruns"),
            ("/srv/ml:runs", "/srv/ml:runs"),
            ("file:///srv/my%20runs", "/srv/my runs"),
            ("file://localhost/srv/runs", "/srv/runs"),
            ("file:runs", "/home/me/runs"),
        ] {
            assert_eq!(path_of(uri), Path::new(path), "{uri}");
        }
    }

    #[test]
    fn what_names_no_source_is_refused_without_its_password_shown() {
        for uri in [
            "sqlite://",
            "sqlite:///",
            "sqlite:///:memory:",
            "file://host/srv",
            "user:hidden@host",
            "postgresql://user:hidden@host/db",
        ] {
            let message = choose(Some(uri), Path::new("/home/me")).unwrap_err();
            let message = message.to_string();
            assert!(message.contains("give"), "{message}");
            assert!(!message.contains("hidden"), "{message}");
        }
    }

    #[test]
    fn with_nothing_said_it_is_what_lies_in_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let message = choose(None, folder.path()).unwrap_err().to_string();
        assert!(message.contains("MLFLOW_TRACKING_URI"), "{message}");
        std::fs::write(folder.path().join("mlflow.db"), b"").unwrap();
        let found = choose(Some(" "), folder.path()).unwrap();
        assert!(matches!(found, TrackingSource::Database { .. }));
        // Where the database's runs have their artifacts; there is no experiment's file in it.
        let run = folder.path().join("mlruns/0");
        std::fs::create_dir_all(&run).unwrap();
        let found = choose(None, folder.path()).unwrap();
        assert!(matches!(found, TrackingSource::Database { .. }));
        std::fs::write(run.join("meta.yaml"), b"").unwrap();
        let found = choose(None, folder.path()).unwrap();
        assert!(matches!(found, TrackingSource::Files(_)));
    }
}
