//! Large files that are written under a temporary name and renamed while they are open.

mod harness;

use std::fs::{self, File};
use std::io::Write;
use std::thread::JoinHandle;

use harness::{Lab, Mount, close, kill, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule, ServerOptions};

const PART: usize = 5 << 20;
const TEMPORARY: &str = ".model.tmp";
const LAST: &str = "model.safetensors";
/// Memory for a few parts only: what is held back for its name must go somewhere.
const LITTLE_MEMORY: &[&str] = &["--part-size", "5MiB", "--memory", "64MiB"];
/// Memory for all parts of what the tests write here.
const MUCH_MEMORY: &[&str] = &["--part-size", "5MiB", "--memory", "256MiB"];

/// Written as safetensors' `save_file` does, and renamed; closing it is the caller's.
fn write_and_rename(mount: &Mount<'_>, data: &[u8]) -> File {
    let mut file = File::create(mount.at(TEMPORARY)).unwrap();
    file.set_len(data.len() as u64).unwrap();
    file.write_all(data).unwrap();
    fs::rename(mount.at(TEMPORARY), mount.at(LAST)).unwrap();
    file
}

/// Closes the file in a thread of its own, and returns when it is being copied, which waits.
fn close_until_it_copies(lab: &Lab, file: File) -> JoinHandle<i32> {
    lab.s3.hold(Kind::CopyPart);
    let closing = std::thread::spawn(move || close(file));
    wait_until("it to be copied", || {
        lab.s3.stats().of(Kind::CopyPart).requests > 0
    });
    closing
}

/// Written under a name that looks like its last one, and renamed when all parts are sent.
fn send_and_rename(lab: &Lab, mount: &Mount<'_>, data: &[u8]) -> File {
    let mut file = File::create(mount.at("former")).unwrap();
    file.write_all(data).unwrap();
    wait_until("all parts to be sent", || sent(lab) == data.len() as u64);
    fs::rename(mount.at("former"), mount.at(LAST)).unwrap();
    file
}

fn sent(lab: &Lab) -> u64 {
    lab.s3.stats().of(Kind::UploadPart).bytes_in
}

#[test]
fn a_file_larger_than_memory_travels_once_and_is_copied_to_its_last_name() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(30 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    assert_eq!(lab.stored(LAST), None);
    // What the store has had to make room, and nothing had to go to the disk.
    assert_eq!(mount.status()["spill"]["peak"], 0);
    assert_eq!(close(file), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(sent(&lab), data.len() as u64);
    let copied = lab.s3.stats().of(Kind::CopyPart).requests;
    assert_eq!(copied, 31);
    assert_eq!(lab.names(), [LAST]);
    assert_eq!(lab.s3.uploads(), 0);
    assert!(fs::read(mount.at(LAST)).unwrap() == data);
}

#[test]
fn what_came_under_the_former_name_meanwhile_is_not_removed() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(30 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    let closing = close_until_it_copies(&lab, file);
    // It looks at what is there before it removes it.
    lab.s3.hold(Kind::Head);
    let looked = lab.s3.stats().of(Kind::Head).requests;
    lab.s3.release(Kind::CopyPart);
    wait_until("it to look", || {
        lab.s3.stats().of(Kind::Head).requests > looked
    });
    lab.put(TEMPORARY, b"another's".to_vec());
    lab.s3.release(Kind::Head);
    assert_eq!(closing.join().unwrap(), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(lab.stored(TEMPORARY).unwrap(), b"another's");
}

#[test]
fn a_file_whose_former_name_was_taken_meanwhile_is_sent_again_under_its_last_one() {
    let lab = Lab::new();
    let mount = lab.mount_with(MUCH_MEMORY);
    let data = noise(5 * PART);
    let file = send_and_rename(&lab, &mount, &data);
    fs::write(mount.at("former"), b"another's").unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(lab.stored("former").unwrap(), b"another's");
    wait_until("the first upload to be given up", || lab.s3.uploads() == 0);
}

#[test]
fn a_file_larger_than_memory_whose_former_name_was_taken_can_be_retried_when_it_is_free() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(30 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    fs::write(mount.at(TEMPORARY), b"another's").unwrap();
    assert_eq!(close(file), libc::ESTALE);
    assert_eq!(lab.names(), [TEMPORARY]);
    assert_eq!(lab.stored(TEMPORARY).unwrap(), b"another's");
    mount.upload("failed");
    fs::remove_file(mount.at(TEMPORARY)).unwrap();
    mount.uploads(&["retry"]);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(lab.names(), [LAST]);
    assert_eq!(sent(&lab), data.len() as u64);
}

#[test]
fn a_file_whose_former_name_is_taken_while_it_is_copied_is_sent_again() {
    let lab = Lab::new();
    let mount = lab.mount_with(MUCH_MEMORY);
    let data = noise(5 * PART);
    let file = send_and_rename(&lab, &mount, &data);
    let closing = close_until_it_copies(&lab, file);
    assert!(fs::read(mount.at(LAST)).unwrap() == data);
    lab.put("former", b"another's".to_vec());
    lab.s3.release(Kind::CopyPart);
    assert_eq!(closing.join().unwrap(), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(lab.stored("former").unwrap(), b"another's");
    assert_eq!(lab.s3.uploads(), 0);
    assert_eq!(lab.journals().len(), 0);
}

#[test]
fn who_takes_the_former_name_through_the_mount_waits_until_it_is_copied() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(30 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    let closing = close_until_it_copies(&lab, file);
    let mut other = File::create(mount.at(TEMPORARY)).unwrap();
    other.write_all(b"another's").unwrap();
    let before = lab.s3.stats().of(Kind::Put).requests;
    let other = std::thread::spawn(move || close(other));
    wait_until("the other to be closed", || {
        lab.journals_of_closed_files() == 2 || lab.s3.stats().of(Kind::Put).requests > before
    });
    lab.s3.release(Kind::CopyPart);
    assert_eq!(closing.join().unwrap(), 0);
    assert_eq!(other.join().unwrap(), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(lab.stored(TEMPORARY).unwrap(), b"another's");
    assert_eq!(sent(&lab), data.len() as u64);
}

#[test]
fn a_name_that_holds_the_only_copy_of_another_file_is_not_taken() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(30 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3
        .set_faults(1, vec![Rule::every(Kind::CopyPart, refused)]);
    assert_eq!(close(file), libc::EACCES);
    lab.s3.set_faults(1, Vec::new());
    let first = mount.upload("failed");
    let mut other = File::create(mount.at(TEMPORARY)).unwrap();
    other.write_all(b"another's").unwrap();
    assert_eq!(close(other), libc::EBUSY);
    lab.expect_log("the only copy");
    mount.uploads(&["retry", &first]);
    mount.uploads(&["retry"]);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(lab.stored(TEMPORARY).unwrap(), b"another's");
    assert_eq!(sent(&lab), data.len() as u64);
}

#[test]
fn a_file_of_few_parts_is_sent_after_it_has_its_last_name() {
    let lab = Lab::new();
    let mount = lab.mount_with(MUCH_MEMORY);
    let data = noise(8 * PART + 1234);
    let mut file = File::create(mount.at(TEMPORARY)).unwrap();
    file.write_all(&data).unwrap();
    // What is written later is stored before it.
    fs::write(mount.at("another"), b"small").unwrap();
    assert_eq!(lab.s3.stats().of(Kind::CreateMultipart).requests, 0);
    fs::rename(mount.at(TEMPORARY), mount.at(LAST)).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(sent(&lab), data.len() as u64);
    assert_eq!(lab.s3.stats().of(Kind::CopyPart).requests, 0);
}

#[test]
fn a_file_renamed_while_its_parts_are_on_their_way_travels_once() {
    let lab = Lab::new();
    let mount = lab.mount_with(MUCH_MEMORY);
    let data = noise(9 * PART);
    let mut file = File::create(mount.at(TEMPORARY)).unwrap();
    lab.s3.hold(Kind::UploadPart);
    file.write_all(&data).unwrap();
    wait_until("a part to be on its way", || {
        lab.s3.stats().of(Kind::UploadPart).requests > 0
    });
    fs::rename(mount.at(TEMPORARY), mount.at(LAST)).unwrap();
    lab.s3.release(Kind::UploadPart);
    assert_eq!(close(file), 0);
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(sent(&lab), data.len() as u64);
}

#[test]
fn a_mount_killed_while_it_copies_leaves_the_rest_to_the_next_and_nothing_travels_again() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(20 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    let closing = close_until_it_copies(&lab, file);
    kill(&mount);
    assert_ne!(closing.join().unwrap(), 0);
    lab.s3.release(Kind::CopyPart);
    let _next = lab.mount_with(LITTLE_MEMORY);
    wait_until("it to be stored", || lab.stored(LAST).is_some());
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(sent(&lab), data.len() as u64);
    wait_until("nothing to be left", || {
        lab.names() == [LAST] && lab.s3.uploads() == 0 && lab.journals().is_empty()
    });
}

/// Killed after the store made an object of the parts, and before the mount knew.
fn killed_before_it_knew(options: ServerOptions) {
    let lab = Lab::with(options);
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(20 * PART + 1234);
    let file = write_and_rename(&mount, &data);
    let lost = Rule::every(Kind::CompleteMultipart, Fault::DoThenReset);
    lab.s3.set_faults(1, vec![lost]);
    // It asks what became of that.
    lab.s3.hold(Kind::Head);
    let asked = lab.s3.stats().of(Kind::Head).requests;
    let closing = std::thread::spawn(move || close(file));
    wait_until("it to ask", || {
        lab.s3.stats().of(Kind::Head).requests > asked
    });
    assert_eq!(lab.names(), [TEMPORARY]);
    kill(&mount);
    assert_ne!(closing.join().unwrap(), 0);
    lab.s3.set_faults(1, Vec::new());
    lab.s3.release(Kind::Head);
    let _next = lab.mount_with(LITTLE_MEMORY);
    wait_until("it to be stored", || lab.stored(LAST).is_some());
    assert!(lab.stored(LAST).unwrap() == data);
    assert_eq!(sent(&lab), data.len() as u64);
    wait_until("nothing to be left", || {
        lab.names() == [LAST] && lab.s3.uploads() == 0 && lab.journals().is_empty()
    });
}

#[test]
fn what_the_parts_have_become_is_recognised_by_its_etag() {
    killed_before_it_knew(ServerOptions {
        md5_etags: true,
        ..ServerOptions::default()
    });
}

#[test]
fn what_the_parts_have_become_is_recognised_by_its_content() {
    killed_before_it_knew(ServerOptions::default());
}

#[test]
fn a_copy_that_is_refused_fails_the_close_and_can_be_retried_or_discarded() {
    let lab = Lab::new();
    let mount = lab.mount_with(LITTLE_MEMORY);
    let data = noise(20 * PART + 1234);
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    for retries in [true, false] {
        lab.s3
            .set_faults(1, vec![Rule::every(Kind::CopyPart, refused.clone())]);
        let before = sent(&lab);
        assert_eq!(close(write_and_rename(&mount, &data)), libc::EACCES);
        assert!(fs::read(mount.at(LAST)).unwrap() == data);
        lab.s3.set_faults(1, Vec::new());
        let id = mount.upload("failed");
        if retries {
            fs::write(mount.path.join(".mlfs/retry"), &id).unwrap();
            wait_until("it to be stored", || lab.stored(LAST).is_some());
            assert!(lab.stored(LAST).unwrap() == data);
            assert_eq!(sent(&lab) - before, data.len() as u64);
            fs::remove_file(mount.at(LAST)).unwrap();
        } else {
            fs::write(mount.path.join(".mlfs/discard"), &id).unwrap();
        }
        wait_until("nothing to be left", || {
            lab.names().is_empty() && lab.s3.uploads() == 0 && lab.journals().is_empty()
        });
    }
}
