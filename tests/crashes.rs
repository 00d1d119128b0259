//! A mount killed again and again, at random points: nothing that was confirmed is lost, nothing
//! half written is ever seen, and everything else is accounted for.

mod harness;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use harness::{Lab, close, kill, noise, wait_until};

/// Rounds, unless `MLFS_CRASH_ROUNDS` says otherwise.
const ROUNDS: usize = 50;
/// Sizes of the files that are written side by side in each round, bytes.
const SIZES: [usize; 4] = [4_000, 700_000, (7 << 20) + 5, 23 << 20];
/// A round ends at a random moment before this; writing it all takes about as long.
const LONGEST_LIFE: u64 = 300;
const FLAGS: &[&str] = &["--part-size", "5MiB", "--memory", "64MiB"];

/// Content that tells its file and every place in it.
fn content(round: usize, size: usize) -> Vec<u8> {
    let mut bytes = noise(size + round * 8);
    bytes.drain(..round * 8);
    bytes
}

/// Of the files that are written anew in each round, in place or by a rename, bytes. They differ from
/// round to round by their first word.
const AGAIN: usize = (6 << 20) + 3;

static ANEW: LazyLock<Vec<u8>> = LazyLock::new(|| noise(AGAIN));

fn again(round: usize) -> Vec<u8> {
    let mut bytes = ANEW.clone();
    bytes[..8].copy_from_slice(&round.to_le_bytes());
    bytes
}

/// The round whose content this is, whole.
fn round_of(bytes: &[u8]) -> usize {
    let word = bytes[..8].try_into().expect("a first word");
    let round = usize::from_le_bytes(word);
    assert!(bytes == again(round), "neither an old content nor a new");
    round
}

/// Writes under another name, and renames over the last round's; whether that was confirmed.
fn replace(folder: PathBuf, name: &str, data: &[u8]) -> bool {
    let temporary = folder.join(format!("{name}.part"));
    write(temporary.clone(), data) && fs::rename(temporary, folder.join(name)).is_ok()
}

/// Writes in pieces and closes; whether the close was confirmed.
fn write(path: PathBuf, data: &[u8]) -> bool {
    let Ok(mut file) = File::create(path) else {
        return false;
    };
    let written = data
        .chunks(300_000)
        .all(|piece| file.write_all(piece).is_ok());
    written && close(file) == 0
}

/// Under a name that is written to in each round is what was confirmed last, or something later.
fn check_repeated(lab: &Lab, name: &str, confirmed: Option<usize>, latest: usize) {
    let shown = lab.stored(name).map(|stored| round_of(&stored));
    assert!(
        shown >= confirmed && shown <= Some(latest),
        "{name}: round {shown:?} is shown, and {confirmed:?} was confirmed"
    );
}

/// A random number after `seed`.
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

fn rounds() -> usize {
    let rounds = std::env::var("MLFS_CRASH_ROUNDS");
    rounds.map_or(ROUNDS, |text| text.parse().expect("a number of rounds"))
}

#[test]
fn a_mount_killed_at_any_moment_loses_nothing_confirmed_and_shows_nothing_half() {
    let rounds = rounds();
    let lab = Lab::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    // Name → round and size.
    let mut unconfirmed = BTreeMap::new();
    // Of the two files that are written again and again: the last round that was confirmed.
    let mut confirmed = [("overwritten", None), ("replaced", None)];
    let mut times = 0;
    for round in 0..rounds {
        let mount = lab.mount_with(FLAGS);
        let contents = SIZES.map(|size| content(round, size));
        let writers = contents.map(|data| {
            let size = data.len();
            let name = format!("{round}-{size}");
            let path = mount.at(&name);
            let thread = std::thread::spawn(move || write(path, &data));
            (name, size, thread)
        });
        let (first, second) = (again(round), again(round));
        let (path, folder) = (mount.at("overwritten"), mount.at(""));
        let repeated = [
            std::thread::spawn(move || write(path, &first)),
            std::thread::spawn(move || replace(folder, "replaced", &second)),
        ];
        // Chance, not patience: nothing is decided by how long this takes.
        std::thread::sleep(Duration::from_millis(next(&mut seed) % LONGEST_LIFE));
        kill(&mount);
        for (thread, (name, last)) in repeated.into_iter().zip(&mut confirmed) {
            if thread.join().expect("the writer") {
                *last = Some(round);
                times += 1;
            }
            check_repeated(&lab, name, *last, round);
        }
        for (name, size, thread) in writers {
            if thread.join().expect("the writer") {
                let stored = lab.stored(&name).expect("what was confirmed is stored");
                assert!(stored == content(round, size), "{name}");
            } else {
                unconfirmed.insert(name, (round, size));
            }
        }
    }
    let mount = lab.mount_with(FLAGS);
    wait_until("what was closed to be stored", || {
        let status = mount.status();
        let uploads = status["uploads"].as_array().unwrap();
        uploads.iter().all(|upload| upload["state"] == "left")
    });
    let status = mount.status();
    let left: Vec<&str> = status["uploads"]
        .as_array()
        .unwrap()
        .iter()
        .map(|upload| upload["path"].as_str().unwrap())
        .collect();
    for (name, last) in confirmed {
        check_repeated(&lab, name, last, rounds - 1);
    }
    let mut finished = 0;
    for (name, (round, size)) in &unconfirmed {
        if let Some(stored) = lab.stored(name) {
            finished += 1;
            assert!(
                stored == content(*round, *size),
                "{name} is whole or not there"
            );
            let also_left = left.iter().any(|path| path.ends_with(&format!("/{name}")));
            assert!(!also_left, "{name} is stored: {:#}", status["uploads"]);
        }
    }
    println!(
        "{rounds} rounds: {} closes not confirmed; {finished} of these files are stored all the \
         same, {} are kept unfinished, the rest had not got as far as the disk; {times} overwrites \
         and replacements confirmed",
        unconfirmed.len(),
        left.len()
    );
    for upload in status["uploads"].as_array().unwrap() {
        let reason = upload["reason"].as_str().unwrap();
        let path = upload["path"].as_str().unwrap();
        // What is written to in each round may have been overtaken by a later round.
        let repeated = path.ends_with("overwritten") || path.ends_with(".part");
        let expected = reason.contains("not closed") || repeated && reason.contains("newer");
        assert!(expected, "{upload}");
    }
    fs::write(mount.path.join(".mlfs/discard"), "all").unwrap();
    // An upload whose beginning was answered as the mount died is nobody's; it holds no part.
    assert_eq!(lab.s3.parts(), 0);
}

/// The files of a model, in the order in which they are written.
const MODEL: [(&str, usize); 4] = [
    ("weights", (7 << 20) + 5),
    ("tokens", 700_000),
    ("config", 4_000),
    ("MLmodel", 100),
];

fn model_file(round: usize, name: &str) -> String {
    format!("model-{round}/{name}")
}

/// Writes a model, file by file, until one is not confirmed; how many were.
fn write_model(folder: PathBuf, round: usize) -> usize {
    if fs::create_dir(folder.join(format!("model-{round}"))).is_err() {
        return 0;
    }
    let confirmed = MODEL.iter().take_while(|(name, size)| {
        let path = folder.join(model_file(round, name));
        write(path, &content(round, *size))
    });
    confirmed.count()
}

/// How many files of a model the store shows; each is whole, and the manifest is there only with all
/// others.
fn check_model(lab: &Lab, round: usize) -> usize {
    // The manifest is looked at first: what comes to be meanwhile does no harm.
    let loadable = lab.stored(&model_file(round, "MLmodel")).is_some();
    let shown = MODEL.iter().filter(|(name, size)| {
        let stored = lab.stored(&model_file(round, name));
        if let Some(stored) = &stored {
            assert!(*stored == content(round, *size), "{round}: {name} is whole");
        }
        stored.is_some()
    });
    let shown = shown.count();
    assert!(
        !loadable || shown == MODEL.len(),
        "{round}: loadable, and not whole"
    );
    shown
}

#[test]
fn journaled_closes_of_a_mount_killed_at_any_moment_are_stored_in_order_by_the_next_ones() {
    const JOURNALED: &[&str] = &["--close", "journaled"];
    let lab = Lab::new();
    let flags = [FLAGS, JOURNALED].concat();
    let mut seed = 0x1234_5678_9abc_def1_u64;
    // How many files of each round's model were confirmed.
    let mut confirmed = Vec::new();
    for round in 0..rounds() {
        let mount = lab.mount_with(&flags);
        let folder = mount.at("");
        let writer = std::thread::spawn(move || write_model(folder, round));
        std::thread::sleep(Duration::from_millis(next(&mut seed) % LONGEST_LIFE));
        kill(&mount);
        confirmed.push(writer.join().expect("the writer"));
        for round in round.saturating_sub(2)..=round {
            check_model(&lab, round);
        }
    }
    let mount = lab.mount_with(&flags);
    wait_until("what was closed to be stored", || {
        let status = mount.status();
        let uploads = status["uploads"].as_array().unwrap();
        uploads.iter().all(|upload| upload["state"] == "left")
    });
    let mut whole = 0;
    for (round, confirmed) in confirmed.iter().enumerate() {
        let shown = check_model(&lab, round);
        assert!(
            shown >= *confirmed,
            "{round}: {shown} of {confirmed} are stored"
        );
        whole += usize::from(shown == MODEL.len());
    }
    println!("{} rounds: {whole} models are whole", confirmed.len());
    fs::write(mount.path.join(".mlfs/discard"), "all").unwrap();
    assert_eq!(lab.s3.parts(), 0);
}
