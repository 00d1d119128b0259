//! Whose publication has which names in the store: one at a time has each.
//!
//! A file that is renamed while it is sent has its former name too, until all of it is copied from
//! there.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::draft::Draft;

/// Names in the stores, as [`super::target::Target::object`] tells them.
#[derive(Debug, Default)]
pub(super) struct Names {
    held: Mutex<HashSet<String>>,
    freed: Notify,
    /// Under which a file was left that was renamed while it was sent.
    former: Mutex<HashMap<String, Weak<Draft>>>,
}

/// Names that nobody else has until this goes.
#[derive(Debug)]
pub(super) struct HeldNames {
    names: Arc<Names>,
    held: Vec<String>,
}

impl Names {
    /// All of `wanted`, none of which may be there twice, if nobody has any of them.
    pub fn try_hold(self: &Arc<Self>, wanted: &[String]) -> Option<HeldNames> {
        let mut held = self.held.lock();
        if wanted.iter().any(|name| held.contains(name)) {
            return None;
        }
        held.extend(wanted.iter().cloned());
        Some(HeldNames {
            names: Arc::clone(self),
            held: wanted.to_vec(),
        })
    }

    /// Waits for all of `wanted`, and has none of them meanwhile: no two wait for each other.
    pub async fn hold(self: &Arc<Self>, wanted: &[String]) -> HeldNames {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(held) = self.try_hold(wanted) {
                return held;
            }
            freed.await;
        }
    }

    /// From now on `draft` lies under `name`, until it says otherwise.
    pub fn leave(&self, name: String, draft: &Arc<Draft>) {
        self.former.lock().insert(name, Arc::downgrade(draft));
    }

    /// Whoever was left under `name`, and may be gone from there by now.
    pub fn left(&self, name: &str) -> Option<Arc<Draft>> {
        let former = self.former.lock();
        former.get(name).and_then(Weak::upgrade)
    }

    /// Nobody lies under `name` any more.
    pub fn clear(&self, name: &str) {
        self.former.lock().remove(name);
    }
}

impl Drop for HeldNames {
    fn drop(&mut self) {
        let mut held = self.names.held.lock();
        for name in &self.held {
            held.remove(name);
        }
        drop(held);
        self.names.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_name_is_free_again_when_who_had_it_is_done() {
        let names = Arc::new(Names::default());
        let first = names.try_hold(&named(&["a", "b"])).unwrap();
        assert!(names.try_hold(&named(&["b", "c"])).is_none());
        assert!(names.try_hold(&named(&["c"])).is_some());
        drop(first);
        assert!(names.try_hold(&named(&["b", "c"])).is_some());
    }

    #[tokio::test]
    async fn two_that_want_the_same_names_have_them_one_after_the_other() {
        let names = Arc::new(Names::default());
        let first = names.hold(&named(&["a", "b"])).await;
        let wanted = named(&["b", "a"]);
        let (second, ()) = tokio::join!(names.hold(&wanted), async { drop(first) });
        assert!(names.try_hold(&named(&["a"])).is_none());
        drop(second);
        assert!(names.held.lock().is_empty());
    }
}
