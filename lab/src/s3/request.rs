//! What a request asks for.

use std::collections::HashMap;
use std::ops::Range;

use hyper::{HeaderMap, Method, Uri};
use percent_encoding::percent_decode_str;

use super::google;
use super::stats::Kind;

#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub method: Method,
    pub bucket: String,
    pub key: String,
    pub query: HashMap<String, String>,
    pub headers: HeaderMap,
}

impl Asked {
    pub fn new(method: Method, uri: &Uri, mut headers: HeaderMap) -> Self {
        google::translate(&mut headers);
        let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let path = uri.path().trim_start_matches('/');
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        let query = uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                (decode(name), decode(&value.replace('+', " ")))
            })
            .collect();
        Self {
            method,
            bucket: decode(bucket),
            key: decode(key),
            query,
            headers,
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn asks(&self, name: &str) -> bool {
        self.query.contains_key(name)
    }

    pub fn kind(&self) -> Kind {
        let copies = self.headers.contains_key("x-amz-copy-source");
        match (self.method.as_str(), self.key.is_empty()) {
            ("GET", true) if self.asks("uploads") => Kind::ListUploads,
            ("GET", true) if self.asks("location") || self.bucket.is_empty() => Kind::Other,
            ("GET", true) => Kind::List,
            ("GET", false) if self.asks("uploadId") => Kind::ListParts,
            ("GET", false) if self.asks("acl") => Kind::Other,
            ("GET", false) => Kind::Get,
            ("HEAD", false) => Kind::Head,
            ("PUT", false) if self.asks("uploadId") && copies => Kind::CopyPart,
            ("PUT", false) if self.asks("uploadId") => Kind::UploadPart,
            ("PUT", false) if copies => Kind::Copy,
            ("PUT", false) => Kind::Put,
            ("POST", false) if self.asks("uploads") => Kind::CreateMultipart,
            ("POST", false) if self.asks("uploadId") => Kind::CompleteMultipart,
            ("POST", true) if self.asks("delete") => Kind::Delete,
            ("DELETE", false) if self.asks("uploadId") => Kind::AbortMultipart,
            ("DELETE", false) => Kind::Delete,
            _ => Kind::Other,
        }
    }

    /// The `Range` header against an object of `size` bytes; `Err` when it cannot be satisfied.
    pub fn range(&self, size: u64) -> Result<Option<Range<u64>>, ()> {
        parse_range(self.header("range"), size)
    }

    /// Content type and metadata to keep with an object.
    pub fn kept_headers(&self) -> Vec<(String, String)> {
        self.headers
            .iter()
            .filter(|(name, _)| {
                let name = name.as_str();
                name.starts_with("x-amz-meta-") || name == "content-type"
            })
            .filter_map(|(name, value)| {
                Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
            })
            .collect()
    }
}

pub(super) fn parse_range(text: Option<&str>, size: u64) -> Result<Option<Range<u64>>, ()> {
    let Some(range) = text.and_then(|text| text.strip_prefix("bytes=")) else {
        return Ok(None);
    };
    let Some((first, last)) = range.split_once('-') else {
        return Ok(None);
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) => first..(last + 1).min(size),
        (Ok(first), Err(_)) => first..size,
        (Err(_), Ok(count)) => size.saturating_sub(count)..size,
        _ => return Ok(None),
    };
    if range.start < range.end {
        Ok(Some(range))
    } else {
        Err(())
    }
}
