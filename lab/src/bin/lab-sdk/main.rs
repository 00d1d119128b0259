//! The AWS SDK called from a plain program: what a filesystem is compared with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use clap::{Args, Parser, Subcommand};
use futures_util::{StreamExt, TryStreamExt, stream};
use mlfs_lab::s3::{ACCESS_KEY, SECRET_KEY};

/// Measures the SDK against a server; prints one JSON line
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Object {
    #[arg(long)]
    endpoint: String,
    #[arg(long)]
    bucket: String,
    #[arg(long)]
    key: String,
    /// Requests in flight
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    /// Make bodies part of the signature
    #[arg(long)]
    sign_payload: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Multipart upload from memory, with CRC32C
    Put {
        #[command(flatten)]
        object: Object,
        /// MiB
        #[arg(long)]
        size: u64,
        /// MiB
        #[arg(long, default_value_t = 16)]
        part: u64,
    },
    /// Parallel ranged GETs, discarded
    Get {
        #[command(flatten)]
        object: Object,
        /// MiB from the start
        #[arg(long)]
        size: u64,
        /// MiB
        #[arg(long, default_value_t = 8)]
        range: u64,
    },
    /// The header of a safetensors file, then one tensor in parallel ranges
    Tensor {
        #[command(flatten)]
        object: Object,
        /// MiB of each tensor
        #[arg(long)]
        size: u64,
        /// Which tensor
        #[arg(long)]
        index: u64,
        /// MiB
        #[arg(long, default_value_t = 4)]
        range: u64,
    },
    /// A listing of everything whose key starts with KEY, page by page
    List {
        #[command(flatten)]
        object: Object,
    },
    /// Whole objects below KEY, each by one PUT
    Small {
        #[command(flatten)]
        object: Object,
        #[arg(long)]
        files: u64,
        /// KiB each
        #[arg(long)]
        size: u64,
    },
    /// Ranged GETs at random places
    Random {
        #[command(flatten)]
        object: Object,
        /// MiB of the object
        #[arg(long)]
        size: u64,
        /// MiB each
        #[arg(long, default_value_t = 1)]
        range: u64,
        #[arg(long, default_value_t = 256)]
        reads: u64,
    },
}

const MIB: u64 = 1 << 20;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let started = Instant::now();
    let (bytes, mut latencies) = match Arguments::parse().command {
        Command::Put { object, size, part } => put(&object, size, part).await?,
        Command::Get {
            object,
            size,
            range,
        } => {
            let places = (0..size.div_ceil(range))
                .map(|index| index * range * MIB)
                .collect();
            get(&object, places, range * MIB).await?
        }
        Command::Tensor {
            object,
            size,
            index,
            range,
        } => tensor(&object, size * MIB, index, range * MIB).await?,
        Command::List { object } => list(&object).await?,
        Command::Small {
            object,
            files,
            size,
        } => small(&object, files, size * 1024).await?,
        Command::Random {
            object,
            size,
            range,
            reads,
        } => {
            let mut seed = 88_172_645_463_325_252_u64;
            let places = (0..reads)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed % ((size - range) * MIB)
                })
                .collect();
            get(&object, places, range * MIB).await?
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let percentile = |share: usize| {
        latencies
            .get(latencies.len() * share / 100)
            .map(|it| it.as_secs_f64() * 1e3)
    };
    println!(
        "{}",
        serde_json::json!({
            "seconds": seconds,
            "mib_per_second": bytes as f64 / MIB as f64 / seconds,
            "cpu_seconds": cpu_seconds(),
            "p50_ms": percentile(50),
            "p99_ms": percentile(99),
        })
    );
    Ok(())
}

fn cpu_seconds() -> f64 {
    // SAFETY: getrusage fills the structure it is given.
    let usage = unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn client(object: &Object) -> Client {
    Client::from_conf(
        aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "lab"))
            .endpoint_url(&object.endpoint)
            .force_path_style(true)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build(),
    )
}

async fn put(object: &Object, size: u64, part: u64) -> anyhow::Result<(u64, Vec<Duration>)> {
    let client = Arc::new(client(object));
    let body = Bytes::from(vec![7_u8; (part * MIB) as usize]);
    let (bucket, key) = (object.bucket.clone(), object.key.clone());
    let upload = client
        .create_multipart_upload()
        .bucket(&bucket)
        .key(&key)
        .send()
        .await?;
    let id = upload.upload_id().context("no upload id")?.to_owned();
    let parts: Vec<CompletedPart> = stream::iter(1..=size.div_ceil(part))
        .map(|number| {
            let (client, body, id) = (Arc::clone(&client), body.clone(), id.clone());
            let (bucket, key) = (bucket.clone(), key.clone());
            async move {
                let crc = BASE64_STANDARD.encode(crc_fast::crc32_iscsi(&body).to_be_bytes());
                let mut operation = client
                    .upload_part()
                    .bucket(bucket)
                    .key(key)
                    .upload_id(id)
                    .part_number(number as i32)
                    .checksum_crc32_c(crc)
                    .body(ByteStream::from(body))
                    .customize();
                if !object.sign_payload {
                    operation = operation.disable_payload_signing();
                }
                let answer = operation.send().await?;
                let part = CompletedPart::builder().part_number(number as i32);
                anyhow::Ok(part.set_e_tag(answer.e_tag).build())
            }
        })
        .buffered(object.in_flight)
        .try_collect()
        .await?;
    client
        .complete_multipart_upload()
        .bucket(&bucket)
        .key(&key)
        .upload_id(id)
        .multipart_upload(
            CompletedMultipartUpload::builder()
                .set_parts(Some(parts))
                .build(),
        )
        .send()
        .await?;
    Ok((size * MIB, Vec::new()))
}

async fn get(
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

async fn tensor(
    object: &Object,
    size: u64,
    index: u64,
    range: u64,
) -> anyhow::Result<(u64, Vec<Duration>)> {
    let length = {
        let client = client(object);
        let told = fetch(&client, object, 0, 8).await?;
        let length = u64::from_le_bytes(told.as_ref().try_into().context("no header length")?);
        fetch(&client, object, 8, 8 + length).await?;
        length
    };
    let start = 8 + length + index * size;
    let places = (0..size.div_ceil(range))
        .map(|piece| start + piece * range)
        .collect();
    get(object, places, range).await
}

async fn list(object: &Object) -> anyhow::Result<(u64, Vec<Duration>)> {
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

async fn small(object: &Object, files: u64, size: u64) -> anyhow::Result<(u64, Vec<Duration>)> {
    let client = Arc::new(client(object));
    let body = Bytes::from(vec![7_u8; size as usize]);
    let crc = BASE64_STANDARD.encode(crc_fast::crc32_iscsi(&body).to_be_bytes());
    let latencies = stream::iter(0..files)
        .map(|number| {
            let (client, body, crc) = (Arc::clone(&client), body.clone(), crc.clone());
            let bucket = object.bucket.clone();
            let key = format!("{}/{number}", object.key);
            async move {
                let started = Instant::now();
                let operation = client
                    .put_object()
                    .bucket(bucket)
                    .key(key)
                    .checksum_crc32_c(crc)
                    .body(ByteStream::from(body))
                    .customize()
                    .disable_payload_signing();
                operation.send().await?;
                anyhow::Ok(started.elapsed())
            }
        })
        .buffer_unordered(object.in_flight)
        .try_collect()
        .await?;
    Ok((files * size, latencies))
}
