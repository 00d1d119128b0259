//! The SDK's errors as the store's.

use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::RequestId;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use crate::store::StoreError;

/// What `error` means for `object`.
pub(super) fn translate<E>(object: String, error: SdkError<E, HttpResponse>) -> StoreError
where
    E: std::error::Error + ProvideErrorMetadata + RequestId + 'static,
{
    let SdkError::ServiceError(service) = &error else {
        return untold(object, &error);
    };
    let status = service.raw().status().as_u16();
    let code = service.err().code().unwrap_or_default().to_owned();
    let detail = describe(status, &code, service.err());
    match (status, code.as_str()) {
        (_, "NoSuchUpload") => StoreError::UploadGone { object, detail },
        (_, "InvalidPart") => StoreError::PartsDiffer { object, detail },
        (404, _) | (_, "NoSuchKey" | "NoSuchBucket") => StoreError::NotFound { object },
        (412, _) => StoreError::Changed { object },
        (409, _) => StoreError::Conflict { object },
        (401, _)
        | (
            _,
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "ExpiredToken"
            | "InvalidToken"
            | "TokenRefreshRequired"
            | "RequestExpired",
        ) => StoreError::Unauthenticated { object, detail },
        (403, _) => StoreError::PermissionDenied { object, detail },
        (413, _) | (_, "EntityTooLarge") => StoreError::TooLarge { object, detail },
        (_, "BadDigest" | "XAmzContentChecksumMismatch" | "InvalidDigest") => {
            StoreError::Corrupt { object, detail }
        }
        (_, "KeyTooLongError" | "InvalidObjectName") => StoreError::InvalidName { object, detail },
        (501, _) => StoreError::Unsupported { object, detail },
        (429 | 500..=599, _) => StoreError::Unavailable { object, detail },
        _ => StoreError::Other { object, detail },
    }
}

fn describe(status: u16, code: &str, error: &(impl ProvideErrorMetadata + RequestId)) -> String {
    let message = error.message().unwrap_or("no message");
    let request = error.request_id().unwrap_or("unknown");
    format!("HTTP {status} {code}: {message} (request {request})")
}

/// An error without an answer from the store.
fn untold<E>(object: String, error: &SdkError<E, HttpResponse>) -> StoreError
where
    E: std::error::Error + 'static,
{
    let detail = DisplayErrorContext(error).to_string();
    let credentials = detail.contains("CredentialsNotLoaded")
        || detail.contains("CredentialsError")
        || detail.contains("no providers in chain");
    match error {
        SdkError::DispatchFailure(_) if credentials => StoreError::Unauthenticated {
            object,
            detail: "no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, \
                     or a profile"
                .to_owned(),
        },
        SdkError::ConstructionFailure(_) if credentials => StoreError::Unauthenticated {
            object,
            detail: "no AWS credentials found".to_owned(),
        },
        SdkError::ConstructionFailure(_) => StoreError::Other { object, detail },
        _ => StoreError::Unavailable {
            object,
            detail: shorten(&detail),
        },
    }
}

/// The SDK prints whole structures behind its messages.
fn shorten(detail: &str) -> String {
    const LONGEST: usize = 300;
    detail.chars().take(LONGEST).collect()
}
