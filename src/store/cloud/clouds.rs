//! All containers and buckets in use, and the connections they share.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{Mutex, OnceCell};

use super::azure::{AzureSettings, AzureUri};
use super::google::{GoogleSettings, GoogleUri};
use super::transport::{Kind, Transport};
use crate::store::metrics::StoreMetrics;
use crate::store::{Location, Store, StoreResult};

/// Opens stores of Azure's and Google's by URI.
#[derive(Debug)]
pub(in crate::store) struct Clouds {
    azure: AzureSettings,
    google: GoogleSettings,
    azure_transport: OnceCell<Transport>,
    google_transport: OnceCell<Transport>,
    stores: Mutex<HashMap<String, Arc<dyn Store>>>,
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
        let mut stores = self.stores.lock().await;
        let store = match stores.get(&uri.name()) {
            Some(store) => Arc::clone(store),
            None => {
                let shared = self
                    .azure_transport
                    .get_or_try_init(async || Transport::new(self.azure.patience(), Kind::Azure));
                let transport = shared.await?.clone();
                let opened = self.azure.open(&uri, transport, Arc::clone(&self.metrics));
                let store: Arc<dyn Store> = Arc::new(opened.await?);
                stores.insert(uri.name(), Arc::clone(&store));
                store
            }
        };
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
        let mut stores = self.stores.lock().await;
        let store = match stores.get(&uri.name()) {
            Some(store) => Arc::clone(store),
            None => {
                let shared = self
                    .google_transport
                    .get_or_try_init(async || Transport::new(self.google.patience(), Kind::Google));
                let transport = shared.await?.clone();
                let opened = self.google.open(&uri, transport, Arc::clone(&self.metrics));
                let store: Arc<dyn Store> = Arc::new(opened.await?);
                stores.insert(uri.name(), Arc::clone(&store));
                store
            }
        };
        Ok(Location {
            store,
            prefix: uri.prefix,
        })
    }
}
