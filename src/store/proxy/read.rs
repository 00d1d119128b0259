//! Reading by the rule that spares the server: from the store behind it where that can be reached,
//! else in ranges, else one whole body for everybody.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use parking_lot::Mutex;
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, RANGE};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::access::{Access, Failed, answer};
use super::listing;
use super::switches::Switches;
use super::whole::Wholes;
use crate::store::metrics::StoreMetrics;
use crate::store::{ETag, RangeBody, StoreError, StoreResult};

/// Presigned addresses are good for 300 s: they are asked for anew before that.
const PRESIGNED_FOR: Duration = Duration::from_secs(240);
/// For so long everything goes through the server when the store behind it could not be asked.
const REFUSED_FOR: Duration = Duration::from_secs(300);
/// Some servers fetch all of an object before they send its first byte.
const WHOLE_ANSWER: Duration = Duration::from_secs(600);
/// How often a body that breaks off is asked for again without any byte of it having come.
const RESUMPTIONS: u32 = 4;

/// What a server says of itself.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(super) struct ServerInfo {
    #[serde(default)]
    multipart_downloads_enabled: bool,
    #[serde(default)]
    pub multipart_uploads_enabled: bool,
}

/// An address in the store behind the server.
#[derive(Clone, Debug, Deserialize)]
struct Presigned {
    url: String,
    #[serde(default)]
    headers: HashMap<String, String>,
    #[serde(skip)]
    asked: Option<Instant>,
}

/// Reads objects of one server.
#[derive(Debug)]
pub(super) struct Reading {
    access: Access,
    switches: Switches,
    metrics: Arc<StoreMetrics>,
    info: OnceCell<ServerInfo>,
    /// The store behind the server cannot be reached, or gives no addresses.
    refused_presigned: Mutex<Option<Instant>>,
    presigned: Mutex<HashMap<String, Presigned>>,
    /// The server has answered with all of an object when it was asked for a range.
    sends_wholes: AtomicBool,
    /// The server has answered, so that it is known what it sends.
    is_known: AtomicBool,
    /// Held by whoever finds that out: a whole body is not to be sent twice.
    probing: tokio::sync::Mutex<()>,
    pub wholes: Arc<Wholes>,
}

impl Reading {
    pub fn new(
        access: Access,
        wholes: Arc<Wholes>,
        switches: Switches,
        metrics: Arc<StoreMetrics>,
    ) -> Self {
        let is_of_run = access.address.run.is_some();
        Self {
            access,
            switches,
            metrics,
            info: OnceCell::new(),
            refused_presigned: Mutex::default(),
            presigned: Mutex::default(),
            // The server may fetch all of it, whatever is asked for.
            sends_wholes: AtomicBool::new(is_of_run),
            is_known: AtomicBool::new(is_of_run),
            probing: tokio::sync::Mutex::default(),
            wholes,
        }
    }

    /// Bytes `range` of an object, if it still is that version where the server knows versions.
    pub async fn get(
        self: &Arc<Self>,
        key: &str,
        object: &Arc<str>,
        range: Range<u64>,
        version: Option<&ETag>,
    ) -> StoreResult<RangeBody> {
        let probing = match self.is_known.load(Ordering::Relaxed) {
            true => None,
            false => Some(self.probing.lock().await),
        };
        if self.sends_wholes.load(Ordering::Relaxed) {
            drop(probing);
            return self.whole(key, object, range, None).await;
        }
        let mut ranged = Ranged {
            reading: Arc::clone(self),
            key: key.to_owned(),
            object: Arc::clone(object),
            version: version.cloned(),
            at: range.start,
            end: range.end,
            response: None,
            object_size: None,
            broken: 0,
        };
        let changes = self.wholes.changes();
        let answered = ranged.request().await?;
        self.is_known.store(true, Ordering::Relaxed);
        match answered {
            Answered::Range(range, object_size) => {
                ranged.end = range.end;
                Ok(RangeBody {
                    etag: ranged.version.clone(),
                    object_size,
                    range,
                    frames: ranged.frames(),
                })
            }
            Answered::Whole(response) => {
                if !self.sends_wholes.swap(true, Ordering::Relaxed) {
                    let server = &self.access.address.base;
                    tracing::info!(
                        server,
                        "it sends whole objects only; each is read once, in order"
                    );
                }
                drop(probing);
                let response = Some((changes, response));
                self.whole(key, object, range, response).await
            }
        }
    }

    /// Serves a range from the one body, which begins now if there is none.
    async fn whole(
        &self,
        key: &str,
        object: &Arc<str>,
        range: Range<u64>,
        response: Option<(u64, Response)>,
    ) -> StoreResult<RangeBody> {
        let beginning = self.wholes.beginning(key);
        let begins = beginning.lock().await;
        let kept = self.wholes.get(key);
        let is_fresh = kept.as_ref().is_some_and(|whole| whole.is_fresh());
        let size = match &kept {
            Some(whole) if is_fresh => whole.size,
            _ => {
                let found = listing::find(&self.access, object, key).await?;
                found.ok_or_else(|| not_found(object))?.size
            }
        };
        let whole = match kept.filter(|whole| whole.size == size) {
            Some(whole) => whole,
            None => {
                let response = match response {
                    Some(response) => response,
                    None => {
                        let changes = self.wholes.changes();
                        let url = self.access.address.object(key);
                        let build = |client: &Client| client.get(&url);
                        let response = self.access.send(object, WHOLE_ANSWER, build).await?;
                        (changes, response)
                    }
                };
                let (patience, metrics) = (self.access.patience, Arc::clone(&self.metrics));
                let object = Arc::clone(object);
                self.wholes
                    .begin(key, object, size, response, patience, metrics)?
            }
        };
        if !is_fresh {
            whole.refresh();
        }
        drop(begins);
        if range.start >= whole.size {
            return Err(beyond(object, range.start, whole.size));
        }
        let range = range.start..range.end.min(whole.size);
        Ok(RangeBody {
            etag: None,
            object_size: whole.size,
            range: range.clone(),
            frames: whole.frames(range),
        })
    }

    /// What the server says of itself; `None` where it could not be asked.
    pub async fn info(&self) -> Option<ServerInfo> {
        let ask = async || {
            let Some(url) = self.access.address.server_info() else {
                return Ok(ServerInfo::default());
            };
            match self.access.ask(&url, |client| client.get(&url)).await {
                Err(failed) if failed.is_passing() => Err(failed),
                // Older servers have no such answer.
                answer => Ok(answer.unwrap_or_default()),
            }
        };
        self.info.get_or_try_init(ask).await.ok().copied()
    }

    /// Whether the store behind the server may be turned to. Where the server could not be asked, it is
    /// asked again after a while.
    async fn gives_addresses(&self) -> bool {
        if let Some(told) = self.switches.downloads {
            return told;
        }
        let info = self.info().await;
        if info.is_none() {
            *self.refused_presigned.lock() = Some(Instant::now());
        }
        info.is_some_and(|info| info.multipart_downloads_enabled)
    }

    /// Where the store behind the server has an object, if it can be asked.
    async fn presigned(&self, key: &str, object: &str) -> Option<Presigned> {
        if self.is_refused() || !self.gives_addresses().await {
            return None;
        }
        if let Some(known) = self.presigned.lock().get(key)
            && known
                .asked
                .is_some_and(|asked| asked.elapsed() < PRESIGNED_FOR)
        {
            return Some(known.clone());
        }
        let url = self.access.address.presigned(key);
        let asked = Instant::now();
        let answer: Result<Presigned, Failed> =
            self.access.ask(object, |client| client.get(&url)).await;
        match answer {
            Ok(presigned) => {
                let presigned = Presigned {
                    asked: Some(asked),
                    ..presigned
                };
                let mut known = self.presigned.lock();
                known.retain(|_, it| it.asked.is_some_and(|at| at.elapsed() < PRESIGNED_FOR));
                known.insert(key.to_owned(), presigned.clone());
                Some(presigned)
            }
            Err(failed) => {
                // Only some stores have such addresses. What else is wrong the server tells itself.
                if failed.is(501) || failed.is(400) || failed.is(405) {
                    *self.refused_presigned.lock() = Some(Instant::now());
                }
                None
            }
        }
    }

    /// Whether addresses in the store behind the server were of no use a while ago.
    fn is_refused(&self) -> bool {
        let refused = *self.refused_presigned.lock();
        refused.is_some_and(|refused| refused.elapsed() < REFUSED_FOR)
    }

    fn forget_presigned(&self, key: &str) {
        self.presigned.lock().remove(key);
    }

    fn refuse_presigned(&self, url: &str, error: &StoreError) {
        let before = self.refused_presigned.lock().replace(Instant::now());
        if before.is_none() {
            let host = url::Url::parse(url).ok();
            let host = host
                .as_ref()
                .and_then(url::Url::host_str)
                .unwrap_or_default();
            tracing::warn!(host, %error,
                "the store behind the MLflow server cannot be reached from here; everything is read \
                 through the server");
        }
    }
}

/// What a server answered when it was asked for a range.
enum Answered {
    /// With these bytes of an object of so many.
    Range(Range<u64>, u64),
    Whole(Response),
}

/// A range on its way.
struct Ranged {
    reading: Arc<Reading>,
    key: String,
    object: Arc<str>,
    /// What was asked for, else what came first.
    version: Option<ETag>,
    at: u64,
    end: u64,
    response: Option<Response>,
    /// Bytes of the whole object, as the first answer told.
    object_size: Option<u64>,
    /// How often it broke off since the last byte.
    broken: u32,
}

impl Ranged {
    /// Asks for the rest, from where it lies if that can be.
    async fn request(&mut self) -> StoreResult<Answered> {
        let (reading, object) = (Arc::clone(&self.reading), Arc::clone(&self.object));
        for _ in 0..2 {
            let Some(presigned) = reading.presigned(&self.key, &object).await else {
                break;
            };
            let client = reading.access.stranger();
            let mut headers = HeaderMap::new();
            for (name, value) in &presigned.headers {
                if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse()) {
                    headers.insert(name, value);
                }
            }
            let request = client.get(&presigned.url).headers(headers);
            let sent = self.ranged(request).send();
            match answer(&object, reading.access.patience, sent).await {
                Ok(response) => return self.accept(response),
                Err(failed) if failed.is(403) => reading.forget_presigned(&self.key),
                Err(failed) if failed.is(412) => return Err(self.changed()),
                Err(failed) if failed.is(404) => return Err(failed.error),
                Err(failed) if failed.is(416) => return Err(self.beyond().await),
                Err(failed) if failed.unreachable => {
                    reading.refuse_presigned(&presigned.url, &failed.error);
                }
                Err(failed) if failed.is_passing() => failed.pause(1).await,
                Err(failed) => reading.refuse_presigned(&presigned.url, &failed.error),
            }
        }
        let url = reading.access.address.object(&self.key);
        let build = |client: &Client| self.ranged(client.get(&url));
        match reading.access.send(&object, WHOLE_ANSWER, build).await {
            Ok(response) => self.accept(response),
            Err(failed) if failed.is(412) => Err(self.changed()),
            Err(failed) if failed.is(416) => Err(self.beyond().await),
            // So some stores answer when there is nothing.
            Err(failed) if failed.is(500) => {
                let found = listing::find(&reading.access, &object, &self.key).await;
                match found {
                    Ok(None) => Err(not_found(&object)),
                    _ => Err(failed.error),
                }
            }
            Err(failed) => Err(failed.error),
        }
    }

    /// There is nothing where it was asked for.
    async fn beyond(&self) -> StoreError {
        let found = listing::find(&self.reading.access, &self.object, &self.key).await;
        match found {
            Ok(Some(meta)) => beyond(&self.object, self.at, meta.size),
            Ok(None) => not_found(&self.object),
            Err(error) => error,
        }
    }

    fn ranged(&self, request: RequestBuilder) -> RequestBuilder {
        let request = request.header(RANGE, format!("bytes={}-{}", self.at, self.end - 1));
        let version = self.version.as_ref();
        match version.and_then(|etag| HeaderValue::from_str(etag.as_str()).ok()) {
            Some(etag) => request.header(IF_MATCH, etag),
            None => request,
        }
    }

    fn accept(&mut self, response: Response) -> StoreResult<Answered> {
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(Answered::Whole(response));
        }
        let told = response.headers().get(CONTENT_RANGE);
        let told = told.and_then(|value| value.to_str().ok());
        let Some((range, size)) = told.and_then(content_range) else {
            return Err(StoreError::Unsupported {
                object: self.object.to_string(),
                detail: format!("the server does not say which bytes these are: {told:?}"),
            });
        };
        if range.start != self.at || range.end > self.end {
            return Err(StoreError::Corrupt {
                object: self.object.to_string(),
                detail: format!("asked for {}-{}, got {range:?}", self.at, self.end),
            });
        }
        let etag = response.headers().get(ETAG);
        let etag = etag.and_then(|value| value.to_str().ok()).map(ETag::new);
        let is_another = self.version.is_some() && etag.is_some() && etag != self.version;
        if is_another || self.object_size.is_some_and(|told| told != size) {
            return Err(self.changed());
        }
        self.object_size = Some(size);
        self.version = etag.or(self.version.take());
        self.response = Some(response);
        Ok(Answered::Range(range, size))
    }

    fn changed(&self) -> StoreError {
        StoreError::Changed {
            object: self.object.to_string(),
        }
    }

    fn frames(self) -> BoxStream<'static, StoreResult<Bytes>> {
        Box::pin(stream::try_unfold(self, |mut ranged| async move {
            Ok(ranged.frame().await?.map(|frame| (frame, ranged)))
        }))
    }

    /// The next bytes; asks again for the rest when it breaks off.
    async fn frame(&mut self) -> StoreResult<Option<Bytes>> {
        while self.at < self.end {
            let failed = match &mut self.response {
                Some(response) => {
                    let patience = self.reading.access.patience;
                    match timeout(patience, response.chunk()).await {
                        Ok(Ok(Some(frame))) if frame.is_empty() => continue,
                        Ok(Ok(Some(frame))) => {
                            self.reading.metrics.received(frame.len() as u64);
                            self.at += frame.len() as u64;
                            self.broken = 0;
                            if self.at > self.end {
                                return Err(StoreError::Corrupt {
                                    object: self.object.to_string(),
                                    detail: "more came than was asked for".to_owned(),
                                });
                            }
                            return Ok(Some(frame));
                        }
                        Ok(Ok(None)) => Failed::last(StoreError::Unavailable {
                            object: self.object.to_string(),
                            detail: format!("it ended {} bytes early", self.end - self.at),
                        }),
                        Ok(Err(error)) => Failed::broken(&self.object, &error),
                        Err(_) => Failed::silent(&self.object, patience),
                    }
                }
                None => return Ok(None),
            };
            self.response = None;
            self.broken += 1;
            if self.broken > RESUMPTIONS {
                return Err(failed.error);
            }
            failed.pause(self.broken).await;
            match self.request().await {
                Ok(Answered::Range(range, _)) if range.end == self.end => {}
                // Some servers tell another version each time.
                Ok(_) | Err(StoreError::Changed { .. }) => return Err(failed.error),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// The bytes and the size that `Content-Range` tells of.
fn content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let size = size.parse().ok()?;
    (first <= last && last < size).then_some((first..last + 1, size))
}

fn not_found(object: &str) -> StoreError {
    StoreError::NotFound {
        object: object.to_owned(),
    }
}

fn beyond(object: &str, at: u64, size: u64) -> StoreError {
    StoreError::Other {
        object: object.to_owned(),
        detail: format!("there is nothing at {at}: it has {size}"),
    }
}

#[cfg(test)]
mod tests {
    use super::content_range;

    #[test]
    fn a_content_range_is_taken_only_whole() {
        assert_eq!(content_range("bytes 5-9/20"), Some((5..10, 20)));
        for text in [
            "bytes */20",
            "bytes 5-9/*",
            "bytes 9-5/20",
            "bytes 5-20/20",
            "5-9/20",
            "",
        ] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }
}
