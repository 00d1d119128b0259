//! mlfs mounts MLflow: each run's artifact directory as a local directory.
//!
//! The rooms, from left to right; imports point right only (see ARCHITECTURE.md):
//! `cli` → `config` → `fuse` → `vfs` → `catalog` → `tracking` → `write` → `read` → `store` →
//! `budget`, `http`, `mount_table`, `telemetry`.

pub mod budget;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod fuse;
mod http;
mod mount_table;
pub mod read;
pub mod store;
pub mod telemetry;
pub mod tracking;
pub mod vfs;
pub mod write;
