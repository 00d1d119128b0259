//! S3's ways of writing keys, checksums, times and conditions.

use std::time::SystemTime;

use aws_sdk_s3::primitives::DateTime;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::store::{Condition, ETag};

/// What stays as it is in the copy source header.
const KEY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// The value of `x-amz-copy-source`.
pub(super) fn copy_source(bucket: &str, key: &str) -> String {
    format!("{bucket}/{}", utf8_percent_encode(key, KEY))
}

/// The values of `If-Match` and `If-None-Match`.
pub(super) fn headers(condition: &Condition) -> (Option<String>, Option<String>) {
    match condition {
        Condition::Always => (None, None),
        Condition::IfMatch(etag) => (Some(etag.as_str().to_owned()), None),
        Condition::IfAbsent => (None, Some("*".to_owned())),
    }
}

pub(super) fn encode_crc(crc32c: u32) -> String {
    BASE64_STANDARD.encode(crc32c.to_be_bytes())
}

pub(super) fn decode_crc(text: &str) -> Option<u32> {
    let bytes = BASE64_STANDARD.decode(text).ok()?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// `encoding-type=url` writes a space as `+`.
pub(super) fn decode_key(key: String) -> String {
    if !key.contains(['%', '+']) {
        return key;
    }
    percent_decode_str(&key.replace('+', " "))
        .decode_utf8_lossy()
        .into_owned()
}

pub(super) fn unquoted(etag: &str) -> &str {
    etag.trim_matches('"')
}

pub(super) fn time(time: &DateTime) -> Option<SystemTime> {
    SystemTime::try_from(*time).ok()
}

/// Whether two ETags are the same, quoted or not.
pub(super) fn same(one: &ETag, other: &str) -> bool {
    unquoted(one.as_str()) == unquoted(other)
}
