//! How S3 is reached: the variables that MLflow's users have set already.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::http::innermost;

/// Whether bodies are part of the signature. The signature needs a SHA-256 of the body (1.5 GB/s
/// a core); over https the transport protects it, and the CRC32C guards against damage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SignPayload {
    /// Never over https, always over http.
    #[default]
    Auto,
    Always,
    Never,
}

/// `MLFLOW_S3_UPLOAD_EXTRA_ARGS`, as far as S3 knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UploadArguments {
    pub server_side_encryption: Option<String>,
    pub kms_key_id: Option<String>,
    pub storage_class: Option<String>,
    pub acl: Option<String>,
    pub tagging: Option<String>,
    pub request_payer: Option<String>,
}

const AUTHORITIES: &str = "AWS_CA_BUNDLE";

/// A request may be without progress for this long unless `--close-timeout` says otherwise.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

#[derive(Clone, Debug)]
pub struct S3Settings {
    /// `MLFLOW_S3_ENDPOINT_URL`; the SDK reads `AWS_ENDPOINT_URL` and `AWS_ENDPOINT_URL_S3`.
    pub endpoint: Option<String>,
    /// Asked of nobody else, if it is told.
    pub region: Option<String>,
    pub path_style: Option<bool>,
    pub anonymous: bool,
    /// Certificates of authorities, as PEM; only these are trusted. `AWS_CA_BUNDLE`.
    pub authorities: Option<Arc<[u8]>>,
    pub expected_bucket_owner: Option<String>,
    pub upload: UploadArguments,
    pub sign_payload: SignPayload,
    /// No request is without progress for longer than this. Those that ought to be answered sooner
    /// have shorter deadlines of their own.
    pub patience: Duration,
}

impl Default for S3Settings {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            path_style: None,
            anonymous: false,
            authorities: None,
            expected_bucket_owner: None,
            upload: UploadArguments::default(),
            sign_payload: SignPayload::default(),
            patience: PATIENCE,
        }
    }
}

/// A variable that cannot be obeyed.
#[derive(Debug)]
pub struct SettingError {
    pub variable: &'static str,
    pub detail: String,
}

impl fmt::Display for SettingError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.variable, self.detail)
    }
}

impl std::error::Error for SettingError {}

impl S3Settings {
    /// Reads MLflow's variables through `variable`.
    ///
    /// # Errors
    /// A value that S3 would not understand, or one that mlfs cannot obey.
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
        sign_payload: SignPayload,
    ) -> Result<Self, SettingError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        if set("MLFLOW_S3_IGNORE_TLS").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err(SettingError {
                variable: "MLFLOW_S3_IGNORE_TLS",
                detail: "connections without certificate checks are not supported; unset it and \
                         add the certificate authority to the system's"
                    .to_owned(),
            });
        }
        let endpoint = set("MLFLOW_S3_ENDPOINT_URL");
        let path_style = match set("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE").as_deref() {
            // As boto3 has it: any endpoint that is named is addressed by path.
            None | Some("auto") => endpoint.is_some().then_some(true),
            Some("path") => Some(true),
            Some("virtual") => Some(false),
            Some(other) => {
                return Err(SettingError {
                    variable: "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE",
                    detail: format!("{other:?} is none of auto, path, virtual"),
                });
            }
        };
        let signature = set("MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION");
        let anonymous = match signature.as_deref() {
            None | Some("s3v4") => false,
            Some("unsigned" | "UNSIGNED") => true,
            Some(other) => {
                return Err(SettingError {
                    variable: "MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION",
                    detail: format!("{other:?} is none of s3v4, unsigned"),
                });
            }
        };
        Ok(Self {
            endpoint,
            region: None,
            path_style,
            anonymous,
            authorities: authorities(set(AUTHORITIES))?,
            expected_bucket_owner: set("MLFLOW_S3_EXPECTED_BUCKET_OWNER"),
            upload: upload_arguments(set("MLFLOW_S3_UPLOAD_EXTRA_ARGS"))?,
            sign_payload,
            patience: PATIENCE,
        })
    }
}

/// What is in the file, if that are certificates.
fn authorities(file: Option<String>) -> Result<Option<Arc<[u8]>>, SettingError> {
    let Some(file) = file else {
        return Ok(None);
    };
    let wrong = |detail: String| SettingError {
        variable: AUTHORITIES,
        detail: format!("{file}: {detail}"),
    };
    let pem = std::fs::read(&file).map_err(|error| wrong(error.to_string()))?;
    let certificates = reqwest::Certificate::from_pem_bundle(&pem);
    let certificates = certificates.map_err(|error| wrong(error.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong(
            "holds no certificate; it must be a PEM file".to_owned(),
        ));
    }
    // The SDK panics where this fails.
    let tried = reqwest::Client::builder()
        .tls_certs_only(certificates)
        .build();
    tried.map_err(|error| wrong(innermost(&error)))?;
    Ok(Some(pem.into()))
}

fn upload_arguments(text: Option<String>) -> Result<UploadArguments, SettingError> {
    const VARIABLE: &str = "MLFLOW_S3_UPLOAD_EXTRA_ARGS";
    let wrong = |detail: String| SettingError {
        variable: VARIABLE,
        detail,
    };
    let mut arguments = UploadArguments::default();
    let Some(text) = text else {
        return Ok(arguments);
    };
    let parsed: serde_json::Map<String, Value> = serde_json::from_str(&text)
        .map_err(|error| wrong(format!("it must be a JSON object of strings: {error}")))?;
    for (name, value) in parsed {
        let Value::String(value) = value else {
            return Err(wrong(format!("the value of {name} is not a string")));
        };
        let field = match name.as_str() {
            "ServerSideEncryption" => &mut arguments.server_side_encryption,
            "SSEKMSKeyId" => &mut arguments.kms_key_id,
            "StorageClass" => &mut arguments.storage_class,
            "ACL" => &mut arguments.acl,
            "Tagging" => &mut arguments.tagging,
            "RequestPayer" => &mut arguments.request_payer,
            other => {
                return Err(wrong(format!(
                    "{other} is not supported (ServerSideEncryption, SSEKMSKeyId, StorageClass, \
                     ACL, Tagging and RequestPayer are)"
                )));
            }
        };
        *field = Some(value);
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<S3Settings, SettingError> {
        let lookup = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        S3Settings::from_variables(lookup, SignPayload::Auto)
    }

    #[test]
    fn a_named_endpoint_is_addressed_by_path_unless_told_otherwise() {
        let endpoint = ("MLFLOW_S3_ENDPOINT_URL", "https://minio.example.com");
        assert_eq!(settings(&[endpoint]).unwrap().path_style, Some(true));
        let virtual_hosts = ("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "virtual");
        let told = settings(&[endpoint, virtual_hosts]).unwrap();
        assert_eq!(told.path_style, Some(false));
        assert_eq!(settings(&[]).unwrap().path_style, None);
    }

    #[test]
    fn what_cannot_be_obeyed_is_an_error_that_names_the_variable() {
        for (name, value) in [
            ("MLFLOW_S3_IGNORE_TLS", "true"),
            ("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "sideways"),
            ("MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION", "v2"),
            ("MLFLOW_S3_UPLOAD_EXTRA_ARGS", "{\"Colour\": \"red\"}"),
            ("MLFLOW_S3_UPLOAD_EXTRA_ARGS", "not json"),
            (AUTHORITIES, "/no/such/file"),
            (AUTHORITIES, "/dev/null"),
        ] {
            let error = settings(&[(name, value)]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
