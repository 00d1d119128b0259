//! Artifacts that a tracking server proxies, with all that goes wrong on the way: by a stand-in, for a
//! real server goes wrong when it likes. A real MLflow is in tests/savers/test_proxied.py.

mod harness;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use harness::{Lab, Mount, PREFIX, RUN, close, errno, noise};
use mlfs_lab::artifacts::Behaviour;

const MIB: usize = 1 << 20;

/// A lab whose run is proxied.
fn lab(behaviour: Behaviour) -> Lab {
    let lab = Lab::new();
    lab.tracking
        .add_run(RUN, &format!("mlflow-artifacts:/{PREFIX}"));
    lab.tracking.artifacts().behave(behaviour);
    lab
}

fn mount(lab: &Lab) -> Mount<'_> {
    lab.mount_with(&[
        "--memory",
        "64MiB",
        "--part-size",
        "5MiB",
        "--close-timeout",
        "3s",
    ])
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

#[test]
fn files_larger_than_memory_are_one_body_and_come_back() {
    let lab = lab(Behaviour::default());
    let mount = mount(&lab);
    let content = noise(90 * MIB);
    assert_eq!(write(mount.at("large"), &content), 0);
    assert_eq!(write(mount.at("small"), b"small"), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    assert_eq!(lab.tracking.artifacts().seen("PUT").len(), 2);
    assert!(fs::read(mount.at("large")).unwrap() == content);
    fs::rename(mount.at("large"), mount.at("renamed")).unwrap();
    assert!(lab.tracking.artifacts().get(&key("large")).is_none());
    assert!(fs::read(mount.at("renamed")).unwrap() == content);
}

#[test]
fn a_server_that_sends_wholes_only_is_asked_once_whoever_reads_what() {
    let lab = lab(Behaviour {
        wholes_only: true,
        ..Behaviour::default()
    });
    let content = noise(40 * MIB);
    lab.tracking.artifacts().put(&key("model"), content.clone());
    let mount = mount(&lab);
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (mount, content) = (&mount, &content);
            scope.spawn(move || {
                let file = fs::File::open(mount.at("model")).unwrap();
                let mut piece = vec![0; MIB / 2];
                for step in 0..40 {
                    let at = (step * 7 + reader * 11) % 79 * MIB / 2;
                    std::os::unix::fs::FileExt::read_exact_at(&file, &mut piece, at as u64)
                        .unwrap();
                    assert!(piece == content[at..at + MIB / 2]);
                }
            });
        }
    });
    let asked = lab.tracking.artifacts().seen("GET").into_iter();
    let bodies = asked.filter(|seen| seen.path == format!("artifacts/{}", key("model")));
    assert_eq!(bodies.count(), 1);
    // What is not there is told, though the server says otherwise.
    assert!(!mount.at("nothing").exists());
    // Somebody replaces it by a shorter one.
    lab.tracking.artifacts().put(&key("model"), &b"other"[..]);
    harness::wait_until("the other one", || {
        fs::read(mount.at("model")).is_ok_and(|read| read == b"other")
    });
}

#[test]
fn a_server_far_away_is_asked_for_no_more_ranges_at_once_than_another() {
    let lab = lab(Behaviour {
        first_byte: Duration::from_millis(40),
        ..Behaviour::default()
    });
    lab.tracking
        .artifacts()
        .put(&key("model"), vec![7; 128 * MIB]);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    let mut file = fs::File::open(mount.at("model")).unwrap();
    let read = std::io::copy(&mut file, &mut std::io::sink()).unwrap();
    assert_eq!(read, 128 * MIB as u64);
    let most = lab.tracking.artifacts().most_waiting();
    assert!((24..=34).contains(&most), "{most}");
}

#[test]
fn a_body_that_breaks_off_is_gone_on_with() {
    let lab = lab(Behaviour {
        breaks_after: Some(3 * MIB),
        ..Behaviour::default()
    });
    let content = noise(30 * MIB);
    lab.tracking.artifacts().put(&key("model"), content.clone());
    let mount = mount(&lab);
    assert!(fs::read(mount.at("model")).unwrap() == content);
    // What cannot be sent in one is told, and nothing of it is seen.
    lab.tracking.artifacts().put(&key("lost"), &b"before"[..]);
    assert_eq!(write(mount.at("lost"), &noise(20 * MIB)), libc::EIO);
    assert_eq!(
        lab.tracking.artifacts().get(&key("lost")).unwrap(),
        "before"
    );
    // It is kept, and stored when the way is good again.
    lab.tracking.artifacts().behave(Behaviour::default());
    mount.uploads(&["retry"]);
    harness::wait_until("the file", || {
        lab.tracking.artifacts().get(&key("lost")).unwrap().len() == 20 * MIB
    });
}

#[test]
fn a_body_that_a_proxy_does_not_take_is_efbig_and_the_log_names_the_setting() {
    let lab = lab(Behaviour {
        largest_body: Some(MIB),
        ..Behaviour::default()
    });
    let mount = mount(&lab);
    assert_eq!(write(mount.at("small"), &noise(MIB / 2)), 0);
    for size in [2 * MIB, 12 * MIB] {
        assert_eq!(write(mount.at("large"), &noise(size)), libc::EFBIG);
    }
    lab.expect_log("client_max_body_size");
    assert!(lab.tracking.artifacts().get(&key("large")).is_none());
}

#[test]
fn what_is_stored_is_stored_whatever_a_proxy_answers() {
    let lab = lab(Behaviour {
        after_storing: [504, 502].into(),
        ..Behaviour::default()
    });
    let mount = mount(&lab);
    let content = noise(12 * MIB);
    assert_eq!(write(mount.at("long"), &content), 0);
    assert_eq!(write(mount.at("short"), b"short"), 0);
    assert_eq!(lab.tracking.artifacts().seen("PUT").len(), 2);
    // Another of the same size is no proof.
    lab.tracking.artifacts().behave(Behaviour {
        instead_of_storing: [504, 404].into(),
        ..Behaviour::default()
    });
    assert_eq!(write(mount.at("short"), b"other"), 0);
    assert_eq!(
        lab.tracking.artifacts().get(&key("short")).unwrap(),
        "other"
    );
    assert_eq!(lab.tracking.artifacts().seen("PUT").len(), 5);
}

#[test]
fn the_token_is_told_to_the_tracking_server_alone() {
    let lab = lab(Behaviour::default());
    let other = Lab::new();
    other
        .tracking
        .artifacts()
        .put(&key("model"), &b"theirs"[..]);
    let uri = other.tracking.uri().replacen("http", "mlflow-artifacts", 1);
    let run = "fedcba9876543210fedcba9876543210";
    lab.tracking.add_run(run, &format!("{uri}/{PREFIX}"));
    lab.tracking.artifacts().put(&key("model"), &b"ours"[..]);
    let mount = lab.mount_as(&[("MLFLOW_TRACKING_TOKEN", "secret")]);
    assert_eq!(fs::read(mount.at("model")).unwrap(), b"ours");
    assert_eq!(
        fs::read(mount.path.join(run).join("model")).unwrap(),
        b"theirs"
    );
    let told = |lab: &Lab| {
        let seen = lab.tracking.artifacts().seen("GET").into_iter();
        seen.map(|seen| seen.authorization).collect::<Vec<_>>()
    };
    assert!(
        told(&lab)
            .iter()
            .all(|it| it.as_deref() == Some("Bearer secret"))
    );
    assert!(!told(&other).is_empty() && told(&other).iter().all(Option::is_none));
    assert!(!lab.log_text().contains("secret"));
}

#[test]
fn the_store_behind_the_server_is_read_where_it_can_be_reached() {
    let lab = Lab::with(mlfs_lab::s3::ServerOptions {
        verify_auth: false,
        ..Default::default()
    });
    lab.tracking
        .add_run(RUN, &format!("mlflow-artifacts:/{PREFIX}"));
    let artifacts = lab.tracking.artifacts();
    let content = noise(20 * MIB);
    for name in ["model", "another"] {
        artifacts.put(&key(name), content.clone());
        lab.put(name, content.clone());
    }
    artifacts.behave(Behaviour {
        wholes_only: true,
        presigned: Some(format!("{}/{}", lab.s3.endpoint(), harness::BUCKET)),
        ..Behaviour::default()
    });
    let mount = lab.mount_as(&[("MLFLOW_TRACKING_TOKEN", "secret")]);
    assert!(fs::read(mount.at("model")).unwrap() == content);
    let bodies = |lab: &Lab| {
        let seen = lab.tracking.artifacts().seen("GET").into_iter();
        seen.filter(|seen| seen.path.starts_with("artifacts/"))
            .count()
    };
    assert_eq!(bodies(&lab), 0);
    // Where it is named by a name of its own network, all goes through the server.
    artifacts.behave(Behaviour {
        wholes_only: true,
        presigned: Some("http://127.0.0.1:9/bucket".to_owned()),
        ..Behaviour::default()
    });
    assert!(fs::read(mount.at("another")).unwrap() == content);
    assert_eq!(bodies(&lab), 1);
    lab.expect_log("cannot be reached from here");
}

/// A lab whose server has addresses for parts, as far as `change` leaves them.
fn lab_with_parts(change: impl FnOnce(&mut Behaviour)) -> Lab {
    let lab = lab(Behaviour::default());
    let mut behaviour = Behaviour {
        parts: Some(lab.tracking.uri()),
        ..Behaviour::default()
    };
    change(&mut behaviour);
    lab.tracking.artifacts().behave(behaviour);
    lab
}

/// The paths of bodies that were sent: of parts, and of whole objects.
fn sent(lab: &Lab) -> (usize, usize) {
    let seen = lab.tracking.artifacts().seen("PUT");
    let parts = seen.iter().filter(|seen| seen.path.starts_with("parts/"));
    let parts = parts.count();
    (parts, seen.len() - parts)
}

#[test]
fn parts_go_straight_to_the_store_behind_the_server_while_a_file_is_written() {
    let lab = lab_with_parts(|_| ());
    let mut program = lab.program();
    program.env("MLFLOW_TRACKING_TOKEN", "secret");
    let mount = lab.mount_by(program, &["--memory", "64MiB", "--part-size", "5MiB"]);
    // It is asked for when something is listed.
    assert!(!mount.at("large").exists());
    let content = noise(92 * MIB);
    let mut file = fs::File::create(mount.at("large")).unwrap();
    file.write_all(&content[..60 * MIB]).unwrap();
    harness::wait_until("parts", || sent(&lab).0 >= 8);
    assert!(lab.tracking.artifacts().get(&key("large")).is_none());
    file.write_all(&content[60 * MIB..]).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    assert_eq!(sent(&lab), (19, 0));
    assert!(fs::read(mount.at("large")).unwrap() == content);
    assert_eq!(lab.tracking.artifacts().unfinished(), 0);
    // What is written over, and what is appended to.
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(mount.at("large"))
        .unwrap();
    file.write_all(b"and more").unwrap();
    assert_eq!(close(file), 0);
    let stored = lab.tracking.artifacts().get(&key("large")).unwrap();
    assert!(stored[..92 * MIB] == content && &stored[92 * MIB..] == b"and more");
    // Who we are is nobody else's business.
    for seen in lab.tracking.artifacts().seen("PUT") {
        let told = seen.authorization.is_some();
        assert_eq!(told, !seen.path.starts_with("parts/"), "{}", seen.path);
    }
}

#[test]
fn parts_that_come_to_nothing_lose_nothing() {
    // The first two arrive, then the addresses have become too old.
    let lab = lab_with_parts(|_| ());
    let mount = mount(&lab);
    assert!(!mount.at("large").exists());
    let content = noise(90 * MIB);
    let mut file = fs::File::create(mount.at("large")).unwrap();
    file.write_all(&content[..70 * MIB]).unwrap();
    harness::wait_until("parts", || sent(&lab).0 >= 10);
    lab.tracking.artifacts().behave(Behaviour {
        parts: Some(lab.tracking.uri()),
        instead_of_parts: [403; 100].into(),
        ..Behaviour::default()
    });
    file.write_all(&content[70 * MIB..]).unwrap();
    assert_eq!(close(file), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    assert_eq!(sent(&lab).1, 1);
    lab.expect_log("everything is sent through the server");
    harness::wait_until("the upload to be given up", || {
        lab.tracking.artifacts().unfinished() == 0
    });
    // So for a while.
    let before = sent(&lab).0;
    assert_eq!(write(mount.at("second"), &content[..20 * MIB]), 0);
    assert_eq!(sent(&lab), (before, 2));
}

#[test]
fn a_store_behind_the_server_that_cannot_be_reached_is_avoided() {
    let lab = lab_with_parts(|it| it.parts = Some("http://127.0.0.1:9".to_owned()));
    let mount = mount(&lab);
    assert!(!mount.at("large").exists());
    let content = noise(20 * MIB);
    assert_eq!(write(mount.at("large"), &content), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    assert_eq!(sent(&lab), (0, 1));
    lab.expect_log("takes no parts from here");
    harness::wait_until("the upload to be given up", || {
        lab.tracking.artifacts().unfinished() == 0
    });
}

#[test]
fn a_completion_that_took_place_counts_whatever_a_proxy_answers() {
    let lab = lab_with_parts(|it| {
        it.after_completing = [504].into();
        it.instead_of_parts = [500, 503].into();
    });
    let mount = mount(&lab);
    assert!(!mount.at("large").exists());
    let content = noise(20 * MIB);
    assert_eq!(write(mount.at("large"), &content), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    let completions = lab.tracking.artifacts().seen("POST").into_iter();
    let completions = completions.filter(|seen| seen.path.starts_with("mpu/complete"));
    assert_eq!((completions.count(), sent(&lab)), (1, (6, 0)));
}

#[test]
fn a_completion_that_fails_whatever_for_is_no_end() {
    for status in [500, 404, 413] {
        let lab = lab_with_parts(|it| it.instead_of_completing = [status; 10].into());
        let mount = mount(&lab);
        assert!(!mount.at("large").exists());
        let content = noise(20 * MIB);
        assert_eq!(write(mount.at("large"), &content), 0, "{status}");
        assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
        assert_eq!(sent(&lab), (4, 1));
        assert_eq!(lab.tracking.artifacts().unfinished(), 0);
    }
}

#[test]
fn a_mount_that_was_killed_counts_on_no_part_that_it_has_sent() {
    let lab = lab_with_parts(|it| it.after_completing = [].into());
    let flags = ["--memory", "64MiB", "--part-size", "5MiB"];
    let mount = lab.mount_with(&flags);
    assert!(!mount.at("large").exists());
    let content = noise(90 * MIB);
    let mut file = fs::File::create(mount.at("large")).unwrap();
    file.write_all(&content).unwrap();
    harness::wait_until("parts", || sent(&lab).0 >= 12);
    // The last ones do not get through.
    lab.tracking.artifacts().behave(Behaviour {
        parts: Some(lab.tracking.uri()),
        instead_of_parts: [503; 1000].into(),
        ..Behaviour::default()
    });
    file.write_all(b"the end").unwrap();
    let closing = std::thread::spawn(move || close(file));
    harness::wait_until("the close to be in the journal", || {
        lab.journals_of_closed_files() == 1
    });
    harness::kill(&mount);
    assert_ne!(closing.join().unwrap(), 0);
    lab.tracking.artifacts().behave(Behaviour {
        parts: Some(lab.tracking.uri()),
        ..Behaviour::default()
    });
    let _next = lab.mount_with(&flags);
    harness::wait_until("the file to be stored", || {
        lab.tracking.artifacts().get(&key("large")).is_some()
    });
    let stored = lab.tracking.artifacts().get(&key("large")).unwrap();
    assert!(stored[..90 * MIB] == content && &stored[90 * MIB..] == b"the end");
    harness::wait_until("the former upload to be given up", || {
        lab.tracking.artifacts().unfinished() == 0
    });
}

#[test]
fn parts_are_not_sent_where_mlflows_own_switch_says_no() {
    let lab = lab_with_parts(|_| ());
    let mut program = lab.program();
    program.env("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false");
    let mount = lab.mount_by(program, &["--part-size", "5MiB"]);
    assert!(!mount.at("large").exists());
    assert_eq!(write(mount.at("large"), &noise(20 * MIB)), 0);
    assert_eq!(sent(&lab), (0, 1));
}

#[test]
fn a_name_that_the_server_would_take_for_another_is_refused_at_once() {
    let lab = lab(Behaviour::default());
    let mount = mount(&lab);
    assert_eq!(write(mount.at("100%"), b"fine"), 0);
    for name in ["a#b", "100%41", "back\\slash"] {
        assert_eq!(errno(fs::File::create(mount.at(name))), libc::EINVAL);
        assert_eq!(errno(fs::create_dir(mount.at(name))), libc::EINVAL);
        let renamed = fs::rename(mount.at("100%"), mount.at(name));
        assert_eq!(errno(renamed), libc::EINVAL);
        assert!(!mount.at(name).exists());
    }
    assert_eq!(fs::read(mount.at("100%")).unwrap(), b"fine");
}

#[test]
fn a_body_has_no_length_where_half_of_it_would_be_taken_for_all() {
    let lab = lab(Behaviour {
        server: Some("gunicorn"),
        ..Behaviour::default()
    });
    let mount = mount(&lab);
    let content = noise(12 * MIB);
    assert_eq!(write(mount.at("large"), &content), 0);
    assert_eq!(write(mount.at("small"), b"small"), 0);
    assert!(lab.tracking.artifacts().get(&key("large")).unwrap() == content);
    let put = lab.tracking.artifacts().seen("PUT");
    assert!(put.len() == 2 && put.iter().all(|seen| seen.length.is_none()));
}

#[test]
fn a_server_that_removes_more_than_it_is_told_to_is_not_told_to() {
    let lab = lab(Behaviour {
        version: Some("3.1.0"),
        ..Behaviour::default()
    });
    for name in ["model", "model.bin", "alone"] {
        lab.tracking.artifacts().put(&key(name), &b"x"[..]);
    }
    let mount = mount(&lab);
    assert_eq!(errno(fs::remove_file(mount.at("model"))), libc::EOPNOTSUPP);
    lab.expect_log("model.bin");
    fs::remove_file(mount.at("alone")).unwrap();
    fs::remove_file(mount.at("model.bin")).unwrap();
    fs::remove_file(mount.at("model")).unwrap();
    assert_eq!(fs::read_dir(mount.at("")).unwrap().count(), 0);
}

#[test]
fn without_a_server_proxied_artifacts_say_what_to_set() {
    let lab = Lab::new();
    lab.tracking.add_run(RUN, "http://127.0.0.1:9/files");
    let mount = lab.mount();
    let listed = fs::read_dir(mount.path.join(RUN)).and_then(|mut names| names.next().transpose());
    assert_eq!(errno(listed), libc::EOPNOTSUPP);
}
