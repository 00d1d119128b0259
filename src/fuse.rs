//! The kernel's side: callbacks → vfs calls, errno mapping, mount and unmount.
//!
//! A callback never waits on the network: the vfs call is polled once, inline; if it is not ready
//! then, the call and its reply move into a tokio task, and the thread takes the next request.

mod answer;
mod backing;
mod callbacks;
mod convert;
mod listing;
mod mount;
mod readahead;

pub use mount::{FuseOptions, Mounted, mount, unmount_path};
