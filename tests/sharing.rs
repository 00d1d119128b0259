//! Several programs at one file: appending, creating, writing side by side.

mod harness;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::process::{Child, Command, Stdio};

use harness::{Lab, Mount, close, noise, wait_until};
use mlfs_lab::s3::Kind;

const PART: usize = 5 << 20;
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

/// A shell in the run's directory.
fn shell(mount: &Mount<'_>, script: &str) -> Child {
    Command::new("sh")
        .args(["-c", script])
        .current_dir(mount.at(""))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What a shell printed; it must have succeeded.
fn printed(shell: Child) -> String {
    let output = shell.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_record_of_two_processes_that_append_is_there_once_and_whole() {
    const RECORDS: usize = 400;
    let lab = Lab::new();
    let mount = lab.mount();
    let filling = "x".repeat(200);
    // One write a record, through one descriptor of each process's own.
    let append = |who: &str| {
        let script = format!(
            "exec >> f; i=0; while [ $i -lt {RECORDS} ]; do echo {who} $i {filling}; i=$((i+1)); done"
        );
        shell(&mount, &script)
    };
    let writers = [append("one"), append("two")];
    for writer in writers {
        printed(writer);
    }
    // Both have ended, and their ends have published.
    let stored = String::from_utf8(lab.stored("f").unwrap()).unwrap();
    let mut next = BTreeMap::from([("one", 0), ("two", 0)]);
    for line in stored.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [who, number, rest] = words[..] else {
            panic!("torn: {line}");
        };
        assert_eq!(rest, filling);
        let next = next.get_mut(who).unwrap();
        assert_eq!(number.parse::<usize>().unwrap(), *next, "{who}");
        *next += 1;
    }
    assert!(next.values().all(|count| *count == RECORDS), "{next:?}");
    assert_eq!(fs::read_to_string(mount.at("f")).unwrap(), stored);
}

#[test]
fn of_two_processes_that_create_one_name_exclusively_one_does() {
    const NAMES: usize = 150;
    let lab = Lab::new();
    let mount = lab.mount();
    // noclobber is O_EXCL.
    let create = |who: &str| {
        let script = format!(
            "set -C; i=0; while [ $i -lt {NAMES} ]; do \
             (echo {who} > f$i) 2>/dev/null && echo $i; i=$((i+1)); done; true"
        );
        shell(&mount, &script)
    };
    let writers = [create("one"), create("two")];
    let mut winners = BTreeMap::new();
    for (writer, who) in writers.into_iter().zip(["one", "two"]) {
        for number in printed(writer).lines() {
            let before = winners.insert(number.parse::<usize>().unwrap(), who);
            assert_eq!(before, None, "f{number} was created twice");
        }
    }
    assert_eq!(winners.len(), NAMES);
    for (number, who) in winners {
        let stored = lab.stored(&format!("f{number}")).unwrap();
        assert_eq!(String::from_utf8(stored).unwrap(), format!("{who}\n"));
    }
}

#[test]
fn two_writers_of_one_file_and_a_reader_see_each_other() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut one = OpenOptions::new()
        .create(true)
        .append(true)
        .open(mount.at("f"))
        .unwrap();
    let mut two = OpenOptions::new().append(true).open(mount.at("f")).unwrap();
    for _ in 0..10 {
        one.write_all(b"one ").unwrap();
        two.write_all(b"two ").unwrap();
    }
    assert_eq!(
        fs::read_to_string(mount.at("f")).unwrap(),
        "one two ".repeat(10)
    );
    // As another process sees it.
    assert_eq!(printed(shell(&mount, "cat f")), "one two ".repeat(10));
    assert_eq!(close(one), 0);
    two.write_all(b"end").unwrap();
    assert_eq!(close(two), 0);
    assert_eq!(
        String::from_utf8(lab.stored("f").unwrap()).unwrap(),
        "one two ".repeat(10) + "end"
    );
}

#[test]
fn two_processes_that_write_their_halves_of_one_file_make_it_whole() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(4 * PART + (1 << 20));
    let source = lab.folder().join("source");
    fs::write(&source, &data).unwrap();
    // Pieces of 64 KiB, every other one each: each part is written to by both.
    let write = |first: usize| {
        let script = format!(
            "i={first}; while [ $i -lt {} ]; do \
             dd if={} of=f bs=65536 count=4 skip=$i seek=$i conv=notrunc 2>/dev/null || exit 1; \
             i=$((i+8)); done",
            data.len() / 65536,
            source.display()
        );
        shell(&mount, &script)
    };
    for writer in [write(0), write(4)] {
        printed(writer);
    }
    assert!(lab.stored("f").unwrap() == data);
    assert!(fs::read(mount.at("f")).unwrap() == data);
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn what_is_appended_while_the_last_part_waits_to_be_sent_is_not_lost() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--part-size", "5MiB", "--transfers", "1"]);
    let data = noise(PART + 2000);
    lab.s3.hold(Kind::UploadPart);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data[..PART + 1000]).unwrap();
    let duplicate = file.try_clone().unwrap();
    let closing = std::thread::spawn(move || close(duplicate));
    // It wants to store as much as there is now, and has to wait for the first part.
    wait_until("the close to be in the journal", || {
        lab.journals_of_closed_files() == 1
    });
    file.write_all(&data[PART + 1000..]).unwrap();
    lab.s3.release(Kind::UploadPart);
    assert_eq!(closing.join().unwrap(), 0);
    assert!(lab.stored("f").unwrap() == data[..PART + 1000]);
    assert!(fs::read(mount.at("f")).unwrap() == data);
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
}

#[test]
fn a_file_that_is_opened_appended_to_and_closed_per_tensor_is_not_sent_again_and_again() {
    const TENSORS: usize = 300;
    let lab = Lab::new();
    let mount = lab.mount();
    let tensor = noise(1 << 20);
    let mut expected = Vec::new();
    for index in 0..TENSORS {
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .append(true)
            .open(mount.at("f"))
            .unwrap();
        let mut bytes = tensor.clone();
        bytes[..8].copy_from_slice(&index.to_le_bytes());
        file.write_all(&bytes).unwrap();
        assert_eq!(close(file), 0);
        expected.extend_from_slice(&bytes);
    }
    assert!(lab.stored("f").unwrap() == expected);
    let stats = lab.s3.stats();
    let sent = stats.of(Kind::UploadPart).bytes_in + stats.of(Kind::Put).bytes_in;
    assert!(
        sent <= 3 * expected.len() as u64,
        "{sent} bytes were sent for {}",
        expected.len()
    );
    assert_eq!(lab.s3.uploads(), 0);
}
