//! The command line, as processes.

mod harness;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use harness::{Lab, RUN, text, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

/// Exit codes.
const FAILED: i32 = 1;
const USAGE: i32 = 2;

/// What `mlfs mount` says when it fails, and how it exits. It leaves no mount behind.
fn mount_error(lab: &Lab, arguments: &[&OsStr]) -> (i32, String) {
    let output = lab.program().arg("mount").args(arguments).output().unwrap();
    assert!(!output.status.success(), "{arguments:?} succeeded");
    let message = text(&output);
    assert!(!message.contains("panicked"), "{message}");
    (output.status.code().unwrap(), message)
}

fn words<'a>(arguments: &'a [&'a str]) -> Vec<&'a OsStr> {
    arguments.iter().map(OsStr::new).collect()
}

#[test]
fn each_wrong_use_is_one_clear_error_and_exit_code_2() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let at = folder.to_str().unwrap();
    let inside = folder.join("x");
    let inside = inside.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&[], "MOUNTPOINT"),
        (&[at, "--nonsense"], "--nonsense"),
        (&[at, "--memory", "lots"], "no size like 512MiB"),
        (&[at, "--memory", "-1"], "no size like 512MiB"),
        (&[at, "--spill-size", "1e9"], "no size like 512MiB"),
        (&[at, "--memory", "1 MiB"], "--memory"),
        (&[at, "--part-size", "1MiB"], "5MiB to 5GiB"),
        (&[at, "--transfers", "0"], "1 to 256"),
        (&[at, "--transfers", "-1"], "--transfers"),
        (&[at, "--metadata-ttl", "soon"], "no duration"),
        (&[at, "--close-timeout", "soon"], "no duration"),
        (&[at, "--umask", "9"], "octal"),
        (&[at, "--log-level", "loud"], "possible values"),
        (&[at, "--spill-dir", inside], "inside the mount point"),
        (&[at, "--log-file", inside], "inside the mount point"),
        (&[at, "--tracking-uri", ""], "MLFLOW_TRACKING_URI"),
        (
            &[at, "--tracking-uri", "postgresql://me:hunter2@h/db"],
            "http(s) URI",
        ),
        (&[at, "--tracking-uri", "sqlite://"], "sqlite:///mlflow.db"),
        (&[at, "--tracking-uri", "file://h/runs"], "another machine"),
        (&[at, "--tracking-uri", "me:hunter2@h"], "http(s) URI"),
        (
            &[at, "--tracking-uri", "http://me:hunter2@h:port"],
            "malformed",
        ),
        (&[at, "--cache-size", "1MiB"], "at least 64MiB"),
        (&[at, "--cache-dir", inside], "inside the mount point"),
    ];
    for (arguments, expected) in cases {
        let (code, message) = mount_error(&lab, &words(arguments));
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert_eq!(code, USAGE, "{arguments:?}: {message}");
        assert!(!message.contains("hunter2"), "{arguments:?}: {message}");
    }
    let output = lab
        .program()
        .args(["mount", at])
        .env_remove("MLFLOW_TRACKING_URI")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(USAGE), "{}", text(&output));
    for (name, value) in [
        ("MLFLOW_TRACKING_INSECURE_TLS", "maybe"),
        ("MLFLOW_S3_UPLOAD_EXTRA_ARGS", "{"),
        ("MLFS_LOG", "mlfs=loud"),
    ] {
        let mut command = lab.program();
        let output = command.args(["mount", at]).env(name, value).output();
        let output = output.unwrap();
        let message = text(&output);
        assert_eq!(output.status.code(), Some(USAGE), "{message}");
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn a_mount_point_that_cannot_be_one_is_one_clear_error_and_exit_code_1() {
    let lab = Lab::new();
    let file = lab.folder().join("file");
    fs::write(&file, b"").unwrap();
    let full = lab.empty_folder();
    fs::write(full.join("something"), b"").unwrap();
    let dangling = lab.folder().join("dangling");
    symlink("nowhere", &dangling).unwrap();
    for (path, expected) in [
        (Path::new("/no/such/folder"), "there is no such directory"),
        (&dangling, "there is no such directory"),
        (&file, "not a directory"),
        (&file.join("below"), "ot a directory"),
        (&full, "not empty"),
        (Path::new("/proc"), "already mounted (proc)"),
    ] {
        let (code, message) = mount_error(&lab, &[path.as_os_str()]);
        assert!(message.contains(expected), "{}: {message}", path.display());
        assert_eq!(code, FAILED, "{message}");
    }
}

#[test]
fn folders_that_cannot_be_used_are_told_before_anything_is_mounted() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let file = lab.folder().join("file");
    fs::write(&file, b"").unwrap();
    let below = file.join("below");
    for foreground in [&[][..], &["--foreground"]] {
        for (flag, path, remedy) in [
            ("--spill-dir", file.as_path(), "--spill-dir"),
            ("--spill-dir", &below, "--spill-dir"),
            ("--spill-dir", Path::new("/proc/spill"), "--spill-dir"),
            ("--log-file", &below, "--log-file"),
            ("--log-file", lab.folder(), "--log-file"),
            // A disk without space.
            ("--log-file", Path::new("/dev/full"), "--log-file"),
        ] {
            let mut arguments = words(foreground);
            arguments.extend([folder.as_os_str(), OsStr::new(flag), path.as_os_str()]);
            let (code, message) = mount_error(&lab, &arguments);
            assert_eq!(code, FAILED, "{message}");
            let shown = path.to_str().unwrap();
            assert!(
                message.contains(shown) && message.contains(remedy),
                "{message}"
            );
            assert!(fs::read_dir(&folder).unwrap().next().is_none());
        }
    }
}

#[test]
fn a_disk_that_takes_no_spill_is_told_before_anything_is_mounted() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let mut command = lab.program();
    command.args(["mount", "--foreground"]).arg(&folder);
    // Standard error is a pipe, so the spill is the only file that is written.
    harness::limit_files(&mut command, 0);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(FAILED));
    let message = text(&output);
    let spill = lab.folder().join(".cache/mlfs/spill");
    assert!(message.contains(spill.to_str().unwrap()), "{message}");
    assert!(message.contains("--spill-dir"), "{message}");
    assert!(fs::read_dir(spill).unwrap().next().is_none());
}

#[test]
fn a_log_and_a_spill_folder_are_for_their_owners_eyes_only() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let folder = lab.folder().join("logs/of/mlfs");
    let log = folder.join("log");
    let mut command = lab.program();
    command.arg("mount").arg(&path).arg("--log-file").arg(&log);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let mount = harness::Mount { lab: &lab, path };
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&log), 0o600);
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(mode(&lab.folder().join(".cache/mlfs/spill")), 0o700);
    drop(mount);
}

/// The tracking servers one may meet instead of the right one.
#[test]
fn a_server_that_cannot_serve_is_one_clear_error_with_a_remedy() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    let html = "<!doctype html>\n<html><title>404 Not Found</title><h1>Not Found</h1></html>";
    let host = "Invalid Host header - possible DNS rebinding attack detected";
    let refused = harness::FakeServer::start("401 Unauthorized", "You are not authenticated.");
    let missing = harness::FakeServer::start("404 Not Found", html);
    let other = harness::FakeServer::start("200 OK", html);
    let rebinding = harness::FakeServer::start("403 Forbidden", host);
    let forbidden = harness::FakeServer::start(
        "403 Forbidden",
        r#"{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}"#,
    );
    let cases = [
        (
            "http://127.0.0.1:1".to_owned(),
            "Connection refused",
            "check",
        ),
        (
            "http://no.such.host.invalid".to_owned(),
            "cannot be reached",
            "check",
        ),
        (refused.uri(), "credentials", "MLFLOW_TRACKING_USERNAME"),
        (
            missing.uri(),
            "there is no MLflow API",
            "check the tracking URI",
        ),
        (
            other.uri(),
            "is this an MLflow server?",
            "check the tracking URI",
        ),
        (rebinding.uri(), "Invalid Host header", "--allowed-hosts"),
        (forbidden.uri(), "no permission", "MLFLOW_TRACKING_USERNAME"),
        // http is spoken there.
        (
            refused.uri().replace("http:", "https:"),
            "may speak http",
            "http",
        ),
    ];
    for (uri, cause, remedy) in cases {
        let with_password = uri.replace("//", "//me:hunter2@");
        let arguments = [folder.to_str().unwrap(), "--tracking-uri", &with_password];
        let (code, message) = mount_error(&lab, &words(&arguments));
        assert_eq!(code, FAILED, "{message}");
        assert_eq!(message.trim().lines().count(), 1, "{message}");
        for part in [cause, remedy, uri.as_str()] {
            assert!(message.contains(part), "{part}: {message}");
        }
        for noise in ["hunter2", "client error", "error sending request"] {
            assert!(!message.contains(noise), "{message}");
        }
    }
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
        "--close",
        "--part-size",
        "--transfers",
        "--close-timeout",
        "--uid",
        "--gid",
        "--umask",
        "--metadata-ttl",
        "--sign-payload",
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
    let (_, message) = mount_error(&lab, &[mount.path.as_os_str()]);
    assert!(message.contains("already mounted"), "{message}");
    let (_, message) = mount_error(&lab, &[mount.at("x").as_os_str()]);
    assert!(message.contains("inside the mount"), "{message}");
}

#[test]
fn status_and_unmount_of_what_is_no_mount_say_so() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::write(mount.at("f"), b"x").unwrap();
    for command in ["status", "unmount"] {
        for (path, expected) in [
            (lab.empty_folder(), "nothing is mounted here"),
            (lab.folder().join("missing"), "No such file"),
            (PathBuf::from("/proc"), "not by mlfs"),
            (mount.at("f"), "inside the mount"),
            (mount.at("missing/too"), "inside the mount"),
        ] {
            let output = lab.program().arg(command).arg(&path).output().unwrap();
            assert_eq!(output.status.code(), Some(FAILED));
            let message = text(&output);
            let shown = path.to_str().unwrap();
            assert!(
                message.contains(expected) && message.contains(shown),
                "{message}"
            );
        }
        let output = lab.program().arg(command).output().unwrap();
        assert_eq!(output.status.code(), Some(USAGE));
    }
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
fn no_secret_appears_in_a_log_even_at_the_finest_level() {
    let lab = Lab::new();
    let output = {
        let path = lab.empty_folder();
        let output = lab
            .program()
            .env("MLFS_LOG", "trace")
            .env("AWS_SESSION_TOKEN", "sessionsecret")
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
    for secret in [
        "labsecret",
        "sessionsecret",
        "trackingsecret",
        "dXNlcjp0cmFja2luZ3NlY3JldA",
    ] {
        assert!(!log.contains(secret), "{secret}");
    }
    for name in ["Signature=", "Credential="] {
        let values = log.split(name).skip(1);
        for value in values {
            assert!(value.starts_with("[hidden]"), "{name}{value:.80}");
        }
    }
}
