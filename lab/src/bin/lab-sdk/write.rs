//! Uploading from memory. Each request is a task of its own, so that checksums, signatures and
//! bodies have every core.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::Semaphore;

use super::{Object, client};

/// What an upload in parts needs, shared by its tasks.
#[derive(Clone)]
struct Uploader {
    client: Client,
    bucket: String,
    sign_payload: bool,
    most: usize,
    /// Requests in flight, of all objects together: `most` of them.
    in_flight: Arc<Semaphore>,
}

impl Uploader {
    fn new(object: &Object) -> Self {
        Self {
            client: client(object),
            bucket: object.bucket.clone(),
            sign_payload: object.sign_payload,
            most: object.in_flight,
            in_flight: Arc::new(Semaphore::new(object.in_flight)),
        }
    }

    async fn create(&self, key: &str) -> anyhow::Result<String> {
        let operation = self.client.create_multipart_upload();
        let upload = operation.bucket(&self.bucket).key(key).send().await?;
        Ok(upload.upload_id().context("no upload id")?.to_owned())
    }

    async fn send(
        self,
        key: String,
        id: String,
        number: i32,
        body: Bytes,
    ) -> anyhow::Result<CompletedPart> {
        let _permit = self.in_flight.acquire().await?;
        let mut operation = self
            .client
            .upload_part()
            .bucket(&self.bucket)
            .key(key)
            .upload_id(id)
            .part_number(number)
            .checksum_crc32_c(checksum(&body))
            .body(ByteStream::from(body))
            .customize();
        if !self.sign_payload {
            operation = operation.disable_payload_signing();
        }
        let answer = operation.send().await?;
        let part = CompletedPart::builder().part_number(number);
        Ok(part.set_e_tag(answer.e_tag).build())
    }

    async fn complete(
        &self,
        key: &str,
        id: String,
        parts: Vec<CompletedPart>,
    ) -> anyhow::Result<()> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts));
        self.client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(key)
            .upload_id(id)
            .multipart_upload(parts.build())
            .send()
            .await?;
        Ok(())
    }
}

fn checksum(body: &[u8]) -> String {
    BASE64_STANDARD.encode(crc_fast::crc32_iscsi(body).to_be_bytes())
}

/// Uploads `files` objects of `size` bytes in parts, `at_once` of them at a time.
pub async fn put(
    object: &Object,
    size: u64,
    part: u64,
    files: u64,
    at_once: usize,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let uploader = Uploader::new(object);
    let body = Bytes::from(vec![7_u8; part.min(size) as usize]);
    stream::iter(0..files)
        .map(|file| {
            let key = match file {
                0 => object.key.clone(),
                _ => format!("{}{file}", object.key),
            };
            put_one(&uploader, key, size, &body)
        })
        .buffer_unordered(at_once)
        .try_collect::<()>()
        .await?;
    Ok((files * size, Vec::new()))
}

async fn put_one(uploader: &Uploader, key: String, size: u64, body: &Bytes) -> anyhow::Result<()> {
    let id = uploader.create(&key).await?;
    let part = body.len() as u64;
    let parts = stream::iter(0..size.div_ceil(part))
        .map(|index| {
            let body = body.slice(..part.min(size - index * part) as usize);
            let number = index as i32 + 1;
            let sent = uploader.clone().send(key.clone(), id.clone(), number, body);
            tokio::spawn(sent)
        })
        .buffered(uploader.most)
        .map(|joined| joined?)
        .try_collect()
        .await?;
    uploader.complete(&key, id, parts).await
}

/// Uploads `files` objects of `size` bytes below the key, each by one PUT.
pub async fn small(object: &Object, files: u64, size: u64) -> anyhow::Result<(u64, Vec<Duration>)> {
    let uploader = Uploader::new(object);
    let body = Bytes::from(vec![7_u8; size as usize]);
    let latencies = stream::iter(0..files)
        .map(|number| {
            let key = format!("{}/{number}", object.key);
            tokio::spawn(put_whole(uploader.clone(), key, body.clone()))
        })
        .buffer_unordered(object.in_flight)
        .map(|joined| joined?)
        .try_collect()
        .await?;
    Ok((files * size, latencies))
}

async fn put_whole(uploader: Uploader, key: String, body: Bytes) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let mut operation = uploader
        .client
        .put_object()
        .bucket(&uploader.bucket)
        .key(key)
        .checksum_crc32_c(checksum(&body))
        .body(ByteStream::from(body))
        .customize();
    if !uploader.sign_payload {
        operation = operation.disable_payload_signing();
    }
    operation.send().await?;
    Ok(started.elapsed())
}

/// Bytes that an overwrite changes.
const CHANGED: u64 = 4096;

/// Changes bytes at `offset` of an object of `size` bytes: `part` bytes around them are fetched and
/// sent; what is before and after is copied inside the store.
pub async fn overwrite(
    object: &Object,
    size: u64,
    offset: u64,
    part: u64,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let uploader = Uploader::new(object);
    let from = (offset + CHANGED / 2).saturating_sub(part / 2);
    let to = (from + part).min(size);
    anyhow::ensure!(
        0 < from && from <= offset && offset + CHANGED <= to && to < size,
        "{offset} is too near to an end of {size} bytes"
    );
    let id = uploader.create(&object.key).await?;
    let (first, middle, last) = tokio::try_join!(
        copy(&uploader, object, &id, 1, 0..from),
        change(&uploader, object, &id, from..to, offset),
        copy(&uploader, object, &id, 3, to..size),
    )?;
    let parts = vec![first, middle, last];
    uploader.complete(&object.key, id, parts).await?;
    Ok((CHANGED, Vec::new()))
}

async fn copy(
    uploader: &Uploader,
    object: &Object,
    id: &str,
    number: i32,
    range: std::ops::Range<u64>,
) -> anyhow::Result<CompletedPart> {
    let answer = uploader
        .client
        .upload_part_copy()
        .bucket(&uploader.bucket)
        .key(&object.key)
        .copy_source(format!("{}/{}", object.bucket, object.key))
        .copy_source_range(format!("bytes={}-{}", range.start, range.end - 1))
        .upload_id(id)
        .part_number(number)
        .send()
        .await?;
    let copied = answer.copy_part_result.context("no copied part")?;
    let part = CompletedPart::builder().part_number(number);
    Ok(part.set_e_tag(copied.e_tag).build())
}

async fn change(
    uploader: &Uploader,
    object: &Object,
    id: &str,
    range: std::ops::Range<u64>,
    offset: u64,
) -> anyhow::Result<CompletedPart> {
    let answer = uploader
        .client
        .get_object()
        .bucket(&uploader.bucket)
        .key(&object.key)
        .range(format!("bytes={}-{}", range.start, range.end - 1))
        .send()
        .await?;
    let mut body = answer.body.collect().await?.to_vec();
    let at = (offset - range.start) as usize;
    body.get_mut(at..at + CHANGED as usize)
        .context("too few bytes came")?
        .fill(7);
    let sent = uploader
        .clone()
        .send(object.key.clone(), id.to_owned(), 2, body.into());
    sent.await
}
