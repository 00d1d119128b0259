//! Many reads at once, of more than memory holds.

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
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn reads_that_find_some_of_their_bytes_in_memory_do_not_wait_for_each_other() {
    let s3 = S3Server::start(ServerOptions {
        verify_auth: false,
        ..ServerOptions::default()
    })
    .expect("the S3 server");
    let run = format!("{:032x}", 1);
    let key = format!("{}/f", prefix(&run));
    s3.put_generated(BUCKET, &key, b"".as_slice(), READS * MIB);
    let spill = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let memory = Budget::new(MEMORY, 0, MEMORY / 2, 0);
        let stores = stores(&s3.endpoint());
        let mut mount = Mount::with(&stores, spill.path(), &run, Duration::MAX, memory, None);
        let inode = mount.find("f").await.unwrap().attributes.inode;
        let opened = mount.vfs.open(inode, access(true, false)).await.unwrap();
        for round in 0..ROUNDS {
            // What is there lies in the middle, so that each read asks for something on both sides.
            for number in 0..READS {
                let middle = (number * 7 + round) % READS * MIB + MIB / 2;
                mount.read(opened.handle, middle, 1).await.unwrap();
            }
            let reads = (0..READS).map(|number| {
                let vfs = Arc::clone(&mount.vfs);
                tokio::spawn(async move {
                    let read = vfs.read(opened.handle, number * MIB, MIB as u32).await;
                    read.unwrap().len()
                })
            });
            for read in reads.collect::<Vec<_>>() {
                let read = timeout(PATIENCE, read).await;
                let read = read.unwrap_or_else(|_| panic!("hangs in round {round}"));
                assert_eq!(read.unwrap() as u64, MIB);
            }
        }
    });
}
