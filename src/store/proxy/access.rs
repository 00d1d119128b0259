//! Requests to a server's artifact routes: who asks, how long, how often.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::header::{HeaderValue, SERVER};
use reqwest::{Client, Request, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};

use super::address::Address;
use crate::http::{innermost, retry_after};
use crate::store::{StoreError, StoreResult};

/// How often a request is sent at most, the first time included.
const ATTEMPTS: u32 = 5;
/// As often, where each attempt takes as long as anybody waits.
const SLOW_ATTEMPTS: u32 = 2;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Bytes of a refusal that are read, and characters of it that are told.
const REFUSAL: usize = 8192;
const EXCERPT: usize = 200;

/// What gets requests to a tracking server.
#[async_trait]
pub trait Courier: fmt::Debug + Send + Sync + 'static {
    /// The server with its path, without credentials and without a slash at its end.
    fn server(&self) -> &str;

    /// A client with the server's TLS settings, which follows no redirection and cuts nothing off.
    fn client(&self) -> &Client;

    /// Adds who we are, and the workspace.
    ///
    /// # Errors
    /// `Unauthenticated` without credentials that are needed.
    async fn authorise(&self, request: &mut Request) -> StoreResult<()>;
}

/// One server's routes, and how to ask there.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub address: Address,
    /// For the tracking server itself only: who we are is nobody else's business.
    courier: Option<Arc<dyn Courier>>,
    stranger: Client,
    /// Longest wait for an answer that needs no work, and for the next bytes of one.
    pub patience: Duration,
    program: Arc<OnceLock<Program>>,
}

/// What answers, by its own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    Gunicorn,
    Uvicorn,
    Other,
}

/// An attempt that failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub error: StoreError,
    pub status: Option<StatusCode>,
    /// How many attempts can help, this one included.
    pub most: u32,
    /// The beginning of what was said.
    told: String,
    /// The beginning of it as it came.
    pub body: Vec<u8>,
    /// The pause that the server asks for.
    pub pause: Option<Duration>,
    /// No connection could be made.
    pub unreachable: bool,
}

impl Access {
    pub fn new(
        address: Address,
        courier: Option<Arc<dyn Courier>>,
        stranger: Client,
        patience: Duration,
    ) -> Self {
        let courier = courier.filter(|_| address.trusted);
        Self {
            address,
            courier,
            stranger,
            patience,
            program: Arc::default(),
        }
    }

    /// For hosts that must not be told who we are.
    pub fn stranger(&self) -> &Client {
        &self.stranger
    }

    fn client(&self) -> &Client {
        match &self.courier {
            Some(courier) => courier.client(),
            None => &self.stranger,
        }
    }

    /// Sends a request once, within `patience` until the head of the answer.
    pub async fn attempt(
        &self,
        object: &str,
        patience: Duration,
        build: impl FnOnce(&Client) -> RequestBuilder,
    ) -> Result<Response, Failed> {
        let client = self.client();
        let request = build(client).build();
        let mut request = request.map_err(|error| Failed::last(other(object, &error)))?;
        if let Some(courier) = &self.courier {
            let authorised = courier.authorise(&mut request).await;
            authorised.map_err(Failed::last)?;
        }
        let response = answer(object, patience, client.execute(request)).await?;
        self.program.get_or_init(|| {
            let name = response.headers().get(SERVER);
            match name.map_or(&b""[..], HeaderValue::as_bytes) {
                name if name.starts_with(b"gunicorn") => Program::Gunicorn,
                b"uvicorn" => Program::Uvicorn,
                _ => Program::Other,
            }
        });
        Ok(response)
    }

    /// Whether the server takes a body of a told length for whole when it breaks off. Seen of MLflow
    /// under gunicorn: what came of it is the object then. One in chunks has an end of its own.
    pub async fn takes_halves(&self, object: &str) -> Result<bool, Failed> {
        if let Some(known) = self.program() {
            return Ok(known == Program::Gunicorn);
        }
        let url = self.address.listing();
        let root = |client: &Client| client.get(&url).query(&[("path", "")]);
        self.send(object, self.patience, root).await?;
        Ok(self
            .program()
            .is_none_or(|program| program == Program::Gunicorn))
    }

    /// What answered first, if anything has.
    pub fn program(&self) -> Option<Program> {
        self.program.get().copied()
    }

    /// Sends a request, again where that can help.
    pub async fn send(
        &self,
        object: &str,
        patience: Duration,
        build: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<Response, Failed> {
        let mut attempt = 1;
        loop {
            match self.attempt(object, patience, &build).await {
                Err(failed) if attempt < failed.most => failed.pause(attempt).await,
                outcome => return outcome,
            }
            attempt += 1;
        }
    }

    /// Asks for a document.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        object: &str,
        build: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<T, Failed> {
        let mut attempt = 1;
        loop {
            match self.document(object, &build).await {
                Err(failed) if attempt < failed.most => failed.pause(attempt).await,
                outcome => return outcome,
            }
            attempt += 1;
        }
    }

    async fn document<T: DeserializeOwned>(
        &self,
        object: &str,
        build: impl FnOnce(&Client) -> RequestBuilder,
    ) -> Result<T, Failed> {
        let response = self.attempt(object, self.patience, build).await?;
        let body = match timeout(self.patience, response.bytes()).await {
            Ok(body) => body.map_err(|error| Failed::broken(object, &error))?,
            Err(_) => return Err(Failed::silent(object, self.patience)),
        };
        serde_json::from_slice(&body).map_err(|error| {
            let text = String::from_utf8_lossy(&body[..body.len().min(EXCERPT)]);
            Failed::last(StoreError::Other {
                object: object.to_owned(),
                detail: format!("{error}; is this an MLflow server? {text}"),
            })
        })
    }
}

/// The answer to a request that was sent, if it is a success.
pub(super) async fn answer(
    object: &str,
    patience: Duration,
    sent: impl Future<Output = reqwest::Result<Response>>,
) -> Result<Response, Failed> {
    let response = match timeout(patience, sent).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return Err(Failed::broken(object, &error)),
        Err(_) => return Err(Failed::silent(object, patience)),
    };
    if response.status().is_success() {
        return Ok(response);
    }
    Err(Failed::refused(object, response).await)
}

fn other(object: &str, error: &reqwest::Error) -> StoreError {
    StoreError::Other {
        object: object.to_owned(),
        detail: innermost(error),
    }
}

/// What MLflow's routes say, and the frameworks below them.
#[derive(Deserialize, Default)]
struct Told {
    #[serde(default)]
    message: String,
    #[serde(default)]
    detail: String,
}

impl Failed {
    pub fn last(error: StoreError) -> Self {
        Self {
            error,
            status: None,
            most: 1,
            told: String::new(),
            body: Vec::new(),
            pause: None,
            unreachable: false,
        }
    }

    pub fn broken(object: &str, error: &reqwest::Error) -> Self {
        Self {
            error: StoreError::Unavailable {
                object: object.to_owned(),
                detail: innermost(error),
            },
            status: None,
            most: ATTEMPTS,
            told: String::new(),
            body: Vec::new(),
            pause: None,
            unreachable: error.is_connect(),
        }
    }

    pub fn silent(object: &str, patience: Duration) -> Self {
        Self {
            error: StoreError::Unavailable {
                object: object.to_owned(),
                detail: format!("nothing moved for {} s", patience.as_secs()),
            },
            status: None,
            most: SLOW_ATTEMPTS,
            told: String::new(),
            body: Vec::new(),
            pause: None,
            unreachable: false,
        }
    }

    async fn refused(object: &str, mut response: Response) -> Self {
        let status = response.status();
        let pause = retry_after(response.headers());
        let mut body = Vec::new();
        while body.len() < REFUSAL
            && let Ok(Ok(Some(frame))) = timeout(LONGEST_PAUSE, response.chunk()).await
        {
            body.extend_from_slice(&frame);
        }
        body.truncate(REFUSAL);
        Self {
            error: explain(object, status, &body),
            status: Some(status),
            most: match status.as_u16() {
                429 | 500 | 502 | 503 => ATTEMPTS,
                408 | 504 => SLOW_ATTEMPTS,
                _ => 1,
            },
            told: excerpt(&body),
            body,
            pause,
            unreachable: false,
        }
    }

    /// Waits before the next attempt.
    pub async fn pause(&self, attempt: u32) {
        let growing = FIRST_PAUSE * 2_u32.saturating_pow(attempt - 1);
        let pause = growing
            .min(LONGEST_PAUSE)
            .mul_f64(rand::random_range(0.5..1.0));
        tracing::debug!(error = %self.error, attempt, "asking the artifact server again");
        sleep(self.pause.unwrap_or(pause).min(LONGEST_PAUSE * 6)).await;
    }

    /// The same, of which another attempt can make something else.
    pub fn passing(self, object: &str) -> Self {
        let status = self.status.map_or(0, |status| status.as_u16());
        Self {
            error: StoreError::Unavailable {
                object: object.to_owned(),
                detail: format!("HTTP {status}: {}", self.told),
            },
            most: ATTEMPTS,
            ..self
        }
    }

    /// Whether another attempt can help.
    pub fn is_passing(&self) -> bool {
        self.most > 1
    }

    /// What the server said contains this.
    pub fn says(&self, text: &str) -> bool {
        self.told.contains(text)
    }

    /// What the server said has this status.
    pub fn is(&self, status: u16) -> bool {
        self.status.is_some_and(|told| told.as_u16() == status)
    }
}

impl From<Failed> for StoreError {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// What a refusal says, in a line.
fn excerpt(body: &[u8]) -> String {
    let told: Told = serde_json::from_slice(body).unwrap_or_default();
    let text = match (told.message.is_empty(), told.detail.is_empty()) {
        (false, _) => told.message,
        (true, false) => told.detail,
        (true, true) if body.starts_with(b"<") => String::new(),
        (true, true) => String::from_utf8_lossy(body).into_owned(),
    };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().take(EXCERPT).collect()
}

fn explain(object: &str, status: StatusCode, body: &[u8]) -> StoreError {
    let object = object.to_owned();
    let text = match excerpt(body).as_str() {
        "" => status.canonical_reason().unwrap_or_default().to_owned(),
        text => text.to_owned(),
    };
    let mut detail = format!("HTTP {}: {text}", status.as_u16());
    let remedy = match status.as_u16() {
        413 => {
            "a proxy before the MLflow server takes no body of that size: raise its limit \
             (nginx: client_max_body_size)"
        }
        408 | 504 => {
            "if that comes again, a proxy before the MLflow server gives requests too little time: \
             raise its limit (nginx: proxy_read_timeout, proxy_send_timeout)"
        }
        502 => "a proxy before the MLflow server got no answer from it: see that server's log",
        503 => "the MLflow server may be started with --no-serve-artifacts",
        _ => "",
    };
    if !remedy.is_empty() {
        detail = format!("{detail}; {remedy}");
    }
    match status.as_u16() {
        400 | 414 => StoreError::InvalidName { object, detail },
        401 => StoreError::Unauthenticated { object, detail },
        403 => StoreError::PermissionDenied { object, detail },
        404 => StoreError::NotFound { object },
        413 => StoreError::TooLarge { object, detail },
        405 | 501 => StoreError::Unsupported { object, detail },
        507 => StoreError::Full { object, detail },
        408 | 429 | 500..=599 => StoreError::Unavailable { object, detail },
        _ => StoreError::Other { object, detail },
    }
}
