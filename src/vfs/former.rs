//! What former mounts left, by id, and how far each of them is.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::upload_status::UploadStatus;
use crate::write::{Draft, Leftover};

/// What a former mount left, and what became of it.
#[derive(Debug)]
pub(super) enum Former {
    /// Not looked at yet.
    Found(Leftover),
    /// Somebody said to send it, whatever stands in its place.
    Told(Leftover),
    /// Waits for a word, and why.
    Left(Leftover, String),
    /// Being looked at or sent; `told` as above.
    Resumed {
        draft: Arc<Draft>,
        told: bool,
    },
    Busy(UploadStatus),
}

/// Everything that former mounts left and that is not done, by id.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    pub former: Mutex<BTreeMap<String, Former>>,
}

impl Former {
    pub fn status(&self) -> UploadStatus {
        match self {
            Self::Busy(status) => status.clone(),
            Self::Found(leftover) | Self::Told(leftover) => describe(leftover, "waiting", None),
            Self::Left(leftover, reason) => {
                let reason = match leftover.failure() {
                    Some(failure) => format!("{reason}; {failure}"),
                    None => reason.clone(),
                };
                describe(leftover, "left", Some(reason))
            }
            Self::Resumed { draft, .. } => {
                let reason = draft.failure();
                UploadStatus {
                    id: draft.id().to_owned(),
                    path: draft.target().path,
                    size: draft.size(),
                    since: draft.since(),
                    state: if reason.is_some() {
                        "failed"
                    } else {
                        "uploading"
                    }
                    .to_owned(),
                    reason,
                    sent: draft.sent(),
                    held_by: None,
                }
            }
        }
    }
}

fn describe(leftover: &Leftover, state: &str, reason: Option<String>) -> UploadStatus {
    UploadStatus {
        id: leftover.id().to_owned(),
        path: leftover.path().to_owned(),
        size: leftover.size(),
        since: leftover.since(),
        state: state.to_owned(),
        reason,
        sent: 0,
        held_by: None,
    }
}

impl Uploads {
    /// Takes a leftover out, to be worked on, and whether somebody said to send it; meanwhile it
    /// counts as on its way.
    pub fn take(&self, id: &str) -> Option<(Leftover, bool)> {
        self.take_if(id, |_| true)
    }

    /// Takes out one that nobody has looked at.
    pub fn take_found(&self, id: &str) -> Option<Leftover> {
        let found = |former: &Former| matches!(former, Former::Found(_));
        self.take_if(id, found).map(|(leftover, _)| leftover)
    }

    fn take_if(&self, id: &str, which: impl Fn(&Former) -> bool) -> Option<(Leftover, bool)> {
        let mut former = self.former.lock();
        let entry = former.get_mut(id).filter(|former| which(former))?;
        let busy = Former::Busy(UploadStatus {
            state: "uploading".to_owned(),
            reason: None,
            ..entry.status()
        });
        match std::mem::replace(entry, busy) {
            Former::Found(leftover) | Former::Left(leftover, _) => Some((leftover, false)),
            Former::Told(leftover) => Some((leftover, true)),
            other => {
                *entry = other;
                None
            }
        }
    }

    pub fn status(&self, id: &str) -> Option<UploadStatus> {
        self.former.lock().get(id).map(Former::status)
    }

    /// What waited for a word, or has failed, is about to be tried; nothing else is touched.
    pub fn set_waiting(&self, id: &str, told: bool) -> Option<UploadStatus> {
        let mut former = self.former.lock();
        let entry = former.remove(id)?;
        let entry = match entry {
            Former::Found(leftover) | Former::Left(leftover, _) if told => Former::Told(leftover),
            Former::Left(leftover, _) => Former::Found(leftover),
            Former::Resumed {
                draft,
                told: before,
            } => {
                draft.forget_failure();
                let told = told || before;
                Former::Resumed { draft, told }
            }
            other => other,
        };
        let status = entry.status();
        former.insert(id.to_owned(), entry);
        Some(status)
    }

    /// The ids of those at or below a path.
    pub fn below(&self, path: &str) -> Vec<String> {
        let former = self.former.lock();
        let below = former.iter().filter(|(_, former)| {
            let status = former.status();
            let rest = status.path.strip_prefix(path);
            rest.is_some_and(|rest| path.is_empty() || rest.is_empty() || rest.starts_with('/'))
        });
        below.map(|(id, _)| id.clone()).collect()
    }

    /// Whether the writer of what was left had closed it.
    pub fn was_closed(&self, id: &str) -> bool {
        match self.former.lock().get(id) {
            Some(Former::Found(leftover) | Former::Told(leftover) | Former::Left(leftover, _)) => {
                leftover.closed_at().is_some()
            }
            Some(Former::Resumed { .. } | Former::Busy(_)) => true,
            None => false,
        }
    }

    pub fn put_back(&self, leftover: Leftover, reason: String) {
        let id = leftover.id().to_owned();
        self.former
            .lock()
            .insert(id, Former::Left(leftover, reason));
    }

    pub fn draft(&self, id: &str) -> Option<Arc<Draft>> {
        match self.former.lock().get(id) {
            Some(Former::Resumed { draft, .. }) => Some(Arc::clone(draft)),
            _ => None,
        }
    }

    /// The draft, if somebody said to send it whatever stands in its place: that counts once.
    pub fn take_word(&self, id: &str) -> Option<Arc<Draft>> {
        match self.former.lock().get_mut(id) {
            Some(Former::Resumed { draft, told }) => {
                std::mem::take(told).then(|| Arc::clone(draft))
            }
            _ => None,
        }
    }
}
