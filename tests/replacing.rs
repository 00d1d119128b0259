//! One file in the place of another: overwrites, renames over a name, renames of directories.

mod harness;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use harness::{Lab, close, errno, noise, wait_until};
use mlfs_lab::s3::Kind;

const PART: usize = 5 << 20;
/// Small parts, so that small files have several.
const SMALL_PARTS: &[&str] = &["--part-size", "5MiB", "--memory", "128MiB"];

#[test]
fn an_overwrite_shows_the_old_object_or_the_new_and_nothing_between() {
    let lab = Lab::new();
    lab.put("f", vec![1; 3 * PART]);
    let mount = lab.mount_with(SMALL_PARTS);
    let mut file = File::create(mount.at("f")).unwrap();
    let new = noise(2 * PART + 7);
    file.write_all(&new).unwrap();
    assert!(lab.stored("f").unwrap() == vec![1; 3 * PART]);
    // This mount's readers see what was written.
    assert!(fs::read(mount.at("f")).unwrap() == new);
    assert_eq!(close(file), 0);
    assert!(lab.stored("f").unwrap() == new);
    assert!(fs::read(mount.at("f")).unwrap() == new);
}

#[test]
fn the_descriptor_of_a_file_survives_its_replacement() {
    let lab = Lab::new();
    lab.put("f", b"old".as_slice());
    let mount = lab.mount();
    fs::write(mount.at(".f.tmp"), b"new").unwrap();
    fs::rename(mount.at(".f.tmp"), mount.at("f")).unwrap();
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"new");
    assert_eq!(lab.names(), ["f"]);
    assert_eq!(errno(fs::metadata(mount.at(".f.tmp"))), libc::ENOENT);
}

/// Opens and reads `path` again and again, as long as `work` takes and a few times more. There must
/// always be something, and that must be one of `versions`; one that is replaced meanwhile may end
/// in ESTALE.
fn read_while(path: &Path, versions: &[&[u8]], work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    let reads = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let mut read = Vec::new();
                let mut file = File::open(path).expect("one of them is there");
                match file.read_to_end(&mut read) {
                    Ok(_) => {
                        assert!(versions.contains(&&read[..]), "{} bytes", read.len());
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => {
                        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
                        assert!(versions.iter().any(|version| version.starts_with(&read)));
                    }
                }
            }
        });
        let reads_again = || {
            let before = reads.load(Ordering::Relaxed);
            wait_until("the reader to read", || {
                reader.is_finished() || reads.load(Ordering::Relaxed) > before + 2
            });
        };
        reads_again();
        work();
        reads_again();
        done.store(true, Ordering::Relaxed);
        reader.join().expect("the reader finds what it must");
    });
}

#[test]
fn a_file_that_is_replaced_by_a_rename_is_the_old_or_the_new_to_whoever_reads_it() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let versions: Vec<Vec<u8>> = (0..6)
        .map(|number| noise(PART + 8 * number + 8).split_off(8 * number))
        .collect();
    fs::write(mount.at("f"), &versions[0]).unwrap();
    let all: Vec<&[u8]> = versions.iter().map(Vec::as_slice).collect();
    read_while(&mount.at("f"), &all, || {
        for (number, version) in versions.iter().enumerate().skip(1) {
            let name = mount.at(&format!("f.{number}"));
            let mut file = File::create(&name).unwrap();
            file.write_all(version).unwrap();
            // Renamed before the close and after it, by turns.
            if number % 2 == 0 {
                assert_eq!(close(file), 0);
                fs::rename(&name, mount.at("f")).unwrap();
            } else {
                fs::rename(&name, mount.at("f")).unwrap();
                assert!(lab.stored("f").unwrap() == versions[number - 1]);
                assert_eq!(close(file), 0);
            }
            assert!(lab.stored("f").unwrap() == *version);
        }
    });
    assert_eq!(lab.names(), ["f"]);
    wait_until("nothing to be left", || lab.s3.uploads() == 0);
}

#[test]
fn a_stored_file_is_never_missing_from_the_store_while_it_is_replaced() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::write(mount.at("f"), b"old").unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(Ordering::Relaxed) || looks == 0 {
                let stored = lab.stored("f").expect("one of them is there");
                assert!(stored == b"old" || stored.starts_with(b"new "));
                looks += 1;
            }
        });
        for number in 0..40 {
            fs::write(mount.at("g"), format!("new {number}")).unwrap();
            fs::rename(mount.at("g"), mount.at("f")).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().expect("the watcher finds what it must");
    });
    assert_eq!(lab.stored("f").unwrap(), b"new 39");
    assert_eq!(lab.names(), ["f"]);
}

#[test]
fn a_file_renamed_before_it_is_closed_is_published_once_under_its_last_name() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(2 * PART + 5);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.at(".tmpXYZ"))
        .unwrap();
    file.set_len(data.len() as u64).unwrap();
    file.write_all(&data).unwrap();
    fs::rename(mount.at(".tmpXYZ"), mount.at("model.safetensors")).unwrap();
    assert_eq!(lab.names(), Vec::<String>::new());
    assert_eq!(close(file), 0);
    assert_eq!(lab.names(), ["model.safetensors"]);
    assert!(lab.stored("model.safetensors").unwrap() == data);
    let stats = lab.s3.stats();
    assert_eq!(stats.of(Kind::Copy).requests, 0);
    assert_eq!(stats.of(Kind::UploadPart).bytes_in, data.len() as u64);
}

#[test]
fn a_file_renamed_while_parts_of_it_are_sent_is_whole_under_the_new_name_only() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(4 * PART + 5);
    let mut file = File::create(mount.at("first")).unwrap();
    file.write_all(&data[..3 * PART]).unwrap();
    wait_until("a part to be sent", || {
        lab.s3.stats().of(Kind::UploadPart).requests > 0
    });
    fs::create_dir(mount.at("d")).unwrap();
    fs::rename(mount.at("first"), mount.at("d/second")).unwrap();
    file.write_all(&data[3 * PART..]).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.names(), ["d/second"]);
    assert!(lab.stored("d/second").unwrap() == data);
    wait_until("the first upload to be given up", || lab.s3.uploads() == 0);
}

#[test]
fn a_directory_renamed_with_open_files_takes_them_along() {
    let lab = Lab::new();
    let mount = lab.mount_with(SMALL_PARTS);
    fs::create_dir(mount.at("from")).unwrap();
    fs::write(mount.at("from/closed"), b"closed").unwrap();
    let mut file = File::create(mount.at("from/open")).unwrap();
    file.write_all(b"open").unwrap();
    fs::rename(mount.at("from"), mount.at("to")).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.names(), ["to/closed", "to/open"]);
    assert_eq!(fs::read(mount.at("to/open")).unwrap(), b"open");
}

#[test]
fn a_tree_of_stored_and_open_files_is_renamed_with_everything_in_it() {
    let lab = Lab::new();
    lab.put("from/others", b"by somebody else".as_slice());
    let mount = lab.mount_with(SMALL_PARTS);
    let data = noise(3 * PART + 5);
    fs::create_dir_all(mount.at("from/deep/empty")).unwrap();
    fs::write(mount.at("from/stored"), b"stored").unwrap();
    fs::write(mount.at("from/deep/stored"), &data).unwrap();
    let mut small = File::create(mount.at("from/deep/small")).unwrap();
    small.write_all(b"half").unwrap();
    // Some of it is on its way under the old name.
    let mut large = File::create(mount.at("from/deep/large")).unwrap();
    large.write_all(&data[..2 * PART]).unwrap();
    wait_until("parts to be sent", || {
        lab.s3.stats().of(Kind::UploadPart).requests >= 4 + 2
    });
    // A stored file that is being changed, and one that is only read.
    let mut options = OpenOptions::new();
    let mut changed = options.append(true).open(mount.at("from/stored")).unwrap();
    changed.write_all(b" and changed").unwrap();
    let reader = File::open(mount.at("from/deep/stored")).unwrap();

    fs::rename(mount.at("from"), mount.at("to")).unwrap();
    assert_eq!(errno(fs::metadata(mount.at("from"))), libc::ENOENT);
    assert_eq!(
        fs::read(mount.at("to/others")).unwrap(),
        b"by somebody else"
    );
    assert_eq!(fs::read(mount.at("to/deep/small")).unwrap(), b"half");
    assert!(fs::read(mount.at("to/deep/large")).unwrap() == data[..2 * PART]);
    assert_eq!(
        fs::read(mount.at("to/stored")).unwrap(),
        b"stored and changed"
    );
    let mut read = Vec::new();
    (&reader).read_to_end(&mut read).unwrap();
    assert!(read == data);

    small.write_all(b" and whole").unwrap();
    large.write_all(&data[2 * PART..]).unwrap();
    for file in [small, large, changed] {
        assert_eq!(close(file), 0);
    }
    let names = [
        "deep/large",
        "deep/small",
        "deep/stored",
        "others",
        "stored",
    ];
    assert_eq!(lab.names(), names.map(|name| format!("to/{name}")));
    assert_eq!(lab.stored("to/deep/small").unwrap(), b"half and whole");
    assert!(lab.stored("to/deep/large").unwrap() == data);
    assert!(lab.stored("to/deep/stored").unwrap() == data);
    assert_eq!(lab.stored("to/stored").unwrap(), b"stored and changed");
    assert!(fs::metadata(mount.at("to/deep/empty")).unwrap().is_dir());
    wait_until("nothing to be left", || lab.s3.uploads() == 0);
    // Another mount finds the same.
    let other = lab.mount();
    assert!(fs::read(other.at("to/deep/large")).unwrap() == data);
    assert_eq!(errno(fs::metadata(other.at("from"))), libc::ENOENT);
}
