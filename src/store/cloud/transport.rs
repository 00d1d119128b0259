//! Requests on their way: how long is waited for what.
//!
//! `object_store` gives a whole request 30 s by default, however large and however slow the link;
//! here whatever moves is let move. Reads are left to the client's own deadline between bytes. Of a
//! write that deadline would be one for all of it, so its body is watched while it is taken.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use reqwest::Method;
use reqwest::header::{HeaderName, HeaderValue};
use tokio::time::{sleep, timeout};

use crate::http::innermost;
use crate::store::checksum::crc32c_update;
use crate::store::{StoreError, StoreResult};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Whatever the patience, nobody is waited for this long who says nothing.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);
/// A metadata service answers soon or is not there.
const METADATA_PATIENCE: Duration = Duration::from_secs(1);
const METADATA_TRIES: u32 = 3;
/// Bodies are handed over in pieces of this size, bytes. They are slices: nothing is copied.
const PIECE: usize = 64 << 10;
/// What the kernel may still have to send when the last piece is taken, bytes, and how slowly, bytes a
/// second. That the peer acknowledges it in time is the kernel's to see (`TCP_USER_TIMEOUT`).
const SEND_BUFFER: u64 = 4 << 20;
const SLOWEST: u64 = 16 << 10;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const RETRIES: usize = 10;
/// No attempt begins later than so many times the patience after the first.
const PATIENCES: u32 = 5;
/// Google compares what it received with this before it stores it.
const HASH: HeaderName = HeaderName::from_static("x-goog-hash");

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Azure,
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

fn other(error: &reqwest::Error) -> StoreError {
    StoreError::Other {
        object: "HTTP client".to_owned(),
        detail: innermost(error),
    }
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
        let reads = client().read_timeout(patience).build();
        Ok(Self {
            reads: reads.map_err(|error| other(&error))?,
            writes: client().build().map_err(|error| other(&error))?,
            patience,
            kind,
        })
    }

    pub fn retries(&self) -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: FIRST_PAUSE,
                max_backoff: LONGEST_PAUSE,
                base: 2.,
            },
            max_retries: RETRIES,
            retry_timeout: self.patience * PATIENCES,
        }
    }

    async fn write(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let pieces = pieces(body).await?;
        let url = parts.uri.to_string().parse();
        let url = url.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let mut asked = reqwest::Request::new(parts.method, url);
        *asked.headers_mut() = parts.headers;
        let length: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if self.kind == Kind::Google && asked.method() == Method::PUT && length > 0 {
            let crc = pieces
                .iter()
                .fold(0, |crc, piece| crc32c_update(crc, piece));
            let value = format!("crc32c={}", BASE64_STANDARD.encode(crc.to_be_bytes()));
            let value = HeaderValue::from_str(&value);
            let value = value.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
            asked.headers_mut().insert(HASH, value);
        }
        let taken = Arc::<AtomicU64>::default();
        *asked.body_mut() = Some(reqwest::Body::wrap(Watched {
            pieces,
            rest: length,
            taken: Arc::clone(&taken),
        }));
        let answer = self.answer(asked, length, &taken).await?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        // They are small, and whoever reads them has no deadline.
        let body = timeout(self.patience, answer.bytes()).await;
        let body = body.map_err(|late| HttpError::new(HttpErrorKind::Timeout, late))?;
        let body = body.map_err(failed)?;
        let mut response = HttpResponse::new(HttpResponseBody::from(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// Sends a request; a timeout when no piece of its body is taken for too long, or no answer comes.
    async fn answer(
        &self,
        asked: reqwest::Request,
        length: u64,
        taken: &AtomicU64,
    ) -> Result<reqwest::Response, HttpError> {
        let mut sent = pin!(self.writes.execute(asked));
        let mut before = taken.load(Ordering::Relaxed);
        loop {
            let longest = match before == length {
                true => self.patience + Duration::from_secs(length.min(SEND_BUFFER) / SLOWEST),
                false => self.patience,
            };
            tokio::select! {
                answer = &mut sent => return answer.map_err(failed),
                () = sleep(longest) => {}
            }
            let now = taken.load(Ordering::Relaxed);
            if now == before {
                let late = format!("no progress for {longest:?}");
                return Err(HttpError::new(HttpErrorKind::Timeout, Late(late)));
            }
            before = now;
        }
    }
}

/// What is wrong with a request that makes no progress.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Late(String);

/// A body that broke off may have been received whole: only what can be repeated is.
fn failed(error: reqwest::Error) -> HttpError {
    let kind = if error.is_connect() {
        HttpErrorKind::Connect
    } else if error.is_timeout() {
        HttpErrorKind::Timeout
    } else {
        HttpErrorKind::Interrupted
    };
    HttpError::new(kind, error.without_url())
}

/// A body's bytes.
async fn pieces(
    mut body: impl Body<Data = Bytes, Error = HttpError> + Unpin,
) -> Result<VecDeque<Bytes>, HttpError> {
    let mut pieces = VecDeque::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let mut bytes = frame?.into_data().unwrap_or_default();
        while !bytes.is_empty() {
            pieces.push_back(bytes.split_to(PIECE.min(bytes.len())));
        }
    }
    Ok(pieces)
}

/// A body that tells how much of it was taken.
struct Watched {
    pieces: VecDeque<Bytes>,
    rest: u64,
    taken: Arc<AtomicU64>,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.pop_front();
        if let Some(piece) = &piece {
            self.rest -= piece.len() as u64;
            self.taken.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest)
    }
}

/// Whether a cloud's metadata service answers at `url`: to a request with this header, and with the
/// other one if that is told. Other machines may have something else at that address, or be told of a
/// proxy that knows better.
pub(super) async fn finds(
    url: &str,
    header: (&'static str, &'static str),
    answers: Option<(&'static str, &'static str)>,
) -> bool {
    let client = reqwest::Client::builder().no_proxy();
    let Ok(client) = client.timeout(METADATA_PATIENCE).build() else {
        return false;
    };
    for _ in 0..METADATA_TRIES {
        match client.get(url).header(header.0, header.1).send().await {
            Ok(answer) => {
                let is_it = answers.is_none_or(|(name, value)| {
                    let found = answer.headers().get(name);
                    found.is_some_and(|found| found == value)
                });
                return is_it && answer.status().is_success();
            }
            // One that is there may be slow to come up.
            Err(error) if error.is_timeout() => {}
            Err(_) => return false,
        }
    }
    false
}

impl HttpConnector for Transport {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Transport {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if [Method::GET, Method::HEAD].contains(request.method()) {
            return self.reads.call(request).await;
        }
        self.write(request).await
    }
}
