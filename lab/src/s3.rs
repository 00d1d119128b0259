//! An S3 server in memory, which understands Google's dialect too.

mod body;
mod faults;
mod google;
mod multipart;
mod objects;
mod operations;
mod request;
mod server;
mod stats;
mod time;
mod xml;

pub use faults::{Fault, Rule};
pub use server::{S3Server, ServerOptions};
pub use stats::{Kind, Logged, Stats};

/// The only credentials.
pub const ACCESS_KEY: &str = "lab";
pub const SECRET_KEY: &str = "labsecret";
