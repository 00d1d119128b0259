//! What makes a directory loadable becomes visible last.

mod harness;

use std::fs::{self, File};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::journaled::{JOURNALED, mount, published, refuse, states, uploads, wait_until_stored};
use harness::{Lab, close, errno, kill, noise, wait_until};
use mlfs_lab::s3::{Kind, Logged};

const PART: usize = 5 << 20;

fn synchronise(path: &std::path::Path) -> i32 {
    errno(File::open(path).unwrap().sync_all())
}

#[test]
fn manifests_come_last_also_when_they_were_closed_first() {
    let lab = Lab::new();
    let mount = mount(&lab);
    fs::create_dir_all(mount.at("m/data")).unwrap();
    let mut weights = File::create(mount.at("m/data/2.safetensors")).unwrap();
    weights.write_all(b"2").unwrap();
    fs::write(mount.at("m/MLmodel"), b"x").unwrap();
    fs::write(mount.at("m/data/model.safetensors.index.json"), b"x").unwrap();
    fs::write(mount.at("m/conda.yaml"), b"x").unwrap();
    wait_until("the ordinary file to be stored", || {
        lab.stored("m/conda.yaml").is_some()
    });
    let all = uploads(&mount);
    let held: Vec<_> = all.iter().filter(|it| it["state"] == "waiting").collect();
    assert_eq!(held.len(), 2, "{all:?}");
    assert!(held.iter().all(|it| it["held_by"].is_string()), "{all:?}");
    // Neither is held up by what is open.
    assert_eq!(synchronise(&mount.at("m")), 0);
    assert_eq!(close(weights), 0);
    fs::write(mount.at("m/data/1.safetensors"), b"1").unwrap();
    wait_until_stored(&mount);
    let mut shown = published(&lab);
    assert_eq!(shown.remove(0), "m/conda.yaml");
    assert_eq!(shown[0], "m/data/2.safetensors");
    assert_eq!(shown[3], "m/MLmodel", "{shown:?}");
}

#[test]
fn a_manifest_waits_no_longer_for_what_was_removed() {
    let lab = Lab::new();
    let mount = mount(&lab);
    let open = File::create(mount.at("weights")).unwrap();
    fs::write(mount.at("MLmodel"), b"x").unwrap();
    wait_until("it to wait", || {
        states(&mount).contains(&("MLmodel".to_owned(), "waiting".to_owned()))
    });
    fs::remove_file(mount.at("weights")).unwrap();
    wait_until_stored(&mount);
    assert_eq!(lab.names(), ["MLmodel"]);
    drop(open);
}

#[test]
fn a_rename_to_a_manifests_name_waits_for_its_turn() {
    let lab = Lab::new();
    let mount = mount(&lab);
    fs::write(mount.at("MLmodel.new"), b"model").unwrap();
    wait_until_stored(&mount);
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("weights"), b"w").unwrap();
    let renamed = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (from, to) = (mount.at("MLmodel.new"), mount.at("MLmodel"));
        let renamed = Arc::clone(&renamed);
        move || {
            let outcome = fs::rename(from, to);
            renamed.store(true, Ordering::SeqCst);
            outcome
        }
    });
    wait_until("the weights to be on their way", || {
        lab.s3.stats().of(Kind::Put).requests == 2
    });
    assert!(!renamed.load(Ordering::SeqCst));
    lab.s3.release(Kind::Put);
    thread.join().unwrap().unwrap();
    assert_eq!(published(&lab), ["MLmodel.new", "weights", "MLmodel"]);
}

#[test]
fn a_rename_to_a_manifests_name_waits_also_when_the_file_is_being_stored() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("new"), b"model").unwrap();
    fs::write(mount.at("d/weights"), b"w").unwrap();
    fs::write(mount.at("d/more"), b"w").unwrap();
    wait_until("two to be on their way", || {
        lab.s3.stats().of(Kind::Put).requests == 2
    });
    let (from, to) = (mount.at("new"), mount.at("MLmodel"));
    let renaming = std::thread::spawn(move || fs::rename(from, to));
    lab.s3.release(Kind::Put);
    renaming.join().unwrap().unwrap();
    wait_until_stored(&mount);
    let shown = published(&lab);
    assert_eq!(shown.last().unwrap(), "MLmodel", "{shown:?}");
}

#[test]
fn a_manifest_without_room_on_local_disk_waits_for_nobody_who_cannot_go_on() {
    let lab = Lab::new();
    let mut flags = JOURNALED.to_vec();
    flags.extend(["--spill-size", "5MiB"]);
    let mount = lab.mount_with(&flags);
    lab.s3.hold(Kind::Put);
    fs::create_dir(mount.at("m")).unwrap();
    fs::create_dir(mount.at("n")).unwrap();
    refuse(&lab, "refused");
    fs::write(mount.at("m/refused"), noise(PART - 100)).unwrap();
    // It fills the spill. An open file is not waited for: its writer may be who waits.
    let open = File::create(mount.at("n/open")).unwrap();
    lab.s3.release(Kind::Put);
    wait_until("it to fail", || states(&mount)[0].1 == "failed");
    fs::write(mount.at("n/MLmodel"), noise(1000)).unwrap();
    assert!(lab.stored("n/MLmodel").is_some());
    // Nor what has failed; but that is told.
    let mut file = File::create(mount.at("m/MLmodel")).unwrap();
    file.write_all(&noise(1000)).unwrap();
    assert_eq!(close(file), libc::EIO);
    assert_eq!(lab.stored("m/MLmodel"), None);
    lab.s3.set_faults(1, Vec::new());
    drop(open);
    fs::write(mount.path.join(".mlfs/retry"), "all").unwrap();
    wait_until_stored(&mount);
    assert_eq!(lab.stored("m/MLmodel").unwrap(), noise(1000));
}

#[test]
fn a_manifest_waits_for_what_a_killed_mount_left_unfinished_until_it_is_discarded() {
    let lab = Lab::new();
    let first = mount(&lab);
    let mut weights = File::create(first.at("weights")).unwrap();
    weights.write_all(&noise(PART)).unwrap();
    // In the journal, and not closed.
    weights.sync_all().unwrap();
    fs::write(first.at("MLmodel"), b"x").unwrap();
    fs::write(first.at("other"), b"x").unwrap();
    wait_until("the other to be stored", || lab.stored("other").is_some());
    kill(&first);
    drop(weights);
    let next = lab.mount();
    wait_until("the rest to be taken over", || {
        let all = states(&next);
        let waits = ("MLmodel".to_owned(), "waiting".to_owned());
        all.len() == 2 && all[0] == waits && all[1].1 == "left"
    });
    assert!(
        uploads(&next)[0]["held_by"]
            .as_str()
            .unwrap()
            .ends_with("/weights")
    );
    assert_eq!(lab.names(), ["other"]);
    let id = uploads(&next)[1]["id"].as_str().unwrap().to_owned();
    fs::write(next.path.join(".mlfs/discard"), id).unwrap();
    wait_until_stored(&next);
    assert_eq!(lab.names(), ["MLmodel", "other"]);
}

#[test]
fn a_directory_that_is_renamed_is_loadable_under_one_of_its_names_only_when_it_is_whole_there() {
    let lab = Lab::new();
    let files = [
        "MLmodel",
        "conda.yaml",
        "model/a.index.json",
        "model/a.safetensors",
        "parts/one/MLmodel",
        "parts/one/data",
    ];
    for file in files {
        lab.put(&format!("from/{file}"), file.as_bytes());
    }
    let mount = lab.mount();
    fs::rename(mount.at("from"), mount.at("to")).unwrap();
    assert_eq!(lab.names(), files.map(|file| format!("to/{file}")));
    let log = lab.s3.log();
    let at = |kind: Kind, path: &str| {
        let asked = |it: &Logged| it.kind == kind && it.key.ends_with(path);
        log.iter().position(asked).expect(path)
    };
    let copied = |path| at(Kind::Copy, &format!("to/{path}"));
    let ordinary = ["conda.yaml", "model/a.safetensors", "parts/one/data"];
    let last = ordinary.map(copied).into_iter().max().unwrap();
    assert!(last < copied("parts/one/MLmodel"));
    assert!(copied("parts/one/MLmodel") < copied("model/a.index.json"));
    assert!(copied("model/a.index.json") < copied("MLmodel"));
    let deleted = |path| at(Kind::Delete, &format!("from/{path}"));
    let others = log
        .iter()
        .position(|it| it.kind == Kind::Delete && it.key.is_empty());
    assert!(copied("MLmodel") < deleted("MLmodel"));
    assert!(deleted("MLmodel") < deleted("model/a.index.json"));
    assert!(deleted("model/a.index.json") < deleted("parts/one/MLmodel"));
    assert!(deleted("parts/one/MLmodel") < others.unwrap());
}
