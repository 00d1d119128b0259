//! A running mount, from the first request to the tracking server to the last byte stored.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::mounts;
use crate::budget::Budget;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::fuse::{FuseOptions, Mounted, mount};
use crate::read::{ReadOptions, Reader};
use crate::store::cloud::{AzureSettings, GoogleSettings};
use crate::store::proxy::{ProxySettings, Switches};
use crate::store::s3::S3Settings;
use crate::store::{StoreSettings, Stores};
use crate::telemetry::{self, Log};
use crate::tracking::TrackingSource;
use crate::vfs::{Vfs, VfsOptions, moving};
use crate::write::{SMALLEST_PART, Spill, WriteOptions, Writer};

/// How often what is pending is looked at while a mount ends.
const LOOK: Duration = Duration::from_millis(50);
/// How long a mount that has been unmounted goes on trying to store what is left.
const LAST_TRANSFERS: Duration = Duration::from_secs(15 * 60);
/// However short a close's patience is, a request has this long to move.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);
/// Most closed files that wait for the store, whatever else there is room for.
const MOST_QUEUED: usize = 10_000;
/// Files of this process set aside for each of them.
const FILES_A_CLOSE: u64 = 8;
/// Read blocks and transfers keep this share of the memory, whatever writers do.
const FLOOR_SHARE: u64 = 8;

/// Where MLflow's metadata comes from: the flag, and MLflow's own variables and files.
///
/// # Errors
/// What is wrong with one of them, or that there is none.
pub(super) fn tracking_source(config: &Config) -> anyhow::Result<TrackingSource> {
    let folder = std::env::current_dir().context("the working directory cannot be found")?;
    let (uri, home) = (config.tracking_uri.as_deref(), std::env::home_dir());
    let source = TrackingSource::choose(uri, &folder, variable, home.as_deref())?;
    Ok(source)
}

/// How stores are reached: the flag, and MLflow's own variables.
///
/// # Errors
/// What is wrong with one of them.
pub(super) fn store_settings(
    config: &Config,
    source: &TrackingSource,
) -> anyhow::Result<StoreSettings> {
    let mut s3 = S3Settings::from_variables(variable, config.sign_payload)?;
    // A request that hangs is not waited for longer than a close is.
    if !config.close_timeout.is_zero() {
        s3.patience = config.close_timeout.max(LEAST_PATIENCE);
    }
    let proxy = ProxySettings {
        courier: source.courier()?,
        patience: s3.patience,
        folder: config.spill_dir.clone(),
        switches: Switches::from_variables(variable)?,
    };
    Ok(StoreSettings {
        azure: AzureSettings::from_variables(variable, s3.patience),
        google: GoogleSettings::from_variables(variable, s3.patience),
        s3,
        proxy,
    })
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Starts the log.
///
/// # Errors
/// It cannot be written to.
pub(super) fn start_log(config: &Config) -> anyhow::Result<Log> {
    // A limit on the size of files (`ulimit -f`) makes a write fail, and does not end the mount.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let filter = telemetry::filter(config.log_level)?;
    about_log(config, telemetry::start(filter, config.log_file.as_deref()))
}

/// What went wrong with the log, with its path and what to do.
pub(super) fn about_log<T>(config: &Config, outcome: io::Result<T>) -> anyhow::Result<T> {
    outcome.map_err(|error| match &config.log_file {
        Some(file) => anyhow!(
            "log file {}: {error}; name one that can be written with --log-file",
            file.display()
        ),
        None => anyhow!("log: {error}"),
    })
}

/// Mounts, calls `ready`, and serves until the mount is gone.
///
/// # Errors
/// What kept it from mounting; or, at the end, what could not be stored.
pub(super) fn run(
    config: &Config,
    ready: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let _claim = mounts::claim(&config.mountpoint)?;
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
    // From here on a signal is told, not the end: it would leave a dead mount behind.
    let mut signals = {
        let _inside = runtime.enter();
        Signals::new()?
    };
    // Whatever way this ends: what is not stored stays on disk.
    let _keep = KeepFiles(Arc::clone(&vfs));
    if !config.read_only {
        vfs.take_over();
    }
    let mounted = mount(Arc::clone(&vfs), runtime.handle(), &options).map_err(|error| {
        let shown = config.mountpoint.display();
        anyhow!("mount point {shown}: {error}; choose an empty directory of your own")
    })?;
    tracing::info!(mountpoint = %config.mountpoint.display(), memory = config.memory,
        spill = %config.spill_dir.display(), "mounted");
    let told = ready();
    if let Err(error) = &told {
        tracing::error!(
            error = format!("{error:#}"),
            "who asked for this mount is gone, and nobody knows of it: unmounting"
        );
        signals.end.notify_one();
    }
    if !config.read_only {
        let vfs = Arc::clone(&vfs);
        runtime.spawn(async move { vfs.recover().await });
    }
    let served = runtime.block_on(serve(&vfs, mounted, &mut signals, &config.spill_dir));
    told.and(served)
}

/// Sees to it that no file of the spill directory is removed by whoever lets go of it last.
struct KeepFiles(Arc<Vfs>);

impl Drop for KeepFiles {
    fn drop(&mut self) {
        self.0.keep_files();
    }
}

/// What tells a mount to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// A terminal that closes does not end a mount.
    _hangup: Signal,
    /// From inside.
    end: Notify,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("signals cannot be received");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            _hangup: listen(SignalKind::hangup())?,
            end: Notify::new(),
        })
    }

    async fn told_to_end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = self.end.notified() => {}
        }
    }
}

/// Builds the rooms, from right to left.
async fn assemble(config: &Config) -> anyhow::Result<Arc<Vfs>> {
    let runtime = tokio::runtime::Handle::current();
    let source = tracking_source(config)?;
    let stores = Stores::new(store_settings(config, &source)?);
    let tracking = source.open()?;
    tracking.probe().await?;
    let tracking_uri = tracking.name().to_owned();
    let stores = Arc::new(stores);
    let shared: Arc<Stores> = Arc::clone(&stores);
    let catalog = Catalog::new(tracking, shared, config.metadata_ttl);
    let read_floor = config.memory / FLOOR_SHARE;
    let transfer_floor = (config.memory / FLOOR_SHARE).max(config.part_size + SMALLEST_PART);
    let memory = Budget::new(config.memory, 0, read_floor, transfer_floor);
    let reader = Reader::new(
        Arc::clone(&memory),
        runtime.clone(),
        ReadOptions {
            transfers: config.transfers,
            far_prefetches: config.far_prefetches,
            disk: config.cache.clone(),
        },
    );
    let spill = Spill::open(&config.spill_dir, config.spill_size).map_err(|error| {
        anyhow!(
            "spill folder {}: {error}; name one that can be written with --spill-dir",
            config.spill_dir.display()
        )
    })?;
    let writer = Writer::new(
        memory,
        spill,
        Arc::clone(&reader),
        runtime.clone(),
        WriteOptions {
            part_size: config.part_size,
            transfers: config.transfers,
            close_timeout: config.close_timeout,
            tracking: tracking_uri.clone(),
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
        close: config.close,
        side_by_side: config.transfers,
        most_queued: most_queued(raise_file_limit()),
    };
    Ok(Vfs::new(catalog, stores, reader, writer, runtime, options))
}

/// Lets this process have as many files open as it may; returns how many those are.
fn raise_file_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit writes to its argument only, setrlimit reads it.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            let raised = libc::rlimit {
                rlim_cur: limit.rlim_max,
                ..limit
            };
            if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0 {
                return raised.rlim_cur;
            }
        }
    }
    limit.rlim_cur
}

/// How many closed files may wait for the store: each holds its journal and its chunks open.
fn most_queued(file_limit: u64) -> usize {
    usize::try_from(file_limit / FILES_A_CLOSE).map_or(MOST_QUEUED, |most| most.min(MOST_QUEUED))
}

async fn serve(
    vfs: &Arc<Vfs>,
    mut mounted: Mounted,
    signals: &mut Signals,
    spill_dir: &Path,
) -> anyhow::Result<()> {
    let mut ended = false;
    tokio::select! {
        outcome = mounted.finished() => {
            outcome.context("the session with the kernel")?;
            ended = true;
        }
        () = signals.told_to_end() => {}
    }
    tokio::select! {
        outcome = finish(vfs, &mut mounted, ended) => outcome?,
        () = signals.told_to_end() => {
            tracing::warn!("told twice to end: not waiting any longer");
            let _ = mounted.unmount(true);
        }
    }
    keep_rest(vfs, spill_dir).await
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
    vfs.end();
    let deadline = tokio::time::Instant::now() + LAST_TRANSFERS;
    let moves = || {
        let unstored = vfs.unstored();
        !moving(&unstored, false).is_empty()
    };
    while moves() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
}

/// Leaves what could not be stored to the next mount, and names it.
async fn keep_rest(vfs: &Arc<Vfs>, spill_dir: &Path) -> anyhow::Result<()> {
    let pending = vfs.unstored();
    if pending.is_empty() {
        return Ok(());
    }
    for file in &pending {
        let reason = file.reason.as_deref().unwrap_or("there was no time");
        tracing::error!(path = file.path, size = file.size, reason, "not stored");
    }
    for (path, reason) in vfs.keep_pending().await {
        tracing::error!(path, reason, "not kept either");
    }
    bail!(
        "{} files could not be stored; their bytes are kept in {}, and the next mount with this \
         --spill-dir goes on with them",
        pending.len(),
        spill_dir.display()
    )
}
