//! What the SDK tries again beyond what it does by itself.
//!
//! By itself it tries again after 500, 502, 503, 504, S3's codes for throttling, broken connections
//! and timeouts. It does not after 429 and 408 without such a code (the answer to a HEAD has no
//! body, so no code), and it takes documents for whole that were cut off: its XML parser ends where
//! the text ends, so that half a listing would be a listing.

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::{
    AfterDeserializationInterceptorContextRef, InterceptorContext,
};
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;

/// Refuses XML answers that do not end.
#[derive(Debug)]
pub(super) struct WholeDocuments;

#[dyn_dispatch_hint]
impl Intercept for WholeDocuments {
    fn name(&self) -> &'static str {
        "WholeDocuments"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response();
        match response.body().bytes() {
            Some(body) if response.status().is_success() && !is_whole(body) => {
                Err("the answer was cut off".into())
            }
            _ => Ok(()),
        }
    }
}

/// Whether a document, if it is one, ends with the end of its first element. Nothing is whole, too:
/// many answers have no body.
fn is_whole(document: &[u8]) -> bool {
    let mut rest = document.trim_ascii();
    if !rest.starts_with(b"<") {
        return true;
    }
    while rest.starts_with(b"<?") {
        let Some(end) = rest.windows(2).position(|pair| pair == b"?>") else {
            return false;
        };
        rest = rest[end + 2..].trim_ascii_start();
    }
    let Some(end) = rest.iter().position(|byte| *byte == b'>') else {
        return false;
    };
    let head = rest[..end].strip_prefix(b"<").unwrap_or_default();
    let ends_name = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\t' | b'\r' | b'/');
    let name = head.split(ends_name).next().unwrap_or_default();
    head.ends_with(b"/") || rest.ends_with(&[b"</", name, b">"].concat())
}

/// Classifies what the SDK leaves unclassified.
#[derive(Debug)]
pub(super) struct Classifier;

impl ClassifyRetry for Classifier {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let (Some(Err(_)), Some(response)) = (context.output_or_error(), context.response()) else {
            return RetryAction::NoActionIndicated;
        };
        match response.status().as_u16() {
            429 => RetryAction::throttling_error(),
            408 => RetryAction::transient_error(),
            200..300 if !tells_an_error(response.body().bytes().unwrap_or_default()) => {
                RetryAction::transient_error()
            }
            _ => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "mlfs"
    }
}

/// S3 may answer 200 before it knows, and tell an error in the body. The SDK reads those.
fn tells_an_error(document: &[u8]) -> bool {
    is_whole(document) && String::from_utf8_lossy(document).contains("<Error>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_whole_when_its_first_element_ends() {
        let whole = "<?xml version=\"1.0\"?>\n<List xmlns=\"x\"><Key>a</Key></List>\n";
        assert!(is_whole(whole.as_bytes()));
        for length in 1..whole.trim_end().len() {
            assert!(
                !is_whole(&whole.as_bytes()[..length]),
                "{}",
                &whole[..length]
            );
        }
        for other in ["", "  \n", "<Empty/>", "<Empty />", "no document"] {
            assert!(is_whole(other.as_bytes()), "{other}");
        }
    }
}
