//! Multipart uploads.

use bytes::Bytes;
use md5::{Digest, Md5};

use super::objects::{Content, Object, Part, Upload};
use super::operations::{
    Failure, Operations, Outcome, XML, document_answer, empty, fail, hexadecimal, same,
};
use super::request::{Asked, parse_range};
use super::xml::{elements, escape, text as xml_text};

/// Parts of one page.
const PAGE: usize = 1000;

impl Operations {
    pub(super) fn create_multipart(&self, asked: &Asked) -> Outcome {
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

    fn add_part(&self, asked: &Asked, content: Content, etag: String) -> Result<String, Failure> {
        let number = asked
            .query
            .get("partNumber")
            .and_then(|number| number.parse().ok());
        let Some(number) = number.filter(|number| (1..=10_000).contains(number)) else {
            return fail(400, "InvalidArgument");
        };
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

    pub(super) fn upload_part(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let (data, checksum) = self.receive(asked, body)?;
        let etag = self.etag(&data);
        let etag = self.add_part(asked, self.keep(data), etag)?;
        let mut headers = vec![("etag", etag)];
        headers.extend(checksum);
        Ok(empty(200, &headers))
    }

    pub(super) fn copy_part(&self, asked: &Asked) -> Outcome {
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
        let etag = match &content {
            Content::Frames(frames) => self.etag(frames),
            _ => self.objects.etag(None),
        };
        let etag = self.add_part(asked, content, etag)?;
        Ok(document_answer(
            200,
            format!(
                "{XML}<CopyPartResult><ETag>{}</ETag></CopyPartResult>",
                escape(&etag)
            ),
        ))
    }

    pub(super) fn complete_multipart(&self, asked: &Asked, body: Vec<Bytes>) -> Outcome {
        let document = String::from_utf8_lossy(&body.concat()).into_owned();
        let id = asked.query.get("uploadId").map_or("", String::as_str);
        let upload = self.objects.uploads.lock().get(id).cloned();
        let Some(upload) = upload.filter(|upload| upload.key == asked.key) else {
            return fail(404, "NoSuchUpload");
        };
        let content = self.assemble(&document, &upload)?;
        self.check_condition(asked)?;
        let etag = self.composite_etag(&document);
        let object = Object {
            content,
            etag: etag.clone(),
            modified: self.now(),
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

    fn composite_etag(&self, document: &str) -> String {
        let parts = elements(document, "Part");
        if !self.options.md5_etags {
            return self.objects.etag(Some(parts.len()));
        }
        let mut digest = Md5::new();
        for part in &parts {
            let etag = xml_text(part, "ETag").unwrap_or_default();
            let etag = etag.trim_matches('"').as_bytes();
            let bytes = etag.chunks(2).filter_map(|pair| {
                let pair = std::str::from_utf8(pair).ok()?;
                u8::from_str_radix(pair, 16).ok()
            });
            digest.update(bytes.collect::<Vec<u8>>());
        }
        format!("\"{}-{}\"", hexadecimal(&digest.finalize()), parts.len())
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

    pub(super) fn abort_multipart(&self, asked: &Asked) -> Outcome {
        let id = asked.query.get("uploadId").map_or("", String::as_str);
        match self.objects.uploads.lock().remove(id) {
            Some(_) => Ok(empty(204, &[])),
            None => fail(404, "NoSuchUpload"),
        }
    }

    pub(super) fn list_parts(&self, asked: &Asked) -> Outcome {
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

    pub(super) fn list_uploads(&self, asked: &Asked) -> Outcome {
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
