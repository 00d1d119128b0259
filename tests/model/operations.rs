//! What a program, the store, and somebody else may do; and how such sequences are made up.

use mlfs_lab::s3::{Fault, Kind};
use proptest::prelude::*;

/// Bytes of a part in these tests.
pub const PART: u64 = 64 * 1024;
/// Files stay below this, so that all that can be unpublished fits memory and spill together.
pub const LARGEST: u64 = 10 * PART;
/// Descriptors a sequence has.
pub const SLOTS: usize = 4;

/// Few names, so that operations meet. `d` and `e` are mostly directories.
pub const PATHS: [&str; 10] = [
    "a", "b", "a.tmp", "d", "e", "d/a", "d/b", "d/e", "e/a", "d/e/a",
];

#[derive(Clone, Debug)]
pub struct Opening {
    pub slot: usize,
    pub path: &'static str,
    pub read: bool,
    pub write: bool,
    pub create: bool,
    pub truncate: bool,
    pub exclusive: bool,
}

#[derive(Clone, Debug)]
pub enum Operation {
    Open(Opening),
    Write {
        slot: usize,
        at: u64,
        length: u64,
        seed: u64,
    },
    Append {
        slot: usize,
        length: u64,
        seed: u64,
    },
    Read {
        slot: usize,
        at: u64,
        length: u64,
    },
    Resize {
        slot: usize,
        size: u64,
    },
    ResizePath {
        path: &'static str,
        size: u64,
    },
    Close(usize),
    Synchronise(usize),
    /// Create or empty, write to the end, close.
    Save {
        path: &'static str,
        length: u64,
        seed: u64,
    },
    Rename {
        from: &'static str,
        to: &'static str,
    },
    Unlink(&'static str),
    MakeDirectory(&'static str),
    RemoveDirectory(&'static str),
    List(&'static str),
    /// The kernel forgets every name that is not open.
    Forget,
    Drain,
    OutsidePut {
        path: &'static str,
        length: u64,
        seed: u64,
    },
    OutsideDelete(&'static str),
    /// The next operation meets this.
    Trouble {
        kind: Kind,
        fault: Fault,
        times: u64,
    },
}

fn path() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&PATHS[..])
}

fn slot() -> impl Strategy<Value = usize> {
    0..SLOTS
}

/// Lengths and offsets: small ones, those around the borders of parts, any.
fn extent() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => 0..200_u64,
        3 => (0..8_u64, 0..3_u64).prop_map(|(part, off)| (part * PART + off).saturating_sub(1)),
        2 => 0..8 * PART,
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 1..2_000_u64, 2 => extent(), 1 => Just(PART), 1 => Just(2 * PART)]
}

fn opening() -> impl Strategy<Value = Operation> {
    let flags = (0..8_u8, any::<bool>(), 0..6_u8, 0..10_u8);
    (slot(), path(), flags).prop_map(|(slot, path, (mode, create, truncate, exclusive))| {
        let write = mode != 0;
        Operation::Open(Opening {
            slot,
            path,
            read: mode != 1,
            write,
            create: create && write,
            truncate: truncate == 0 && write,
            exclusive: exclusive == 0 && create && write,
        })
    })
}

fn trouble() -> impl Strategy<Value = Operation> {
    const KINDS: [Kind; 9] = [
        Kind::List,
        Kind::Get,
        Kind::Put,
        Kind::CreateMultipart,
        Kind::UploadPart,
        Kind::CopyPart,
        Kind::CompleteMultipart,
        Kind::Copy,
        Kind::Delete,
    ];
    // What passes is tried again by the client after a while, which costs time: rarely.
    let fault = prop_oneof![
        12 => Just(Fault::Status(403, "AccessDenied".to_owned())),
        1 => Just(Fault::Status(503, "SlowDown".to_owned())),
        1 => Just(Fault::ResetBefore),
        1 => Just(Fault::DoThenFail),
    ];
    (prop::sample::select(&KINDS[..]), fault, 1..4_u64).prop_map(|(kind, fault, times)| {
        let fault = match (kind, fault) {
            // An upload that was begun and told of as an error is begun again; nobody can say
            // whose the first one is, and it stays, empty.
            (Kind::CreateMultipart, Fault::DoThenFail) => Fault::ResetBefore,
            (_, fault) => fault,
        };
        let lasting = matches!(fault, Fault::Status(403, _));
        let times = if lasting { times } else { 1 };
        Operation::Trouble { kind, fault, times }
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let seed = || 1..u64::MAX;
    prop_oneof![
        10 => opening(),
        14 => (slot(), extent(), length(), seed())
            .prop_map(|(slot, at, length, seed)| O::Write { slot, at, length, seed }),
        8 => (slot(), length(), seed())
            .prop_map(|(slot, length, seed)| O::Append { slot, length, seed }),
        6 => (slot(), extent(), length()).prop_map(|(slot, at, length)| O::Read { slot, at, length }),
        5 => (slot(), extent()).prop_map(|(slot, size)| O::Resize { slot, size }),
        2 => (path(), extent()).prop_map(|(path, size)| O::ResizePath { path, size }),
        9 => slot().prop_map(O::Close),
        2 => slot().prop_map(O::Synchronise),
        8 => (path(), length(), seed()).prop_map(|(path, length, seed)| O::Save { path, length, seed }),
        8 => (path(), path()).prop_map(|(from, to)| O::Rename { from, to }),
        5 => path().prop_map(O::Unlink),
        5 => prop::sample::select(&["d", "e", "d/e", "a"][..]).prop_map(O::MakeDirectory),
        3 => path().prop_map(O::RemoveDirectory),
        3 => prop::sample::select(&["", "d", "e", "d/e", "a"][..]).prop_map(O::List),
        3 => Just(O::Forget),
        1 => Just(O::Drain),
        2 => (path(), length(), seed())
            .prop_map(|(path, length, seed)| O::OutsidePut { path, length, seed }),
        2 => path().prop_map(O::OutsideDelete),
        4 => trouble(),
    ]
}

/// A sequence, and whether what the store said is believed for ever (then nobody else changes it)
/// or not at all.
pub fn sequence() -> impl Strategy<Value = (bool, Vec<Operation>)> {
    (any::<bool>(), prop::collection::vec(operation(), 1..60))
}

/// Bytes that are nowhere alike.
pub fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length as usize + 8);
    while (bytes.len() as u64) < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length as usize);
    bytes
}
