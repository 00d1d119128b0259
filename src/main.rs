//! The `mlfs` program; everything is in the library.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What was let go of goes back to the system after a second, not after ten: after a change of threads
/// (the disk cache's take the place of the network's) the memory of both counted, 1.5 times the budget.
/// Nothing is slower for it.
// SAFETY: jemalloc reads its options from this symbol before `main`: a pointer to a text that ends
// with a zero and is never written to, as its C header declares it. No other crate defines it.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_OPTIONS: &[u8; 20] = b"dirty_decay_ms:1000\0";

fn main() -> std::process::ExitCode {
    mlfs::cli::main()
}
