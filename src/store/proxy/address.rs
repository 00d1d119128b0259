//! Which server proxies the artifacts of a URI, and how its routes name them.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use url::Url;

use crate::store::location::without_credentials;
use crate::store::{StoreError, StoreResult};

/// Where MLflow's server has its artifact routes, below its own path.
const ROUTES: &str = "/api/2.0/mlflow-artifacts";
/// The route of objects, which stands in URIs that name a server.
const OBJECTS: &str = "/mlflow-artifacts/artifacts";
/// All but what RFC 3986 leaves unreserved, and the slash between names.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The artifact routes of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `http://host:port/path/api/2.0/mlflow-artifacts`, without credentials.
    pub base: String,
    /// They are the tracking server's own, so that it may be told who we are.
    pub trusted: bool,
    /// Only what the server gives out of this run, wherever that lies; `base` is the server then.
    pub run: Option<String>,
}

impl Address {
    /// Reads an `mlflow-artifacts`, `http` or `https` URI as MLflow's client does: the routes, and
    /// the path below their root. `server` is the tracking server, without a slash at its end.
    ///
    /// # Errors
    /// `Unsupported` where no server is known, and for web addresses that are no such route.
    pub fn parse(uri: &str, server: Option<&str>) -> StoreResult<(Self, String)> {
        let unsupported = |detail: &str| StoreError::Unsupported {
            object: without_credentials(uri),
            detail: detail.to_owned(),
        };
        let Some(rest) = uri.strip_prefix("mlflow-artifacts:") else {
            let (base, path) = uri.split_once(OBJECTS).ok_or_else(|| {
                unsupported("a web address that is no artifact route of an MLflow server")
            })?;
            let base = without_credentials(&format!("{base}/mlflow-artifacts"));
            return Ok((Self::of(base, server), decode(path)));
        };
        let server = server.ok_or_else(|| {
            unsupported(
                "artifacts that an MLflow server proxies; set MLFLOW_TRACKING_URI to that server",
            )
        })?;
        let Some(named) = rest.strip_prefix("//") else {
            return Ok((
                Self::of(format!("{server}{ROUTES}"), Some(server)),
                decode(rest),
            ));
        };
        let (host, path) = named.split_once('/').unwrap_or((named, ""));
        if host.is_empty() {
            return Ok((
                Self::of(format!("{server}{ROUTES}"), Some(server)),
                decode(path),
            ));
        }
        let mut url = Url::parse(server).map_err(|error| unsupported(&error.to_string()))?;
        let (host, port) = match host.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()),
            _ => (host, None),
        };
        if url.set_host(Some(host)).is_err() || url.set_port(port).is_err() {
            return Err(unsupported("it names no server"));
        }
        let base = format!("{}{ROUTES}", url.as_str().trim_end_matches('/'));
        Ok((Self::of(base, Some(server)), decode(path)))
    }

    fn of(base: String, server: Option<&str>) -> Self {
        let trusted = server.is_some_and(|server| base == format!("{server}{ROUTES}"));
        Self {
            base,
            trusted,
            run: None,
        }
    }

    /// What the tracking server gives out of a run.
    pub fn of_run(server: &str, run_id: &str) -> Self {
        Self {
            base: server.to_owned(),
            trusted: true,
            run: Some(run_id.to_owned()),
        }
    }

    /// Where an object is read and written.
    pub fn object(&self, key: &str) -> String {
        match &self.run {
            None => format!("{}/artifacts/{}", self.base, encode(key)),
            Some(run) => {
                let (run, key) = (encode(run), encode(key));
                format!("{}/get-artifact?run_uuid={run}&path={key}", self.base)
            }
        }
    }

    /// Where the store that the server keeps it in can be asked for it.
    pub fn presigned(&self, key: &str) -> String {
        format!("{}/presigned/{}", self.base, encode(key))
    }

    /// Where an upload in parts is begun, completed or aborted, by that `step`: in a directory.
    pub fn upload(&self, step: &str, directory: &str) -> String {
        format!("{}/mpu/{step}/{}", self.base, encode(directory))
    }

    /// Where directories are listed.
    pub fn listing(&self) -> String {
        match &self.run {
            None => format!("{}/artifacts", self.base),
            Some(run) => {
                let run = encode(run);
                format!("{}/api/2.0/mlflow/artifacts/list?run_id={run}", self.base)
            }
        }
    }

    /// What the server says of itself.
    pub fn server_info(&self) -> Option<String> {
        let server = self.base.strip_suffix(ROUTES)?;
        Some(format!("{server}/api/3.0/mlflow/server-info"))
    }

    /// Which version it is.
    pub fn version(&self) -> Option<String> {
        let server = self.base.strip_suffix(ROUTES)?;
        Some(format!("{server}/version"))
    }

    /// The name of the store: an artifact URI of its root.
    pub fn name(&self) -> String {
        self.listing()
    }
}

fn encode(key: &str) -> String {
    utf8_percent_encode(key, ENCODED).to_string()
}

fn decode(path: &str) -> String {
    let path = path.trim_matches('/');
    percent_decode_str(path).decode_utf8_lossy().into_owned()
}

/// Refuses names that MLflow's server would refuse, or take for others: it decodes what is
/// percent-encoded until nothing is.
///
/// # Errors
/// `InvalidName`.
pub fn check_name(object: &str, key: &str) -> StoreResult<()> {
    let refuse = |detail: &str| {
        Err(StoreError::InvalidName {
            object: object.to_owned(),
            detail: detail.to_owned(),
        })
    };
    if key.contains('#') {
        return refuse("MLflow's server takes no # in a name");
    }
    if key.contains('\\') {
        return refuse("MLflow's server takes a backslash for a slash");
    }
    if percent_decode_str(key).decode_utf8_lossy() != key {
        return refuse("MLflow's server takes a percent sign and two digits for another letter");
    }
    if key.split('/').any(|name| name == ".." || name == ".") {
        return refuse("MLflow's server takes no path with .. in it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: &str = "http://tracking:5000/under";

    fn parsed(uri: &str) -> (String, bool, String) {
        let (address, path) = Address::parse(uri, Some(SERVER)).unwrap();
        (address.base, address.trusted, path)
    }

    #[test]
    fn uris_name_the_routes_that_mlflows_client_asks() {
        let own = format!("{SERVER}/api/2.0/mlflow-artifacts");
        let path = "1/run/artifacts".to_owned();
        for uri in [
            "mlflow-artifacts:/1/run/artifacts",
            "mlflow-artifacts:///1/run/artifacts/",
            "mlflow-artifacts://tracking:5000/1/run/artifacts",
            "http://tracking:5000/under/api/2.0/mlflow-artifacts/artifacts/1/run/artifacts",
        ] {
            assert_eq!(parsed(uri), (own.clone(), true, path.clone()), "{uri}");
        }
        let (base, trusted, _) = parsed("mlflow-artifacts://other:81/1/run/artifacts");
        assert_eq!(base, "http://other:81/under/api/2.0/mlflow-artifacts");
        assert!(!trusted);
        let name = format!("{own}/artifacts");
        assert_eq!(parsed(&name), (own, true, String::new()));
        let run = Address::of_run(SERVER, "run");
        let object = format!("{SERVER}/get-artifact?run_uuid=run&path=a%20b/c%2B");
        assert_eq!(run.object("a b/c+"), object);
        assert_eq!(run.server_info(), None);
        assert!(Address::parse("http://tracking:5000/files", Some(SERVER)).is_err());
        assert!(Address::parse("mlflow-artifacts:/1", None).is_err());
    }

    #[test]
    fn credentials_in_a_uri_are_not_kept() {
        let uri = "https://me:secret@other/api/2.0/mlflow-artifacts/artifacts/p";
        let (base, trusted, path) = parsed(uri);
        assert_eq!(base, "https://other/api/2.0/mlflow-artifacts");
        assert_eq!((trusted, path.as_str()), (false, "p"));
    }

    #[test]
    fn names_that_would_come_back_as_others_are_refused() {
        for name in ["a#b", "a%41", "a/../b", "a\\b"] {
            assert!(check_name("object", name).is_err(), "{name}");
        }
        for name in ["100%", "a%zz", "ü b+c", "..a"] {
            assert!(check_name("object", name).is_ok(), "{name}");
        }
    }
}
