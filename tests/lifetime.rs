//! A mount from its beginning to its end, whatever happens to its processes.

mod harness;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::{FakeServer, Lab, Mount, RUN, mounts_at, text, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

fn send(pid: i32, signal: i32) {
    // SAFETY: only processes that a test has started are sent signals.
    unsafe { libc::kill(pid, signal) };
}

/// A mount in the foreground; killed and removed when dropped.
struct Foreground {
    child: Child,
    path: PathBuf,
}

impl Foreground {
    fn start(lab: &Lab, prepare: impl FnOnce(&mut Command)) -> Self {
        let path = lab.empty_folder();
        let mut command = lab.program();
        command.arg("mount").arg("--foreground").arg(&path);
        prepare(&mut command);
        let child = command.spawn().unwrap();
        let status = path.join(".mlfs/status");
        let mount = Self { child, path };
        wait_until("the mount", || status.exists());
        mount
    }

    fn quiet(lab: &Lab) -> Self {
        Self::start(lab, |command| {
            command.stderr(Stdio::null());
        })
    }

    fn signal(&self, signal: i32) {
        send(self.child.id() as i32, signal);
    }

    fn at(&self, path: &str) -> PathBuf {
        self.path.join(RUN).join(path)
    }
}

/// Whether the spill directory holds a chunk of these bytes.
fn is_kept(lab: &Lab, bytes: &[u8]) -> bool {
    let folders = fs::read_dir(lab.folder().join(".cache/mlfs/spill")).unwrap();
    let mut files = folders
        .flatten()
        .flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
    files.any(|file| fs::read(file.path()).is_ok_and(|found| found == bytes))
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        detach(&self.path);
    }
}

fn detach(path: &Path) {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a valid C string; a mount that is gone already is an error nobody minds.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
}

fn run(lab: &Lab, arguments: &[&OsStr]) -> Output {
    let mut command = lab.program();
    command.args(arguments).output().unwrap()
}

/// As `output`, of a command that may hang.
fn run_to_its_end(command: &mut Command) -> Output {
    let mut child = command.spawn().unwrap();
    wait_until("the command to end", || child.try_wait().unwrap().is_some());
    child.wait_with_output().unwrap()
}

/// A process that is stopped until this is dropped.
struct Stopped(i32);

impl Stopped {
    fn new(pid: i32) -> Self {
        send(pid, libc::SIGSTOP);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        send(self.0, libc::SIGCONT);
    }
}

fn refuse_puts(lab: &Lab) {
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
}

fn kill_and_wait(mount: &Mount<'_>) {
    send(mount.pid(), libc::SIGKILL);
    // What the kernel knows of the root it goes on telling for a while.
    wait_until("the mount to be dead", || {
        harness::errno(fs::read(mount.path.join(".mlfs/status"))) == libc::ENOTCONN
    });
}

#[test]
fn of_many_mounts_on_one_directory_at_once_one_wins() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let children: Vec<Child> = (0..6)
        .map(|_| {
            let mut command = lab.program();
            command.arg("mount").arg(&path).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    let outputs: Vec<Output> = children
        .into_iter()
        .map(|child| child.wait_with_output().unwrap())
        .collect();
    let mounts = mounts_at(&path);
    for _ in 1..mounts {
        detach(&path);
    }
    let mount = Mount {
        lab: &lab,
        path: path.clone(),
    };
    let winners = outputs.iter().filter(|it| it.status.success()).count();
    assert_eq!((winners, mounts), (1, 1));
    for output in outputs.iter().filter(|it| !it.status.success()) {
        let message = text(output);
        let known = ["already mounted", "another mlfs"];
        assert!(known.iter().any(|it| message.contains(it)), "{message}");
    }
    assert!(mount.unmount().status.success());
}

#[test]
fn a_directory_that_another_process_is_mounting_on_is_refused() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let directory = fs::File::open(&path).unwrap();
    directory.lock().unwrap();
    for flag in ["--read-only", "--foreground"] {
        let mut command = lab.program();
        command.arg("mount").arg(flag).arg(&path);
        let output = run_to_its_end(command.stderr(Stdio::piped()));
        let mounts = mounts_at(&path);
        detach(&path);
        assert_eq!((output.status.code(), mounts), (Some(1), 0));
        assert!(text(&output).contains("another mlfs"), "{}", text(&output));
    }
}

#[test]
fn a_mount_that_is_read_only_is_unmounted_like_any_other() {
    let lab = Lab::new();
    lab.put("f", b"x".as_slice());
    let mount = lab.mount_with(&["--read-only"]);
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"x");
    let output = run(&lab, &["unmount".as_ref(), mount.path.as_os_str()]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(mounts_at(&mount.path), 0);
}

#[test]
fn a_symlink_is_as_good_as_the_mount_point_it_leads_to() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let link = lab.folder().join("link");
    symlink(path.file_name().unwrap(), &link).unwrap();
    let ask = |command: &str| run(&lab, &[command.as_ref(), link.as_os_str()]);
    for killed in [false, true] {
        let mount = Mount {
            lab: &lab,
            path: path.clone(),
        };
        assert!(ask("mount").status.success());
        fs::write(mount.at("f"), b"x").unwrap();
        let status = ask("status");
        assert!(status.status.success(), "{}", text(&status));
        if killed {
            kill_and_wait(&mount);
            let told = text(&ask("status"));
            assert!(told.contains("its process is gone"), "{told}");
        }
        let second = ask("mount");
        assert!(!second.status.success());
        assert!(text(&second).contains("mlfs unmount"), "{}", text(&second));
        let unmount = ask("unmount");
        assert!(unmount.status.success(), "{}", text(&unmount));
        assert_eq!(mounts_at(&path), 0);
    }
}

#[test]
fn a_mount_point_may_have_any_name() {
    let lab = Lab::new();
    let deep = "deeply/".repeat(100);
    for name in [
        OsStr::new("with some spaces"),
        OsStr::from_bytes(b"not \xff UTF-8"),
        OsStr::new("-x"),
        OsStr::new(deep.as_str()),
    ] {
        let path = lab.folder().join(name);
        fs::create_dir_all(&path).unwrap();
        let mount = Mount { lab: &lab, path };
        // With the log at its usual place, whose name comes from the mount point's.
        let path = mount.path.as_os_str();
        let ask = |command: &str| run(&lab, &[command.as_ref(), "--".as_ref(), path]);
        let output = ask("mount");
        assert!(output.status.success(), "{name:?}: {}", text(&output));
        fs::write(mount.at("f"), b"x").unwrap();
        for command in ["status", "unmount"] {
            let output = ask(command);
            assert!(output.status.success(), "{name:?}: {}", text(&output));
        }
        assert!(fs::read_dir(&mount.path).unwrap().next().is_none());
    }
}

#[test]
fn a_mount_that_nobody_waits_for_any_more_is_taken_back() {
    let lab = Lab::new();
    let path = lab.empty_folder();
    let server = FakeServer::held("200 OK", r#"{"experiments": []}"#);
    let mut parent = lab
        .program()
        .arg("mount")
        .arg(&path)
        .args(["--tracking-uri", &server.uri()])
        .arg("--log-file")
        .arg(lab.log())
        .spawn()
        .unwrap();
    wait_until("the question to the server", || server.was_asked());
    parent.kill().unwrap();
    parent.wait().unwrap();
    server.let_go();
    wait_until("the mount", || lab.log_text().contains(" mounted "));
    let gone = || mounts_at(&path) == 0;
    let outcome = std::panic::catch_unwind(|| wait_until("the mount to be gone", gone));
    detach(&path);
    assert!(outcome.is_ok(), "{}", lab.log_text());
    wait_until("the process to say why", || {
        lab.log_text().contains("nobody knows of it")
    });
}

#[test]
fn a_mount_that_is_stopped_is_told_and_not_waited_for() {
    let lab = Lab::new();
    let mount = lab.mount();
    let pid = mount.pid();
    let stopped = Stopped::new(pid);
    let short = &["--timeout", "500ms"];
    let outputs =
        [("status", &short[..]), ("unmount", short), ("mount", &[])].map(|(command, flags)| {
            let mut command_line = lab.program();
            command_line.arg(command).args(flags).arg(&mount.path);
            run_to_its_end(command_line.stderr(Stdio::piped()))
        });
    drop(stopped);
    let [status, unmount, second] = outputs;
    for output in [status, unmount] {
        assert_eq!(output.status.code(), Some(1));
        let message = text(&output);
        let remedy = format!("kill -CONT {pid}");
        assert!(
            message.contains("does not answer") && message.contains(&remedy),
            "{message}"
        );
    }
    assert!(text(&second).contains("already mounted"));
    assert!(mount.unmount().status.success());
}

#[test]
fn a_log_that_cannot_grow_does_not_end_the_mount() {
    const MOST: u64 = 32 << 10;
    let lab = Lab::new();
    let path = lab.empty_folder();
    let mut command = lab.program();
    command
        .env("MLFS_LOG", "trace")
        .arg("mount")
        .arg(&path)
        .arg("--log-file")
        .arg(lab.log());
    harness::limit_files(&mut command, MOST);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let mount = Mount { lab: &lab, path };
    let mut number = 0;
    wait_until("the log to be full", || {
        number += 1;
        fs::write(mount.at(&format!("f{number}")), b"x").unwrap();
        fs::metadata(lab.log()).unwrap().len() == MOST
    });
    fs::write(mount.at("after"), b"x").unwrap();
    assert_eq!(lab.stored("after").unwrap(), b"x");
    let output = mount.unmount();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_terminal_that_is_held_does_not_hold_up_the_mount() {
    let lab = Lab::new();
    // A pipe that nobody reads, which is full after 64 KiB.
    let mount = Foreground::start(&lab, |command| {
        command.env("MLFS_LOG", "trace").stderr(Stdio::piped());
    });
    let done = Arc::new(AtomicBool::new(false));
    let paths: Vec<PathBuf> = (0..300).map(|it| mount.at(&format!("f{it}"))).collect();
    std::thread::spawn({
        let done = Arc::clone(&done);
        move || {
            for path in paths {
                let _ = fs::write(path, b"x");
            }
            done.store(true, Ordering::SeqCst);
        }
    });
    wait_until("all files to be written", || done.load(Ordering::SeqCst));
    assert_eq!(lab.stored("f299").unwrap(), b"x");
}

#[test]
fn a_termination_stores_what_is_left_and_unmounts() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let lab = Lab::new();
        let mut mount = Foreground::quiet(&lab);
        fs::write(mount.at("f"), b"x").unwrap();
        mount.signal(signal);
        let status = mount.child.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None));
        assert_eq!(lab.stored("f").unwrap(), b"x");
        assert!(fs::read_dir(&mount.path).unwrap().next().is_none());
    }
}

#[test]
fn a_termination_keeps_the_bytes_of_what_it_cannot_store() {
    let lab = Lab::new();
    let mut mount = Foreground::quiet(&lab);
    refuse_puts(&lab);
    let _ = fs::write(mount.at("f"), b"precious");
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.child.wait().unwrap().code(), Some(1));
    assert!(is_kept(&lab, b"precious"));
}

#[test]
fn a_second_signal_ends_the_waiting_and_keeps_the_bytes() {
    let lab = Lab::new();
    let log = lab.folder().join("log");
    let mut mount = Foreground::start(&lab, |command| {
        command.arg("--log-file").arg(&log);
    });
    // In use: the first signal takes the mount out of the tree and waits for its user.
    let file = fs::File::create(mount.at("open")).unwrap();
    io::Write::write_all(&mut &file, b"precious").unwrap();
    mount.signal(libc::SIGTERM);
    wait_until("the first signal to be noticed", || {
        lab.log_text().contains("still in use")
    });
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.child.wait().unwrap().code(), Some(1));
    assert!(is_kept(&lab, b"precious"));
    drop(file);
}

#[test]
fn a_dead_mount_is_recognised_and_removed() {
    let lab = Lab::new();
    let mount = lab.mount();
    kill_and_wait(&mount);
    let again = run(&lab, &["mount".as_ref(), mount.path.as_os_str()]);
    assert!(!again.status.success());
    assert!(text(&again).contains("mlfs unmount"), "{}", text(&again));
    let output: Output = mount.unmount();
    assert!(output.status.success(), "{}", text(&output));
    assert!(fs::read_dir(&mount.path).unwrap().next().is_none());
    let again = run(&lab, &["mount".as_ref(), mount.path.as_os_str()]);
    assert!(again.status.success(), "{}", text(&again));
}
