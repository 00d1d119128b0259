//! Artifacts that a tracking server proxies, with all that goes wrong on the way: by a stand-in, for a
//! real server goes wrong when it likes. A real MLflow is in tests/savers/test_proxied.py.

mod harness;

use std::fs;
use std::io;

use harness::{Lab, Mount, PREFIX, RUN};
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

fn noise(size: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let next = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u8
    });
    next.take(size).collect()
}

fn errno(outcome: io::Result<()>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

#[test]
fn files_larger_than_memory_are_one_body_and_come_back() {
    let lab = lab(Behaviour::default());
    let mount = mount(&lab);
    let content = noise(90 * MIB);
    fs::write(mount.at("large"), &content).unwrap();
    fs::write(mount.at("small"), b"small").unwrap();
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
    let outcome = fs::write(mount.at("lost"), noise(20 * MIB));
    assert_eq!(errno(outcome), Some(libc::EIO));
    assert!(lab.tracking.artifacts().get(&key("lost")).is_none());
    // It is kept, and stored when the way is good again.
    lab.tracking.artifacts().behave(Behaviour::default());
    mount.uploads(&["retry"]);
    harness::wait_until("the file", || {
        lab.tracking.artifacts().get(&key("lost")).is_some()
    });
}

#[test]
fn a_body_that_a_proxy_does_not_take_is_efbig_and_the_log_names_the_setting() {
    let lab = lab(Behaviour {
        largest_body: Some(MIB),
        ..Behaviour::default()
    });
    let mount = mount(&lab);
    fs::write(mount.at("small"), noise(MIB / 2)).unwrap();
    for size in [2 * MIB, 12 * MIB] {
        let outcome = fs::write(mount.at("large"), noise(size));
        assert_eq!(errno(outcome), Some(libc::EFBIG));
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
    fs::write(mount.at("long"), &content).unwrap();
    fs::write(mount.at("short"), b"short").unwrap();
    assert_eq!(lab.tracking.artifacts().seen("PUT").len(), 2);
    // Another of the same size is no proof.
    lab.tracking.artifacts().behave(Behaviour {
        instead_of_storing: [504].into(),
        ..Behaviour::default()
    });
    fs::write(mount.at("short"), b"other").unwrap();
    assert_eq!(
        lab.tracking.artifacts().get(&key("short")).unwrap(),
        "other"
    );
    assert_eq!(lab.tracking.artifacts().seen("PUT").len(), 4);
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
    artifacts.put(&key("model"), content.clone());
    lab.put("model", content.clone());
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
    artifacts.put(&key("another"), content.clone());
    assert!(fs::read(mount.at("another")).unwrap() == content);
    assert_eq!(bodies(&lab), 1);
    lab.expect_log("cannot be reached from here");
}

#[test]
fn without_a_server_proxied_artifacts_say_what_to_set() {
    let lab = Lab::new();
    lab.tracking.add_run(RUN, "http://127.0.0.1:9/files");
    let mount = lab.mount();
    let error = fs::read_dir(mount.path.join(RUN)).map(drop);
    assert_eq!(errno(error), Some(libc::EOPNOTSUPP));
}
