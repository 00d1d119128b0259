//! Deadlines that move with progress.
//!
//! There is no limit on the whole of a request: what moves is never cut off. Progress is a piece of
//! the body that is taken, bytes that the peer acknowledges (see `backlog`), the head of the
//! answer, and each frame of its body. A request without progress for longer than its [`Limits`]
//! fails with a timeout, which the SDK tries again; its connection is closed.
//!
//! The SDK has a protection of its own, which is turned off in its favour: it counts a body in
//! memory as sent when the connection has been handed it, and waits for the answer for ever.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::connection::CaptureSmithyConnection;
use aws_smithy_runtime_api::client::http::HttpConnectorFuture;
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

use super::backlog;

/// No piece of a body is taken, or no byte of an answer's comes.
const STALL: Duration = Duration::from_secs(20);
/// The request is sent, and nothing is answered.
const ANSWER: Duration = Duration::from_secs(60);
/// The same where the store has work to do that grows with the object: completing an upload, copying
/// and deleting many. AWS says of the first that it may take several minutes.
const SLOW_ANSWER: Duration = Duration::from_secs(300);
/// Bodies are handed over in pieces of this size, bytes. They are slices: nothing is copied.
const PIECE: usize = 256 << 10;
/// How often within a limit the kernel is asked whether the peer acknowledges.
const LOOKS: u32 = 4;

/// How long a request may be without progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// While its body is sent.
    stall: Duration,
    /// From then until the head of the answer.
    answer: Duration,
    /// While the answer's body is read.
    reading: Duration,
}

impl Limits {
    /// Those of one request, none longer than `patience`.
    pub fn of(request: &HttpRequest, patience: Duration) -> Self {
        let slow = is_slow(request);
        Self {
            stall: STALL.min(patience),
            answer: if slow { SLOW_ANSWER } else { ANSWER }.min(patience),
            // A store that has sent the head of such an answer may still be at work.
            reading: if slow { SLOW_ANSWER } else { STALL }.min(patience),
        }
    }
}

/// CompleteMultipartUpload and DeleteObjects are POSTs with these parameters, CopyObject and
/// UploadPartCopy PUTs with this header (Amazon S3 API Reference).
fn is_slow(request: &HttpRequest) -> bool {
    let query = request.uri().split_once('?').map_or("", |(_, query)| query);
    let asks = |name: &str| {
        let mut names = query.split('&').map(|pair| pair.split('=').next());
        names.any(|found| found == Some(name))
    };
    match request.method() {
        "POST" => asks("uploadId") || asks("delete"),
        "PUT" => request.headers().contains_key("x-amz-copy-source"),
        _ => false,
    }
}

/// Nothing has moved for so long.
#[derive(Debug)]
struct Stalled {
    what: &'static str,
    limit: Duration,
}

impl fmt::Display for Stalled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} for {:?}", self.what, self.limit)
    }
}

impl std::error::Error for Stalled {}

/// How far a request is.
#[derive(Debug)]
struct Progress(Mutex<State>);

#[derive(Clone, Copy, Debug)]
struct State {
    last: Instant,
    body_taken: bool,
}

impl Progress {
    fn note(&self) {
        self.0.lock().last = Instant::now();
    }
}

/// A request's body in pieces; each that is taken is progress.
struct Pieces {
    body: SdkBody,
    rest: Bytes,
    progress: Arc<Progress>,
}

impl Pieces {
    fn taken(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let mut polled = None;
        if this.rest.is_empty() {
            let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => this.rest = data,
                Some(Ok(Err(trailers))) => polled = Some(Ok(trailers)),
                Some(Err(error)) => polled = Some(Err(error)),
                None => {}
            }
        }
        if !this.rest.is_empty() {
            let length = this.rest.len().min(PIECE);
            polled = Some(Ok(Frame::data(this.rest.split_to(length))));
        }
        let body_taken = polled.is_none() || this.taken();
        *this.progress.0.lock() = State {
            last: Instant::now(),
            body_taken,
        };
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.taken()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let inner = self.body.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + rest);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

/// A request whose progress is watched.
pub(super) struct Watch {
    limits: Limits,
    progress: Arc<Progress>,
    connection: Option<CaptureSmithyConnection>,
}

impl Watch {
    /// Takes a request's body under watch. What goes over the wire stays the same.
    pub fn over(request: &mut HttpRequest, limits: Limits) -> Self {
        let empty = request.body().content_length() == Some(0);
        let progress = Arc::new(Progress(Mutex::new(State {
            last: Instant::now(),
            body_taken: empty,
        })));
        if !empty {
            let body = std::mem::replace(request.body_mut(), SdkBody::taken());
            *request.body_mut() = SdkBody::from_body_1_x(Pieces {
                body,
                rest: Bytes::new(),
                progress: Arc::clone(&progress),
            });
        }
        Self {
            limits,
            progress,
            connection: request.extension::<CaptureSmithyConnection>().cloned(),
        }
    }

    /// Waits for the head of the answer; its body is watched too.
    ///
    /// # Errors
    /// The connector's, or a timeout when nothing moves for longer than the limits allow.
    pub async fn answer(
        self,
        mut response: HttpConnectorFuture,
    ) -> Result<HttpResponse, ConnectorError> {
        let mut backlog = None;
        loop {
            let state = *self.progress.0.lock();
            let (what, limit) = if state.body_taken {
                ("no answer", self.limits.answer)
            } else {
                ("no byte of the body taken", self.limits.stall)
            };
            let silence = state.last.elapsed();
            if silence >= limit {
                return Err(ConnectorError::timeout(Stalled { what, limit }.into()));
            }
            let look = (limit / LOOKS).min(limit - silence);
            if let Ok(answer) = tokio::time::timeout(look, &mut response).await {
                return answer.map(|answer| self.watched(answer));
            }
            let now = self.backlog().await;
            if backlog.is_some() && now.is_some() && backlog != now {
                self.progress.note();
            }
            backlog = now;
        }
    }

    async fn backlog(&self) -> Option<u64> {
        let connection = self.connection.as_ref()?.get()?;
        backlog::unacknowledged(connection.local_addr()?, connection.remote_addr()?).await
    }

    fn watched(&self, mut answer: HttpResponse) -> HttpResponse {
        if !answer.body().is_end_stream() {
            let body = std::mem::replace(answer.body_mut(), SdkBody::taken());
            *answer.body_mut() = SdkBody::from_body_1_x(Arriving {
                body,
                limit: self.limits.reading,
                deadline: Box::pin(tokio::time::sleep(self.limits.reading)),
                waiting: false,
            });
        }
        answer
    }
}

/// An answer's body. It counts as stalled only while somebody waits for it.
struct Arriving {
    body: SdkBody,
    limit: Duration,
    deadline: Pin<Box<Sleep>>,
    waiting: bool,
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            this.waiting = false;
            return Poll::Ready(frame);
        }
        if !this.waiting {
            this.waiting = true;
            this.deadline.as_mut().reset(Instant::now() + this.limit);
        }
        ready!(this.deadline.as_mut().poll(context));
        let stalled = Stalled {
            what: "no byte of the answer",
            limit: this.limit,
        };
        Poll::Ready(Some(Err(stalled.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use aws_smithy_runtime_api::http::StatusCode;
    use http_body_util::BodyExt;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(900);

    fn request(bytes: &Bytes) -> HttpRequest {
        HttpRequest::new(SdkBody::from(bytes.clone()))
    }

    /// A connection that takes a piece whenever `pause` has passed, and answers after `thinking`.
    async fn send(pause: Duration, thinking: Duration) -> Result<HttpResponse, ConnectorError> {
        let mut request = request(&vec![7; 4 * PIECE].into());
        let limits = Limits::of(&request, PATIENCE);
        let watch = Watch::over(&mut request, limits);
        let response = HttpConnectorFuture::new(async move {
            let mut body = request.into_body();
            loop {
                tokio::time::sleep(pause).await;
                if body.frame().await.is_none() {
                    break;
                }
            }
            tokio::time::sleep(thinking).await;
            let status = StatusCode::try_from(200).unwrap();
            Ok(HttpResponse::new(status, SdkBody::empty()))
        });
        watch.answer(response).await
    }

    #[tokio::test]
    async fn a_body_is_handed_over_as_slices_of_itself_and_keeps_its_length() {
        let bytes = Bytes::from(vec![7; 2 * PIECE + 5]);
        let mut request = request(&bytes);
        let limits = Limits::of(&request, PATIENCE);
        let watch = Watch::over(&mut request, limits);
        let mut body = request.into_body();
        let mut position = 0;
        while position < bytes.len() {
            assert!(!watch.progress.0.lock().body_taken);
            assert_eq!(body.content_length(), Some((bytes.len() - position) as u64));
            let piece = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(piece.as_ptr(), bytes[position..].as_ptr());
            position += piece.len();
        }
        assert!(body.is_end_stream() && watch.progress.0.lock().body_taken);
    }

    #[tokio::test(start_paused = true)]
    async fn what_moves_is_not_cut_off_and_what_does_not_is() {
        let second = Duration::from_secs(1);
        assert!(send(STALL - second, ANSWER - second).await.is_ok());
        assert!(send(STALL + second, second).await.unwrap_err().is_timeout());
        assert!(
            send(second, ANSWER + second)
                .await
                .unwrap_err()
                .is_timeout()
        );
    }

    #[test]
    fn work_that_grows_with_the_object_has_longer_and_patience_bounds_all() {
        let slow = |method: &str, uri: &str, copies: bool| {
            let mut request = HttpRequest::new(SdkBody::empty());
            request.set_method(method).unwrap();
            request.set_uri(uri).unwrap();
            if copies {
                request.headers_mut().insert("x-amz-copy-source", "b/k");
            }
            Limits::of(&request, PATIENCE).answer == SLOW_ANSWER
        };
        assert!(slow("POST", "http://host/b/k?uploadId=u", false));
        assert!(slow("POST", "http://host/b/?delete", false));
        assert!(slow("PUT", "http://host/b/k?partNumber=1&uploadId=u", true));
        assert!(!slow("POST", "http://host/b/k?uploads", false));
        assert!(!slow(
            "PUT",
            "http://host/b/k?partNumber=1&uploadId=u",
            false
        ));
        assert!(!slow("DELETE", "http://host/b/k?uploadId=u", false));
        let limits = Limits::of(&request(&Bytes::new()), Duration::from_secs(1));
        assert_eq!(limits.stall.max(limits.answer), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_coming_is_an_error_only_while_somebody_waits() {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
        let frames = futures_util::stream::unfold(receiver, |mut receiver| async {
            let data = receiver.recv().await?;
            Some((Ok::<_, BoxError>(Frame::data(data)), receiver))
        });
        let mut body = Arriving {
            body: SdkBody::from_body_1_x(http_body_util::StreamBody::new(frames)),
            limit: STALL,
            deadline: Box::pin(tokio::time::sleep(STALL)),
            waiting: false,
        };
        sender.send(Bytes::from_static(b"a")).unwrap();
        tokio::time::sleep(2 * STALL).await;
        assert!(body.frame().await.unwrap().is_ok());
        assert!(body.frame().await.unwrap().is_err());
    }
}
