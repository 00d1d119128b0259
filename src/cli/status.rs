//! `mlfs status`: what a mount is doing.

use std::path::PathBuf;

use clap::Args;

use super::mounts;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,

    /// Print the whole document as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let path = std::path::absolute(&arguments.mountpoint)?;
    mounts::check_mlfs(&path)?;
    let status = mounts::ask(&path)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    println!(
        "{} on {} (pid {})",
        status.tracking_uri, status.mountpoint, status.pid
    );
    println!(
        "memory  {} of {} bytes",
        status.memory.used, status.memory.limit
    );
    println!(
        "spill   {} of {} bytes",
        status.spill.used, status.spill.limit
    );
    println!("read    {} bytes served", status.read.bytes_served);
    match &status.read.disk {
        Some(disk) if disk.on => println!(
            "cache   {} of {} bytes on disk, {} bytes read from there",
            disk.bytes_stored, disk.limit, status.read.bytes_from_disk
        ),
        Some(_) => println!("cache   off: the disk failed, see the log"),
        None => {}
    }
    if status.pending.is_empty() {
        println!("everything written is stored");
    }
    for file in &status.pending {
        let reason = file.reason.as_deref().unwrap_or_default();
        println!("{:9} {:>14} {} {reason}", file.state, file.size, file.path);
    }
    Ok(())
}
