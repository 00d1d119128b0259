//! URIs of S3's kind: `s3://bucket/path`, and those that name their endpoint, as MLflow reads them.
//!
//! Sources: MLflow 3.17's `r2_artifact_repo.py` and `b2_artifact_repo.py`.

use super::S3Settings;
use crate::store::location::without_credentials;
use crate::store::{StoreError, StoreResult};

/// What R2 signs for, wherever a bucket is.
const R2_REGION: &str = "auto";

/// A bucket, a path in it, and where it is if the URI tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct S3Uri {
    /// A URI of the bucket's root.
    pub name: String,
    pub bucket: String,
    /// Without slashes around it.
    pub prefix: String,
    host: Option<String>,
    scheme: String,
}

impl S3Uri {
    /// # Errors
    /// `InvalidName` without a bucket, or without the host that the scheme asks for.
    pub fn parse(uri: &str) -> StoreResult<Self> {
        let invalid = |detail: &str| StoreError::InvalidName {
            object: without_credentials(uri),
            detail: detail.to_owned(),
        };
        let (scheme, rest) = uri.split_once("://").unwrap_or(("s3", uri));
        let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (bucket, host) = match scheme {
            "s3" => (place, None),
            _ => match place.split_once('@') {
                Some((bucket, host)) if !host.is_empty() => (bucket, Some(host)),
                _ => return Err(invalid("it must be <bucket>@<host>/<path>")),
            },
        };
        if bucket.is_empty() {
            return Err(invalid("the URI names no bucket"));
        }
        Ok(Self {
            name: format!("{scheme}://{place}"),
            bucket: bucket.to_owned(),
            prefix: path.trim_matches('/').to_owned(),
            host: host.map(str::to_owned),
            scheme: scheme.to_owned(),
        })
    }

    /// Whether the URI tells where the bucket is.
    pub fn names_endpoint(&self) -> bool {
        self.host.is_some()
    }

    /// How the bucket is reached: as all others, but for what the URI tells.
    pub fn settings(&self, settings: &S3Settings) -> S3Settings {
        let Some(host) = &self.host else {
            return settings.clone();
        };
        let region = match self.scheme.as_str() {
            "r2" => Some(R2_REGION),
            // `s3.us-east-005.backblazeb2.com`
            _ => host.split('.').nth(1),
        };
        S3Settings {
            endpoint: Some(format!("https://{host}")),
            region: region.map(str::to_owned),
            path_style: Some(self.scheme != "r2"),
            ..settings.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_tells_where_its_bucket_is() {
        let settings = S3Settings {
            endpoint: Some("http://elsewhere".to_owned()),
            ..S3Settings::default()
        };
        let plain = S3Uri::parse("s3://bucket/a/b/").unwrap();
        assert_eq!(
            (plain.name.as_str(), plain.prefix.as_str()),
            ("s3://bucket", "a/b")
        );
        let endpoint = plain.settings(&settings).endpoint;
        assert_eq!(endpoint.as_deref(), Some("http://elsewhere"));

        let r2 = S3Uri::parse("r2://bucket@account.r2.cloudflarestorage.com/a").unwrap();
        let told = r2.settings(&settings);
        let endpoint = told.endpoint.as_deref();
        assert_eq!(endpoint, Some("https://account.r2.cloudflarestorage.com"));
        assert_eq!(
            (told.region.as_deref(), told.path_style),
            (Some("auto"), Some(false))
        );
        assert_eq!(S3Uri::parse(&r2.name).unwrap().bucket, "bucket");

        let b2 = S3Uri::parse("b2://bucket@s3.us-east-005.backblazeb2.com/a").unwrap();
        let told = b2.settings(&settings);
        assert_eq!(
            (told.region.as_deref(), told.path_style),
            (Some("us-east-005"), Some(true))
        );

        for bad in [
            "s3://",
            "s3:///a",
            "r2://bucket/a",
            "b2://@host/a",
            "b2://bucket@/a",
        ] {
            assert!(S3Uri::parse(bad).is_err(), "{bad}");
        }
    }
}
