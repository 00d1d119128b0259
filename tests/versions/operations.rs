//! What readers, somebody else, memory and the disk may do; and how such sequences are made up.

use mlfs_lab::s3::Fault;
use proptest::prelude::*;

use super::content::{NAMES, PITCH};

/// Bytes of a part. (Nothing is written here.)
pub const PART: u64 = 64 << 10;
/// Descriptors a sequence has.
pub const SLOTS: usize = 3;
/// Files stay below this.
const LARGEST: u64 = 1 << 20;

/// A read of what is open; of a file that is opened for it, where nothing is.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub slot: usize,
    /// From the beginning, or, of what would be behind the end, from there around.
    pub at: u64,
    pub length: u32,
}

/// What somebody else does to a file.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// `None`: of the same size.
    Overwrite(usize, Option<u64>),
    Delete(usize),
}

/// What becomes of files of the disk cache.
#[derive(Clone, Copy, Debug)]
pub enum Damage {
    FlippedBytes,
    Truncated,
    GarbageIndex,
    /// The bytes of one version under the checksums of another.
    OthersData,
    /// All but the identity is another version's.
    OthersDataAndIndex,
    /// The folder of one version under the name of another.
    OthersFolder,
    Removed,
}

#[derive(Clone, Debug)]
pub enum Operation {
    Lookup(usize),
    /// After a lookup, or, as the kernel does within the TTL, of what was looked up before.
    Open {
        slot: usize,
        name: usize,
        fresh: bool,
    },
    Close(usize),
    /// Past the kernel's pages.
    Read(Read),
    /// Through the kernel's pages.
    ReadPages(Read),
    /// One piece after the other.
    Scan(Read, u64),
    Change(Change),
    /// Reads at once, and a change while they are on their way.
    Race {
        reads: Vec<Read>,
        change: Change,
        /// The change is made when the store has a request, before it answers.
        held: bool,
        fault: Option<Fault>,
    },
    /// Somebody else needs the memory.
    Evict,
    /// The kernel needs the memory of its pages.
    DropPages,
    /// The kernel forgets every name that is not open.
    Forget,
    /// What was read is on disk.
    Settle,
    Damage(Damage, prop::sample::Index, prop::sample::Index),
    /// Another mount, with the same disk cache.
    Remount,
}

/// How a mount is made.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// What the store said is believed for ever, or not at all.
    pub forever: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of disk cache.
    pub disk: u64,
}

fn name() -> impl Strategy<Value = usize> {
    0..NAMES.len()
}

fn slot() -> impl Strategy<Value = usize> {
    0..SLOTS
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => 0..3_u64,
        2 => 0..70_000_u64,
        2 => prop::sample::select(&[1 << 15, 1 << 17, 512 << 10, (512 << 10) + 1, LARGEST][..]),
        5 => (512 << 10)..LARGEST,
    ]
}

/// Where tensors and members begin, the ends of files, anywhere.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..LARGEST / PITCH).prop_map(|number| number * PITCH),
        2 => (0..LARGEST / PITCH).prop_map(|number| number * PITCH + 4096),
        1 => Just(0),
        2 => LARGEST / 2..LARGEST,
        4 => 0..LARGEST,
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(4096_u32),
        2 => 1..5_000_u32,
        2 => Just(128 << 10),
        1 => 1..400_000_u32,
        1 => Just(2 << 20),
    ]
}

fn read() -> impl Strategy<Value = Read> {
    (slot(), offset(), length()).prop_map(|(slot, at, length)| Read { slot, at, length })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => name().prop_map(|name| Change::Overwrite(name, None)),
        4 => (name(), size()).prop_map(|(name, size)| Change::Overwrite(name, Some(size))),
        1 => name().prop_map(Change::Delete),
    ]
}

fn race() -> impl Strategy<Value = Operation> {
    // What passes is tried again after a while, which costs time: rarely.
    let fault = prop_oneof![
        20 => Just(None),
        1 => (0..300_000_u64).prop_map(|bytes| Some(Fault::ResetAfter(bytes))),
        1 => (0..300_000_u64).prop_map(|bytes| Some(Fault::Truncate(bytes))),
    ];
    let reads = prop::collection::vec(read(), 1..5);
    (reads, change(), any::<bool>(), fault).prop_map(|(reads, change, held, fault)| {
        Operation::Race {
            reads,
            change,
            held,
            fault,
        }
    })
}

fn damage() -> impl Strategy<Value = Damage> {
    prop::sample::select(
        &[
            Damage::FlippedBytes,
            Damage::Truncated,
            Damage::GarbageIndex,
            Damage::OthersData,
            Damage::OthersDataAndIndex,
            Damage::OthersFolder,
            Damage::Removed,
        ][..],
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let index = any::<prop::sample::Index>;
    prop_oneof![
        2 => name().prop_map(O::Lookup),
        10 => (slot(), name(), prop::bool::weighted(0.8))
            .prop_map(|(slot, name, fresh)| O::Open { slot, name, fresh }),
        1 => slot().prop_map(O::Close),
        20 => read().prop_map(O::Read),
        20 => read().prop_map(O::ReadPages),
        4 => (read(), 2..8_u64).prop_map(|(read, pieces)| O::Scan(read, pieces)),
        4 => change().prop_map(O::Change),
        4 => race(),
        4 => Just(O::Evict),
        1 => Just(O::DropPages),
        2 => Just(O::Forget),
        4 => Just(O::Settle),
        4 => (damage(), index(), index()).prop_map(|(damage, one, other)| O::Damage(damage, one, other)),
        2 => Just(O::Remount),
    ]
}

fn setting() -> impl Strategy<Value = Setting> {
    let memory = prop::sample::select(&[1 << 20, 8 << 20][..]);
    let disk = prop::sample::select(&[2 << 20, 64 << 20][..]);
    (any::<bool>(), memory, disk).prop_map(|(forever, memory, disk)| Setting {
        forever,
        memory,
        disk,
    })
}

pub fn sequence() -> impl Strategy<Value = (Setting, Vec<Operation>)> {
    (setting(), prop::collection::vec(operation(), 10..100))
}
