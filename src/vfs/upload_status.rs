//! What is not stored, as people see it.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// An upload that is not done, as people see it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UploadStatus {
    pub id: String,
    /// Below the mount point.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// When it was begun, in seconds since 1970.
    pub since: u64,
    /// `open`, `uploading`, `waiting`, `failed`, or `left` by a former mount.
    pub state: String,
    /// Why it failed, or waits for a word.
    pub reason: Option<String>,
    /// Bytes of it that the store has confirmed; they become visible with the last.
    #[serde(default)]
    pub sent: u64,
    /// The path of what has to be stored before it: it makes its directory loadable.
    #[serde(default)]
    pub held_by: Option<String>,
}

/// Of uploads, those that are stored in the end if nobody says a word: not those that wait for one,
/// and none that has to wait for one of them. A file that is open for writing counts as one that
/// will be closed, or, unless `open`, as one that will not.
pub fn moving(uploads: &[UploadStatus], open: bool) -> Vec<&UploadStatus> {
    let stays =
        |upload: &UploadStatus| upload.waits_for_a_word() || (!open && upload.state == "open");
    let mut stuck: HashSet<&str> = HashSet::new();
    loop {
        let before = stuck.len();
        for upload in uploads {
            let held = upload
                .held_by
                .as_deref()
                .is_some_and(|by| stuck.contains(by));
            if stays(upload) || held {
                stuck.insert(&upload.path);
            }
        }
        if stuck.len() == before {
            break;
        }
    }
    let moving = uploads.iter().filter(|upload| {
        let held = upload
            .held_by
            .as_deref()
            .is_some_and(|by| stuck.contains(by));
        !stays(upload) && !held
    });
    moving.collect()
}

impl UploadStatus {
    /// Whether nothing goes on with it by itself.
    pub fn waits_for_a_word(&self) -> bool {
        matches!(self.state.as_str(), "failed" | "left")
    }
}
