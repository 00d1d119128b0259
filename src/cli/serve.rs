//! A running mount, from the first request to the tracking server to the last byte stored.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::budget::Budget;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::fuse::{FuseOptions, Mounted, mount};
use crate::read::{ReadOptions, Reader};
use crate::store::Stores;
use crate::store::s3::S3Settings;
use crate::telemetry;
use crate::tracking::Tracking;
use crate::tracking::rest::RestTracking;
use crate::tracking::settings::TrackingSettings;
use crate::vfs::{PendingFile, Vfs, VfsOptions};
use crate::write::{Spill, WriteOptions, Writer};

/// How often what is pending is looked at while a mount ends.
const LOOK: Duration = Duration::from_millis(50);
/// How long a mount that has been unmounted goes on trying to store what is left.
const LAST_TRANSFERS: Duration = Duration::from_secs(15 * 60);
/// Read blocks and transfers keep this share of the memory, whatever writers do.
const FLOOR_SHARE: u64 = 8;

/// Mounts, calls `ready`, and serves until the mount is gone.
///
/// # Errors
/// What kept it from mounting; or, at the end, what could not be stored.
pub(super) fn run(
    config: &Config,
    ready: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    telemetry::start(config.log_level, config.log_file.as_deref()).with_context(|| {
        let file = config.log_file.as_deref().unwrap_or(Path::new("stderr"));
        format!("log {}", file.display())
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("mlfs-worker")
        .build()
        .context("the threads could not be started")?;
    let vfs = runtime.block_on(assemble(config))?;
    let options = FuseOptions {
        mountpoint: config.mountpoint.clone(),
        allow_other: config.allow_other,
        read_only: config.read_only,
    };
    let mounted = mount(Arc::clone(&vfs), runtime.handle(), &options)
        .with_context(|| format!("mounting on {}", config.mountpoint.display()))?;
    tracing::info!(mountpoint = %config.mountpoint.display(), memory = config.memory,
        spill = %config.spill_dir.display(), "mounted");
    ready()?;
    serve(&runtime, &vfs, mounted, &config.spill_dir)
}

/// Builds the rooms, from right to left.
async fn assemble(config: &Config) -> anyhow::Result<Arc<Vfs>> {
    let runtime = tokio::runtime::Handle::current();
    let variable = |name: &str| std::env::var(name).ok();
    let home = std::env::home_dir();
    let settings = TrackingSettings::new(&config.tracking_uri, variable, home.as_deref())?;
    let tracking = Arc::new(RestTracking::new(settings)?);
    tracking.probe().await?;
    let tracking_uri = tracking.name().to_owned();
    let s3 = S3Settings::from_variables(variable, config.sign_payload)?;
    let stores = Arc::new(Stores::new(s3));
    let shared: Arc<Stores> = Arc::clone(&stores);
    let catalog = Catalog::new(tracking, shared, config.metadata_ttl);
    let read_floor = config.memory / FLOOR_SHARE;
    let transfer_floor = (config.memory / FLOOR_SHARE).max(config.part_size);
    let memory = Budget::new(config.memory, 0, read_floor, transfer_floor);
    let reader = Reader::new(
        Arc::clone(&memory),
        runtime.clone(),
        ReadOptions {
            transfers: config.transfers,
            disk: config.cache.clone(),
        },
    );
    let spill = Spill::open(&config.spill_dir, config.spill_size)
        .with_context(|| format!("--spill-dir {}", config.spill_dir.display()))?;
    let writer = Writer::new(
        memory,
        spill,
        Arc::clone(&reader),
        runtime.clone(),
        WriteOptions {
            part_size: config.part_size,
            transfers: config.transfers,
        },
    );
    let options = VfsOptions {
        mountpoint: config.mountpoint.clone(),
        tracking_uri,
        uid: config.uid,
        gid: config.gid,
        umask: config.umask,
        metadata_ttl: config.metadata_ttl,
        read_only: config.read_only,
    };
    Ok(Vfs::new(catalog, stores, reader, writer, runtime, options))
}

fn serve(
    runtime: &Runtime,
    vfs: &Arc<Vfs>,
    mut mounted: Mounted,
    spill_dir: &Path,
) -> anyhow::Result<()> {
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
        // A terminal that closes does not end a mount.
        let _hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
        let mut ended = false;
        tokio::select! {
            outcome = mounted.finished() => {
                outcome.context("the session with the kernel")?;
                ended = true;
            }
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let impatient = async {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        };
        tokio::select! {
            outcome = finish(vfs, &mut mounted, ended) => outcome?,
            () = impatient => {
                tracing::warn!("told twice to end: not waiting any longer");
                let _ = mounted.unmount(true);
            }
        }
        keep_rest(vfs, spill_dir).await
    })
}

/// Stores what is left and lets the kernel go.
async fn finish(vfs: &Arc<Vfs>, mounted: &mut Mounted, ended: bool) -> anyhow::Result<()> {
    if !ended {
        tracing::info!("told to end: storing what is left, then unmounting");
        store_closed(vfs).await;
        if let Err(error) = mounted.unmount(false) {
            tracing::warn!(%error, "still in use: taken out of the tree, served until the last \
                user is gone");
            mounted.unmount(true).context("unmounting")?;
        }
        mounted
            .finished()
            .await
            .context("the session with the kernel")?;
    }
    store_closed(vfs).await;
    let reading = Arc::clone(vfs);
    let _ = tokio::task::spawn_blocking(move || reading.finish_reading()).await;
    tracing::info!("unmounted");
    Ok(())
}

/// Waits until every closed file is in the store, or has failed to get there.
async fn store_closed(vfs: &Arc<Vfs>) {
    vfs.begin_drain();
    let deadline = tokio::time::Instant::now() + LAST_TRANSFERS;
    let moving = |file: &PendingFile| file.state == "uploading" || file.state == "waiting";
    while vfs.pending().iter().any(moving) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
}

/// Keeps what could not be stored, and names it.
async fn keep_rest(vfs: &Arc<Vfs>, spill_dir: &Path) -> anyhow::Result<()> {
    let pending = vfs.pending();
    if pending.is_empty() {
        return Ok(());
    }
    for file in &pending {
        let reason = file.reason.as_deref().unwrap_or("there was no time");
        tracing::error!(path = file.path, size = file.size, reason, "not stored");
    }
    let folder = spill_dir.join(format!("unsent-{}", std::process::id()));
    for (path, outcome) in vfs.keep_pending(&folder).await {
        match outcome {
            Ok(kept) => tracing::error!(path, kept = %kept.display(), "its bytes are kept"),
            Err(error) => tracing::error!(path, error = format!("{error:#}"), "not kept whole"),
        }
    }
    bail!(
        "{} files could not be stored; their bytes are kept in {}",
        pending.len(),
        folder.display()
    )
}
