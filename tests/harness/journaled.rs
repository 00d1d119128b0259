//! Mounts whose closes do not wait for the store, and what they do.

#![allow(dead_code)]

use mlfs_lab::s3::{Fault, Kind, Rule};

use super::{Lab, Mount, PREFIX, wait_until};

pub const JOURNALED: &[&str] = &[
    "--close",
    "journaled",
    "--part-size",
    "5MiB",
    "--memory",
    "128MiB",
];

pub fn mount(lab: &Lab) -> Mount<'_> {
    lab.mount_with(JOURNALED)
}

pub fn uploads(mount: &Mount<'_>) -> Vec<serde_json::Value> {
    mount.status()["uploads"].as_array().unwrap().clone()
}

pub fn states(mount: &Mount<'_>) -> Vec<(String, String)> {
    let all = uploads(mount);
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let name = |path: String| path.rsplit('/').next().unwrap().to_owned();
    all.iter()
        .map(|upload| (name(word(&upload["path"])), word(&upload["state"])))
        .collect()
}

/// Names below the run, in the order in which the store has shown them.
pub fn published(lab: &Lab) -> Vec<String> {
    let log = lab.s3.log().into_iter();
    let shown = log.filter(|it| {
        it.status == 200 && matches!(it.kind, Kind::Put | Kind::CompleteMultipart | Kind::Copy)
    });
    let prefix = format!("{PREFIX}/");
    shown
        .map(|it| it.key.strip_prefix(&prefix).unwrap().to_owned())
        .collect()
}

pub fn wait_until_stored(mount: &Mount<'_>) {
    wait_until("everything to be stored", || uploads(mount).is_empty());
}

pub fn refuse(lab: &Lab, key: &str) {
    let fault = Fault::Status(403, "AccessDenied".to_owned());
    let rule = Rule {
        key: key.to_owned(),
        ..Rule::every(Kind::Put, fault)
    };
    lab.s3.set_faults(1, vec![rule]);
}
