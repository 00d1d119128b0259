//! A reader gets bytes of one version, whatever others do to the file meanwhile, whatever is evicted,
//! and whatever becomes of the disk cache: sequences of lookups, opens, reads, changes and damage.
//!
//! `MLFS_VERSIONS_CASES` sets how many sequences are tried. A sequence that fails is shrunk and
//! printed, and kept in `tests/versions.proptest-regressions` to be tried first from then on.

mod harness;

#[path = "versions/content.rs"]
mod content;
#[path = "versions/crowd.rs"]
mod crowd;
#[path = "versions/damage.rs"]
mod damage;
#[path = "versions/driver.rs"]
mod driver;
#[path = "versions/history.rs"]
mod history;
#[allow(dead_code)]
#[path = "model/mount.rs"]
mod mount;
#[path = "versions/mounted.rs"]
mod mounted;
#[path = "versions/operations.rs"]
mod operations;
#[path = "versions/pages.rs"]
mod pages;

use driver::Lab;
use operations::sequence;
use proptest::test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner};

/// Sequences tried when nothing else is asked for.
const CASES: u32 = 100;
/// Milliseconds spent on making a sequence that fails shorter.
const LONGEST_SHRINKING: u32 = 15_000;

#[test]
fn whatever_happens_to_a_file_what_is_read_of_it_is_of_one_version() {
    let asked = std::env::var("MLFS_VERSIONS_CASES").ok();
    let cases = asked.map_or(CASES, |text| text.parse().expect("a number of cases"));
    let lab = Lab::new();
    let persistence = FileFailurePersistence::Direct("tests/versions.proptest-regressions");
    let mut runner = TestRunner::new(Config {
        cases,
        max_shrink_time: LONGEST_SHRINKING,
        failure_persistence: Some(Box::new(persistence)),
        ..Config::default()
    });
    let outcome = runner.run(&sequence(), |(setting, operations)| {
        let outcome = lab.run(setting, &operations);
        if let Err(error) = &outcome {
            eprintln!("{} operations: {error}", operations.len());
        }
        outcome.map_err(TestCaseError::fail)
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
