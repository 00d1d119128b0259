//! Files whose every word says of which version it is, and where it stands.

/// Names, one of each way to be read: in blocks, with a header at the beginning, with a directory at
/// the end.
pub const NAMES: [&str; 3] = ["plain", "model.safetensors", "d/model.pt"];
/// Tensors and members begin every so many bytes.
pub const PITCH: u64 = 96 << 10;

const WORD: usize = 8;
/// Bytes of a member's own header before its name.
const HEADER: usize = 30;

/// The bytes of version `version` of a file of `size` bytes. In a file that has a format, the
/// format's own bytes are laid over the words.
pub fn content(name: &str, version: usize, size: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size as usize + WORD);
    for word in 0..size.div_ceil(WORD as u64) {
        let word = ((version as u64 + 1) << 40) | word;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(size as usize);
    if name.ends_with(".safetensors") {
        lay_header(&mut bytes);
    } else if name.ends_with(".pt") {
        lay_container(&mut bytes);
    }
    bytes
}

/// What a word of a file says: its version and its place.
pub fn told(word: &[u8]) -> String {
    let Some(word) = word.first_chunk::<WORD>() else {
        return format!("{word:?}");
    };
    let word = u64::from_le_bytes(*word);
    let (version, place) = (word >> 40, (word & ((1 << 40) - 1)) * WORD as u64);
    format!("version {}, byte {place}", version.wrapping_sub(1))
}

fn lay(bytes: &mut [u8], at: usize, over: &[u8]) {
    bytes[at..at + over.len()].copy_from_slice(over);
}

/// A safetensors header, if there is room for one: tensors up to the end of the file.
fn lay_header(bytes: &mut [u8]) {
    let size = bytes.len() as u64;
    // The header's length is fixed, so that the tensors' places are.
    let length = 4096_u64 - WORD as u64;
    if size <= PITCH {
        return;
    }
    let data = size - 4096;
    let entries: Vec<String> = (0..data.div_ceil(PITCH))
        .map(|number| {
            let (from, to) = (number * PITCH, data.min((number + 1) * PITCH));
            format!(
                r#""{number}":{{"dtype":"U8","shape":[{}],"data_offsets":[{from},{to}]}}"#,
                to - from
            )
        })
        .collect();
    let mut header = format!("{{{}}}", entries.join(","));
    assert!(header.len() as u64 <= length, "too many tensors");
    header.extend((header.len() as u64..length).map(|_| ' '));
    lay(bytes, 0, &length.to_le_bytes());
    lay(bytes, WORD, header.as_bytes());
}

/// A container of members that begin every [`PITCH`] bytes, if there is room for one.
fn lay_container(bytes: &mut [u8]) {
    let size = bytes.len() as u64;
    let members = size / PITCH;
    let mut directory = Vec::new();
    for number in 0..members {
        let name = format!("archive/data/{number}");
        let name_length = (name.len() as u16).to_le_bytes();
        let begin = number * PITCH;
        let length = (PITCH as usize / 2).to_le_bytes();
        let length = [&length[..4], &length[..4]].concat();
        let mut header = 0x0403_4b50_u32.to_le_bytes().to_vec();
        header.extend([0; 14]);
        header.extend(&length);
        header.extend([name_length, [0; 2]].concat());
        assert_eq!(header.len(), HEADER);
        header.extend(name.as_bytes());
        lay(bytes, begin as usize, &header);
        directory.extend(0x0201_4b50_u32.to_le_bytes());
        directory.extend([0; 16]);
        directory.extend(length);
        directory.extend(name_length);
        directory.extend([0; 12]);
        directory.extend((begin as u32).to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let entries = (members as u16).to_le_bytes();
    let mut end = 0x0605_4b50_u32.to_le_bytes().to_vec();
    end.extend([0; 4]);
    end.extend([entries, entries].concat());
    end.extend((directory.len() as u32).to_le_bytes());
    let Some(offset) = size.checked_sub(directory.len() as u64 + 22) else {
        return;
    };
    // Only where it does not lie over the last member.
    if members == 0 || offset < (members - 1) * PITCH + PITCH / 2 + 64 {
        return;
    }
    end.extend((offset as u32).to_le_bytes());
    end.extend([0; 2]);
    directory.extend(end);
    lay(bytes, offset as usize, &directory);
}
