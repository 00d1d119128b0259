//! Names that go and parts that are dropped while a file is open.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use harness::{Lab, errno, noise, wait_until};
use mlfs_lab::s3::Kind;

const PART: usize = 5 << 20;
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

/// Opens a file for reading and writing.
fn open(path: std::path::PathBuf) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

/// close(2), by way of a duplicate whose close is told of.
fn close(file: File) -> i32 {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is owned here and given up by this very call.
    let outcome = unsafe { libc::close(file.into_raw_fd()) };
    if outcome == 0 {
        return 0;
    }
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[test]
fn a_stored_file_written_to_after_its_removal_does_not_come_back() {
    let lab = Lab::new();
    lab.put("f", b"stored".as_slice());
    let mount = lab.mount();
    let file = open(mount.at("f"));
    fs::remove_file(mount.at("f")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_len(0).unwrap();
    file.write_all_at(b"afterwards", 0).unwrap();
    assert_eq!(close(file), 0);
    assert!(mount.unmount().status.success());
    assert_eq!(lab.names(), Vec::<String>::new());
}

#[test]
fn who_reads_a_file_that_is_removed_or_replaced_meanwhile_gets_its_bytes_or_an_error() {
    let lab = Lab::new();
    let data = noise(4 << 20);
    lab.put("removed", data.clone());
    lab.put("replaced", data.clone());
    let mount = lab.mount();
    for (name, gone) in [("removed", libc::ENOENT), ("replaced", libc::ESTALE)] {
        let file = File::open(mount.at(name)).unwrap();
        let mut start = [0; 4096];
        file.read_exact_at(&mut start, 0).unwrap();
        if name == "removed" {
            fs::remove_file(mount.at(name)).unwrap();
        } else {
            fs::write(mount.at("new"), b"new").unwrap();
            fs::rename(mount.at("new"), mount.at(name)).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), data.len() as u64);
        file.read_exact_at(&mut start, 0).unwrap();
        assert!(start[..] == data[..4096]);
        // Never an early end.
        let rest = file.read_at(&mut start, 3 << 20);
        assert_eq!(errno(rest), gone, "{name}");
    }
}

#[test]
fn a_replaced_file_written_to_afterwards_leaves_its_successor_alone() {
    let lab = Lab::new();
    lab.put("f", b"old".as_slice());
    let mount = lab.mount();
    let old = open(mount.at("f"));
    fs::write(mount.at("new"), b"new").unwrap();
    fs::rename(mount.at("new"), mount.at("f")).unwrap();
    old.set_len(0).unwrap();
    old.write_all_at(b"into the old one", 0).unwrap();
    assert_eq!(close(old), 0);
    assert!(mount.unmount().status.success());
    assert_eq!(lab.stored("f").unwrap(), b"new");
}

#[test]
fn the_object_of_a_replaced_file_stays_until_the_close_and_goes_with_the_name() {
    let lab = Lab::new();
    lab.put("removed", b"old".as_slice());
    lab.put("moved", b"old".as_slice());
    let mount = lab.mount();
    let mut files = Vec::new();
    for name in ["removed", "moved"] {
        let mut file = File::create(mount.at("new")).unwrap();
        file.write_all(b"new").unwrap();
        fs::rename(mount.at("new"), mount.at(name)).unwrap();
        assert_eq!(lab.stored(name).unwrap(), b"old");
        files.push(file);
    }
    fs::remove_file(mount.at("removed")).unwrap();
    fs::rename(mount.at("moved"), mount.at("elsewhere")).unwrap();
    assert_eq!(lab.names(), Vec::<String>::new());
    for file in files {
        assert_eq!(close(file), 0);
    }
    assert_eq!(lab.names(), ["elsewhere"]);
    assert_eq!(lab.stored("elsewhere").unwrap(), b"new");
}

#[test]
fn a_part_that_is_dropped_while_it_is_sent_and_written_anew_is_the_new_one() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.hold(Kind::UploadPart);
    let file = File::create(mount.at("f")).unwrap();
    file.write_all_at(&vec![1; PART], 0).unwrap();
    wait_until("the first part to be under way", || {
        lab.s3.stats().of(Kind::CreateMultipart).requests == 1
    });
    file.set_len(0).unwrap();
    let data = noise(2 * PART + 9);
    file.write_all_at(&data, 0).unwrap();
    lab.s3.release(Kind::UploadPart);
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn a_file_emptied_after_parts_of_it_were_sent_is_stored_empty() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let file = File::create(mount.at("f")).unwrap();
    file.write_all_at(&noise(2 * PART), 0).unwrap();
    wait_until("two parts to be sent", || {
        lab.s3.stats().of(Kind::UploadPart).requests == 2
    });
    file.set_len(0).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"");
    wait_until("the upload to be given up", || lab.s3.uploads() == 0);
}

#[test]
fn an_upload_that_begins_too_late_is_not_left_behind() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    lab.s3.hold(Kind::CreateMultipart);
    let file = File::create(mount.at("f")).unwrap();
    file.write_all_at(&noise(PART), 0).unwrap();
    wait_until("the upload to be asked for", || {
        lab.s3.stats().of(Kind::CreateMultipart).requests == 1
    });
    file.set_len(9).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), noise(9));
    lab.s3.release(Kind::CreateMultipart);
    wait_until("the upload to begin and to be given up", || {
        lab.s3.stats().of(Kind::AbortMultipart).requests == 1 && lab.s3.uploads() == 0
    });
}

#[test]
fn a_cut_through_a_part_whose_local_copy_was_given_up_is_refused_and_loses_nothing() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--part-size", "5MiB", "--memory", "64MiB"]);
    let data = noise(30 * PART);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&data).unwrap();
    assert_eq!(errno(file.set_len((PART + 5) as u64)), libc::ENOSPC);
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
}

#[test]
fn a_close_that_has_to_fetch_a_whole_part_does_not_wait_for_other_writers_memory() {
    let lab = Lab::new();
    let mut data = noise(20 << 20);
    lab.put("f", data.clone());
    let mount = lab.mount_with(&["--part-size", "16MiB", "--memory", "64MiB"]);
    let others: Vec<File> = (0..3)
        .map(|index| {
            let mut file = File::create(mount.at(&format!(".{index}.tmp"))).unwrap();
            file.write_all(&noise(13 << 20)).unwrap();
            file
        })
        .collect();
    let file = open(mount.at("f"));
    file.write_all_at(b"changed", 100).unwrap();
    data[100..107].copy_from_slice(b"changed");
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == data);
    drop(others);
}

#[test]
fn a_file_is_there_at_every_moment_of_its_publication() {
    let lab = Lab::new();
    let mount = lab.mount();
    for index in 0..100 {
        let path = mount.at(&format!("f{index}"));
        drop(File::create(&path).unwrap());
        for _ in 0..20 {
            // The kernel asks again for a name that is to be made exclusively.
            let again = OpenOptions::new().write(true).create_new(true).open(&path);
            assert_eq!(errno(again), libc::EEXIST);
        }
    }
}

/// A file that was made and closed is published while nobody waits for it: what changes its size
/// meanwhile must not be lost with the draft that this ends.
#[test]
fn a_size_that_is_set_while_a_file_is_published_in_the_background_is_kept() {
    let lab = Lab::new();
    let mount = lab.mount();
    let size = |path: &std::path::Path| fs::metadata(path).unwrap().len();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mount = &mount;
            scope.spawn(move || {
                for round in 0..150 {
                    let path = mount.at(&format!("file-{thread}-{round}"));
                    drop(File::create(&path).unwrap());
                    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
                    for wanted in [123_456, 567] {
                        // SAFETY: a valid C string, and a number.
                        assert_eq!(unsafe { libc::truncate(name.as_ptr(), wanted) }, 0);
                        assert_eq!(size(&path), wanted as u64, "round {round}");
                    }
                    fs::remove_file(&path).unwrap();
                }
            });
        }
    });
}

/// The kernel tells of the end of a handle some time after close has returned: until then the file
/// must not count as open.
#[test]
fn a_size_that_is_set_by_path_right_after_a_close_is_stored_when_that_returns() {
    let lab = Lab::new();
    let mount = lab.mount();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (lab, mount) = (&lab, &mount);
            scope.spawn(move || {
                let own = format!("file-{thread}");
                let path = mount.at(&own);
                let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
                for round in 0..200 {
                    fs::write(&path, b"twenty bytes of text").unwrap();
                    // SAFETY: a valid C string, and a number.
                    assert_eq!(unsafe { libc::truncate(name.as_ptr(), 5) }, 0);
                    assert_eq!(lab.stored(&own).unwrap(), b"twent", "round {round}");
                }
            });
        }
    });
}
