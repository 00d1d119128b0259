//! What a write that comes to nothing leaves in the store: nothing, of it, and all that was there.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::{Command, Stdio};

use harness::{Lab, Mount, close, errno, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

const PART: usize = 5 << 20;
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

/// A new file of two parts and a bit, both parts of which the store holds already.
fn half_sent(lab: &Lab, mount: &Mount<'_>, name: &str) -> File {
    let before = lab.s3.stats().of(Kind::UploadPart).requests;
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(true);
    let mut file = options.open(mount.at(name)).unwrap();
    file.write_all(&noise(2 * PART + 100)).unwrap();
    wait_until("two parts to be sent", || {
        lab.s3.stats().of(Kind::UploadPart).requests == before + 2
    });
    assert_eq!(lab.s3.uploads(), 1);
    file
}

fn no_upload_is_left(lab: &Lab) {
    wait_until("the upload to be given up", || lab.s3.uploads() == 0);
    assert_eq!(lab.s3.parts(), 0);
}

fn refuse(lab: &Lab, kind: Kind) {
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(kind, refused)]);
}

#[test]
fn an_unlinked_file_can_be_used_to_the_end_and_leaves_nothing_in_the_store() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(2 * PART);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.at("f"))
        .unwrap();
    file.write_all(&data).unwrap();
    fs::remove_file(mount.at("f")).unwrap();
    file.write_all(b"more").unwrap();
    let mut read = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut read).unwrap();
    assert_eq!(read.len(), data.len() + 4);
    assert_eq!(close(file), 0);
    wait_until("the upload to be given up", || lab.s3.uploads() == 0);
    assert_eq!(lab.names(), Vec::<String>::new());
}

#[test]
fn an_unlinked_file_can_be_read_by_others_when_its_writer_has_closed_it() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(PART / 2);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data).unwrap();
    let mut reader = File::open(mount.at("f")).unwrap();
    fs::remove_file(mount.at("f")).unwrap();
    assert_eq!(close(file), 0);
    let mut read = Vec::new();
    reader.read_to_end(&mut read).unwrap();
    assert!(read == data);
    assert_eq!(lab.names(), Vec::<String>::new());
}

#[test]
fn a_close_that_failed_and_was_discarded_leaves_the_store_as_it_was() {
    let lab = Lab::new();
    lab.put("old", b"old".as_slice());
    let mount = lab.mount_with(SMALL_PARTS);
    for name in ["new", "old"] {
        let file = half_sent(&lab, &mount, name);
        refuse(&lab, Kind::CompleteMultipart);
        assert_eq!(close(file), libc::EACCES);
        // The kernel lets go of the file a little later.
        let id = mount.upload("failed");
        lab.s3.set_faults(1, Vec::new());
        assert_eq!(lab.names(), ["old"]);
        assert_eq!(lab.stored("old").unwrap(), b"old");
        fs::write(mount.path.join(".mlfs/discard"), id).unwrap();
        no_upload_is_left(&lab);
    }
    wait_until("the kernel to forget what was discarded", || {
        errno(fs::metadata(mount.at("new"))) == libc::ENOENT
    });
    assert_eq!(fs::read(mount.at("old")).unwrap(), b"old");
    assert_eq!(lab.names(), ["old"]);
}

#[test]
fn a_file_removed_after_its_close_failed_leaves_nothing_in_the_store() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let file = half_sent(&lab, &mount, "f");
    refuse(&lab, Kind::CompleteMultipart);
    assert_eq!(close(file), libc::EACCES);
    lab.s3.set_faults(1, Vec::new());
    fs::remove_file(mount.at("f")).unwrap();
    no_upload_is_left(&lab);
    assert_eq!(lab.names(), Vec::<String>::new());
    assert!(mount.status()["uploads"].as_array().unwrap().is_empty());
}

#[test]
fn a_file_cut_to_nothing_and_written_anew_leaves_no_part_of_its_past() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = half_sent(&lab, &mount, "f");
    file.set_len(0).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(b"short").unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"short");
    no_upload_is_left(&lab);
}

#[test]
fn a_file_opened_anew_to_be_emptied_leaves_no_part_of_its_past() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    // While its first writer still has it open, and after that one's close has failed.
    let first = half_sent(&lab, &mount, "open");
    fs::write(mount.at("open"), b"short").unwrap();
    assert_eq!(lab.stored("open").unwrap(), b"short");
    assert_eq!(close(first), 0);
    assert_eq!(lab.stored("open").unwrap(), b"short");
    no_upload_is_left(&lab);
    let first = half_sent(&lab, &mount, "failed");
    refuse(&lab, Kind::CompleteMultipart);
    assert_eq!(close(first), libc::EACCES);
    lab.s3.set_faults(1, Vec::new());
    fs::write(mount.at("failed"), b"short").unwrap();
    assert_eq!(lab.stored("failed").unwrap(), b"short");
    no_upload_is_left(&lab);
    assert_eq!(lab.names(), ["failed", "open"]);
}

#[test]
fn a_file_that_another_takes_the_place_of_before_its_close_leaves_nothing_in_the_store() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let file = half_sent(&lab, &mount, "f");
    fs::write(mount.at("g"), b"the other").unwrap();
    fs::rename(mount.at("g"), mount.at("f")).unwrap();
    no_upload_is_left(&lab);
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"the other");
    assert_eq!(lab.names(), ["f"]);
}

#[test]
fn renames_between_parts_leave_one_object_and_no_upload() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = half_sent(&lab, &mount, "f0");
    let mut expected = noise(2 * PART + 100);
    for number in 0..4 {
        let (from, to) = (format!("f{number}"), format!("f{}", number + 1));
        fs::rename(mount.at(&from), mount.at(&to)).unwrap();
        let more = noise(PART);
        file.write_all(&more).unwrap();
        expected.extend_from_slice(&more);
    }
    assert_eq!(close(file), 0);
    assert!(lab.stored("f4").unwrap() == expected);
    assert_eq!(lab.names(), ["f4"]);
    no_upload_is_left(&lab);
}

#[test]
fn a_writer_that_is_killed_leaves_what_it_wrote_and_no_upload() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut child = Command::new("sh")
        .args(["-c", "cat > f"])
        .current_dir(mount.at(""))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let data = noise(2 * PART);
    child.stdin.as_mut().unwrap().write_all(&data).unwrap();
    wait_until("two parts to be sent", || {
        lab.s3.stats().of(Kind::UploadPart).requests == 2
    });
    child.kill().unwrap();
    child.wait().unwrap();
    // Killing a program closes its files, like any end of it: there is no telling them apart.
    wait_until("it to be stored", || lab.stored("f").is_some());
    assert!(lab.stored("f").unwrap() == data);
    no_upload_is_left(&lab);
}
