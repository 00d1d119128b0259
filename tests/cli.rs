//! The command line, as processes.

mod harness;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Output, Stdio};

use harness::{Lab, RUN, text, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

fn mount_error(lab: &Lab, arguments: &[&str]) -> String {
    let output = lab.program().arg("mount").args(arguments).output().unwrap();
    assert!(!output.status.success(), "{arguments:?} succeeded");
    let message = text(&output);
    assert!(!message.contains("panicked"), "{message}");
    message
}

#[test]
fn each_wrong_use_is_one_clear_error_and_a_non_zero_exit() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let at = folder.to_str().unwrap();
    fs::write(lab.folder().join("file"), b"").unwrap();
    let file = lab.folder().join("file");
    let file = file.to_str().unwrap();
    let full = lab.empty_folder();
    fs::write(full.join("something"), b"").unwrap();
    let full = full.to_str().unwrap();
    let inside = folder.join("cache");
    let inside = inside.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["/no/such/folder"], "there is no such directory"),
        (&[file], "not a directory"),
        (&[full], "not empty"),
        (&[at, "--memory", "lots"], "no size like 512MiB"),
        (&[at, "--memory", "1MiB"], "--memory"),
        (&[at, "--part-size", "1MiB"], "5MiB to 5GiB"),
        (&[at, "--transfers", "0"], "1 to 256"),
        (&[at, "--metadata-ttl", "soon"], "no duration"),
        (&[at, "--umask", "9"], "octal"),
        (&[at, "--log-level", "loud"], "possible values"),
        (&[at, "--tracking-uri", "postgresql://h/db"], "http(s) URI"),
        (
            &[at, "--tracking-uri", "sqlite:///mlflow.db"],
            "mlflow server",
        ),
        (
            &[at, "--tracking-uri", "http://127.0.0.1:1"],
            "cannot be reached",
        ),
        (&[at, "--tracking-uri", ""], "MLFLOW_TRACKING_URI"),
        (&[at, "--cache-size", "1MiB"], "at least 64MiB"),
        (&[at, "--cache-dir", inside], "inside the mount point"),
    ];
    for (arguments, expected) in cases {
        let message = mount_error(&lab, arguments);
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
}

#[test]
fn wrong_credentials_are_told_at_mount() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    lab.tracking.set_broken(Some(401));
    let message = mount_error(&lab, &[folder.to_str().unwrap()]);
    assert!(message.contains("credentials"), "{message}");
}

#[test]
fn help_gives_each_flag_its_unit_default_and_variable() {
    let lab = Lab::new();
    let output = lab.program().args(["mount", "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for flag in [
        "--tracking-uri",
        "--foreground",
        "--read-only",
        "--allow-other",
        "--memory",
        "--spill-dir",
        "--spill-size",
        "--part-size",
        "--transfers",
        "--uid",
        "--gid",
        "--umask",
        "--metadata-ttl",
        "--log-file",
        "--log-level",
    ] {
        let variable = match flag {
            "--tracking-uri" => "MLFLOW_TRACKING_URI".to_owned(),
            flag => format!("MLFS_{}", flag[2..].replace('-', "_").to_uppercase()),
        };
        assert!(
            help.contains(flag) && help.contains(&variable),
            "{flag}: {help}"
        );
    }
}

#[test]
fn a_second_mount_on_the_same_place_is_refused() {
    let lab = Lab::new();
    let mount = lab.mount();
    let message = mount_error(&lab, &[mount.path.to_str().unwrap()]);
    assert!(message.contains("already mounted"), "{message}");
}

#[test]
fn unmount_of_what_is_no_mount_says_so() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let output = lab.program().arg("unmount").arg(&folder).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("nothing is mounted here"));
}

#[test]
fn unmount_waits_for_the_store_and_for_the_process() {
    let lab = Lab::new();
    let mount = lab.mount();
    let pid = mount.pid();
    fs::write(mount.at("f"), b"x").unwrap();
    let output = mount.unmount();
    assert!(output.status.success(), "{}", text(&output));
    assert!(!std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists());
    assert!(fs::read_dir(&mount.path).unwrap().next().is_none());
}

#[test]
fn unmount_names_what_is_not_stored_and_loses_nothing() {
    let lab = Lab::new();
    let mount = lab.mount();
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
    assert_eq!(harness::errno(fs::write(mount.at("f"), b"precious")), 0);
    // std's write ignores the error of close; the mount does not.
    wait_until("the failure to show", || {
        mount.status()["pending"][0]["state"] == "failed"
    });
    let output = lab
        .program()
        .args(["unmount", "--timeout", "500ms"])
        .arg(&mount.path)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let message = text(&output);
    assert!(
        message.contains(&format!("{RUN}/f")) && message.contains("AccessDenied"),
        "{message}"
    );
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"precious");
    lab.s3.set_faults(1, Vec::new());
    assert!(mount.unmount().status.success());
    assert_eq!(lab.stored("f").unwrap(), b"precious");
}

#[test]
fn a_termination_stores_what_is_left_and_unmounts() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let mut child = lab
        .program()
        .arg("mount")
        .arg("--foreground")
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the mount", || path.join(".mlfs/status").exists());
    fs::write(path.join(RUN).join("f"), b"x").unwrap();
    // SAFETY: the process is a child of ours that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let status = child.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert_eq!(lab.stored("f").unwrap(), b"x");
    assert!(fs::read_dir(&path).unwrap().next().is_none());
}

#[test]
fn a_termination_keeps_the_bytes_of_what_it_cannot_store() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let mut child = lab
        .program()
        .arg("mount")
        .arg("--foreground")
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the mount", || path.join(".mlfs/status").exists());
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
    let _ = fs::write(path.join(RUN).join("f"), b"precious");
    // SAFETY: the process is a child of ours that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let kept = lab
        .folder()
        .join(format!(".cache/mlfs/spill/unsent-{}/{RUN}/f", child.id()));
    assert_eq!(fs::read(kept).unwrap(), b"precious");
}

#[test]
fn a_dead_mount_is_recognised_and_removed() {
    let lab = Lab::new();
    let mount = lab.mount();
    // SAFETY: the mount's process was started by this test.
    unsafe { libc::kill(mount.pid(), libc::SIGKILL) };
    wait_until("the mount to be dead", || {
        harness::errno(fs::metadata(&mount.path)) == libc::ENOTCONN
    });
    let message = mount_error(&lab, &[mount.path.to_str().unwrap()]);
    assert!(message.contains("mlfs unmount"), "{message}");
    let output: Output = mount.unmount();
    assert!(output.status.success(), "{}", text(&output));
    assert!(fs::read_dir(&mount.path).unwrap().next().is_none());
}

#[test]
fn no_secret_appears_in_a_log_even_at_the_finest_level() {
    let lab = Lab::new();
    let output = {
        let path = lab.empty_folder();
        let output = lab
            .program()
            .env("MLFS_LOG", "trace")
            .env("MLFLOW_TRACKING_USERNAME", "user")
            .env("MLFLOW_TRACKING_PASSWORD", "trackingsecret")
            .arg("mount")
            .arg(&path)
            .arg("--log-file")
            .arg(lab.log())
            .output()
            .unwrap();
        fs::write(path.join(RUN).join("f"), b"x").unwrap();
        lab.program().arg("unmount").arg(&path).output().unwrap();
        output
    };
    assert!(output.status.success(), "{}", text(&output));
    let log = lab.log_text();
    assert!(log.len() > 1000);
    for secret in ["labsecret", "trackingsecret", "dXNlcjp0cmFja2luZ3NlY3JldA"] {
        assert!(!log.contains(secret), "{secret}");
    }
}
