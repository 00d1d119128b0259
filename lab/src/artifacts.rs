//! As much of the artifact routes of an MLflow server as tests of trouble need: objects in memory, and
//! answers that go wrong on purpose.

mod uploads;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderValue, RANGE};
use hyper::{Method, Request, Response};
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

/// Where the routes are.
pub const ROUTES: &str = "/api/2.0/mlflow-artifacts/";
/// Bytes of an answer that are sent at once.
const FRAME: usize = 64 << 10;
/// How often a body that is held looks whether it still is.
const HOLD: Duration = Duration::from_millis(20);

use uploads::Uploads;

pub type Answer = Response<BoxBody<Bytes, io::Error>>;

/// How the routes behave.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// All of an object is sent whatever range is asked for, and no length told.
    pub wholes_only: bool,
    /// The largest body that is taken, bytes; larger ones are answered with 413.
    pub largest_body: Option<usize>,
    /// Bytes of a body, either way, after which the connection breaks.
    pub breaks_after: Option<usize>,
    /// Answers to the next PUTs, which are stored all the same.
    pub after_storing: VecDeque<u16>,
    /// Answers to the next PUTs, which are not stored.
    pub instead_of_storing: VecDeque<u16>,
    /// How long a body that is asked for takes to begin.
    pub first_byte: Duration,
    /// PUTs are not stored, nor answered, as long as this is so.
    pub holds_bodies: bool,
    /// What it calls itself in the header `Server`.
    pub server: Option<&'static str>,
    /// Its route for uploads is the older one, which takes a body without a length for an empty one.
    pub older_route: bool,
    /// Its version; 3.17 if not told. It removes all names that begin so before that.
    pub version: Option<&'static str>,
    /// Where the store behind the server is: objects are asked for there, by their paths.
    pub presigned: Option<String>,
    /// Where parts are sent: below this address, which is the server's own for those that arrive.
    pub parts: Option<String>,
    /// Answers to the next parts, which are not kept.
    pub instead_of_parts: VecDeque<u16>,
    /// Answers to the next completions, without a word and without their taking place.
    pub instead_of_completing: VecDeque<u16>,
    /// Answers to the next completions, which take place all the same.
    pub after_completing: VecDeque<u16>,
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Below [`ROUTES`], decoded.
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    /// `Content-Length`.
    pub length: Option<String>,
}

/// The routes and what they keep.
#[derive(Default)]
pub struct Artifacts {
    objects: Mutex<BTreeMap<String, Bytes>>,
    behaviour: Mutex<Behaviour>,
    seen: Mutex<Vec<Seen>>,
    uploads: Mutex<Uploads>,
    waiting: AtomicUsize,
    most_waiting: AtomicUsize,
}

impl Artifacts {
    /// The most requests for bodies that waited for [`Behaviour::first_byte`] at once.
    pub fn most_waiting(&self) -> usize {
        self.most_waiting.load(Ordering::Relaxed)
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock() = behaviour;
    }

    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) {
        self.objects.lock().insert(path.to_owned(), bytes.into());
    }

    pub fn get(&self, path: &str) -> Option<Bytes> {
        self.objects.lock().get(path).cloned()
    }

    /// Requests of this method so far.
    pub fn seen(&self, method: &str) -> Vec<Seen> {
        let seen = self.seen.lock();
        let seen = seen.iter().filter(|seen| seen.method == method);
        seen.cloned().collect()
    }

    /// Whether it says that parts can be sent.
    pub fn takes_parts(&self) -> bool {
        self.behaviour.lock().parts.is_some()
    }

    pub fn version(&self) -> &'static str {
        self.behaviour.lock().version.unwrap_or("3.17.2")
    }

    /// What it calls itself, if anything.
    pub fn server(&self) -> Option<HeaderValue> {
        self.behaviour.lock().server.map(HeaderValue::from_static)
    }

    /// Answers a request; an error breaks the connection.
    pub async fn handle(&self, request: Request<Incoming>) -> io::Result<Answer> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().trim_start_matches(ROUTES);
        let path = percent_decode_str(path).decode_utf8_lossy().into_owned();
        let header = |name| parts.headers.get(name).and_then(|it| it.to_str().ok());
        self.seen.lock().push(Seen {
            method: parts.method.to_string(),
            path: path.clone(),
            range: header(RANGE).map(str::to_owned),
            authorization: header(AUTHORIZATION).map(str::to_owned),
            length: header(CONTENT_LENGTH).map(str::to_owned),
        });
        let behaviour = self.behaviour.lock().clone();
        if path == "artifacts" {
            let query = parts.uri.query().unwrap_or_default().replace('+', " ");
            let asked = query.split('&').find_map(|pair| pair.strip_prefix("path="));
            let asked = percent_decode_str(asked.unwrap_or_default()).decode_utf8_lossy();
            return Ok(told(200, &self.listing(&asked)));
        }
        if let Some(key) = path.strip_prefix("presigned/") {
            return Ok(match &behaviour.presigned {
                Some(base) => told(200, &json!({"url": format!("{base}/{key}"), "headers": {}})),
                None => told(501, &json!({"message": "no such addresses"})),
            });
        }
        if parts.method == Method::POST {
            let body = body.collect().await.map_err(io::Error::other)?;
            return Ok(self.step_of_upload(&path, &body.to_bytes()));
        }
        if let Some(part) = path.strip_prefix("parts/") {
            return self.part(part, body).await;
        }
        let Some(key) = path.strip_prefix("artifacts/") else {
            return Ok(told(404, &json!({"detail": "Not Found"})));
        };
        if key.contains('#') {
            return Ok(refused_name(behaviour.older_route));
        }
        match parts.method {
            Method::GET => {
                let waiting = self.waiting.fetch_add(1, Ordering::Relaxed) + 1;
                self.most_waiting.fetch_max(waiting, Ordering::Relaxed);
                tokio::time::sleep(behaviour.first_byte).await;
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                Ok(self.object(key, header(RANGE), &behaviour))
            }
            Method::PUT => self.store(key, body, &behaviour).await,
            Method::DELETE => {
                let below = format!("{key}/");
                let all = behaviour.version.is_some();
                let mut objects = self.objects.lock();
                objects.retain(|other, _| {
                    other != key && !other.starts_with(&below) && !(all && other.starts_with(key))
                });
                Ok(told(200, &json!({})))
            }
            _ => Ok(told(405, &json!({"detail": "Method Not Allowed"}))),
        }
    }

    fn listing(&self, path: &str) -> Value {
        let prefix = match path {
            "" => String::new(),
            path => format!("{path}/"),
        };
        let objects = self.objects.lock();
        let mut folders = BTreeSet::new();
        let mut files = Vec::new();
        for (key, bytes) in objects.iter() {
            let Some(name) = key.strip_prefix(&prefix) else {
                continue;
            };
            match name.split_once('/') {
                Some((folder, _)) => {
                    folders.insert(folder.to_owned());
                }
                // Nothing is not told.
                None if bytes.is_empty() => files.push(json!({"path": name, "is_dir": false})),
                None => {
                    let size = bytes.len();
                    files.push(json!({"path": name, "is_dir": false, "file_size": size}));
                }
            }
        }
        let folders = folders
            .iter()
            .map(|name| json!({"path": name, "is_dir": true}));
        files.extend(folders);
        match files.is_empty() {
            true => json!({}),
            false => json!({"files": files}),
        }
    }

    fn object(&self, key: &str, range: Option<&str>, behaviour: &Behaviour) -> Answer {
        let Some(bytes) = self.get(key) else {
            // So a server over S3 tells it, and one over a directory the other.
            let status = if behaviour.wholes_only { 500 } else { 404 };
            return told(
                status,
                &json!({"error_code": "INTERNAL_ERROR", "message": "?"}),
            );
        };
        let etag = format!("\"{:08x}\"", crc_fast::crc32_iscsi(&bytes));
        let asked = range.filter(|_| !behaviour.wholes_only).and_then(|range| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            let first: usize = first.parse().ok()?;
            let last: usize = last.parse().ok()?;
            Some(first..(last + 1).min(bytes.len()))
        });
        let size = bytes.len();
        let mut response = Response::builder();
        let sent = match asked {
            Some(range) if range.start >= size => return told(416, &json!({})),
            Some(range) => {
                let told = format!("bytes {}-{}/{size}", range.start, range.end - 1);
                response = response.status(206).header(CONTENT_RANGE, told);
                bytes.slice(range)
            }
            None => bytes,
        };
        if !behaviour.wholes_only {
            response = response.header(ETAG, etag);
        }
        let breaks_after = behaviour.breaks_after.unwrap_or(usize::MAX);
        let mut frames = Vec::new();
        let whole = sent.slice(..sent.len().min(breaks_after));
        for at in (0..whole.len()).step_by(FRAME) {
            let frame = whole.slice(at..whole.len().min(at + FRAME));
            frames.push(Ok(Frame::data(frame)));
        }
        if whole.len() < sent.len() {
            frames.push(Err(broken()));
        }
        let body = BoxBody::new(StreamBody::new(stream::iter(frames)));
        response.body(body).unwrap_or_default()
    }

    async fn store(
        &self,
        key: &str,
        mut body: Incoming,
        behaviour: &Behaviour,
    ) -> io::Result<Answer> {
        let told_size = body.size_hint().exact().unwrap_or(0);
        if behaviour
            .largest_body
            .is_some_and(|most| told_size > most as u64)
        {
            return Ok(told(413, &json!("Request Entity Too Large")));
        }
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(io::Error::other)?;
            bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if behaviour
                .breaks_after
                .is_some_and(|most| bytes.len() > most)
            {
                return Err(broken());
            }
        }
        while self.behaviour.lock().holds_bodies {
            tokio::time::sleep(HOLD).await;
        }
        let mut now = self.behaviour.lock();
        if let Some(status) = now.instead_of_storing.pop_front() {
            return Ok(told(status, &json!({"message": "on purpose"})));
        }
        let status = now.after_storing.pop_front().unwrap_or(200);
        drop(now);
        self.put(key, bytes);
        Ok(told(status, &json!({})))
    }
}

/// As either route refuses a name, to the letter.
fn refused_name(by_older_route: bool) -> Answer {
    let space = if by_older_route { " " } else { "" };
    let told = format!("{{\"error_code\":{space}\"INVALID_PARAMETER_VALUE\"}}");
    let body = Full::from(told).map_err(|never| match never {});
    let response = Response::builder().status(400).body(BoxBody::new(body));
    response.unwrap_or_default()
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "broken on purpose")
}

/// A document as an answer.
pub fn told(status: u16, document: &Value) -> Answer {
    let body = Full::from(document.to_string()).map_err(|never| match never {});
    let response = Response::builder().status(status).body(BoxBody::new(body));
    response.unwrap_or_default()
}
