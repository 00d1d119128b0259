//! How far the store has got: a bar on a terminal, a line now and then elsewhere.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::vfs::UploadStatus;

/// How often progress is printed where there is no terminal.
const SAY: Duration = Duration::from_secs(5);
/// Of a bar: bytes done, in all, a second, and the time that is left.
const LOOK: &str =
    "{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}";

/// Progress of uploads that are looked at again and again.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    said: Instant,
    /// Every upload that was seen, and its size, bytes.
    seen: HashMap<String, u64>,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            bar: io::stderr().is_terminal().then(bar),
            said: Instant::now(),
            seen: HashMap::new(),
        }
    }

    /// These are not stored yet; whatever was seen before and is not among them is.
    pub fn show(&mut self, uploads: &[&UploadStatus]) {
        let mut left = 0;
        for upload in uploads {
            self.seen.insert(upload.id.clone(), upload.size);
            left += upload.size.saturating_sub(upload.sent);
        }
        let total: u64 = self.seen.values().sum();
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(total.saturating_sub(left));
            bar.set_message(format!("{} files left", uploads.len()));
        } else if self.said.elapsed() > SAY {
            eprintln!(
                "mlfs: waiting for {} files ({left} bytes) to be stored",
                uploads.len()
            );
            self.said = Instant::now();
        }
    }

    /// Takes the bar away, for other words to be printed.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// An empty bar that counts bytes.
pub(super) fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    // The template is tested; a bar without it is a bar.
    match ProgressStyle::with_template(LOOK) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(id: &str, size: u64, sent: u64) -> UploadStatus {
        UploadStatus {
            id: id.to_owned(),
            path: id.to_owned(),
            size,
            since: 0,
            state: "uploading".to_owned(),
            reason: None,
            sent,
            held_by: None,
        }
    }

    #[test]
    fn the_template_of_the_bar_is_one() {
        assert!(ProgressStyle::with_template(LOOK).is_ok());
    }

    #[test]
    fn what_is_gone_counts_as_stored_and_parts_count_before_that() {
        let bar = ProgressBar::hidden();
        let mut progress = Progress {
            bar: Some(bar.clone()),
            said: Instant::now(),
            seen: HashMap::new(),
        };
        let (one, two) = (upload("a", 100, 0), upload("b", 50, 20));
        progress.show(&[&one, &two]);
        assert_eq!((bar.position(), bar.length()), (20, Some(150)));
        progress.show(&[&two]);
        assert_eq!((bar.position(), bar.length()), (120, Some(150)));
        progress.show(&[]);
        assert_eq!(bar.position(), 150);
    }
}
