//! How the tracking server is reached: MLflow's own variables and credentials file.
//!
//! Sources: MLflow's documentation of its environment variables, and the behaviour of its 3.17
//! client where that says less.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use super::authentication::Authentication;

/// What `MLFLOW_HTTP_REQUEST_TIMEOUT` is when it is not set; MLflow's own default.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// What `MLFLOW_HTTP_REQUEST_MAX_RETRIES` is when it is not set; MLflow's own default.
const RETRIES: u32 = 7;
/// The most that MLflow takes for it.
const MOST_RETRIES: u64 = 10;
/// A call is given up after this long, retries and pauses included, whatever the two above say:
/// somebody waits in `ls`. A server that is away for longer is EIO, not a hanging terminal.
const LONGEST_CALL: Duration = Duration::from_secs(30);

/// Everything that tells how to talk to one tracking server. `Debug` shows no secret.
#[derive(Clone, Debug)]
pub struct TrackingSettings {
    /// The server with its path prefix; without credentials, query and fragment.
    pub url: Url,
    pub authentication: Authentication,
    /// Sent as `X-MLFLOW-WORKSPACE`.
    pub workspace: Option<String>,
    pub insecure_tls: bool,
    /// A PEM file of certificate authorities; only these are trusted.
    pub server_certificate: Option<PathBuf>,
    /// A PEM file with the client's certificate and key.
    pub client_certificate: Option<PathBuf>,
    /// The longest that one attempt may take.
    pub request_timeout: Duration,
    /// Attempts after the first.
    pub retries: u32,
    /// The longest that all attempts of one call may take together.
    pub longest_call: Duration,
}

/// A setting that cannot be obeyed; tells what to change.
#[derive(Debug)]
pub struct SettingError(String);

impl SettingError {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for SettingError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for SettingError {}

/// Typed access to the environment. A variable that is set to nothing counts as unset.
pub(super) struct Variables<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Variables<'a> {
    pub fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup }
    }

    pub fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// False when unset. Takes what MLflow takes, and as MLflow refuses the rest: a `yes` that
    /// silently meant no would leave requests unsigned.
    pub fn boolean(&self, name: &str) -> Result<bool, SettingError> {
        let Some(text) = self.text(name) else {
            return Ok(false);
        };
        match text.to_lowercase().as_str() {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(SettingError(format!(
                "{name}: {text:?} is not true or false"
            ))),
        }
    }

    /// The workspace that is to be shown.
    pub fn workspace(&self) -> Option<String> {
        self.text("MLFLOW_WORKSPACE")
            .map(|workspace| workspace.trim().to_owned())
            .filter(|workspace| !workspace.is_empty())
    }

    pub fn number(&self, name: &str) -> Result<Option<u64>, SettingError> {
        let parse = |text: String| {
            text.parse()
                .map_err(|_| SettingError(format!("{name}: {text:?} is not a whole number")))
        };
        self.text(name).map(parse).transpose()
    }
}

impl TrackingSettings {
    /// Settings for `uri`, with the rest from the environment (through `variable`) and from the
    /// credentials file below `home`.
    ///
    /// # Errors
    /// A URI that no server has, a value that is none, settings that exclude each other.
    pub fn new(
        uri: &str,
        variable: impl Fn(&str) -> Option<String>,
        home: Option<&Path>,
    ) -> Result<Self, SettingError> {
        let variables = Variables::new(&variable);
        let mut url = server_url(uri)?;
        let authentication = Authentication::choose(&url, &variables, home)?;
        // Both fail only for URLs without a host, which server_url has refused.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        let insecure_tls = variables.boolean("MLFLOW_TRACKING_INSECURE_TLS")?;
        let path = |name: &str| variables.text(name).map(PathBuf::from);
        let server_certificate = path("MLFLOW_TRACKING_SERVER_CERT_PATH");
        if insecure_tls && server_certificate.is_some() {
            return Err(SettingError::new(
                "MLFLOW_TRACKING_INSECURE_TLS and MLFLOW_TRACKING_SERVER_CERT_PATH exclude each \
                 other: unset one of them",
            ));
        }
        Ok(Self {
            url,
            authentication,
            workspace: variables.workspace(),
            insecure_tls,
            server_certificate,
            client_certificate: path("MLFLOW_TRACKING_CLIENT_CERT_PATH"),
            request_timeout: match variables.number("MLFLOW_HTTP_REQUEST_TIMEOUT")? {
                Some(seconds) => Duration::from_secs(seconds.max(1)),
                None => REQUEST_TIMEOUT,
            },
            retries: match variables.number("MLFLOW_HTTP_REQUEST_MAX_RETRIES")? {
                Some(retries) => u32::try_from(retries.min(MOST_RETRIES)).unwrap_or(RETRIES),
                None => RETRIES,
            },
            longest_call: LONGEST_CALL,
        })
    }
}

/// The server that `uri` names. Messages hold the scheme and nothing else of it: what does not
/// parse may have a password anywhere.
fn server_url(uri: &str) -> Result<Url, SettingError> {
    let uri = uri.trim();
    let scheme = uri.split_once(':').map_or("", |(scheme, _)| scheme);
    match scheme.to_ascii_lowercase().as_str() {
        "http" | "https" => {}
        "databricks" | "databricks-uc" | "uc" => {
            return Err(SettingError::new(
                "Databricks' managed tracking server is not supported; give the http(s) URI of an \
                 MLflow server with --tracking-uri or MLFLOW_TRACKING_URI",
            ));
        }
        database if is_database(database) => {
            return Err(SettingError::new(format!(
                "tracking URI with the scheme {database}: mlfs asks the MLflow server, not its \
                 database; give the server's http(s) URI"
            )));
        }
        _ => {
            return Err(SettingError::new(
                "the tracking URI has a scheme that is not supported; give the http(s) URI of an \
                 MLflow server, like http://host:5000, sqlite:///mlflow.db or a folder",
            ));
        }
    }
    let url = Url::parse(uri).map_err(|error| {
        SettingError::new(format!(
            "the tracking URI is malformed ({error}); give one like http://host:5000"
        ))
    })?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(SettingError::new(
            "the tracking URI has a query or a fragment; give one like http://host:5000/prefix",
        ));
    }
    Ok(url)
}

/// MLflow's databases, with or without a driver (`mysql+pymysql`).
fn is_database(scheme: &str) -> bool {
    let dialect = scheme.split('+').next().unwrap_or(scheme);
    matches!(dialect, "postgresql" | "postgres" | "mysql" | "mssql")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(uri: &str, pairs: &[(&str, &str)]) -> Result<TrackingSettings, SettingError> {
        let lookup = |name: &str| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        TrackingSettings::new(uri, lookup, None)
    }

    fn refusal(uri: &str, pairs: &[(&str, &str)]) -> String {
        settings(uri, pairs).unwrap_err().to_string()
    }

    #[test]
    fn no_secret_shows_in_debug_output_or_in_the_url() {
        let pairs = [("MLFLOW_TRACKING_TOKEN", "hidden-token")];
        for found in [
            settings("http://user:hidden-password@host:5000/prefix", &[]).unwrap(),
            settings("http://host", &pairs).unwrap(),
        ] {
            assert!(!format!("{found:?}").contains("hidden"));
            assert!(!found.url.as_str().contains("user"));
        }
    }

    #[test]
    fn a_uri_that_does_not_parse_is_refused_without_showing_its_password() {
        for uri in [
            "http://user:hidden@host:port",
            "http://user:hidden@",
            "user:hidden@host",
            "postgresql+psycopg2://user:hidden@host/db",
            "http://user:hidden@host/?x",
        ] {
            let message = refusal(uri, &[]);
            assert!(!message.contains("hidden"), "{message}");
            assert!(message.contains("give"), "{message}");
        }
    }

    #[test]
    fn each_kind_of_uri_that_is_no_server_says_what_to_give_instead() {
        let told = |uri| refusal(uri, &[]);
        assert!(told("databricks://profile").contains("Databricks"));
        assert!(told("mysql+pymysql://host/db").contains("database"));
        assert!(told("ftp://host").contains("http(s)"));
    }

    #[test]
    fn values_that_are_none_and_settings_that_exclude_each_other_are_refused() {
        let tls = [
            ("MLFLOW_TRACKING_INSECURE_TLS", "true"),
            ("MLFLOW_TRACKING_SERVER_CERT_PATH", "/ca.pem"),
        ];
        assert!(refusal("https://host", &tls).contains("exclude"));
        for (name, value) in [
            ("MLFLOW_TRACKING_AWS_SIGV4", "yes"),
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"),
            ("MLFLOW_TRACKING_AUTH", "kubernetes"),
        ] {
            assert!(refusal("http://host", &[(name, value)]).contains(name));
        }
    }

    #[test]
    fn limits_are_mlflows_own_unless_set() {
        let plain = settings("http://host", &[("MLFLOW_HTTP_REQUEST_TIMEOUT", "")]).unwrap();
        assert_eq!((plain.request_timeout, plain.retries), (REQUEST_TIMEOUT, 7));
        let set = [
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "9"),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1000"),
            ("MLFLOW_WORKSPACE", " team "),
        ];
        let set = settings("http://host", &set).unwrap();
        assert_eq!(set.request_timeout, Duration::from_secs(9));
        assert_eq!(u64::from(set.retries), MOST_RETRIES);
        assert_eq!(set.workspace.as_deref(), Some("team"));
    }
}
