//! Trouble with the store, as a program that writes through a mount meets it.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use harness::{Lab, Mount, close, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

fn number(mount: &Mount<'_>, name: &str) -> Option<u64> {
    mount.status()["store"][name].as_u64()
}

#[test]
fn transfers_at_once_are_as_many_as_the_store_takes_and_grow_again() {
    const FILES: usize = 64;
    const TAKEN: usize = 8;
    let lab = Lab::new();
    let mount = lab.mount_with(&["--transfers", "64"]);
    // Those that are taken are held, so that all others come while they are there.
    lab.s3.limit_in_flight(Some(TAKEN));
    lab.s3.hold(Kind::Put);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..FILES)
            .map(|number| {
                let path = mount.at(&format!("f{number}"));
                scope.spawn(move || fs::write(path, b"x"))
            })
            .collect();
        // Each of the others is refused, and then waits instead of being refused again and again.
        wait_until("the others to wait", || {
            number(&mount, "waiting") == Some((FILES - TAKEN) as u64)
        });
        let places = number(&mount, "places");
        assert!(places.is_some_and(|places| places <= TAKEN as u64));
        lab.s3.release(Kind::Put);
        for writer in writers {
            writer.join().unwrap().unwrap();
        }
    });
    assert_eq!(lab.names().len(), FILES);
    let refused = number(&mount, "throttled").unwrap();
    // Less than once each; without the places, each would be refused several times.
    assert!((1..FILES as u64).contains(&refused), "{refused} refused");
    // The trouble is over: after some successes there is no limit any more.
    lab.s3.limit_in_flight(None);
    let written = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let (mount, written) = (&mount, &written);
            scope.spawn(move || {
                while number(mount, "places").is_some() {
                    assert!(written.fetch_add(1, Ordering::Relaxed) < 40 * FILES);
                    fs::write(mount.at(&format!("g{writer}")), b"x").unwrap();
                }
            });
        }
    });
    assert_eq!(number(&mount, "waiting"), Some(0));
}

#[test]
fn a_modification_that_was_stored_though_the_answer_was_lost_is_no_conflict() {
    let lab = Lab::new();
    lab.put("f", b"before".as_slice());
    let mount = lab.mount();
    for fault in [Fault::DoThenFail, Fault::DoThenReset] {
        let file = OpenOptions::new().write(true).open(mount.at("f")).unwrap();
        file.write_all_at(b"after", 1).unwrap();
        lab.s3.set_faults(1, vec![Rule::once(Kind::Put, fault)]);
        assert_eq!(close(file), 0);
        assert_eq!(lab.stored("f").unwrap(), b"bafter");
    }
    // Each was tried again, and found its condition broken.
    assert_eq!(lab.s3.stats().of(Kind::Put).requests, 4);
}

#[test]
fn parts_that_the_store_holds_otherwise_than_it_confirmed_are_sent_again() {
    const PART: usize = 5 << 20;
    let lab = Lab::new();
    let mount = lab.mount_with(&["--part-size", "5MiB", "--memory", "128MiB"]);
    let data = noise(2 * PART + 5);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data).unwrap();
    let differ = Fault::Status(400, "InvalidPart".to_owned());
    lab.s3
        .set_faults(1, vec![Rule::once(Kind::CompleteMultipart, differ)]);
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    assert_eq!(lab.s3.stats().of(Kind::UploadPart).requests, 6);
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn expired_credentials_are_eacces_and_retry_stores_the_bytes_once_they_are_accepted() {
    const PART: usize = 5 << 20;
    let lab = Lab::new();
    let mount = lab.mount_with(&["--part-size", "5MiB", "--memory", "128MiB"]);
    // As AWS answers them.
    let expired = Fault::Status(400, "ExpiredToken".to_owned());
    let kinds = [Kind::Put, Kind::UploadPart, Kind::CreateMultipart];
    let rules = kinds.map(|kind| Rule::every(kind, expired.clone()));
    lab.s3.set_faults(1, rules.into());
    let large = noise(2 * PART + 5);
    for (name, data) in [("small", b"small".as_slice()), ("large", &large)] {
        let mut file = File::create(mount.at(name)).unwrap();
        // The refusal may come while writing goes on.
        file.write_all(data).unwrap();
        assert_eq!(close(file), libc::EACCES, "{name}");
        assert_eq!(lab.stored(name), None);
        assert!(fs::read(mount.at(name)).unwrap() == data, "{name}");
    }
    lab.expect_log("ExpiredToken");
    let list = mount.uploads(&["list"]);
    assert!(list.contains("small") && list.contains("large"), "{list}");
    lab.s3.set_faults(1, Vec::new());
    mount.uploads(&["retry"]);
    assert_eq!(lab.stored("small").unwrap(), b"small");
    assert!(lab.stored("large").unwrap() == large);
    assert_eq!(lab.s3.uploads(), 0);
    assert!(
        mount
            .uploads(&["list"])
            .contains("everything written is stored")
    );
}
