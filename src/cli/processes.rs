//! Who works in a mount, and who serves it, as `/proc` tells; the mount itself is not touched.

use std::path::{Path, PathBuf};

/// A process, and what it has to do with a path.
struct Process {
    pid: u32,
    name: String,
    /// Where it stands.
    folder: Option<PathBuf>,
    /// What it has open.
    files: Vec<PathBuf>,
}

fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let processes = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let folder = entry.path();
        let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
        let files = std::fs::read_dir(folder.join("fd"));
        let files = files.into_iter().flatten().flatten();
        Some(Process {
            pid,
            name: name.trim().to_owned(),
            // A link of `/proc` is read without going where it leads.
            folder: std::fs::read_link(folder.join("cwd")).ok(),
            files: files
                .filter_map(|file| std::fs::read_link(file.path()).ok())
                .collect(),
        })
    });
    processes.collect()
}

/// Processes that have something below `path` open, or stand in it; not the one that serves it.
pub(super) fn users(path: &Path, server: u32) -> Vec<String> {
    all()
        .iter()
        .filter(|process| process.pid != server)
        .filter(|process| {
            let mut paths = process.files.iter().chain(&process.folder);
            paths.any(|it| it.starts_with(path))
        })
        .map(|process| format!("{} (pid {})", process.name, process.pid))
        .collect()
}

/// The process that serves the mount on `path`: the mlfs that has the directory below it open.
pub(super) fn server(path: &Path) -> Option<u32> {
    let found = all()
        .into_iter()
        .find(|process| process.name == "mlfs" && process.files.iter().any(|it| it == path));
    found.map(|process| process.pid)
}
