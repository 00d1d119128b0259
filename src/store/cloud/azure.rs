//! Azure: URIs as MLflow writes them, and the credentials that MLflow reads.
//!
//! Sources: MLflow 3.17's `azure_blob_artifact_repo.py` and `azure_data_lake_artifact_repo.py`; the
//! order of Azure's `DefaultAzureCredential` as Microsoft documents it. Both kinds of URIs are served
//! by the Blob endpoint, which every account has.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use percent_encoding::percent_decode_str;

use super::transport::{Transport, finds};
use super::{CloudStore, Kind, PATIENCE};
use crate::store::location::without_credentials;
use crate::store::metrics::StoreMetrics;
use crate::store::{StoreError, StoreResult};

/// What is looked up of the environment.
const VARIABLES: [&str; 11] = [
    CONNECTION_STRING,
    ACCESS_KEY,
    SAS_TOKEN,
    CLIENT_ID,
    CLIENT_SECRET,
    TENANT_ID,
    FEDERATED_TOKEN_FILE,
    AUTHORITY_HOST,
    "IDENTITY_ENDPOINT",
    "MSI_ENDPOINT",
    "PATH",
];
const CONNECTION_STRING: &str = "AZURE_STORAGE_CONNECTION_STRING";
const ACCESS_KEY: &str = "AZURE_STORAGE_ACCESS_KEY";
const SAS_TOKEN: &str = "AZURE_STORAGE_SAS_TOKEN";
const CLIENT_ID: &str = "AZURE_CLIENT_ID";
const CLIENT_SECRET: &str = "AZURE_CLIENT_SECRET";
const TENANT_ID: &str = "AZURE_TENANT_ID";
const FEDERATED_TOKEN_FILE: &str = "AZURE_FEDERATED_TOKEN_FILE";
const AUTHORITY_HOST: &str = "AZURE_AUTHORITY_HOST";

/// Where a machine of Azure's is told who it is.
const METADATA: &str = "http://169.254.169.254/metadata/instance?api-version=2021-02-01";
/// The emulator's account and key, which are the same everywhere.
const EMULATOR: &str = "AccountName=devstoreaccount1;\
    AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;\
    BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1";

/// How Azure is reached. `Debug` shows no secret.
#[derive(Clone)]
pub struct AzureSettings {
    variables: HashMap<&'static str, String>,
    /// Longest wait for an answer, and for the next bytes of one.
    patience: Duration,
}

impl fmt::Debug for AzureSettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.variables.keys().collect();
        formatter
            .debug_struct("AzureSettings")
            .field("set", &names)
            .field("patience", &self.patience)
            .finish()
    }
}

impl Default for AzureSettings {
    fn default() -> Self {
        Self::from_variables(|_| None, PATIENCE)
    }
}

impl AzureSettings {
    /// What the environment tells.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>, patience: Duration) -> Self {
        let set = VARIABLES
            .iter()
            .filter_map(|name| Some((*name, variable(name).filter(|it| !it.is_empty())?)));
        Self {
            variables: set.collect(),
            patience,
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// The store that a URI names.
    ///
    /// # Errors
    /// `Unauthenticated` without credentials; `Other` where they cannot be used.
    pub(super) async fn open(
        &self,
        uri: &AzureUri,
        transport: Transport,
        metrics: Arc<StoreMetrics>,
    ) -> StoreResult<CloudStore> {
        let mut account = uri.account.clone();
        let mut endpoint = format!("https://{}.{}", uri.account, uri.suffix);
        let builder = MicrosoftAzureBuilder::new()
            .with_container_name(&uri.container)
            .with_retry(transport.retries())
            .with_http_connector(transport)
            .with_disable_tagging(true);
        let builder = match (
            uri.is_lake,
            self.get(CONNECTION_STRING),
            self.get(ACCESS_KEY),
        ) {
            (false, Some(text), _) => {
                let told = Connection::parse(text, &uri.name())?;
                account = told.account;
                endpoint = told.endpoint;
                match (told.key, told.signature) {
                    (Some(key), _) => builder.with_access_key(key),
                    (None, Some(signature)) => with_signature(builder, &signature),
                    (None, None) => builder.with_skip_signature(true),
                }
            }
            (false, None, Some(key)) => builder.with_access_key(key),
            _ => match self.get(SAS_TOKEN).filter(|_| uri.is_lake) {
                Some(signature) => with_signature(builder, signature),
                None => self.with_default_credential(builder, &uri.name()).await?,
            },
        };
        let built = builder
            .with_account(account)
            .with_endpoint(endpoint.clone())
            .build();
        let backend: MicrosoftAzure = built.map_err(|error| StoreError::Other {
            object: uri.name(),
            detail: error.to_string(),
        })?;
        Ok(CloudStore {
            backend: Arc::new(backend),
            kind: Kind::Azure,
            name: uri.name(),
            identity: format!("{endpoint}/{}", uri.container),
            metrics,
        })
    }

    /// As `DefaultAzureCredential`: the environment's application, a workload's identity, the
    /// machine's, and who is logged in with the command line.
    async fn with_default_credential(
        &self,
        mut builder: MicrosoftAzureBuilder,
        name: &str,
    ) -> StoreResult<MicrosoftAzureBuilder> {
        if let Some(host) = self.get(AUTHORITY_HOST) {
            builder = builder.with_authority_host(host);
        }
        if let Some(id) = self.get(CLIENT_ID) {
            builder = builder.with_client_id(id);
        }
        if let (Some(id), Some(tenant)) = (self.get(CLIENT_ID), self.get(TENANT_ID)) {
            if let Some(secret) = self.get(CLIENT_SECRET) {
                return Ok(builder.with_client_secret_authorization(id, secret, tenant));
            }
            if let Some(file) = self.get(FEDERATED_TOKEN_FILE) {
                return Ok(builder
                    .with_tenant_id(tenant)
                    .with_federated_token_file(file));
            }
        }
        let told = self.get("IDENTITY_ENDPOINT").or(self.get("MSI_ENDPOINT"));
        if let Some(endpoint) = told {
            return Ok(builder.with_msi_endpoint(endpoint));
        }
        if finds(METADATA, ("Metadata", "true"), None).await {
            return Ok(builder);
        }
        let folders = self.get("PATH").unwrap_or_default();
        if std::env::split_paths(folders).any(|folder| folder.join("az").is_file()) {
            return Ok(builder.with_use_azure_cli(true));
        }
        Err(StoreError::Unauthenticated {
            object: name.to_owned(),
            detail: format!(
                "no Azure credentials found: set {CONNECTION_STRING} or {ACCESS_KEY} (wasbs), \
                 {SAS_TOKEN} (abfss), or {TENANT_ID}, {CLIENT_ID} and {CLIENT_SECRET}, or log in \
                 with `az login`"
            ),
        })
    }
}

fn with_signature(builder: MicrosoftAzureBuilder, signature: &str) -> MicrosoftAzureBuilder {
    let pairs = url::form_urlencoded::parse(signature.trim_start_matches('?').as_bytes());
    builder.with_sas_authorization(pairs.into_owned().collect::<Vec<_>>())
}

/// What a connection string tells.
struct Connection {
    account: String,
    key: Option<String>,
    signature: Option<String>,
    endpoint: String,
}

impl Connection {
    fn parse(text: &str, name: &str) -> StoreResult<Self> {
        let fields = |text: &str| -> HashMap<String, String> {
            let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
            pairs
                .map(|(key, value)| (key.trim().to_ascii_lowercase(), value.trim().to_owned()))
                .collect()
        };
        let mut told = fields(text);
        let develops = told.get("usedevelopmentstorage");
        if develops.is_some_and(|it| it.eq_ignore_ascii_case("true")) {
            told = fields(EMULATOR);
        }
        let mut take = |key: &str| told.remove(key).filter(|value| !value.is_empty());
        let signature = take("sharedaccesssignature");
        let scheme = take("defaultendpointsprotocol").unwrap_or_else(|| "https".to_owned());
        let suffix = take("endpointsuffix").unwrap_or_else(|| "core.windows.net".to_owned());
        let account = take("accountname");
        let endpoint = take("blobendpoint").or_else(|| {
            let account = account.as_ref()?;
            Some(format!("{scheme}://{account}.blob.{suffix}"))
        });
        let endpoint = endpoint.map(|it| it.trim_end_matches('/').to_owned());
        // With a signature alone, the address tells the account.
        let of_address = |endpoint: &String| {
            let host = endpoint.split("://").nth(1)?;
            Some(host.split('.').next()?.to_owned())
        };
        let account = account.or_else(|| endpoint.as_ref().and_then(of_address));
        match (account, endpoint) {
            (Some(account), Some(endpoint)) => Ok(Self {
                account,
                key: take("accountkey"),
                signature,
                endpoint,
            }),
            _ => Err(StoreError::Unauthenticated {
                object: name.to_owned(),
                detail: format!("{CONNECTION_STRING} names neither AccountName nor BlobEndpoint"),
            }),
        }
    }
}

/// A container, and a path in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AzureUri {
    /// `abfss`.
    is_lake: bool,
    container: String,
    account: String,
    /// The host behind the account, as the URI has it.
    written: String,
    /// The same of the Blob endpoint.
    suffix: String,
    /// Without slashes around it.
    pub prefix: String,
}

impl AzureUri {
    /// # Errors
    /// `InvalidName` for what MLflow does not take either.
    pub fn parse(uri: &str) -> StoreResult<Self> {
        let invalid = |detail: &str| StoreError::InvalidName {
            object: without_credentials(uri),
            detail: detail.to_owned(),
        };
        let (scheme, rest) = uri.split_once("://").unwrap_or_default();
        let is_lake = scheme == "abfss";
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let form = "it must be <container>@<account>.<host>/<path>";
        let (container, host) = host.split_once('@').ok_or_else(|| invalid(form))?;
        let (account, written) = host.split_once('.').ok_or_else(|| invalid(form))?;
        let is_host = written
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte));
        if container.is_empty() || account.is_empty() || written.is_empty() || !is_host {
            return Err(invalid(form));
        }
        let suffix = match written.split_once('.') {
            Some(("dfs", rest)) if is_lake => format!("blob.{rest}"),
            Some(("blob", _)) => written.to_owned(),
            // A private link may put something before it.
            _ if is_lake => written.replacen(".dfs.", ".blob.", 1),
            _ => {
                return Err(invalid(
                    "the host must be <account>.blob.core.windows.net or alike",
                ));
            }
        };
        // MLflow decodes the one and not the other.
        let path = if is_lake {
            let decoded = percent_decode_str(path).decode_utf8();
            decoded
                .map_err(|_| invalid("it is not UTF-8"))?
                .into_owned()
        } else {
            path.to_owned()
        };
        Ok(Self {
            is_lake,
            container: container.to_owned(),
            account: account.to_owned(),
            written: written.to_owned(),
            suffix,
            prefix: path.trim_matches('/').to_owned(),
        })
    }

    /// The store's name, which is a URI of its root.
    pub fn name(&self) -> String {
        let scheme = if self.is_lake { "abfss" } else { "wasbs" };
        let Self {
            container,
            account,
            written,
            ..
        } = self;
        format!("{scheme}://{container}@{account}.{written}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_as_mlflow_reads_them() {
        let blob = AzureUri::parse("wasbs://c@acct.blob.core.windows.net/a/b%20c/").unwrap();
        assert_eq!(
            (blob.account.as_str(), blob.prefix.as_str()),
            ("acct", "a/b%20c")
        );
        assert_eq!(blob.name(), "wasbs://c@acct.blob.core.windows.net");
        assert_eq!(AzureUri::parse(&blob.name()).unwrap().name(), blob.name());
        let lake = AzureUri::parse("abfss://fs@acct.dfs.core.windows.net/a/b%20c").unwrap();
        assert_eq!(
            (lake.suffix.as_str(), lake.prefix.as_str()),
            ("blob.core.windows.net", "a/b c")
        );
        assert_eq!(lake.name(), "abfss://fs@acct.dfs.core.windows.net");
        for bad in [
            "wasbs://acct.blob.core.windows.net/p",
            "wasbs://@acct.blob.core.windows.net/p",
            "wasbs://c@acct/p",
            "wasbs://c@acct.example.com/p",
            "abfss://fs@acct.dfs.core.windows.net:1/p",
        ] {
            assert!(AzureUri::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn connection_strings_are_read_in_all_their_forms() {
        let parse = |text| Connection::parse(text, "n");
        let full = parse(
            "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=a2V5==;\
             EndpointSuffix=core.chinacloudapi.cn",
        );
        let full = full.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(full.endpoint, "https://a.blob.core.chinacloudapi.cn");
        assert_eq!(full.key.as_deref(), Some("a2V5=="));
        let signed = parse(
            "BlobEndpoint=https://b.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=x%3D",
        );
        let signed = signed.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(signed.account, "b");
        assert_eq!(signed.signature.as_deref(), Some("sv=1&sig=x%3D"));
        let emulator = parse("UseDevelopmentStorage=true");
        let emulator = emulator.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(emulator.account, "devstoreaccount1");
        assert!(parse("AccountKey=x").is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let settings = AzureSettings::from_variables(
            |name| (name == ACCESS_KEY).then(|| "topsecret".to_owned()),
            Duration::from_secs(1),
        );
        let shown = format!("{settings:?}");
        assert!(
            shown.contains(ACCESS_KEY) && !shown.contains("topsecret"),
            "{shown}"
        );
    }
}
