//! A real mount of the real program, over the in-memory S3 server and a stand-in tracking server.

#![allow(dead_code)]

pub mod journaled;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use mlfs_lab::s3::{ACCESS_KEY, S3Server, SECRET_KEY, ServerOptions};
use mlfs_lab::tracking::TrackingServer;

pub const BUCKET: &str = "bucket";
/// The run every test has, and the prefix of its artifacts.
pub const RUN: &str = "0123456789abcdef0123456789abcdef";
pub const PREFIX: &str = "root/0123456789abcdef0123456789abcdef/artifacts";
/// How long a condition is waited for before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Lab {
    pub s3: S3Server,
    pub tracking: TrackingServer,
    folder: tempfile::TempDir,
}

/// A mount; unmounted when dropped.
pub struct Mount<'a> {
    pub lab: &'a Lab,
    pub path: PathBuf,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(ServerOptions::default())
    }

    pub fn with(options: ServerOptions) -> Self {
        let s3 = S3Server::start(options).expect("the S3 server");
        let tracking = TrackingServer::start(SocketAddr::from(([127, 0, 0, 1], 0)))
            .expect("the tracking server");
        tracking.add_run(RUN, &format!("s3://{BUCKET}/{PREFIX}"));
        let folder = tempfile::tempdir().expect("a folder");
        Self {
            s3,
            tracking,
            folder,
        }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The program, in a clean environment that knows the servers.
    pub fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlfs"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.folder())
            .env("MLFLOW_TRACKING_URI", self.tracking.uri())
            .env("MLFLOW_S3_ENDPOINT_URL", self.s3.endpoint())
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        command
    }

    pub fn mount(&self) -> Mount<'_> {
        self.mount_with(&[])
    }

    pub fn mount_with(&self, flags: &[&str]) -> Mount<'_> {
        self.mount_by(self.program(), flags)
    }

    /// A mount with more in its environment.
    pub fn mount_as(&self, variables: &[(&str, &str)]) -> Mount<'_> {
        let mut program = self.program();
        program.envs(variables.iter().copied());
        self.mount_by(program, &[])
    }

    pub fn mount_by(&self, mut program: Command, flags: &[&str]) -> Mount<'_> {
        let path = self.empty_folder();
        let output = program
            .arg("mount")
            .arg(&path)
            .arg("--log-file")
            .arg(self.log())
            .args(flags)
            .output()
            .expect("mlfs runs");
        assert!(output.status.success(), "mount failed: {}", text(&output));
        Mount { lab: self, path }
    }

    pub fn log(&self) -> PathBuf {
        self.folder().join("log")
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Waits until the log says `words`: its lines are written by a thread of their own.
    pub fn expect_log(&self, words: &str) {
        wait_until(&format!("the log to say {words}"), || {
            self.log_text().contains(words)
        });
    }

    pub fn empty_folder(&self) -> PathBuf {
        (0..)
            .map(|number| self.folder().join(format!("mount-{number}")))
            .find(|path| std::fs::create_dir(path).is_ok())
            .expect("a free name")
    }

    /// The store's bytes of an artifact of the run.
    pub fn stored(&self, path: &str) -> Option<Vec<u8>> {
        self.s3.bytes(BUCKET, &format!("{PREFIX}/{path}"))
    }

    pub fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.s3
            .put(BUCKET, &format!("{PREFIX}/{path}"), bytes.into());
    }

    /// As [`Self::put`], a minute later by the store's clock.
    pub fn put_later(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        let key = format!("{PREFIX}/{path}");
        let later = std::time::SystemTime::now() + Duration::from_secs(60);
        self.s3.put_at(BUCKET, &key, bytes.into(), later);
    }

    /// What the journals of every mount of this lab say, each as it is now.
    pub fn journals(&self) -> Vec<String> {
        let spill = self.folder().join(".cache/mlfs/spill");
        let folders = std::fs::read_dir(spill).into_iter().flatten().flatten();
        let files = folders.flat_map(|folder| std::fs::read_dir(folder.path()));
        let journals = files.flatten().flatten().map(|file| file.path());
        journals
            .filter(|path| path.extension().is_some_and(|it| it == "journal"))
            .filter_map(|path| std::fs::read_to_string(path).ok())
            .collect()
    }

    /// How many of them say that their file is closed.
    pub fn journals_of_closed_files(&self) -> usize {
        let journals = self.journals();
        let closed = |journal: &&String| journal.contains("\"closed\":true");
        journals.iter().filter(closed).count()
    }

    /// Names of the run's artifacts in the store.
    pub fn names(&self) -> Vec<String> {
        let prefix = format!("{PREFIX}/");
        let keys = self.s3.keys(BUCKET);
        keys.iter()
            .filter_map(|key| key.strip_prefix(&prefix))
            .map(str::to_owned)
            .collect()
    }
}

impl Mount<'_> {
    /// A path inside the run.
    pub fn at(&self, path: &str) -> PathBuf {
        self.path.join(RUN).join(path)
    }

    pub fn unmount(&self) -> Output {
        self.lab
            .program()
            .arg("unmount")
            .arg(&self.path)
            .output()
            .expect("mlfs runs")
    }

    pub fn status(&self) -> serde_json::Value {
        let text = std::fs::read(self.path.join(".mlfs/status")).expect("the status");
        serde_json::from_slice(&text).expect("the status is JSON")
    }

    /// Waits until the only upload that is not done has this state, and returns its id.
    pub fn upload(&self, state: &str) -> String {
        let mut id = None;
        wait_until(&format!("one upload, {state}"), || {
            let status = self.status();
            id = match &status["uploads"].as_array().expect("a list")[..] {
                [upload] if upload["state"] == state => upload["id"].as_str().map(str::to_owned),
                _ => None,
            };
            id.is_some()
        });
        id.expect("it was waited for")
    }

    /// Runs `mlfs uploads` about this mount, which must succeed, and returns what it printed.
    pub fn uploads(&self, arguments: &[&str]) -> String {
        let mut command = self.lab.program();
        command.arg("uploads").args(arguments);
        let output = command.arg("--mount").arg(&self.path).output();
        let output = output.expect("a process");
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn pid(&self) -> i32 {
        self.status()["pid"].as_i64().expect("a pid") as i32
    }

    /// A line of what the kernel says of the process's memory, MiB: `VmRSS`, or `VmHWM` for its peak.
    pub fn memory(&self, line: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|it| it.starts_with(line));
        let kibibytes = line.and_then(|line| line.split_whitespace().nth(1));
        kibibytes.unwrap().parse::<u64>().unwrap() / 1024
    }

    /// Opens a file so that what is read of it is just what is asked for, without readahead.
    pub fn open_direct(&self, path: &str) -> std::fs::File {
        let mut options = std::fs::File::options();
        let direct = options.read(true).custom_flags(libc::O_DIRECT);
        direct.open(self.at(path)).unwrap()
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = self
            .lab
            .program()
            .args(["unmount", "--timeout", "10s"])
            .arg(&self.path)
            .output();
        let path = std::ffi::CString::new(self.path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: a valid C string; a mount that is gone already is an error nobody minds.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

/// What answers every request with the same few bytes, in place of a tracking server.
pub struct FakeServer {
    address: SocketAddr,
    held: Arc<(Mutex<bool>, Condvar)>,
    asked: Arc<AtomicUsize>,
}

impl FakeServer {
    /// `status` is like `200 OK`.
    pub fn start(status: &str, body: &str) -> Self {
        Self::new(status, body, false)
    }

    /// One that answers when it is let go.
    pub fn held(status: &str, body: &str) -> Self {
        Self::new(status, body, true)
    }

    fn new(status: &str, body: &str, held: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let held = Arc::new((Mutex::new(held), Condvar::new()));
        let asked = Arc::new(AtomicUsize::new(0));
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        let (may, count) = (Arc::clone(&held), Arc::clone(&asked));
        // It ends with the test's process.
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let Ok(mut connection) = connection else {
                    continue;
                };
                let mut request = [0; 4096];
                let _ = connection.read(&mut request);
                count.fetch_add(1, Ordering::SeqCst);
                let still = may.0.lock().expect("no panic");
                drop(may.1.wait_while(still, |held| *held));
                let _ = connection.write_all(answer.as_bytes());
            }
        });
        Self {
            address,
            held,
            asked,
        }
    }

    pub fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn was_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst) > 0
    }

    pub fn let_go(&self) {
        *self.held.0.lock().expect("no panic") = false;
        self.held.1.notify_all();
    }
}

/// How many mounts the kernel knows at exactly this path.
pub fn mounts_at(path: &Path) -> usize {
    let table = std::fs::read("/proc/self/mountinfo").expect("the table");
    let path = path.as_os_str().as_encoded_bytes();
    let path = String::from_utf8_lossy(path).replace(' ', "\\040");
    let table = String::from_utf8_lossy(&table).into_owned();
    let at = table.lines().filter_map(|line| line.split(' ').nth(4));
    at.filter(|at| *at == path).count()
}

/// Lets the program write files of at most `bytes` bytes: to it, that is a full disk.
pub fn limit_files(command: &mut Command, bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    let apply = move || {
        // SAFETY: setrlimit may be called between fork and exec, and reads only its argument.
        match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: `apply` neither allocates nor locks.
    unsafe { command.pre_exec(apply) };
}

/// Standard error of a process, for messages.
/// Names in a directory, in order.
pub fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `condition` holds; fails the test when it does not come to hold.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that are nowhere alike.
pub fn noise(length: usize) -> Vec<u8> {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The start of a safetensors file of `count` tensors of `size` bytes each.
pub fn safetensors_head(count: u64, size: u64) -> Vec<u8> {
    let entry = |index: u64| {
        let (from, to) = (index * size, (index + 1) * size);
        format!(r#""t{index}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{from},{to}]}}"#)
    };
    let entries: Vec<String> = (0..count).map(entry).collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut head = (header.len() as u64).to_le_bytes().to_vec();
    head.extend_from_slice(header.as_bytes());
    head
}

pub fn errno(outcome: std::io::Result<impl Sized>) -> i32 {
    outcome
        .err()
        .and_then(|error| error.raw_os_error())
        .unwrap_or(0)
}

/// close(2), whose error std's `File` swallows.
pub fn close(file: std::fs::File) -> i32 {
    let descriptor = OwnedFd::from(file);
    // SAFETY: the descriptor is owned here and forgotten right after.
    let outcome = unsafe { libc::close(descriptor.as_raw_fd()) };
    let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    std::mem::forget(descriptor);
    if outcome == 0 { 0 } else { error }
}

/// kill -9, and the dead mount out of the way.
pub fn kill(mount: &Mount<'_>) {
    let pid = mount.pid();
    // SAFETY: kill has no preconditions; the process is this test's own mount.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    wait_for_end(pid);
    mount.unmount();
}

/// Waits until a process holds nothing any more.
pub fn wait_for_end(pid: i32) {
    let files = PathBuf::from(format!("/proc/{pid}/fd"));
    wait_until("the process to end", || {
        std::fs::read_dir(&files).map_or(true, |mut files| files.next().is_none())
    });
}
