//! What holds when memory and disk are short, through real mounts.

mod harness;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use harness::{Lab, Mount, close, errno, noise};
use mlfs_lab::s3::{Kind, ServerOptions};

const MIB: u64 = 1 << 20;
const PART: usize = 5 << 20;
/// Room for a dozen parts in memory and two on disk.
const NARROW: &[&str] = &[
    "--part-size",
    "5MiB",
    "--memory",
    "64MiB",
    "--spill-size",
    "10MiB",
];

fn peaks_are_within_the_limits(mount: &Mount<'_>) {
    let status = mount.status();
    for budget in ["memory", "spill"] {
        let told = |what: &str| status[budget][what].as_u64().unwrap();
        assert!(told("peak") <= told("limit"), "{budget}");
    }
}

#[test]
fn a_file_larger_than_memory_and_spill_is_written_within_them() {
    let lab = Lab::new();
    let mount = lab.mount_with(NARROW);
    let data = noise(60 * PART);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    peaks_are_within_the_limits(&mount);
}

/// Bytes of the large file below, unless `MLFS_LARGE_FILE` says otherwise.
const LARGE_FILE: u64 = 2 << 30;

#[test]
fn a_file_many_times_larger_than_memory_and_spill_together_is_written_within_them() {
    let asked = std::env::var("MLFS_LARGE_FILE").ok();
    let size = asked.map_or(LARGE_FILE, |text| text.parse().expect("a number of bytes"));
    // The server checks each part's checksum, and keeps no byte.
    let lab = Lab::with(ServerOptions {
        discard_bodies: true,
        ..ServerOptions::default()
    });
    let limits = match size > LARGE_FILE {
        true => ["512MiB", "1GiB"],
        false => ["64MiB", "64MiB"],
    };
    let mount = lab.mount_with(&["--memory", limits[0], "--spill-size", limits[1]]);
    let piece = noise(1 << 20);
    let mut file = File::create(mount.at("f")).unwrap();
    for _ in 0..size >> 20 {
        file.write_all(&piece).unwrap();
    }
    assert_eq!(close(file), 0);
    let key = format!("{}/f", harness::PREFIX);
    assert_eq!(lab.s3.size(harness::BUCKET, &key), Some(size >> 20 << 20));
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).bytes_in, size);
    assert_eq!(lab.s3.uploads(), 0);
    peaks_are_within_the_limits(&mount);
}

#[test]
fn sixty_four_files_written_at_once_are_written_within_the_limits() {
    const FILES: usize = 64;
    let lab = Lab::new();
    // Together there is room for the part that each file is at, and for little more.
    let mount = lab.mount_with(&[
        "--part-size",
        "5MiB",
        "--memory",
        "160MiB",
        "--spill-size",
        "320MiB",
    ]);
    let data = noise(2 * PART + (1 << 20));
    let (mount, data, started) = (&mount, &data[..], &Barrier::new(FILES));
    std::thread::scope(|scope| {
        for index in 0..FILES {
            scope.spawn(move || {
                let mut file = File::create(mount.at(&format!("f{index}"))).unwrap();
                started.wait();
                for piece in data.chunks(300_000) {
                    file.write_all(piece).unwrap();
                }
                assert_eq!(close(file), 0);
            });
        }
    });
    for index in 0..FILES {
        assert!(lab.stored(&format!("f{index}")).unwrap() == data);
    }
    assert_eq!(lab.s3.uploads(), 0);
    peaks_are_within_the_limits(mount);
}

#[test]
fn many_files_at_once_share_the_memory_by_spilling() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--part-size", "5MiB", "--memory", "64MiB"]);
    let data = noise(4 << 20);
    let files: Vec<File> = (0..40)
        .map(|index| File::create(mount.at(&format!("f{index}"))).unwrap())
        .collect();
    for piece in data.chunks(1 << 20) {
        for mut file in &files {
            file.write_all(piece).unwrap();
        }
    }
    assert!(mount.status()["spill"]["peak"].as_u64().unwrap() > 0);
    for file in files {
        assert_eq!(close(file), 0);
    }
    for index in 0..40 {
        assert!(lab.stored(&format!("f{index}")).unwrap() == data);
    }
    assert_eq!(mount.status()["spill"]["used"], 0);
}

#[test]
fn a_renamed_file_with_given_up_parts_takes_nothing_from_a_new_one_at_its_old_name() {
    let lab = Lab::new();
    let mount = lab.mount_with(NARROW);
    let data = noise(60 * PART);
    let mut file = File::create(mount.at("old")).unwrap();
    file.write_all(&data).unwrap();
    std::fs::rename(mount.at("old"), mount.at("new")).unwrap();
    std::fs::write(mount.at("old"), b"another").unwrap();
    // Its parts belong to an upload under the old name, where it no longer may go.
    assert_eq!(close(file), libc::ESTALE);
    assert_eq!(lab.stored("old").unwrap(), b"another");
    std::fs::remove_file(mount.at("old")).unwrap();
    std::fs::write(mount.path.join(".mlfs/drain"), b"now").unwrap();
    harness::wait_until("it to be stored", || lab.stored("new").is_some());
    assert!(lab.stored("new").unwrap() == data);
    assert_eq!(lab.stored("old"), None);
}

#[test]
fn a_part_that_gave_up_its_local_copy_is_enospc_to_read_or_write_and_never_wrong_bytes() {
    let lab = Lab::new();
    let mount = lab.mount_with(NARROW);
    let data = noise(60 * PART);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.at("f"))
        .unwrap();
    file.write_all_at(&data, 0).unwrap();
    let mut byte = [0];
    let inside = 20 * PART as u64;
    // Opened anew, so that the kernel's own pages do not answer.
    let reader = File::open(mount.at("f")).unwrap();
    assert_eq!(errno(reader.read_exact_at(&mut byte, inside)), libc::ENOSPC);
    drop(reader);
    assert_eq!(errno(file.write_all_at(b"x", inside)), libc::ENOSPC);
    lab.expect_log("--spill-size");
    lab.expect_log("--memory");
    // The first and the last part are kept, and what was written is whole.
    file.write_all_at(b"header", 0).unwrap();
    assert_eq!(close(file), 0);
    let stored = lab.stored("f").unwrap();
    assert!(stored[..6] == *b"header" && stored[6..] == data[6..]);
}

#[test]
fn many_who_read_pieces_of_a_file_in_turn_stay_within_the_memory() {
    let lab = Lab::with(ServerOptions {
        first_byte: Duration::from_millis(15),
        connection_rate: Some(90_000_000),
        ..ServerOptions::default()
    });
    let (pieces, piece) = (128, 16 * MIB);
    lab.put_large("big", pieces * piece);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let file = File::open(mount.at("big")).unwrap();
                let mut buffer = vec![0; MIB as usize];
                loop {
                    let start = next.fetch_add(1, Ordering::Relaxed) * piece;
                    if start >= pieces * piece {
                        break;
                    }
                    for offset in (start..start + piece).step_by(MIB as usize) {
                        file.read_exact_at(&mut buffer, offset).unwrap();
                    }
                }
            });
        }
    });
    let peak = mount.memory("VmHWM");
    assert!(peak <= 512 + 128, "{peak} MiB");
}
