//! The way to the tracking server for those who ask it for artifacts.

use async_trait::async_trait;
use reqwest::{Client, Request};

use super::settings::{SettingError, TrackingSettings};
use super::sigv4::SignError;
use super::transport::Transport;
use crate::store::proxy::Courier;
use crate::store::{StoreError, StoreResult};

/// Gets requests to one tracking server, however long their bodies take.
#[derive(Debug)]
pub struct ArtifactCourier {
    transport: Transport,
}

impl ArtifactCourier {
    /// Sends nothing.
    ///
    /// # Errors
    /// As those of the tracking server's own client.
    pub fn new(settings: TrackingSettings) -> Result<Self, SettingError> {
        let transport = Transport::patient(settings)?;
        Ok(Self { transport })
    }
}

#[async_trait]
impl Courier for ArtifactCourier {
    fn server(&self) -> &str {
        self.transport.name()
    }

    fn client(&self) -> &Client {
        self.transport.client()
    }

    async fn authorise(&self, request: &mut Request) -> StoreResult<()> {
        let authorised = self.transport.authorise(request).await;
        authorised.map_err(|error| {
            let object = self.server().to_owned();
            match error {
                SignError::Credentials(detail) => StoreError::Unauthenticated { object, detail },
                SignError::Transient(detail) => StoreError::Unavailable { object, detail },
                SignError::Request(detail) => StoreError::Other { object, detail },
            }
        })
    }
}
