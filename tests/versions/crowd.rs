//! Many reads at once, of more than memory holds.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mlfs::budget::Budget;
use mlfs_lab::s3::{S3Server, ServerOptions};
use tokio::time::timeout;

use super::mount::{BUCKET, Mount, access, prefix, stores};

const MIB: u64 = 1 << 20;
/// Reads at once, each of a MiB.
const READS: u64 = 16;
/// Bytes of memory.
const MEMORY: u64 = 2 * MIB;
const ROUNDS: u64 = 20;
/// Changes so far apart, bytes, are in parts of their own.
const APART: u64 = 32 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

/// A mount of little memory with one stored file `f` of so many bytes, and a handle of it.
async fn mounted(s3: &S3Server, spill: &Path, size: u64) -> (Mount, u64) {
    let run = format!("{:032x}", 1);
    let key = format!("{}/f", prefix(&run));
    s3.put_generated(BUCKET, &key, b"".as_slice(), size);
    let memory = Budget::new(MEMORY, 0, MEMORY / 2, 0);
    let stores = stores(&s3.endpoint());
    let mut mount = Mount::with(&stores, spill, &run, Duration::MAX, memory, None);
    let inode = mount.find("f").await.unwrap().attributes.inode;
    let opened = mount.vfs.open(inode, access(true, true)).await.unwrap();
    (mount, opened.handle)
}

/// Reads a MiB at each of these offsets, all at once.
async fn all_at_once(mount: &Mount, handle: u64, offsets: impl Iterator<Item = u64>) {
    let reads = offsets.map(|offset| {
        let vfs = Arc::clone(&mount.vfs);
        tokio::spawn(async move {
            let read = vfs.read(handle, 0, offset, MIB as u32).await;
            read.unwrap().len()
        })
    });
    for read in reads.collect::<Vec<_>>() {
        let read = timeout(PATIENCE, read).await;
        assert_eq!(read.expect("a read that ends").unwrap() as u64, MIB);
    }
}

fn server() -> S3Server {
    let options = ServerOptions {
        verify_auth: false,
        ..ServerOptions::default()
    };
    S3Server::start(options).expect("the S3 server")
}

#[test]
fn reads_that_find_some_of_their_bytes_in_memory_do_not_wait_for_each_other() {
    let s3 = server();
    let spill = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (mount, handle) = mounted(&s3, spill.path(), READS * MIB).await;
        for round in 0..ROUNDS {
            // What is there lies in the middle, so that each read asks for something on both sides.
            for number in 0..READS {
                let middle = (number * 7 + round) % READS * MIB + MIB / 2;
                mount.read(handle, middle, 1).await.unwrap();
            }
            all_at_once(&mount, handle, (0..READS).map(|number| number * MIB)).await;
        }
    });
}

#[test]
fn nor_do_reads_of_what_lies_around_a_change() {
    let s3 = server();
    let spill = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (mount, handle) = mounted(&s3, spill.path(), READS * APART).await;
        for number in 0..READS {
            let middle = number * APART + APART / 2;
            let byte = bytes::Bytes::from_static(b"x");
            mount.vfs.write(handle, middle, byte).await.unwrap();
        }
        for _ in 0..ROUNDS {
            let around = (0..READS).map(|number| number * APART + APART / 2 - MIB / 2);
            all_at_once(&mount, handle, around).await;
        }
    });
}
