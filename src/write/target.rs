//! Where a file goes.

use std::sync::Arc;

use crate::store::Store;

/// Where a draft is to be published.
#[derive(Clone, Debug)]
pub struct Target {
    pub store: Arc<dyn Store>,
    pub key: String,
    /// Below the mount point, for people.
    pub path: String,
}

impl Target {
    pub fn object(&self) -> String {
        format!("{}/{}", self.store.name(), self.key)
    }

    /// Whether the name looks like one that will be renamed before long; then nothing is sent
    /// under it while writing goes on, as long as there is room.
    pub(super) fn looks_temporary(&self) -> bool {
        let name = self.key.rsplit('/').next().unwrap_or_default();
        name.starts_with('.')
            || name.ends_with(".tmp")
            || name.ends_with('~')
            || name.contains(".tmp.")
            || name.contains(".incomplete")
    }
}
