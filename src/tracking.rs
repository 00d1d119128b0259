//! MLflow's metadata: what runs there are, and where their artifacts lie.

mod authentication;
mod courier;
mod credentials_file;
mod error;
mod failure;
mod files;
mod rest;
pub mod settings;
mod sigv4;
mod source;
mod sqlite;
mod transport;
mod wire;

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;

pub use authentication::Authentication;
pub use courier::ArtifactCourier;
pub use error::{TrackingError, TrackingResult};
pub use files::FileTracking;
pub use rest::RestTracking;
pub use settings::TrackingSettings;
pub use source::TrackingSource;
pub use sqlite::SqliteTracking;

/// MLflow's lifecycle of a run: deleted ones are not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    Active,
    Deleted,
}

impl Lifecycle {
    /// MLflow's word for it.
    fn of(stage: &str) -> Self {
        if stage == "deleted" {
            Self::Deleted
        } else {
            Self::Active
        }
    }
}

/// A run as the tracking server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub run_id: String,
    pub run_name: String,
    pub experiment_id: String,
    pub artifact_uri: String,
    pub lifecycle: Lifecycle,
    /// RUNNING, SCHEDULED, FINISHED, FAILED or KILLED.
    pub status: String,
    pub start_time: Option<SystemTime>,
    pub end_time: Option<SystemTime>,
}

/// One page of something, with the token of the next.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next: Option<String>,
}

/// A source of MLflow metadata.
#[async_trait]
pub trait Tracking: fmt::Debug + Send + Sync + 'static {
    /// For messages: the tracking URI without credentials.
    fn name(&self) -> &str;

    /// One cheap request that tells whether server and credentials are good.
    async fn probe(&self) -> TrackingResult<()>;

    async fn run(&self, run_id: &str) -> TrackingResult<Run>;

    /// Ids of the active experiments.
    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<String>>;

    /// Active runs of the experiments, in an order in which no later page shifts when one is made.
    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>>;
}
