//! The words in which Google's XML API differs from S3's. Its emulators take neither uploads in parts
//! nor conditions.
//!
//! Source: Google's reference of the XML API: `x-goog-copy-source`, `x-goog-hash`,
//! `x-goog-if-generation-match`, and `x-goog-generation` in answers.

use hyper::HeaderMap;
use hyper::header::{ETAG, HeaderName, HeaderValue};

const GENERATION: HeaderName = HeaderName::from_static("x-goog-generation");

/// Writes Google's headers as S3's.
pub(super) fn translate(headers: &mut HeaderMap) {
    if let Some(source) = headers.get("x-goog-copy-source").cloned() {
        headers.insert("x-amz-copy-source", source);
    }
    let hash = headers.get("x-goog-hash");
    let hash = hash.and_then(|hash| hash.to_str().ok()?.strip_prefix("crc32c="));
    if let Some(value) = hash.and_then(|hash| HeaderValue::from_str(hash).ok()) {
        headers.insert("x-amz-checksum-crc32c", value);
    }
}

/// The generation of the version with this ETag: the number in it.
pub(super) fn generation(etag: &str) -> Option<u64> {
    let number = etag.trim_matches('"').strip_prefix("lab")?;
    let number = number.split('-').next()?;
    // 0 stands for no object at all.
    Some(u64::from_str_radix(number, 16).ok()? + 1)
}

/// Tells the generation beside the ETag.
pub(super) fn tell_generation(headers: &mut HeaderMap) {
    let etag = headers.get(ETAG).and_then(|etag| etag.to_str().ok());
    if let Some(generation) = etag.and_then(generation) {
        headers.insert(GENERATION, HeaderValue::from(generation));
    }
}
