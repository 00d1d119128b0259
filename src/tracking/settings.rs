//! How the tracking server is reached: MLflow's own variables and credentials file.
//!
//! Sources: MLflow's documentation of its environment variables, and its client's order of
//! precedence (environment over `~/.mlflow/credentials`, field by field; basic authentication
//! over a token).

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

/// What `MLFLOW_HTTP_REQUEST_TIMEOUT` is when it is not set; MLflow's own default.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// What `MLFLOW_HTTP_REQUEST_MAX_RETRIES` is when it is not set; MLflow's own default.
const RETRIES: u32 = 7;

/// How requests are authenticated. Shows no secret in `Debug`.
#[derive(Clone, Default)]
pub enum Authentication {
    #[default]
    None,
    Basic {
        username: String,
        password: String,
    },
    Bearer(String),
}

impl fmt::Debug for Authentication {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::None => "None",
            Self::Basic { .. } => "Basic",
            Self::Bearer(_) => "Bearer",
        })
    }
}

#[derive(Clone, Debug)]
pub struct TrackingSettings {
    /// The server with its path prefix; without credentials.
    pub url: Url,
    pub authentication: Authentication,
    pub workspace: Option<String>,
    pub insecure_tls: bool,
    /// A PEM file of certificate authorities.
    pub server_certificate: Option<PathBuf>,
    /// A PEM file with the client's certificate and key.
    pub client_certificate: Option<PathBuf>,
    pub request_timeout: Duration,
    pub retries: u32,
}

/// A setting that cannot be obeyed; tells what to change.
#[derive(Debug)]
pub struct SettingError(String);

impl fmt::Display for SettingError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for SettingError {}

impl TrackingSettings {
    /// Settings for `uri`, with the rest from the environment (through `variable`) and from the
    /// credentials file below `home`.
    pub fn new(
        uri: &str,
        variable: impl Fn(&str) -> Option<String>,
        home: Option<&Path>,
    ) -> Result<Self, SettingError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let is_true = |name: &str| {
            set(name).is_some_and(|value| matches!(value.to_lowercase().as_str(), "true" | "1"))
        };
        let mut url = server_url(uri)?;
        let authentication = authentication(&url, &set, home)?;
        let _ = url.set_username("");
        let _ = url.set_password(None);
        if is_true("MLFLOW_TRACKING_AWS_SIGV4") {
            return Err(SettingError(
                "MLFLOW_TRACKING_AWS_SIGV4: signing requests to the tracking server is not \
                 supported yet; unset it and use MLFLOW_TRACKING_TOKEN or basic authentication"
                    .to_owned(),
            ));
        }
        let insecure_tls = is_true("MLFLOW_TRACKING_INSECURE_TLS");
        let server_certificate = set("MLFLOW_TRACKING_SERVER_CERT_PATH").map(PathBuf::from);
        if insecure_tls && server_certificate.is_some() {
            return Err(SettingError(
                "MLFLOW_TRACKING_INSECURE_TLS and MLFLOW_TRACKING_SERVER_CERT_PATH exclude each \
                 other: unset one of them"
                    .to_owned(),
            ));
        }
        Ok(Self {
            url,
            authentication,
            workspace: set("MLFLOW_WORKSPACE"),
            insecure_tls,
            server_certificate,
            client_certificate: set("MLFLOW_TRACKING_CLIENT_CERT_PATH").map(PathBuf::from),
            request_timeout: match number(&set, "MLFLOW_HTTP_REQUEST_TIMEOUT")? {
                Some(seconds) => Duration::from_secs(seconds.max(1)),
                None => REQUEST_TIMEOUT,
            },
            retries: match number(&set, "MLFLOW_HTTP_REQUEST_MAX_RETRIES")? {
                Some(retries) => retries.min(10) as u32,
                None => RETRIES,
            },
        })
    }
}

fn number(set: &impl Fn(&str) -> Option<String>, name: &str) -> Result<Option<u64>, SettingError> {
    let Some(text) = set(name) else {
        return Ok(None);
    };
    let parsed = text.parse();
    parsed
        .map(Some)
        .map_err(|_| SettingError(format!("{name}: {text:?} is not a whole number")))
}

fn server_url(uri: &str) -> Result<Url, SettingError> {
    let url = Url::parse(uri).map_err(|error| {
        SettingError(format!(
            "tracking URI {uri:?}: {error}; give one like http://host:5000"
        ))
    })?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(url),
        "postgresql" | "mysql" | "mssql" => Err(SettingError(format!(
            "tracking URI with the scheme {}: mlfs asks the MLflow server, not its database; \
             give the server's http(s) URI",
            url.scheme()
        ))),
        scheme => Err(SettingError(format!(
            "tracking URI with the scheme {scheme}: only http and https servers are supported \
             yet; start `mlflow server` and give its URI with --tracking-uri or \
             MLFLOW_TRACKING_URI"
        ))),
    }
}

fn authentication(
    url: &Url,
    set: &impl Fn(&str) -> Option<String>,
    home: Option<&Path>,
) -> Result<Authentication, SettingError> {
    let from_file = credentials_file(home)?;
    let decode = |text: &str| {
        percent_encoding::percent_decode_str(text)
            .decode_utf8_lossy()
            .into()
    };
    let in_url = (!url.username().is_empty()).then(|| decode(url.username()));
    let username = in_url
        .or_else(|| set("MLFLOW_TRACKING_USERNAME"))
        .or(from_file.0);
    let password = url
        .password()
        .map(decode)
        .or_else(|| set("MLFLOW_TRACKING_PASSWORD"))
        .or(from_file.1);
    Ok(match (username, password, set("MLFLOW_TRACKING_TOKEN")) {
        (Some(username), Some(password), _) => Authentication::Basic { username, password },
        (_, _, Some(token)) => Authentication::Bearer(token),
        _ => Authentication::None,
    })
}

/// User and password of `~/.mlflow/credentials`, section `[mlflow]`.
fn credentials_file(home: Option<&Path>) -> Result<(Option<String>, Option<String>), SettingError> {
    let Some(path) = home.map(|home| home.join(".mlflow").join("credentials")) else {
        return Ok((None, None));
    };
    if !path.exists() {
        return Ok((None, None));
    }
    let text = std::fs::read_to_string(&path).map_err(|error| {
        SettingError(format!(
            "{}: {error}; make it readable or remove it",
            path.display()
        ))
    })?;
    let get = |key: &str| value_in_section(&text, "[mlflow]", key);
    Ok((
        get("mlflow_tracking_username"),
        get("mlflow_tracking_password"),
    ))
}

/// The value of `key` in one section of an INI file. (Two keys of one section do not earn a
/// library with six dependencies.)
fn value_in_section(text: &str, section: &str, key: &str) -> Option<String> {
    let lines = text.lines().map(str::trim);
    lines
        .skip_while(|line| *line != section)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.starts_with(['#', ';']))
        .filter_map(|line| line.split_once(['=', ':']))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(uri: &str, pairs: &[(&str, &str)]) -> Result<TrackingSettings, SettingError> {
        let lookup = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        TrackingSettings::new(uri, lookup, None)
    }

    #[test]
    fn basic_authentication_goes_before_a_token_and_shows_in_no_message() {
        let both = settings(
            "http://host:5000/prefix",
            &[
                ("MLFLOW_TRACKING_USERNAME", "u"),
                ("MLFLOW_TRACKING_PASSWORD", "secret"),
                ("MLFLOW_TRACKING_TOKEN", "token"),
            ],
        )
        .unwrap();
        assert!(matches!(both.authentication, Authentication::Basic { .. }));
        assert!(!format!("{both:?}").contains("secret"));
        let in_url = settings("http://u:secret@host/", &[]).unwrap();
        assert!(matches!(
            in_url.authentication,
            Authentication::Basic { .. }
        ));
        assert!(!in_url.url.as_str().contains("secret"));
    }

    #[test]
    fn credentials_come_from_the_file_where_the_environment_has_none() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".mlflow")).unwrap();
        let text = "[mlflow]\nmlflow_tracking_username = a\nmlflow_tracking_password = b\n";
        std::fs::write(home.path().join(".mlflow/credentials"), text).unwrap();
        let found = TrackingSettings::new("http://host", |_| None, Some(home.path())).unwrap();
        assert!(matches!(found.authentication,
            Authentication::Basic { username, password } if username == "a" && password == "b"));
    }

    #[test]
    fn what_cannot_be_obeyed_says_what_to_do() {
        let tls = [
            ("MLFLOW_TRACKING_INSECURE_TLS", "true"),
            ("MLFLOW_TRACKING_SERVER_CERT_PATH", "/ca.pem"),
        ];
        assert!(
            settings("https://host", &tls)
                .unwrap_err()
                .to_string()
                .contains("exclude")
        );
        for uri in ["sqlite:///mlflow.db", "postgresql://h/db", "nonsense"] {
            assert!(settings(uri, &[]).unwrap_err().to_string().contains("give"));
        }
    }
}
