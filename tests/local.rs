//! Files that are whole in the disk cache, which the kernel reads by itself, through a real mount.

mod harness;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Lab, Mount, noise, wait_until};
use mlfs_lab::s3::Kind;

fn mounted<'a>(lab: &'a Lab, folder: &Path, more: &[&str]) -> Mount<'a> {
    let mut flags = vec!["--cache-dir", folder.to_str().unwrap(), "--memory", "1GiB"];
    flags.extend_from_slice(more);
    lab.mount_with(&flags)
}

fn opened_on_disk(mount: &Mount) -> u64 {
    mount.status()["read"]["opened_on_disk"].as_u64().unwrap()
}

/// The file with the bytes of the only version in the cache.
fn only_data(folder: &Path) -> PathBuf {
    let mut versions = fs::read_dir(folder.join("v1")).unwrap().flatten();
    versions
        .find_map(|version| {
            let data = version.path().join("data");
            data.exists().then_some(data)
        })
        .unwrap()
}

#[test]
fn a_file_that_is_whole_in_the_disk_cache_is_read_by_the_kernel_alone() {
    let lab = Lab::new();
    let data = noise((5 << 20) + 77);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let mount = mounted(&lab, &folder, &["--read-only"]);
    mount.prefetch("f");
    // Written by this mount: nothing is left to be checked.
    let before = mount.status()["read"]["bytes_served"].clone();
    let (one, two) = (
        File::open(mount.at("f")).unwrap(),
        File::open(mount.at("f")).unwrap(),
    );
    assert_eq!(opened_on_disk(&mount), 2);
    let mut piece = vec![0; 1 << 20];
    one.read_exact_at(&mut piece, 1234).unwrap();
    assert!(piece == data[1234..1234 + (1 << 20)]);
    drop(one);
    two.read_exact_at(&mut piece, 4 << 20).unwrap();
    assert!(piece == data[4 << 20..5 << 20]);
    drop(two);
    assert!(fs::read(mount.at("f")).unwrap() == data);
    assert_eq!(mount.status()["read"]["bytes_served"], before);
}

#[test]
fn what_another_mount_cached_is_checked_once_before_the_kernel_reads_it() {
    let lab = Lab::new();
    let data = noise(3 << 20);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let first = mounted(&lab, &folder, &[]);
    first.prefetch("f");
    drop(first);
    let damaged = fs::OpenOptions::new().write(true).open(only_data(&folder));
    damaged.unwrap().write_all_at(b"damage", 2 << 20).unwrap();
    let mount = mounted(&lab, &folder, &["--read-only"]);
    let gets = lab.s3.stats().of(Kind::Get).requests;
    assert!(fs::read(mount.at("f")).unwrap() == data);
    assert_eq!(opened_on_disk(&mount), 0);
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, gets + 1);
    // Only what was damaged has to be written.
    wait_until("it to be mended and read by the kernel", || {
        drop(File::open(mount.at("f")).unwrap());
        opened_on_disk(&mount) > 0
    });
    assert!(fs::read(mount.at("f")).unwrap() == data);
}

#[test]
fn where_somebody_may_write_every_read_goes_through_the_mount() {
    let lab = Lab::new();
    let data = noise(3 << 20);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let mount = mounted(&lab, &folder, &[]);
    mount.prefetch("f");
    let reader = File::open(mount.at("f")).unwrap();
    let writer = fs::OpenOptions::new().write(true).open(mount.at("f"));
    let writer = writer.unwrap();
    writer.write_all_at(b"changed", 1000).unwrap();
    let mut seen = [0; 7];
    reader.read_exact_at(&mut seen, 1000).unwrap();
    assert_eq!(&seen, b"changed");
    assert_eq!(opened_on_disk(&mount), 0);
}

#[test]
fn who_had_the_file_open_before_it_was_whole_reads_on_as_before() {
    let lab = Lab::new();
    let data = noise(3 << 20);
    lab.put("f", data.clone());
    let folder = lab.empty_folder();
    let mount = mounted(&lab, &folder, &["--read-only"]);
    let early = File::open(mount.at("f")).unwrap();
    mount.prefetch("f");
    let late = File::open(mount.at("f")).unwrap();
    assert_eq!(opened_on_disk(&mount), 0);
    let mut piece = vec![0; data.len()];
    for file in [&early, &late] {
        file.read_exact_at(&mut piece, 0).unwrap();
        assert!(piece == data);
    }
    drop((early, late));
    wait_until("the kernel to have closed both", || {
        drop(File::open(mount.at("f")).unwrap());
        opened_on_disk(&mount) > 0
    });
    assert!(fs::read(mount.at("f")).unwrap() == data);
}

#[test]
fn a_replaced_object_is_never_read_from_the_former_ones_bytes() {
    let lab = Lab::new();
    lab.put("f", vec![1; 3 << 20]);
    let folder = lab.empty_folder();
    let mount = mounted(&lab, &folder, &["--read-only", "--metadata-ttl", "0"]);
    mount.prefetch("f");
    let former = File::open(mount.at("f")).unwrap();
    assert_eq!(opened_on_disk(&mount), 1);
    lab.put_later("f", vec![2; 3 << 20]);
    assert!(fs::read(mount.at("f")).unwrap() == vec![2; 3 << 20]);
    let mut piece = vec![0; 3 << 20];
    former.read_exact_at(&mut piece, 0).unwrap();
    assert!(piece == vec![1; 3 << 20]);
    // Also when the cache was emptied meanwhile.
    let mut command = lab.program();
    let cleared = command.args(["cache", "clear", "--cache-dir"]).arg(&folder);
    assert!(cleared.output().unwrap().status.success());
    former.read_exact_at(&mut piece, 0).unwrap();
    assert!(piece == vec![1; 3 << 20]);
}

/// A file system over two folders; gone with the value.
struct Overlay(PathBuf);

impl Overlay {
    fn new(folder: &Path) -> Self {
        let part = |name: &str| {
            let path = folder.join(name);
            fs::create_dir(&path).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (lower, upper, work) = (part("lower"), part("upper"), part("work"));
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let merged = PathBuf::from(part("merged"));
        let mut command = Command::new("mount");
        command.args(["-t", "overlay", "overlay", "-o", &options]);
        let output = command.arg(&merged).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(merged)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_cache_that_the_kernel_cannot_read_by_itself_is_read_through_the_mount() {
    let lab = Lab::new();
    let data = noise(3 << 20);
    lab.put("f", data.clone());
    let overlay = Overlay::new(&lab.empty_folder());
    let folder = overlay.0.join("cache");
    let mount = mounted(&lab, &folder, &["--read-only"]);
    mount.prefetch("f");
    for _ in 0..2 {
        assert!(fs::read(mount.at("f")).unwrap() == data);
    }
    assert_eq!(opened_on_disk(&mount), 0);
    lab.expect_log("read through mlfs");
    assert_eq!(lab.s3.stats().of(Kind::Get).bytes_out, 3 << 20);
    // The overlay goes last.
    drop(mount);
}
