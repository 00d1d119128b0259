//! What reading a part of a file costs when the file tells where its parts are.

mod harness;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use harness::{BUCKET, Lab, PREFIX, noise, wait_until};
use mlfs_lab::s3::{Fault, Kind, Rule};

const MIB: u64 = 1 << 20;
/// Bytes of a member's header before its name, of a directory's entry, and of the end record.
const HEADER: usize = 30;

/// A container of stored members, as zipfile writes it, and where each of them begins.
fn container(members: &[Vec<u8>]) -> (Vec<u8>, Vec<u64>) {
    container_of(members, |number| format!("archive/data/{number:04}"))
}

/// Stores `model.pt` with so many members of 200 KiB that are named as torch does; what it is, and where
/// each of them begins.
fn put_torchs(lab: &Lab, members: u64) -> (Vec<u8>, Vec<u64>) {
    let members: Vec<Vec<u8>> = (0..members).map(|_| noise(200 * 1024)).collect();
    let (bytes, begins) = container_of(&members, |number| match number {
        0 => "archive/data.pkl".to_owned(),
        number => format!("archive/data/{:04}", number - 1),
    });
    lab.put("model.pt", bytes.clone());
    (bytes, begins)
}

fn container_of(members: &[Vec<u8>], name: impl Fn(usize) -> String) -> (Vec<u8>, Vec<u64>) {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    let mut begins = Vec::new();
    for (number, member) in members.iter().enumerate() {
        let name = name(number);
        let length = (member.len() as u32).to_le_bytes();
        let name_length = (name.len() as u16).to_le_bytes();
        let begin = file.len() as u64;
        file.extend(0x0403_4b50_u32.to_le_bytes());
        file.extend([0; 14]);
        file.extend([length, length].concat());
        file.extend([name_length, [0; 2]].concat());
        file.extend(name.as_bytes());
        file.extend(member);
        directory.extend(0x0201_4b50_u32.to_le_bytes());
        directory.extend([0; 16]);
        directory.extend([length, length].concat());
        directory.extend(name_length);
        directory.extend([0; 12]);
        directory.extend((begin as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        begins.push(begin);
    }
    let offset = file.len() as u32;
    let entries = (members.len() as u16).to_le_bytes();
    file.extend(&directory);
    file.extend(0x0605_4b50_u32.to_le_bytes());
    file.extend([0; 4]);
    file.extend([entries, entries].concat());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(offset.to_le_bytes());
    file.extend([0; 2]);
    (file, begins)
}

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut buffer = vec![0; length];
    file.read_exact_at(&mut buffer, offset).unwrap();
    buffer
}

/// As a loader does that asks for the directory with a buffer of a page.
fn read_directory(file: &File, size: usize) {
    let pages = size as u64 / 4096 * 4096;
    let from = pages.saturating_sub(8192);
    read(file, from, size - from as usize);
}

fn fetched(lab: &Lab) -> u64 {
    lab.s3.stats().of(Kind::Get).bytes_out
}

#[test]
fn a_member_of_a_container_costs_about_its_own_bytes() {
    let lab = Lab::new();
    let members: Vec<Vec<u8>> = (0..8).map(|_| noise(6 << 20)).collect();
    let (bytes, begins) = container(&members);
    lab.put("model.pt", bytes.clone());
    let mount = lab.mount();
    let file = mount.open_direct("model.pt");
    read_directory(&file, bytes.len());
    for number in [5, 2] {
        let before = fetched(&lab);
        let begin = begins[number];
        let header = read(&file, begin, 4096);
        assert_eq!(header, bytes[begin as usize..][..4096]);
        let name = begin + HEADER as u64 + "archive/data/0000".len() as u64;
        for piece in 0..6 {
            let data = read(&file, name + piece * MIB, MIB as usize);
            assert!(data == members[number][(piece * MIB) as usize..][..MIB as usize]);
        }
        let cost = fetched(&lab) - before;
        // Blocks at its ends, and the pages of headers.
        assert!(cost <= 6 * MIB + 128 * 1024, "{cost}");
    }
}

#[test]
fn headers_of_a_container_are_looked_at_side_by_side_and_cost_their_pages() {
    let lab = Lab::new();
    let members: Vec<Vec<u8>> = (0..20).map(|_| noise(200 * 1024)).collect();
    let (bytes, begins) = container(&members);
    lab.put("model.pt", bytes.clone());
    let mount = lab.mount();
    let file = mount.open_direct("model.pt");
    read_directory(&file, bytes.len());
    let (requests, cost) = (lab.s3.stats().of(Kind::Get).requests, fetched(&lab));
    read(&file, begins[0], 4096);
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, requests + 1);
    read(&file, begins[1], 4096);
    wait_until("the others to be there", || {
        lab.s3.stats().of(Kind::Get).requests == requests + 20
    });
    for begin in &begins {
        assert_eq!(read(&file, *begin, 4096), bytes[*begin as usize..][..4096]);
    }
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, requests + 20);
    assert!(fetched(&lab) - cost <= 20 * 8192);
}

#[test]
fn a_container_of_torchs_is_looked_through_from_the_first_look_on() {
    const MEMBERS: u64 = 40;
    let lab = Lab::new();
    let (bytes, begins) = put_torchs(&lab, MEMBERS);
    // More of them at once than whole requests.
    let mount = lab.mount_with(&["--transfers", "4"]);
    let file = mount.open_direct("model.pt");
    // What is read of its beginning comes in one request, with what is read next.
    read(&file, 0, 4096);
    read(&file, 4096, 60 << 10);
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, 1);
    read_directory(&file, bytes.len());
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, 2);
    lab.s3.reset_stats();
    let others = MEMBERS - 1;
    std::thread::scope(|scope| {
        lab.s3.hold(Kind::Get);
        scope.spawn(|| read(&file, begins[1], 4096));
        wait_until("eight times as many as transfers to be asked for", || {
            lab.s3.stats().at_once == 1 + 4 * 8
        });
        lab.s3.release(Kind::Get);
    });
    for begin in &begins[1..] {
        assert_eq!(read(&file, *begin, 4096), bytes[*begin as usize..][..4096]);
    }
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, others);
    assert!(fetched(&lab) <= others * 8192);
}

#[test]
fn what_is_looked_at_is_read_from_the_disk_cache_if_it_is_there() {
    let lab = Lab::new();
    let (bytes, begins) = put_torchs(&lab, 8);
    let folder = lab.empty_folder();
    let flags = ["--cache-dir", folder.to_str().unwrap()];
    let mount = lab.mount_with(&flags);
    mount.prefetch("model.pt");
    drop(mount);
    let requests = lab.s3.stats().of(Kind::Get).requests;
    let mount = lab.mount_with(&flags);
    let file = mount.open_direct("model.pt");
    read_directory(&file, bytes.len());
    for begin in &begins {
        assert_eq!(read(&file, *begin, 4096), bytes[*begin as usize..][..4096]);
    }
    assert_eq!(lab.s3.stats().of(Kind::Get).requests, requests);
}

#[test]
fn looks_that_failed_are_fetched_ahead_again() {
    const MEMBERS: u64 = 20;
    let lab = Lab::new();
    let (bytes, begins) = put_torchs(&lab, MEMBERS);
    let mount = lab.mount_with(&["--log-level", "debug"]);
    let file = mount.open_direct("model.pt");
    read(&file, 0, 4096);
    read_directory(&file, bytes.len());
    let others = MEMBERS as usize - 2;
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    lab.s3.set_faults(1, vec![Rule::every(Kind::Get, refused)]);
    let mut page = [0; 4096];
    assert!(file.read_at(&mut page, begins[1] / 4096 * 4096).is_err());
    wait_until("the others to fail", || {
        lab.log_text().matches("not looked ahead").count() == others
    });
    lab.s3.set_faults(1, Vec::new());
    std::thread::scope(|scope| {
        lab.s3.hold(Kind::Get);
        scope.spawn(|| read(&file, begins[1], 4096));
        wait_until("all of them to be asked for again", || {
            lab.s3.stats().at_once == MEMBERS - 1
        });
        lab.s3.release(Kind::Get);
    });
}

#[test]
fn looks_with_a_larger_buffer_cost_its_pages() {
    let lab = Lab::new();
    let (bytes, begins) = put_torchs(&lab, 20);
    let mount = lab.mount();
    let file = mount.open_direct("model.pt");
    read(&file, 0, 4096);
    read_directory(&file, bytes.len());
    let cost = fetched(&lab);
    // As the kernel asks for what a buffer of 8 KiB takes.
    for begin in &begins[1..] {
        let first = begin / 4096 * 4096;
        let last = (begin + 8192).next_multiple_of(4096);
        let told = read(&file, first, (last - first) as usize);
        assert!(told == bytes[first as usize..last as usize]);
    }
    assert!(fetched(&lab) - cost <= 20 * 12_288);
}

#[test]
fn a_tensor_of_a_gguf_file_costs_about_its_own_bytes() {
    let lab = Lab::new();
    let tensor = 64 * MIB;
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend([16u64.to_le_bytes(), 0u64.to_le_bytes()].concat());
    for number in 0..16u64 {
        let name = format!("blk.{number}.ffn_up.weight");
        head.extend((name.len() as u64).to_le_bytes());
        head.extend(name.as_bytes());
        head.extend(1u32.to_le_bytes());
        head.extend(tensor.to_le_bytes());
        head.extend(24u32.to_le_bytes());
        head.extend((number * tensor).to_le_bytes());
    }
    let start = (head.len() as u64).next_multiple_of(32);
    let key = format!("{PREFIX}/model.gguf");
    lab.s3
        .put_generated(BUCKET, &key, head, start + 16 * tensor);
    let mount = lab.mount();
    let file = mount.open_direct("model.gguf");
    read(&file, 0, 32 << 10);
    let before = fetched(&lab);
    for piece in 0..64 {
        read(&file, start + 5 * tensor + piece * MIB, MIB as usize);
    }
    let cost = fetched(&lab) - before;
    assert!(cost <= tensor + 128 * 1024, "{cost}");
}

#[test]
fn who_touches_each_tensor_before_reading_the_first_is_sent_no_byte_twice() {
    let lab = Lab::new();
    let (count, tensor) = (24, 16 * MIB);
    let start = lab.put_tensors("model.safetensors", count, tensor);
    let size = start + count * tensor;
    let mount = lab.mount_with(&["--memory", "256MiB"]);
    let file = mount.open_direct("model.safetensors");
    read(&file, 0, 32 << 10);
    for number in 0..count {
        read(&file, start + number * tensor, 4096);
    }
    // They are more than readers may hold.
    let mut at = 0;
    while at < size {
        at += read(&file, at, MIB.min(size - at) as usize).len() as u64;
    }
    let twice = fetched(&lab) - size;
    // The blocks that were touched may have gone before they were read.
    assert!(twice <= count * 64 * 1024, "{twice}");
}

#[test]
fn buffers_of_readers_are_small_and_those_of_writers_large() {
    let lab = Lab::new();
    lab.put("stored", noise(5000));
    let mount = lab.mount();
    assert_eq!(mount.at("stored").metadata().unwrap().blksize(), 4096);
    let written = File::create(mount.at("written")).unwrap();
    assert_eq!(written.metadata().unwrap().blksize(), MIB);
}
