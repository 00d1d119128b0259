//! Artifact URI → store and key prefix; one shared client a bucket.

use std::sync::Arc;

use super::{Store, StoreResult};

/// A place in a store: a run's artifact root, or anything below it.
#[derive(Clone, Debug)]
pub struct Location {
    pub store: Arc<dyn Store>,
    /// Without a trailing slash; empty for the store's root.
    pub prefix: String,
}

impl Location {
    /// The key of `relative` below this location.
    pub fn key(&self, relative: &str) -> String {
        match (self.prefix.is_empty(), relative.is_empty()) {
            (true, _) => relative.to_owned(),
            (false, true) => self.prefix.clone(),
            (false, false) => format!("{}/{relative}", self.prefix),
        }
    }
}

/// Opens stores by artifact URI and shares their clients and connection pools.
#[derive(Debug)]
pub struct Stores {}

impl Stores {
    /// The location an artifact URI (`s3://bucket/path`) names. No request is sent.
    ///
    /// # Errors
    /// `Unsupported` for a scheme that no store serves, `InvalidName` for a malformed URI.
    pub async fn locate(&self, _artifact_uri: &str) -> StoreResult<Location> {
        todo!("store helper")
    }
}
