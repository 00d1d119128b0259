//! Closes that return when the file is safe on local disk, and what comes after them.

mod harness;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::journaled::{JOURNALED, mount, published, refuse, states, uploads, wait_until_stored};
use harness::{Lab, close, errno, kill, noise, text, wait_until};
use mlfs_lab::s3::Kind;

const PART: usize = 5 << 20;
fn wait_command(lab: &Lab, path: &Path, timeout: &str) -> Output {
    let mut command = lab.program();
    command.arg("wait").arg(path).args(["--timeout", timeout]);
    command.output().unwrap()
}

/// `mlfs wait`, under way.
fn waiting(lab: &Lab, path: &Path) -> Child {
    let mut command = lab.program();
    command.arg("wait").arg(path).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn synchronise(path: &Path) -> i32 {
    errno(File::open(path).unwrap().sync_all())
}

#[test]
fn close_returns_while_the_store_does_not_answer_and_the_file_reads_back() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    lab.s3.hold(Kind::CompleteMultipart);
    let data = noise(2 * PART + 7);
    fs::write(mount.at("small"), b"small").unwrap();
    fs::create_dir(mount.at("d")).unwrap();
    let mut file = File::create(mount.at("d/large")).unwrap();
    file.write_all(&data).unwrap();
    assert_eq!(close(file), 0);
    assert_eq!(lab.stored("small"), None);
    assert_eq!(fs::read(mount.at("small")).unwrap(), b"small");
    assert!(fs::read(mount.at("d/large")).unwrap() == data);
    wait_until("the parts to be sent", || {
        let all = uploads(&mount);
        let sent = all.iter().map(|upload| upload["sent"].as_u64().unwrap());
        sent.sum::<u64>() == data.len() as u64
    });
    lab.s3.release(Kind::Put);
    lab.s3.release(Kind::CompleteMultipart);
    wait_until_stored(&mount);
    assert_eq!(lab.stored("small").unwrap(), b"small");
    assert!(lab.stored("d/large").unwrap() == data);
}

#[test]
fn what_was_closed_is_stored_by_the_next_mount_in_order_after_a_kill() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    fs::create_dir_all(mount.at("m/data")).unwrap();
    let names = [
        "m/MLmodel",
        "m/data/model.safetensors.index.json",
        "m/data/2.safetensors",
        "m/data/1.safetensors",
        "m/conda.yaml",
    ];
    for name in names {
        fs::write(mount.at(name), name).unwrap();
    }
    kill(&mount);
    lab.s3.reset_stats();
    lab.s3.release(Kind::Put);
    // In either mode.
    let next = lab.mount();
    wait_until_stored(&next);
    for name in names {
        assert_eq!(lab.stored(name).unwrap(), name.as_bytes());
    }
    check_model_order(&published(&lab));
}

fn check_model_order(published: &[String]) {
    let at = |name: &str| published.iter().position(|it| it == name).unwrap();
    assert_eq!(published.len(), 5, "{published:?}");
    assert_eq!(at("m/MLmodel"), 4, "{published:?}");
    let index = at("m/data/model.safetensors.index.json");
    assert!(at("m/data/2.safetensors") < at("m/data/1.safetensors"));
    assert!(at("m/data/1.safetensors") < index, "{published:?}");
}

#[test]
fn files_of_a_directory_become_visible_in_the_order_of_their_closes() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    let names: Vec<String> = (0..20).map(|it| format!("f{}", (it * 7) % 20)).collect();
    for (number, name) in names.iter().enumerate() {
        // Large ones take longer, and wait for nobody behind them.
        let size = if number % 5 == 0 { PART + 1 } else { 10 };
        fs::write(mount.at(name), noise(size)).unwrap();
    }
    lab.s3.release(Kind::Put);
    wait_until_stored(&mount);
    assert_eq!(published(&lab), names);
}

#[test]
fn directories_are_published_side_by_side() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    for name in ["a", "b", "c"] {
        fs::create_dir(mount.at(name)).unwrap();
        fs::write(mount.at(&format!("{name}/1")), b"x").unwrap();
        fs::write(mount.at(&format!("{name}/2")), b"x").unwrap();
    }
    wait_until("three to be on their way", || {
        lab.s3.stats().of(Kind::Put).requests == 3
    });
    lab.s3.release(Kind::Put);
    wait_until_stored(&mount);
}

#[test]
fn what_is_rewritten_while_it_waits_is_published_once_as_it_last_was() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("first"), b"1").unwrap();
    fs::write(mount.at("f"), b"old").unwrap();
    fs::write(mount.at("g"), b"g").unwrap();
    fs::write(mount.at("f"), b"new").unwrap();
    lab.s3.release(Kind::Put);
    wait_until_stored(&mount);
    assert_eq!(published(&lab), ["first", "g", "f"]);
    assert_eq!(lab.stored("f").unwrap(), b"new");
}

#[test]
fn a_file_that_is_written_to_again_is_left_to_its_next_close() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("first"), b"1").unwrap();
    fs::write(mount.at("f"), b"half").unwrap();
    let mut again = OpenOptions::new().append(true).open(mount.at("f")).unwrap();
    again.write_all(b" and").unwrap();
    fs::write(mount.at("last"), b"x").unwrap();
    lab.s3.release(Kind::Put);
    wait_until("the others to be stored", || lab.stored("last").is_some());
    assert_eq!(lab.stored("f"), None);
    again.write_all(b" half").unwrap();
    assert_eq!(close(again), 0);
    wait_until_stored(&mount);
    assert_eq!(lab.stored("f").unwrap(), b"half and half");
}

#[test]
fn what_waits_can_be_renamed_and_removed_and_is_published_under_its_last_name_only() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("first"), b"1").unwrap();
    fs::write(mount.at("MLmodel.tmp"), b"model").unwrap();
    fs::rename(mount.at("MLmodel.tmp"), mount.at("MLmodel")).unwrap();
    fs::write(mount.at("gone"), b"gone").unwrap();
    fs::remove_file(mount.at("gone")).unwrap();
    fs::create_dir(mount.at("d.tmp")).unwrap();
    // On its way already, or not yet: a rename of its directory takes it along.
    fs::write(mount.at("weights.tmp"), b"w").unwrap();
    fs::rename(mount.at("weights.tmp"), mount.at("d.tmp/weights")).unwrap();
    lab.s3.release(Kind::Put);
    fs::rename(mount.at("d.tmp"), mount.at("d")).unwrap();
    wait_until_stored(&mount);
    assert_eq!(lab.names(), ["MLmodel", "d/weights", "first"]);
    assert_eq!(lab.stored("MLmodel").unwrap(), b"model");
    let shown = published(&lab);
    let at = |name: &str| shown.iter().position(|it| it.ends_with(name)).unwrap();
    assert!(at("weights") < at("MLmodel"), "{shown:?}");
    assert!(
        !shown
            .iter()
            .any(|it| it.contains(".tmp") && !it.ends_with("d.tmp/weights"))
    );
    fs::remove_dir_all(mount.at("d")).unwrap();
    assert_eq!(lab.names(), ["MLmodel", "first"]);
}

#[test]
fn a_failure_shows_at_the_next_fsync_in_wait_and_in_uploads_and_holds_up_manifests_only() {
    let lab = Lab::new();
    let mount = mount(&lab);
    refuse(&lab, "weights");
    fs::create_dir(mount.at("m")).unwrap();
    fs::write(mount.at("m/weights"), b"precious").unwrap();
    fs::write(mount.at("m/MLmodel"), b"x").unwrap();
    fs::write(mount.at("m/other"), b"x").unwrap();
    wait_until("it to fail and the other to be stored", || {
        let failed = ("weights".to_owned(), "failed".to_owned());
        states(&mount).contains(&failed) && lab.stored("m/other").is_some()
    });
    lab.expect_log("not stored, although it is closed");
    assert_eq!(synchronise(&mount.at("m/weights")), libc::EACCES);
    assert_eq!(synchronise(&mount.at("m/other")), 0);
    assert_ne!(synchronise(&mount.at("m")), 0);
    let output = wait_command(&lab, &mount.at("m"), "30s");
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output);
    assert!(
        told.contains("m/weights") && told.contains("failed"),
        "{told}"
    );
    assert!(
        told.contains("m/MLmodel") && told.contains("comes after"),
        "{told}"
    );
    assert!(
        wait_command(&lab, &mount.at("m/other"), "30s")
            .status
            .success()
    );
    let list = mount.uploads(&["list"]);
    assert!(
        list.contains("failed") && list.contains("AccessDenied"),
        "{list}"
    );
    assert_eq!(fs::read(mount.at("m/weights")).unwrap(), b"precious");
    lab.s3.set_faults(1, Vec::new());
    mount.uploads(&["retry"]);
    assert_eq!(lab.stored("m/weights").unwrap(), b"precious");
    wait_until_stored(&mount);
    assert_eq!(synchronise(&mount.at("m")), 0);
    assert_eq!(published(&lab), ["m/other", "m/weights", "m/MLmodel"]);
}

#[test]
fn what_was_renamed_while_it_waited_is_stored_under_its_new_name_after_a_kill() {
    let lab = Lab::new();
    let first = mount(&lab);
    let data = noise(2 * PART + 7);
    lab.s3.hold(Kind::Put);
    fs::write(first.at("before"), b"x").unwrap();
    fs::write(first.at("large"), &data).unwrap();
    wait_until("its parts to be sent", || lab.s3.parts() == 2);
    // They are bound to the old name.
    fs::rename(first.at("large"), first.at("renamed")).unwrap();
    kill(&first);
    lab.s3.release(Kind::Put);
    let next = mount(&lab);
    wait_until_stored(&next);
    assert_eq!(lab.names(), ["before", "renamed"]);
    assert!(lab.stored("renamed").unwrap() == data);
}

/// What one of many threads does to files of its own in directories of all; returns what is to be
/// there in the end.
fn churn(run: &Path, thread: usize) -> Vec<(String, Vec<u8>)> {
    let mut expected = BTreeMap::new();
    for number in 0..60 {
        let directory = format!("d{}", (thread + number) % 3);
        let name = format!("{directory}/{thread}-{}", number % 20);
        let content = format!("{thread} {number}").into_bytes();
        fs::write(run.join(&name), &content).unwrap();
        match number % 5 {
            0 => {
                let mut file = OpenOptions::new().append(true).open(run.join(&name));
                file.as_mut().unwrap().write_all(b"+").unwrap();
                expected.insert(name, [content.as_slice(), b"+"].concat());
            }
            1 => {
                fs::remove_file(run.join(&name)).unwrap();
                expected.remove(&name);
            }
            2 => {
                let other = format!("d{}/{thread}-moved-{}", number % 3, number % 4);
                fs::rename(run.join(&name), run.join(&other)).unwrap();
                expected.remove(&name);
                expected.insert(other, content);
            }
            _ => {
                expected.insert(name, content);
            }
        }
    }
    expected.into_iter().collect()
}

#[test]
fn many_writers_that_rewrite_rename_and_remove_end_with_what_they_last_wrote() {
    let lab = Lab::new();
    let mount = mount(&lab);
    for number in 0..3 {
        fs::create_dir(mount.at(&format!("d{number}"))).unwrap();
    }
    let threads: Vec<_> = (0..8)
        .map(|thread| {
            let run = mount.at("");
            std::thread::spawn(move || churn(&run, thread))
        })
        .collect();
    let ended = threads.into_iter().map(|thread| thread.join().unwrap());
    let expected: BTreeMap<String, Vec<u8>> = ended.flatten().collect();
    wait_until_stored(&mount);
    let names: Vec<String> = expected.keys().cloned().collect();
    assert_eq!(lab.names(), names);
    for (name, content) in &expected {
        assert_eq!(&lab.stored(name).unwrap(), content, "{name}");
    }
    assert_eq!(lab.s3.uploads(), 0);
}

#[test]
fn a_close_waits_for_the_store_when_there_is_no_room_on_local_disk() {
    let lab = Lab::new();
    let mut flags = JOURNALED.to_vec();
    flags.extend(["--spill-size", "5MiB"]);
    let mount = lab.mount_with(&flags);
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("a"), noise(PART - 100)).unwrap();
    let closed = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (path, closed) = (mount.at("b"), Arc::clone(&closed));
        move || {
            let outcome = fs::write(path, noise(1000));
            closed.store(true, Ordering::SeqCst);
            outcome
        }
    });
    lab.expect_log("its close waits until it is stored");
    assert!(!closed.load(Ordering::SeqCst));
    lab.s3.release(Kind::Put);
    thread.join().unwrap().unwrap();
    assert_eq!(lab.stored("b").unwrap(), noise(1000));
    assert_eq!(published(&lab), ["a", "b"]);
}

#[test]
fn fsync_of_a_directory_waits_for_what_is_closed_below_it_in_either_mode() {
    for mode in ["stored", "journaled"] {
        let lab = Lab::new();
        let mount = lab.mount_with(&["--close", mode]);
        fs::create_dir_all(mount.at("d/e")).unwrap();
        let open = File::create(mount.at("d/open")).unwrap();
        lab.s3.hold(Kind::Put);
        // What no close publishes, the last one does in the background.
        File::create(mount.at("d/e/empty")).unwrap();
        let path = mount.at("d");
        let synchronising = std::thread::spawn(move || synchronise(&path));
        wait_until("it to be on its way", || {
            lab.s3.stats().of(Kind::Put).requests == 1
        });
        assert_eq!(lab.stored("d/e/empty"), None);
        assert!(!synchronising.is_finished());
        lab.s3.release(Kind::Put);
        assert_eq!(synchronising.join().unwrap(), 0);
        assert_eq!(lab.stored("d/e/empty").unwrap(), b"");
        drop(open);
        refuse(&lab, "refused");
        let _ = fs::write(mount.at("d/refused"), b"x");
        assert_eq!(synchronise(&mount.at("d")), libc::EACCES);
        lab.s3.set_faults(1, Vec::new());
    }
}

#[test]
fn wait_returns_when_a_file_a_directory_or_the_mount_is_stored() {
    let lab = Lab::new();
    let mount = mount(&lab);
    assert!(wait_command(&lab, &mount.path, "forever").status.success());
    lab.s3.hold(Kind::Put);
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/f"), b"x").unwrap();
    fs::create_dir(mount.at("e")).unwrap();
    for path in [mount.path.clone(), mount.at("d"), mount.at("d/f")] {
        let output = wait_command(&lab, &path, "0");
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains("d/f (1 bytes"), "{}", text(&output));
    }
    assert!(wait_command(&lab, &mount.at("e"), "0").status.success());
    let paths = [mount.path.clone(), mount.at("d"), mount.at("d/f")];
    let mut children: Vec<Child> = paths.iter().map(|path| waiting(&lab, path)).collect();
    for child in &mut children {
        assert!(child.try_wait().unwrap().is_none());
    }
    lab.s3.release(Kind::Put);
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(text(&output), "", "no terminal, no bar");
    }
    assert_eq!(lab.stored("d/f").unwrap(), b"x");
}

/// A terminal: what is shown on it, and the end to write to.
fn terminal() -> (File, OwnedFd) {
    let (mut shown, mut written) = (-1, -1);
    let name = std::ptr::null_mut();
    let (settings, size) = (std::ptr::null(), std::ptr::null());
    // SAFETY: two integers to write to; the rest may be null.
    let outcome = unsafe { libc::openpty(&mut shown, &mut written, name, settings, size) };
    assert_eq!(outcome, 0);
    // SAFETY: both were just opened, and belong to nobody else.
    unsafe { (File::from_raw_fd(shown), OwnedFd::from_raw_fd(written)) }
}

#[test]
fn wait_and_retry_show_a_bar_on_a_terminal() {
    let lab = Lab::new();
    let mount = mount(&lab);
    let run = |arguments: &[&OsStr]| {
        let (mut shown, end) = terminal();
        let mut command = lab.program();
        command.args(arguments).env("TERM", "xterm").stderr(end);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut text = Vec::new();
        let mut piece = [0; 1024];
        while !String::from_utf8_lossy(&text).contains("1 files left") {
            let length = shown.read(&mut piece).unwrap();
            text.extend_from_slice(&piece[..length]);
        }
        lab.s3.release(Kind::Put);
        // It ends with an error when the other end is closed.
        let _ = shown.read_to_end(&mut text);
        assert!(child.wait().unwrap().success());
    };
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("f"), b"x").unwrap();
    run(&["wait".as_ref(), mount.path.as_os_str()]);
    refuse(&lab, "g");
    fs::write(mount.at("g"), b"x").unwrap();
    wait_until("it to fail", || states(&mount)[0].1 == "failed");
    lab.s3.set_faults(1, Vec::new());
    lab.s3.hold(Kind::Put);
    run(&["uploads".as_ref(), "retry".as_ref()]
        .into_iter()
        .chain(["--mount".as_ref(), mount.path.as_os_str()])
        .collect::<Vec<_>>());
    assert!(lab.stored("g").is_some());
}

#[test]
fn wait_names_what_is_open_at_its_timeout_and_what_is_no_mount() {
    let lab = Lab::new();
    let mount = mount(&lab);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(b"x").unwrap();
    let output = wait_command(&lab, &mount.at(""), "200ms");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("f (1 bytes, open)"),
        "{}",
        text(&output)
    );
    drop(file);
    let output = wait_command(&lab, lab.folder(), "10s");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("not on a mount of mlfs"),
        "{}",
        text(&output)
    );
    let output = wait_command(&lab, &mount.at("missing"), "10s");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("No such file"), "{}", text(&output));
}

#[test]
fn unmount_waits_for_what_was_closed() {
    let lab = Lab::new();
    let mount = mount(&lab);
    lab.s3.hold(Kind::Put);
    fs::write(mount.at("f"), b"x").unwrap();
    let output = lab
        .program()
        .args(["unmount", "--timeout", "200ms"])
        .arg(&mount.path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("/f"), "{}", text(&output));
    lab.s3.release(Kind::Put);
    assert!(mount.unmount().status.success());
    assert_eq!(lab.stored("f").unwrap(), b"x");
}
