//! What writing through a mount promises.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use harness::{Lab, close, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

const PART: usize = 5 << 20;
/// Small parts, so that small files have several.
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

#[test]
fn close_returns_zero_only_when_the_whole_file_is_in_the_store() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(3 * PART + 12345);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data).unwrap();
    assert_eq!(lab.stored("f"), None);
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    assert_eq!(lab.s3.uploads(), 0);
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, 4);
}

#[test]
fn a_small_file_is_one_put_and_nothing_else() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    fs::write(mount.at("first"), b"x").unwrap();
    lab.s3.reset_stats();
    for index in 0..20 {
        fs::write(mount.at(&format!("f{index}")), noise(100 * 1024)).unwrap();
    }
    let stats = lab.s3.stats();
    assert_eq!((stats.of(Kind::Put).requests, stats.requests()), (20, 20));
}

#[test]
fn full_chunks_are_sent_while_writing_goes_on() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&noise(2 * PART)).unwrap();
    wait_until("two parts to be sent", || {
        lab.s3.stats().of(Kind::UploadPart).requests == 2
    });
    assert_eq!(lab.stored("f"), None);
    file.write_all(b"tail").unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, 3);
}

#[test]
fn a_failed_close_is_an_errno_and_the_bytes_stay_and_are_sent_again() {
    let lab = Lab::new();
    let mount = lab.mount();
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"precious").unwrap();
    assert_eq!(close(file), libc::EACCES);
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"precious");
    lab.expect_log("AccessDenied");
    // The kernel lets go of the file a little later, and that tries once more.
    mount.upload("failed");
    lab.s3.set_faults(1, Vec::new());
    wait_until("the bytes to be stored", || {
        // Asked again: the file's last close may still be failing.
        fs::write(mount.path.join(".mlfs/drain"), b"now").unwrap();
        lab.stored("f").as_deref() == Some(b"precious")
    });
}

#[test]
fn append_truncate_and_random_writes_change_a_stored_object() {
    let lab = Lab::new();
    let mut expected = noise(4 * PART + 999);
    lab.put("f", expected.clone());
    let mount = lab.mount_with(SMALL_PARTS);
    OpenOptions::new()
        .append(true)
        .open(mount.at("f"))
        .unwrap()
        .write_all(b"appended")
        .unwrap();
    expected.extend_from_slice(b"appended");
    assert!(lab.stored("f").unwrap() == expected);
    {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mount.at("f"))
            .unwrap();
        file.write_all_at(b"middle", (2 * PART + 100) as u64)
            .unwrap();
        expected[2 * PART + 100..2 * PART + 106].copy_from_slice(b"middle");
        let mut read = vec![0; expected.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == expected);
    }
    assert!(lab.stored("f").unwrap() == expected);
    for size in [3 * PART + 5, 10, PART + 10, 0, 20] {
        OpenOptions::new()
            .write(true)
            .open(mount.at("f"))
            .unwrap()
            .set_len(size as u64)
            .unwrap();
        expected.resize(size, 0);
        assert!(lab.stored("f").unwrap() == expected, "{size}");
    }
    // truncate(2), without a descriptor.
    let path = std::ffi::CString::new(mount.at("f").to_str().unwrap()).unwrap();
    // SAFETY: a valid C string.
    assert_eq!(unsafe { libc::truncate(path.as_ptr(), 5) }, 0);
    assert_eq!(lab.stored("f").unwrap().len(), 5);
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn one_small_overwrite_of_a_large_object_sends_one_part() {
    let lab = Lab::new();
    lab.put("f", noise(20 * PART));
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.reset_stats();
    {
        let file = OpenOptions::new().write(true).open(mount.at("f")).unwrap();
        file.write_all_at(&[9; 4096], (7 * PART + 1) as u64)
            .unwrap();
    }
    let stats = lab.s3.stats();
    assert!(stats.of(Kind::UploadPart).bytes_in <= 2 * PART as u64);
    assert_eq!(stats.of(Kind::CopyPart).requests, 19);
    let mut expected = noise(20 * PART);
    expected[7 * PART + 1..7 * PART + 4097].fill(9);
    assert!(lab.stored("f").unwrap() == expected);
}

#[test]
fn four_kibibytes_over_the_border_of_two_parts_of_a_gibibyte_send_two_parts() {
    const SIZE: u64 = 1 << 30;
    const DEFAULT_PART: u64 = 16 << 20;
    let lab = Lab::new();
    let key = |name: &str| format!("{}/{name}", harness::PREFIX);
    for name in ["f", "original"] {
        let head = b"head".as_slice();
        lab.s3
            .put_generated(harness::BUCKET, &key(name), head, SIZE);
    }
    let mount = lab.mount();
    let at = 37 * DEFAULT_PART - 2048;
    let file = OpenOptions::new().write(true).open(mount.at("f")).unwrap();
    file.write_all_at(&[9; 4096], at).unwrap();
    assert_eq!(close(file), 0);
    let stats = lab.s3.stats();
    assert!(stats.of(Kind::UploadPart).bytes_in <= 2 * DEFAULT_PART);
    for start in (0..SIZE).step_by(DEFAULT_PART as usize) {
        let range = start..start + DEFAULT_PART;
        let told = lab.s3.range(harness::BUCKET, &key("f"), range.clone());
        let mut expected = lab.s3.range(harness::BUCKET, &key("original"), range);
        for offset in
            (at..at + 4096).filter(|offset| (start..start + DEFAULT_PART).contains(offset))
        {
            expected.as_mut().unwrap()[(offset - start) as usize] = 9;
        }
        assert!(told == expected, "{start}");
    }
    assert_eq!(fs::metadata(mount.at("f")).unwrap().len(), SIZE);
}

#[test]
fn a_header_rewritten_at_the_end_sends_its_part_again() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut expected = noise(3 * PART);
    {
        let mut file = File::create(mount.at("f")).unwrap();
        file.write_all(&expected).unwrap();
        wait_until("all parts to be sent", || {
            lab.s3.stats().of(Kind::UploadPart).requests == 3
        });
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"header").unwrap();
    }
    expected[..6].copy_from_slice(b"header");
    assert!(lab.stored("f").unwrap() == expected);
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, 4);
}

#[test]
fn holes_read_as_zeros_here_and_in_the_store() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let size = 3 * PART + 77;
    {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(mount.at("f"))
            .unwrap();
        file.set_len(size as u64).unwrap();
        file.write_all_at(b"x", (size - 1) as u64).unwrap();
        file.write_all_at(b"y", 100).unwrap();
        let mut read = vec![1; size];
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read.iter().filter(|byte| **byte != 0).count(), 2);
    }
    let stored = lab.stored("f").unwrap();
    assert_eq!(stored.len(), size);
    assert_eq!((stored[100], stored[size - 1]), (b'y', b'x'));
    assert_eq!(stored.iter().filter(|byte| **byte != 0).count(), 2);
}

#[test]
fn a_hole_of_many_parts_is_zeros_and_what_is_behind_it_is_whole() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(PART + 99);
    let mut expected = vec![0; 6 * PART + 1000];
    // A new file that begins with a hole, then a stored one that gets another.
    for _ in 0..2 {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(mount.at("f"))
            .unwrap();
        file.write_all_at(&data, expected.len() as u64).unwrap();
        expected.extend_from_slice(&data);
        assert_eq!(close(file), 0);
        assert!(lab.stored("f").unwrap() == expected);
        assert!(fs::read(mount.at("f")).unwrap() == expected);
        expected.resize(expected.len() + 5 * PART, 0);
    }
    // A hole at the end of a stored file.
    let file = OpenOptions::new().write(true).open(mount.at("f")).unwrap();
    file.set_len(expected.len() as u64).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == expected);
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn a_file_whose_size_is_set_first_is_sent_once() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(4 * PART + 11);
    let mut file = File::create(mount.at("f")).unwrap();
    file.set_len(data.len() as u64).unwrap();
    for piece in data.chunks(700_000) {
        file.write_all(piece).unwrap();
    }
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    let sent = lab.s3.stats().of(Kind::UploadPart);
    assert_eq!((sent.requests, sent.bytes_in), (5, data.len() as u64));
}

#[test]
fn an_empty_file_is_published_too() {
    let lab = Lab::new();
    let mount = lab.mount();
    drop(File::create(mount.at("empty")).unwrap());
    wait_until("the file to be stored", || {
        lab.stored("empty") == Some(Vec::new())
    });
    assert_eq!(fs::metadata(mount.at("empty")).unwrap().len(), 0);
}

#[test]
fn shell_redirections_and_tools_work() {
    let lab = Lab::new();
    let mount = lab.mount();
    let script = "set -e; echo one > f; echo two >> f; cp f g; mv g h; cp -a h i; \
                  dd if=/dev/zero of=z bs=64k count=3 2>/dev/null; cat f h i > all; \
                  tar cf t.tar f h; mkdir x; tar xf t.tar -C x; test \"$(cat x/f)\" = \"$(cat f)\"; \
                  rm t.tar z; sync f";
    let status = Command::new("sh")
        .args(["-c", script])
        .current_dir(mount.at(""))
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(lab.stored("f").unwrap(), b"one\ntwo\n");
    assert_eq!(lab.names(), ["all", "f", "h", "i", "x/f", "x/h"]);
}

#[test]
fn trouble_that_passes_is_not_noticed() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let slow_down = Fault::Status(503, "SlowDown".to_owned());
    let kinds = [
        Kind::UploadPart,
        Kind::CreateMultipart,
        Kind::CompleteMultipart,
        Kind::Put,
    ];
    let mut rules: Vec<Rule> = kinds.map(|kind| Rule::once(kind, slow_down.clone())).into();
    rules.extend(kinds.map(|kind| Rule::once(kind, Fault::ResetBefore)));
    rules.push(Rule::once(Kind::CompleteMultipart, Fault::DoThenFail));
    lab.s3.set_faults(1, rules);
    let data = noise(3 * PART);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    fs::write(mount.at("g"), b"small").unwrap();
    assert_eq!(lab.stored("g").unwrap(), b"small");
}

#[test]
fn throttling_of_many_transfers_at_once_is_not_noticed() {
    const FILES: usize = 100;
    let lab = Lab::new();
    let mount = lab.mount_with(&["--transfers", "128"]);
    let slow_down = Fault::Status(503, "SlowDown".to_owned());
    // Each is refused twice or so.
    lab.s3.set_faults(
        1,
        vec![Rule {
            times: Some(2 * FILES as u64 + 20),
            ..Rule::once(Kind::Put, slow_down)
        }],
    );
    let writers: Vec<_> = (0..FILES)
        .map(|number| {
            let path = mount.at(&format!("f{number}"));
            std::thread::spawn(move || fs::write(path, b"x"))
        })
        .collect();
    for writer in writers {
        writer.join().unwrap().unwrap();
    }
    assert_eq!(lab.names().len(), FILES);
}

#[test]
fn what_is_damaged_on_the_way_is_sent_again() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let kinds = [Kind::UploadPart, Kind::Put];
    let rules = kinds.map(|kind| Rule::once(kind, Fault::WrongByte));
    lab.s3.set_faults(1, rules.into());
    let data = noise(2 * PART);
    fs::write(mount.at("f"), &data).unwrap();
    assert!(lab.stored("f").unwrap() == data);
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, 3);
    fs::write(mount.at("g"), b"small").unwrap();
    assert_eq!(lab.stored("g").unwrap(), b"small");
    assert_eq!(lab.s3.stats().of(Kind::Put).requests, 2);
}

#[test]
fn fsync_succeeds_and_does_not_publish() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"half").unwrap();
    file.sync_all().unwrap();
    assert_eq!(lab.stored("f"), None);
    file.write_all(b" and whole").unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"half and whole");
}

#[test]
fn a_killed_writer_holds_nothing_up() {
    let lab = Lab::new();
    let mount = lab.mount();
    let script = format!("exec dd if=/dev/zero of={} bs=1M", mount.at("f").display());
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("something to be written", || {
        fs::metadata(mount.at("f")).is_ok_and(|metadata| metadata.len() > 0)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_file(mount.at("f")).unwrap();
    assert!(mount.unmount().status.success());
}
