use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tempfile::TempDir;

use super::*;
use crate::budget::Budget;
use crate::read::BLOCK_SIZE;

const MIB: u64 = 1 << 20;
const NO_LIMIT: u64 = 1 << 40;

/// Blocks to be fetched: the first, and the one after the last.
type Gap = (u64, u64);

/// A cache of `limit` bytes in `folder`, ended when dropped.
struct Cache(Arc<Disk>);

impl Drop for Cache {
    fn drop(&mut self) {
        self.0.queue.close();
    }
}

impl Cache {
    fn new(folder: &TempDir, limit: u64) -> Self {
        let options = DiskOptions {
            directory: folder.path().to_owned(),
            size: limit,
        };
        Self(Disk::open(&options, 64 * MIB))
    }

    fn object(&self, identity: &Identity) -> DiskObject {
        DiskObject {
            disk: Arc::clone(&self.0),
            identity: Arc::new(identity.clone()),
        }
    }

    /// Offers all of an object and waits until it has been dealt with.
    fn write(&self, identity: &Identity, bytes: &[u8]) {
        self.object(identity).offer(0, &blocks(bytes));
        assert!(self.0.queue.wait_until_empty(Duration::from_secs(30)));
    }

    /// What there is of an object, and which blocks would have to be fetched.
    fn read(&self, identity: &Identity) -> (Vec<Option<Bytes>>, Vec<Gap>) {
        let count = identity.size.div_ceil(BLOCK_SIZE);
        let (mut found, mut gaps) = (Vec::new(), Vec::new());
        while (found.len() as u64) < count {
            match self.0.find(identity, found.len() as u64..count) {
                Found::Run(run) => found.extend(run.into_iter().map(Some)),
                Found::Gap(gap) => {
                    found.resize(gap.end as usize, None);
                    gaps.push((gap.start, gap.end));
                }
            }
        }
        (found, gaps)
    }

    /// Reads an object; whatever is given must be right. Returns the gaps.
    fn check(&self, identity: &Identity, bytes: &[u8]) -> Vec<Gap> {
        let (found, gaps) = self.read(identity);
        for (block, expected) in found.iter().zip(bytes.chunks(BLOCK_SIZE as usize)) {
            assert!(block.as_ref().is_none_or(|block| block == expected));
        }
        gaps
    }
}

fn object(key: &str, bytes: &[u8]) -> Identity {
    Identity::new("http://here/bucket", key, "\"e\"", bytes.len() as u64)
}

fn blocks(bytes: &[u8]) -> Vec<Arc<Block>> {
    let budget = Budget::plain(NO_LIMIT);
    let block = |bytes: &[u8]| {
        let (one, other) = bytes.split_at(bytes.len() / 3);
        let frames = vec![Bytes::copy_from_slice(one), Bytes::copy_from_slice(other)];
        let reservation = budget.try_reserve(crate::budget::Class::Read, bytes.len() as u64);
        Block::new(frames, reservation.unwrap(), None)
    };
    bytes.chunks(BLOCK_SIZE as usize).map(block).collect()
}

fn noise(length: usize) -> Vec<u8> {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let step = |_| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    };
    (0..length).map(step).collect()
}

/// Bytes that the cache takes on disk, as anybody can see.
fn usage_of(folder: &TempDir) -> u64 {
    let versions = fs::read_dir(folder.path().join(LAYOUT)).unwrap();
    versions
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            match space::folder_usage(&folder.path().join(LAYOUT), &name) {
                // It went while it was looked at.
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                usage => usage.unwrap(),
            }
        })
        .sum()
}

#[test]
fn what_was_written_is_found_in_runs_by_every_mount() {
    let folder = TempDir::new().unwrap();
    let bytes = noise(3 * MIB as usize + 1000);
    let identity = object("k", &bytes);
    let cache = Cache::new(&folder, NO_LIMIT);
    assert_eq!(cache.check(&identity, &bytes), vec![(0, 97)]);
    cache.write(&identity, &bytes);
    assert!(cache.check(&identity, &bytes).is_empty());
    let other = Cache::new(&folder, NO_LIMIT);
    assert!(other.check(&identity, &bytes).is_empty());
    let Found::Run(run) = other.0.find(&identity, 0..97) else {
        panic!("not found");
    };
    assert_eq!(run.len(), RUN);
    // `data` is the object, byte for byte.
    let data = folder.path().join(LAYOUT).join(&identity.name).join("data");
    assert!(fs::read(data).unwrap() == bytes);
    assert_eq!(cache.0.status().bytes_written, bytes.len() as u64);
}

#[test]
fn everything_in_it_is_the_users_alone() {
    let folder = TempDir::new().unwrap();
    let bytes = noise(1000);
    let identity = object("k", &bytes);
    Cache::new(&folder, NO_LIMIT).write(&identity, &bytes);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let root = folder.path().join(LAYOUT);
    let version = root.join(&identity.name);
    assert_eq!((mode(&root), mode(&version)), (0o700, 0o700));
    for file in ["identity", "data", "index"] {
        assert_eq!(mode(&version.join(file)), 0o600);
    }
    // Where others can write, nothing is believed.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(!Cache::new(&folder, NO_LIMIT).0.status().on);
}

#[test]
fn damage_is_never_served_and_is_mended_by_the_next_write() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage, Vec<Gap>); 9] = [
        (
            "a flipped byte",
            |at| flip(&at.join("data"), 40 * 32 * 1024 + 17),
            vec![(40, 41)],
        ),
        (
            "a truncated data file",
            |at| cut(&at.join("data"), 90 * 32 * 1024 + 5),
            vec![(90, 97)],
        ),
        (
            "a hole",
            |at| {
                cut(&at.join("data"), 0);
                cut(&at.join("data"), 3 * MIB + 1000)
            },
            vec![(0, 97)],
        ),
        (
            "a flipped checksum",
            |at| flip(&at.join("index"), 8 * 3),
            vec![(3, 4)],
        ),
        (
            "a garbage index",
            |at| fs::write(at.join("index"), noise(97 * 8)).unwrap(),
            vec![(0, 97)],
        ),
        (
            "an index cut off in an entry",
            |at| cut(&at.join("index"), 50 * 8 + 3),
            vec![(50, 97)],
        ),
        (
            "no index",
            |at| fs::remove_file(at.join("index")).unwrap(),
            vec![(0, 97)],
        ),
        (
            "a wrong identity",
            |at| flip(&at.join("identity"), 30),
            vec![(0, 97)],
        ),
        (
            "no identity",
            |at| fs::remove_file(at.join("identity")).unwrap(),
            vec![(0, 97)],
        ),
    ];
    let bytes = noise(3 * MIB as usize + 1000);
    for (what, damage, expected) in damages {
        let folder = TempDir::new().unwrap();
        let identity = object("k", &bytes);
        Cache::new(&folder, NO_LIMIT).write(&identity, &bytes);
        damage(&folder.path().join(LAYOUT).join(&identity.name));
        let cache = Cache::new(&folder, NO_LIMIT);
        let mut gaps = cache.check(&identity, &bytes);
        // Blocks found to be damaged one by one are gaps one by one.
        gaps.dedup_by(|next, gap| {
            let adjoins = next.0 == gap.1;
            gap.1 = if adjoins { next.1 } else { gap.1 };
            adjoins
        });
        assert_eq!(gaps, expected, "{what}");
        cache.write(&identity, &bytes);
        assert!(cache.check(&identity, &bytes).is_empty(), "{what}");
        assert!(cache.0.status().on, "{what}");
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn cut(path: &Path, length: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(length).unwrap();
}

#[test]
fn files_of_another_version_under_this_ones_identity_are_not_served() {
    let folder = TempDir::new().unwrap();
    let (one, other) = (noise(100_000), vec![7; 100_000]);
    let (first, second) = (object("one", &one), object("other", &other));
    let cache = Cache::new(&folder, NO_LIMIT);
    cache.write(&first, &one);
    cache.write(&second, &other);
    let root = folder.path().join(LAYOUT);
    for file in ["data", "index"] {
        let from = root.join(&second.name).join(file);
        fs::copy(from, root.join(&first.name).join(file)).unwrap();
    }
    let cache = Cache::new(&folder, NO_LIMIT);
    assert_eq!(
        cache.check(&first, &one).iter().map(|gap| gap.1).max(),
        Some(4)
    );
    assert!(cache.check(&second, &other).is_empty());
}

#[test]
fn the_least_recently_used_go_first_and_the_limit_holds() {
    let folder = TempDir::new().unwrap();
    let limit = 8 * MIB;
    let bytes = noise(2 * MIB as usize);
    let cache = Cache::new(&folder, limit);
    let names: Vec<Identity> = (0..12)
        .map(|number| object(&number.to_string(), &bytes))
        .collect();
    for identity in &names {
        cache.write(identity, &bytes);
        assert!(usage_of(&folder) <= limit);
        assert!(cache.check(identity, &bytes).is_empty());
        // The first is used all the time; to be noted once a minute, an hour passes.
        let index = folder
            .path()
            .join(LAYOUT)
            .join(&names[0].name)
            .join("index");
        let index = fs::OpenOptions::new().write(true).open(index).unwrap();
        index
            .set_modified(SystemTime::now() + Duration::from_secs(3600))
            .unwrap();
    }
    assert!(cache.check(&names[0], &bytes).is_empty());
    assert!(!cache.check(&names[1], &bytes).is_empty());
    assert!(cache.check(&names[11], &bytes).is_empty());
    // A mount with a smaller limit begins by holding it.
    drop(cache);
    let _smaller = Cache::new(&folder, 3 * MIB);
    let deadline = Instant::now() + Duration::from_secs(30);
    while usage_of(&folder) > 3 * MIB {
        assert!(Instant::now() < deadline, "nothing went");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn two_mounts_at_work_hold_the_limit_but_for_a_named_share() {
    let folder = TempDir::new().unwrap();
    let limit = 16 * MIB;
    let bytes = noise(MIB as usize);
    let mounts = [Cache::new(&folder, limit), Cache::new(&folder, limit)];
    for number in 0..40 {
        for (who, mount) in mounts.iter().enumerate() {
            mount.write(&object(&format!("{who}-{number}"), &bytes), &bytes);
            assert!(usage_of(&folder) <= limit + limit / 16 + MIB);
        }
    }
    // Both go on caching.
    for (who, mount) in mounts.iter().enumerate() {
        let last = object(&format!("{who}-39"), &bytes);
        assert!(mount.check(&last, &bytes).is_empty());
    }
}

#[test]
fn what_is_queued_when_a_mount_ends_is_written() {
    let folder = TempDir::new().unwrap();
    let bytes = noise(20 * MIB as usize);
    let identity = object("k", &bytes);
    let cache = Cache::new(&folder, NO_LIMIT);
    cache.object(&identity).offer(0, &blocks(&bytes));
    cache.0.finish();
    assert!(cache.check(&identity, &bytes).is_empty());
}

#[test]
fn an_object_larger_than_the_limit_is_cached_as_far_as_there_is_room() {
    let folder = TempDir::new().unwrap();
    let limit = 4 * MIB;
    let (large, small) = (noise(9 * MIB as usize), noise(MIB as usize));
    let (identity, other) = (object("large", &large), object("small", &small));
    let cache = Cache::new(&folder, limit);
    cache.write(&identity, &large);
    assert!(usage_of(&folder) <= limit);
    let gaps = cache.check(&identity, &large);
    assert!(gaps.len() == 1 && gaps[0].0 >= 2 * 32, "{gaps:?}");
    assert!(cache.0.status().bytes_skipped >= 5 * MIB);
    // It does not stay in another one's way.
    cache.write(&other, &small);
    assert!(cache.check(&other, &small).is_empty());
    assert!(usage_of(&folder) <= limit);
}

#[test]
fn a_version_deleted_by_another_mount_is_read_on_and_made_anew() {
    let folder = TempDir::new().unwrap();
    let bytes = noise(MIB as usize);
    let identity = object("k", &bytes);
    let cache = Cache::new(&folder, NO_LIMIT);
    cache.write(&identity, &bytes);
    version::remove(&folder.path().join(LAYOUT), &identity.name).unwrap();
    assert!(cache.check(&identity, &bytes).is_empty());
    assert!(Cache::new(&folder, NO_LIMIT).check(&identity, &bytes) == vec![(0, 32)]);
    cache.write(&identity, &bytes);
    assert!(
        Cache::new(&folder, NO_LIMIT)
            .check(&identity, &bytes)
            .is_empty()
    );
    // The whole folder, too.
    fs::remove_dir_all(folder.path().join(LAYOUT)).unwrap();
    cache.write(&identity, &bytes);
    assert!(
        Cache::new(&folder, NO_LIMIT)
            .check(&identity, &bytes)
            .is_empty()
    );
}

#[test]
fn a_folder_that_cannot_be_used_turns_the_cache_off() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join(LAYOUT), b"a file").unwrap();
    let cache = Cache::new(&folder, NO_LIMIT);
    let bytes = noise(1000);
    let identity = object("k", &bytes);
    cache.write(&identity, &bytes);
    assert!(!cache.0.status().on);
    assert_eq!(cache.check(&identity, &bytes), vec![(0, 1)]);
}

#[test]
fn a_full_queue_takes_no_more() {
    let queue = Queue::new(2 * BLOCK_SIZE);
    let bytes = noise(BLOCK_SIZE as usize);
    let identity = Arc::new(object("k", &bytes));
    let batch = || Batch {
        identity: Arc::clone(&identity),
        first: 0,
        blocks: blocks(&bytes),
        _waiter: None,
    };
    let push = || queue.push(batch()).is_ok();
    assert!(push() && push() && !push());
    let queue::Next::Write(taken) = queue.next(Duration::ZERO) else {
        panic!("nothing in the queue");
    };
    // What is being written takes its room.
    assert!(!push());
    queue.done(taken);
    assert!(push());
    queue.abandon();
    assert!(queue.bytes() == 0 && !push());
}
