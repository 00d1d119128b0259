//! One HTTP client for one tracking server: authenticates, retries, and keeps every call, answer
//! and pause within a bound.

use std::path::Path;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, ClientBuilder, Identity, Method, Request, Response, redirect};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout_at};

use super::authentication::Authentication;
use super::failure::{Failure, Refusal, Subject, chain, excerpt};
use super::settings::{SettingError, TrackingSettings};
use super::sigv4::{SignError, Signer};
use super::{TrackingError, TrackingResult};
use crate::http::innermost;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections kept open while nothing is asked.
const IDLE_CONNECTIONS: usize = 8;
/// The first pause between attempts; each further one is twice as long, less a random part of up
/// to a half, so that many mounts do not come back together.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The largest answer that is read, bytes. A page of a thousand runs with all their parameters,
/// metrics and tags is some MiB.
const LARGEST_ANSWER: usize = 32 << 20;

/// A request; how often it may be sent is its [`Patience`].
pub(super) struct Call<'a> {
    pub subject: Subject<'a>,
    pub method: Method,
    /// Below `<server>/api/2.0/mlflow/`.
    pub path: &'a str,
    pub query: &'a [(&'a str, &'a str)],
    pub body: Option<Value>,
}

/// How long and how often one call is tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    pub longest: Duration,
    pub retries: u32,
}

pub(super) struct Transport {
    client: Client,
    settings: TrackingSettings,
    name: String,
    /// What each request carries.
    headers: HeaderMap,
    signer: OnceCell<Signer>,
}

impl Transport {
    /// Sends nothing.
    ///
    /// # Errors
    /// A certificate file that cannot be used, a token or workspace that fits no header.
    pub fn new(settings: TrackingSettings) -> Result<Self, SettingError> {
        let timeout = settings.request_timeout;
        Self::with(settings, Client::builder().timeout(timeout))
    }

    /// One that cuts no request off, for whoever watches them himself. Sends nothing.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn patient(settings: TrackingSettings) -> Result<Self, SettingError> {
        Self::with(settings, Client::builder())
    }

    fn with(settings: TrackingSettings, builder: ClientBuilder) -> Result<Self, SettingError> {
        let headers = headers(&settings)?;
        let mut builder = builder
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            // A redirection would take the credentials along, or lose them on the way, and turns
            // POST into GET: it is told instead, with its target.
            .redirect(redirect::Policy::none())
            .referer(false)
            .user_agent(concat!("mlfs/", env!("CARGO_PKG_VERSION")));
        if settings.insecure_tls {
            tracing::warn!("MLFLOW_TRACKING_INSECURE_TLS: the server's certificate is not checked");
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        if let Some(path) = &settings.server_certificate {
            const NAME: &str = "MLFLOW_TRACKING_SERVER_CERT_PATH";
            let pem = read_pem(NAME, path)?;
            let certificates = Certificate::from_pem_bundle(&pem)
                .ok()
                .filter(|certificates| !certificates.is_empty())
                .ok_or_else(|| unusable(NAME, path, "no certificate in PEM form is in it"))?;
            builder = builder.tls_certs_only(certificates);
        }
        if let Some(path) = &settings.client_certificate {
            const NAME: &str = "MLFLOW_TRACKING_CLIENT_CERT_PATH";
            let identity = Identity::from_pem(&read_pem(NAME, path)?).map_err(|_| {
                unusable(
                    NAME,
                    path,
                    "it must hold a certificate and its key in PEM form",
                )
            })?;
            builder = builder.identity(identity);
        }
        let client = builder.build().map_err(|error| {
            SettingError::new(format!(
                "the tracking server's TLS settings cannot be used: {}",
                chain(&error)
            ))
        })?;
        Ok(Self {
            client,
            name: settings.url.as_str().trim_end_matches('/').to_owned(),
            settings,
            headers,
            signer: OnceCell::new(),
        })
    }

    /// The tracking URI without credentials and without a slash at its end.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What an ordinary call may cost.
    pub fn patience(&self) -> Patience {
        Patience {
            longest: self.settings.longest_call,
            retries: self.settings.retries,
        }
    }

    pub fn unavailable(&self, detail: impl Into<String>) -> TrackingError {
        TrackingError::Unavailable {
            server: self.name.clone(),
            detail: detail.into(),
        }
    }

    fn protocol(&self, subject: Subject<'_>, detail: String) -> TrackingError {
        TrackingError::Protocol {
            server: self.name.clone(),
            what: subject.to_string(),
            detail,
        }
    }

    /// Sends a call, again where that can help and its patience lasts.
    pub async fn call<T: DeserializeOwned>(
        &self,
        call: &Call<'_>,
        patience: Patience,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + patience.longest;
        let mut pause = FIRST_PAUSE;
        let mut last: Option<TrackingError> = None;
        for attempt in 0..=patience.retries {
            let Ok(answer) = timeout_at(deadline, self.attempt(call)).await else {
                let seconds = patience.longest.as_secs_f32();
                let error = last.unwrap_or_else(|| {
                    let subject = call.subject;
                    self.unavailable(format!("no answer to {subject} in {seconds} s; {CHECK}"))
                });
                return Err(Failure::Final(error));
            };
            let (error, asked) = match answer {
                Ok(answer) => return Ok(answer),
                Err(Failure::Transient(error, asked)) => (error, asked),
                Err(failure) => return Err(failure),
            };
            let wait = asked.unwrap_or_else(|| pause.mul_f64(rand::random_range(0.5..1.0)));
            let in_time = wait < deadline.saturating_duration_since(Instant::now());
            if attempt == patience.retries || !in_time {
                return Err(Failure::Final(error));
            }
            tracing::debug!(%error, ?wait, "asking the tracking server again");
            last = Some(error);
            sleep(wait).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        // The last round of the loop has returned.
        Err(Failure::Final(self.unavailable("not asked")))
    }

    async fn attempt<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, Failure> {
        let request = self.build(call).await?;
        let url = request.url().clone();
        let answer = self.client.execute(request).await;
        let mut answer = answer.map_err(|error| self.unreachable(error))?;
        let body = self.body(call.subject, &mut answer).await?;
        let status = answer.status();
        if !status.is_success() {
            let refusal = Refusal {
                status,
                headers: answer.headers(),
                url: &url,
                body: &body,
            };
            return Err(refusal.into_failure(&self.name, &self.settings, call.subject));
        }
        serde_json::from_slice(&body).map_err(|error| {
            let detail = format!(
                "{error}; is this an MLflow server? {}; check the tracking URI",
                excerpt(&body)
            );
            Failure::Final(self.protocol(call.subject, detail))
        })
    }

    async fn build(&self, call: &Call<'_>) -> Result<Request, Failure> {
        let url = format!("{}/api/2.0/mlflow/{}", self.name, call.path);
        let mut builder = self.client.request(call.method.clone(), url);
        if !call.query.is_empty() {
            builder = builder.query(call.query);
        }
        if let Some(body) = &call.body {
            builder = builder.json(body);
        }
        let mut request = builder.build().map_err(|error| {
            let detail = chain(&error.without_url());
            Failure::Final(self.protocol(call.subject, detail))
        })?;
        let authorised = self.authorise(&mut request).await;
        authorised.map_err(|error| self.unsigned(call.subject, error))?;
        Ok(request)
    }

    /// Adds who we are, and the workspace.
    pub async fn authorise(&self, request: &mut Request) -> Result<(), SignError> {
        // Here and not among the client's defaults, which no signature covers.
        request.headers_mut().extend(self.headers.clone());
        match &self.settings.authentication {
            Authentication::AwsSignature { region } => self.sign(request, region.as_deref()).await,
            _ => Ok(()),
        }
    }

    async fn sign(&self, request: &mut Request, region: Option<&str>) -> Result<(), SignError> {
        let signer = self.signer.get_or_try_init(|| Signer::load(region)).await?;
        signer.sign(request).await
    }

    fn unsigned(&self, subject: Subject<'_>, error: SignError) -> Failure {
        match error {
            SignError::Credentials(detail) => Failure::Final(TrackingError::Unauthenticated {
                server: self.name.clone(),
                detail: format!("{detail}; {}", self.settings.authentication.remedy()),
            }),
            SignError::Transient(detail) => Failure::Transient(self.unavailable(detail), None),
            SignError::Request(detail) => Failure::Final(self.protocol(subject, detail)),
        }
    }

    /// The whole body, if it is within the bound.
    async fn body(&self, subject: Subject<'_>, answer: &mut Response) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(frame) = answer
            .chunk()
            .await
            .map_err(|error| self.unreachable(error))?
        {
            if body.len() + frame.len() > LARGEST_ANSWER {
                let detail = format!("the answer is larger than {} MiB", LARGEST_ANSWER >> 20);
                return Err(Failure::TooLarge(self.protocol(subject, detail)));
            }
            body.extend_from_slice(&frame);
        }
        Ok(body)
    }

    fn unreachable(&self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        let remedy = tls_remedy(&chain(&error)).unwrap_or(CHECK);
        let cause = innermost(&error);
        let detail = match () {
            () if error.is_timeout() && error.is_connect() => {
                format!("no connection within {} s", CONNECT_TIMEOUT.as_secs())
            }
            () if error.is_timeout() => {
                format!(
                    "no answer within {} s",
                    self.settings.request_timeout.as_secs()
                )
            }
            () => cause,
        };
        Failure::Transient(self.unavailable(format!("{detail}; {remedy}")), None)
    }

    #[cfg(test)]
    pub fn with_signer(mut self, signer: Signer) -> Self {
        self.signer = OnceCell::new_with(Some(signer));
        self
    }
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Transport")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Credentials and workspace. Never `Origin`: MLflow's security middleware (since 3.5) refuses
/// requests that have one.
fn headers(settings: &TrackingSettings) -> Result<HeaderMap, SettingError> {
    let mut headers = HeaderMap::new();
    if let Some(value) = settings.authentication.header()? {
        headers.insert(AUTHORIZATION, value);
    }
    if let Some(workspace) = &settings.workspace {
        let value = HeaderValue::from_str(workspace).map_err(|_| {
            SettingError::new("MLFLOW_WORKSPACE: holds a character that no HTTP header can")
        })?;
        headers.insert("x-mlflow-workspace", value);
    }
    Ok(headers)
}

/// What to do about a server that does not answer.
const CHECK: &str = "check that it runs, and that the tracking URI and its port are right";

/// What to do about TLS that fails; rustls tells its reasons in its texts only.
fn tls_remedy(detail: &str) -> Option<&'static str> {
    if detail.contains("CaUsedAsEndEntity") {
        // What `openssl req -x509` makes unless told otherwise.
        Some(
            "its certificate is an authority's and its own at once, which is never accepted: have \
             that authority sign another one for the server",
        )
    } else if detail.contains("invalid peer certificate") {
        Some(
            "if its certificate is your own authority's, give that one's PEM file in \
             MLFLOW_TRACKING_SERVER_CERT_PATH",
        )
    } else if detail.contains("CertificateRequired") {
        Some("give your certificate and key in MLFLOW_TRACKING_CLIENT_CERT_PATH")
    } else if detail.contains("InvalidContentType") {
        Some("it may speak http, not https")
    } else {
        None
    }
}

fn read_pem(name: &str, path: &Path) -> Result<Vec<u8>, SettingError> {
    std::fs::read(path).map_err(|error| unusable(name, path, &error.to_string()))
}

fn unusable(name: &str, path: &Path, detail: &str) -> SettingError {
    SettingError::new(format!("{name}: {}: {detail}", path.display()))
}

/// The failure as callers outside the transport see it.
pub(super) fn settle<T>(answer: Result<T, Failure>) -> TrackingResult<T> {
    answer.map_err(TrackingError::from)
}
