//! Artifact URI → store and key prefix; one client for all buckets, one store a bucket.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use url::Url;

use super::local::{self, LocalStore, LocalUri};
use super::metrics::StoreMetrics;
use super::proxy::{Address, ProxySettings, ProxyStore};
use super::s3::{S3Client, S3Settings, S3Store};
use super::{Store, StoreError, StoreResult};

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

/// How stores of each kind are reached.
#[derive(Clone, Debug, Default)]
pub struct StoreSettings {
    pub s3: S3Settings,
    pub proxy: ProxySettings,
}

impl From<S3Settings> for StoreSettings {
    fn from(s3: S3Settings) -> Self {
        Self {
            s3,
            ..Self::default()
        }
    }
}

/// Opens stores by artifact URI and shares their clients and connection pools.
#[derive(Debug)]
pub struct Stores {
    settings: StoreSettings,
    client: tokio::sync::OnceCell<Arc<S3Client>>,
    buckets: Mutex<HashMap<String, Arc<dyn Store>>>,
    /// By the address of their routes.
    proxies: Mutex<HashMap<String, Arc<dyn Store>>>,
    local: Arc<dyn Store>,
    metrics: Arc<StoreMetrics>,
}

impl Stores {
    pub fn new(settings: impl Into<StoreSettings>) -> Self {
        let metrics = Arc::<StoreMetrics>::default();
        Self {
            settings: settings.into(),
            client: tokio::sync::OnceCell::new(),
            buckets: Mutex::default(),
            proxies: Mutex::default(),
            local: Arc::new(LocalStore::new(Arc::clone(&metrics))),
            metrics,
        }
    }

    /// Requests and bytes so far, for `.mlfs/status`.
    pub fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json()
    }

    /// The location an artifact URI names: `s3://bucket/path`, `file:///path` or a path,
    /// `mlflow-artifacts:/path`, or the artifact route of a server. No request is sent to the store.
    ///
    /// # Errors
    /// `Unsupported` for a scheme that no store serves, and for a path inside a mount of mlfs;
    /// `InvalidName` for a malformed URI.
    pub async fn locate(&self, artifact_uri: &str) -> StoreResult<Location> {
        match LocalUri::parse(artifact_uri) {
            LocalUri::Path(path) => return self.directory(path).await,
            LocalUri::Elsewhere => {
                return Err(StoreError::Unsupported {
                    object: without_credentials(artifact_uri),
                    detail: "the artifact URI names files of another machine".to_owned(),
                });
            }
            LocalUri::Other => {}
        }
        let scheme = artifact_uri
            .split_once(':')
            .map_or("", |(scheme, _)| scheme);
        match scheme {
            "s3" => {}
            "mlflow-artifacts" | "http" | "https" => return self.proxy(artifact_uri),
            _ => {
                return Err(StoreError::Unsupported {
                    object: without_credentials(artifact_uri),
                    detail: format!("artifact URIs with the scheme {scheme:?} are not served yet"),
                });
            }
        }
        let rest = artifact_uri.trim_start_matches("s3://");
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(StoreError::InvalidName {
                object: artifact_uri.to_owned(),
                detail: "the URI names no bucket".to_owned(),
            });
        }
        let store = self.bucket(bucket).await?;
        Ok(Location {
            store,
            prefix: prefix.trim_matches('/').to_owned(),
        })
    }

    /// A directory of this machine, which need not exist.
    async fn directory(&self, path: PathBuf) -> StoreResult<Location> {
        let prefix = local::check(path).await?;
        Ok(Location {
            store: Arc::clone(&self.local),
            prefix,
        })
    }

    /// A path that a tracking server proxies.
    fn proxy(&self, artifact_uri: &str) -> StoreResult<Location> {
        let settings = &self.settings.proxy;
        let (address, prefix) = Address::parse(artifact_uri, settings.server())?;
        let mut proxies = self.proxies.lock();
        let store = match proxies.get(&address.base) {
            Some(store) => Arc::clone(store),
            None => {
                let base = address.base.clone();
                let store = ProxyStore::new(address, settings, Arc::clone(&self.metrics))?;
                let store: Arc<dyn Store> = Arc::new(store);
                proxies.insert(base, Arc::clone(&store));
                store
            }
        };
        Ok(Location { store, prefix })
    }

    async fn bucket(&self, bucket: &str) -> StoreResult<Arc<dyn Store>> {
        if let Some(store) = self.buckets.lock().get(bucket) {
            return Ok(Arc::clone(store));
        }
        let client = self
            .client
            .get_or_init(|| async {
                S3Client::new(self.settings.s3.clone(), Arc::clone(&self.metrics)).await
            })
            .await;
        let store: Arc<dyn Store> = Arc::new(S3Store::new(
            Arc::clone(client),
            bucket,
            Arc::clone(&self.metrics),
        ));
        let mut buckets = self.buckets.lock();
        Ok(Arc::clone(
            buckets.entry(bucket.to_owned()).or_insert(store),
        ))
    }
}

/// A URI as it may be shown: without user, password and query.
pub(super) fn without_credentials(uri: &str) -> String {
    match Url::parse(uri) {
        Ok(mut url) => {
            let _ = url.set_password(None);
            let _ = url.set_username("");
            url.set_query(None);
            url.to_string()
        }
        Err(_) => uri.split(['?', '@']).next().unwrap_or_default().to_owned(),
    }
}
