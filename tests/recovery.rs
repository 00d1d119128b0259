//! What a mount that was killed leaves, and how the next one goes on with it.

mod harness;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread::JoinHandle;

use harness::{BUCKET, Lab, Mount, PREFIX, close, kill, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule, ServerOptions};

const PART: usize = 5 << 20;
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

/// Writes and closes in a thread of its own: the close may never return with success.
fn write_in_background(path: PathBuf, data: Vec<u8>) -> JoinHandle<bool> {
    std::thread::spawn(move || {
        let Ok(mut file) = File::create(path) else {
            return false;
        };
        file.write_all(&data).is_ok() && close(file) == 0
    })
}

fn uploads(mount: &Mount<'_>) -> Vec<serde_json::Value> {
    mount.status()["uploads"].as_array().unwrap().clone()
}

fn spill_files(lab: &Lab) -> usize {
    let spill = lab.folder().join(".cache/mlfs/spill");
    let folders = fs::read_dir(spill).unwrap().flatten();
    folders
        .map(|folder| fs::read_dir(folder.path()).map_or(0, Iterator::count))
        .sum()
}

#[test]
fn a_closed_file_is_completed_by_the_next_mount_and_its_parts_are_not_sent_again() {
    let lab = Lab::new();
    let data = noise(4 * PART + 1234);
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.hold(Kind::CompleteMultipart);
    let writer = write_in_background(mount.at("model/f"), {
        fs::create_dir(mount.at("model")).unwrap();
        data.clone()
    });
    wait_until("all parts to be there", || {
        lab.s3.stats().of(Kind::CompleteMultipart).requests == 1
    });
    kill(&mount);
    assert!(!writer.join().unwrap(), "the close was not confirmed");
    lab.s3.release(Kind::CompleteMultipart);
    let sent = lab.s3.stats().of(Kind::UploadPart).requests;
    let next = lab.mount_with(SMALL_PARTS);
    wait_until("the file to be stored", || lab.stored("model/f").is_some());
    assert!(lab.stored("model/f").unwrap() == data);
    assert_eq!(sent, 5);
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, sent);
    wait_until("it to be forgotten", || uploads(&next).is_empty());
    assert_eq!(lab.s3.uploads(), 0);
    assert!(fs::read(next.at("model/f")).unwrap() == data);
}

#[test]
fn parts_that_the_store_lacks_are_sent_from_the_disk() {
    let lab = Lab::new();
    let data = noise(3 * PART + 77);
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.hold(Kind::UploadPart);
    let writer = write_in_background(mount.at("f"), data.clone());
    // Held parts do not keep the close from being written down.
    wait_until("the close to be in the journal", || {
        lab.journals_of_closed_files() == 1
    });
    kill(&mount);
    assert!(!writer.join().unwrap());
    lab.s3.release(Kind::UploadPart);
    let next = lab.mount_with(SMALL_PARTS);
    wait_until("the file to be stored", || lab.stored("f").is_some());
    assert!(lab.stored("f").unwrap() == data);
    wait_until("it to be forgotten", || uploads(&next).is_empty());
    // What is left are the lock of this mount, and nothing of the former.
    wait_until("the disk to be tidy", || spill_files(&lab) == 1);
}

#[test]
fn a_small_file_that_was_being_closed_is_stored_by_the_next_mount() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_while_closing(&lab, &mount, "f", b"small");
    let _next = lab.mount();
    wait_until("the file to be stored", || lab.stored("f").is_some());
    assert_eq!(lab.stored("f").unwrap(), b"small");
}

#[test]
fn a_file_that_was_never_closed_is_kept_and_listed_and_can_be_discarded() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&noise(2 * PART)).unwrap();
    wait_until("two parts to be there", || {
        lab.s3.stats().of(Kind::UploadPart).requests == 2
    });
    kill(&mount);
    drop(file);
    let next = lab.mount_with(SMALL_PARTS);
    wait_until("it to be listed", || uploads(&next).len() == 1);
    let left = &uploads(&next)[0];
    assert_eq!(left["state"], "left");
    assert!(left["reason"].as_str().unwrap().contains("not closed"));
    assert!(left["path"].as_str().unwrap().ends_with("/f"));
    assert_eq!(lab.stored("f"), None);
    assert_eq!(lab.s3.uploads(), 1);
    let id = left["id"].as_str().unwrap();
    fs::write(next.path.join(".mlfs/discard"), id).unwrap();
    assert!(uploads(&next).is_empty());
    assert_eq!(lab.s3.uploads(), 0);
    assert_eq!(spill_files(&lab), 1);
    let unknown = fs::write(next.path.join(".mlfs/retry"), "12345678");
    assert_eq!(harness::errno(unknown), libc::ENOENT);
}

#[test]
fn a_file_that_was_open_when_its_mount_ended_is_stored_as_it_was_when_somebody_says_so() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"synchronised").unwrap();
    file.sync_all().unwrap();
    kill(&mount);
    drop(file);
    let next = lab.mount();
    assert_eq!(uploads(&next).len(), 1);
    assert_eq!(lab.stored("f"), None);
    let list = next.uploads(&["list"]);
    let id = uploads(&next)[0]["id"].as_str().unwrap().to_owned();
    assert!(
        list.contains(&id) && list.contains("/f") && list.contains("12 B"),
        "{list}"
    );
    next.uploads(&["retry", &id]);
    assert_eq!(lab.stored("f").unwrap(), b"synchronised");
    assert!(
        next.uploads(&["list"])
            .contains("everything written is stored")
    );
}

/// `mlfs uploads` for one of the mounts.
#[test]
fn what_could_not_be_stored_when_a_mount_ended_is_stored_by_the_next() {
    let lab = Lab::new();
    let mount = lab.mount();
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
    let file = File::create(mount.at("f")).unwrap();
    (&file).write_all(b"precious").unwrap();
    assert_eq!(close(file), libc::EACCES);
    let pid = mount.pid();
    // SAFETY: kill has no preconditions; the process is this test's own mount.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    harness::wait_for_end(pid);
    lab.s3.set_faults(1, Vec::new());
    let _next = lab.mount();
    wait_until("the file to be stored", || lab.stored("f").is_some());
    assert_eq!(lab.stored("f").unwrap(), b"precious");
}

#[test]
fn what_was_written_since_by_somebody_else_is_not_overwritten_without_a_word() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_while_closing(&lab, &mount, "f", b"older");
    lab.put_later("f", b"newer!".as_slice());
    let next = lab.mount();
    wait_until("it to wait for a word", || {
        let uploads = uploads(&next);
        uploads.len() == 1 && uploads[0]["state"] == "left"
    });
    assert_eq!(lab.stored("f").unwrap(), b"newer!");
    fs::write(next.path.join(".mlfs/retry"), "all").unwrap();
    wait_until("it to be stored", || {
        lab.stored("f").as_deref() == Some(b"older")
    });
}

#[test]
fn what_the_store_had_already_is_recognised() {
    let lab = Lab::new();
    let data = noise(2 * PART);
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.hold(Kind::CompleteMultipart);
    let writer = write_in_background(mount.at("f"), data.clone());
    wait_until("all parts to be there", || {
        lab.s3.stats().of(Kind::CompleteMultipart).requests == 1
    });
    kill(&mount);
    writer.join().unwrap();
    lab.s3.release(Kind::CompleteMultipart);
    // As if the completion had taken place just before.
    lab.put_later("f", data.clone());
    let next = lab.mount_with(SMALL_PARTS);
    wait_until("it to be forgotten", || uploads(&next).is_empty());
    assert_eq!(lab.s3.uploads(), 0);
    assert!(lab.stored("f").unwrap() == data);
    assert_eq!(lab.s3.stats().of(Kind::CompleteMultipart).requests, 1);
}

#[test]
fn what_was_appended_to_a_stored_file_is_completed_by_the_next_mount() {
    let lab = Lab::new();
    // Cut at the object's end, which no part size gives.
    let mut expected = noise(3 * PART + 1234);
    lab.put("f", expected.clone());
    let appended = noise(PART + 77);
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.hold(Kind::CompleteMultipart);
    let (path, data) = (mount.at("f"), appended.clone());
    let writer = std::thread::spawn(move || {
        let mut file = File::options().append(true).open(path).unwrap();
        file.write_all(&data).is_ok() && close(file) == 0
    });
    wait_until("all parts to be there", || {
        lab.s3.stats().of(Kind::CompleteMultipart).requests == 1
    });
    kill(&mount);
    assert!(!writer.join().unwrap());
    lab.s3.release(Kind::CompleteMultipart);
    let sent = lab.s3.stats().of(Kind::UploadPart);
    assert_eq!(sent.bytes_in, appended.len() as u64);
    let next = lab.mount_with(SMALL_PARTS);
    expected.extend_from_slice(&appended);
    wait_until("the file to be stored", || {
        lab.stored("f").is_some_and(|stored| stored == expected)
    });
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, sent.requests);
    wait_until("it to be forgotten", || uploads(&next).is_empty());
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn mounts_of_one_spill_directory_leave_each_others_files_alone() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&noise(2 * PART)).unwrap();
    let other = lab.mount_with(SMALL_PARTS);
    assert!(uploads(&other).is_empty());
    file.write_all(b"end").unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap().len(), 2 * PART + 3);
}

#[test]
fn another_servers_uploads_are_left_alone() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&noise(2 * PART)).unwrap();
    wait_until("the upload to be in the journal", || {
        lab.s3.uploads() == 1 && !lab.journals().is_empty()
    });
    kill(&mount);
    drop(file);
    let elsewhere = Lab::new();
    let spill = lab.folder().join(".cache/mlfs/spill");
    let next = elsewhere.mount_with(&["--spill-dir", spill.to_str().unwrap()]);
    assert!(uploads(&next).is_empty());
    assert!(!lab.journals().is_empty());
}

#[test]
fn a_run_that_is_gone_keeps_its_bytes_and_says_so() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_while_closing(&lab, &mount, "f", b"bytes");
    lab.tracking.remove_run(harness::RUN);
    let next = lab.mount();
    wait_until("it to wait for a word", || {
        let uploads = uploads(&next);
        uploads.len() == 1 && uploads[0]["state"] == "left"
    });
    assert!(
        uploads(&next)[0]["reason"]
            .as_str()
            .unwrap()
            .contains("run")
    );
    assert_eq!(lab.s3.keys(BUCKET).len(), 0, "{PREFIX}");
}

#[test]
fn what_was_taken_over_and_fails_again_is_kept_by_every_mount() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_while_closing(&lab, &mount, "f", b"precious");
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
    for _ in 0..2 {
        let next = lab.mount();
        wait_until("it to fail", || {
            let uploads = uploads(&next);
            uploads.len() == 1 && uploads[0]["state"] == "failed"
        });
        let pid = next.pid();
        // SAFETY: kill has no preconditions; the process is this test's own mount.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        harness::wait_for_end(pid);
    }
    lab.s3.set_faults(1, Vec::new());
    let _last = lab.mount();
    wait_until("the file to be stored", || lab.stored("f").is_some());
    assert_eq!(lab.stored("f").unwrap(), b"precious");
}

#[test]
fn what_is_written_while_an_older_file_of_that_name_is_being_sent_is_not_overwritten() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_while_closing(&lab, &mount, "f", b"older");
    lab.s3.hold(Kind::Put);
    let next = lab.mount();
    wait_until("the older to be sent", || {
        lab.s3.stats().of(Kind::Put).requests == 2
    });
    // By somebody else, at the last moment.
    lab.put("f", b"newer".as_slice());
    lab.s3.release(Kind::Put);
    wait_until("the older to give way", || {
        let uploads = uploads(&next);
        uploads.len() == 1 && uploads[0]["state"] == "failed"
    });
    assert_eq!(lab.stored("f").unwrap(), b"newer");
    fs::write(next.path.join(".mlfs/discard"), "all").unwrap();
    assert!(uploads(&next).is_empty());
}

#[test]
fn of_two_versions_of_one_file_the_later_is_stored() {
    let lab = Lab::new();
    for content in [&b"first"[..], b"second"] {
        let mount = lab.mount();
        // The former version is kept from being sent, too.
        kill_while_closing_held(&lab, &mount, "f", content);
    }
    lab.s3.release(Kind::Put);
    let next = lab.mount();
    wait_until("the later to be stored", || {
        lab.stored("f").as_deref() == Some(b"second")
    });
    wait_until("the former to wait for a word", || {
        let uploads = uploads(&next);
        uploads.len() == 1 && uploads[0]["state"] == "left"
    });
    assert_eq!(lab.stored("f").unwrap(), b"second");
}

#[test]
fn what_was_synchronised_is_there_whatever_was_written_since() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"synchronised").unwrap();
    file.sync_all().unwrap();
    file.write_all(b", and more").unwrap();
    kill(&mount);
    drop(file);
    let next = lab.mount();
    let id = uploads(&next)[0]["id"].as_str().unwrap().to_owned();
    next.uploads(&["retry", &id]);
    assert_eq!(lab.stored("f").unwrap(), b"synchronised");
}

#[test]
fn what_was_synchronised_while_others_wrote_is_there() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(2 * PART);
    let file = File::create(mount.at("f")).unwrap();
    file.write_all_at(&data, 0).unwrap();
    // One of the others overwrites the same block, one appends, until the mount is gone.
    let block = PART + 4096..PART + 8192;
    std::thread::scope(|scope| {
        let open = |append| {
            let mut options = File::options();
            options
                .write(true)
                .append(append)
                .open(mount.at("f"))
                .unwrap()
        };
        let (over, beyond) = (open(false), open(true));
        let at = block.start as u64;
        let overwrites = scope.spawn(move || {
            (0..=u8::MAX)
                .cycle()
                .find(|byte| over.write_all_at(&[*byte; 4096], at).is_err())
        });
        let appends = scope.spawn(move || {
            let mut beyond = beyond;
            // So slowly that memory does not end.
            while beyond.write_all(&[7; 4096]).is_ok() {
                std::thread::yield_now();
            }
        });
        for round in 0..3 {
            file.write_all_at(&[round; 10], 100).unwrap();
            file.sync_all().unwrap();
        }
        kill(&mount);
        overwrites.join().unwrap();
        appends.join().unwrap();
    });
    drop(file);
    let next = lab.mount_with(SMALL_PARTS);
    let id = next.upload("left");
    next.uploads(&["retry", &id]);
    let stored = lab.stored("f").unwrap();
    let mut expected = data;
    expected[100..110].fill(2);
    expected[block.clone()].fill(stored[block.start]);
    assert!(stored[..2 * PART] == expected);
    assert!(stored[2 * PART..].iter().all(|byte| *byte == 7));
}

/// A change of a stored object, which the mount does not live to know the outcome of.
fn killed_before_it_knew_of_a_change(kind: Kind, size: usize, at: usize, change: &[u8]) {
    let lab = Lab::with(ServerOptions {
        md5_etags: true,
        ..ServerOptions::default()
    });
    let mut expected = noise(size);
    lab.put("f", expected.clone());
    let mount = lab.mount_with(SMALL_PARTS);
    let file = File::options().write(true).open(mount.at("f")).unwrap();
    file.write_all_at(change, at as u64).unwrap();
    expected.resize(size.max(at + change.len()), 0);
    expected[at..at + change.len()].copy_from_slice(change);
    lab.s3
        .set_faults(1, vec![Rule::once(kind, Fault::DoThenReset)]);
    // It asks what became of that.
    lab.s3.hold(Kind::Head);
    let asked = lab.s3.stats().of(Kind::Head).requests;
    let closing = std::thread::spawn(move || close(file));
    wait_until("it to ask", || {
        lab.s3.stats().of(Kind::Head).requests > asked
    });
    assert!(lab.stored("f").unwrap() == expected);
    kill(&mount);
    assert_ne!(closing.join().unwrap(), 0);
    lab.s3.set_faults(1, Vec::new());
    lab.s3.release(Kind::Head);
    let sends = [
        Kind::Put,
        Kind::UploadPart,
        Kind::CopyPart,
        Kind::CompleteMultipart,
    ];
    let sent = || sends.map(|kind| lab.s3.stats().of(kind).requests);
    let before = sent();
    let next = lab.mount_with(SMALL_PARTS);
    wait_until("it to be forgotten", || {
        uploads(&next).is_empty() && lab.journals().is_empty()
    });
    assert_eq!(sent(), before);
    assert!(lab.stored("f").unwrap() == expected);
}

#[test]
fn a_change_of_a_large_object_that_the_store_had_already_is_recognised() {
    let size = 3 * PART + 100;
    killed_before_it_knew_of_a_change(Kind::CompleteMultipart, size, size, b"appended");
}

#[test]
fn a_change_of_a_small_object_that_the_store_had_already_is_recognised() {
    killed_before_it_knew_of_a_change(Kind::Put, 10_000, 100, b"changed");
}

#[test]
fn a_read_only_mount_leaves_what_is_left_to_others() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_while_closing(&lab, &mount, "f", b"bytes");
    let reader = lab.mount_with(&["--read-only"]);
    assert!(uploads(&reader).is_empty());
    let _writer = lab.mount();
    wait_until("the file to be stored", || lab.stored("f").is_some());
}

/// A mount that is killed while a small file is being closed; the store never hears of it.
fn kill_while_closing(lab: &Lab, mount: &Mount<'_>, name: &str, content: &[u8]) {
    kill_while_closing_held(lab, mount, name, content);
    lab.s3.release(Kind::Put);
}

fn kill_while_closing_held(lab: &Lab, mount: &Mount<'_>, name: &str, content: &[u8]) {
    lab.s3.hold(Kind::Put);
    let before = lab.journals_of_closed_files();
    let requests = lab.s3.stats().of(Kind::Put).requests;
    let writer = write_in_background(mount.at(name), content.to_vec());
    wait_until(
        "the close to be in the journal, and its request held",
        || {
            lab.journals_of_closed_files() > before
                && lab.s3.stats().of(Kind::Put).requests > requests
        },
    );
    kill(mount);
    writer.join().unwrap();
}
