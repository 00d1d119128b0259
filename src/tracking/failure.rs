//! What an answer that is no success means, in the words of [`TrackingError`].

use std::fmt;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::{TrackingError, TrackingSettings};
use crate::http::retry_after;

/// Characters of an answer that is no JSON which go into a message.
const EXCERPT: usize = 160;
/// Bytes of such an answer that are looked at.
const LOOKED_AT: usize = 4096;

/// What a call is about.
#[derive(Clone, Copy, Debug)]
pub(super) enum Subject<'a> {
    Run(&'a str),
    Runs,
    Experiment(&'a str),
    Experiments,
    LoggedModel(&'a str),
    LoggedModels,
    RegisteredModel(&'a str),
    RegisteredModels,
    /// Of a registered model.
    Alias(&'a str, &'a str),
    Version(&'a str, &'a str),
    Versions(&'a str),
    /// Something that is made or changed, in words.
    Change(&'a str),
}

impl Subject<'_> {
    /// It may not be there.
    fn is_one(self) -> bool {
        !matches!(
            self,
            Self::Runs
                | Self::Experiments
                | Self::LoggedModels
                | Self::RegisteredModels
                | Self::Versions(_)
        )
    }

    /// What is no valid name or number is not there either. The registry says no more of an alias that
    /// it does not have.
    fn is_of_registry(self) -> bool {
        matches!(
            self,
            Self::RegisteredModel(_) | Self::Alias(..) | Self::Version(..)
        )
    }
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(run_id) => write!(formatter, "run {run_id}"),
            Self::Runs => formatter.write_str("the list of runs"),
            Self::Experiment(name) => write!(formatter, "experiment {name:?}"),
            Self::Experiments => formatter.write_str("the list of experiments"),
            Self::LoggedModel(id) => write!(formatter, "logged model {id}"),
            Self::LoggedModels => formatter.write_str("the list of logged models"),
            Self::RegisteredModel(name) => write!(formatter, "registered model {name:?}"),
            Self::RegisteredModels => formatter.write_str("the list of registered models"),
            Self::Alias(name, alias) => write!(formatter, "alias {alias:?} of model {name:?}"),
            Self::Version(name, version) => {
                write!(formatter, "version {version} of model {name:?}")
            }
            Self::Change(what) => formatter.write_str(what),
            Self::Versions(name) => write!(formatter, "the versions of model {name:?}"),
        }
    }
}

/// A failed attempt: whether another one can help.
#[derive(Debug)]
pub(super) enum Failure {
    Final(TrackingError),
    /// With the pause that the server asks for.
    Transient(TrackingError, Option<Duration>),
    /// The answer is larger than is read; a smaller page may do.
    TooLarge(TrackingError),
}

impl From<Failure> for TrackingError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Final(error) | Failure::Transient(error, _) | Failure::TooLarge(error) => {
                error
            }
        }
    }
}

/// The head of an answer that is no success.
pub(super) struct Refusal<'a> {
    pub status: StatusCode,
    pub headers: &'a HeaderMap,
    /// Where the request was sent.
    pub url: &'a Url,
    pub body: &'a [u8],
}

/// MLflow's errors (`error_code`, `message`); FastAPI routes and proxies say `detail`.
#[derive(Deserialize, Default)]
struct ErrorDocument {
    #[serde(default)]
    error_code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    detail: String,
}

impl Refusal<'_> {
    /// Source of the codes: MLflow 3.17's server, seen live.
    pub fn into_failure(
        self,
        server: &str,
        settings: &TrackingSettings,
        subject: Subject<'_>,
    ) -> Failure {
        let told: Option<ErrorDocument> = serde_json::from_slice(self.body).ok();
        let code = told.as_ref().map_or("", |told| told.error_code.as_str());
        let mut detail = self.describe(told.as_ref());
        if let Some(remedy) = self.remedy(code, settings, told.is_some()) {
            detail = format!("{detail}; {remedy}");
        }
        let server = server.to_owned();
        let what = subject.to_string();
        // The same code tells that the workspace is gone, which says nothing of the run.
        let of_workspace = told
            .as_ref()
            .is_some_and(|told| told.message.starts_with("Workspace "));
        let error = match (self.status.as_u16(), code, subject) {
            (_, "RESOURCE_DOES_NOT_EXIST", subject) if subject.is_one() && !of_workspace => {
                TrackingError::NotFound { server, what }
            }
            (_, "RESOURCE_ALREADY_EXISTS", Subject::Change(_)) => {
                TrackingError::Exists { server, what }
            }
            (400, _, Subject::Change(_)) => TrackingError::Invalid {
                server,
                what,
                detail,
            },
            (400, "INVALID_PARAMETER_VALUE", subject) if subject.is_of_registry() => {
                TrackingError::NotFound { server, what }
            }
            // Servers before MLflow 3 have no such route. So may what stands before a server say, while
            // that is away: who knows some goes on with them.
            (404 | 405, "" | "ENDPOINT_NOT_FOUND", Subject::LoggedModels) => {
                TrackingError::NotFound { server, what }
            }
            (401, ..) => TrackingError::Unauthenticated { server, detail },
            (403, ..) => TrackingError::PermissionDenied {
                server,
                what,
                detail,
            },
            // Answered with 500, and for ever.
            (_, "FEATURE_DISABLED" | "NOT_IMPLEMENTED", _) => TrackingError::Protocol {
                server,
                what,
                detail,
            },
            (408 | 429 | 500 | 502 | 503 | 504, ..) => {
                let error = TrackingError::Unavailable { server, detail };
                return Failure::Transient(error, retry_after(self.headers));
            }
            _ => TrackingError::Protocol {
                server,
                what,
                detail,
            },
        };
        Failure::Final(error)
    }

    fn describe(&self, told: Option<&ErrorDocument>) -> String {
        let status = self.status.as_u16();
        let text = match told {
            Some(told) if !told.message.is_empty() => shorten(&told.message),
            Some(told) if !told.detail.is_empty() => shorten(&told.detail),
            _ => excerpt(self.body),
        };
        if text.is_empty() {
            let reason = self.status.canonical_reason().unwrap_or("no reason given");
            return format!("HTTP {status}: {reason}");
        }
        format!("HTTP {status}: {text}")
    }

    /// What to do about it, where that can be told.
    fn remedy(&self, code: &str, settings: &TrackingSettings, is_json: bool) -> Option<String> {
        let remedy = match self.status.as_u16() {
            300..=399 => {
                let target = self.redirection()?;
                return Some(format!(
                    "it redirects to {target}, which is not followed with credentials: give the \
                     server's final address as the tracking URI"
                ));
            }
            401 => settings.authentication.remedy(),
            403 if find(self.body, b"Invalid Host header") => {
                "the server does not answer to this host name: give its IP address, or start it \
                 with --allowed-hosts"
            }
            403 => settings.authentication.remedy(),
            404 if !is_json => {
                "there is no MLflow API at this address: check the tracking URI and its path"
            }
            _ if code == "FEATURE_DISABLED" && settings.workspace.is_some() => {
                "unset MLFLOW_WORKSPACE"
            }
            _ => return None,
        };
        Some(remedy.to_owned())
    }

    /// Where a redirection points, without user, password and query.
    fn redirection(&self) -> Option<Url> {
        let location = self.headers.get("location")?.to_str().ok()?;
        let mut target = self.url.join(location).ok()?;
        // Both fail for URLs that can have neither.
        let _ = target.set_username("");
        let _ = target.set_password(None);
        target.set_query(None);
        target.set_fragment(None);
        Some(target)
    }
}

/// The start of an answer in plain text or HTML, as one line without tags.
pub(super) fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(LOOKED_AT)]);
    let mut plain = String::with_capacity(text.len());
    let mut inside_tag = false;
    for character in text.chars() {
        match character {
            '<' => inside_tag = true,
            '>' if inside_tag => {
                inside_tag = false;
                plain.push(' ');
            }
            character if inside_tag || character == '\u{fffd}' => {}
            character if character.is_control() => plain.push(' '),
            character => plain.push(character),
        }
    }
    shorten(&plain)
}

pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// One line of at most [`EXCERPT`] characters.
fn shorten(text: &str) -> String {
    let line = one_line(text);
    match line.char_indices().nth(EXCERPT) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

fn find(body: &[u8], text: &[u8]) -> bool {
    body.windows(text.len()).any(|window| window == text)
}

/// An error with its causes, which is where HTTP libraries keep "connection refused".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let told = error.to_string();
        // Some errors repeat their cause in their own text.
        if !text.ends_with(&told) {
            text = format!("{text}: {told}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(
        status: u16,
        headers: &[(&'static str, &str)],
        body: &str,
        subject: Subject<'_>,
    ) -> Failure {
        let lookup = |name: &str| (name == "MLFLOW_WORKSPACE").then(|| "team".to_owned());
        let settings = TrackingSettings::new("http://host:5000", lookup, None).unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        Refusal {
            status: StatusCode::from_u16(status).unwrap(),
            headers: &map,
            url: &"http://host:5000/api/2.0/mlflow/runs/get".parse().unwrap(),
            body: body.as_bytes(),
        }
        .into_failure("http://host:5000", &settings, subject)
    }

    fn last(status: u16, body: &str) -> TrackingError {
        match failure(status, &[], body, Subject::Run("r")) {
            Failure::Final(error) => error,
            other => panic!("{other:?}"),
        }
    }

    const MISSING: &str = r#"{"error_code":"RESOURCE_DOES_NOT_EXIST","message":"gone"}"#;

    #[test]
    fn a_run_that_is_unknown_is_not_found_and_a_list_that_is_unknown_says_why() {
        assert!(matches!(last(404, MISSING), TrackingError::NotFound { .. }));
        let list = TrackingError::from(failure(404, &[], MISSING, Subject::Experiments));
        assert!(matches!(list, TrackingError::Protocol { .. }));
        assert!(list.to_string().contains("gone"), "{list}");
    }

    #[test]
    fn answers_that_are_no_json_are_told_in_one_line_with_a_remedy() {
        let html = "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n";
        let missing = last(404, html).to_string();
        assert!(missing.contains("HTTP 404: 404 Not Found; there is no MLflow API"));
        let host = "Invalid Host header - possible DNS rebinding attack detected";
        let denied = last(403, host);
        assert_eq!(denied.errno(), libc::EACCES);
        assert!(denied.to_string().contains("--allowed-hosts"));
        let wrong = last(401, "You are not authenticated.").to_string();
        assert!(wrong.contains("credentials") && wrong.contains("MLFLOW_TRACKING_TOKEN"));
        assert!(last(418, "").to_string().contains("HTTP 418: I'm a teapot"));
    }

    #[test]
    fn trouble_that_passes_is_transient_with_the_pause_the_server_asks_for() {
        for status in [408, 429, 500, 502, 503, 504] {
            let failed = failure(status, &[("retry-after", "7")], "busy", Subject::Runs);
            assert!(
                matches!(failed, Failure::Transient(TrackingError::Unavailable { .. },
                Some(pause)) if pause == Duration::from_secs(7))
            );
        }
        let past = [("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")];
        assert!(matches!(failure(503, &past, "", Subject::Runs),
            Failure::Transient(_, Some(pause)) if pause.is_zero()));
    }

    #[test]
    fn a_workspace_that_is_gone_does_not_mean_that_its_runs_are() {
        let body =
            r#"{"error_code":"RESOURCE_DOES_NOT_EXIST","message":"Workspace 'team' not found"}"#;
        let told = last(404, body);
        assert_eq!(told.errno(), libc::EIO);
        assert!(told.to_string().contains("Workspace 'team'"), "{told}");
    }

    #[test]
    fn a_workspace_on_a_server_without_them_is_told_at_once() {
        let body =
            r#"{"error_code":"FEATURE_DISABLED","message":"Workspace APIs are not available"}"#;
        let told = last(500, body).to_string();
        assert!(told.contains("unset MLFLOW_WORKSPACE"), "{told}");
    }

    #[test]
    fn a_redirection_is_named_without_its_query() {
        let to = [("location", "https://user:hidden@host/login?state=hidden")];
        let told = TrackingError::from(failure(302, &to, "", Subject::Runs)).to_string();
        assert!(
            told.contains("https://host/login,") && !told.contains("hidden"),
            "{told}"
        );
    }

    #[test]
    fn a_long_answer_is_cut_between_characters() {
        let text = "é".repeat(5000);
        assert_eq!(excerpt(text.as_bytes()).chars().count(), EXCERPT + 1);
    }
}
