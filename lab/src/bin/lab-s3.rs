//! The in-memory S3 server as a program, for other programs to mount, with a tracking server for
//! mlfs beside it.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use mlfs_lab::s3::{ACCESS_KEY, S3Server, SECRET_KEY, ServerOptions};
use mlfs_lab::tracking::TrackingServer;

/// Keeps memory as `_RJEM_MALLOC_CONF` says.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// An S3 server in memory; prints one JSON line when it answers, and runs until it is killed
#[derive(Debug, Parser)]
struct Arguments {
    /// Where to listen; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,

    /// Threads that serve
    #[arg(long, default_value_t = 2)]
    threads: usize,

    /// Milliseconds before the first byte of each answer
    #[arg(long, default_value_t = 0)]
    first_byte: u64,

    /// Bytes a second of each connection, each way; 0: as fast as it goes
    #[arg(long, default_value_t = 0)]
    connection_rate: u64,

    /// Count and checksum uploads, and forget their bytes
    #[arg(long)]
    discard_bodies: bool,

    /// Take requests without credentials too
    #[arg(long)]
    open: bool,

    /// Runs of the tracking server beside it, each as RUN_ID=ARTIFACT_URI
    #[arg(long = "run", value_name = "RUN_ID=URI")]
    runs: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let server = S3Server::start(ServerOptions {
        listen: arguments.listen,
        threads: arguments.threads,
        first_byte: Duration::from_millis(arguments.first_byte),
        connection_rate: (arguments.connection_rate > 0).then_some(arguments.connection_rate),
        discard_bodies: arguments.discard_bodies,
        verify_auth: !arguments.open,
        ..ServerOptions::default()
    })?;
    let tracking = TrackingServer::start(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    for run in &arguments.runs {
        let (run_id, uri) = run
            .split_once('=')
            .ok_or_else(|| anyhow::anyhow!("--run {run:?}: give RUN_ID=ARTIFACT_URI"))?;
        tracking.add_run(run_id, uri);
    }
    println!(
        "{}",
        serde_json::json!({
            "endpoint": server.endpoint(),
            "tracking": tracking.uri(),
            "access_key": ACCESS_KEY,
            "secret_key": SECRET_KEY,
            "pid": std::process::id(),
        })
    );
    loop {
        std::thread::park();
    }
}
