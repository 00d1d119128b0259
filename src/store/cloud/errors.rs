//! What `object_store` tells of failures → [`StoreError`].
//!
//! Its kinds cover the common answers; the rest is in the text: the status, and the store's own code
//! in the body of the answer.

use object_store::Error;

use crate::store::StoreError;

/// Characters of a text that are told.
const EXCERPT: usize = 300;

/// What `error` means for `object`.
pub(super) fn translate(object: String, error: Error) -> StoreError {
    let text = error.to_string();
    let status = status(&text);
    let code = element(&text, "Code").unwrap_or_default();
    let detail = describe(&text, status, code);
    match (code, &error) {
        ("NoSuchUpload" | "InvalidBlockList", _) => StoreError::UploadGone { object, detail },
        ("InvalidPart", _) => StoreError::PartsDiffer { object, detail },
        ("AuthenticationFailed" | "InvalidAuthenticationInfo" | "ExpiredToken", _) => {
            StoreError::Unauthenticated { object, detail }
        }
        (
            "LeaseIdMissing"
            | "BlobImmutableDueToPolicy"
            | "UnauthorizedBlobOverwrite"
            | "AccountIsDisabled",
            _,
        ) => StoreError::PermissionDenied { object, detail },
        ("RequestBodyTooLarge" | "EntityTooLarge" | "BlockCountExceedsLimit", _) => {
            StoreError::TooLarge { object, detail }
        }
        ("InvalidResourceName" | "InvalidUri" | "OutOfRangeInput" | "InvalidObjectName", _) => {
            StoreError::InvalidName { object, detail }
        }
        ("Md5Mismatch" | "BadDigest" | "InvalidDigest" | "Crc64Mismatch", _) => {
            StoreError::Corrupt { object, detail }
        }
        // An account that does not exist yet has no address.
        (_, Error::NotFound { .. }) => StoreError::NotFound { object },
        (_, Error::Precondition { .. }) => StoreError::Changed { object },
        (_, Error::AlreadyExists { .. }) => StoreError::Conflict { object },
        (_, Error::PermissionDenied { .. }) => StoreError::PermissionDenied { object, detail },
        (_, Error::Unauthenticated { .. }) => StoreError::Unauthenticated { object, detail },
        (_, Error::InvalidPath { .. }) => StoreError::InvalidName { object, detail },
        (_, Error::NotSupported { .. } | Error::NotImplemented { .. }) => {
            StoreError::Unsupported { object, detail }
        }
        _ if is_about_credentials(&text) && matches!(status, Some(400..=403)) => {
            StoreError::Unauthenticated { object, detail }
        }
        _ => match status {
            // Listings, batches and completions are not told apart.
            Some(401) => StoreError::Unauthenticated { object, detail },
            Some(403) => StoreError::PermissionDenied { object, detail },
            Some(404) => StoreError::NotFound { object },
            Some(409) => StoreError::Conflict { object },
            Some(412) => StoreError::Changed { object },
            Some(413) => StoreError::TooLarge { object, detail },
            Some(501) => StoreError::Unsupported { object, detail },
            Some(408 | 429 | 500..=599) | None => StoreError::Unavailable { object, detail },
            Some(_) => StoreError::Other { object, detail },
        },
    }
}

/// Whether it failed before anything was asked of the store.
fn is_about_credentials(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    [
        "token request",
        "service account",
        "azure cli",
        "federated token",
    ]
    .iter()
    .any(|sign| text.contains(sign))
}

/// The status that the store answered with.
fn status(text: &str) -> Option<u16> {
    // The second is what a part of a batch was answered with.
    let signs = ["status code: ", "(code: "];
    let (_, rest) = signs.iter().find_map(|sign| text.split_once(sign))?;
    rest.get(..3)?.parse().ok()
}

/// The text of the first XML element of this name.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once('<').map(|(inside, _)| inside.trim())
}

fn describe(text: &str, status: Option<u16>, code: &str) -> String {
    let told = element(text, "Message").and_then(|message| message.lines().next());
    match (status, told) {
        (Some(status), Some(told)) => format!("HTTP {status} {code}: {told}"),
        _ => text.chars().take(EXCERPT).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> StoreError {
        let error = Error::Generic {
            store: "any",
            source: text.to_owned().into(),
        };
        translate("o".to_owned(), error)
    }

    #[test]
    fn the_stores_own_code_counts_before_the_status() {
        let gone = "Server returned non-2xx status code: 400 Bad Request: \
            <Error><Code>InvalidBlockList</Code><Message>The block list is invalid.\nRequestId:1\
            </Message></Error>";
        let StoreError::UploadGone { detail, .. } = generic(gone) else {
            panic!("not known");
        };
        assert_eq!(
            detail,
            "HTTP 400 InvalidBlockList: The block list is invalid."
        );
        let busy = "Server returned non-2xx status code: 503 Service Unavailable: ";
        assert!(generic(busy).is_transient());
        assert!(generic("connection reset").is_transient());
        let bad = "Server returned non-2xx status code: 400 Bad Request: ";
        assert!(matches!(generic(bad), StoreError::Other { .. }));
        let forbidden = "Server returned non-2xx status code: 403 Forbidden: ";
        assert!(matches!(
            generic(forbidden),
            StoreError::PermissionDenied { .. }
        ));
        let of_batch = "Got a failed request (code: 403, reason: LeaseIdMissing)";
        assert!(matches!(
            generic(of_batch),
            StoreError::PermissionDenied { .. }
        ));
        let passing = "Error performing token request: connection refused";
        assert!(generic(passing).is_transient());
        let token = "Error performing token request: status code: 400 Bad Request";
        assert!(matches!(generic(token), StoreError::Unauthenticated { .. }));
    }
}
