//! The vfs against a plain reference: sequences of operations, injected faults and changes by
//! others, and after every step what a program reads and what the store shows.
//!
//! `MLFS_MODEL_CASES` sets how many sequences are tried. A sequence that fails is shrunk and
//! printed, and kept in `tests/model.proptest-regressions` to be tried first from then on.

#[path = "model/checks.rs"]
mod checks;
#[path = "model/driver.rs"]
mod driver;
#[path = "model/handles.rs"]
mod handles;
#[path = "model/mount.rs"]
mod mount;
#[path = "model/names.rs"]
mod names;
#[path = "model/operations.rs"]
mod operations;
#[path = "model/reference.rs"]
mod reference;

use driver::Lab;
use operations::sequence;
use proptest::test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner};

/// Sequences tried when nothing else is asked for.
const CASES: u32 = 150;
/// Milliseconds spent on making a sequence that fails shorter.
const LONGEST_SHRINKING: u32 = 15_000;

#[test]
fn every_sequence_of_operations_does_what_the_reference_does() {
    let asked = std::env::var("MLFS_MODEL_CASES").ok();
    let cases = asked.map_or(CASES, |text| text.parse().expect("a number of cases"));
    let lab = Lab::new();
    let persistence = FileFailurePersistence::Direct("tests/model.proptest-regressions");
    let mut runner = TestRunner::new(Config {
        cases,
        max_shrink_time: LONGEST_SHRINKING,
        failure_persistence: Some(Box::new(persistence)),
        ..Config::default()
    });
    let outcome = runner.run(&sequence(), |(forever, operations)| {
        let outcome = lab.run(forever, &operations);
        if let Err(error) = &outcome {
            eprintln!("{} operations: {error}", operations.len());
        }
        outcome.map_err(TestCaseError::fail)
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
