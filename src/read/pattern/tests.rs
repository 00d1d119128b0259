use super::*;

const MIB: u64 = 1 << 20;
const END: u64 = 1 << 40;

#[test]
fn the_first_touch_of_a_place_fetches_nothing_ahead() {
    let mut pattern = Pattern::default();
    for place in [0, 500, 3, 900, 77] {
        let at = place * 100 * MIB;
        assert!(
            pattern
                .note(0, at..at + MIB, 64 * MIB, END, END)
                .range
                .is_empty()
        );
    }
}

#[test]
fn a_sequential_reader_gets_a_window_that_grows_up_to_the_maximum() {
    let mut pattern = Pattern::default();
    let mut windows = Vec::new();
    for index in 0..400 {
        windows.push(
            pattern
                .note(0, index * MIB..(index + 1) * MIB, 64 * MIB, END, END)
                .window,
        );
    }
    assert_eq!(windows[0], 0);
    assert_eq!(windows[1], 8 * MIB);
    assert!(windows.is_sorted());
    assert_eq!(*windows.last().unwrap(), 64 * MIB);
}

#[test]
fn who_begins_at_the_first_byte_and_goes_on_is_run_ahead_of_at_once() {
    let mut pattern = Pattern::default();
    let piece = MIB / 8;
    let mut ahead = |index: u64| {
        let read = index * piece..(index + 1) * piece;
        pattern.note(0, read, 64 * MIB, END, END).range
    };
    // The kernel's readahead of one page makes as much.
    assert!(ahead(0).is_empty() && ahead(1).is_empty());
    assert_eq!(ahead(2), 3 * piece..6 * piece);
}

#[test]
fn a_random_read_that_comes_in_pieces_is_no_stream() {
    let mut pattern = Pattern::default();
    for place in [700, 20, 510] {
        for piece in 0..8 {
            let at = place * MIB + piece * MIB / 8;
            let ahead = pattern.note(0, at..at + MIB / 8, 64 * MIB, END, END);
            assert!(ahead.range.is_empty());
        }
    }
}

#[test]
fn a_window_stays_inside_its_tensor_until_the_reader_has_left_it() {
    let mut pattern = Pattern::default();
    for index in 0..33 {
        let ahead = pattern.note(0, index * MIB..(index + 1) * MIB, 64 * MIB, 32 * MIB, END);
        assert!(ahead.range.is_empty() || ahead.range.end <= 32 * MIB);
    }
    // It reads on: the next tensor is not the last one either.
    for index in 33..36 {
        pattern.note(0, index * MIB..(index + 1) * MIB, 64 * MIB, 40 * MIB, END);
    }
    let ahead = pattern.note(0, 36 * MIB..37 * MIB, 64 * MIB, 40 * MIB, END);
    assert!(ahead.range.end > 40 * MIB);
}

/// A thread reads `pieces` of 256 KiB at a place of its own; what the first one says.
fn random_read(pattern: &mut Pattern, thread: u32, place: u64, pieces: u64) -> Ahead {
    let at = place * 1000 * MIB;
    let piece = MIB / 4;
    let first = pattern.note(thread, at..at + piece, 64 * MIB, END, END);
    pattern.asked(at, first.range.end, None);
    for index in 1..pieces {
        let read = at + index * piece..at + (index + 1) * piece;
        let ahead = pattern.note(thread, read, 64 * MIB, END, END).range;
        assert!(ahead.is_empty(), "{ahead:?}");
    }
    first
}

/// Who reads at random gets all of a read at once after `before` of them, and no longer when
/// lengths differ.
fn check_random_reads(before: usize, thread: impl Fn(u64) -> u32) {
    let mut pattern = Pattern::default();
    for place in 1..=before as u64 {
        let first = random_read(&mut pattern, thread(place), place, 6);
        assert!(first.range.is_empty());
    }
    let ahead = random_read(&mut pattern, thread(0), 100, 6);
    let at = 100 * 1000 * MIB;
    assert_eq!(ahead.range, at + MIB / 4..at + 6 * MIB / 4);
    assert!(ahead.whole);
    for place in 0..(STREAMS + ENDED) as u64 {
        random_read(&mut pattern, thread(place), 200 + place, place % 6 + 1);
    }
    let ahead = random_read(&mut pattern, thread(0), 300, 1);
    assert!(ahead.range.is_empty());
}

#[test]
fn random_reads_of_one_length_are_fetched_whole_once_there_were_enough() {
    check_random_reads(STREAMS + ENDED_AT_LEAST, |_| 0);
}

#[test]
fn a_thread_that_begins_elsewhere_has_ended_what_it_read_before() {
    check_random_reads(ENDED_AT_LEAST, |_| 7);
    // Each of three ends one when it begins its next.
    check_random_reads(ENDED_AT_LEAST + 2, |place| 1 + (place % 3) as u32);
}

#[test]
fn who_begins_elsewhere_has_left_behind_whole_blocks_of_what_he_read() {
    let elsewhere = |thread, reads: &[Range<u64>]| {
        let mut pattern = Pattern::default();
        for read in reads {
            pattern.note(thread, read.clone(), 64 * MIB, END, END);
        }
        let read = 1000 * MIB..1001 * MIB;
        pattern.note(thread, read, 64 * MIB, END, END).behind
    };
    let (begin, page) = (MIB + 4096, 4096);
    let whole = [begin..begin + MIB / 2, begin + MIB / 2..begin + MIB];
    assert_eq!(elsewhere(7, &whole), MIB + BLOCK_SIZE..2 * MIB + page);
    // It is not known who reads.
    assert!(elsewhere(0, &whole).is_empty());
    // He left something out, or read no block as a whole.
    let gap = [begin..begin + MIB / 2, begin + MIB..begin + 3 * MIB / 2];
    assert!(elsewhere(7, &gap).is_empty());
    assert!(elsewhere(7, &[begin..begin + page, begin..begin + 5 * page]).is_empty());
}

#[test]
fn a_page_past_what_was_expected_begins_no_run() {
    let mut pattern = Pattern::default();
    let page = 4096;
    for place in 1..=8 {
        random_read(&mut pattern, 7, place, 6);
    }
    let first = random_read(&mut pattern, 7, 100, 6);
    assert!(!first.range.is_empty());
    let end = 100 * 1000 * MIB + 6 * MIB / 4;
    let past = |pattern: &mut Pattern, read| pattern.note(7, read, 64 * MIB, END, END).range;
    assert!(past(&mut pattern, end..end + page).is_empty());
    assert!(past(&mut pattern, end + page..end + MIB / 8).is_empty());
    // Who goes on is run ahead of.
    assert!(!past(&mut pattern, end + MIB / 8..end + MIB / 2).is_empty());
}

#[test]
fn who_hardly_touched_the_tensor_before_begins_the_one_he_goes_on_with() {
    let mut pattern = Pattern::default();
    let begins = 64 * MIB;
    let around = begins - 64 * 1024..begins - 4096;
    assert!(pattern.note(0, around, 64 * MIB, begins, END).first);
    let on = begins + 4096..begins + 64 * 1024;
    assert!(pattern.note(0, on.clone(), 64 * MIB, 2 * begins, END).first);
    assert!(!pattern.note(0, on, 64 * MIB, 2 * begins, END).first);
    // The kernel's readahead of the one before is no beginning.
    for mebibyte in 128..192 {
        let read = mebibyte * MIB..(mebibyte + 1) * MIB;
        pattern.note(0, read, 64 * MIB, 192 * MIB, END);
    }
    let past = 192 * MIB..192 * MIB + 128 * 1024;
    assert!(!pattern.note(0, past, 64 * MIB, 256 * MIB, END).first);
}

#[test]
fn the_last_read_of_a_tensor_is_run_ahead_of_to_its_own_end() {
    let mut pattern = Pattern::default();
    let (piece, end) = (MIB / 2, 100 * MIB + 4096);
    let mut last = Vec::new();
    for index in 0..24 {
        let at = 90 * MIB + index * piece;
        let ahead = pattern.note(0, at..at + piece, 64 * MIB, end, END);
        pattern.asked(at, ahead.range.end, None);
        last.push(ahead.range.end);
    }
    // In its last read, which goes past its end, and not before it has gone on.
    assert!(last.contains(&(100 * MIB + piece)), "{last:?}");
    assert!(last[..20].iter().all(|end| *end <= 100 * MIB + piece));
    assert_eq!(overrun(&(0..piece), end), piece - 4096);
    assert_eq!(overrun(&(0..piece), 3 * piece), 0);
    assert_eq!(overrun(&(0..piece), 1), 0);
}

#[test]
fn who_is_in_a_tensor_is_bound_to_it_when_that_is_known() {
    let mut pattern = Pattern::default();
    let read = |index: u64| index * MIB..(index + 1) * MIB;
    let ahead = |pattern: &mut Pattern, index| {
        let ahead = pattern.note(0, read(index), 64 * MIB, END, END).range;
        pattern.asked(index * MIB, ahead.end, None);
        ahead.end
    };
    for index in 0..4 {
        ahead(&mut pattern, index);
    }
    pattern.bind(&(0..MIB), &(8 * MIB..16 * MIB));
    pattern.bind(&(1..MIB), &(2 * MIB..16 * MIB));
    assert!(ahead(&mut pattern, 4) > 16 * MIB);
    pattern.bind(&(0..4096), &(4096..32 * MIB));
    for index in 5..32 {
        assert!(ahead(&mut pattern, index) <= 32 * MIB);
    }
    // It reads on.
    for index in 32..36 {
        ahead(&mut pattern, index);
    }
    assert!(ahead(&mut pattern, 36) > 40 * MIB);
}

#[test]
fn a_mapping_faulted_backwards_inside_each_mebibyte_is_sequential() {
    let mut pattern = Pattern::default();
    let step = 128 * 1024;
    let mut window = 0;
    for mebibyte in 0..64 {
        for part in (0..8).rev() {
            let at = mebibyte * MIB + part * step;
            window = pattern.note(0, at..at + step, 64 * MIB, END, END).window;
        }
    }
    assert!(window >= 16 * MIB);
}

#[test]
fn who_leaves_out_half_of_what_it_passes_is_no_stream() {
    let mut pattern = Pattern::default();
    let mut seed = 12345_u64;
    let mut at = 0;
    for _ in 0..1000 {
        let ahead = pattern.note(0, at..at + MIB / 4, 64 * MIB, END, END);
        assert!(ahead.range.is_empty());
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        at += MIB / 2 + (seed >> 16) % MIB;
    }
}

#[test]
fn what_was_wasted_cuts_the_windows_of_all_streams() {
    let mut pattern = Pattern::default();
    let mut index = 0;
    let mut go_on = |pattern: &mut Pattern, wasted| {
        let read = index * MIB..(index + 1) * MIB;
        index += 1;
        pattern.note_waste(&read, wasted);
        let most = pattern.limit().min(64 * MIB);
        pattern.note(0, read, most, END, END).window
    };
    for _ in 0..100 {
        go_on(&mut pattern, 0);
    }
    assert_eq!(go_on(&mut pattern, 0), 64 * MIB);
    assert_eq!(go_on(&mut pattern, 64 * MIB), 32 * MIB);
    for _ in 0..130 {
        go_on(&mut pattern, 0);
    }
    assert_eq!(go_on(&mut pattern, 0), 64 * MIB);
}

#[test]
fn two_readers_far_apart_are_two_streams() {
    let mut pattern = Pattern::default();
    for index in 0..8 {
        let far = 1000 * MIB + index * MIB;
        pattern.note(0, index * MIB..(index + 1) * MIB, 64 * MIB, END, END);
        pattern.note(0, far..far + MIB, 64 * MIB, END, END);
    }
    assert_eq!(pattern.streams.len(), 2);
    assert!(pattern.streams.iter().all(|stream| stream.window > 0));
}

#[test]
fn who_reads_a_part_is_run_ahead_of_up_to_where_somebody_reads_the_next() {
    let mut pattern = Pattern::default();
    let part = 64 * MIB;
    let mut furthest = 0;
    for at in 0..60 {
        let mut note = |start: u64| {
            let ahead = pattern.note(0, start..start + MIB, 32 * MIB, END, END);
            pattern.asked(start, ahead.range.end, None);
            ahead.range
        };
        let last = note(part + at * MIB);
        furthest = furthest.max(note(at * MIB).end);
        assert!(at < 8 || last.end > part + (at + 1) * MIB, "{last:?}");
    }
    assert_eq!(furthest, part);
}

#[test]
fn who_read_little_does_not_stand_in_the_way_of_who_reads_all() {
    let mut pattern = Pattern::default();
    pattern.note(1, 48 * MIB..49 * MIB, 32 * MIB, END, END);
    let mut range = 0..0;
    for at in 0..32 {
        let read = at * MIB..(at + 1) * MIB;
        range = pattern.note(2, read, 32 * MIB, END, END).range;
    }
    assert!(range.end > 49 * MIB, "{range:?}");
}
