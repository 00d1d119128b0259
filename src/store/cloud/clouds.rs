//! All containers and buckets in use, and the connections they share.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::CloudStore;
use super::azure::{AzureSettings, AzureUri};
use super::google::{GoogleSettings, GoogleUri};
use super::transport::{Kind, Transport};
use crate::store::metrics::StoreMetrics;
use crate::store::{Location, Store, StoreResult};

/// A store, once somebody has opened it.
type Opened = Arc<OnceCell<Arc<dyn Store>>>;

/// Opens stores of Azure's and Google's by URI.
#[derive(Debug)]
pub(in crate::store) struct Clouds {
    azure: AzureSettings,
    google: GoogleSettings,
    azure_transport: OnceCell<Transport>,
    google_transport: OnceCell<Transport>,
    /// By name; who opens one keeps nobody from another.
    stores: Mutex<HashMap<String, Opened>>,
    metrics: Arc<StoreMetrics>,
}

impl Clouds {
    pub fn new(azure: AzureSettings, google: GoogleSettings, metrics: Arc<StoreMetrics>) -> Self {
        Self {
            azure,
            google,
            azure_transport: OnceCell::new(),
            google_transport: OnceCell::new(),
            stores: Mutex::default(),
            metrics,
        }
    }

    /// The location that a `wasbs` or `abfss` URI names.
    ///
    /// # Errors
    /// `InvalidName` for a malformed URI; `Unauthenticated` without credentials.
    pub async fn azure(&self, uri: &str) -> StoreResult<Location> {
        let uri = AzureUri::parse(uri)?;
        let make = async || Transport::new(self.azure.patience(), Kind::Azure);
        let open = async || {
            let transport = self.azure_transport.get_or_try_init(make).await?.clone();
            let metrics = Arc::clone(&self.metrics);
            self.azure.open(&uri, transport, metrics).await
        };
        let store = self.store(uri.name(), open).await?;
        Ok(Location {
            store,
            prefix: uri.prefix,
        })
    }

    /// The location that a `gs` URI names.
    ///
    /// # Errors
    /// `InvalidName` for a malformed URI; `Unauthenticated` for credentials that cannot be used.
    pub async fn google(&self, uri: &str) -> StoreResult<Location> {
        let uri = GoogleUri::parse(uri)?;
        let make = async || Transport::new(self.google.patience(), Kind::Google);
        let open = async || {
            let transport = self.google_transport.get_or_try_init(make).await?.clone();
            let metrics = Arc::clone(&self.metrics);
            self.google.open(&uri, transport, metrics).await
        };
        let store = self.store(uri.name(), open).await?;
        Ok(Location {
            store,
            prefix: uri.prefix,
        })
    }

    async fn store(
        &self,
        name: String,
        open: impl AsyncFnOnce() -> StoreResult<CloudStore>,
    ) -> StoreResult<Arc<dyn Store>> {
        let cell = Arc::clone(self.stores.lock().entry(name).or_default());
        let opened = cell.get_or_try_init(async || {
            let store: Arc<dyn Store> = Arc::new(open().await?);
            Ok(store)
        });
        opened.await.map(Arc::clone)
    }
}
