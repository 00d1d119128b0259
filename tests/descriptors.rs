//! Which close publishes: duplicates, forks, children, mappings.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use harness::{Lab, close, errno, noise, wait_until};
use mlfs_lab::s3::Kind;

const PART: usize = 5 << 20;
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

/// A forked child that waits for a word, does as it is told, and ends; it has our descriptors.
struct Child {
    pid: i32,
    word: File,
}

impl Child {
    /// `work` may call system calls only.
    fn fork(work: impl FnOnce()) -> Self {
        let mut pipe = [0; 2];
        // SAFETY: pipe2 fills the two descriptors.
        assert_eq!(
            unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) },
            0
        );
        // SAFETY: between fork and _exit the child makes system calls only.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork");
        if pid == 0 {
            let mut word = 0_u8;
            // SAFETY: reads one byte into a variable; _exit ends the child without any clean-up.
            unsafe {
                libc::close(pipe[1]);
                libc::read(pipe[0], (&raw mut word).cast(), 1);
                work();
                libc::_exit(0);
            }
        }
        // SAFETY: both descriptors were made above and are owned by nobody else.
        unsafe {
            libc::close(pipe[0]);
            let word = File::from_raw_fd(pipe[1]);
            Self { pid, word }
        }
    }

    /// Tells it to go on, and waits for its end.
    fn finish(mut self) {
        self.word.write_all(b"!").unwrap();
        let mut status = 0;
        // SAFETY: waits for the child made in `fork`.
        assert_eq!(unsafe { libc::waitpid(self.pid, &mut status, 0) }, self.pid);
        assert_eq!(status, 0);
    }
}

#[test]
fn a_flush_before_any_write_publishes_nothing() {
    let lab = Lab::new();
    lab.put("f", b"old".as_slice());
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    drop(file.try_clone().unwrap());
    assert_eq!(lab.stored("f").unwrap(), b"old");
    file.write_all(b"new").unwrap();
    drop(file.try_clone().unwrap());
    assert_eq!(lab.stored("f").unwrap(), b"new");
    lab.s3.reset_stats();
    assert_eq!(close(file), 0);
    assert_eq!(lab.s3.stats().of(Kind::Put).requests, 0);
}

#[test]
fn a_duplicate_that_is_closed_publishes_and_what_is_written_after_it_is_published_too() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let mut expected = noise(3 * PART + 99);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&expected[..2 * PART + 50]).unwrap();
    assert_eq!(close(file.try_clone().unwrap()), 0);
    assert!(lab.stored("f").unwrap() == expected[..2 * PART + 50]);
    file.write_all(&expected[2 * PART + 50..]).unwrap();
    file.seek(SeekFrom::Start(7)).unwrap();
    file.write_all(b"header").unwrap();
    expected[7..13].copy_from_slice(b"header");
    assert_eq!(close(file.try_clone().unwrap()), 0);
    assert!(lab.stored("f").unwrap() == expected);
    lab.s3.reset_stats();
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == expected);
    let stats = lab.s3.stats();
    let sent = [Kind::Put, Kind::UploadPart, Kind::CompleteMultipart];
    assert!(sent.iter().all(|kind| stats.of(*kind).requests == 0));
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn a_child_that_merely_inherited_the_descriptor_does_not_publish_by_exiting() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"half").unwrap();
    Child::fork(|| {}).finish();
    assert_eq!(lab.stored("f"), None);
    file.write_all(b" and whole").unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"half and whole");
}

#[test]
fn a_child_that_exits_after_the_parents_close_changes_nothing() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"half").unwrap();
    let child = Child::fork(|| {});
    file.write_all(b" and whole").unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"half and whole");
    lab.s3.reset_stats();
    child.finish();
    // The last descriptor is gone now: unmounting waits for whatever that may have begun.
    assert!(mount.unmount().status.success());
    assert_eq!(lab.stored("f").unwrap(), b"half and whole");
    assert_eq!(lab.s3.stats().of(Kind::Put).requests, 0);
}

#[test]
fn what_a_child_writes_after_the_parents_close_is_published_when_the_child_ends() {
    let lab = Lab::new();
    let mount = lab.mount();
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"the parent's").unwrap();
    let descriptor = file.as_raw_fd();
    let child = Child::fork(|| {
        let more = b", and the child's";
        // SAFETY: writes a constant to a descriptor that this child has inherited.
        unsafe { libc::write(descriptor, more.as_ptr().cast(), more.len()) };
    });
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap(), b"the parent's");
    child.finish();
    assert_eq!(lab.stored("f").unwrap(), b"the parent's, and the child's");
}

#[test]
fn what_a_child_wrote_is_published_when_the_child_ends() {
    let lab = Lab::new();
    let mount = lab.mount();
    let file = File::create(mount.at("f")).unwrap();
    let kept = file.try_clone().unwrap();
    let status = Command::new("sh")
        .args(["-c", "echo from the child"])
        .stdout(Stdio::from(file))
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(lab.stored("f").unwrap(), b"from the child\n");
    drop(kept);
}

/// All of `file`, shared, to be read and written; nobody truncates it.
fn map(file: &File, size: usize) -> &'static mut [u8] {
    // SAFETY: the kernel chooses a place that nothing else has, for as long as it is mapped.
    unsafe {
        let address = libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(address, libc::MAP_FAILED);
        std::slice::from_raw_parts_mut(address.cast::<u8>(), size)
    }
}

fn unmap(map: &'static mut [u8]) {
    // SAFETY: a mapping made by `map`, of which this was the only reference.
    let unmapped = unsafe { libc::munmap(map.as_mut_ptr().cast(), map.len()) };
    assert_eq!(unmapped, 0);
}

#[test]
fn a_mapping_of_a_new_file_and_reads_and_writes_of_it_see_each_other() {
    let lab = Lab::new();
    let mount = lab.mount();
    let size = 1 << 20;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    let file = options.open(mount.at("f")).unwrap();
    file.write_all_at(&vec![1; size], 0).unwrap();
    let map = map(&file, size);
    assert!(map.iter().all(|byte| *byte == 1));
    // Over pages that are mapped, and were read.
    file.write_all_at(&[2; 10_000], 100).unwrap();
    assert_eq!(map[99..102], [1, 2, 2]);
    map[5000] = 3;
    let other = File::open(mount.at("f")).unwrap();
    for reader in [&file, &other] {
        let mut read = [0; 3];
        reader.read_exact_at(&mut read, 4999).unwrap();
        assert_eq!(read, [2, 3, 2]);
    }
    // Beside a store that is not written back yet.
    map[9000] = 4;
    file.write_all_at(&[5], 9001).unwrap();
    assert_eq!(map[8999..9002], [2, 4, 5]);
    unmap(map);
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("f").unwrap()[8999..9002], [2, 4, 5]);
}

#[test]
fn a_shared_mapping_is_written_back_even_after_close() {
    let lab = Lab::new();
    let mount = lab.mount();
    let size = 1 << 20;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.at("f"))
        .unwrap();
    file.set_len(size as u64).unwrap();
    let map = map(&file, size);
    map[..5].copy_from_slice(b"start");
    assert_eq!(close(file), 0);
    assert_eq!(&lab.stored("f").unwrap()[..5], b"start");
    map[size - 3..].copy_from_slice(b"end");
    unmap(map);
    wait_until("the last stores to be published", || {
        lab.stored("f").unwrap().ends_with(b"end")
    });
}

#[test]
fn modes_and_times_that_are_set_after_the_close_are_accepted_and_send_nothing() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::write(mount.at("f"), b"x").unwrap();
    lab.s3.reset_stats();
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000);
    let reader = File::open(mount.at("f")).unwrap();
    reader.set_modified(time).unwrap();
    drop(reader);
    fs::set_permissions(mount.at("f"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(mount.at("f"), Some(1), Some(1)).unwrap();
    let told = fs::metadata(mount.at("f")).unwrap().modified().unwrap();
    assert_eq!(told, time);
    assert!(mount.unmount().status.success());
    let stats = lab.s3.stats();
    for kind in [Kind::Put, Kind::Copy, Kind::CreateMultipart, Kind::Delete] {
        assert_eq!(stats.of(kind).requests, 0, "{kind:?}");
    }
    assert_eq!(lab.stored("f").unwrap(), b"x");
}

#[test]
fn descriptors_made_elsewhere_close_like_ours() {
    let lab = Lab::new();
    let mount = lab.mount();
    let path = std::ffi::CString::new(mount.at("f").to_str().unwrap()).unwrap();
    // SAFETY: a valid C string; the descriptor is owned by the File at once.
    let mut file = unsafe {
        let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_EXCL;
        File::from_raw_fd(libc::open(path.as_ptr(), flags, 0o600))
    };
    file.write_all(b"x").unwrap();
    assert_eq!(close(file), 0);
    let again = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(mount.at("f"));
    assert_eq!(errno(again), libc::EEXIST);
}
