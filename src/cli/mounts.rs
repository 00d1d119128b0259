//! What is mounted where.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::vfs::Status;

/// The type of the filesystem mounted exactly at `path`, if one is.
pub(super) fn mounted(path: &Path) -> anyhow::Result<Option<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    // Symlinks above the mount point are resolved; the mount itself may be dead and is not asked.
    let path = resolve_parent(path);
    let found = table
        .lines()
        .filter_map(parse)
        // The mount made last hides the ones below it.
        .rfind(|(at, _)| *at == path);
    Ok(found.map(|(_, kind)| kind))
}

fn resolve_parent(path: &Path) -> PathBuf {
    match (
        path.parent().and_then(|parent| parent.canonicalize().ok()),
        path.file_name(),
    ) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// `36 35 98:0 / /mnt/x rw,noatime master:1 - fuse.mlfs mlfs rw` → mount point and type.
fn parse(line: &str) -> Option<(PathBuf, String)> {
    let (before, after) = line.split_once(" - ")?;
    let path = before.split(' ').nth(4)?;
    let (kind, source) = {
        let mut words = after.split(' ');
        (words.next()?, words.next()?)
    };
    // A mount made by root directly carries no subtype; the source then tells whose it is.
    let kind = if kind == "fuse" {
        format!("fuse.{source}")
    } else {
        kind.to_owned()
    };
    Some((PathBuf::from(unescape(path)), kind))
}

/// The table writes a space as `\040`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
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
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether the process behind the mount is gone.
pub(super) fn is_dead(path: &Path) -> bool {
    let error = std::fs::metadata(path).err();
    error.and_then(|error| error.raw_os_error()) == Some(libc::ENOTCONN)
}

/// Fails unless an mlfs mount is at `path`.
pub(super) fn check_mlfs(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    match mounted(path)?.as_deref() {
        Some("fuse.mlfs") => Ok(()),
        Some(kind) => bail!("{shown}: mounted, but by {kind}, not by mlfs"),
        None => bail!("{shown}: nothing is mounted here"),
    }
}

/// Asks a running mount what it is doing.
pub(super) fn ask(path: &Path) -> anyhow::Result<Status> {
    let file = path.join(".mlfs").join("status");
    let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{}: not understood; is it another version's?",
            file.display()
        )
    })
}

/// Asks a running mount to send what is closed and unsent.
pub(super) fn drain(path: &Path) -> io::Result<()> {
    std::fs::write(path.join(".mlfs").join("drain"), b"now\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read_with_its_escapes() {
        let line = r"36 35 0:98 / /mnt/my\040runs rw,noatime shared:1 - fuse.mlfs mlfs rw";
        assert_eq!(
            parse(line),
            Some((PathBuf::from("/mnt/my runs"), "fuse.mlfs".to_owned()))
        );
    }
}
