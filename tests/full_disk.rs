//! A spill directory on a disk that is really full: a small one of the kernel's own, in memory.
//!
//! Mounting one needs root, as the tests of a machine that builds containers have.

mod harness;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use harness::{Lab, Mount, close, errno, noise};
use mlfs_lab::s3::{Fault, Kind, Rule};
use sha2::{Digest, Sha256};

const PART: usize = 5 << 20;
const PIECE: usize = 1 << 20;
/// Bytes of the disk, and of what else is on it: there is room for two parts and no more.
const DISK: usize = 64 << 20;
const BALLAST: usize = DISK - 2 * PART - PIECE;

/// A disk of its own; taken down when dropped.
struct Disk {
    path: PathBuf,
}

impl Disk {
    fn new(lab: &Lab) -> Self {
        let path = lab.folder().join("disk");
        fs::create_dir(&path).unwrap();
        let kind = CString::new("tmpfs").unwrap();
        let options = CString::new(format!("size={DISK}")).unwrap();
        let target = c_path(&path);
        // SAFETY: valid C strings.
        let outcome = unsafe {
            let options = options.as_ptr().cast();
            libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options)
        };
        let error = std::io::Error::last_os_error();
        assert_eq!(
            outcome, 0,
            "a tmpfs cannot be mounted: {error}; run as root"
        );
        fs::write(path.join("ballast"), vec![1; BALLAST]).unwrap();
        Self { path }
    }

    /// A mount that spills to it; its limits alone would allow far more.
    fn mount<'a>(&self, lab: &'a Lab) -> Mount<'a> {
        let spill = self.path.join("spill");
        lab.mount_with(&[
            "--part-size",
            "5MiB",
            "--memory",
            "64MiB",
            "--spill-size",
            "1GiB",
            "--spill-dir",
            spill.to_str().unwrap(),
        ])
    }

    fn make_room(&self) {
        fs::remove_file(self.path.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let target = c_path(&self.path);
        // SAFETY: a valid C string; whatever still uses the disk keeps it until it ends.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

/// A file that is being written, and how far that has got.
struct Writing<'a> {
    file: File,
    data: &'a [u8],
    done: usize,
}

impl Writing<'_> {
    /// One write(2); its error ends the whole.
    fn piece(&mut self) -> std::io::Result<()> {
        let end = self.data.len().min(self.done + PIECE);
        self.done += self.file.write(&self.data[self.done..end])?;
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.done == self.data.len()
    }
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[test]
fn a_write_that_meets_a_full_disk_is_enospc_and_the_file_is_finished_when_there_is_room() {
    const FILES: usize = 24;
    let lab = Lab::new();
    let disk = Disk::new(&lab);
    let mount = disk.mount(&lab);
    // Less than a part each: nothing can be sent before the closes, and all of it is more than
    // there is memory.
    let data = noise(PART - PIECE / 2);
    let mut files: Vec<Writing> = (0..FILES)
        .map(|index| Writing {
            file: File::create(mount.at(&format!("f{index}"))).unwrap(),
            data: &data,
            done: 0,
        })
        .collect();
    let mut refused = 0;
    'full: while files.iter().any(|writing| !writing.is_done()) {
        for writing in files.iter_mut().filter(|writing| !writing.is_done()) {
            if let Err(error) = writing.piece() {
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                refused += 1;
                break 'full;
            }
        }
    }
    assert_eq!(refused, 1, "the disk was large enough");
    lab.expect_log("--spill-dir");
    // What was accepted can be read.
    for (index, writing) in files.iter().enumerate() {
        let read = fs::read(mount.at(&format!("f{index}"))).unwrap();
        assert!(read.starts_with(&data[..writing.done]), "f{index}");
    }
    disk.make_room();
    while files.iter().any(|writing| !writing.is_done()) {
        for writing in files.iter_mut().filter(|writing| !writing.is_done()) {
            writing.piece().unwrap();
        }
    }
    for (index, writing) in files.into_iter().enumerate() {
        assert_eq!(close(writing.file), 0);
        let stored = lab.stored(&format!("f{index}")).unwrap();
        assert_eq!(digest(&stored), digest(&data), "f{index}");
    }
    let status = mount.status();
    assert!(status["memory"]["peak"].as_u64() <= status["memory"]["limit"].as_u64());
}

#[test]
fn a_large_file_that_meets_a_full_disk_while_the_store_refuses_it_is_finished_afterwards() {
    let lab = Lab::new();
    let disk = Disk::new(&lab);
    let mount = disk.mount(&lab);
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3
        .set_faults(1, vec![Rule::every(Kind::UploadPart, refused)]);
    let data = noise(40 * PART + 1234);
    let mut writing = Writing {
        file: File::create(mount.at("f")).unwrap(),
        data: &data,
        done: 0,
    };
    let error = loop {
        match writing.piece() {
            Ok(()) => assert!(!writing.is_done(), "the disk was large enough"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    disk.make_room();
    lab.s3.set_faults(1, Vec::new());
    while !writing.is_done() {
        writing.piece().unwrap();
    }
    assert_eq!(close(writing.file), 0);
    assert_eq!(digest(&lab.stored("f").unwrap()), digest(&data));
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn a_large_file_under_a_temporary_name_is_sent_when_the_disk_is_full() {
    let lab = Lab::new();
    let disk = Disk::new(&lab);
    let mount = disk.mount(&lab);
    let data = noise(40 * PART + 1234);
    let mut file = File::create(mount.at(".f.tmp")).unwrap();
    file.write_all(&data).unwrap();
    fs::rename(mount.at(".f.tmp"), mount.at("f")).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(digest(&lab.stored("f").unwrap()), digest(&data));
    assert_eq!(lab.names(), ["f"]);
}

#[test]
fn a_file_whose_chunk_on_disk_cannot_grow_is_right_when_there_is_room_again() {
    const FILES: usize = 16;
    let lab = Lab::new();
    let disk = Disk::new(&lab);
    let mount = disk.mount(&lab);
    let data = noise(PART - 1000);
    // The first goes to the disk, as the one that was touched longest ago.
    let half = 3 * PIECE;
    let mut first = Writing {
        file: File::create(mount.at("first")).unwrap(),
        data: &data,
        done: 0,
    };
    while first.done < half {
        first.piece().unwrap();
    }
    let mut others: Vec<Writing> = (0..FILES)
        .map(|index| Writing {
            file: File::create(mount.at(&format!("f{index}"))).unwrap(),
            data: &data,
            done: 0,
        })
        .collect();
    while mount.status()["spill"]["used"].as_u64().unwrap() == 0 {
        let writing = others.iter_mut().find(|writing| !writing.is_done());
        writing.expect("less memory than this").piece().unwrap();
    }
    // Nothing is left on the disk but for what its chunk has.
    fs::write(disk.path.join("more"), vec![1; DISK]).unwrap_err();
    // Over bytes that it has and beyond them, in one write.
    let overlap = half - 8192..half;
    let overlapping = first.file.write_at(&[9; 65536], overlap.start as u64);
    assert_eq!(errno(overlapping), libc::ENOSPC);
    fs::remove_file(disk.path.join("more")).unwrap();
    disk.make_room();
    first.file.write_all_at(&data[half..], half as u64).unwrap();
    let read = fs::read(mount.at("first")).unwrap();
    assert_eq!(close(first.file), 0);
    // Of the write that failed something may be there, where it was to be, and the same everywhere.
    let stored = lab.stored("first").unwrap();
    assert_eq!(digest(&stored), digest(&read));
    assert_eq!(stored.len(), data.len());
    assert!(stored[..overlap.start] == data[..overlap.start]);
    assert!(stored[overlap.end..] == data[overlap.end..]);
}
