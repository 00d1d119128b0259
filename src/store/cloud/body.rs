//! The body of an answer: as many bytes as were promised, or an error.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};

use super::errors::translate;
use crate::store::metrics::StoreMetrics;
use crate::store::{StoreError, StoreResult};

/// Frames as `object_store` gives them: it asks for the rest of what breaks off by itself.
pub(super) struct Body {
    pub frames: BoxStream<'static, object_store::Result<Bytes>>,
    /// Bytes that are still to come.
    pub rest: u64,
    pub object: String,
    pub metrics: Arc<StoreMetrics>,
}

impl Body {
    pub fn frames(self) -> BoxStream<'static, StoreResult<Bytes>> {
        stream::try_unfold(self, |mut body| async move {
            let frame = body.next().await?;
            Ok(frame.map(|frame| (frame, body)))
        })
        .boxed()
    }

    async fn next(&mut self) -> StoreResult<Option<Bytes>> {
        let object = || self.object.clone();
        let frame = self.frames.try_next().await;
        let Some(frame) = frame.map_err(|error| translate(object(), error))? else {
            return match self.rest {
                0 => Ok(None),
                rest => Err(StoreError::Unavailable {
                    object: object(),
                    detail: format!("the answer ended {rest} bytes early"),
                }),
            };
        };
        let length = frame.len() as u64;
        let Some(rest) = self.rest.checked_sub(length) else {
            return Err(StoreError::Corrupt {
                object: object(),
                detail: "the answer was longer than the range asked for".to_owned(),
            });
        };
        self.rest = rest;
        self.metrics.received(length);
        Ok(Some(frame))
    }
}
