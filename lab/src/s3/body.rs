//! Bodies: read frame by frame, with or without S3's chunks; sent paced, broken off, or whole.

use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::{Frame, Incoming};
use hyper::header::CONTENT_LENGTH;
use tokio::time::Instant;

/// Frames of an answer are cut to this, so that pacing is even and a stall is in the middle, bytes.
const PIECE: usize = 256 * 1024;

pub(super) type Frames = Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, BrokenOff>> + Send>>;
pub(super) type Body = StreamBody<Frames>;

/// The connection is dropped in the middle of the body.
#[derive(Debug)]
pub(super) struct BrokenOff;

impl std::fmt::Display for BrokenOff {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("broken off on purpose")
    }
}

impl std::error::Error for BrokenOff {}

/// Lets so many bytes a second pass.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<f64>,
    due: Instant,
}

impl Pace {
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            rate: rate.map(|rate| rate as f64),
            due: Instant::now(),
        }
    }

    pub async fn pass(&mut self, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let now = Instant::now();
        self.due = self.due.max(now - Duration::from_millis(5))
            + Duration::from_secs_f64(bytes as f64 / rate);
        if self.due > now {
            tokio::time::sleep_until(self.due).await;
        }
    }
}

/// What is to happen to an answer's body.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Damage {
    pub break_after: Option<u64>,
    pub stall: Option<Duration>,
    /// The body ends after so many bytes, as if it were meant to.
    pub truncate: Option<u64>,
    pub wrong_byte: bool,
}

/// Inverts the first byte of a body.
pub(super) fn spoil(frames: &mut [Bytes]) {
    if let Some(frame) = frames.iter_mut().find(|frame| !frame.is_empty()) {
        let mut spoilt = frame.to_vec();
        spoilt[0] = !spoilt[0];
        *frame = spoilt.into();
    }
}

/// A body of `frames`, paced and damaged; `sending` is told the length of each piece.
pub(super) fn outgoing(
    frames: Vec<Bytes>,
    rate: Option<u64>,
    damage: Damage,
    sending: impl Fn(u64) + Send + 'static,
) -> Body {
    let state = (
        frames.into_iter(),
        Bytes::new(),
        Pace::new(rate),
        damage,
        0_u64,
        sending,
    );
    let frames = stream::unfold(Some(state), |state| async move {
        let (mut frames, mut current, mut pace, mut damage, sent, sending) = state?;
        while current.is_empty() {
            current = frames.next()?;
        }
        let mut length = current.len();
        if pace.rate.is_some() || damage.stall.is_some() {
            length = length.min(PIECE);
        }
        if let Some(limit) = damage.break_after {
            if sent >= limit {
                return Some((Err(BrokenOff), None));
            }
            length = length.min((limit - sent) as usize);
        }
        let piece = current.split_to(length);
        if sent > 0
            && let Some(stall) = damage.stall.take()
        {
            tokio::time::sleep(stall).await;
        }
        pace.pass(length).await;
        sending(length as u64);
        let sent = sent + length as u64;
        let state = (frames, current, pace, damage, sent, sending);
        Some((Ok(Frame::data(piece)), Some(state)))
    });
    StreamBody::new(Box::pin(frames))
}

/// An answer whose body is damaged; without a body there is nothing to damage.
pub(super) async fn damaged(answer: Response<Body>, damage: Damage) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    let mut whole = match body.collect().await {
        Ok(whole) => whole.to_bytes(),
        Err(BrokenOff) => Bytes::new(),
    };
    if let Some(length) = damage.truncate {
        whole.truncate(length as usize);
        head.headers.insert(CONTENT_LENGTH, whole.len().into());
    }
    // A stall comes between two frames.
    let second = whole.split_off(whole.len() / 2);
    Response::from_parts(head, outgoing(vec![whole, second], None, damage, |_| {}))
}

/// A body that is one text.
pub(super) fn text(text: String) -> Body {
    outgoing(vec![text.into()], None, Damage::default(), |_| {})
}

/// Reads a request's body, frame by frame, never copied together.
pub(super) async fn incoming(
    mut body: Incoming,
    rate: Option<u64>,
) -> Result<Vec<Bytes>, hyper::Error> {
    let mut pace = Pace::new(rate);
    let mut frames = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            pace.pass(data.len()).await;
            frames.push(data);
        }
    }
    Ok(frames)
}

/// A header that comes after the body: name and value.
pub(super) type Trailer = (String, String);

/// Takes `aws-chunked` framing off: `size;extensions CRLF data CRLF … 0 CRLF trailers`. Returns
/// the data and the trailers.
pub(super) fn unchunk(frames: Vec<Bytes>) -> (Vec<Bytes>, Vec<Trailer>) {
    let mut reader = Reader {
        frames: frames.into_iter(),
        current: Bytes::new(),
    };
    let mut data = Vec::new();
    while let Some(line) = reader.line() {
        let size = line.split(';').next().unwrap_or_default().trim().to_owned();
        let Ok(mut left) = usize::from_str_radix(&size, 16) else {
            break;
        };
        if left == 0 {
            break;
        }
        while left > 0 {
            let Some(piece) = reader.take(left) else {
                break;
            };
            left -= piece.len();
            data.push(piece);
        }
        reader.line();
    }
    let mut trailers = Vec::new();
    while let Some(line) = reader.line() {
        if let Some((name, value)) = line.split_once(':') {
            trailers.push((name.trim().to_lowercase(), value.trim().to_owned()));
        }
    }
    (data, trailers)
}

struct Reader {
    frames: std::vec::IntoIter<Bytes>,
    current: Bytes,
}

impl Reader {
    fn fill(&mut self) -> bool {
        while self.current.is_empty() {
            match self.frames.next() {
                Some(frame) => self.current = frame,
                None => return false,
            }
        }
        true
    }

    fn take(&mut self, most: usize) -> Option<Bytes> {
        self.fill()
            .then(|| self.current.split_to(most.min(self.current.len())))
    }

    fn line(&mut self) -> Option<String> {
        let mut line = BytesMut::new();
        while self.fill() {
            let end = self.current.iter().position(|byte| *byte == b'\n');
            match end {
                Some(end) => {
                    line.extend_from_slice(&self.current.split_to(end + 1));
                    break;
                }
                None => line.extend_from_slice(&std::mem::take(&mut self.current)),
            }
        }
        if line.is_empty() {
            return None;
        }
        Some(
            String::from_utf8_lossy(&line)
                .trim_end_matches(['\r', '\n'])
                .to_owned(),
        )
    }
}
