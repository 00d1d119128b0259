//! What it costs to find out where the tensors of a file are. (`scripts/fuzz` asks the same of
//! arbitrary files.)

#[path = "../fuzz/src/memory.rs"]
mod memory;

use mlfs::read::plan::{Format, Plan};

#[test]
fn a_header_takes_memory_in_proportion_to_its_bytes_whatever_is_in_it() {
    let entries: Vec<String> = (0..100_000)
        .map(|name| format!("\"{name:x}\":{{}}"))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    let size = bytes.len() as u64;
    let (plan, most) = memory::most(|| Format::Safetensors.plan(size, 0, &bytes));
    assert!(matches!(plan, Plan::Ready(extents) if extents.is_empty()));
    assert!(most <= bytes.len() * 2, "{most} bytes for {size}");
}
