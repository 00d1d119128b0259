//! Somebody else changes an object while a file over it is being written.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use harness::{BUCKET, Lab, PREFIX, close, errno, noise, wait_until};

const PART: usize = 5 << 20;
/// What is read at once, bytes: for more the kernel reads what lies around it too.
const PIECE: usize = 4096;
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

fn open(path: PathBuf) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

#[test]
fn somebody_elses_overwrite_makes_a_partial_modification_fail_with_estale() {
    let lab = Lab::new();
    lab.put("f", noise(3 * PART));
    let mount = lab.mount_with(SMALL_PARTS);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(mount.at("f"))
        .unwrap();
    file.write_all_at(b"mine", 10).unwrap();
    lab.put("f", b"theirs".as_slice());
    assert_eq!(close(file), libc::ESTALE);
    assert_eq!(lab.stored("f").unwrap(), b"theirs");
}

#[test]
fn a_rewrite_of_the_whole_file_wins_as_the_last_close() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    for size in [100, 2 * PART + 100] {
        lab.put("f", noise(3 * PART));
        let mine = noise(size);
        let mut file = File::create(mount.at("f")).unwrap();
        file.write_all(&mine).unwrap();
        lab.put("f", b"theirs".as_slice());
        assert_eq!(close(file), 0);
        assert!(lab.stored("f").unwrap() == mine);
    }
    // Without O_TRUNC, but with nothing of the old content in it.
    lab.put("f", noise(3 * PART));
    let other = lab.mount_with(SMALL_PARTS);
    let mut file = open(other.at("f"));
    file.set_len(0).unwrap();
    file.write_all(b"mine").unwrap();
    lab.put("f", b"theirs".as_slice());
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"mine");
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn what_lost_to_somebody_else_is_kept_until_it_is_discarded() {
    let lab = Lab::new();
    lab.put("f", noise(3 * PART));
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = open(mount.at("f"));
    let mine = noise(PART + 7);
    file.seek(SeekFrom::Start(PART as u64)).unwrap();
    file.write_all(&mine).unwrap();
    lab.put_later("f", b"theirs".as_slice());
    assert_eq!(close(file), libc::ESTALE);
    let id = mount.upload("failed");
    // What was written can be had back.
    let mut read = vec![0; PIECE];
    let reader = File::open(mount.at("f")).unwrap();
    reader.read_exact_at(&mut read, PART as u64).unwrap();
    assert!(read == mine[..PIECE]);
    // What was not written is gone with its version.
    assert_eq!(errno(reader.read_exact_at(&mut read, 0)), libc::ESTALE);
    drop(reader);
    // Trying again changes nothing: the version it was made from is gone.
    fs::write(mount.path.join(".mlfs/retry"), &id).unwrap();
    assert_eq!(mount.upload("failed"), id);
    assert_eq!(lab.stored("f").unwrap(), b"theirs");
    fs::write(mount.path.join(".mlfs/discard"), &id).unwrap();
    wait_until("theirs to be seen, as any change by others", || {
        fs::read(mount.at("f")).is_ok_and(|read| read == b"theirs")
    });
    assert!(mount.status()["uploads"].as_array().unwrap().is_empty());
    wait_until("the upload to be given up", || lab.s3.uploads() == 0);
}

#[test]
fn what_lost_to_somebody_else_is_stored_when_all_of_it_is_written_anew() {
    let lab = Lab::new();
    lab.put("f", noise(3 * PART));
    let mount = lab.mount_with(SMALL_PARTS);
    let file = open(mount.at("f"));
    file.write_all_at(b"mine", 10).unwrap();
    lab.put("f", b"theirs".as_slice());
    assert_eq!(close(file), libc::ESTALE);
    fs::write(mount.at("f"), b"all mine").unwrap();
    assert_eq!(lab.stored("f").unwrap(), b"all mine");
    assert!(mount.status()["uploads"].as_array().unwrap().is_empty());
    wait_until("nothing to be left", || lab.s3.uploads() == 0);
}

#[test]
fn what_is_appended_to_an_object_that_somebody_changes_or_removes_is_kept() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    for removed in [false, true] {
        // Whole pages: the kernel reads no less.
        for size in [4096, 3 * PART] {
            let name = format!("{removed}-{size}");
            lab.put(&name, noise(size));
            let mut options = OpenOptions::new();
            let mut file = options.append(true).open(mount.at(&name)).unwrap();
            file.write_all(b"appended").unwrap();
            if removed {
                lab.s3.delete(BUCKET, &format!("{PREFIX}/{name}"));
            } else {
                lab.put(&name, b"theirs".as_slice());
            }
            assert_eq!(close(file), libc::ESTALE, "{name}");
            let theirs = (!removed).then(|| b"theirs".to_vec());
            assert_eq!(lab.stored(&name), theirs);
            let mut end = [0; 8];
            let reader = File::open(mount.at(&name)).unwrap();
            reader.read_exact_at(&mut end, size as u64).unwrap();
            assert_eq!(&end, b"appended");
            drop(reader);
            let id = mount.upload("failed");
            fs::write(mount.path.join(".mlfs/discard"), id).unwrap();
        }
    }
    wait_until("nothing to be left", || lab.s3.uploads() == 0);
}
