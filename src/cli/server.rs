//! The tracking server of a mount, asked directly by those who change something there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use super::wait::Place;
use super::{WrongUsage, ask, mounts};
use crate::tracking::{Tracking, TrackingResult, TrackingSource};

/// How long the mount may think about which server it has.
const PATIENCE: Duration = Duration::from_secs(10);

/// The source that a mount shows, with the credentials of the environment.
pub(super) fn of_mount(place: &Place) -> anyhow::Result<Arc<dyn Tracking>> {
    let (mountpoint, _) = place;
    let status = ask::status(mountpoint, PATIENCE);
    let status = status.map_err(|error| mounts::unanswered(mountpoint, &error))?;
    let named = std::env::var("MLFLOW_TRACKING_URI").ok();
    let Some(named) = named.filter(|uri| !uri.trim().is_empty()) else {
        return open(&status.tracking_uri);
    };
    // It may have a password in it. Credentials for one server are no other's business.
    let source = open(&named)?;
    if source.name() != status.tracking_uri {
        return Err(WrongUsage(format!(
            "{} shows {}, and MLFLOW_TRACKING_URI names {}: set it, and the credentials, to those of the \
             mount",
            mountpoint.display(),
            status.tracking_uri,
            source.name()
        ))
        .into());
    }
    Ok(source)
}

fn open(uri: &str) -> anyhow::Result<Arc<dyn Tracking>> {
    let variable = |name: &str| std::env::var(name).ok();
    let home = std::env::home_dir();
    let source = TrackingSource::choose(Some(uri), Path::new("/"), variable, home.as_deref());
    Ok(source.map_err(WrongUsage::new)?.open()?)
}

/// Waits for an answer.
pub(super) fn answer<T>(asking: impl Future<Output = TrackingResult<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    Ok(runtime.block_on(asking)?)
}
