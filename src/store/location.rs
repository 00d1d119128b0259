//! Artifact URI → store and key prefix; one client for all buckets of an endpoint, one store a
//! bucket.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use url::Url;

use super::cloud::{AzureSettings, Clouds, GoogleSettings};
use super::local::{self, LocalStore, LocalUri};
use super::metrics::StoreMetrics;
use super::proxy::{Address, ProxySettings, ProxyStore};
use super::s3::{S3Client, S3Settings, S3Store, S3Uri};
use super::{Store, StoreError, StoreResult};

/// Schemes that name a store, beside those of local directories.
const SERVED: [&str; 9] = [
    "s3",
    "r2",
    "b2",
    "wasbs",
    "abfss",
    "gs",
    "mlflow-artifacts",
    "http",
    "https",
];

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
    pub azure: AzureSettings,
    pub google: GoogleSettings,
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
    /// By the endpoint that URIs name; `None` for all that name none.
    clients: tokio::sync::Mutex<HashMap<Option<String>, Arc<S3Client>>>,
    buckets: Mutex<HashMap<String, Arc<dyn Store>>>,
    clouds: Clouds,
    /// By their names.
    proxies: Mutex<HashMap<String, Arc<dyn Store>>>,
    local: Arc<dyn Store>,
    metrics: Arc<StoreMetrics>,
}

impl Stores {
    pub fn new(settings: impl Into<StoreSettings>) -> Self {
        let metrics = Arc::<StoreMetrics>::default();
        let settings = settings.into();
        let clouds = Clouds::new(
            settings.azure.clone(),
            settings.google.clone(),
            Arc::clone(&metrics),
        );
        Self {
            settings,
            clients: tokio::sync::Mutex::default(),
            buckets: Mutex::default(),
            clouds,
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
    /// `mlflow-artifacts:/path`, or the artifact route of a server, `wasbs://…`, `abfss://…` or
    /// `gs://bucket/path`. No request is sent to the store.
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
            "s3" | "r2" | "b2" => self.bucket(artifact_uri).await,
            "wasbs" | "abfss" => self.clouds.azure(artifact_uri).await,
            "gs" => self.clouds.google(artifact_uri).await,
            "mlflow-artifacts" | "http" | "https" => self.proxy(artifact_uri),
            _ => Err(StoreError::Unsupported {
                object: without_credentials(artifact_uri),
                detail: format!("artifact URIs with the scheme {scheme:?} are not served"),
            }),
        }
    }

    /// The location of a run's artifacts: where no store serves the URI, what the tracking server
    /// gives out of them, to be read only.
    ///
    /// # Errors
    /// As [`Self::locate`].
    pub async fn locate_run(&self, run_id: &str, artifact_uri: &str) -> StoreResult<Location> {
        match (
            self.locate(artifact_uri).await,
            self.settings.proxy.server(),
        ) {
            (Err(StoreError::Unsupported { object, detail }), Some(server))
                if is_foreign(artifact_uri) =>
            {
                tracing::info!(run_id, object, "{detail}; read through the tracking server");
                self.routes(Address::of_run(server, run_id))
                    .map(|store| Location {
                        store,
                        prefix: String::new(),
                    })
            }
            (outcome, _) => outcome,
        }
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
        let store = self.routes(address)?;
        Ok(Location { store, prefix })
    }

    fn routes(&self, address: Address) -> StoreResult<Arc<dyn Store>> {
        let mut proxies = self.proxies.lock();
        let name = address.name();
        if let Some(store) = proxies.get(&name) {
            return Ok(Arc::clone(store));
        }
        let metrics = Arc::clone(&self.metrics);
        let store = ProxyStore::new(address, &self.settings.proxy, metrics)?;
        let store: Arc<dyn Store> = Arc::new(store);
        proxies.insert(name, Arc::clone(&store));
        Ok(store)
    }

    async fn bucket(&self, artifact_uri: &str) -> StoreResult<Location> {
        let uri = S3Uri::parse(artifact_uri)?;
        let known = self.buckets.lock().get(&uri.name).map(Arc::clone);
        let store = match known {
            Some(store) => store,
            None => {
                let client = self.client(&uri).await;
                let store = S3Store::new(client, &uri, Arc::clone(&self.metrics));
                let store: Arc<dyn Store> = Arc::new(store);
                let mut buckets = self.buckets.lock();
                Arc::clone(buckets.entry(uri.name.clone()).or_insert(store))
            }
        };
        Ok(Location {
            store,
            prefix: uri.prefix,
        })
    }

    async fn client(&self, uri: &S3Uri) -> Arc<S3Client> {
        let settings = uri.settings(&self.settings.s3);
        let named = uri
            .names_endpoint()
            .then(|| settings.endpoint.clone())
            .flatten();
        let mut clients = self.clients.lock().await;
        if let Some(client) = clients.get(&named) {
            return Arc::clone(client);
        }
        let client = S3Client::new(settings, Arc::clone(&self.metrics)).await;
        clients.insert(named, Arc::clone(&client));
        client
    }
}

/// Whether a URI is of a scheme that no store here serves.
fn is_foreign(artifact_uri: &str) -> bool {
    let scheme = artifact_uri.split_once(':').map(|(scheme, _)| scheme);
    let is_path = !matches!(LocalUri::parse(artifact_uri), LocalUri::Other);
    !is_path && scheme.is_none_or(|scheme| !SERVED.contains(&scheme))
}

/// A URI as it may be shown: without user, password and query.
pub(super) fn without_credentials(uri: &str) -> String {
    match Url::parse(uri) {
        Ok(mut url) => {
            let _ = url.set_password(None);
            let _ = url.set_username("");
            url.set_query(None);
            url.set_fragment(None);
            url.to_string()
        }
        Err(_) => {
            let scheme = uri.split_once("://").map_or("", |(scheme, _)| scheme);
            let shown = match uri.rsplit_once('@') {
                Some((_, rest)) => format!("{scheme}://{rest}"),
                None => uri.to_owned(),
            };
            shown
                .split(['?', '#'])
                .next()
                .unwrap_or_default()
                .to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::without_credentials;

    #[test]
    fn no_password_is_shown_whatever_else_is_wrong_with_a_uri() {
        for uri in [
            "ftp://user:secret@host/x",
            "ftp://user:se/cret@host/x",
            "ftp://user:secret@host:port/x?secret#secret",
            "http://host/x?sig=secret",
            "http://host/x#secret",
        ] {
            let shown = without_credentials(uri);
            assert!(!shown.contains("cret") && shown.contains("host"), "{shown}");
        }
        assert_eq!(without_credentials("odd:a b"), "odd:a b");
    }
}
