//! Google: URIs, and application default credentials.
//!
//! Sources: Google's documentation of application default credentials and of its Python client's
//! `STORAGE_EMULATOR_HOST`; MLflow 3.17's `gcs_artifact_repo.py`, which goes on without credentials
//! where there are none.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::StaticCredentialProvider;
use object_store::gcp::{GcpCredential, GoogleCloudStorage, GoogleCloudStorageBuilder};

use super::transport::{Transport, finds};
use super::{CloudStore, Kind, PATIENCE};
use crate::store::metrics::StoreMetrics;
use crate::store::{StoreError, StoreResult};

const CREDENTIALS: &str = "GOOGLE_APPLICATION_CREDENTIALS";
const EMULATOR: &str = "STORAGE_EMULATOR_HOST";
const DEFAULT_ENDPOINT: &str = "https://storage.googleapis.com";
/// Where a machine of Google's is told who it is.
const METADATA: &str = "metadata.google.internal";

/// How Google is reached.
#[derive(Clone, Debug)]
pub struct GoogleSettings {
    /// Of an emulator.
    endpoint: Option<String>,
    /// A file with credentials.
    credentials: Option<PathBuf>,
    /// Where `gcloud` keeps them; object_store looks there by itself.
    kept: Option<PathBuf>,
    metadata: Option<String>,
    /// Longest wait for an answer, and for the next bytes of one.
    patience: Duration,
}

impl Default for GoogleSettings {
    fn default() -> Self {
        Self::from_variables(|_| None, PATIENCE)
    }
}

impl GoogleSettings {
    /// What the environment tells.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>, patience: Duration) -> Self {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let endpoint = variable(EMULATOR).map(|host| {
            let host = host.trim_end_matches('/').to_owned();
            if host.contains("://") {
                host
            } else {
                format!("http://{host}")
            }
        });
        let kept = variable("HOME").map(|home| {
            PathBuf::from(home).join(".config/gcloud/application_default_credentials.json")
        });
        Self {
            endpoint,
            credentials: variable(CREDENTIALS).map(PathBuf::from),
            kept,
            metadata: variable("GCE_METADATA_HOST"),
            patience,
        }
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// The store that a URI names.
    ///
    /// # Errors
    /// `Unauthenticated` where the credentials cannot be used.
    pub(super) async fn open(
        &self,
        uri: &GoogleUri,
        transport: Transport,
        metrics: Arc<StoreMetrics>,
    ) -> StoreResult<CloudStore> {
        let builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(&uri.bucket)
            .with_retry(transport.retries())
            .with_http_connector(transport);
        let is_kept = self.kept.as_ref().is_some_and(|file| file.is_file());
        let builder = match (&self.endpoint, &self.credentials) {
            (Some(endpoint), _) => as_anybody(builder.with_base_url(endpoint)),
            (None, Some(file)) => builder.with_application_credentials(file.to_string_lossy()),
            (None, None) if is_kept || self.is_on_google().await => builder,
            (None, None) => {
                tracing::info!(
                    bucket = uri.name(),
                    "no Google credentials found: read and written as anybody may; set \
                     {CREDENTIALS}, or run `gcloud auth application-default login`"
                );
                as_anybody(builder)
            }
        };
        let built = builder.build().map_err(|error| StoreError::Unauthenticated {
            object: uri.name(),
            detail: format!(
                "{error}; a service account's file or what `gcloud auth application-default login` \
                 leaves is understood"
            ),
        });
        let backend: GoogleCloudStorage = built?;
        let endpoint = self.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT);
        Ok(CloudStore {
            backend: Arc::new(backend),
            kind: Kind::Google,
            name: uri.name(),
            identity: format!("{endpoint}/{}", uri.bucket),
            metrics,
        })
    }

    async fn is_on_google(&self) -> bool {
        let host = self.metadata.as_deref().unwrap_or(METADATA);
        let url = format!("http://{host}/computeMetadata/v1/");
        let flavour = ("Metadata-Flavor", "Google");
        finds(&url, flavour, Some(flavour)).await
    }
}

/// Without credentials. Writes ask for some whatever they are told, so they get empty ones.
fn as_anybody(builder: GoogleCloudStorageBuilder) -> GoogleCloudStorageBuilder {
    let none = GcpCredential {
        bearer: String::new(),
    };
    builder
        .with_skip_signature(true)
        .with_credentials(Arc::new(StaticCredentialProvider::new(none)))
}

/// A bucket, and a path in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GoogleUri {
    bucket: String,
    /// Without slashes around it.
    pub prefix: String,
}

impl GoogleUri {
    /// # Errors
    /// `InvalidName` without a bucket.
    pub fn parse(uri: &str) -> StoreResult<Self> {
        let rest = uri.strip_prefix("gs://").unwrap_or_default();
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(StoreError::InvalidName {
                object: uri.to_owned(),
                detail: "the URI names no bucket".to_owned(),
            });
        }
        Ok(Self {
            bucket: bucket.to_owned(),
            prefix: path.trim_matches('/').to_owned(),
        })
    }

    /// The store's name, which is a URI of its root.
    pub fn name(&self) -> String {
        format!("gs://{}", self.bucket)
    }
}
