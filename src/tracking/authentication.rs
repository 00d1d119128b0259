//! Who we are to the tracking server.
//!
//! The order is that of MLflow's client: AWS signatures, where they are asked for, override all;
//! then basic authentication, if both user and password are known; then a bearer token. User and
//! password each come from the environment, else from `~/.mlflow/credentials`. Credentials inside
//! the tracking URI go before those, as they do in the HTTP library of MLflow's client.

use std::fmt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;
use reqwest::header::HeaderValue;
use url::Url;

use super::credentials_file;
use super::settings::{SettingError, Variables};

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
    /// AWS Signature Version 4 for the service `execute-api`, with the default credential chain.
    AwsSignature {
        /// `None`: the one of the AWS configuration.
        region: Option<String>,
    },
}

impl fmt::Debug for Authentication {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::None => "None",
            Self::Basic { .. } => "Basic",
            Self::Bearer(_) => "Bearer",
            Self::AwsSignature { .. } => "AwsSignature",
        })
    }
}

impl Authentication {
    /// Chooses by the URI's user information, the environment and the credentials file.
    pub(super) fn choose(
        url: &Url,
        variables: &Variables<'_>,
        home: Option<&Path>,
    ) -> Result<Self, SettingError> {
        if variables.boolean("MLFLOW_TRACKING_AWS_SIGV4")? {
            let region = variables
                .text("AWS_REGION")
                .or_else(|| variables.text("AWS_DEFAULT_REGION"));
            return Ok(Self::AwsSignature { region });
        }
        if let Some(plugin) = variables.text("MLFLOW_TRACKING_AUTH") {
            return Err(SettingError::new(format!(
                "MLFLOW_TRACKING_AUTH: the plugin {plugin:?} runs in Python only; unset it and \
                 set MLFLOW_TRACKING_TOKEN to a token of its making"
            )));
        }
        if let Some(password) = url.password() {
            return Ok(Self::Basic {
                username: decode(url.username()),
                password: decode(password),
            });
        }
        let file = home.map(credentials_file::read).transpose()?;
        let file = file.unwrap_or_default();
        let in_url = Some(decode(url.username())).filter(|username| !username.is_empty());
        let username = in_url
            .or_else(|| variables.text("MLFLOW_TRACKING_USERNAME"))
            .or(file.username);
        let password = variables.text("MLFLOW_TRACKING_PASSWORD").or(file.password);
        let token = variables.text("MLFLOW_TRACKING_TOKEN");
        Ok(match (username, password, token) {
            (Some(username), Some(password), _) => Self::Basic { username, password },
            (_, _, Some(token)) => Self::Bearer(token),
            _ => Self::None,
        })
    }

    /// The value of `Authorization`, marked so that no library prints it; `None` where there is
    /// none or where each request has its own.
    pub(super) fn header(&self) -> Result<Option<HeaderValue>, SettingError> {
        let text = match self {
            Self::None | Self::AwsSignature { .. } => return Ok(None),
            Self::Basic { username, password } => {
                format!(
                    "Basic {}",
                    STANDARD.encode(format!("{username}:{password}"))
                )
            }
            Self::Bearer(token) => format!("Bearer {token}"),
        };
        let mut value = HeaderValue::from_str(&text).map_err(|_| {
            SettingError::new(
                "MLFLOW_TRACKING_TOKEN: holds a character that no HTTP header can (a line break?)",
            )
        })?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// What to do about a 401.
    pub(super) fn remedy(&self) -> &'static str {
        match self {
            Self::None => {
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or \
                 MLFLOW_TRACKING_TOKEN"
            }
            Self::Basic { .. } => {
                "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or \
                 ~/.mlflow/credentials"
            }
            Self::Bearer(_) => "renew MLFLOW_TRACKING_TOKEN",
            Self::AwsSignature { .. } => "check the AWS credentials, their region and the clock",
        }
    }
}

fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(uri: &str, pairs: &[(&str, &str)], home: Option<&Path>) -> Authentication {
        let lookup = |name: &str| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let url = Url::parse(uri).unwrap();
        Authentication::choose(&url, &Variables::new(&lookup), home).unwrap()
    }

    fn home_with(text: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".mlflow")).unwrap();
        std::fs::write(home.path().join(".mlflow/credentials"), text).unwrap();
        home
    }

    fn basic(authentication: &Authentication) -> (&str, &str) {
        match authentication {
            Authentication::Basic { username, password } => (username, password),
            other => panic!("{other:?}"),
        }
    }

    const USER: (&str, &str) = ("MLFLOW_TRACKING_USERNAME", "u");
    const PASSWORD: (&str, &str) = ("MLFLOW_TRACKING_PASSWORD", "p");
    const TOKEN: (&str, &str) = ("MLFLOW_TRACKING_TOKEN", "t");

    #[test]
    fn basic_authentication_goes_before_a_token_if_both_its_parts_are_known() {
        let both = choose("http://host", &[USER, PASSWORD, TOKEN], None);
        assert_eq!(basic(&both), ("u", "p"));
        let half = choose("http://host", &[USER, TOKEN], None);
        assert!(matches!(half, Authentication::Bearer(token) if token == "t"));
        assert!(matches!(
            choose("http://host", &[USER], None),
            Authentication::None
        ));
    }

    #[test]
    fn the_environment_goes_before_the_file_field_by_field() {
        let home =
            home_with("[mlflow]\nmlflow_tracking_username = a\nmlflow_tracking_password = b\n");
        let mixed = choose("http://host", &[USER], Some(home.path()));
        assert_eq!(basic(&mixed), ("u", "b"));
        let filed = choose("http://host", &[TOKEN], Some(home.path()));
        assert_eq!(basic(&filed), ("a", "b"));
    }

    #[test]
    fn credentials_in_the_uri_are_decoded_and_go_first() {
        let found = choose("http://a%40b:p%2Fw@host/", &[USER, PASSWORD], None);
        assert_eq!(basic(&found), ("a@b", "p/w"));
    }

    #[test]
    fn aws_signatures_override_all_and_take_their_region_from_the_environment() {
        let sigv4 = ("MLFLOW_TRACKING_AWS_SIGV4", "True");
        let pairs = [USER, PASSWORD, sigv4, ("AWS_DEFAULT_REGION", "eu-west-1")];
        let found = choose("http://host", &pairs, None);
        assert!(
            matches!(found, Authentication::AwsSignature { region: Some(region) }
            if region == "eu-west-1")
        );
    }

    #[test]
    fn the_header_is_marked_as_a_secret_and_a_token_that_fits_no_header_is_refused() {
        let header = choose("http://host", &[TOKEN], None).header().unwrap();
        let header = header.unwrap();
        assert_eq!(header.to_str().unwrap(), "Bearer t");
        assert!(header.is_sensitive());
        let refused = Authentication::Bearer("two\nlines".to_owned()).header();
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("MLFLOW_TRACKING_TOKEN") && !message.contains("lines"));
    }
}
