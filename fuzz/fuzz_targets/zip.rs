#![no_main]

use libfuzzer_sys::fuzz_target;
use mlfs_fuzz::read::plan::Format;

fuzz_target!(|input: &[u8]| mlfs_fuzz::check(Format::Zip, input));
