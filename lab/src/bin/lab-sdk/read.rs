//! Reading: ranges in flight, and listings.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use aws_sdk_s3::Client;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{Object, client};

/// Bytes of a look at how a member begins.
const LOOK: u64 = 8 << 10;

pub async fn get(
    object: &Object,
    places: Vec<u64>,
    length: u64,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let client = Arc::new(client(object));
    let bytes = places.len() as u64 * length;
    let latencies = stream::iter(places)
        .map(|place| {
            let client = Arc::clone(&client);
            let (bucket, key) = (object.bucket.clone(), object.key.clone());
            async move {
                let started = Instant::now();
                let range = format!("bytes={place}-{}", place + length - 1);
                let answer = client
                    .get_object()
                    .bucket(bucket)
                    .key(key)
                    .range(range)
                    .send();
                let mut body = answer.await?.body;
                while body.try_next().await?.is_some() {}
                anyhow::Ok(started.elapsed())
            }
        })
        .buffer_unordered(object.in_flight)
        .try_collect()
        .await?;
    Ok((bytes, latencies))
}

/// Gets `files` objects of `size` bytes, each whole.
pub async fn objects(
    object: &Object,
    files: u64,
    size: u64,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let client = Arc::new(client(object));
    let latencies = stream::iter(0..files)
        .map(|number| {
            let client = Arc::clone(&client);
            let bucket = object.bucket.clone();
            let key = format!("{}{number:04}", object.key);
            async move {
                let started = Instant::now();
                let mut body = client
                    .get_object()
                    .bucket(bucket)
                    .key(key)
                    .send()
                    .await?
                    .body;
                while body.try_next().await?.is_some() {}
                anyhow::Ok(started.elapsed())
            }
        })
        .buffer_unordered(object.in_flight)
        .try_collect()
        .await?;
    Ok((files * size, latencies))
}

async fn fetch(client: &Client, object: &Object, from: u64, to: u64) -> anyhow::Result<Bytes> {
    let answer = client
        .get_object()
        .bucket(&object.bucket)
        .key(&object.key)
        .range(format!("bytes={from}-{}", to - 1))
        .send()
        .await?;
    Ok(answer.body.collect().await?.into_bytes())
}

pub async fn tensor(
    object: &Object,
    size: u64,
    index: u64,
    range: u64,
    looks: u64,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let length = {
        let client = client(object);
        let told = fetch(&client, object, 0, 8).await?;
        let length = u64::from_le_bytes(told.as_ref().try_into().context("no header length")?);
        fetch(&client, object, 8, 8 + length).await?;
        length
    };
    let begins = |index| 8 + length + index * size;
    get(object, (0..looks).map(begins).collect(), LOOK).await?;
    let start = begins(index);
    let places = (0..size.div_ceil(range))
        .map(|piece| start + piece * range)
        .collect();
    get(object, places, range).await
}

pub async fn list(object: &Object) -> anyhow::Result<(u64, Vec<Duration>)> {
    let client = client(object);
    let mut token = None;
    loop {
        let page = client
            .list_objects_v2()
            .bucket(&object.bucket)
            .prefix(&object.key)
            .set_continuation_token(token)
            .send()
            .await?;
        token = page.next_continuation_token;
        if token.is_none() {
            return Ok((0, Vec::new()));
        }
    }
}
