//! Which URIs name files of this machine, as MLflow reads them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

/// What a URI names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalUri {
    /// A path of this machine, perhaps relative.
    Path(PathBuf),
    /// A path of another one.
    Elsewhere,
    /// No path.
    Other,
}

impl LocalUri {
    /// Reads a path, which stands for itself, or a `file` URI, which is percent-encoded.
    pub fn parse(uri: &str) -> Self {
        let scheme = uri.split_once(':').map_or("", |(scheme, _)| scheme);
        if uri.starts_with(['/', '.']) || scheme.is_empty() || scheme.contains('/') {
            return Self::Path(PathBuf::from(uri));
        }
        if !scheme.eq_ignore_ascii_case("file") {
            return Self::Other;
        }
        let rest = uri.get("file:".len()..).unwrap_or_default();
        let path = match rest.strip_prefix("//") {
            None => rest,
            Some(rest) => {
                match rest.strip_prefix("localhost").unwrap_or(rest) {
                    // The name of the store itself.
                    "" => "/",
                    path if path.starts_with('/') => path,
                    _ => return Self::Elsewhere,
                }
            }
        };
        let bytes: Vec<u8> = percent_decode_str(path).collect();
        Self::Path(PathBuf::from(OsStr::from_bytes(&bytes)))
    }
}
