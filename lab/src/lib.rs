//! Servers and measuring programs for the tests and benchmarks of mlfs.
//!
//! - [`s3`]: an S3 server in memory, several times faster than any real one that installs here,
//!   that shapes its answers, fails on a schedule, and counts everything;
//! - [`tracking`]: as much of an MLflow tracking server as a mount needs, and [`artifacts`], the
//!   routes by which such a server proxies them;
//! - [`link`]: a network that is slow, pauses or breaks.
//!
//! Nothing here is part of the product, and nothing here is evidence of how real servers behave:
//! the tests that need a real MLflow and a real S3 server have them.

pub mod artifacts;
pub mod link;
pub mod s3;
pub mod tracking;
