//! What stands between the SDK and its HTTP client: every attempt of every request takes a place
//! on the wire (`pace`) and is watched (`watch`). The SDK's signer, configuration and retries are
//! untouched, and so is what goes over the wire.

use std::sync::Arc;
use std::time::Duration;

use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::{
    RuntimeComponents, RuntimeComponentsBuilder,
};
use aws_smithy_types::config_bag::ConfigBag;

use super::pace::Pace;
use super::watch::{Limits, Watch};

/// A request that has waited longer than this for a place fails with a timeout, which the SDK
/// tries again with a new signature: S3 refuses those older than 15 minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// The SDK's own HTTP client, as it builds it by default, watched and paced.
#[derive(Debug)]
pub(super) struct Transport {
    inner: SharedHttpClient,
    pace: Arc<Pace>,
    patience: Duration,
}

impl Transport {
    /// No request is without progress for longer than `patience`. Of `authorities`, as PEM, others than
    /// the system's are trusted.
    pub fn new(pace: Arc<Pace>, patience: Duration, authorities: Option<&[u8]>) -> Self {
        let provider = Provider::Rustls(CryptoMode::AwsLc);
        let trusted = match authorities {
            Some(pem) => TrustStore::empty().with_pem_certificate(pem),
            None => TrustStore::default(),
        };
        let context = TlsContext::builder().with_trust_store(trusted).build();
        Self {
            inner: Builder::new()
                .tls_provider(provider)
                .tls_context(context.unwrap_or_default())
                .build_https(),
            pace,
            patience,
        }
    }
}

impl HttpClient for Transport {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(Connector {
            inner: self.inner.http_connector(settings, components),
            pace: Arc::clone(&self.pace),
            patience: self.patience,
        })
    }

    fn validate_base_client_config(
        &self,
        components: &RuntimeComponentsBuilder,
        config: &ConfigBag,
    ) -> Result<(), BoxError> {
        self.inner.validate_base_client_config(components, config)
    }

    fn validate_final_config(
        &self,
        components: &RuntimeComponents,
        config: &ConfigBag,
    ) -> Result<(), BoxError> {
        self.inner.validate_final_config(components, config)
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.inner.connector_metadata()
    }
}

#[derive(Debug)]
struct Connector {
    inner: SharedHttpConnector,
    pace: Arc<Pace>,
    patience: Duration,
}

impl HttpConnector for Connector {
    fn call(&self, mut request: HttpRequest) -> HttpConnectorFuture {
        let (inner, pace) = (self.inner.clone(), Arc::clone(&self.pace));
        let patience = self.patience;
        HttpConnectorFuture::new(async move {
            let longest = LONGEST_WAIT.min(patience);
            let Some(place) = pace.place(longest).await else {
                let refusal = format!("throttled by the store: no place for {longest:?}");
                return Err(ConnectorError::timeout(refusal.into()));
            };
            let limits = Limits::of(&request, patience);
            let watch = Watch::over(&mut request, limits);
            let answer = watch.answer(inner.call(request)).await?;
            place.answered(answer.status().as_u16());
            Ok(answer)
        })
    }
}
