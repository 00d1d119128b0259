//! Names, attributes and directories, through a mount.

mod harness;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::SystemTime;

use harness::{BUCKET, Lab, PREFIX, RUN, errno};
use mlfs_lab::s3::Kind;

fn listed(path: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_root_lists_the_active_runs_page_by_page_and_hides_the_control_directory() {
    let lab = Lab::new();
    for index in 0..2500 {
        lab.tracking
            .add_run(&format!("{index:032}"), &format!("s3://{BUCKET}/{index}"));
    }
    let mount = lab.mount();
    let names = listed(&mount.path);
    // With `experiments` and `models`.
    assert_eq!(names.len(), 2503);
    assert!(names.iter().any(|name| name == RUN));
    let searches = lab
        .tracking
        .requests()
        .iter()
        .filter(|path| path.ends_with("runs/search"))
        .count();
    assert_eq!(searches, 3);
}

#[test]
fn a_run_is_found_by_its_id_without_a_listing_and_a_missing_one_is_enoent() {
    let lab = Lab::new();
    let mount = lab.mount();
    assert!(mount.path.join(RUN).is_dir());
    assert_eq!(
        errno(fs::metadata(mount.path.join("nosuchrun"))),
        libc::ENOENT
    );
    assert!(
        !lab.tracking
            .requests()
            .iter()
            .any(|path| path.ends_with("runs/search"))
    );
}

#[test]
fn a_server_that_is_down_is_eio_with_one_log_line_and_a_refusal_is_eacces() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--metadata-ttl", "0"]);
    lab.tracking.set_broken(Some(403));
    assert_eq!(
        errno(fs::metadata(mount.path.join("someotherrun"))),
        libc::EACCES
    );
    lab.tracking.set_broken(Some(400));
    assert_eq!(
        errno(fs::metadata(mount.path.join("yetanother"))),
        libc::EIO
    );
    lab.expect_log("HTTP 400");
}

#[test]
fn sizes_and_times_come_from_the_store_and_modes_from_the_flags() {
    let lab = Lab::new();
    lab.put("model/weights.bin", vec![1; 12345]);
    let mount = lab.mount_with(&["--uid", "7", "--gid", "8", "--umask", "027"]);
    let metadata = fs::metadata(mount.at("model/weights.bin")).unwrap();
    assert_eq!(metadata.len(), 12345);
    assert_eq!((metadata.uid(), metadata.gid()), (7, 8));
    assert_eq!(metadata.permissions().mode() & 0o777, 0o640);
    let age = SystemTime::now()
        .duration_since(metadata.modified().unwrap())
        .unwrap();
    assert!(age.as_secs() < 60);
    assert!(fs::metadata(mount.at("model")).unwrap().is_dir());
}

#[test]
fn keys_that_cannot_be_paths_are_left_out_and_a_directory_hides_an_object_of_its_name() {
    let lab = Lab::new();
    let long = "x".repeat(256);
    for key in [
        "a//b",
        "../escape",
        "./dot",
        "both",
        "both/x",
        "fine",
        long.as_str(),
        "marker/",
    ] {
        lab.put(key, b"x".as_slice());
    }
    let mount = lab.mount();
    assert_eq!(listed(&mount.at("")), ["a", "both", "fine", "marker"]);
    assert!(fs::metadata(mount.at("both")).unwrap().is_dir());
    assert_eq!(listed(&mount.at("a")), Vec::<String>::new());
    assert_eq!(listed(&mount.at("marker")), Vec::<String>::new());
    assert_eq!(fs::read(mount.at("both/x")).unwrap(), b"x");
}

#[test]
fn odd_names_go_to_the_store_and_back_as_they_are() {
    let lab = Lab::new();
    let mount = lab.mount();
    let names = [
        "with space",
        "plus+plus",
        "100%41",
        "ünïcödé",
        "#hash",
        "a&b<c>",
        "semi;colon",
        "new\nline",
    ];
    for name in names {
        fs::write(mount.at(name), name).unwrap();
        assert_eq!(lab.stored(name).as_deref(), Some(name.as_bytes()), "{name}");
    }
    let again = lab.mount();
    let mut expected: Vec<&str> = names.to_vec();
    expected.sort_unstable();
    assert_eq!(listed(&again.at("")), expected);
    for name in names {
        assert_eq!(fs::read(again.at(name)).unwrap(), name.as_bytes());
        fs::rename(again.at(name), again.at("renamed")).unwrap();
        fs::rename(again.at("renamed"), again.at(name)).unwrap();
    }
    assert_eq!(
        errno(fs::write(mount.at(&"y".repeat(256)), b"")),
        libc::ENAMETOOLONG
    );
}

#[test]
fn one_listing_serves_names_and_attributes_and_a_stat_after_it_costs_nothing() {
    let lab = Lab::new();
    for index in 0..300 {
        lab.put(&format!("d/f{index:03}"), vec![0; index]);
    }
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    assert_eq!(listed(&mount.at("d")).len(), 300);
    lab.s3.reset_stats();
    for index in 0..300 {
        assert_eq!(
            fs::metadata(mount.at(&format!("d/f{index:03}")))
                .unwrap()
                .len(),
            index as u64
        );
        assert_eq!(
            errno(fs::metadata(mount.at(&format!("d/no{index:03}")))),
            libc::ENOENT
        );
    }
    assert_eq!(lab.s3.stats().requests(), 0);
}

#[test]
fn a_directory_of_many_pages_lists_each_name_once() {
    let lab = Lab::new();
    for index in 0..3500 {
        lab.put(&format!("d/f{index:04}"), b"".as_slice());
        lab.put(&format!("d/s{index:04}/x"), b"".as_slice());
    }
    let mount = lab.mount();
    let names = listed(&mount.at("d"));
    assert_eq!(names.len(), 7000);
    assert!(names.windows(2).all(|pair| pair[0] < pair[1]));
    // And single names are found without listing all of it again.
    let again = lab.mount();
    lab.s3.reset_stats();
    assert!(again.at("d/s3400").is_dir());
    assert!(again.at("d/f3400").is_file());
    assert!(lab.s3.stats().of(Kind::List).requests <= 6);
}

#[test]
fn a_change_by_somebody_else_is_seen_after_the_metadata_ttl() {
    let lab = Lab::new();
    lab.put("f", b"one".as_slice());
    let mount = lab.mount_with(&["--metadata-ttl", "100ms"]);
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"one");
    lab.put("f", b"other".as_slice());
    lab.put("g", b"new".as_slice());
    harness::wait_until("the new version", || {
        fs::read(mount.at("f")).unwrap() == b"other"
    });
    harness::wait_until("the new file", || mount.at("g").exists());
    lab.s3.delete(BUCKET, &format!("{PREFIX}/g"));
    harness::wait_until("the file to be gone", || !mount.at("g").exists());
}

#[test]
fn empty_directories_live_locally_until_a_file_is_in_them() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::create_dir_all(mount.at("a/b/c")).unwrap();
    assert_eq!(lab.names(), Vec::<String>::new());
    assert_eq!(listed(&mount.at("a")), ["b"]);
    assert_eq!(errno(fs::create_dir(mount.at("a"))), libc::EEXIST);
    assert_eq!(errno(fs::remove_dir(mount.at("a"))), libc::ENOTEMPTY);
    fs::write(mount.at("a/b/c/f"), b"x").unwrap();
    assert_eq!(lab.names(), ["a/b/c/f"]);
    assert_eq!(errno(fs::remove_dir(mount.at("a/b/c"))), libc::ENOTEMPTY);
    fs::remove_file(mount.at("a/b/c/f")).unwrap();
    // As everywhere else, a directory outlives the last file in it.
    assert_eq!(listed(&mount.at("a/b")), ["c"]);
    fs::remove_dir(mount.at("a/b/c")).unwrap();
    fs::remove_dir(mount.at("a/b")).unwrap();
    fs::remove_dir(mount.at("a")).unwrap();
    assert_eq!(listed(&mount.at("")), Vec::<String>::new());
}

#[test]
fn a_file_is_removed_from_the_store_at_once() {
    let lab = Lab::new();
    lab.put("d/f", b"x".as_slice());
    let mount = lab.mount();
    fs::remove_file(mount.at("d/f")).unwrap();
    assert_eq!(lab.names(), Vec::<String>::new());
    assert_eq!(errno(fs::metadata(mount.at("d/f"))), libc::ENOENT);
    assert_eq!(errno(fs::remove_file(mount.at("d/f"))), libc::ENOENT);
    assert_eq!(errno(fs::remove_file(mount.at("d"))), libc::EISDIR);
}

#[test]
fn a_published_file_is_renamed_by_a_copy_inside_the_store() {
    let lab = Lab::new();
    lab.put("old", vec![7; 100_000]);
    lab.put("over", b"replaced".as_slice());
    let mount = lab.mount();
    lab.s3.reset_stats();
    fs::rename(mount.at("old"), mount.at("over")).unwrap();
    assert_eq!(lab.names(), ["over"]);
    assert_eq!(fs::read(mount.at("over")).unwrap(), vec![7; 100_000]);
    assert_eq!(lab.s3.stats().of(Kind::Put).requests, 0);
    assert_eq!(errno(fs::metadata(mount.at("old"))), libc::ENOENT);
}

#[test]
fn a_directory_is_renamed_with_everything_in_it() {
    let lab = Lab::new();
    for index in 0..50 {
        lab.put(
            &format!("from/sub{}/f{index}", index % 3),
            format!("{index}").into_bytes(),
        );
    }
    let mount = lab.mount();
    fs::create_dir(mount.at("from/empty")).unwrap();
    fs::create_dir(mount.at("full")).unwrap();
    fs::write(mount.at("full/x"), b"x").unwrap();
    assert_eq!(
        errno(fs::rename(mount.at("from"), mount.at("full"))),
        libc::ENOTEMPTY
    );
    fs::rename(mount.at("from"), mount.at("to")).unwrap();
    assert_eq!(
        lab.names()
            .iter()
            .filter(|name| name.starts_with("to/"))
            .count(),
        50
    );
    assert_eq!(
        lab.names()
            .iter()
            .filter(|name| name.starts_with("from/"))
            .count(),
        0
    );
    assert_eq!(listed(&mount.at("to")), ["empty", "sub0", "sub1", "sub2"]);
    assert_eq!(fs::read(mount.at("to/sub1/f1")).unwrap(), b"1");
    assert_eq!(errno(fs::metadata(mount.at("from"))), libc::ENOENT);
}

#[test]
fn times_modes_and_owners_are_accepted_and_cost_no_request() {
    let lab = Lab::new();
    lab.put("f", b"x".as_slice());
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(mount.at("f"))
        .unwrap();
    lab.s3.reset_stats();
    let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000);
    file.set_modified(time).unwrap();
    assert_eq!(
        fs::metadata(mount.at("f")).unwrap().modified().unwrap(),
        time
    );
    fs::set_permissions(mount.at("f"), fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(mount.at("f"), Some(1), Some(1)).unwrap();
    drop(file);
    assert_eq!(lab.s3.stats().requests(), 0);
}

#[test]
fn a_read_only_mount_refuses_every_change() {
    let lab = Lab::new();
    lab.put("f", b"x".as_slice());
    let mount = lab.mount_with(&["--read-only"]);
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"x");
    assert_eq!(errno(fs::write(mount.at("g"), b"x")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(mount.at("f"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(mount.at("d"))), libc::EROFS);
}

#[test]
fn two_runs_with_one_store_can_exchange_files_and_the_root_takes_none() {
    let lab = Lab::new();
    lab.tracking
        .add_run("other", &format!("s3://{BUCKET}/runs/other/artifacts"));
    lab.put("f", b"x".as_slice());
    let mount = lab.mount();
    fs::rename(mount.at("f"), mount.path.join("other/f")).unwrap();
    assert_eq!(
        lab.s3.bytes(BUCKET, "runs/other/artifacts/f").unwrap(),
        b"x"
    );
    assert_eq!(errno(fs::write(mount.path.join("file"), b"x")), libc::EPERM);
    assert_eq!(errno(fs::create_dir(mount.path.join("run"))), libc::EPERM);
}

#[test]
fn a_run_in_a_store_that_is_not_served_says_so_when_it_is_entered() {
    let lab = Lab::new();
    lab.tracking.add_run("elsewhere", "hdfs://namenode/path");
    let mount = lab.mount();
    assert!(fs::metadata(mount.path.join("elsewhere")).unwrap().is_dir());
    assert_eq!(
        errno(
            fs::read_dir(mount.path.join("elsewhere"))
                .and_then(|mut it| it.next().unwrap_or_else(|| panic!("empty")))
        ),
        libc::EOPNOTSUPP
    );
    lab.expect_log("hdfs");
}

#[test]
fn making_and_moving_names_changes_the_time_of_their_directory_and_emptying_that_of_a_file() {
    let lab = Lab::new();
    let mount = lab.mount();
    let past = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let set_back = |path: &str| {
        let file = fs::File::open(mount.at(path)).unwrap();
        file.set_modified(past).unwrap();
        assert_eq!(
            fs::metadata(mount.at(path)).unwrap().modified().unwrap(),
            past
        );
    };
    let moved_on = |path: &str| {
        let modified = fs::metadata(mount.at(path)).unwrap().modified().unwrap();
        assert!(modified > past, "{path} still shows its old time");
    };
    fs::create_dir(mount.at("d")).unwrap();
    fs::create_dir(mount.at("e")).unwrap();
    set_back("d");
    fs::write(mount.at("d/f"), b"x").unwrap();
    moved_on("d");
    set_back("d");
    fs::create_dir(mount.at("d/below")).unwrap();
    moved_on("d");
    set_back("e");
    fs::rename(mount.at("d/f"), mount.at("e/f")).unwrap();
    moved_on("e");
    set_back("e/f");
    let emptied = fs::File::create(mount.at("e/f")).unwrap();
    moved_on("e/f");
    drop(emptied);
}
