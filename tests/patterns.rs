//! What is fetched ahead of readers that move otherwise than forward, and what they pay for it.

mod harness;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use harness::{Lab, Mount, noise, wait_until};
use mlfs_lab::s3::{Kind, ServerOptions};

const MIB: u64 = 1 << 20;

fn read(file: &File, offset: u64, length: u64) -> Vec<u8> {
    let mut buffer = vec![0; length as usize];
    file.read_exact_at(&mut buffer, offset).unwrap();
    buffer
}

/// The bytes that were asked of the store, a range a request.
fn ranges(lab: &Lab) -> Vec<(u64, u64)> {
    let log = lab.s3.log();
    let gets = log.iter().filter(|request| request.kind == Kind::Get);
    gets.filter_map(|request| {
        let range = request.range.as_deref()?.strip_prefix("bytes=")?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
    })
    .collect()
}

/// Reads a file of `size` bytes from its end to its beginning in steps; what it is.
fn read_backward(mount: &Mount<'_>, name: &str, size: u64, step: u64) -> Vec<u8> {
    let file = File::open(mount.at(name)).unwrap();
    let mut bytes = vec![0; size as usize];
    let mut end = size;
    while end > 0 {
        let start = end.saturating_sub(step);
        let part = &mut bytes[start as usize..end as usize];
        file.read_exact_at(part, start).unwrap();
        end = start;
    }
    bytes
}

#[test]
fn a_backward_read_is_right_and_keeps_several_ranges_in_flight() {
    let data = noise((64 << 20) + 4321);
    let size = data.len() as u64;
    for step in [MIB, 128 << 10] {
        let lab = Lab::with(ServerOptions {
            first_byte: Duration::from_millis(20),
            ..ServerOptions::default()
        });
        lab.put("f", data.clone());
        let mount = lab.mount_with(&["--memory", "128MiB"]);
        assert!(read_backward(&mount, "f", size, step) == data);
        let stats = lab.s3.stats();
        let gets = stats.of(Kind::Get);
        assert!(gets.bytes_out <= size * 11 / 10, "{}", gets.bytes_out);
        assert!(gets.requests <= 80, "{}", gets.requests);
        assert!(stats.most_at_once >= 3, "{}", stats.most_at_once);
        let memory = &mount.status()["memory"];
        assert!(memory["peak"].as_u64() <= memory["limit"].as_u64());
    }
}

#[test]
fn a_backward_read_finds_what_it_reads_next_on_its_way() {
    let lab = Lab::new();
    lab.put_large("big", 1 << 30);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    // In the middle, where nothing says that it will go on for long.
    let mut at = 512 * MIB;
    for _ in 0..40 {
        at -= MIB;
        read(&file, at, MIB);
    }
    goes_on_with_ranges_in_flight(&lab, 100, 3, |step| {
        read(&file, at - (step + 1) * MIB, MIB);
    });
}

/// A store that answers no read until this is dropped, also by a test that fails.
struct Held<'a>(&'a Lab);

impl<'a> Held<'a> {
    fn new(lab: &'a Lab) -> Self {
        lab.s3.hold(Kind::Get);
        Self(lab)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.s3.release(Kind::Get);
    }
}

/// Goes on with a read by calling `step` with 0, 1, ... in turn while the store answers nothing;
/// waits until `most` ranges are in flight, and lets it read to the end.
fn goes_on_with_ranges_in_flight(lab: &Lab, steps: u64, most: u64, step: impl Fn(u64) + Sync) {
    // Those that are in flight then were all asked for while it was held.
    wait_until("all requests to be answered", || {
        lab.s3.stats().at_once == 0
    });
    std::thread::scope(|scope| {
        let held = Held::new(lab);
        scope.spawn(|| (0..steps).for_each(&step));
        wait_until("several ranges to be in flight", || {
            lab.s3.stats().at_once >= most
        });
        drop(held);
    });
}

/// Reads `length` bytes every `step`, in either direction, and checks what that costs.
fn read_in_steps(length: u64, step: u64, backward: bool) {
    let lab = Lab::new();
    let count = 100;
    lab.put_large("big", count * step + length);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    let place = |index: u64| if backward { count - index } else { index } * step;
    let read_piece = |index: u64| {
        read(&file, place(index), length);
    };
    let (begin, most) = (40, 6);
    (0..begin).for_each(read_piece);
    // Each of these that is read next lets one more be asked for.
    wait_until("the next pieces to be there", || {
        let ranges = ranges(&lab);
        (begin..=begin + most).map(place).all(|start| {
            let mut ranges = ranges.iter();
            ranges.any(|range| range.0 <= start && start + length <= range.1)
        })
    });
    goes_on_with_ranges_in_flight(&lab, count - begin, most, |index| {
        read_piece(begin + index);
    });
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= count * length * 13 / 10, "{fetched}");
    // Nothing between the pieces, but for what the kernel reads beyond each.
    let kernel = 256 << 10;
    let longest = length + kernel;
    // Who begins at the first byte is taken for a stream at first: once it has read more than the
    // kernel does around a page, it is run ahead of by as much as it has read, in requests that end
    // wherever the kernel's happened to.
    let ran_ahead = if length > kernel {
        2 * longest
    } else {
        longest
    };
    for (start, end) in ranges(&lab) {
        if end <= ran_ahead {
            continue;
        }
        assert_eq!(start / step, (end - 1) / step, "{start}..{end}");
        assert!((end - 1) % step < longest, "{start}..{end}");
    }
}

#[test]
fn a_strided_read_has_its_pieces_fetched_side_by_side_and_not_the_gaps() {
    read_in_steps(MIB, 16 * MIB, false);
    read_in_steps(MIB, 2 * MIB, false);
    read_in_steps(128 << 10, MIB / 2, false);
    read_in_steps(64 << 10, MIB, false);
}

#[test]
fn a_strided_read_downwards_has_its_pieces_fetched_side_by_side_and_not_the_gaps() {
    read_in_steps(MIB, 16 * MIB, true);
    read_in_steps(MIB, 2 * MIB, true);
    read_in_steps(128 << 10, MIB / 2, true);
    read_in_steps(64 << 10, MIB, true);
}

#[test]
fn three_equal_steps_come_before_anything_is_fetched_ahead() {
    let lab = Lab::new();
    lab.put_large("big", 8 << 30);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    let place = |index: u64| 100 * MIB + index * 16 * MIB;
    let piece = 64 << 10;
    for index in 0..3 {
        read(&file, place(index), piece);
    }
    assert_eq!(lab.s3.stats().of(Kind::Get).bytes_out, 3 * piece);
    read(&file, place(3), piece);
    wait_until("the next one to be fetched", || {
        lab.s3.stats().of(Kind::Get).bytes_out == 5 * piece
    });
    assert!(ranges(&lab).contains(&(place(4), place(4) + piece)));
}

#[test]
fn pieces_that_lie_close_together_are_fetched_in_one_request() {
    let lab = Lab::new();
    lab.put_large("big", 1 << 30);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    let count = 256;
    for index in (0..count).rev() {
        read(&file, index * 320 * 1024, 256 << 10);
    }
    let gets = lab.s3.stats().of(Kind::Get);
    assert!(gets.bytes_out <= count * (256 << 10) * 13 / 10, "{gets:?}");
    assert!(gets.requests <= count / 2, "{gets:?}");
}

#[test]
fn who_leaves_out_more_and_more_is_run_ahead_of_by_less() {
    let lab = Lab::new();
    lab.put_large("big", 8 << 30);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    let mut at = 64 * MIB;
    let mut asked = 0;
    for _ in 0..32 {
        read(&file, at, MIB);
        at += MIB;
        asked += MIB;
    }
    let mut seed = 12345_u64;
    for _ in 0..600 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        at += (128 << 10) + (seed >> 16) % (2 * MIB) / 4096 * 4096;
        read(&file, at, 128 << 10);
        at += 128 << 10;
        asked += 128 << 10;
    }
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= asked * 5 / 2, "{fetched}");
}

#[test]
fn several_who_read_equal_parts_of_a_file_at_once_are_all_run_ahead_of() {
    let lab = Lab::new();
    let (readers, part) = (4, 128 * MIB);
    lab.put_large("big", readers * part);
    let mount = lab.mount();
    let file = File::open(mount.at("big")).unwrap();
    // All of them begin before any has read far.
    for at in 0..8 {
        for reader in 0..readers {
            read(&file, reader * part + at * MIB, MIB);
        }
    }
    std::thread::scope(|scope| {
        for reader in 0..readers {
            let file = &file;
            scope.spawn(move || {
                for at in 8..part / MIB {
                    read(file, reader * part + at * MIB, MIB);
                }
            });
        }
    });
    let read = &mount.status()["read"];
    let demanded = read["bytes_demanded"].as_u64().unwrap();
    assert!(
        demanded < readers * 16 * MIB,
        "{demanded} bytes were waited for"
    );
    let fetched = lab.s3.stats().of(Kind::Get).bytes_out;
    assert!(fetched <= readers * part * 11 / 10, "{fetched}");
}

/// How `readers` who take pieces of `length` bytes of a file in turn, each the next one that nobody has
/// begun, are run ahead of, and what that costs.
fn take_in_turn(readers: u64, length: u64) {
    let lab = Lab::with(ServerOptions {
        first_byte: Duration::from_millis(10),
        connection_rate: Some(8_000_000),
        ..ServerOptions::default()
    });
    let size = 384 * MIB;
    lab.put_large("big", size);
    let mount = lab.mount_with(&["--memory", "512MiB"]);
    let file = File::open(mount.at("big")).unwrap();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| {
                loop {
                    let start = next.fetch_add(length, Ordering::Relaxed);
                    if start >= size {
                        break;
                    }
                    for at in (start..start + length).step_by(MIB as usize) {
                        read(&file, at, MIB);
                    }
                }
            });
        }
    });
    let stats = lab.s3.stats();
    // Readers who are not run ahead of have a range or two on their way, each.
    assert!(stats.most_sending >= 24, "{}", stats.most_sending);
    let fetched = stats.of(Kind::Get).bytes_out;
    assert!(fetched <= size * 103 / 100, "{fetched}");
    let read = &mount.status()["read"];
    let demanded = read["bytes_demanded"].as_u64().unwrap();
    let begun = readers * length.min(8 * MIB);
    assert!(demanded <= 2 * begun, "{demanded} bytes were waited for");
    // What they have left behind does not stay.
    let cached = read["bytes_cached"].as_u64().unwrap();
    assert!(cached <= begun + 24 * MIB, "{cached}");
}

#[test]
fn pieces_of_a_file_that_several_take_in_turn_are_on_their_way_before_they_are_begun() {
    take_in_turn(8, 4 * MIB);
    take_in_turn(4, 16 * MIB);
}
