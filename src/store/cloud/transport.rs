//! Requests on their way: how long is waited for what.
//!
//! `object_store` gives a whole request 30 s by default, however large and however slow the link;
//! here whatever moves is let move.

use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use reqwest::Method;
use reqwest::header::{HeaderName, HeaderValue};

use crate::store::checksum::crc32c;
use crate::store::{StoreError, StoreResult};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Whatever the patience, nobody is waited for this long who says nothing.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);
/// A metadata service answers at once or is not there.
const METADATA_PATIENCE: Duration = Duration::from_secs(1);
/// A body that is sent slower than this, bytes a second, is not moving.
const SLOWEST: u64 = 32 << 10;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const RETRIES: usize = 10;
const HASH: HeaderName = HeaderName::from_static("x-goog-hash");

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Azure,
    /// Compares what it received with a checksum before it stores it.
    Google,
}

/// One pool of connections for all stores of a kind.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    reads: reqwest::Client,
    writes: reqwest::Client,
    patience: Duration,
    kind: Kind,
}

impl Transport {
    /// `patience`: the longest wait for an answer, and for the next bytes of one.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(patience: Duration, kind: Kind) -> StoreResult<Self> {
        let patience = patience.min(LONGEST_SILENCE);
        let client = || {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .redirect(reqwest::redirect::Policy::none())
                .tcp_user_timeout(patience)
                .user_agent(concat!("mlfs/", env!("CARGO_PKG_VERSION")))
        };
        let build = |builder: reqwest::ClientBuilder| {
            builder.build().map_err(|error| StoreError::Other {
                object: "TLS".to_owned(),
                detail: error.to_string(),
            })
        };
        Ok(Self {
            reads: build(client().read_timeout(patience))?,
            writes: build(client())?,
            patience,
            kind,
        })
    }

    /// Whether a cloud's metadata service answers at `url`, as one does who is told `header`. Other
    /// machines may have something else at that address.
    pub async fn finds(&self, url: &str, header: (&'static str, &'static str)) -> bool {
        let request = self.reads.get(url).header(header.0, header.1);
        let answer = request.timeout(METADATA_PATIENCE).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    pub fn retries(&self) -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: FIRST_PAUSE,
                max_backoff: LONGEST_PAUSE,
                base: 2.,
            },
            max_retries: RETRIES,
            retry_timeout: self.patience * 2,
        }
    }
}

impl HttpConnector for Transport {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Transport {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if [Method::GET, Method::HEAD].contains(request.method()) {
            return self.reads.call(request).await;
        }
        let length = request.body().content_length() as u64;
        if self.kind != Kind::Azure
            && request.method() == Method::PUT
            && length > 0
            && let Some(body) = request.body().as_bytes()
        {
            let crc = BASE64_STANDARD.encode(crc32c(body).to_be_bytes());
            if let Ok(value) = HeaderValue::from_str(&format!("crc32c={crc}")) {
                request.headers_mut().insert(HASH, value);
            }
        }
        let longest = self.patience + Duration::from_secs(length / SLOWEST);
        let answer = tokio::time::timeout(longest, self.writes.call(request));
        answer
            .await
            .unwrap_or_else(|late| Err(HttpError::new(HttpErrorKind::Timeout, late)))
    }
}
