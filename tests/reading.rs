//! What reading through a mount promises.

mod harness;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use harness::{BUCKET, Lab, Mount, PREFIX, errno, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule, ServerOptions};

const MIB: u64 = 1 << 20;

#[test]
fn opening_fetches_nothing_and_reading_fetches_little_more_than_it_returns() {
    let lab = Lab::new();
    lab.put_large("big", 8 << 30);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, 0);
    let mut seed = 12345_u64;
    let mut buffer = vec![0; MIB as usize];
    for _ in 0..50 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let offset = (seed >> 16) % ((8 << 30) - MIB);
        file.read_exact_at(&mut buffer, offset).unwrap();
    }
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    // The kernel itself reads up to 256 KiB beyond each of them.
    assert!(fetched <= 50 * MIB * 13 / 10, "{fetched}");
}

#[test]
fn a_sequential_read_is_right_and_keeps_several_ranges_in_flight() {
    let first_byte = Duration::from_millis(20);
    let lab = Lab::with(ServerOptions {
        first_byte,
        ..ServerOptions::default()
    });
    let data = noise(100 << 20);
    lab.put("f", data.clone());
    let mount = lab.mount_with(&["--memory", "128MiB"]);
    assert!(fs::read(mount.at("f")).unwrap() == data);
    let stats = lab.s3.stats();
    assert_eq!(stats.of(Kind::Get).bytes_out, data.len() as u64);
    assert!(stats.most_at_once >= 3, "{}", stats.most_at_once);
    assert!(
        mount.status()["memory"]["peak"].as_u64() <= mount.status()["memory"]["limit"].as_u64()
    );
}

/// The most ranges on their way at once of one who reads a file from a store that answers after
/// `first_byte`. Its connections are so slow that he waits for them, however busy the machine is.
fn most_on_their_way(first_byte: Duration, flags: &[&str]) -> u64 {
    let lab = Lab::with(ServerOptions {
        first_byte,
        connection_rate: Some(4_000_000),
        ..ServerOptions::default()
    });
    let size = 384 * MIB;
    lab.put_large("big", size);
    let mount = lab.mount_with(&[&["--memory", "512MiB"], flags].concat());
    let mut file = fs::File::open(mount.at("big")).unwrap();
    let read = std::io::copy(&mut file, &mut std::io::sink()).unwrap();
    assert_eq!(read, size);
    lab.s3.stats().most_sending
}

#[test]
fn a_store_far_away_is_asked_for_twice_as_many_ranges_at_once() {
    let far = Duration::from_millis(40);
    let most = most_on_their_way(far, &[]);
    assert!((48..=66).contains(&most), "{most}");
    let most = most_on_their_way(far, &["--transfers", "32"]);
    assert!((24..=34).contains(&most), "{most}");
    let most = most_on_their_way(Duration::from_millis(5), &[]);
    assert!((24..=34).contains(&most), "{most}");
}

#[test]
fn what_a_reader_has_left_behind_is_let_go_of_wherever_it_began() {
    let lab = Lab::new();
    let size = 128 * MIB;
    lab.put_large("big", size);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    // Just as it is read here, without the kernel's readahead: no read begins where a block does.
    let file = mount.open_direct("big");
    let mut buffer = vec![0; 128 * 1024];
    let mut at = 4096;
    while at < size {
        at += file.read_at(&mut buffer, at).unwrap() as u64;
    }
    let cached = mount.status()["read"]["bytes_cached"].as_u64().unwrap();
    assert!(cached < 16 * MIB, "{cached}");
}

#[test]
fn a_block_that_two_readers_share_is_fetched_once() {
    let lab = Lab::new();
    let size = 128 * MIB;
    lab.put_large("big", size);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    let file = mount.open_direct("big");
    // One reads the second half, and has gone far when the other comes to its beginning.
    let middle = size / 2 + 12 * 1024;
    let mut buffer = vec![0; 128 * 1024];
    let mut at = middle;
    while at < size {
        at += file.read_at(&mut buffer, at).unwrap() as u64;
    }
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert_eq!(fetched, size / 2);
    file.read_exact_at(&mut buffer[..12 * 1024], size / 2)
        .unwrap();
    assert_eq!(lab.s3.stats().of(Kind::Get).bytes_out, fetched);
}

#[test]
fn what_a_random_reader_has_read_is_left_to_the_kernel() {
    let lab = Lab::new();
    lab.put_large("big", 8 << 30);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    let file = File::open(mount.at("big")).unwrap();
    let mut buffer = vec![0; MIB as usize];
    // Squares: no four of these places are equally far from each other. None begins with a page.
    let places = (1..=60).map(|place| place * place * 2 * MIB - 1234);
    for at in places.clone() {
        file.read_exact_at(&mut buffer, at).unwrap();
    }
    let cached = mount.status()["read"]["bytes_cached"].as_u64().unwrap();
    assert!(cached < 24 * MIB, "{cached}");
    let fetched = lab.s3.stats().of(Kind::Get).requests;
    for at in places {
        file.read_exact_at(&mut buffer, at).unwrap();
    }
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, fetched);
}

#[test]
fn one_tensor_of_a_large_file_costs_about_its_own_bytes() {
    let lab = Lab::new();
    // Sixty-four tensors of 64 MiB; the data are generated behind a real header.
    let tensor = 64 * MIB;
    let start = lab.put_tensors("m.safetensors", 64, tensor);
    let mount = lab.mount();
    let file = File::open(mount.at("m.safetensors")).unwrap();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).unwrap();
    assert_eq!(u64::from_le_bytes(length) + 8, start);
    let mut buffer = vec![0; MIB as usize];
    for piece in 0..64 {
        file.read_exact_at(&mut buffer, start + 31 * tensor + piece * MIB)
            .unwrap();
    }
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= tensor * 102 / 100 + MIB, "{fetched}");
}

/// A file of eight tensors of 16 MiB, mounted, of which the index has been read, as the kernel reads it
/// around the first page of a mapping; and where the first tensor ends.
fn index_read(lab: &Lab) -> (Mount<'_>, File, u64) {
    let start = lab.put_tensors("model.safetensors", 8, 16 * MIB);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    let file = mount.open_direct("model.safetensors");
    around(&file, 0);
    (mount, file, start + 16 * MIB)
}

/// Reads what the kernel reads around a page.
fn around(file: &File, offset: u64) {
    let from = (offset / 4096 * 4096).saturating_sub(128 << 10);
    file.read_exact_at(&mut vec![0; 256 << 10], from).unwrap();
}

fn read_on(file: &File, from: u64, end: u64) {
    let mut buffer = vec![0; 256 << 10];
    for at in (from..end).step_by(256 << 10) {
        let length = buffer.len().min((end - at) as usize);
        file.read_exact_at(&mut buffer[..length], at).unwrap();
    }
}

#[test]
fn the_first_tensor_costs_about_its_own_bytes_though_its_end_is_touched_first() {
    let lab = Lab::new();
    let (_mount, file, end) = index_read(&lab);
    // Its first pages came with the index: a loader touches its end next, then reads it.
    around(&file, end);
    read_on(&file, 256 << 10, end / 4096 * 4096 - (128 << 10));
    let stats = lab.s3.stats();
    let fetched = stats.of(Kind::Get).bytes_out;
    assert!(fetched <= 16 * MIB + 512 * 1024, "{fetched}");
    // All of it at once, and not as a stream that grows.
    assert!(stats.of(Kind::Get).requests <= 24, "{stats:?}");
}

#[test]
fn the_first_tensor_costs_about_its_own_bytes_though_its_middle_is_read_with_its_beginning() {
    let lab = Lab::new();
    let (_mount, file, end) = index_read(&lab);
    // As torch copies it, with two threads.
    let half = end / 8192 * 4096;
    let mut piece = vec![0; 256 << 10];
    for at in (128 << 10..half - (128 << 10)).step_by(256 << 10) {
        file.read_exact_at(&mut piece, at).unwrap();
        file.read_exact_at(&mut piece, half + at - (128 << 10))
            .unwrap();
    }
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= 16 * MIB + 512 * 1024, "{fetched}");
}

#[test]
fn the_second_tensor_costs_about_its_own_bytes_though_it_begins_where_the_first_one_ends() {
    // What is touched of it second: what follows, its end, or its middle, as torch's second thread does.
    for second in ["next", "end", "middle"] {
        let lab = Lab::new();
        let (_mount, file, begin) = index_read(&lab);
        around(&file, begin);
        match second {
            "end" => around(&file, begin + 16 * MIB),
            "middle" => around(&file, begin + 8 * MIB),
            _ => {}
        }
        let pages = begin / 4096 * 4096;
        read_on(&file, pages + (128 << 10), pages + 16 * MIB - (128 << 10));
        if second != "end" {
            around(&file, begin + 16 * MIB);
        }
        let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
        assert!(fetched <= 16 * MIB + 1024 * 1024, "{second}: {fetched}");
    }
}

#[test]
fn the_last_read_of_a_tensor_waits_for_nothing() {
    let lab = Lab::new();
    let (mount, file, begin) = index_read(&lab);
    let demanded = || mount.status()["read"]["bytes_demanded"].as_u64().unwrap();
    // The third one; its last read goes 128 KiB past its end.
    let pages = (begin + 16 * MIB) / 4096 * 4096;
    around(&file, pages);
    let before = demanded();
    read_on(&file, pages + (128 << 10), pages + 16 * MIB + (128 << 10));
    assert_eq!(demanded(), before);
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= 16 * MIB + 1024 * 1024, "{fetched}");
}

#[test]
fn what_the_kernel_reads_around_a_tensors_last_page_does_not_begin_the_next_one() {
    let lab = Lab::new();
    let tensor = 16 * MIB;
    let begin = lab.put_tensors("m.safetensors", 64, tensor) + 31 * tensor;
    let mount = lab.mount();
    let file = mount.open_direct("m.safetensors");
    let page = |offset: u64| offset / 4096 * 4096;
    let around = 128 << 10;
    let mut piece = vec![0; around as usize];
    file.read_exact_at(&mut piece, 0).unwrap();
    // As a mapping is copied: its first page, its last one, and the rest.
    file.read_exact_at(&mut piece, page(begin)).unwrap();
    let last = page(begin + tensor) - around / 2;
    file.read_exact_at(&mut piece, last).unwrap();
    let mut at = page(begin) + around;
    while at < last {
        file.read_exact_at(&mut piece, at).unwrap();
        at += around;
    }
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= tensor + MIB, "{fetched}");
}

#[test]
fn random_reads_that_are_all_alike_are_fetched_whole_at_their_first_touch() {
    let lab = Lab::new();
    lab.put_large("big", 8 << 30);
    let mount = lab.mount();
    // In pieces, as the kernel asks for a read of 1 MiB.
    let file = mount.open_direct("big");
    let mut piece = vec![0; 128 * 1024];
    let mut read = |place: u64, pieces: std::ops::Range<u64>| {
        for index in pieces {
            // Squares: no four of these places are equally far from each other.
            let at = place * place * 10 * MIB + index * 128 * 1024;
            file.read_exact_at(&mut piece, at).unwrap();
        }
    };
    for place in 0..24 {
        read(place, 0..8);
    }
    let before = lab.s3.stats().of(Kind::Get);
    read(26, 0..1);
    wait_until("the rest to be fetched", || {
        lab.s3.stats().of(Kind::Get).bytes_out == before.bytes_out + MIB
    });
    let fetched = lab.s3.stats().of(Kind::Get).requests;
    read(26, 1..8);
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, fetched);
}

/// `threads` make `reads` of `length` bytes each, at random in a part of 8 GiB of their own; the bytes
/// that were fetched : theirs.
fn random_reads_cost(threads: u64, reads: u64, length: u64) -> f64 {
    let lab = Lab::new();
    lab.put_large("big", 8 << 30);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    let part = (8 << 30) / threads;
    thread::scope(|scope| {
        for reader in 0..threads {
            let file = &file;
            scope.spawn(move || {
                let mut bytes = vec![0; length as usize];
                let mut seed = 12345 + reader;
                for _ in 0..reads {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = reader * part + (seed >> 16) % (part - length);
                    file.read_exact_at(&mut bytes, at).unwrap();
                }
            });
        }
    });
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    fetched as f64 / (threads * reads * length) as f64
}

#[test]
fn random_reads_cost_little_more_than_their_bytes() {
    let alone = random_reads_cost(1, 256, MIB);
    assert!(alone <= 1.25, "one thread, 1 MiB: {alone:.3}");
    let together = random_reads_cost(8, 30, 4 * MIB);
    assert!(together <= 1.1, "8 threads, 4 MiB: {together:.3}");
}

#[test]
fn a_small_file_is_one_request_and_is_not_asked_for_again() {
    let lab = Lab::new();
    lab.put("f", noise(300 * 1024));
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    for _ in 0..5 {
        assert!(fs::read(mount.at("f")).unwrap() == noise(300 * 1024));
    }
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, 1);
    assert_eq!(lab.s3.stats().of(Kind::Head).requests, 0);
}

#[test]
fn an_open_file_is_one_version() {
    let lab = Lab::new();
    lab.put("f", vec![1; 4 << 20]);
    let mount = lab.mount_with(&["--metadata-ttl", "0"]);
    let old = File::open(mount.at("f")).unwrap();
    let mut byte = [0];
    old.read_exact_at(&mut byte, 0).unwrap();
    lab.put("f", vec![2; 4 << 20]);
    let new = File::open(mount.at("f")).unwrap();
    new.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [2]);
    new.read_exact_at(&mut byte, 3 << 20).unwrap();
    assert_eq!(byte, [2]);
    // What was not fetched of the old version is gone; what was, is still it.
    assert_eq!(errno(old.read_exact_at(&mut byte, 3 << 20)), libc::ESTALE);
    old.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn a_body_that_breaks_off_is_resumed_and_no_byte_is_wrong() {
    let lab = Lab::new();
    let data = noise(20 << 20);
    lab.put("f", data.clone());
    let mount = lab.mount();
    let hit = |fault, times| Rule {
        times: Some(times),
        ..Rule::once(Kind::Get, fault)
    };
    lab.s3.set_faults(
        7,
        vec![
            hit(Fault::ResetAfter(1000), 3),
            hit(Fault::ResetBefore, 2),
            hit(Fault::Status(503, "SlowDown".to_owned()), 2),
            hit(Fault::Status(500, "InternalError".to_owned()), 2),
            hit(Fault::ResetAfter(700_001), 3),
        ],
    );
    assert!(fs::read(mount.at("f")).unwrap() == data);
}

#[test]
fn an_answer_that_is_shorter_than_it_says_is_asked_for_again() {
    let lab = Lab::new();
    let data = noise(3 << 20);
    lab.put("f", data.clone());
    let mount = lab.mount();
    lab.s3
        .set_faults(1, vec![Rule::once(Kind::Get, Fault::Truncate(1000))]);
    assert!(fs::read(mount.at("f")).unwrap() == data);
}

#[test]
fn a_slow_store_starves_nobody_else() {
    let lab = Lab::new();
    lab.put("slow", noise(1 << 20));
    lab.put("d/fast", b"x".as_slice());
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    assert!(mount.at("slow").exists() && mount.at("d/fast").exists());
    lab.s3.hold(Kind::Get);
    let path = mount.at("slow");
    let readers: Vec<_> = (0..20)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || fs::read(path).unwrap().len())
        })
        .collect();
    harness::wait_until("a reader to wait", || {
        lab.s3.stats().of(Kind::Get).requests > 0
    });
    // Metadata and writes go on.
    assert_eq!(fs::metadata(mount.at("d/fast")).unwrap().len(), 1);
    fs::write(mount.at("d/new"), b"y").unwrap();
    assert_eq!(lab.stored("d/new").unwrap(), b"y");
    lab.s3.release(Kind::Get);
    for reader in readers {
        assert_eq!(reader.join().unwrap(), 1 << 20);
    }
    // Fetched once, whoever waited.
    assert_eq!(lab.s3.stats().of(Kind::Get).bytes_out, 1 << 20);
}

#[test]
fn what_is_missing_or_forbidden_in_the_store_is_the_errno_a_program_expects() {
    let lab = Lab::new();
    lab.put("f", noise(1 << 20));
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    assert!(mount.at("f").exists());
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Get, refused)]);
    let mut text = Vec::new();
    let read = File::open(mount.at("f")).unwrap().read_to_end(&mut text);
    assert_eq!(errno(read), libc::EACCES);
    lab.expect_log("AccessDenied");
    lab.s3.set_faults(1, Vec::new());
    lab.s3.delete(BUCKET, &format!("{PREFIX}/f"));
    let read = File::open(mount.at("f")).unwrap().read_to_end(&mut text);
    assert_eq!(errno(read), libc::ENOENT);
}

#[test]
fn mappings_are_read_right() {
    let lab = Lab::new();
    let data = noise(30 << 20);
    lab.put("f", data.clone());
    let mount = lab.mount();
    let file = File::open(mount.at("f")).unwrap();
    // SAFETY: maps the whole of a file that nobody truncates.
    let map = unsafe {
        use std::os::fd::AsRawFd;
        let address = libc::mmap(
            std::ptr::null_mut(),
            data.len(),
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(address, libc::MAP_FAILED);
        std::slice::from_raw_parts(address.cast::<u8>(), data.len())
    };
    drop(file);
    assert!(map == data.as_slice());
    // SAFETY: the mapping made above, not used any more.
    unsafe { libc::munmap(map.as_ptr().cast_mut().cast(), data.len()) };
}
