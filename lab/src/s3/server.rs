//! Listening, and what happens to every request: counting, gates, faults, shaping.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, TryAcquireError};

use super::body::{Body, BrokenOff, Damage, damaged, incoming, spoil, text};
use super::faults::{Fault, Faults, Rule};
use super::google;
use super::objects::{Content, Object, Objects};
use super::operations::{Answer, Failure, Operations};
use super::request::Asked;
use super::stats::{Counter, Kind, Logged, Stats};

#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Port 0: any free one.
    pub listen: SocketAddr,
    pub threads: usize,
    /// Before the first byte of each answer.
    pub first_byte: Duration,
    /// Bytes a second of each connection, each way.
    pub connection_rate: Option<u64>,
    /// Refuse requests that do not name the access key.
    pub verify_auth: bool,
    /// Refuse data without Google's checksum.
    pub wants_hashes: bool,
    /// Refuse requests that do not say that their sender pays.
    pub requester_pays: bool,
    pub auto_create_buckets: bool,
    /// Count and checksum what is uploaded, and forget it.
    pub discard_bodies: bool,
    /// Bytes; smaller parts, but the last, are refused at completion.
    pub minimum_part_size: u64,
    /// ETags as most stores have them: the MD5 of the bytes; of an upload, that of its parts' MD5s.
    pub md5_etags: bool,
    /// How far the server's clock is behind.
    pub clock_behind: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            threads: 1,
            first_byte: Duration::ZERO,
            connection_rate: None,
            verify_auth: true,
            wants_hashes: false,
            requester_pays: false,
            auto_create_buckets: true,
            discard_bodies: false,
            minimum_part_size: 5 << 20,
            md5_etags: false,
            clock_behind: Duration::ZERO,
        }
    }
}

struct Shared {
    objects: Arc<Objects>,
    operations: Operations,
    options: ServerOptions,
    counter: Arc<Counter>,
    faults: Faults,
    /// Kinds whose requests wait, and the word that they may go on.
    gates: Mutex<HashSet<Kind>>,
    /// Listings wait that ask for a further page.
    holds_further_pages: AtomicBool,
    released: Notify,
    /// How many requests are served at once; the others are refused.
    served_at_once: Mutex<Option<Arc<Semaphore>>>,
}

/// A running server, with a runtime of its own. Ends when dropped.
pub struct S3Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl S3Server {
    /// Starts listening.
    pub fn start(options: ServerOptions) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(options.threads)
            .thread_name("lab-s3")
            .enable_all()
            .build()
            .context("the server's threads")?;
        let listener = runtime
            .block_on(TcpListener::bind(options.listen))
            .with_context(|| format!("listening on {}", options.listen))?;
        let address = listener.local_addr().context("the server's address")?;
        let objects = Arc::new(Objects::default());
        let counter = Arc::new(Counter::default());
        let shared = Arc::new(Shared {
            operations: Operations {
                objects: Arc::clone(&objects),
                counter: Arc::clone(&counter),
                options: options.clone(),
            },
            objects,
            options,
            counter,
            faults: Faults::default(),
            gates: Mutex::default(),
            holds_further_pages: AtomicBool::new(false),
            released: Notify::new(),
            served_at_once: Mutex::default(),
        });
        runtime.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self {
            address,
            shared,
            runtime: Some(runtime),
        })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn stats(&self) -> Stats {
        self.shared.counter.stats()
    }

    pub fn log(&self) -> Vec<Logged> {
        self.shared.counter.log()
    }

    pub fn reset_stats(&self) {
        self.shared.counter.reset();
    }

    /// Puts a schedule of faults in force, in place of the former.
    pub fn set_faults(&self, seed: u64, rules: Vec<Rule>) {
        self.shared.faults.set(seed, rules);
    }

    /// Requests of this kind wait until [`Self::release`].
    pub fn hold(&self, kind: Kind) {
        self.shared.gates.lock().insert(kind);
    }

    pub fn release(&self, kind: Kind) {
        self.shared.gates.lock().remove(&kind);
        self.shared.released.notify_waiters();
    }

    /// Listings that ask for another page than the first wait until
    /// [`Self::release_further_pages`].
    pub fn hold_further_pages(&self) {
        self.shared
            .holds_further_pages
            .store(true, Ordering::SeqCst);
    }

    pub fn release_further_pages(&self) {
        self.shared
            .holds_further_pages
            .store(false, Ordering::SeqCst);
        self.shared.released.notify_waiters();
    }

    /// From now on, what comes while so many requests are being served is answered with SlowDown;
    /// `None`: nothing is.
    pub fn limit_in_flight(&self, most: Option<usize>) {
        *self.shared.served_at_once.lock() = most.map(|most| Arc::new(Semaphore::new(most)));
    }

    /// Keys of a bucket, in order.
    pub fn keys(&self, bucket: &str) -> Vec<String> {
        let buckets = self.shared.objects.buckets.lock();
        buckets
            .get(bucket)
            .map_or_else(Vec::new, |bucket| bucket.keys().cloned().collect())
    }

    /// An object's bytes.
    pub fn bytes(&self, bucket: &str, key: &str) -> Option<Vec<u8>> {
        self.range(bucket, key, 0..u64::MAX)
    }

    /// A range of an object's bytes, as far as it has them.
    pub fn range(&self, bucket: &str, key: &str, range: Range<u64>) -> Option<Vec<u8>> {
        let object = self.shared.objects.get(bucket, key)?;
        let size = object.content.size();
        let range = range.start.min(size)..range.end.min(size);
        Some(object.content.slice(range).concat())
    }

    /// An object's size, bytes: also of one whose bytes were not kept.
    pub fn size(&self, bucket: &str, key: &str) -> Option<u64> {
        let object = self.shared.objects.get(bucket, key)?;
        Some(object.content.size())
    }

    pub fn put(&self, bucket: &str, key: &str, bytes: impl Into<Bytes>) {
        self.put_at(bucket, key, bytes, SystemTime::now());
    }

    /// An object that says it was written at `modified`.
    pub fn put_at(&self, bucket: &str, key: &str, bytes: impl Into<Bytes>, modified: SystemTime) {
        self.insert(bucket, key, Content::Frames(vec![bytes.into()]), modified);
    }

    /// An object of generated bytes behind `head`, which takes no memory.
    pub fn put_generated(&self, bucket: &str, key: &str, head: impl Into<Bytes>, size: u64) {
        self.insert(
            bucket,
            key,
            Content::generated([(0, head.into())], size),
            SystemTime::now(),
        );
    }

    fn insert(&self, bucket: &str, key: &str, content: Content, modified: SystemTime) {
        let etag = self.shared.objects.etag(None);
        let object = Object {
            content,
            etag,
            modified,
            headers: Vec::new(),
        };
        self.shared.objects.put(bucket, key, object);
    }

    pub fn delete(&self, bucket: &str, key: &str) {
        if let Some(bucket) = self.shared.objects.buckets.lock().get_mut(bucket) {
            bucket.remove(key);
        }
    }

    /// Parts that unfinished uploads hold.
    pub fn parts(&self) -> usize {
        let uploads = self.shared.objects.uploads.lock();
        uploads.values().map(|upload| upload.parts.len()).sum()
    }

    /// Unfinished uploads.
    pub fn uploads(&self) -> usize {
        self.uploads_below("")
    }

    /// Unfinished multipart uploads of keys that start with `prefix`.
    pub fn uploads_below(&self, prefix: &str) -> usize {
        let uploads = self.shared.objects.uploads.lock();
        let below = uploads.values().filter(|it| it.key.starts_with(prefix));
        below.count()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(|request| handle(Arc::clone(&shared), request));
            // A connection that a fault broke off ends with an error; so be it.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .max_buf_size(1 << 20)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn handle(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, BrokenOff> {
    let (parts, body) = request.into_parts();
    let asked = Asked::new(parts.method, &parts.uri, parts.headers);
    if asked.bucket == "-" {
        return Ok(control(&shared, &asked, body).await);
    }
    let kind = asked.kind();
    let _at_once = shared.counter.begin(kind);
    let outcome = serve(&shared, kind, &asked, body).await;
    let status = outcome
        .as_ref()
        .map_or(0, |answer| answer.status().as_u16());
    shared.counter.answered(Logged {
        kind,
        key: asked.key.clone(),
        range: asked.header("range").map(str::to_owned),
        status,
    });
    outcome
}

async fn serve(
    shared: &Shared,
    kind: Kind,
    asked: &Asked,
    body: Incoming,
) -> Result<Answer, BrokenOff> {
    let fault = shared.faults.next(kind, &asked.key);
    match fault {
        Some(Fault::ResetBefore) => return Err(BrokenOff),
        Some(Fault::Deaf) => std::future::pending::<()>().await,
        _ => {}
    }
    let place = place(shared);
    let mut body = incoming(body, shared.options.connection_rate)
        .await
        .map_err(|_| BrokenOff)?;
    if fault == Some(Fault::WrongByte) {
        spoil(&mut body);
    }
    shared
        .counter
        .bytes_in(kind, body.iter().map(|frame| frame.len() as u64).sum());
    let Ok(_place) = place else {
        return Ok(Failure(503, "SlowDown".to_owned()).answer());
    };
    wait_at_gate(shared, kind, asked).await;
    if !shared.options.first_byte.is_zero() {
        tokio::time::sleep(shared.options.first_byte).await;
    }
    if shared.options.verify_auth && !is_authorised(asked) {
        return Ok(Failure(403, "InvalidAccessKeyId".to_owned()).answer());
    }
    let has_data = matches!(kind, Kind::Put | Kind::UploadPart) && !body.is_empty();
    if shared.options.wants_hashes && has_data && asked.header("x-goog-hash").is_none() {
        return Ok(Failure(400, "MissingDigest".to_owned()).answer());
    }
    let pays = asked.header("x-amz-request-payer") == Some("requester");
    if shared.options.requester_pays && !pays {
        return Ok(Failure(403, "AccessDenied".to_owned()).answer());
    }
    let mut damage = Damage::default();
    match &fault {
        Some(Fault::Status(status, code)) => return Ok(Failure(*status, code.clone()).answer()),
        Some(Fault::Silent) => std::future::pending::<()>().await,
        Some(Fault::ResetAfter(bytes)) => damage.break_after = Some(*bytes),
        Some(Fault::Stall(milliseconds)) => {
            damage.stall = Some(Duration::from_millis(*milliseconds));
        }
        Some(Fault::Truncate(bytes)) => damage.truncate = Some(*bytes),
        Some(Fault::WrongByte) => damage.wrong_byte = true,
        _ => {}
    }
    let mut answer = shared
        .operations
        .run(kind, asked, body, damage)
        .unwrap_or_else(|failure| failure.answer());
    google::tell_generation(answer.headers_mut());
    match fault {
        Some(Fault::DoThenFail) => Ok(Failure(504, "GatewayTimeout".to_owned()).answer()),
        Some(Fault::DoThenReset) => Err(BrokenOff),
        // Objects are damaged where they are read.
        _ if matches!(kind, Kind::Get | Kind::Head) => Ok(answer),
        _ => Ok(damaged(answer, damage).await),
    }
}

/// A place among those served at once, if there is a limit; `Err` when there is none left.
fn place(shared: &Shared) -> Result<Option<OwnedSemaphorePermit>, TryAcquireError> {
    match &*shared.served_at_once.lock() {
        Some(places) => Arc::clone(places).try_acquire_owned().map(Some),
        None => Ok(None),
    }
}

async fn wait_at_gate(shared: &Shared, kind: Kind, asked: &Asked) {
    let is_further_page = asked.query.contains_key("continuation-token");
    loop {
        let released = shared.released.notified();
        tokio::pin!(released);
        released.as_mut().enable();
        let held = is_further_page && shared.holds_further_pages.load(Ordering::SeqCst);
        if !held && !shared.gates.lock().contains(&kind) {
            return;
        }
        released.await;
    }
}

fn is_authorised(asked: &Asked) -> bool {
    let named = format!("{}/", super::ACCESS_KEY);
    let header = asked.header("authorization").unwrap_or_default();
    let query = asked
        .query
        .get("X-Amz-Credential")
        .map_or("", String::as_str);
    header.contains(&format!("Credential={named}"))
        || header.starts_with(&format!("AWS {}:", super::ACCESS_KEY))
        || query.starts_with(&named)
}

/// The server's own paths, under `/-/lab/`.
async fn control(shared: &Shared, asked: &Asked, body: Incoming) -> Answer {
    let body = incoming(body, None).await.unwrap_or_default().concat();
    let parameter = |name: &str| asked.query.get(name).cloned().unwrap_or_default();
    let document = match (asked.method.as_str(), asked.key.as_str()) {
        ("GET", "lab/stats") => serde_json::to_string(&shared.counter.stats()),
        ("GET", "lab/requests") => serde_json::to_string(&shared.counter.log()),
        ("GET", "lab/objects") => {
            let (bucket, prefix) = (parameter("bucket"), parameter("prefix"));
            serde_json::to_string(&shared.objects.list(&bucket, &prefix))
        }
        ("DELETE", "lab/objects") => {
            let (bucket, prefix) = (parameter("bucket"), parameter("prefix"));
            shared.objects.remove(&bucket, &prefix);
            Ok("{}".to_owned())
        }
        ("POST", "lab/stats/reset") => {
            shared.counter.reset();
            Ok("{}".to_owned())
        }
        ("POST", "lab/faults") => match serde_json::from_slice::<Vec<Rule>>(&body) {
            Ok(rules) => {
                let seed = asked.query.get("seed").and_then(|seed| seed.parse().ok());
                shared.faults.set(seed.unwrap_or(1), rules);
                Ok("{}".to_owned())
            }
            Err(error) => return Failure(400, error.to_string()).answer(),
        },
        ("PUT", "lab/generated") => {
            let Ok(size) = parameter("size").parse() else {
                return Failure(400, "size".to_owned()).answer();
            };
            let Some(pieces) = pieces(&parameter("pieces"), body.into()) else {
                return Failure(400, "pieces".to_owned()).answer();
            };
            let etag = shared.objects.etag(None);
            let content = Content::generated(pieces, size);
            let modified = SystemTime::now();
            let object = Object {
                content,
                etag,
                modified,
                headers: Vec::new(),
            };
            shared
                .objects
                .put(&parameter("bucket"), &parameter("key"), object);
            Ok("{}".to_owned())
        }
        _ => return Failure(404, "NoSuchControl".to_owned()).answer(),
    };
    let document = document.unwrap_or_else(|error| error.to_string());
    Response::new(text(document))
}

/// What lies among generated bytes: `told` is where each piece begins and how long it is, such as
/// `0:2743,67111607:64`, and `bytes` are all of them.
fn pieces(told: &str, mut bytes: Bytes) -> Option<Vec<(u64, Bytes)>> {
    let mut pieces = Vec::new();
    for piece in told.split(',') {
        let (at, length) = piece.split_once(':')?;
        let length = length
            .parse()
            .ok()
            .filter(|length| *length <= bytes.len())?;
        pieces.push((at.parse().ok()?, bytes.split_to(length)));
    }
    Some(pieces)
}
