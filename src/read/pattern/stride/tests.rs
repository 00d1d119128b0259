use super::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 1 << 40;
/// As large as any window gets.
const WINDOW: u64 = 64 * MIB;
/// As the kernel cuts a read.
const PIECE: u64 = 128 << 10;

/// Reads `length` bytes at `start` as the kernel does, and takes all that is to be fetched as
/// asked for; the pieces that the whole read called for.
fn touch(strides: &mut Strides, start: u64, length: u64) -> Vec<Range<u64>> {
    let mut ahead = Vec::new();
    let mut from = start;
    while from < start + length {
        let to = (from + PIECE).min(start + length);
        let strided = strides.note(1, &(from..to), WINDOW, &(0..SIZE), SIZE);
        for strided in strided.into_iter() {
            strides.asked(&strided, strided.step);
            for (range, step) in &strided.requests {
                strides.asked(&strided, *step);
                ahead.push(range.clone());
            }
        }
        from = to;
    }
    ahead
}

/// The bytes that touches at these places called for, a list a touch.
fn touches(places: &[u64], length: u64) -> Vec<Vec<Range<u64>>> {
    let mut strides = Strides::default();
    let places = places.iter();
    places
        .map(|place| touch(&mut strides, *place, length))
        .collect()
}

#[test]
fn three_equal_steps_are_needed_and_then_the_pieces_are_fetched_and_not_the_gaps() {
    let places: Vec<u64> = (5..45).map(|index| index * 16 * MIB).collect();
    let ahead = touches(&places, MIB);
    assert!(ahead[..3].iter().all(Vec::is_empty), "{ahead:?}");
    assert_eq!(ahead[3].len(), 1);
    let all: Vec<_> = ahead.into_iter().flatten().collect();
    // Each once, in order, and more and more of them ahead.
    for (index, range) in all.iter().enumerate() {
        let place = (index as u64 + 9) * 16 * MIB;
        assert_eq!(*range, place..place + MIB);
    }
    assert_eq!(all.len(), 36 + 39 / 4);
}

#[test]
fn short_touches_are_fetched_ahead_in_either_direction() {
    let forward: Vec<u64> = (100..150).map(|index| index * MIB).collect();
    let backward: Vec<u64> = forward.iter().rev().copied().collect();
    for places in [forward, backward] {
        let all: Vec<_> = touches(&places, 64 << 10).into_iter().flatten().collect();
        assert!(all.len() >= 46 + 10, "{}", all.len());
        for range in all {
            assert_eq!(range.start % MIB, 0);
            assert_eq!(range.end % MIB, 64 << 10);
        }
    }
}

#[test]
fn a_backward_reader_has_everything_below_it_fetched_in_large_requests() {
    for length in [64 << 10, 128 << 10, MIB] {
        let mut strides = Strides::default();
        let mut low = u64::MAX;
        let mut requests = 0;
        let top = 1000 * MIB;
        let mut at = top;
        while at > top - 200 * MIB {
            at -= length;
            for range in touch(&mut strides, at, length) {
                // Downward without a gap, and not beyond what was read already.
                assert!(low == u64::MAX || range.end == low, "{range:?} {low}");
                assert!(range.end <= at && range.end - range.start >= MIB);
                assert!(top - range.start <= 2 * (top - at), "{range:?}");
                low = range.start;
                requests += 1;
            }
        }
        assert!(low < at - 60 * MIB, "{}", (at - low) / MIB);
        assert!(requests <= 120, "{requests}");
    }
}

#[test]
fn who_comes_down_from_the_end_gets_the_whole_object_and_nothing_twice() {
    let size = 40 * MIB + 12345;
    let mut strides = Strides::default();
    let mut fetched = 0;
    let mut at = size;
    let mut low = size;
    while at > 0 {
        let start = at.saturating_sub(MIB);
        let read = start..at;
        if let Some(strided) = strides.note(1, &read, WINDOW, &(0..size), size) {
            for (range, step) in &strided.requests {
                assert!(range.end <= low);
                low = range.start;
                fetched += range.end - range.start;
                strides.asked(&strided, *step);
            }
        }
        at = start;
    }
    assert_eq!((low, fetched), (0, size - 4 * MIB));
}

#[test]
fn steps_that_are_no_pages_are_known_all_the_same() {
    let mut strides = Strides::default();
    let mut ahead = Vec::new();
    for row in 7..60 {
        let at = row * 1_000_000;
        let pages = at / PAGE * PAGE..(at + 65_536).next_multiple_of(PAGE);
        ahead.extend(touch(&mut strides, pages.start, pages.end - pages.start));
    }
    assert!(ahead.len() >= 56, "{}", ahead.len());
    // Each holds all of its piece, and little else.
    for (index, range) in ahead.iter().enumerate() {
        let at = (index as u64 + 11) * 1_000_000;
        assert!(range.start <= at && range.end >= at + 65_536, "{index}");
        assert!(range.end - range.start <= 65_536 + 5 * PAGE);
    }
}

#[test]
fn two_strided_readers_and_one_with_threads_are_known_among_each_other() {
    let mut strides = Strides::default();
    let mut ahead = Vec::new();
    for index in 0..40 {
        ahead.extend(touch(&mut strides, 10_000 * MIB + index * 16 * MIB, MIB));
        ahead.extend(touch(
            &mut strides,
            50_000 * MIB - index * 24 * MIB,
            MIB / 2,
        ));
        // Threads that take the next place each: two and two in the wrong order.
        let turned = index ^ 1;
        ahead.extend(touch(&mut strides, 90_000 * MIB + turned * 8 * MIB, MIB));
    }
    for (from, to) in [(0, 20), (40, 50), (60, 100)] {
        let there = |range: &&Range<u64>| (from..to).contains(&(range.start / (1000 * MIB)));
        assert!(ahead.iter().filter(there).count() >= 36, "{from}");
    }
}

#[test]
fn random_places_and_uneven_steps_are_no_stride() {
    let mut seed = 12345_u64;
    let random: Vec<u64> = (0..1000)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 16) % (8 << 30)
        })
        .collect();
    // Of square numbers no four are equally far from each other.
    let squares: Vec<u64> = (1..200).map(|index| index * index * MIB).collect();
    for places in [random, squares] {
        assert!(touches(&places, MIB).iter().all(Vec::is_empty));
    }
}

#[test]
fn a_mapping_faulted_backwards_inside_each_mebibyte_is_no_stride() {
    let mut strides = Strides::default();
    for mebibyte in 0..64 {
        for part in (0..8).rev() {
            let at = mebibyte * MIB + part * PIECE;
            let strided = strides.note(1, &(at..at + PIECE), WINDOW, &(0..SIZE), SIZE);
            assert_eq!(strided, None);
        }
    }
}

#[test]
fn a_sequential_reader_is_no_stride_though_its_requests_overtake_each_other() {
    let mut strides = Strides::default();
    for index in 0..1000_u64 {
        let at = (index ^ 1) * PIECE;
        let strided = strides.note(1, &(at..at + PIECE), WINDOW, &(0..SIZE), SIZE);
        assert_eq!(strided, None);
    }
}

#[test]
fn a_strided_reader_who_goes_on_reading_becomes_a_stream() {
    let mut strides = Strides::default();
    for index in 0..8 {
        touch(&mut strides, index * 16 * MIB, MIB);
    }
    let mut at = 8 * 16 * MIB;
    let mut known = Vec::new();
    while at < 9 * 16 * MIB - MIB {
        known.push(
            strides
                .note(1, &(at..at + PIECE), WINDOW, &(0..SIZE), SIZE)
                .is_some(),
        );
        at += PIECE;
    }
    assert!(known[..8].iter().all(|known| *known));
    assert!(known[16..].iter().all(|known| !known));
}

#[test]
fn nothing_is_fetched_outside_of_the_tensor_before_it_has_been_left() {
    let tensor = 320 * MIB..640 * MIB;
    let mut strides = Strides::default();
    let mut ahead = Vec::new();
    for index in 0..20 {
        let read = tensor.start + index * 16 * MIB;
        let read = read..read + MIB;
        if let Some(strided) = strides.note(1, &read, WINDOW, &tensor, SIZE) {
            ahead.extend(strided.requests);
        }
    }
    assert!(!ahead.is_empty());
    assert!(ahead.iter().all(|(range, _)| range.end <= tensor.end));
    let next = tensor.end..2 * tensor.end;
    let read = tensor.end..tensor.end + MIB;
    let strided = strides.note(1, &read, WINDOW, &next, SIZE).unwrap();
    assert!(!strided.requests.is_empty());
}

#[test]
fn what_a_long_stride_has_left_behind_is_let_go_of() {
    let mut strides = Strides::default();
    let mut behind = Vec::new();
    for index in 0..100 {
        let at = index * 16 * MIB;
        if let Some(strided) = strides.note(1, &(at..at + MIB), WINDOW, &(0..SIZE), SIZE) {
            behind.extend(strided.behind);
        }
    }
    assert!(behind.len() >= 70, "{}", behind.len());
    assert!(behind.iter().all(|range| range.end < 93 * 16 * MIB));
}

#[test]
fn readers_of_equal_parts_at_the_same_time_are_no_stride() {
    for readers in [4, 7, 16] {
        let mut strides = Strides::default();
        let part = 256 * MIB;
        let mut taken = 0;
        let (begin, end) = (2 * MIB, 32 * MIB);
        let mut at = 0;
        while at < end {
            for reader in 0..readers {
                let start = reader * part + at;
                let strided = strides.note(
                    1 + reader as u32,
                    &(start..start + PIECE),
                    WINDOW,
                    &(0..SIZE),
                    SIZE,
                );
                taken += u64::from(strided.is_some() && at > begin);
            }
            at += PIECE;
        }
        assert_eq!(taken, 0, "of {readers}");
    }
}

/// What several threads cost that take pieces of `length` bytes in turn, not all of them equally fast:
/// what nobody had asked for before it was read, and the most that was ahead of them at once, bytes.
/// Nothing may be let go of before it was read.
fn take_in_turn(threads: usize, length: u64, pieces: u64) -> (u64, u64) {
    let mut strides = Strides::default();
    let unit = PIECE as usize;
    let mut asked = vec![false; (length * pieces) as usize / unit];
    let mut read = asked.clone();
    let (mut next, mut late, mut most, mut round) = (0, 0, 0, 0);
    let mut at = vec![0_u64..0; threads];
    while at.iter().any(|part| !part.is_empty()) || next < pieces {
        round += 1;
        if round % 8 == 0 {
            let both = asked.iter().zip(&read);
            let ahead = both.filter(|(asked, read)| **asked && !**read).count();
            most = most.max(ahead as u64 * PIECE);
        }
        for (thread, part) in at.iter_mut().enumerate() {
            for _ in 0..=usize::from(round % (3 + thread) == 0) {
                if part.is_empty() && next < pieces {
                    *part = next * length..(next + 1) * length;
                    next += 1;
                }
                if part.is_empty() {
                    continue;
                }
                let bytes = part.start..part.start + PIECE;
                part.start = bytes.end;
                let index = bytes.start as usize / unit;
                late += if asked[index] { 0 } else { PIECE };
                (asked[index], read[index]) = (true, true);
                let size = length * pieces;
                let number = 1 + thread as u32;
                let strided = strides.note(number, &bytes, WINDOW, &(0..size), size);
                let Some(strided) = strided else { continue };
                strides.asked(&strided, strided.step);
                let requests = strided.requests.iter();
                for (range, step) in requests.chain([&(strided.rest.clone(), 0)]) {
                    strides.asked(&strided, *step);
                    asked[range.start as usize / unit..range.end as usize / unit].fill(true);
                }
                for range in &strided.behind {
                    let range = range.start as usize / unit..range.end as usize / unit;
                    assert!(read[range].iter().all(|read| *read));
                }
            }
        }
    }
    (late, most)
}

#[test]
fn pieces_that_several_take_in_turn_are_asked_for_before_they_are_begun() {
    for threads in [2, 3, 4, 7, 16] {
        for length in [MIB, 4 * MIB, 16 * MIB, 64 * MIB] {
            // Those that lie this close together are a stream.
            if threads as u64 * length <= SLACK_AHEAD {
                continue;
            }
            let (late, most) = take_in_turn(threads, length, 40);
            // Those that are begun first, until one thread goes on to another, and what that begins.
            let first = (threads as u64).max(4) * 3 / 2 * length + length / 2;
            assert!(late <= first, "{threads} threads, {length} bytes: {late}");
            // The window, and what is left of a piece when that is begun.
            assert!(
                most <= WINDOW + length,
                "{threads} threads, {length} bytes: {most}"
            );
        }
    }
}

#[test]
fn who_goes_on_to_the_next_piece_himself_reads_that_one_too() {
    // Three threads begin pieces in turn, and the first one reads two of them, one after the other.
    let mut strides = Strides::default();
    let length = 8 * MIB;
    let mut read = |thread: u32, bytes: Range<u64>| {
        let step = usize::try_from(PIECE).unwrap();
        let mut taken = true;
        for at in bytes.step_by(step) {
            let strided = strides.note(thread, &(at..at + PIECE), WINDOW, &(0..SIZE), SIZE);
            taken = strided.is_some();
        }
        taken
    };
    for round in 0..4 {
        let start = round * 3 * length;
        for at in (0..length).step_by(MIB as usize) {
            for thread in 0..3 {
                let from = start + thread * length + at;
                read(1 + thread as u32, from..from + MIB);
            }
        }
    }
    let start = 12 * length;
    assert!(read(1, start..start + length));
    assert!(read(1, start + length..start + 2 * length));
    assert!(read(2, start + 2 * length..start + 3 * length));
}

#[test]
fn threads_that_read_one_after_the_other_are_a_stream() {
    let mut strides = Strides::default();
    for index in 0..100 {
        let mut taken = 0;
        for at in (index * 2 * MIB..(index + 1) * 2 * MIB).step_by(PIECE as usize) {
            let thread = 1 + (index % 8) as u32;
            let strided = strides.note(thread, &(at..at + PIECE), WINDOW, &(0..SIZE), SIZE);
            taken += u64::from(strided.is_some());
        }
        assert!(index < 32 || taken == 0, "{index}: {taken}");
    }
}
