//! What the disk cache promises, through a real mount.

mod harness;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use harness::{Lab, Mount, noise, wait_until};
use mlfs_lab::s3::{Kind, ServerOptions};

const MIB: u64 = 1 << 20;

/// A mount with a disk cache, and with memory for 64 MiB of blocks to wait for the disk: a slow one
/// must not make these tests find something not cached.
fn cached<'a>(lab: &'a Lab, folder: &Path, more: &[&str]) -> Mount<'a> {
    let folder = folder.to_str().unwrap();
    let mut flags = vec!["--cache-dir", folder, "--memory", "1GiB"];
    flags.extend_from_slice(more);
    lab.mount_with(&flags)
}

fn disk(mount: &Mount) -> serde_json::Value {
    mount.status()["read"]["disk"].clone()
}

/// Waits until all that was asked of the store has been written to disk, or there was no room.
fn settle(mount: &Mount) {
    wait_until("the disk cache to be written", || {
        let read = &mount.status()["read"];
        let bytes = |value: &serde_json::Value| value.as_u64().unwrap();
        bytes(&read["bytes_demanded"]) + bytes(&read["bytes_prefetched"])
            == bytes(&read["disk"]["bytes_written"]) + bytes(&read["disk"]["bytes_skipped"])
    });
}

fn got(lab: &Lab) -> u64 {
    lab.s3.stats().of(Kind::Get).bytes_out
}

/// Files below `folder` with this name.
fn files(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, name));
        } else if entry.file_name() == name {
            found.push(path);
        }
    }
    found
}

/// Bytes of disk that everything below `folder` takes. What is deleted meanwhile takes none.
fn usage(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => metadata.blocks() * 512 + usage(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

#[test]
fn a_second_mount_reads_a_file_without_a_byte_from_the_store() {
    let lab = Lab::new();
    let data = noise(40 << 20);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let first = cached(&lab, &folder, &[]);
    assert!(fs::read(first.at("f")).unwrap() == data);
    settle(&first);
    assert_eq!(disk(&first)["bytes_written"], data.len() as u64);
    assert_eq!(disk(&first)["bytes_skipped"], 0);
    assert_eq!(disk(&first)["limit"], 20_u64 << 30);
    drop(first);
    assert_eq!(got(&lab), data.len() as u64);
    lab.s3.reset_stats();
    let second = cached(&lab, &folder, &[]);
    assert!(fs::read(second.at("f")).unwrap() == data);
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, 0);
    let read = &second.status()["read"];
    assert_eq!(read["bytes_from_disk"], data.len() as u64);
    assert_eq!(read["bytes_demanded"], 0);
    assert!(read["disk"]["bytes_stored"].as_u64().unwrap() >= data.len() as u64);
}

#[test]
fn two_mounts_share_what_either_has_read() {
    let lab = Lab::new();
    let data = noise(20 << 20);
    lab.put("a", data.clone());
    lab.put("b", data.clone());
    let folder = lab.empty_folder();
    let (one, other) = (cached(&lab, &folder, &[]), cached(&lab, &folder, &[]));
    assert!(fs::read(one.at("a")).unwrap() == data);
    assert!(fs::read(other.at("b")).unwrap() == data);
    settle(&one);
    settle(&other);
    lab.s3.reset_stats();
    assert!(fs::read(one.at("b")).unwrap() == data);
    assert!(fs::read(other.at("a")).unwrap() == data);
    assert_eq!(got(&lab), 0);
}

#[test]
fn what_is_cached_in_part_is_fetched_in_part() {
    let lab = Lab::new();
    let data = noise(32 << 20);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let first = cached(&lab, &folder, &[]);
    let file = fs::File::open(first.at("f")).unwrap();
    let mut piece = vec![0; 4 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut piece, 8 << 20).unwrap();
    drop(file);
    settle(&first);
    drop(first);
    let before = got(&lab);
    assert!(before >= 4 * MIB);
    let second = cached(&lab, &folder, &[]);
    assert!(fs::read(second.at("f")).unwrap() == data);
    // What lies between two gaps and is small is fetched with them.
    let fetched = got(&lab);
    assert!(fetched <= data.len() as u64 + 2 * MIB, "{fetched}");
}

#[test]
fn a_replaced_object_is_never_served_from_its_old_version() {
    let lab = Lab::new();
    lab.put("f", vec![1; 10 << 20]);
    let folder = lab.empty_folder();
    let first = cached(&lab, &folder, &["--metadata-ttl", "0"]);
    assert!(fs::read(first.at("f")).unwrap() == vec![1; 10 << 20]);
    settle(&first);
    lab.put("f", vec![2; 10 << 20]);
    assert!(fs::read(first.at("f")).unwrap() == vec![2; 10 << 20]);
    settle(&first);
    drop(first);
    let second = cached(&lab, &folder, &[]);
    assert!(fs::read(second.at("f")).unwrap() == vec![2; 10 << 20]);
    assert_eq!(files(&folder, "data").len(), 2);
}

#[test]
fn damage_on_disk_is_never_served_and_is_mended() {
    type Damage = fn(&Path);
    let damages: [(&str, &str, Damage); 4] = [
        ("a flipped byte", "data", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[5_000_000] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("a truncated data file", "data", |path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(7_000_000).unwrap();
        }),
        ("a garbage index", "index", |path| {
            let length = fs::metadata(path).unwrap().len();
            fs::write(path, noise(length as usize)).unwrap();
        }),
        ("a wrong identity", "identity", |path| {
            fs::write(path, "mlfs cached version 1\nsomething else\n").unwrap();
        }),
    ];
    let lab = Lab::new();
    let data = noise(10 << 20);
    lab.put("f", data.clone());
    for (what, file, damage) in damages {
        let folder = lab.empty_folder();
        let first = cached(&lab, &folder, &[]);
        assert!(fs::read(first.at("f")).unwrap() == data);
        settle(&first);
        drop(first);
        damage(&files(&folder, file)[0]);
        lab.s3.reset_stats();
        let second = cached(&lab, &folder, &[]);
        assert!(fs::read(second.at("f")).unwrap() == data, "{what}");
        settle(&second);
        drop(second);
        let fetched = got(&lab);
        assert!(fetched >= 32 * 1024, "{what}: {fetched}");
        if what == "a flipped byte" {
            assert_eq!(fetched, 32 * 1024);
        }
        lab.s3.reset_stats();
        let third = cached(&lab, &folder, &[]);
        assert!(fs::read(third.at("f")).unwrap() == data, "{what}");
        assert_eq!(got(&lab), 0, "{what}");
    }
}

#[test]
fn a_mount_that_was_killed_while_caching_leaves_nothing_wrong() {
    let lab = Lab::new();
    let data = noise(60 << 20);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let first = cached(&lab, &folder, &[]);
    let pid = first.pid();
    let path = first.at("f");
    let reader = std::thread::spawn(move || fs::read(path));
    wait_until("something to be cached", || usage(&folder) > 4 * MIB);
    // SAFETY: the process of a mount of this test.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let _ = reader.join();
    drop(first);
    let second = cached(&lab, &folder, &[]);
    assert!(fs::read(second.at("f")).unwrap() == data);
}

#[test]
fn the_limit_holds_while_more_is_read() {
    let lab = Lab::new();
    let limit = 64 * MIB;
    let folder = lab.empty_folder();
    let data = noise(20 << 20);
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        lab.put(name, data.clone());
    }
    lab.put_large("large", 100 * MIB);
    let mount = cached(&lab, &folder, &["--cache-size", "64MiB"]);
    for name in ["a", "b", "c", "d", "e", "f"] {
        assert!(fs::read(mount.at(name)).unwrap() == data);
        assert!(usage(&folder) <= limit);
        settle(&mount);
        assert!(usage(&folder) <= limit);
    }
    assert!(usage(&folder) >= 40 * MIB);
    // One that is larger than the limit itself.
    let large = fs::read(mount.at("large")).unwrap();
    assert!(large == lab.stored("large").unwrap());
    settle(&mount);
    assert!(usage(&folder) <= limit);
    assert!(fs::read(mount.at("g")).unwrap() == data);
    settle(&mount);
    drop(mount);
    // The last one is there.
    lab.s3.reset_stats();
    let second = cached(&lab, &folder, &["--cache-size", "64MiB"]);
    assert!(fs::read(second.at("g")).unwrap() == data);
    assert_eq!(got(&lab), 0);
}

/// A tmpfs, unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` where this user may not mount.
    fn mount(path: PathBuf, flags: u64, options: &str) -> Option<Self> {
        let (target, kind) = (c_string(&path), c"tmpfs");
        let options = CString::new(options).unwrap();
        // SAFETY: all are C strings that outlive the call.
        let outcome = unsafe {
            libc::mount(
                kind.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                flags,
                options.as_ptr().cast(),
            )
        };
        (outcome == 0).then_some(Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // SAFETY: a valid C string; one that is gone already is an error nobody minds.
        unsafe { libc::umount2(c_string(&self.0).as_ptr(), libc::MNT_DETACH) };
    }
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

#[test]
fn a_cache_folder_that_cannot_be_written_costs_one_log_line_and_no_read() {
    for (flags, options) in [(libc::MS_RDONLY, "size=64m"), (0, "size=8m")] {
        let lab = Lab::new();
        let data = noise(24 << 20);
        lab.put("f", data.clone());
        lab.put("g", data.clone());
        let Some(folder) = Tmpfs::mount(lab.empty_folder(), flags, options) else {
            eprintln!("not tested: this user may not mount a tmpfs");
            return;
        };
        let mount = cached(&lab, &folder.0, &[]);
        for name in ["f", "g"] {
            assert!(fs::read(mount.at(name)).unwrap() == data);
        }
        wait_until("the cache to be off", || disk(&mount)["on"] == false);
        assert!(fs::read(mount.at("f")).unwrap() == data);
        drop(mount);
        let log = lab.log_text();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("disk cache"))
            .collect();
        assert_eq!(lines.len(), 1, "{log}");
        assert!(lines[0].contains(folder.0.to_str().unwrap()), "{log}");
        assert!(lines[0].contains("--cache-dir"), "{log}");
        assert!(!log.contains("WARN"), "{log}");
    }
}

#[test]
fn stores_of_one_bucket_name_at_two_endpoints_do_not_mix() {
    let (one, other) = (Lab::new(), Lab::with(ServerOptions::default()));
    let data = noise(6 << 20);
    let inverted: Vec<u8> = data.iter().map(|byte| !byte).collect();
    one.put("f", data.clone());
    other.put("f", inverted.clone());
    let folder = one.empty_folder();
    let first = cached(&one, &folder, &[]);
    assert!(fs::read(first.at("f")).unwrap() == data);
    settle(&first);
    let second = cached(&other, &folder, &[]);
    assert!(fs::read(second.at("f")).unwrap() == inverted);
    settle(&second);
    // Bucket, key, ETag and size are the same.
    let identities: Vec<String> = files(&folder, "identity")
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    assert_eq!(identities.len(), 2);
    let rest = |text: &str| text.lines().skip(2).collect::<Vec<_>>().join("\n");
    assert_eq!(rest(&identities[0]), rest(&identities[1]));
    assert_ne!(identities[0], identities[1]);
}

#[test]
fn without_its_flags_there_is_no_disk_cache() {
    let lab = Lab::new();
    lab.put("f", noise(5 << 20));
    let mount = lab.mount();
    assert!(fs::read(mount.at("f")).unwrap() == noise(5 << 20));
    assert!(disk(&mount).is_null());
    assert!(!lab.folder().join(".cache/mlfs/blocks").exists());
    drop(mount);
    let mount = lab.mount_with(&["--cache-size", "64MiB"]);
    assert!(fs::read(mount.at("f")).unwrap() == noise(5 << 20));
    settle(&mount);
    assert_eq!(disk(&mount)["bytes_written"], 5 * MIB);
    // While it is written back, the file system may show less for a moment.
    let folder = lab.folder().join(".cache/mlfs/blocks");
    wait_until("it to be on disk", || usage(&folder) >= 5 * MIB);
    drop(mount);
    let off = lab.empty_folder();
    let mount = cached(&lab, &off, &["--cache-size", "0"]);
    assert!(fs::read(mount.at("f")).unwrap() == noise(5 << 20));
    assert!(disk(&mount).is_null());
    assert_eq!(fs::read_dir(&off).unwrap().count(), 0);
}

#[test]
fn what_is_fetched_and_then_read_from_disk_stays_within_the_memory() {
    let lab = Lab::with(ServerOptions {
        first_byte: std::time::Duration::from_millis(15),
        connection_rate: Some(90_000_000),
        ..ServerOptions::default()
    });
    let size = 1 << 30;
    lab.put_large("big", size);
    let folder = lab.empty_folder();
    let mount = lab.mount_with(&[
        "--cache-dir",
        folder.to_str().unwrap(),
        "--memory",
        "512MiB",
    ]);
    mount.prefetch("big");
    let mut file = fs::File::open(mount.at("big")).unwrap();
    assert_eq!(
        std::io::copy(&mut file, &mut std::io::sink()).unwrap(),
        size
    );
    assert_eq!(got(&lab), size);
    let peak = mount.memory("VmHWM");
    assert!(peak <= 512 + 128, "{peak} MiB");
}

#[test]
fn what_is_on_disk_is_read_with_little_of_it_in_memory() {
    let lab = Lab::new();
    let size = 400 * MIB;
    lab.put_large("big", size);
    let folder = lab.empty_folder();
    let first = cached(&lab, &folder, &[]);
    first.prefetch("big");
    drop(first);
    let second = cached(&lab, &folder, &[]);
    let mut file = fs::File::open(second.at("big")).unwrap();
    assert_eq!(
        std::io::copy(&mut file, &mut std::io::sink()).unwrap(),
        size
    );
    assert_eq!(got(&lab), size);
    let peak = second.status()["memory"]["peak"].as_u64().unwrap();
    assert!(peak <= 160 * MIB, "{} MiB", peak / MIB);
}

#[test]
fn a_tensor_that_is_not_on_disk_comes_in_as_many_ranges_whatever_else_is() {
    let lab = Lab::with(ServerOptions {
        first_byte: std::time::Duration::from_millis(30),
        ..ServerOptions::default()
    });
    let tensor = 16 * MIB;
    let start = lab.put_tensors("model.safetensors", 8, tensor);
    let folder = lab.empty_folder();
    let read_tensor = |mount: &Mount, number: u64| {
        let file = mount.open_direct("model.safetensors");
        let mut piece = vec![0; 256 << 10];
        file.read_exact_at(&mut piece, 0).unwrap();
        let begin = (start + number * tensor) / 4096 * 4096;
        for at in (begin..begin + tensor).step_by(piece.len()) {
            file.read_exact_at(&mut piece, at).unwrap();
        }
    };
    let first = cached(&lab, &folder, &[]);
    read_tensor(&first, 5);
    settle(&first);
    drop(first);
    lab.s3.reset_stats();
    let second = cached(&lab, &folder, &[]);
    read_tensor(&second, 5);
    assert!(got(&lab) <= MIB, "{}", got(&lab));
    read_tensor(&second, 2);
    let stats = lab.s3.stats();
    assert!(stats.most_at_once >= 12, "{}", stats.most_at_once);
}

#[test]
fn the_cache_can_be_looked_at_and_emptied_while_it_is_in_use() {
    let lab = Lab::new();
    let data = noise(8 << 20);
    lab.put("f", data.clone());
    lab.put("g", data.clone());
    let folder = lab.empty_folder();
    let mlfs = |arguments: &[&str]| {
        let mut command = lab.program();
        let command = command.arg("cache").args(arguments);
        command.arg("--cache-dir").arg(&folder).output().unwrap()
    };
    // Nothing has been cached there.
    let missing = mlfs(&["info"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(harness::text(&missing).contains("--cache-dir"));
    let mount = cached(&lab, &folder, &["--metadata-ttl", "forever"]);
    assert!(fs::read(mount.at("f")).unwrap() == data);
    assert!(fs::read(mount.at("g")).unwrap() == data);
    settle(&mount);
    let info = mlfs(&["info", "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["versions"], 2);
    assert!(info["bytes"].as_u64().unwrap() >= 2 * data.len() as u64);
    let cleared = mlfs(&["clear"]);
    assert!(cleared.status.success());
    assert!(String::from_utf8_lossy(&cleared.stdout).contains("2 versions"));
    assert!(usage(&folder) < MIB);
    // It goes on, and caches again.
    assert!(fs::read(mount.at("f")).unwrap() == data);
    drop(mount);
    let again = cached(&lab, &folder, &[]);
    assert!(fs::read(again.at("g")).unwrap() == data);
    settle(&again);
    let info = String::from_utf8(mlfs(&["info"]).stdout).unwrap();
    assert!(info.contains("versions of files"), "{info}");
}
