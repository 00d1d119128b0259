//! Files that are sent while they are written, to a server that proxies artifacts and takes a body as it
//! comes: by a stand-in. A real MLflow is in tests/savers/test_proxied.py.

mod harness;

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use harness::{Lab, Mount, PREFIX, RUN, close, kill, noise};
use mlfs_lab::artifacts::Behaviour;

const MIB: usize = 1 << 20;
/// The PUT that asks what the route for uploads is.
const QUESTION: &str = "artifacts/a#b";

fn mount(lab: &Lab) -> Mount<'_> {
    lab.mount_with(&["--memory", "64MiB", "--part-size", "5MiB"])
}

fn key(name: &str) -> String {
    format!("{PREFIX}/{name}")
}

/// Writes a file; what its close says.
fn write(path: PathBuf, bytes: &[u8]) -> i32 {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    close(file)
}

/// A lab whose server takes bodies as they come, and says so.
fn lab_that_streams(change: impl FnOnce(&mut Behaviour)) -> Lab {
    let mut behaviour = Behaviour {
        server: Some("uvicorn"),
        ..Behaviour::default()
    };
    change(&mut behaviour);
    let lab = Lab::new();
    lab.tracking
        .add_run(RUN, &format!("mlflow-artifacts:/{PREFIX}"));
    lab.tracking.artifacts().behave(behaviour);
    lab
}

/// Creates a file and writes to it, until it is being sent.
fn begin_sending(lab: &Lab, mount: &Mount<'_>, name: &str, bytes: &[u8]) -> fs::File {
    let before = lengths(lab);
    let file = begin(mount, name, bytes);
    harness::wait_until("a body", || {
        let now = lengths(lab);
        now.len() == before.len() + 1 && now.last() == Some(&None)
    });
    file
}

fn begin(mount: &Mount<'_>, name: &str, bytes: &[u8]) -> fs::File {
    let mut file = fs::File::create(mount.at(name)).unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// `Content-Length` of the bodies that were sent.
fn lengths(lab: &Lab) -> Vec<Option<String>> {
    let seen = lab.tracking.artifacts().seen("PUT").into_iter();
    let bodies = seen.filter(|seen| seen.path != QUESTION);
    bodies.map(|seen| seen.length).collect()
}

#[test]
fn a_file_is_sent_while_it_is_written_where_the_server_takes_it_as_it_comes() {
    let lab = lab_that_streams(|_| ());
    let mount = mount(&lab);
    let content = noise(92 * MIB);
    let mut file = begin_sending(&lab, &mount, "large", &content[..40 * MIB]);
    assert!(lab.tracking.artifacts().get(&key("large")).is_none());
    assert!(fs::read(mount.at("large")).unwrap() == content[..40 * MIB]);
    file.write_all(&content[40 * MIB..]).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    assert_eq!(lengths(&lab), [None]);
    assert!(fs::read(mount.at("large")).unwrap() == content);
    // What lies over an object, and what is small, is one PUT when it is closed.
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(mount.at("large"))
        .unwrap();
    file.write_all(&content[..20 * MIB]).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(write(mount.at("small"), &content[..6 * MIB]), 0);
    let told = lengths(&lab).into_iter().flatten().collect::<Vec<_>>();
    assert_eq!(told, [(112 * MIB).to_string(), (6 * MIB).to_string()]);
    let stored = lab.tracking.artifacts().get(&key("large")).unwrap();
    assert!(stored[..92 * MIB] == content && stored[92 * MIB..] == content[..20 * MIB]);
}

#[test]
fn what_changes_after_it_was_sent_is_sent_again_when_the_file_is_closed() {
    let lab = lab_that_streams(|_| ());
    let mount = mount(&lab);
    let mut content = noise(30 * MIB);
    type Change = fn(&mut fs::File, &Mount<'_>);
    let changes: [(&str, Change); 3] = [
        ("rewritten", |file, _| {
            file.write_all_at(b"head", 0).unwrap()
        }),
        ("cut", |file, _| file.set_len(8 * MIB as u64).unwrap()),
        ("renamed", |_, mount| {
            fs::rename(mount.at("renamed"), mount.at("other")).unwrap();
        }),
    ];
    for (name, change) in changes {
        let mut file = begin_sending(&lab, &mount, name, &content);
        change(&mut file, &mount);
        assert!(lab.tracking.artifacts().get(&key(name)).is_none());
        assert_eq!(close(file), 0, "{name}");
        assert!(lengths(&lab).last().unwrap().is_some(), "{name}");
    }
    assert!(lab.tracking.artifacts().get(&key("other")).unwrap() == content);
    assert!(lab.tracking.artifacts().get(&key("renamed")).is_none());
    assert!(lab.tracking.artifacts().get(&key("cut")).unwrap() == content[..8 * MIB]);
    content[..4].copy_from_slice(b"head");
    assert!(lab.tracking.artifacts().get(&key("rewritten")).unwrap() == content);
    // What loses its name meanwhile is nowhere.
    let before = lengths(&lab).len();
    let file = begin_sending(&lab, &mount, "removed", &content);
    fs::remove_file(mount.at("removed")).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.tracking.artifacts().get(&key("removed")).is_none());
    assert_eq!(lengths(&lab).len(), before + 1);
    // One question was enough for all of them.
    let seen = lab.tracking.artifacts().seen("PUT").into_iter();
    assert_eq!(seen.filter(|seen| seen.path == QUESTION).count(), 1);
}

#[test]
fn a_zip_container_whose_writer_comes_back_to_its_head_is_sent_when_it_is_closed() {
    let lab = lab_that_streams(|_| ());
    let mount = mount(&lab);
    // As Python's zipfile begins a member: no checksum, no sizes, and no word that they come later.
    let mut content = noise(30 * MIB);
    content[..30].fill(0);
    content[..4].copy_from_slice(b"PK\x03\x04");
    let other = begin_sending(&lab, &mount, "other", &noise(30 * MIB));
    assert_eq!(close(other), 0);
    let file = begin(&mount, "arrays.npz", &content);
    file.write_all_at(b"\x01\x02\x03\x04", 14).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lengths(&lab), [None, Some((30 * MIB).to_string())]);
}

#[test]
fn a_mount_that_only_reads_or_writes_little_asks_no_server_what_it_takes() {
    let lab = lab_that_streams(|_| ());
    let mount = mount(&lab);
    let content = noise(9 * MIB);
    assert_eq!(write(mount.at("little"), &content), 0);
    assert!(fs::read(mount.at("little")).unwrap() == content);
    assert_eq!(fs::read_dir(mount.at("")).unwrap().count(), 1);
    mount.unmount();
    assert_eq!(lab.tracking.artifacts().seen("PUT").len(), 1);
}

#[test]
fn a_server_that_does_not_take_a_body_as_it_comes_gets_it_when_the_file_is_closed() {
    let content = noise(30 * MIB);
    let length = Some((30 * MIB).to_string());
    // By its route, its version, or a program before it, it might keep half a body, or none.
    let silent: [fn(&mut Behaviour); 4] = [
        |it| it.older_route = true,
        |it| it.version = Some("3.14.2"),
        |it| it.server = Some("nginx"),
        |it| it.server = None,
    ];
    for change in silent {
        let lab = lab_that_streams(change);
        let mount = mount(&lab);
        let file = begin(&mount, "large", &content);
        lab.expect_log("it takes files when they are closed");
        assert_eq!(close(file), 0);
        assert_eq!(lengths(&lab), std::slice::from_ref(&length));
    }
    // One that said it would is not asked again for a while, and nothing is lost by it.
    let lab = lab_that_streams(|it| it.instead_of_storing = [411].into());
    let mount = mount(&lab);
    let file = begin_sending(&lab, &mount, "large", &content);
    assert_eq!(close(file), 0);
    assert_eq!(lengths(&lab), [None, length.clone()]);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    let file = begin(&mount, "second", &content);
    assert_eq!(close(file), 0);
    assert_eq!(lengths(&lab), [None, length.clone(), length]);
}

#[test]
fn a_mount_killed_while_it_sends_what_is_written_leaves_nothing_half() {
    let lab = lab_that_streams(|_| ());
    let mount = mount(&lab);
    let content = noise(30 * MIB);
    let file = begin_sending(&lab, &mount, "large", &content);
    kill(&mount);
    drop(file);
    let mount = self::mount(&lab);
    assert!(!mount.at("large").exists());
    assert!(lab.tracking.artifacts().get(&key("large")).is_none());
}

#[test]
fn a_close_that_takes_long_is_gone_on_with_by_the_next_mount() {
    let lab = lab_that_streams(|it| it.holds_bodies = true);
    let mount = mount(&lab);
    let content = noise(30 * MIB);
    let file = begin_sending(&lab, &mount, "large", &content);
    let closing = std::thread::spawn(move || close(file));
    harness::wait_until("the close to be in the journal", || {
        lab.journals_of_closed_files() == 1
    });
    kill(&mount);
    assert_ne!(closing.join().unwrap(), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).is_none());
    lab.tracking.artifacts().behave(Behaviour::default());
    let _next = self::mount(&lab);
    harness::wait_until("the file to be stored", || {
        (lab.tracking.artifacts().get(&key("large"))).is_some_and(|stored| stored == content)
    });
}
