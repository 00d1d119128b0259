//! One SDK client, with one pool of connections, for all buckets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::{RetryPartition, TokenBucket};
use aws_sdk_s3::config::{
    RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use aws_sdk_s3::types::RequestPayer;
use aws_types::service_config::ServiceConfigKey;

use super::pace::Pace;
use super::retry::{Classifier, WholeDocuments};
use super::settings::{S3Settings, SignPayload};
use super::transport::Transport;
use crate::store::StoreMetrics;
use crate::store::location::without_credentials;

/// How often the SDK tries a request before it gives up: with its exponential backoff, about half
/// a minute of trouble.
const ATTEMPTS: u32 = 6;
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// The SDK gives retries up when many requests of one client have failed: a quota, made for clients
/// that must not make an outage worse. A mount's requests are bounded, by `--transfers` mostly, and by
/// [`ATTEMPTS`], and each that fails is somebody's file: the quota is out of reach, and what an
/// outage took of it comes back by itself, tokens a second.
const RETRY_QUOTA: usize = 100_000;
const RETRY_QUOTA_REFILL: f32 = 1_000.0;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Where an endpoint is named and no region is, this one is signed for.
const DEFAULT_REGION: &str = "us-east-1";

#[derive(Debug)]
pub struct S3Client {
    pub(super) sdk: Client,
    pub(super) settings: S3Settings,
    /// Where the requests go: a URL without credentials, or AWS and the region.
    pub(super) endpoint: String,
    pub(super) unsigned_payload: bool,
    /// The endpoint takes CRC32C headers. Taken back for good when it refuses one.
    checksums: AtomicBool,
}

impl S3Client {
    /// A client for all buckets, which counts in `metrics` what the store refuses.
    pub async fn new(settings: S3Settings, metrics: Arc<StoreMetrics>) -> Arc<Self> {
        let named = settings.endpoint.clone().or_else(|| {
            let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
            variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"))
        });
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(ATTEMPTS)
                    .with_max_backoff(LONGEST_BACKOFF),
            )
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .build(),
            );
        if let Some(region) = &settings.region {
            loader = loader.region(Region::new(region.clone()));
        } else if named.is_some() {
            // Who names an endpoint is not asked for a region: variables and profile are looked
            // at, the instance's metadata service is not.
            loader = loader.region(
                RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                    .or_else(ProfileFileRegionProvider::new())
                    .or_else(Region::new(DEFAULT_REGION)),
            );
        }
        if settings.anonymous {
            loader = loader.no_credentials();
        }
        let shared = loader.load().await;
        let mut config = aws_sdk_s3::config::Builder::from(&shared);
        if let Some(endpoint) = &named {
            let path_style = settings.path_style.unwrap_or(true);
            config = config
                .endpoint_url(endpoint)
                .force_path_style(path_style)
                // Stores other than AWS's may not know the newer checksums.
                .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
                .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        } else {
            config = config
                .force_path_style(settings.path_style.unwrap_or(false))
                .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
                .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        }
        config = config
            .http_client(Transport::new(
                Pace::new(metrics),
                settings.patience,
                settings.authorities.as_deref(),
            ))
            // The transport does it.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .retry_classifier(Classifier)
            .interceptor(WholeDocuments);
        let quota = TokenBucket::builder()
            .capacity(RETRY_QUOTA)
            .refill_rate(RETRY_QUOTA_REFILL)
            .build();
        config = config.retry_partition(RetryPartition::custom("mlfs").token_bucket(quota).build());
        if shared.region().is_none() {
            config = config.region(Region::new(DEFAULT_REGION));
        }
        let endpoint = match named.clone().or_else(|| profile_endpoint(&shared)) {
            Some(url) => without_credentials(&url).trim_end_matches('/').to_owned(),
            None => {
                let region = shared.region().map_or(DEFAULT_REGION, Region::as_ref);
                format!("aws:{region}")
            }
        };
        let plain = named
            .as_deref()
            .is_some_and(|endpoint| endpoint.starts_with("http://"));
        let unsigned_payload = match settings.sign_payload {
            SignPayload::Auto => !plain,
            SignPayload::Always => false,
            SignPayload::Never => true,
        };
        Arc::new(Self {
            sdk: Client::from_conf(config.build()),
            settings,
            endpoint,
            unsigned_payload,
            checksums: AtomicBool::new(true),
        })
    }

    /// Who pays for requests, where that is not the bucket's owner.
    pub(super) fn payer(&self) -> Option<RequestPayer> {
        let payer = self.settings.upload.request_payer.as_deref();
        payer.map(RequestPayer::from)
    }

    pub(super) fn checksums(&self) -> bool {
        self.checksums.load(Ordering::Relaxed)
    }

    /// The endpoint refused a checksum header: none is sent from now on, and what was stored is
    /// verified by asking.
    pub(super) fn refuse_checksums(&self) {
        if self.checksums.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                "the store refuses CRC32C headers; sizes and ETags are compared instead"
            );
        }
    }
}

/// The endpoint that the user's profile names, for S3 or for everything, as the SDK finds it.
fn profile_endpoint(shared: &SdkConfig) -> Option<String> {
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build()
        .ok()?;
    let service = shared.service_config();
    service
        .and_then(|service| service.load_config(key))
        .or_else(|| shared.endpoint_url().map(str::to_owned))
}
