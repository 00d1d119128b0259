//! S3's operations.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use hyper::Response;
use md5::{Digest as _, Md5};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::body::{Body, Damage, outgoing, spoil, text, unchunk};
use super::google;
use super::objects::{Content, Object, Objects};
use super::request::Asked;
use super::server::ServerOptions;
use super::stats::{Counter, Kind, Sending};
use super::time::{http_time, iso_time};
use super::xml::{elements, escape, text as xml_text};

const PAGE: usize = 1000;
/// What `encoding-type=url` leaves as it is.
const LISTED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'*');
pub(super) const XML: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

pub(super) type Answer = Response<Body>;
pub(super) type Outcome = Result<Answer, Failure>;

/// A checksum header, to be echoed.
type Checksum = (&'static str, String);

/// An S3 error.
#[derive(Debug)]
pub(super) struct Failure(pub u16, pub String);

pub(super) fn fail<T>(status: u16, code: &str) -> Result<T, Failure> {
    Err(Failure(status, code.to_owned()))
}

impl Failure {
    pub fn answer(&self) -> Answer {
        let Self(status, code) = self;
        let document = format!(
            "{XML}<Error><Code>{code}</Code><Message>{code} (lab)</Message>\
             <RequestId>lab</RequestId></Error>"
        );
        document_answer(*status, document)
    }
}

pub(super) fn document_answer(status: u16, document: String) -> Answer {
    let length = document.len();
    let response = Response::builder()
        .status(status)
        .header("content-type", "application/xml")
        .header("content-length", length)
        .body(text(document));
    response.unwrap_or_else(|_| Response::new(text(String::new())))
}

pub(super) fn empty(status: u16, headers: &[(&str, String)]) -> Answer {
    let mut response = Response::builder()
        .status(status)
        .header("content-length", 0);
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    let response = response.body(text(String::new()));
    response.unwrap_or_else(|_| Response::new(text(String::new())))
}

/// The operations over one server's objects.
pub(super) struct Operations {
    pub objects: Arc<Objects>,
    pub counter: Arc<Counter>,
    pub options: ServerOptions,
}

impl Operations {
    pub fn run(&self, kind: Kind, asked: &Asked, body: Vec<Bytes>, damage: Damage) -> Outcome {
        self.check_bucket(asked)?;
        match kind {
            Kind::List => self.list(asked),
            Kind::Head | Kind::Get => self.get(kind, asked, damage),
            Kind::Put => self.put(asked, body),
            Kind::Copy => self.copy(asked),
            Kind::Delete => self.delete(asked, body),
            Kind::CreateMultipart => self.create_multipart(asked),
            Kind::UploadPart => self.upload_part(asked, body),
            Kind::CopyPart => self.copy_part(asked),
            Kind::CompleteMultipart => self.complete_multipart(asked, body),
            Kind::AbortMultipart => self.abort_multipart(asked),
            Kind::ListParts => self.list_parts(asked),
            Kind::ListUploads => self.list_uploads(asked),
            Kind::Other => self.other(asked),
        }
    }

    fn check_bucket(&self, asked: &Asked) -> Result<(), Failure> {
        if asked.bucket.is_empty() {
            return Ok(());
        }
        let mut buckets = self.objects.buckets.lock();
        let creates = asked.method == "PUT" && asked.key.is_empty();
        if creates || self.options.auto_create_buckets {
            buckets.entry(asked.bucket.clone()).or_default();
        }
        if buckets.contains_key(&asked.bucket) {
            Ok(())
        } else {
            fail(404, "NoSuchBucket")
        }
    }

    fn other(&self, asked: &Asked) -> Outcome {
        if asked.asks("location") {
            let document = format!("{XML}<LocationConstraint></LocationConstraint>");
            return Ok(document_answer(200, document));
        }
        if asked.bucket.is_empty() {
            let names: String = self
                .objects
                .buckets
                .lock()
                .keys()
                .map(|name| format!("<Bucket><Name>{}</Name></Bucket>", escape(name)))
                .collect();
            let document = format!(
                "{XML}<ListAllMyBucketsResult><Buckets>{names}</Buckets></ListAllMyBucketsResult>"
            );
            return Ok(document_answer(200, document));
        }
        Ok(empty(200, &[]))
    }

    fn list(&self, asked: &Asked) -> Outcome {
        let parameter = |name: &str| asked.query.get(name).cloned().unwrap_or_default();
        let (prefix, delimiter) = (parameter("prefix"), parameter("delimiter"));
        let second = parameter("list-type") == "2";
        let most = parameter("max-keys").parse().unwrap_or(PAGE).min(PAGE);
        let after = match (second, asked.query.get("continuation-token")) {
            (true, Some(token)) => percent_decode_str(token).decode_utf8_lossy().into_owned(),
            (true, None) => parameter("start-after"),
            (false, _) => parameter("marker"),
        };
        let url = parameter("encoding-type") == "url";
        let shown = |key: &str| {
            if url {
                utf8_percent_encode(key, LISTED).to_string()
            } else {
                escape(key)
            }
        };
        let buckets = self.objects.buckets.lock();
        let Some(bucket) = buckets.get(&asked.bucket) else {
            return fail(404, "NoSuchBucket");
        };
        let mut contents = String::new();
        let mut prefixes = BTreeSet::new();
        let mut count = 0;
        let mut last = String::new();
        let mut truncated = false;
        let start = if after > prefix { &after } else { &prefix };
        for (key, object) in bucket.range(start.clone()..) {
            if !key.starts_with(&prefix) {
                break;
            }
            if *key <= after || (!last.is_empty() && last.ends_with('/') && key.starts_with(&last))
            {
                continue;
            }
            let common = (!delimiter.is_empty())
                .then(|| key[prefix.len()..].find(&delimiter))
                .flatten()
                .map(|end| key[..prefix.len() + end + delimiter.len()].to_owned());
            if let Some(common) = &common
                && (prefixes.contains(common) || (!after.is_empty() && after.starts_with(common)))
            {
                continue;
            }
            if count == most {
                // As S3 has it: who asks for no keys at all is not told of more.
                truncated = most > 0;
                break;
            }
            count += 1;
            match common {
                Some(common) => {
                    last.clone_from(&common);
                    prefixes.insert(common);
                }
                None => {
                    last.clone_from(key);
                    contents.push_str(&format!(
                        "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>{}</ETag>\
                         <Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                        shown(key),
                        iso_time(object.modified),
                        escape(&object.etag),
                        object.content.size()
                    ));
                }
            }
        }
        let common: String = prefixes
            .iter()
            .map(|prefix| {
                format!(
                    "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>",
                    shown(prefix)
                )
            })
            .collect();
        let next = if truncated {
            let token = utf8_percent_encode(&last, NON_ALPHANUMERIC);
            if second {
                format!("<NextContinuationToken>{token}</NextContinuationToken>")
            } else {
                format!("<NextMarker>{}</NextMarker>", shown(&last))
            }
        } else {
            String::new()
        };
        let encoding = if url {
            "<EncodingType>url</EncodingType>"
        } else {
            ""
        };
        Ok(document_answer(
            200,
            format!(
                "{XML}<ListBucketResult><Name>{}</Name><Prefix>{}</Prefix><KeyCount>{count}\
                 </KeyCount><MaxKeys>{most}</MaxKeys><Delimiter>{}</Delimiter>{encoding}\
                 <IsTruncated>{truncated}</IsTruncated>{next}{contents}{common}</ListBucketResult>",
                escape(&asked.bucket),
                shown(&prefix),
                escape(&delimiter),
            ),
        ))
    }

    fn get(&self, kind: Kind, asked: &Asked, damage: Damage) -> Outcome {
        let Some(object) = self.objects.get(&asked.bucket, &asked.key) else {
            return fail(404, "NoSuchKey");
        };
        if asked
            .header("if-match")
            .is_some_and(|wanted| !same(wanted, &object.etag))
        {
            return fail(412, "PreconditionFailed");
        }
        if asked
            .header("if-none-match")
            .is_some_and(|known| same(known, &object.etag))
        {
            return Ok(empty(304, &[("etag", object.etag)]));
        }
        let size = object.content.size();
        let Ok(range) = asked.range(size) else {
            return fail(416, "InvalidRange");
        };
        let (status, range_sent) = match &range {
            Some(range) => (206, range.clone()),
            None => (200, 0..size),
        };
        let whole = range_sent.end - range_sent.start;
        let length = damage.truncate.unwrap_or(whole).min(whole);
        let mut response = Response::builder()
            .status(status)
            .header("etag", &object.etag)
            .header("last-modified", http_time(object.modified))
            .header("accept-ranges", "bytes")
            .header("content-length", length);
        for (name, value) in &object.headers {
            response = response.header(name, value);
        }
        if range.is_some() {
            let told = format!("bytes {}-{}/{size}", range_sent.start, range_sent.end - 1);
            response = response.header("content-range", told);
        }
        let mut frames = Vec::new();
        if kind == Kind::Get {
            frames = object
                .content
                .slice(range_sent.start..range_sent.start + length);
        }
        if damage.wrong_byte {
            spoil(&mut frames);
        }
        let sending = Sending::begin(&self.counter);
        let counted = move |bytes| sending.bytes_out(kind, bytes);
        let body = outgoing(frames, self.options.connection_rate, damage, counted);
        let answer = response.body(body);
        answer.or_else(|_| fail(500, "InternalError"))
    }

    /// Data without framing, its checksum verified, and the checksum header to echo.
    pub(super) fn receive(
        &self,
        asked: &Asked,
        body: Vec<Bytes>,
    ) -> Result<(Vec<Bytes>, Option<Checksum>), Failure> {
        let chunked = asked
            .header("x-amz-content-sha256")
            .is_some_and(|it| it.contains("STREAMING"))
            || asked
                .header("content-encoding")
                .is_some_and(|it| it.contains("aws-chunked"));
        let (data, trailers) = if chunked {
            unchunk(body)
        } else {
            (body, Vec::new())
        };
        let told = |name: &str| {
            let trailer = trailers.iter().find(|(trailer, _)| trailer == name);
            asked
                .header(name)
                .map(str::to_owned)
                .or(trailer.map(|(_, value)| value.clone()))
        };
        let kinds = [
            ("x-amz-checksum-crc32c", CrcAlgorithm::Crc32Iscsi, 4),
            ("x-amz-checksum-crc32", CrcAlgorithm::Crc32IsoHdlc, 4),
            ("x-amz-checksum-crc64nvme", CrcAlgorithm::Crc64Nvme, 8),
        ];
        for (name, algorithm, bytes) in kinds {
            let Some(told) = told(name) else { continue };
            let mut digest = Digest::new(algorithm);
            data.iter().for_each(|frame| digest.update(frame));
            let value = digest.finalize().to_be_bytes();
            if BASE64_STANDARD.encode(&value[8 - bytes..]) != told {
                return fail(400, "BadDigest");
            }
            return Ok((data, Some((name, told))));
        }
        Ok((data, None))
    }

    /// The ETag of an object or a part of this data.
    pub(super) fn etag(&self, data: &[Bytes]) -> String {
        if !self.options.md5_etags {
            return self.objects.etag(None);
        }
        let mut digest = Md5::new();
        data.iter().for_each(|frame| digest.update(frame));
        format!("\"{}\"", hexadecimal(&digest.finalize()))
    }

    pub(super) fn now(&self) -> SystemTime {
        SystemTime::now() - self.options.clock_behind
    }

    pub(super) fn keep(&self, data: Vec<Bytes>) -> Content {
        if self.options.discard_bodies {
            Content::Discarded(data.iter().map(|frame| frame.len() as u64).sum())
        } else {
            Content::Frames(data)
        }
    }

    pub(super) fn check_condition(&self, asked: &Asked) -> Result<(), Failure> {
        let current = self.objects.get(&asked.bucket, &asked.key);
        if let Some(wanted) = asked.header("if-match") {
            match &current {
                None => return fail(404, "NoSuchKey"),
                Some(object) if !same(wanted, &object.etag) => {
                    return fail(412, "PreconditionFailed");
                }
                Some(_) => {}
            }
        }
        if asked.header("if-none-match") == Some("*") && current.is_some() {
            return fail(412, "PreconditionFailed");
        }
        let wanted = asked.header("x-goog-if-generation-match");
        if let Some(wanted) = wanted.and_then(|text| text.parse::<u64>().ok()) {
            let found = current.and_then(|object| google::generation(&object.etag));
            if found.unwrap_or(0) != wanted {
                return fail(412, "PreconditionFailed");
            }
        }
        Ok(())
    }

    fn put(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let (data, checksum) = self.receive(asked, body)?;
        self.check_condition(asked)?;
        let etag = self.etag(&data);
        let object = Object {
            content: self.keep(data),
            etag: etag.clone(),
            modified: self.now(),
            headers: asked.kept_headers(),
        };
        self.objects.put(&asked.bucket, &asked.key, object);
        let mut headers = vec![("etag", etag)];
        headers.extend(checksum);
        Ok(empty(200, &headers))
    }

    pub(super) fn source(&self, asked: &Asked) -> Result<Object, Failure> {
        let source = asked.header("x-amz-copy-source").unwrap_or_default();
        let source = percent_decode_str(source.trim_start_matches('/')).decode_utf8_lossy();
        let (bucket, key) = source.split_once('/').unwrap_or((&source, ""));
        let Some(object) = self.objects.get(bucket, key) else {
            return fail(404, "NoSuchKey");
        };
        let wanted = asked.header("x-amz-copy-source-if-match");
        if wanted.is_some_and(|wanted| !same(wanted, &object.etag)) {
            return fail(412, "PreconditionFailed");
        }
        Ok(object)
    }

    fn copy(&self, asked: &Asked) -> Outcome {
        let mut object = self.source(asked)?;
        object.etag = self.objects.etag(None);
        object.modified = self.now();
        if asked.header("x-amz-metadata-directive") == Some("REPLACE") {
            object.headers = asked.kept_headers();
        }
        let (etag, modified) = (object.etag.clone(), object.modified);
        self.objects.put(&asked.bucket, &asked.key, object);
        Ok(document_answer(
            200,
            format!(
                "{XML}<CopyObjectResult><ETag>{}</ETag><LastModified>{}</LastModified>\
                 </CopyObjectResult>",
                escape(&etag),
                iso_time(modified)
            ),
        ))
    }

    fn delete(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let mut buckets = self.objects.buckets.lock();
        let Some(bucket) = buckets.get_mut(&asked.bucket) else {
            return fail(404, "NoSuchBucket");
        };
        if !asked.key.is_empty() {
            bucket.remove(&asked.key);
            return Ok(empty(204, &[]));
        }
        let document = String::from_utf8_lossy(&body.concat()).into_owned();
        for object in elements(&document, "Object") {
            if let Some(key) = xml_text(object, "Key") {
                bucket.remove(&key);
            }
        }
        Ok(document_answer(
            200,
            format!("{XML}<DeleteResult></DeleteResult>"),
        ))
    }
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn same(one: &str, other: &str) -> bool {
    one == "*" || one.trim_matches('"') == other.trim_matches('"')
}
