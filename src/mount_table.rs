//! What is mounted where, as the kernel's table tells it.
//!
//! Nothing here touches an mlfs mount: of one whose process is gone nothing can be asked, and a
//! call into one whose process is stopped never returns.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};

/// How the table calls a mount of mlfs.
const MLFS: &str = "fuse.mlfs";
/// Most symlinks on the way to a mount point; the kernel's own limit.
const MOST_SYMLINKS: u32 = 40;

/// Where a path leads.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// To where mlfs is mounted.
    Mount(PathBuf),
    /// To something inside the mount at the first path: the second, below it.
    Inside(PathBuf, PathBuf),
    /// To where something else is mounted: the path and the type of filesystem.
    Foreign(PathBuf, String),
    /// To something that nothing is mounted on; without symlinks.
    Free(PathBuf),
}

/// Mounts, in the order of mounting.
pub struct Table(Vec<Mount>);

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    path: PathBuf,
    kind: String,
    device: String,
}

impl Table {
    /// # Errors
    /// The kernel does not give it.
    pub fn read() -> anyhow::Result<Self> {
        // Bytes: a path need not be UTF-8.
        let text = std::fs::read("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
        let lines = text.split(|byte| *byte == b'\n');
        Ok(Self(lines.filter_map(parse).collect()))
    }

    /// The mount made last hides the ones below it.
    fn at(&self, path: &Path) -> Option<&Mount> {
        self.0.iter().rfind(|mount| mount.path == path)
    }

    /// The type of filesystem that is mounted there.
    fn kind(&self, path: &Path) -> Option<&str> {
        self.at(path).map(|mount| mount.kind.as_str())
    }

    /// The device number of what is mounted there, such as `0:98`.
    pub fn device(&self, path: &Path) -> Option<&str> {
        self.at(path).map(|mount| mount.device.as_str())
    }

    fn is_mlfs(&self, path: &Path) -> bool {
        self.kind(path) == Some(MLFS)
    }

    /// Where mlfs is mounted, each place once.
    pub fn of_mlfs(&self) -> Vec<PathBuf> {
        let mut mounts: Vec<PathBuf> = self.0.iter().map(|mount| mount.path.clone()).collect();
        mounts.retain(|path| self.is_mlfs(path));
        mounts.dedup();
        mounts
    }
}

/// Follows a path and its symlinks up to where mlfs is mounted, and no step further.
///
/// # Errors
/// A part of the path that does not exist or may not be looked at.
pub fn locate(path: &Path) -> anyhow::Result<Place> {
    let table = Table::read()?;
    let shown = path.display();
    let whole = std::path::absolute(path).with_context(|| shown.to_string())?;
    let mut found = PathBuf::from("/");
    let mut rest = parts(&whole);
    let mut symlinks = 0;
    while let Some(part) = rest.pop() {
        if part == ".." {
            found.pop();
            continue;
        }
        if table.is_mlfs(&found) {
            let mut inside = vec![part];
            while let Some(part) = rest.pop() {
                // No symlink of a mount is followed here.
                if part == ".." {
                    inside.pop();
                } else {
                    inside.push(part);
                }
            }
            return Ok(Place::Inside(found, inside.into_iter().collect()));
        }
        found.push(part);
        if table.is_mlfs(&found) {
            continue;
        }
        let metadata = found
            .symlink_metadata()
            .with_context(|| found.display().to_string())?;
        if metadata.is_symlink() {
            symlinks += 1;
            if symlinks > MOST_SYMLINKS {
                bail!("{shown}: too many symlinks; give the directory they lead to");
            }
            let target = found
                .read_link()
                .with_context(|| found.display().to_string())?;
            found.pop();
            if target.is_absolute() {
                found = PathBuf::from("/");
            }
            rest.extend(parts(&target));
        }
    }
    Ok(match table.kind(&found) {
        Some(MLFS) => Place::Mount(found),
        Some(kind) => Place::Foreign(found.clone(), kind.to_owned()),
        None => Place::Free(found),
    })
}

/// The names of a path, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let names = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    });
    names.collect()
}

/// `36 35 98:0 / /mnt/x rw,noatime master:1 - fuse.mlfs mlfs rw`
fn parse(line: &[u8]) -> Option<Mount> {
    let separator = line.windows(3).position(|window| window == b" - ")?;
    let (before, after) = (&line[..separator], &line[separator + 3..]);
    let mut fields = before.split(|byte| *byte == b' ');
    let device = String::from_utf8_lossy(fields.nth(2)?).into_owned();
    let path = PathBuf::from(unescape(fields.nth(1)?));
    let mut words = after
        .split(|byte| *byte == b' ')
        .map(String::from_utf8_lossy);
    let (kind, source) = (words.next()?, words.next()?);
    // A mount made by root directly carries no subtype; the source then tells whose it is.
    let kind = if kind == "fuse" {
        format!("fuse.{source}")
    } else {
        kind.into_owned()
    };
    Some(Mount { path, kind, device })
}

/// The table writes a space as `\040`.
fn unescape(mut rest: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = code.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match byte {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn the_mount_table_is_read_with_its_escapes_and_whatever_its_bytes() {
        let line = b"36 35 0:98 / /mnt/my\\040runs\xff rw,noatime shared:1 - fuse.mlfs mlfs rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.path, OsStr::from_bytes(b"/mnt/my runs\xff"));
        assert_eq!((&*mount.kind, &*mount.device), ("fuse.mlfs", "0:98"));
        let by_root = b"36 35 0:98 / /mnt/x rw - fuse mlfs rw";
        assert_eq!(parse(by_root).unwrap().kind, "fuse.mlfs");
    }

    #[test]
    fn symlinks_and_parents_are_followed_and_a_loop_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        std::fs::create_dir_all(folder.join("a/b")).unwrap();
        std::os::unix::fs::symlink("a/../a/./b", folder.join("link")).unwrap();
        std::os::unix::fs::symlink(folder.join("link"), folder.join("a/other")).unwrap();
        std::os::unix::fs::symlink("loop", folder.join("loop")).unwrap();
        let expected = Place::Free(folder.join("a/b"));
        assert_eq!(locate(&folder.join("a/other")).unwrap(), expected);
        let error = locate(&folder.join("loop")).unwrap_err().to_string();
        assert!(error.contains("symlinks"), "{error}");
    }
}
