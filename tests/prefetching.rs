//! `mlfs prefetch`, through a real mount.

mod harness;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Output;

use harness::{Lab, Mount, kill, noise, text, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

/// Memory for few blocks to wait for the disk: what is asked for by name is not skipped for that.
fn cached<'a>(lab: &'a Lab, folder: &Path, more: &[&str]) -> Mount<'a> {
    let mut flags = vec![
        "--cache-dir",
        folder.to_str().unwrap(),
        "--memory",
        "128MiB",
    ];
    flags.extend_from_slice(more);
    lab.mount_with(&flags)
}

fn prefetch(lab: &Lab, paths: &[&Path]) -> Output {
    let mut command = lab.program();
    command.arg("prefetch").args(paths).output().unwrap()
}

/// What it says when all went well.
fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn got(lab: &Lab) -> u64 {
    lab.s3.stats().of(Kind::Get).bytes_out
}

/// A model of 71 files, of the empty one to one of 100 MiB, and its bytes in all.
fn put_model(lab: &Lab) -> Vec<(String, Vec<u8>)> {
    let mut files = vec![
        ("model/data/large".to_owned(), noise((100 << 20) + 17)),
        ("model/empty".to_owned(), Vec::new()),
    ];
    for index in 0..69 {
        files.push((format!("model/small/{index}"), noise(1000 * index)));
    }
    for (path, bytes) in &files {
        lab.put(path, bytes.clone());
    }
    files
}

#[test]
fn what_was_prefetched_is_read_by_another_mount_without_a_byte_from_the_store() {
    let lab = Lab::new();
    let files = put_model(&lab);
    let total: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    lab.put("other", noise(5 << 20));
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    let (large, small) = (mount.at("model/data/large"), mount.at("model"));
    let output = prefetch(&lab, &[&large, &small]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(told(&output).contains("71 files"), "{}", told(&output));
    assert_eq!(got(&lab), total);
    let output = prefetch(&lab, &[&small]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(got(&lab), total);
    drop(mount);
    let next = cached(&lab, &folder, &[]);
    for (path, bytes) in &files {
        assert!(fs::read(next.at(path)).unwrap() == *bytes, "{path}");
    }
    assert_eq!(got(&lab), total);
}

#[test]
fn without_a_disk_cache_the_kernel_is_given_what_was_prefetched() {
    let lab = Lab::new();
    let data = noise(20 << 20);
    lab.put("f", data.clone());
    let mount = lab.mount();
    let output = prefetch(&lab, &[&mount.at("f")]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(told(&output).contains("--cache-dir"), "{}", told(&output));
    let before = mount.status()["read"]["bytes_served"].clone();
    assert!(fs::read(mount.at("f")).unwrap() == data);
    assert_eq!(mount.status()["read"]["bytes_served"], before);
}

#[test]
fn more_than_the_disk_cache_holds_is_refused_before_anything_is_fetched() {
    let lab = Lab::new();
    for name in ["model/a", "model/b", "model/c"] {
        lab.put(name, noise(30 << 20));
    }
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &["--cache-size", "64MiB"]);
    let output = prefetch(&lab, &[&mount.at("model")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("--cache-size"), "{}", text(&output));
    assert_eq!(got(&lab), 0);
    let output = prefetch(&lab, &[&mount.at("model/a")]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_file_that_cannot_be_fetched_is_named_and_the_others_are_there() {
    let lab = Lab::new();
    lab.put("model/good", noise(3 << 20));
    lab.put("model/bad", noise(3 << 20));
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    let rule = Rule {
        key: "model/bad".to_owned(),
        ..Rule::every(Kind::Get, refused)
    };
    lab.s3.set_faults(1, vec![rule]);
    let output = prefetch(&lab, &[&mount.at("model")]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output);
    assert!(said.contains("model/bad: Permission denied"), "{said}");
    assert!(said.contains("1 of 2 files"), "{said}");
    let before = got(&lab);
    assert_eq!(fs::read(mount.at("model/good")).unwrap().len(), 3 << 20);
    assert_eq!(got(&lab), before);
}

#[test]
fn a_file_that_is_not_stored_yet_needs_no_prefetch() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    let file = fs::File::create(mount.at("new")).unwrap();
    std::io::Write::write_all(&mut &file, b"dirty").unwrap();
    let output = prefetch(&lab, &[&mount.at("new")]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(got(&lab), 0);
}

#[test]
fn what_cannot_be_prefetched_is_one_clear_error() {
    let lab = Lab::new();
    let mount = lab.mount();
    let output = prefetch(&lab, &[&mount.at("nothing")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("nothing: No such file"),
        "{}",
        text(&output)
    );
    let output = prefetch(&lab, &[lab.folder()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("not on a mount"),
        "{}",
        text(&output)
    );
    let output = prefetch(&lab, &[]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn many_requests_are_under_way_for_large_files_and_for_small_ones() {
    let lab = Lab::new();
    lab.put("large", noise(100 << 20));
    for index in 0..20 {
        lab.put(&format!("small/{index}"), noise(100_000));
    }
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    for path in ["large", "small"] {
        lab.s3.hold(Kind::Get);
        let before = lab.s3.stats().of(Kind::Get).requests;
        let mut command = lab.program();
        command.arg("prefetch").arg(mount.at(path));
        let running = std::thread::spawn(move || command.output().unwrap());
        wait_until("ten at a time", || {
            lab.s3.stats().of(Kind::Get).requests >= before + 10
        });
        lab.s3.release(Kind::Get);
        assert!(running.join().unwrap().status.success());
    }
}

#[test]
fn a_mount_that_dies_meanwhile_ends_a_prefetch() {
    let lab = Lab::new();
    lab.put("f", noise(50 << 20));
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    lab.s3.hold(Kind::Get);
    let path = mount.at("f");
    let mut command = lab.program();
    command.arg("prefetch").arg(path);
    let running = std::thread::spawn(move || command.output().unwrap());
    wait_until("it to fetch", || lab.s3.stats().of(Kind::Get).requests > 0);
    kill(&mount);
    let output = running.join().unwrap();
    lab.s3.release(Kind::Get);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
}

#[test]
fn who_replaces_a_file_meanwhile_does_not_have_it_cached_as_the_former() {
    let lab = Lab::new();
    lab.put("f", noise(50 << 20));
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    assert_eq!(mount.at("f").metadata().unwrap().len(), 50 << 20);
    lab.put_later("f", vec![1; 50 << 20]);
    let output = prefetch(&lab, &[&mount.at("f")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("Stale file handle"),
        "{}",
        text(&output)
    );
}

/// Where the kernel's readahead of a mount stands; `None` where it cannot be set.
fn readahead(mount: &Mount<'_>) -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let device = table.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        (Path::new(fields.nth(1)?) == mount.path).then_some(device)
    });
    let file = PathBuf::from(format!("/sys/class/bdi/{}/read_ahead_kb", device.unwrap()));
    let value = fs::read(&file).ok()?;
    fs::write(&file, value).ok().map(|()| file)
}

#[test]
fn the_kernel_reads_further_ahead_in_files_with_tensors_and_in_those_that_are_whole_on_disk() {
    let lab = Lab::new();
    let names = ["plain", "cached", "container.npz", "not-one.gguf"];
    for name in names.into_iter().chain(["model.safetensors"]) {
        lab.put(name, noise(3 << 20));
    }
    let check = |mount: &Mount<'_>, name: &str, expected: &str| {
        let Some(setting) = readahead(mount) else {
            eprintln!("the kernel's readahead cannot be set here");
            return;
        };
        drop(fs::File::open(mount.at(name)).unwrap());
        let now = fs::read_to_string(setting).unwrap();
        assert_eq!(now.trim(), expected, "{name}");
    };
    let mount = lab.mount();
    check(&mount, "model.safetensors", "256");
    check(&mount, "container.npz", "128");
    check(&mount, "plain", "172");
    check(&mount, "not-one.gguf", "256");
    // It is not what its name says, which is known to whoever has it open.
    let mut open = fs::File::open(mount.at("not-one.gguf")).unwrap();
    assert_eq!(open.read_to_end(&mut Vec::new()).unwrap(), 3 << 20);
    check(&mount, "not-one.gguf", "172");
    drop((open, mount));
    let folder = lab.empty_folder();
    let mount = cached(&lab, &folder, &[]);
    check(&mount, "cached", "172");
    let output = prefetch(&lab, &[&mount.at("cached")]);
    assert!(output.status.success(), "{}", text(&output));
    check(&mount, "cached", "1024");
    check(&mount, "plain", "172");
}
