//! Flags > environment > defaults, validated once, one type.

mod units;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use crate::read::DiskOptions;
use crate::store::s3::SignPayload;
use crate::vfs::CloseMode;
use crate::write::SMALLEST_PART;
pub use units::{parse_duration, parse_size};

const MIB: u64 = 1 << 20;
/// S3 takes no larger part.
const LARGEST_PART: u64 = 5 << 30;
/// Below this there is no room for one part to write, one to send, and some blocks to read.
const SMALLEST_MEMORY: u64 = 64 * MIB;
/// Below this the disk cache would be busy with making room.
const SMALLEST_CACHE: u64 = 64 * MIB;
/// What the disk cache may take when only its folder is named.
const DEFAULT_CACHE: u64 = 20 << 30;
/// The default, where there is room for as many as can be on their way.
const DEFAULT_PART: u64 = 16 * MIB;
/// Uploads, and prefetches, in flight unless told otherwise.
const DEFAULT_TRANSFERS: usize = 32;
/// Of a budget, what writers can have besides those who read: five of so many shares.
const SHARES: u64 = 8;
/// Parts that are being written to, besides those that are sent.
const PARTS_IN_HAND: u64 = 2;
/// A budget must hold this many parts.
const PARTS_IN_MEMORY: u64 = 4;
/// Bytes of the mount point in the name of its log; a filesystem takes 255, with the extension.
const LONGEST_NAME: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SignPayloadFlag {
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CloseFlag {
    /// When the file is in the store
    Stored,
    /// When it is safe on local disk (see --spill-dir); it is stored in the background
    Journaled,
}

/// What `mlfs mount` is told. Each flag stands here once: parser, help and environment variable.
#[derive(Clone, Debug, Args)]
pub struct MountArguments {
    /// Where to mount: an empty directory
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,

    /// The MLflow tracking server, such as http://localhost:5000, or MLflow's own files:
    /// sqlite:///mlflow.db, ./mlruns [default: what of these is in the working directory]
    #[arg(
        long,
        env = "MLFLOW_TRACKING_URI",
        value_name = "URI",
        hide_env_values = true
    )]
    pub tracking_uri: Option<String>,

    /// Stay in the foreground and log to stderr
    #[arg(long, env = "MLFS_FOREGROUND", value_parser = BoolishValueParser::new())]
    pub foreground: bool,

    /// Refuse every change with EROFS
    #[arg(long, env = "MLFS_READ_ONLY", value_parser = BoolishValueParser::new())]
    pub read_only: bool,

    /// Let other users in (others than root need user_allow_other in /etc/fuse.conf)
    #[arg(long, env = "MLFS_ALLOW_OTHER", value_parser = BoolishValueParser::new())]
    pub allow_other: bool,

    /// Most memory for data being written and read, bytes (512MiB, 20G) [default: a quarter of the
    /// machine's, at most 4GiB]
    #[arg(long, env = "MLFS_MEMORY", value_name = "SIZE", value_parser = parse_size,
          allow_negative_numbers = true)]
    pub memory: Option<u64>,

    /// Where data that does not fit in memory waits to be sent [default: the user's cache folder,
    /// mlfs/spill]
    #[arg(long, env = "MLFS_SPILL_DIR", value_name = "DIR")]
    pub spill_dir: Option<PathBuf>,

    /// Most disk space for it, bytes
    #[arg(long, env = "MLFS_SPILL_SIZE", value_name = "SIZE", default_value = "20GiB",
          value_parser = parse_size, allow_negative_numbers = true)]
    pub spill_size: u64,

    /// Where to cache on disk what is read; naming it turns the cache on [default with
    /// --cache-size: the user's cache folder, mlfs/blocks]
    #[arg(long, env = "MLFS_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Most disk space for that, bytes, at least 64MiB; 0 is no disk cache [default: 20GiB with
    /// --cache-dir, else 0]
    #[arg(long, env = "MLFS_CACHE_SIZE", value_name = "SIZE", value_parser = parse_size,
          allow_negative_numbers = true)]
    pub cache_size: Option<u64>,

    /// When a close returns; with journaled, `mlfs wait` and fsync of a directory wait for the store
    #[arg(long, env = "MLFS_CLOSE", value_enum, default_value_t = CloseFlag::Stored)]
    pub close: CloseFlag,

    /// Bytes of a part of a multipart upload, 5MiB to 5GiB [default: 16MiB; less, where --memory
    /// has no room for --transfers of those]
    #[arg(long, env = "MLFS_PART_SIZE", value_name = "SIZE", value_parser = parse_size,
          allow_negative_numbers = true)]
    pub part_size: Option<u64>,

    /// Most uploads in flight, and most prefetches, 1 to 256; of headers in containers, a few KiB each,
    /// eight times as many, at most 256 [default: 32; twice as many prefetches from a store far away]
    #[arg(
        long,
        env = "MLFS_TRANSFERS",
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub transfers: Option<usize>,

    /// How long a close goes on trying while nothing of the file gets through to the store; then
    /// it fails with EIO, and the bytes are kept (30s, 15m, forever)
    #[arg(long, env = "MLFS_CLOSE_TIMEOUT", value_name = "DURATION", default_value = "15m",
          value_parser = parse_duration)]
    pub close_timeout: Duration,

    /// Owner of everything [default: the caller]
    #[arg(
        long,
        env = "MLFS_UID",
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub uid: Option<u32>,

    /// Group of everything [default: the caller's]
    #[arg(
        long,
        env = "MLFS_GID",
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub gid: Option<u32>,

    /// Permission bits nobody gets, octal
    #[arg(long, env = "MLFS_UMASK", value_name = "OCTAL", default_value = "022",
          value_parser = parse_octal)]
    pub umask: u32,

    /// How long names, sizes and times are believed (500ms, 5s, 1m, 0, forever)
    #[arg(long, env = "MLFS_METADATA_TTL", value_name = "DURATION", default_value = "5s",
          value_parser = parse_duration)]
    pub metadata_ttl: Duration,

    /// Whether request bodies are part of the signature: auto signs them over http only; they
    /// carry a CRC32C in any case
    #[arg(long, env = "MLFS_SIGN_PAYLOAD", value_enum, default_value_t = SignPayloadFlag::Auto)]
    pub sign_payload: SignPayloadFlag,

    /// Where to log [default: stderr in the foreground, else the user's state folder, mlfs/]
    #[arg(long, env = "MLFS_LOG_FILE", value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// How much to log
    #[arg(long, env = "MLFS_LOG_LEVEL", value_name = "LEVEL", value_enum,
          default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// A mount's configuration, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub mountpoint: PathBuf,
    pub tracking_uri: Option<String>,
    pub foreground: bool,
    pub read_only: bool,
    pub allow_other: bool,
    /// Bytes.
    pub memory: u64,
    pub spill_dir: PathBuf,
    /// Bytes.
    pub spill_size: u64,
    /// `None`: no disk cache.
    pub cache: Option<DiskOptions>,
    pub close: CloseMode,
    /// Bytes.
    pub part_size: u64,
    pub transfers: usize,
    /// So many more prefetches where the store is far away.
    pub far_prefetches: usize,
    pub close_timeout: Duration,
    pub uid: u32,
    pub gid: u32,
    pub umask: u32,
    pub metadata_ttl: Duration,
    pub sign_payload: SignPayload,
    pub log_file: Option<PathBuf>,
    pub log_level: tracing::Level,
}

/// As large as parts can be with `transfers` of them on their way in `memory` bytes: each
/// connection carries only so much, and what waits for one of its own is of no use.
fn default_part_size(memory: u64, transfers: usize) -> u64 {
    let parts = transfers as u64 + PARTS_IN_HAND;
    let fits = memory / SHARES * 5 / parts / MIB * MIB;
    fits.clamp(SMALLEST_PART, DEFAULT_PART)
}

impl MountArguments {
    /// Checks what was told and fills in what was not.
    ///
    /// # Errors
    /// Names the flag, the value, and what is accepted.
    pub fn validate(&self) -> anyhow::Result<Config> {
        let transfers = self.transfers.unwrap_or(DEFAULT_TRANSFERS);
        if !(1..=256).contains(&transfers) {
            bail!("--transfers {transfers}: give 1 to 256");
        }
        let memory = self.memory.unwrap_or_else(default_memory);
        let part_size = self
            .part_size
            .unwrap_or_else(|| default_part_size(memory, transfers));
        if !(SMALLEST_PART..=LARGEST_PART).contains(&part_size) {
            bail!("--part-size {part_size}: give 5MiB to 5GiB");
        }
        let least = SMALLEST_MEMORY.max(PARTS_IN_MEMORY * part_size);
        if memory < least {
            bail!(
                "--memory {memory}: give at least {least} bytes ({PARTS_IN_MEMORY} times \
                 --part-size, and 64MiB), or a smaller --part-size"
            );
        }
        if self.spill_size < part_size {
            bail!(
                "--spill-size {}: give at least one --part-size ({part_size})",
                self.spill_size
            );
        }
        if self.umask > 0o777 {
            bail!("--umask {:o}: give at most 777", self.umask);
        }
        let mountpoint = std::path::absolute(&self.mountpoint)
            .with_context(|| format!("mount point {}", self.mountpoint.display()))?;
        let spill_dir = data_folder("--spill-dir", self.spill_dir.as_deref(), "spill")?;
        let cache = self.cache()?;
        let log_file = match (&self.log_file, self.foreground) {
            (Some(file), _) => Some(std::path::absolute(file)?),
            (None, true) => None,
            (None, false) => Some(default_log_file(&mountpoint)?),
        };
        Ok(Config {
            mountpoint,
            tracking_uri: self.tracking_uri.clone(),
            foreground: self.foreground,
            read_only: self.read_only,
            allow_other: self.allow_other,
            memory,
            spill_dir,
            spill_size: self.spill_size,
            cache,
            close: match self.close {
                CloseFlag::Stored => CloseMode::Stored,
                CloseFlag::Journaled => CloseMode::Journaled,
            },
            part_size,
            transfers,
            far_prefetches: match self.transfers {
                Some(_) => 0,
                None => DEFAULT_TRANSFERS,
            },
            close_timeout: self.close_timeout,
            // SAFETY: getuid and getgid have no preconditions and cannot fail.
            uid: self.uid.unwrap_or_else(|| unsafe { libc::getuid() }),
            // SAFETY: as above.
            gid: self.gid.unwrap_or_else(|| unsafe { libc::getgid() }),
            umask: self.umask,
            metadata_ttl: self.metadata_ttl,
            sign_payload: match self.sign_payload {
                SignPayloadFlag::Auto => SignPayload::Auto,
                SignPayloadFlag::Always => SignPayload::Always,
                SignPayloadFlag::Never => SignPayload::Never,
            },
            log_file,
            log_level: match self.log_level {
                LogLevel::Error => tracing::Level::ERROR,
                LogLevel::Warn => tracing::Level::WARN,
                LogLevel::Info => tracing::Level::INFO,
                LogLevel::Debug => tracing::Level::DEBUG,
                LogLevel::Trace => tracing::Level::TRACE,
            },
        })
    }
}

impl MountArguments {
    /// The disk cache that was asked for by its folder, its size, or both.
    fn cache(&self) -> anyhow::Result<Option<DiskOptions>> {
        let size = match (self.cache_size, &self.cache_dir) {
            (Some(size), _) => size,
            (None, Some(_)) => DEFAULT_CACHE,
            (None, None) => 0,
        };
        if size == 0 {
            return Ok(None);
        }
        if size < SMALLEST_CACHE {
            bail!("--cache-size {size}: give at least 64MiB, or 0 for no disk cache");
        }
        let directory = cache_folder(self.cache_dir.as_deref())?;
        Ok(Some(DiskOptions { directory, size }))
    }
}

/// Where the disk cache is, of what `--cache-dir` names, or does not.
///
/// # Errors
/// Without a name, when nothing says where the user's cache folder is.
pub fn cache_folder(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    data_folder("--cache-dir", named, "blocks")
}

/// The folder named by `flag`, or `default` in the user's cache folder.
fn data_folder(flag: &str, named: Option<&Path>, default: &str) -> anyhow::Result<PathBuf> {
    let folder = match named {
        Some(folder) => {
            std::path::absolute(folder).with_context(|| format!("{flag} {}", folder.display()))?
        }
        None => user_folder("XDG_CACHE_HOME", ".cache")?
            .join("mlfs")
            .join(default),
    };
    Ok(folder)
}

fn parse_octal(text: &str) -> Result<u32, String> {
    let digits = text.trim_start_matches("0o");
    u32::from_str_radix(digits, 8).map_err(|_| format!("{text:?} is no octal number like 022"))
}

/// A quarter of the machine's memory, at most 4 GiB.
fn default_memory() -> u64 {
    const MOST: u64 = 4 << 30;
    let kibibytes = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        });
    let quarter = kibibytes.map_or(MOST, |kibibytes| kibibytes * 1024 / 4);
    quarter.clamp(4 * SMALLEST_MEMORY, MOST)
}

fn user_folder(variable: &str, fallback: &str) -> anyhow::Result<PathBuf> {
    let named = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    match (named, std::env::var_os("HOME")) {
        (Some(path), _) => Ok(path),
        (None, Some(home)) => Ok(PathBuf::from(home).join(fallback)),
        (None, None) => bail!("neither {variable} nor HOME is set: name the folders by flags"),
    }
}

fn default_log_file(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let name = mountpoint.to_string_lossy();
    let name = name.trim_matches('/').replace('/', "-");
    // Of a path that is too long for a file's name, the end.
    let cut = name.len().saturating_sub(LONGEST_NAME);
    let name = &name[name.ceil_char_boundary(cut)..];
    let folder = user_folder("XDG_STATE_HOME", ".local/state")?;
    Ok(folder.join("mlfs").join(format!("{name}.log")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_large_as_memory_has_room_for_all_that_are_on_their_way() {
        assert_eq!(default_part_size(4 << 30, 16), 16 * MIB);
        assert_eq!(default_part_size(512 * MIB, 16), 16 * MIB);
        assert_eq!(default_part_size(512 * MIB, 32), 9 * MIB);
        assert_eq!(default_part_size(512 * MIB, 256), 5 * MIB);
        assert_eq!(default_part_size(64 * MIB, 16), 5 * MIB);
    }
}
