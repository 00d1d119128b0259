//! AWS Signature Version 4 for tracking servers behind an API gateway.
//!
//! `MLFLOW_TRACKING_AWS_SIGV4` asks for it; MLflow's client signs for the service `execute-api`,
//! with the credentials of AWS's default chain.

use std::time::{Duration, SystemTime};

use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;
use reqwest::Request;
use reqwest::header::{HeaderName, HeaderValue};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::failure::{chain, one_line};

const SERVICE: &str = "execute-api";
/// Credentials are asked for again this long before they end, so that none ends on the way.
const MARGIN: Duration = Duration::from_secs(300);
/// Credentials without an end are asked for again after this long: profiles are edited.
const LONGEST_KEPT: Duration = Duration::from_secs(300);

/// Why a request could not be signed.
#[derive(Debug)]
pub(super) enum SignError {
    /// No credentials, or a configuration that gives none: asking again does not help.
    Credentials(String),
    /// Whoever hands the credentials out did not answer.
    Transient(String),
    Request(String),
}

/// Signs requests for one region. `Debug` shows no secret: AWS's credential types hide theirs.
#[derive(Debug)]
pub(super) struct Signer {
    region: String,
    provider: SharedCredentialsProvider,
    kept: Mutex<Option<Kept>>,
}

#[derive(Debug)]
struct Kept {
    credentials: Credentials,
    asked: Instant,
}

impl Signer {
    /// A signer with the default credential chain; `region` goes before the AWS configuration's.
    pub async fn load(region: Option<&str>) -> Result<Self, SignError> {
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        if let Some(region) = region {
            loader = loader.region(Region::new(region.to_owned()));
        }
        let config = loader.load().await;
        let region = config.region().ok_or_else(|| {
            SignError::Credentials("no AWS region is known: set AWS_REGION".to_owned())
        })?;
        let provider = config.credentials_provider().ok_or_else(|| {
            SignError::Credentials("the AWS configuration provides no credentials".to_owned())
        })?;
        Ok(Self::new(region.as_ref(), provider))
    }

    pub fn new(region: &str, provider: SharedCredentialsProvider) -> Self {
        Self {
            region: region.to_owned(),
            provider,
            kept: Mutex::new(None),
        }
    }

    /// Adds date, session token and signature. All headers the request has are signed too, so
    /// none may be changed afterwards.
    pub async fn sign(&self, request: &mut Request) -> Result<(), SignError> {
        let identity: Identity = self.credentials().await?.into();
        let wrong = |error: &dyn std::fmt::Display| SignError::Request(error.to_string());
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(SERVICE)
            .time(SystemTime::now())
            .settings(SigningSettings::default())
            .build()
            .map_err(|error| wrong(&error))?
            .into();
        let body = match request.body() {
            None => SignableBody::Bytes(&[]),
            // One that is streamed cannot be read beforehand.
            Some(body) => match body.as_bytes() {
                Some(bytes) => SignableBody::Bytes(bytes),
                None => SignableBody::UnsignedPayload,
            },
        };
        let headers = request
            .headers()
            .iter()
            .filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)));
        let signable = SignableRequest::new(
            request.method().as_str(),
            request.url().as_str(),
            headers,
            body,
        )
        .map_err(|error| wrong(&error))?;
        let output = sign(signable, &parameters).map_err(|error| wrong(&error))?;
        for (name, text) in output.into_parts().0.headers() {
            let name = HeaderName::try_from(name).map_err(|error| wrong(&error))?;
            let mut value = HeaderValue::from_str(text).map_err(|error| wrong(&error))?;
            value.set_sensitive(true);
            request.headers_mut().insert(name, value);
        }
        Ok(())
    }

    /// The credentials; the chain is asked by one caller at a time.
    async fn credentials(&self) -> Result<Credentials, SignError> {
        let mut kept = self.kept.lock().await;
        if let Some(kept) = &*kept
            && kept.is_good()
        {
            return Ok(kept.credentials.clone());
        }
        let asked = Instant::now();
        let credentials = self.provider.provide_credentials().await;
        let credentials = credentials.map_err(|error| {
            // The chain's own text is a list of many lines.
            let text = one_line(&chain(&error));
            match error {
                CredentialsError::ProviderTimedOut(_) | CredentialsError::ProviderError(_) => {
                    SignError::Transient(text)
                }
                _ => SignError::Credentials(text),
            }
        })?;
        *kept = Some(Kept {
            credentials: credentials.clone(),
            asked,
        });
        Ok(credentials)
    }
}

impl Kept {
    fn is_good(&self) -> bool {
        match self.credentials.expiry() {
            Some(end) => end
                .duration_since(SystemTime::now())
                .is_ok_and(|left| left > MARGIN),
            None => self.asked.elapsed() < LONGEST_KEPT,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use aws_credential_types::provider::future;

    use super::*;

    #[derive(Debug)]
    struct Counted {
        asked: Arc<AtomicUsize>,
        ends_in: Option<Duration>,
    }

    impl ProvideCredentials for Counted {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let end = self.ends_in.map(|left| SystemTime::now() + left);
            let token = Some("session".to_owned());
            future::ProvideCredentials::ready(Ok(Credentials::new(
                "AKID", "hidden", token, end, "test",
            )))
        }
    }

    fn signer(ends_in: Option<Duration>) -> (Arc<AtomicUsize>, Signer) {
        let asked = Arc::new(AtomicUsize::new(0));
        let provider = Counted {
            asked: Arc::clone(&asked),
            ends_in,
        };
        let signer = Signer::new("eu-west-1", SharedCredentialsProvider::new(provider));
        (asked, signer)
    }

    fn request() -> Request {
        let mut request = Request::new(
            reqwest::Method::POST,
            "https://host/stage/api/2.0/mlflow/runs/search"
                .parse()
                .unwrap(),
        );
        *request.body_mut() = Some("{}".into());
        request
    }

    #[tokio::test]
    async fn a_signed_request_carries_scope_date_and_session_and_hides_them_from_debug() {
        let (_, signer) = signer(None);
        let mut request = request();
        signer.sign(&mut request).await.unwrap();
        let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
        let authorization = header("authorization");
        assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=AKID/"));
        assert!(authorization.contains("/eu-west-1/execute-api/aws4_request"));
        assert!(authorization.contains("host;x-amz-date;x-amz-security-token"));
        assert_eq!(header("x-amz-security-token"), "session");
        assert_eq!(header("x-amz-date").len(), "20260101T000000Z".len());
        let shown = format!("{request:?} {signer:?}");
        assert!(!shown.contains("hidden") && !shown.contains("Signature="));
    }

    #[tokio::test]
    async fn credentials_are_asked_for_once_until_shortly_before_they_end() {
        for (ends_in, expected) in [
            (None, 1),
            (Some(Duration::from_secs(3600)), 1),
            (Some(MARGIN / 2), 3),
        ] {
            let (asked, signer) = signer(ends_in);
            for _ in 0..3 {
                signer.sign(&mut request()).await.unwrap();
            }
            assert_eq!(asked.load(Ordering::Relaxed), expected, "{ends_in:?}");
        }
    }
}
