//! Closes that wait out trouble with the store.

mod harness;

use std::fs::{self, File};
use std::io::Write;
use std::thread::JoinHandle;

use harness::{Lab, Mount, close, kill, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

/// Attempts of one request.
const ATTEMPTS: u64 = 6;
const WAITS: &str = "not stored yet; trying again";

fn refuse(lab: &Lab, status: u16, code: &str) {
    let fault = Fault::Status(status, code.to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, fault)]);
}

fn accept(lab: &Lab) {
    lab.s3.set_faults(1, Vec::new());
}

fn attempts(lab: &Lab) -> u64 {
    lab.s3.stats().of(Kind::Put).requests
}

/// Writes a file, and closes it in a thread of its own → what close returned.
fn close_in_background(mount: &Mount<'_>, name: &str, content: &[u8]) -> JoinHandle<i32> {
    let mut file = File::create(mount.at(name)).unwrap();
    file.write_all(content).unwrap();
    std::thread::spawn(move || close(file))
}

#[test]
fn a_close_outlasts_trouble_that_is_longer_than_the_attempts_of_a_request() {
    let lab = Lab::new();
    let mount = lab.mount();
    refuse(&lab, 503, "SlowDown");
    let closing = close_in_background(&mount, "f", b"precious");
    wait_until("all attempts of more than one request", || {
        attempts(&lab) > ATTEMPTS
    });
    lab.expect_log(WAITS);
    assert_eq!(lab.stored("f"), None);
    accept(&lab);
    assert_eq!(closing.join().unwrap(), 0);
    assert_eq!(lab.stored("f").unwrap(), b"precious");
}

#[test]
fn a_close_that_gets_nothing_through_within_its_time_is_eio_and_the_bytes_are_kept() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--close-timeout", "1s"]);
    refuse(&lab, 503, "SlowDown");
    let closing = close_in_background(&mount, "f", b"precious");
    assert_eq!(closing.join().unwrap(), libc::EIO);
    lab.expect_log(WAITS);
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"precious");
    // Once the kernel has let go of it, too.
    wait_until("it to be listed as failed", || {
        let list = mount.uploads(&["list"]);
        ["failed", "8 B", "/f", "503"]
            .iter()
            .all(|word| list.contains(word))
    });
    accept(&lab);
    mount.uploads(&["retry"]);
    assert_eq!(lab.stored("f").unwrap(), b"precious");
}

#[test]
fn with_no_time_to_wait_a_close_fails_with_the_first_request() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--close-timeout", "0"]);
    refuse(&lab, 503, "SlowDown");
    assert_eq!(
        close_in_background(&mount, "f", b"precious")
            .join()
            .unwrap(),
        libc::EIO
    );
    assert_eq!(attempts(&lab), ATTEMPTS);
    assert!(!lab.log_text().contains(WAITS));
}

#[test]
fn what_trying_again_cannot_mend_is_not_waited_for() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--close-timeout", "forever"]);
    for (number, (status, code)) in [(403, "AccessDenied"), (404, "NoSuchBucket")]
        .into_iter()
        .enumerate()
    {
        refuse(&lab, status, code);
        let closing = close_in_background(&mount, &format!("f{number}"), b"precious");
        assert_ne!(closing.join().unwrap(), 0, "{code}");
        assert_eq!(attempts(&lab), number as u64 + 1, "{code}");
    }
    // Nor is it tried again behind anybody's back.
    wait_until("both to be listed as failed", || {
        mount.uploads(&["list"]).matches("failed").count() == 2
    });
    assert_eq!(attempts(&lab), 2);
    assert!(!lab.log_text().contains(WAITS));
}

#[test]
fn a_file_can_be_renamed_and_removed_while_its_close_waits() {
    let lab = Lab::new();
    let mount = lab.mount();
    for renames in [true, false] {
        refuse(&lab, 503, "SlowDown");
        let before = attempts(&lab);
        let closing = close_in_background(&mount, "f", b"precious");
        wait_until("all attempts of a request", || {
            attempts(&lab) >= before + ATTEMPTS
        });
        if renames {
            fs::rename(mount.at("f"), mount.at("g")).unwrap();
        } else {
            fs::remove_file(mount.at("f")).unwrap();
        }
        accept(&lab);
        assert_eq!(closing.join().unwrap(), 0);
        wait_until("nothing to be left but the file", || {
            lab.names() == ["g"] && lab.journals().is_empty()
        });
    }
    assert_eq!(lab.stored("g").unwrap(), b"precious");
}

#[test]
fn a_close_that_waits_when_the_mount_ends_leaves_its_bytes_to_the_next() {
    let lab = Lab::new();
    let mount = lab.mount();
    refuse(&lab, 503, "SlowDown");
    let closing = close_in_background(&mount, "f", b"precious");
    lab.expect_log(WAITS);
    let pid = mount.pid();
    // SAFETY: kill has no preconditions; the process is this test's own mount.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    assert_ne!(closing.join().unwrap(), 0);
    harness::wait_for_end(pid);
    accept(&lab);
    let _next = lab.mount();
    wait_until("the file to be stored", || lab.stored("f").is_some());
    assert_eq!(lab.stored("f").unwrap(), b"precious");
}

#[test]
fn what_was_renamed_after_its_close_failed_is_stored_by_the_next_mount_without_a_word() {
    let lab = Lab::new();
    let mount = lab.mount();
    refuse(&lab, 403, "AccessDenied");
    let closing = close_in_background(&mount, "f", b"precious");
    assert_eq!(closing.join().unwrap(), libc::EACCES);
    fs::rename(mount.at("f"), mount.at("g")).unwrap();
    kill(&mount);
    accept(&lab);
    let _next = lab.mount();
    wait_until("the file to be stored", || lab.stored("g").is_some());
    assert_eq!(lab.stored("g").unwrap(), b"precious");
    assert_eq!(lab.names(), ["g"]);
}
