//! A ranged GET that goes on where it broke off.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::error::DisplayErrorContext;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};

use super::client::S3Client;
use super::errors::translate;
use crate::store::metrics::{Request, StoreMetrics};
use crate::store::{ETag, RangeBody, StoreError, StoreResult};

/// How often one body may break off without a single byte of progress in between.
const RESUMPTIONS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// A GET of one range of one version.
#[derive(Clone, Debug)]
pub(super) struct RangeRequest {
    pub client: Arc<S3Client>,
    pub metrics: Arc<StoreMetrics>,
    pub bucket: Arc<str>,
    pub object: Arc<str>,
    pub key: String,
    pub version: Option<ETag>,
}

struct Answer {
    body: ByteStream,
    etag: Option<ETag>,
    object_size: u64,
    range: Range<u64>,
}

struct Stream {
    request: RangeRequest,
    body: ByteStream,
    /// The next byte to deliver, and where the range ends.
    position: u64,
    end: u64,
    failures: u32,
}

impl RangeRequest {
    pub async fn send(self, range: Range<u64>) -> StoreResult<RangeBody> {
        let answer = self.ask(range.clone()).await?;
        let pinned = Self {
            version: self.version.clone().or(answer.etag.clone()),
            ..self
        };
        let stream = Stream {
            request: pinned,
            body: answer.body,
            position: answer.range.start,
            end: answer.range.end,
            failures: 0,
        };
        Ok(RangeBody {
            etag: answer.etag,
            object_size: answer.object_size,
            range: answer.range,
            frames: stream.frames(),
        })
    }

    /// Asks for a range: again when the answer is of another one, or of a part of it.
    async fn ask(&self, range: Range<u64>) -> StoreResult<Answer> {
        let mut failures = 0;
        loop {
            match self.try_ask(range.clone()).await {
                Err(StoreError::Corrupt { object, detail }) if failures < RESUMPTIONS => {
                    failures += 1;
                    tracing::debug!(object, detail, "a range was answered wrongly; asking again");
                    tokio::time::sleep(pause(failures)).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn try_ask(&self, range: Range<u64>) -> StoreResult<Answer> {
        self.metrics.count(Request::Get);
        let sent = self
            .client
            .sdk
            .get_object()
            .bucket(&*self.bucket)
            .key(&self.key)
            .range(format!("bytes={}-{}", range.start, range.end - 1))
            .set_if_match(self.version.as_ref().map(|etag| etag.as_str().to_owned()))
            .set_expected_bucket_owner(self.client.settings.expected_bucket_owner.clone())
            .set_request_payer(self.client.payer())
            .send()
            .await;
        let answer = sent.map_err(|error| translate(self.object.to_string(), error))?;
        let etag = answer.e_tag.as_deref().map(ETag::quoted);
        let length = u64::try_from(answer.content_length.unwrap_or(-1)).ok();
        let told = match answer.content_range.as_deref() {
            Some(text) => parse_content_range(text),
            // A store may answer a range that is the whole object with the whole object.
            None => length.map(|length| (0..length, length)),
        };
        // A store may ignore If-Match; the answer still tells what it is of.
        if let (Some(wanted), Some(found)) = (&self.version, &etag)
            && wanted.as_str().trim_matches('"') != found.as_str().trim_matches('"')
        {
            return Err(StoreError::Changed {
                object: self.object.to_string(),
            });
        }
        let Some((range_told, object_size)) = told else {
            return Err(self.corrupt("the answer tells no usable Content-Range"));
        };
        let wanted = range.start..range.end.min(object_size);
        if range_told != wanted || length.is_some_and(|length| length != wanted.end - wanted.start)
        {
            return Err(self.corrupt("the answer carries another range than was asked for"));
        }
        Ok(Answer {
            body: answer.body,
            etag,
            object_size,
            range: wanted,
        })
    }

    fn corrupt(&self, detail: &str) -> StoreError {
        StoreError::Corrupt {
            object: self.object.to_string(),
            detail: detail.to_owned(),
        }
    }
}

impl Stream {
    fn frames(self) -> BoxStream<'static, StoreResult<Bytes>> {
        Box::pin(stream::try_unfold(self, |mut stream| async move {
            let frame = stream.next().await?;
            Ok(frame.map(|frame| (frame, stream)))
        }))
    }

    async fn next(&mut self) -> StoreResult<Option<Bytes>> {
        while self.position < self.end {
            let detail = match self.body.try_next().await {
                Ok(Some(mut frame)) => {
                    frame.truncate((self.end - self.position) as usize);
                    if frame.is_empty() {
                        continue;
                    }
                    self.position += frame.len() as u64;
                    self.failures = 0;
                    self.request.metrics.received(frame.len() as u64);
                    return Ok(Some(frame));
                }
                Ok(None) => "the answer ended early".to_owned(),
                // A body that stalls ends with an error, too (see `watch`).
                Err(error) => DisplayErrorContext(error).to_string(),
            };
            self.resume(&detail).await?;
        }
        Ok(None)
    }

    /// Asks for the rest, of the same version, on another connection.
    async fn resume(&mut self, detail: &str) -> StoreResult<()> {
        self.failures += 1;
        let object = self.request.object.to_string();
        if self.failures > RESUMPTIONS {
            return Err(StoreError::Unavailable {
                object,
                detail: detail.to_owned(),
            });
        }
        tracing::debug!(
            object,
            detail,
            position = self.position,
            "a body broke off; resuming"
        );
        tokio::time::sleep(pause(self.failures)).await;
        let answer = self.request.ask(self.position..self.end).await?;
        if answer.range.end != self.end {
            return Err(StoreError::Changed { object });
        }
        self.body = answer.body;
        Ok(())
    }
}

/// Exponential, with jitter.
fn pause(failures: u32) -> Duration {
    let longest = FIRST_PAUSE * 2_u32.pow(failures.min(6) - 1);
    longest.mul_f64(rand::random_range(0.5..1.0))
}

/// `bytes 0-9/100` → the range and the object's size.
fn parse_content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    Some((first..last.checked_add(1)?, size.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_or_refused() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0..10, 100)));
        for bad in ["", "bytes", "bytes */100", "bytes 1/2", "bytes a-b/c"] {
            assert_eq!(parse_content_range(bad), None);
        }
    }
}
