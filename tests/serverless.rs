//! A mount with no server at all: MLflow's own database or files, and artifacts in local folders.

mod harness;

use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::{Lab, errno, names, noise, text};

const RUN: &str = "0123456789abcdef0123456789abcdef";
const OTHER: &str = "fedcba9876543210fedcba9876543210";

/// A folder in which somebody has tried MLflow.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn artifacts(&self, run: &str) -> PathBuf {
        self.path().join(format!("mlruns/1/{run}/artifacts"))
    }

    /// The program, in the folder, with no MLflow variable set.
    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlfs"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path())
            .current_dir(self.path())
            .args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.program(arguments).output().unwrap()
    }

    fn mount(&self, flags: &[&str]) -> Mounted<'_> {
        fs::create_dir_all(self.path().join("runs")).unwrap();
        let output = self.run(&[&["mount", "./runs"], flags].concat());
        assert!(output.status.success(), "{}", text(&output));
        Mounted(self)
    }

    /// As MLflow 3.17 makes it, as far as it is looked at.
    fn database(&self) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(self.path().join("mlflow.db")).unwrap();
        connection
            .execute_batch(
                "CREATE TABLE experiments (experiment_id INTEGER PRIMARY KEY, name TEXT, \
                 artifact_location TEXT, lifecycle_stage TEXT, workspace TEXT DEFAULT 'default'); \
                 CREATE TABLE runs (run_uuid VARCHAR(32) PRIMARY KEY, name TEXT, status TEXT, \
                 start_time BIGINT, end_time BIGINT, lifecycle_stage TEXT, artifact_uri TEXT, \
                 experiment_id INTEGER); \
                 INSERT INTO experiments VALUES (1, 'tried', '', 'active', 'default');",
            )
            .unwrap();
        connection
    }

    fn add(&self, connection: &rusqlite::Connection, run: &str) {
        let artifacts = self.artifacts(run);
        let added = connection.execute(
            "INSERT INTO runs VALUES (?1, 'a run', 'FINISHED', 1700000000000, NULL, 'active', ?2, 1)",
            [run, artifacts.to_str().unwrap()],
        );
        assert_eq!(added.unwrap(), 1);
    }
}

struct Mounted<'a>(&'a Folder);

impl Mounted<'_> {
    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join("runs").join(path)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let output = self.0.run(&["unmount", "./runs", "--timeout", "30s"]);
        if !std::thread::panicking() {
            assert!(output.status.success(), "{}", text(&output));
        }
    }
}

/// The runs that a mount shows.
fn runs(mount: &Mounted<'_>) -> Vec<String> {
    let mut names = names(&mount.at(""));
    names.retain(|name| name != "experiments" && name != "models");
    names
}

/// A disk of its own, as small as told; taken down when dropped.
struct Disk(CString);

impl Disk {
    fn new(path: &Path, size: &str) -> Self {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        let options = CString::new(format!("size={size}")).unwrap();
        // SAFETY: valid C strings.
        let outcome = unsafe {
            let options = options.as_ptr().cast();
            libc::mount(
                c"tmpfs".as_ptr(),
                path.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options,
            )
        };
        let error = io::Error::last_os_error();
        assert_eq!(
            outcome, 0,
            "a tmpfs cannot be mounted: {error}; run as root"
        );
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // SAFETY: a valid C string.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_database_beside_one_is_mounted_with_nothing_said() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    fs::create_dir_all(folder.artifacts(RUN)).unwrap();
    fs::write(folder.artifacts(RUN).join("model.bin"), b"precious").unwrap();
    let mount = folder.mount(&["--metadata-ttl", "0"]);
    assert_eq!(runs(&mount), [RUN]);
    let model = mount.at(RUN).join("model.bin");
    assert_eq!(fs::read(&model).unwrap(), b"precious");
    // By its name too. A database from before there were models has none.
    let named = mount.at("experiments/tried/a run/model.bin");
    assert_eq!(fs::read(named).unwrap(), b"precious");
    assert_eq!(names(&mount.at("experiments/tried")), ["a run"]);
    assert!(names(&mount.at("models")).is_empty());
    assert!(!mount.at("models/some").exists() && !mount.at("models/some@alias").exists());

    // Written here, there at once; and the other way round.
    let data = noise(40 << 20);
    fs::create_dir(mount.at(RUN).join("d")).unwrap();
    fs::write(mount.at(RUN).join("d/large"), &data).unwrap();
    assert!(fs::read(folder.artifacts(RUN).join("d/large")).unwrap() == data);
    fs::write(folder.artifacts(RUN).join("d/other"), b"other").unwrap();
    assert_eq!(names(&mount.at(RUN).join("d")), ["large", "other"]);

    // MLflow goes on writing.
    folder.add(&database, OTHER);
    fs::write(mount.at(OTHER).join("first"), b"x").unwrap();
    assert_eq!(
        fs::read(folder.artifacts(OTHER).join("first")).unwrap(),
        b"x"
    );
    let deleted = database.execute(
        "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?1",
        [RUN],
    );
    assert_eq!(deleted.unwrap(), 1);
    assert_eq!(runs(&mount), [OTHER]);
    assert_eq!(errno(fs::metadata(&model)), libc::ENOENT);
}

#[test]
fn a_transaction_of_a_writer_is_not_seen_and_does_not_disturb() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    let mount = folder.mount(&["--metadata-ttl", "0"]);
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    folder.add(&database, OTHER);
    assert_eq!(runs(&mount), [RUN]);
    assert_eq!(errno(fs::metadata(mount.at(OTHER))), libc::ENOENT);
    database.execute_batch("COMMIT").unwrap();
    assert_eq!(runs(&mount), [RUN, OTHER]);
}

#[test]
fn files_of_mlflows_older_way_are_mounted_with_nothing_said() {
    let folder = Folder::new();
    let experiment = folder.path().join("mlruns/1");
    for (run, stage) in [(RUN, "active"), (OTHER, "deleted")] {
        fs::create_dir_all(folder.artifacts(run)).unwrap();
        let meta = format!(
            "artifact_uri: file://{}\nend_time: null\nexperiment_id: '1'\n\
             lifecycle_stage: {stage}\nrun_id: {run}\nrun_name: 'x: ''y''\n\n  z'\n\
             start_time: 1700000000000\nstatus: 3\ntags: []\n",
            folder.artifacts(run).display()
        );
        fs::write(experiment.join(run).join("meta.yaml"), meta).unwrap();
    }
    fs::write(experiment.join("meta.yaml"), "experiment_id: '1'\n").unwrap();
    // What is being written is not there yet.
    let half = experiment.join("00000000000000000000000000000000");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("meta.yaml"), "artifact_uri: [").unwrap();
    let mount = folder.mount(&[]);
    assert_eq!(runs(&mount), [RUN]);
    assert_eq!(names(&mount.at("experiments/1")), ["x: 'y'%0Az"]);
    let told = fs::metadata(mount.at(RUN)).unwrap();
    assert_eq!(told.mtime(), 1_700_000_000);
    fs::write(mount.at(RUN).join("f"), b"content").unwrap();
    assert_eq!(
        fs::read(folder.artifacts(RUN).join("f")).unwrap(),
        b"content"
    );
    assert_eq!(errno(fs::metadata(mount.at(OTHER))), libc::ENOENT);
}

#[test]
fn where_there_is_nothing_it_is_told_what_to_set() {
    let folder = Folder::new();
    fs::create_dir(folder.path().join("runs")).unwrap();
    let refusal = |arguments: &[&str]| {
        let output = folder.run(&[&["mount", "./runs"], arguments].concat());
        assert!(!output.status.success());
        text(&output)
    };
    let said = refusal(&[]);
    assert!(said.contains("MLFLOW_TRACKING_URI"), "{said}");
    let said = refusal(&["--tracking-uri", "sqlite:///no.db"]);
    assert!(said.contains("no such file"), "{said}");
    let said = refusal(&["--tracking-uri", "./none"]);
    assert!(said.contains("no such file"), "{said}");
    fs::write(
        folder.path().join("text.db"),
        "this is a text, and no database\n".repeat(99),
    )
    .unwrap();
    let said = refusal(&["--tracking-uri", "sqlite:///text.db"]);
    assert!(said.contains("no SQLite database"), "{said}");
    rusqlite::Connection::open(folder.path().join("other.db"))
        .unwrap()
        .execute_batch("CREATE TABLE t (x)")
        .unwrap();
    let said = refusal(&["--tracking-uri", "sqlite:///other.db"]);
    assert!(said.contains("MLflow"), "{said}");
    let said = refusal(&["--tracking-uri", "postgresql://user:secret@host/db"]);
    assert!(
        said.contains("server") && !said.contains("secret"),
        "{said}"
    );
}

#[test]
fn a_run_that_is_stored_in_a_mount_is_refused() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    let inside = folder.path().join(format!("runs/{RUN}/artifacts"));
    let moved = database.execute(
        "UPDATE runs SET artifact_uri = ?1",
        [inside.to_str().unwrap()],
    );
    assert_eq!(moved.unwrap(), 1);
    let mount = folder.mount(&["--log-file", "log"]);
    assert_eq!(runs(&mount), [RUN]);
    let listed = fs::read_dir(mount.at(RUN)).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    assert_eq!(errno(listed), libc::EOPNOTSUPP);
    harness::wait_until("the log to say so", || {
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        log.contains("lies inside the mount")
    });
}

#[test]
fn a_file_is_renamed_and_rewritten_without_being_moved() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    let mount = folder.mount(&[]);
    let run = mount.at(RUN);
    fs::write(run.join("a"), noise(1 << 20)).unwrap();
    let inode = fs::metadata(folder.artifacts(RUN).join("a")).unwrap().ino();
    fs::create_dir(run.join("d")).unwrap();
    fs::rename(run.join("a"), run.join("d/b")).unwrap();
    let moved = folder.artifacts(RUN).join("d/b");
    assert_eq!(fs::metadata(&moved).unwrap().ino(), inode);
    assert!(fs::read(run.join("d/b")).unwrap() == noise(1 << 20));
    fs::rename(run.join("d"), run.join("e")).unwrap();
    assert_eq!(names(&folder.artifacts(RUN)), ["e"]);
    fs::remove_file(run.join("e/b")).unwrap();
    fs::remove_dir(run.join("e")).unwrap();
    assert!(names(&folder.artifacts(RUN)).is_empty());
}

/// The process that serves the folder's mount.
fn pid(folder: &Folder) -> i32 {
    let output = folder.run(&["status", "./runs", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    status["pid"].as_i64().unwrap() as i32
}

/// What is under way in a folder, which may not exist yet.
fn hidden(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(".artifact.uploading.")
    });
    found
}

#[test]
fn parts_of_a_mount_that_was_killed_are_gone_on_with() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    let flags = ["--part-size", "5MiB"];
    let data = noise((12 << 20) + 5);
    let first = folder.mount(&flags);
    let mut file = fs::File::create(first.at(RUN).join("model")).unwrap();
    file.write_all(&data).unwrap();
    let store = folder.artifacts(RUN);
    harness::wait_until("two parts to be stored", || {
        hidden(&store).iter().any(|it| it.join("00002").exists())
    });
    file.sync_all().unwrap();
    // SAFETY: the process is the mount's, which this test started.
    assert_eq!(unsafe { libc::kill(pid(&folder), libc::SIGKILL) }, 0);
    drop(file);
    assert!(!store.join("model").exists());
    drop(first);
    let next = folder.mount(&flags);
    let retried = folder.run(&["uploads", "retry", "--mount", "./runs"]);
    assert!(retried.status.success(), "{}", text(&retried));
    assert!(fs::read(store.join("model")).unwrap() == data);
    assert!(fs::read(next.at(RUN).join("model")).unwrap() == data);
    assert!(hidden(&store).is_empty());
}

#[test]
fn a_store_that_is_full_fails_the_close_and_takes_the_file_once_there_is_room() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    let store = folder.artifacts(RUN);
    fs::create_dir_all(&store).unwrap();
    let disk = Disk::new(&store, "8m");
    let mount = folder.mount(&["--part-size", "5MiB"]);
    fs::write(store.join("ballast"), vec![1; 4 << 20]).unwrap();
    let data = noise(6 << 20);
    let file = mount.at(RUN).join("model");
    let mut written = fs::File::create(&file).unwrap();
    written.write_all(&data).unwrap();
    assert_eq!(harness::close(written), libc::ENOSPC);
    assert!(!store.join("model").exists());
    assert!(fs::read(&file).unwrap() == data);
    fs::remove_file(store.join("ballast")).unwrap();
    let retried = folder.run(&["uploads", "retry", "--mount", "./runs"]);
    assert!(retried.status.success(), "{}", text(&retried));
    assert!(fs::read(store.join("model")).unwrap() == data);
    assert!(hidden(&store).is_empty());
    drop(mount);
    drop(disk);
}

#[test]
fn the_kernel_reads_files_of_a_local_directory_by_itself_where_nobody_writes() {
    let folder = Folder::new();
    let database = folder.database();
    folder.add(&database, RUN);
    fs::create_dir_all(folder.artifacts(RUN)).unwrap();
    let data = noise(3 << 20);
    fs::write(folder.artifacts(RUN).join("model"), &data).unwrap();
    let mount = folder.mount(&["--read-only"]);
    assert!(fs::read(mount.at(RUN).join("model")).unwrap() == data);
    let output = folder.run(&["status", "./runs", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["read"]["opened_on_disk"], 1);
    assert_eq!(status["read"]["bytes_served"], 0);
}

#[test]
fn a_run_that_a_server_tells_of_may_lie_in_a_directory_of_this_machine() {
    let lab = Lab::new();
    let folder = lab.empty_folder();
    lab.tracking
        .add_run(OTHER, &format!("file://{}/a", folder.display()));
    let mount = lab.mount();
    fs::write(mount.path.join(OTHER).join("f"), b"content").unwrap();
    assert_eq!(fs::read(folder.join("a/f")).unwrap(), b"content");
}
