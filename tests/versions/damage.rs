//! Damage to a disk cache, while it is in use.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::sample::Index;

use super::operations::Damage;

/// The folders of the versions below a cache's folder.
fn versions(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join("v1")).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("identity").is_file())
        .collect();
    found.sort();
    found
}

/// Damages a version, with the help of another. What the cache deletes meanwhile cannot be damaged,
/// and that is no error.
pub fn damage(folder: &Path, damage: Damage, one: Index, other: Index) {
    let versions = versions(folder);
    if versions.is_empty() {
        return;
    }
    let (one, other) = (one.get(&versions), other.get(&versions));
    let copy = |name: &str| fs::copy(other.join(name), one.join(name)).map(drop);
    let open = |name: &str| OpenOptions::new().write(true).open(one.join(name));
    let _ = match damage {
        Damage::FlippedBytes => flip(&one.join("data")),
        Damage::Truncated => open("data").and_then(|file| file.set_len(40_000)),
        Damage::GarbageIndex => open("index").and_then(|file| {
            let length = file.metadata()?.len();
            file.write_all_at(&vec![0xa5; length as usize], 0)
        }),
        Damage::OthersData => copy("data"),
        Damage::OthersDataAndIndex => copy("data").and_then(|()| copy("index")),
        Damage::OthersFolder if one != other => {
            let _ = fs::remove_dir_all(one);
            fs::rename(other, one)
        }
        Damage::OthersFolder => Ok(()),
        Damage::Removed => fs::remove_dir_all(one),
    };
}

/// One byte in every block is another.
fn flip(path: &Path) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    for at in (1000..file.metadata()?.len()).step_by(32 << 10) {
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 1], at)?;
    }
    Ok(())
}
