//! What listings cost and how they stream, through a mount.

mod harness;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use harness::{Lab, Mount, errno, names, wait_until};
use mlfs_lab::s3::Kind;

/// Keys of one page.
const PAGE: usize = 1000;

fn listings(lab: &Lab) -> usize {
    lab.s3.stats().of(Kind::List).requests as usize
}

/// Has the kernel let go of every name of the mount that nobody uses.
fn forget_names(mount: &Mount<'_>) {
    let path = CString::new(mount.path.as_os_str().as_encoded_bytes()).unwrap();
    let nothing = std::ptr::null();
    // SAFETY: a valid C string that outlives the call; the others may be null.
    let outcome = unsafe {
        libc::mount(
            nothing,
            path.as_ptr(),
            nothing,
            libc::MS_REMOUNT,
            nothing.cast(),
        )
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

fn run(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", harness::text(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_listing_of_many_pages_streams_one_page_ahead_and_holds_up_nobody() {
    const FILES: usize = 99_999;
    let lab = Lab::new();
    for index in 0..FILES {
        lab.put(&format!("f{index:05}"), vec![0; index % 7]);
    }
    lab.put("other/g", b"content".as_slice());
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    lab.s3.hold_further_pages();
    let mut entries = fs::read_dir(mount.at("")).unwrap();
    assert_eq!(entries.by_ref().take(PAGE).count(), PAGE);
    // The next page is asked for before the reader is there, and no more than that.
    wait_until("the next page to be asked for", || listings(&lab) == 2);
    assert_eq!(names(&mount.at("other")), ["g"]);
    assert_eq!(fs::read(mount.at("other/g")).unwrap(), b"content");
    let others = listings(&lab) - 2;
    assert!(others <= 2, "{others}");

    lab.s3.release_further_pages();
    let mut count = PAGE;
    for entry in entries.map(Result::unwrap) {
        // As `ls -l` does.
        let metadata = entry.metadata().unwrap();
        let name = entry.file_name().into_string().unwrap();
        if let Some(index) = name.strip_prefix('f') {
            let index: u64 = index.parse().unwrap();
            assert_eq!(metadata.len(), index % 7, "{name}");
        }
        count += 1;
    }
    assert_eq!(count, FILES + 1);
    assert_eq!(listings(&lab) - others, (FILES + 1).div_ceil(PAGE));

    lab.s3.reset_stats();
    for index in (0..FILES).step_by(83) {
        let name = format!("f{index:05}");
        let length = fs::metadata(mount.at(&name)).unwrap().len();
        assert_eq!(length, index as u64 % 7);
        assert_eq!(
            errno(fs::metadata(mount.at(&format!("{name}x")))),
            libc::ENOENT
        );
    }
    assert_eq!(lab.s3.stats().requests(), 0);
}

#[test]
fn names_of_the_pages_that_have_come_are_known_while_the_rest_is_awaited() {
    let lab = Lab::new();
    for index in 0..3 * PAGE {
        lab.put(&format!("f{index:05}"), vec![0; 3]);
    }
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    lab.s3.hold_further_pages();
    let mut entries = fs::read_dir(mount.at("")).unwrap();
    assert_eq!(entries.by_ref().take(PAGE).count(), PAGE);
    wait_until("the next page to be asked for", || listings(&lab) == 2);
    for index in 0..PAGE {
        assert!(fs::metadata(mount.at(&format!("f{index:05}"))).is_ok());
    }
    assert_eq!(listings(&lab), 2);
    lab.s3.release_further_pages();
    assert_eq!(entries.count(), 2 * PAGE);
}

#[test]
fn what_is_changed_while_a_listing_is_read_stays_changed() {
    let lab = Lab::new();
    for index in 0..3 * PAGE {
        lab.put(&format!("f{index:05}"), vec![0; 3]);
    }
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    assert_eq!(names(&mount.at("")).len(), 3 * PAGE);
    let mut entries = fs::read_dir(mount.at("")).unwrap();
    assert!(entries.next().is_some());
    let (rewritten, removed) = (mount.at("f02999"), mount.at("f02998"));
    fs::write(&rewritten, b"rewritten").unwrap();
    let inode = fs::metadata(&rewritten).unwrap().ino();
    fs::remove_file(&removed).unwrap();
    // As `ls -l` does: so the kernel asks for names with their attributes.
    for entry in entries.map(Result::unwrap) {
        let found = entry.metadata();
        assert!(found.is_ok() || entry.path() == removed);
    }
    let metadata = fs::metadata(&rewritten).unwrap();
    assert_eq!((metadata.len(), metadata.ino()), (9, inode));
    assert_eq!(fs::read(&rewritten).unwrap(), b"rewritten");
    assert_eq!(errno(fs::metadata(&removed)), libc::ENOENT);
    assert_eq!(errno(fs::read(&removed)), libc::ENOENT);
}

#[test]
fn what_a_listing_took_is_given_back_once_nobody_looks_any_more() {
    let lab = Lab::new();
    for index in 0..20 * PAGE {
        lab.put(&format!("f{index:05}"), b"".as_slice());
    }
    let mount = lab.mount_with(&["--metadata-ttl", "500ms"]);
    assert_eq!(names(&mount.at("")).len(), 20 * PAGE);
    run("ls", &["-l"], &mount.at(""));
    let names_known = || mount.status()["names"].as_u64().unwrap();
    wait_until("the names to be forgotten", || names_known() < 100);
    forget_names(&mount);
    let inodes = || mount.status()["inodes"].as_u64().unwrap();
    wait_until("the inodes to be forgotten", || inodes() < 100);
    assert!(mount.memory("VmRSS") < 250, "{} MiB", mount.memory("VmRSS"));
}

#[test]
fn find_and_du_cost_one_listing_a_directory_and_show_the_stored_sizes() {
    let lab = Lab::new();
    let mut directories = 1;
    let mut bytes = 0;
    let mut blocks = 0;
    for outer in 0..8 {
        directories += 1;
        for inner in 0..3 {
            directories += 1;
            for file in 0..4 {
                let size = outer * 1000 + inner * 100 + file;
                lab.put(&format!("d{outer}/e{inner}/f{file}"), vec![1; size]);
                bytes += size;
                blocks += size.div_ceil(512);
            }
        }
    }
    let mount = lab.mount();
    lab.s3.reset_stats();
    let found = run("find", &[], &mount.at(""));
    assert_eq!(found.lines().count(), directories + 8 * 3 * 4);
    assert!(listings(&lab) <= directories, "{}", listings(&lab));

    let fresh = lab.mount();
    lab.s3.reset_stats();
    let total = |flags: &[&str]| {
        let told = run("du", flags, &fresh.at(""));
        let number = told.split_whitespace().next().unwrap();
        number.parse::<usize>().unwrap()
    };
    assert_eq!(total(&["-s", "--block-size=1"]), blocks * 512);
    assert!(listings(&lab) <= directories, "{}", listings(&lab));
    assert_eq!(total(&["-s", "-b"]), bytes);
    let file = fs::metadata(fresh.at("d7/e2/f3")).unwrap();
    assert_eq!((file.len(), file.blocks()), (7203, 15));
    assert_eq!(lab.s3.stats().requests(), listings(&lab) as u64);
}

#[test]
fn df_shows_more_room_than_anybody_needs() {
    let lab = Lab::new();
    let mount = lab.mount();
    let path = CString::new(mount.at("").as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: statvfs is a plain structure of numbers.
    let mut told: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a valid C string and a structure of the right type.
    assert_eq!(unsafe { libc::statvfs(path.as_ptr(), &raw mut told) }, 0);
    assert_eq!(told.f_blocks * told.f_frsize, 1 << 50);
    assert_eq!(
        (told.f_bfree, told.f_bavail),
        (told.f_blocks, told.f_blocks)
    );
    assert!(told.f_ffree > 1_000_000_000 && told.f_files >= told.f_ffree);
    assert_eq!(told.f_namemax, 255);
    let shown = run("df", &["--output=pcent"], &mount.path);
    assert_eq!(shown.lines().last().map(str::trim), Some("0%"));
}

#[test]
fn what_is_missing_is_asked_for_once_and_seen_at_once_when_it_is_made_here() {
    let lab = Lab::new();
    for index in 0..2 * PAGE {
        lab.put(&format!("large/f{index:04}"), b"".as_slice());
    }
    lab.put("small/f", b"".as_slice());
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    for directory in ["large", "small"] {
        let missing = mount.at(&format!("{directory}/missing"));
        assert_eq!(errno(fs::metadata(&missing)), libc::ENOENT);
        lab.s3.reset_stats();
        for _ in 0..50 {
            assert_eq!(errno(fs::metadata(&missing)), libc::ENOENT);
            assert_eq!(errno(fs::File::open(&missing)), libc::ENOENT);
        }
        assert_eq!(lab.s3.stats().requests(), 0);
        fs::write(&missing, b"here").unwrap();
        assert_eq!(fs::read(&missing).unwrap(), b"here");
    }
}

#[test]
fn names_of_a_large_directory_that_are_looked_at_in_order_are_asked_for_by_the_page() {
    let lab = Lab::new();
    for index in 0..6 * PAGE {
        lab.put(&format!("f{index:04}"), vec![0; index % 5]);
    }
    let mount = lab.mount_with(&["--metadata-ttl", "forever"]);
    // As after a listing that is not believed any more: nothing is known.
    for index in 0..6 * PAGE {
        let length = fs::metadata(mount.at(&format!("f{index:04}")))
            .unwrap()
            .len();
        assert_eq!(length, index as u64 % 5);
    }
    assert!(listings(&lab) < 30, "{}", listings(&lab));

    // Those that are looked at here and there, or are missing, cost little more than one each.
    let another = lab.mount_with(&["--metadata-ttl", "forever"]);
    lab.s3.reset_stats();
    for index in 0..100 {
        let there = format!("f{:04}", 1000 + index * 3049 % 5000);
        assert!(fs::metadata(another.at(&there)).is_ok());
        let missing = fs::metadata(another.at(&format!("g{index:04}")));
        assert_eq!(errno(missing), libc::ENOENT);
    }
    assert!(listings(&lab) < 230, "{}", listings(&lab));
}

#[test]
fn without_a_metadata_ttl_every_look_is_answered_by_the_store() {
    let lab = Lab::new();
    for index in 0..2 * PAGE {
        lab.put(&format!("f{index:04}"), b"".as_slice());
    }
    let mount = lab.mount_with(&["--metadata-ttl", "0"]);
    for round in 0..5 {
        assert_eq!(fs::metadata(mount.at("f1500")).unwrap().len(), round);
        lab.put("f1500", vec![0; round as usize + 1]);
        let new = format!("new{round}");
        assert_eq!(errno(fs::metadata(mount.at(&new))), libc::ENOENT);
        lab.put(&new, b"".as_slice());
        assert!(fs::metadata(mount.at(&new)).is_ok());
        lab.s3.reset_stats();
        assert!(fs::metadata(mount.at("f1501")).is_ok());
        // No page is asked for that would not be believed.
        assert_eq!(listings(&lab), 1);
        assert_eq!(names(&mount.at("")).len(), 2 * PAGE + round as usize + 1);
    }
}

#[test]
fn a_finished_run_is_believed_no_longer_than_another_but_where_its_artifacts_are() {
    let lab = Lab::new();
    lab.tracking.finish_run(harness::RUN);
    lab.put("f", b"one".as_slice());
    let asked = || {
        let requests = lab.tracking.requests();
        requests
            .iter()
            .filter(|it| it.ends_with("runs/get"))
            .count()
    };
    // Each look asks whether the run is there, and none where its artifacts are.
    let mount = lab.mount_with(&["--metadata-ttl", "0"]);
    for _ in 0..3 {
        let before = asked();
        assert_eq!(names(&mount.at("")), ["f"]);
        assert_eq!(asked() - before, 1);
    }
    // Anybody may go on logging to it, and delete it.
    lab.put("f", b"other".as_slice());
    lab.put("g", b"".as_slice());
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"other");
    assert_eq!(names(&mount.at("")), ["f", "g"]);
    lab.tracking.remove_run(harness::RUN);
    assert_eq!(errno(fs::metadata(mount.at("f"))), libc::ENOENT);

    let lab = Lab::new();
    lab.tracking.finish_run(harness::RUN);
    let mount = lab.mount_with(&["--metadata-ttl", "100ms"]);
    assert_eq!(names(&mount.at("")), [""; 0]);
    lab.put("late", b"".as_slice());
    wait_until("what was logged late", || mount.at("late").exists());
    lab.tracking.remove_run(harness::RUN);
    wait_until("the run to be gone", || !mount.at("").exists());
}
