//! S3's operations.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use hyper::Response;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::body::{Body, Damage, outgoing, spoil, text, unchunk};
use super::objects::{Content, Object, Objects, Part, Upload};
use super::request::{Asked, parse_range};
use super::server::ServerOptions;
use super::stats::Kind;
use super::xml::{elements, escape, text as xml_text};

const PAGE: usize = 1000;
/// What `encoding-type=url` leaves as it is.
const LISTED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'*');
const XML: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

/// An answer, and how many bytes of it are content.
pub(super) struct Answer {
    pub response: Response<Body>,
    pub content: u64,
}

type Outcome = Result<Answer, Failure>;

/// A checksum header, to be echoed.
type Checksum = (&'static str, String);

/// An S3 error.
#[derive(Debug)]
pub(super) struct Failure(pub u16, pub String);

fn fail<T>(status: u16, code: &str) -> Result<T, Failure> {
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

fn document_answer(status: u16, document: String) -> Answer {
    let length = document.len();
    let response = Response::builder()
        .status(status)
        .header("content-type", "application/xml")
        .header("content-length", length)
        .body(text(document));
    Answer {
        response: response.unwrap_or_else(|_| Response::new(text(String::new()))),
        content: 0,
    }
}

fn empty(status: u16, headers: &[(&str, String)]) -> Answer {
    let mut response = Response::builder()
        .status(status)
        .header("content-length", 0);
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    let response = response.body(text(String::new()));
    Answer {
        response: response.unwrap_or_else(|_| Response::new(text(String::new()))),
        content: 0,
    }
}

/// The operations over one server's objects.
pub(super) struct Operations {
    pub objects: Arc<Objects>,
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
        for (key, object) in bucket.range(prefix.clone()..) {
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
        let (frames, content) = if kind == Kind::Get {
            let sent = range_sent.start..range_sent.start + length;
            let mut frames = object.content.slice(sent);
            if damage.wrong_byte {
                spoil(&mut frames);
            }
            (frames, length)
        } else {
            (Vec::new(), 0)
        };
        let body = outgoing(frames, self.options.connection_rate, damage);
        let response = response.body(body);
        match response {
            Ok(response) => Ok(Answer { response, content }),
            Err(_) => fail(500, "InternalError"),
        }
    }

    /// Data without framing, its checksum verified, and the checksum header to echo.
    fn receive(
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

    fn keep(&self, data: Vec<Bytes>) -> Content {
        if self.options.discard_bodies {
            Content::Discarded(data.iter().map(|frame| frame.len() as u64).sum())
        } else {
            Content::Frames(data)
        }
    }

    fn check_condition(&self, asked: &Asked) -> Result<(), Failure> {
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
        Ok(())
    }

    fn put(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let (data, checksum) = self.receive(asked, body)?;
        self.check_condition(asked)?;
        let etag = self.objects.etag(None);
        let object = Object {
            content: self.keep(data),
            etag: etag.clone(),
            modified: SystemTime::now(),
            headers: asked.kept_headers(),
        };
        self.objects.put(&asked.bucket, &asked.key, object);
        let mut headers = vec![("etag", etag)];
        headers.extend(checksum);
        Ok(empty(200, &headers))
    }

    fn source(&self, asked: &Asked) -> Result<Object, Failure> {
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
        object.modified = SystemTime::now();
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

    fn create_multipart(&self, asked: &Asked) -> Outcome {
        let id = self.objects.upload_id();
        let upload = Upload {
            bucket: asked.bucket.clone(),
            key: asked.key.clone(),
            headers: asked.kept_headers(),
            parts: Default::default(),
        };
        self.objects.uploads.lock().insert(id.clone(), upload);
        Ok(document_answer(
            200,
            format!(
                "{XML}<InitiateMultipartUploadResult><Bucket>{}</Bucket><Key>{}</Key>\
                 <UploadId>{id}</UploadId></InitiateMultipartUploadResult>",
                escape(&asked.bucket),
                escape(&asked.key)
            ),
        ))
    }

    fn add_part(&self, asked: &Asked, content: Content) -> Result<String, Failure> {
        let number = asked
            .query
            .get("partNumber")
            .and_then(|number| number.parse().ok());
        let Some(number) = number.filter(|number| (1..=10_000).contains(number)) else {
            return fail(400, "InvalidArgument");
        };
        let etag = self.objects.etag(None);
        let mut uploads = self.objects.uploads.lock();
        let id = asked.query.get("uploadId").map_or("", String::as_str);
        let Some(upload) = uploads.get_mut(id).filter(|upload| upload.key == asked.key) else {
            return fail(404, "NoSuchUpload");
        };
        upload.parts.insert(
            number,
            Part {
                content,
                etag: etag.clone(),
            },
        );
        Ok(etag)
    }

    fn upload_part(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let (data, checksum) = self.receive(asked, body)?;
        let etag = self.add_part(asked, self.keep(data))?;
        let mut headers = vec![("etag", etag)];
        headers.extend(checksum);
        Ok(empty(200, &headers))
    }

    fn copy_part(&self, asked: &Asked) -> Outcome {
        let object = self.source(asked)?;
        let size = object.content.size();
        let Ok(range) = parse_range(asked.header("x-amz-copy-source-range"), size) else {
            return fail(400, "InvalidRange");
        };
        let range = range.unwrap_or(0..size);
        let content = match &object.content {
            Content::Discarded(_) => Content::Discarded(range.end - range.start),
            content => Content::Frames(content.slice(range)),
        };
        let etag = self.add_part(asked, content)?;
        Ok(document_answer(
            200,
            format!(
                "{XML}<CopyPartResult><ETag>{}</ETag></CopyPartResult>",
                escape(&etag)
            ),
        ))
    }

    fn complete_multipart(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let document = String::from_utf8_lossy(&body.concat()).into_owned();
        let id = asked.query.get("uploadId").map_or("", String::as_str);
        let upload = self.objects.uploads.lock().get(id).cloned();
        let Some(upload) = upload.filter(|upload| upload.key == asked.key) else {
            return fail(404, "NoSuchUpload");
        };
        let content = self.assemble(&document, &upload)?;
        self.check_condition(asked)?;
        let parts = elements(&document, "Part").len();
        let etag = self.objects.etag(Some(parts));
        let object = Object {
            content,
            etag: etag.clone(),
            modified: SystemTime::now(),
            headers: upload.headers,
        };
        self.objects.put(&asked.bucket, &asked.key, object);
        self.objects.uploads.lock().remove(id);
        Ok(document_answer(
            200,
            format!(
                "{XML}<CompleteMultipartUploadResult><Key>{}</Key><ETag>{}</ETag>\
                 </CompleteMultipartUploadResult>",
                escape(&asked.key),
                escape(&etag)
            ),
        ))
    }

    fn assemble(&self, document: &str, upload: &Upload) -> Result<Content, Failure> {
        let listed = elements(document, "Part");
        let mut frames = Vec::new();
        let mut discarded = 0;
        let mut previous = 0;
        for (index, part) in listed.iter().enumerate() {
            let number = xml_text(part, "PartNumber").and_then(|number| number.parse().ok());
            let number = number.unwrap_or(0);
            if number <= previous {
                return fail(400, "InvalidPartOrder");
            }
            previous = number;
            let etag = xml_text(part, "ETag").unwrap_or_default();
            let Some(held) = upload
                .parts
                .get(&number)
                .filter(|held| same(&etag, &held.etag))
            else {
                return fail(400, "InvalidPart");
            };
            let size = held.content.size();
            if index + 1 < listed.len() && size < self.options.minimum_part_size {
                return fail(400, "EntityTooSmall");
            }
            match &held.content {
                Content::Frames(held) => frames.extend(held.iter().cloned()),
                content => discarded += content.size(),
            }
        }
        if listed.is_empty() {
            return fail(400, "MalformedXML");
        }
        Ok(if discarded > 0 {
            Content::Discarded(discarded)
        } else {
            Content::Frames(frames)
        })
    }

    fn abort_multipart(&self, asked: &Asked) -> Outcome {
        let id = asked.query.get("uploadId").map_or("", String::as_str);
        match self.objects.uploads.lock().remove(id) {
            Some(_) => Ok(empty(204, &[])),
            None => fail(404, "NoSuchUpload"),
        }
    }

    fn list_parts(&self, asked: &Asked) -> Outcome {
        let id = asked.query.get("uploadId").map_or("", String::as_str);
        let uploads = self.objects.uploads.lock();
        let Some(upload) = uploads.get(id) else {
            return fail(404, "NoSuchUpload");
        };
        let marker: u32 = asked
            .query
            .get("part-number-marker")
            .and_then(|it| it.parse().ok())
            .unwrap_or(0);
        let mut parts = upload.parts.range(marker + 1..).peekable();
        let mut listed = String::new();
        let mut last = marker;
        for (number, part) in parts.by_ref().take(PAGE) {
            last = *number;
            listed.push_str(&format!(
                "<Part><PartNumber>{number}</PartNumber><ETag>{}</ETag><Size>{}</Size></Part>",
                escape(&part.etag),
                part.content.size()
            ));
        }
        let truncated = parts.peek().is_some();
        Ok(document_answer(
            200,
            format!(
                "{XML}<ListPartsResult><IsTruncated>{truncated}</IsTruncated>\
                 <NextPartNumberMarker>{last}</NextPartNumberMarker>{listed}</ListPartsResult>"
            ),
        ))
    }

    fn list_uploads(&self, asked: &Asked) -> Outcome {
        let uploads = self.objects.uploads.lock();
        let listed: String = uploads
            .iter()
            .filter(|(_, upload)| upload.bucket == asked.bucket)
            .map(|(id, upload)| {
                let key = escape(&upload.key);
                format!("<Upload><Key>{key}</Key><UploadId>{id}</UploadId></Upload>")
            })
            .collect();
        Ok(document_answer(
            200,
            format!(
                "{XML}<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>{listed}\
                 </ListMultipartUploadsResult>"
            ),
        ))
    }
}

fn same(one: &str, other: &str) -> bool {
    one == "*" || one.trim_matches('"') == other.trim_matches('"')
}

/// Year, month, day, hour, minute, second, weekday (0 is Thursday, as was 1 January 1970).
fn civil(time: SystemTime) -> (i64, usize, i64, u64, u64, u64, usize) {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs();
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Days to a civil date, counting years from March.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (
        year,
        month as usize,
        day,
        rest / 3600,
        rest / 60 % 60,
        rest % 60,
        (days % 7) as usize,
    )
}

fn iso_time(time: SystemTime) -> String {
    let (year, month, day, hour, minute, second, _) = civil(time);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.000Z")
}

fn http_time(time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (year, month, day, hour, minute, second, weekday) = civil(time);
    format!(
        "{}, {day:02} {} {year:04} {hour:02}:{minute:02}:{second:02} GMT",
        DAYS[weekday],
        MONTHS[month - 1]
    )
}
