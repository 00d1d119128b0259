//! Extended attributes through a mount.

mod harness;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use harness::{BUCKET, Lab, PREFIX, RUN, close, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

/// The attribute, or its errno.
fn get(path: &Path, name: &str) -> Result<String, i32> {
    let (path, name) = (text(path), CString::new(name).unwrap());
    let mut value = vec![0; 4096];
    // SAFETY: valid C strings, and a buffer of that size.
    let length = unsafe {
        let buffer = value.as_mut_ptr().cast();
        libc::getxattr(path.as_ptr(), name.as_ptr(), buffer, value.len())
    };
    if length < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    value.truncate(length as usize);
    Ok(String::from_utf8(value).unwrap())
}

fn set(path: &Path, name: &str) -> i32 {
    let (path, name) = (text(path), CString::new(name).unwrap());
    // SAFETY: valid C strings, and a value of that size.
    let outcome =
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), c"x".as_ptr().cast(), 1, 0) };
    assert_eq!(outcome, -1);
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

fn text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

#[test]
fn a_file_tells_its_run_its_uri_its_version_and_that_it_is_stored() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/f"), b"content").unwrap();
    let file = mount.at("d/f");
    assert_eq!(get(&file, "user.mlflow.run_id").as_deref(), Ok(RUN));
    let uri = format!("s3://{BUCKET}/{PREFIX}/d/f");
    assert_eq!(get(&file, "user.mlflow.artifact_uri"), Ok(uri));
    assert_eq!(get(&file, "user.mlfs.state").as_deref(), Ok("stored"));
    // Without quotes.
    let etag = get(&file, "user.mlfs.etag").unwrap();
    assert!(etag.len() == 32 && etag.starts_with("lab"), "{etag}");
    let run = mount.at("");
    assert_eq!(get(&run, "user.mlflow.run_id").as_deref(), Ok(RUN));
    let uri = format!("s3://{BUCKET}/{PREFIX}");
    assert_eq!(get(&run, "user.mlflow.artifact_uri"), Ok(uri));
    assert_eq!(get(&run, "user.mlfs.etag"), Err(libc::ENODATA));
    assert_eq!(get(&mount.path, "user.mlfs.state"), Err(libc::ENODATA));
}

#[test]
fn attributes_are_told_and_neither_set_nor_copied() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::write(mount.at("f"), b"content").unwrap();
    let file = mount.at("f");
    assert_eq!(set(&file, "user.mlfs.state"), libc::EPERM);
    assert_eq!(set(&file, "user.other"), libc::EOPNOTSUPP);
    assert_eq!(get(&file, "user.other"), Err(libc::ENODATA));
    assert_eq!(get(&file, "security.selinux"), Err(libc::EOPNOTSUPP));
    // So whoever copies a file with all that is listed of it has nothing to complain of.
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&file, &mount.at("copy")])
        .output()
        .unwrap();
    assert!(
        copied.status.success() && copied.stderr.is_empty(),
        "{copied:?}"
    );
    drop(mount);
    let mount = lab.mount_with(&["--read-only"]);
    assert_eq!(set(&mount.at("f"), "user.mlfs.state"), libc::EROFS);
}

#[test]
fn what_is_not_stored_yet_says_how_far_it_is() {
    let lab = Lab::new();
    let mount = lab.mount_with(&["--part-size", "5MiB", "--close-timeout", "1s"]);
    let path = mount.at("f");
    lab.s3.hold(Kind::CompleteMultipart);
    let mut file = File::create(&path).unwrap();
    file.write_all(&noise(20 << 20)).unwrap();
    wait_until("the first parts to be there", || {
        get(&path, "user.mlfs.state").is_ok_and(|state| state.starts_with("uploading"))
            && lab.s3.stats().of(Kind::UploadPart).requests >= 3
    });
    assert_eq!(get(&path, "user.mlfs.etag"), Err(libc::ENODATA));
    let run = get(&mount.at(""), "user.mlfs.state").unwrap();
    assert!(run.starts_with("uploading"), "{run}");
    let closing = std::thread::spawn(move || close(file));
    wait_until("nearly all of it", || {
        get(&path, "user.mlfs.state").as_deref() == Ok("uploading 99%")
    });
    lab.s3.release(Kind::CompleteMultipart);
    assert_eq!(closing.join().unwrap(), 0);
    assert_eq!(get(&path, "user.mlfs.state").as_deref(), Ok("stored"));
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Put, refused)]);
    let mut file = File::create(mount.at("refused")).unwrap();
    file.write_all(b"x").unwrap();
    assert_eq!(close(file), libc::EACCES);
    let state = get(&mount.at("refused"), "user.mlfs.state").unwrap();
    assert!(state.starts_with("failed: "), "{state}");
}
