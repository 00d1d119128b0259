//! The AWS SDK called from a plain program: what a filesystem is compared with.

mod read;
mod write;

use std::time::Instant;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use clap::{Args, Parser, Subcommand};
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
    /// Multipart uploads from memory, with CRC32C
    Put {
        #[command(flatten)]
        object: Object,
        /// MiB each
        #[arg(long)]
        size: u64,
        /// MiB
        #[arg(long, default_value_t = 16)]
        part: u64,
        /// Objects; the second and later ones have their number after KEY
        #[arg(long, default_value_t = 1)]
        files: u64,
        /// Objects uploaded at a time, which share the requests in flight
        #[arg(long, default_value_t = 1)]
        at_once: usize,
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
        /// Looks of 8 KiB at how so many tensors begin, in between, as torch takes them
        #[arg(long, default_value_t = 0)]
        looks: u64,
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
    /// 4 KiB changed in an object: one part is fetched and sent, the rest copied inside the store
    Overwrite {
        #[command(flatten)]
        object: Object,
        /// MiB of the object
        #[arg(long)]
        size: u64,
        /// Bytes from the start
        #[arg(long)]
        offset: u64,
        /// MiB sent, with the changed bytes in their middle
        #[arg(long, default_value_t = 16)]
        part: u64,
    },
    /// Whole objects, each by one GET: KEY with four digits behind it
    Objects {
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
        /// KiB each
        #[arg(long, default_value_t = 1024)]
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
        Command::Put {
            object,
            size,
            part,
            files,
            at_once,
        } => write::put(&object, size * MIB, part * MIB, files, at_once).await?,
        Command::Get {
            object,
            size,
            range,
        } => {
            let places = (0..size.div_ceil(range))
                .map(|index| index * range * MIB)
                .collect();
            read::get(&object, places, range * MIB).await?
        }
        Command::Tensor {
            object,
            size,
            index,
            range,
            looks,
        } => read::tensor(&object, size * MIB, index, range * MIB, looks).await?,
        Command::List { object } => read::list(&object).await?,
        Command::Small {
            object,
            files,
            size,
        } => write::small(&object, files, size * 1024).await?,
        Command::Overwrite {
            object,
            size,
            offset,
            part,
        } => write::overwrite(&object, size * MIB, offset, part * MIB).await?,
        Command::Objects {
            object,
            files,
            size,
        } => read::objects(&object, files, size * 1024).await?,
        Command::Random {
            object,
            size,
            range,
            reads,
        } => {
            let length = range * 1024;
            let mut seed = 88_172_645_463_325_252_u64;
            let places = (0..reads)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed % (size * MIB - length)
                })
                .collect();
            read::get(&object, places, length).await?
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
