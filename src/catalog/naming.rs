//! Names of MLflow's that a path cannot hold, as names that it can.
//!
//! What stands in the way is percent-encoded, so that the name comes back: slashes, control characters,
//! a dot at the beginning, and a percent sign that would be taken for such an escape. What is longer
//! than a name may be loses its end, and has the id behind a `~` instead.

use percent_encoding::percent_decode_str;

/// The longest name, bytes (Linux's NAME_MAX).
pub(super) const LONGEST: usize = 255;
/// Stands before the id of what has too long a name.
const CUT: char = '~';
/// Characters of a run's id that tell it from another of the same name.
const SHORT_ID: usize = 8;

/// The name as one of a path.
pub(super) fn encode(name: &str) -> String {
    let bytes = name.as_bytes();
    let mut encoded = String::with_capacity(name.len());
    for (at, letter) in name.char_indices() {
        let escaped = match letter {
            '/' | '\u{7f}' => true,
            '.' => at == 0,
            '%' => {
                let digits = bytes.get(at + 1..at + 3);
                digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            }
            letter => letter < ' ',
        };
        if escaped {
            encoded.push_str(&format!("%{:02X}", u32::from(letter)));
        } else {
            encoded.push(letter);
        }
    }
    encoded
}

/// What [`encode`] makes `name` of, if anything.
pub(super) fn decode(name: &str) -> Option<String> {
    let decoded = percent_decode_str(name).decode_utf8().ok()?.into_owned();
    let decoded = match encode(&decoded) == name {
        true => decoded,
        // A percent sign that is none of an escape.
        false => name.to_owned(),
    };
    (!decoded.is_empty() && encode(&decoded) == name).then_some(decoded)
}

/// The name as one of a path, or the beginning of it with `id`.
pub(super) fn fitting(name: &str, id: &str) -> String {
    let encoded = encode(name);
    if encoded.is_empty() {
        return id.to_owned();
    }
    if encoded.len() <= LONGEST {
        return encoded;
    }
    let end = format!("{CUT}{id}");
    let mut length = LONGEST.saturating_sub(end.len());
    // Neither a character nor an escape is cut in two.
    while !encoded.is_char_boundary(length) {
        length -= 1;
    }
    if let Some(escape) = encoded[..length].rfind('%')
        && length - escape < 3
    {
        length = escape;
    }
    format!("{}{end}", &encoded[..length])
}

/// The id in a name that [`fitting`] has cut.
pub(super) fn id_of_cut(name: &str) -> Option<&str> {
    let (_, id) = name.rsplit_once(CUT)?;
    (name.len() > LONGEST - 4 && !id.is_empty()).then_some(id)
}

/// The name of another run of the same name.
pub(super) fn told_apart(name: &str, run_id: &str) -> String {
    let short = run_id.get(..SHORT_ID).unwrap_or(run_id);
    fitting(&format!("{name}-{short}"), run_id)
}

/// The name that was told apart, and the beginning of the run's id.
pub(super) fn apart(name: &str) -> Option<(&str, &str)> {
    let (name, short) = name.rsplit_once('-')?;
    let is_id = short.len() == SHORT_ID && short.bytes().all(|it| it.is_ascii_alphanumeric());
    (is_id && !name.is_empty()).then_some((name, short))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_from_paths() {
        for name in [
            "plain",
            "a/b",
            "../up",
            ".",
            "..",
            ".hidden",
            "a.b",
            "100%",
            "100%41",
            "%",
            "%2F",
            "new\nline",
            "\u{7f}",
            "ünï ✓",
            "a@b",
            "~",
            "-",
            "\u{1}%2e",
        ] {
            let encoded = encode(name);
            assert!(
                !encoded.contains('/') && !encoded.starts_with('.'),
                "{encoded}"
            );
            assert_eq!(decode(&encoded).as_deref(), Some(name), "{encoded}");
        }
        assert_eq!(encode("team/fraud"), "team%2Ffraud");
        // One name each: others are not found.
        for name in ["%61", "a%2fb", "%2E%2E", ""] {
            let decoded = decode(name);
            assert!(decoded.is_none_or(|it| encode(&it) == name), "{name}");
        }
    }

    #[test]
    fn long_names_lose_their_ends_and_show_their_ids() {
        for name in ["x".repeat(500), "é".repeat(300), "/".repeat(300)] {
            let cut = fitting(&name, "0123456789abcdef0123456789abcdef");
            assert!(
                cut.len() <= LONGEST && cut.len() > LONGEST - 4,
                "{}",
                cut.len()
            );
            assert_eq!(id_of_cut(&cut), Some("0123456789abcdef0123456789abcdef"));
        }
        assert_eq!(fitting("", "id"), "id");
        assert_eq!(id_of_cut("a~b"), None);
    }

    #[test]
    fn runs_of_one_name_are_told_apart() {
        let other = told_apart("base", "0123456789abcdef0123456789abcdef");
        assert_eq!(other, "base-01234567");
        assert_eq!(apart(&other), Some(("base", "01234567")));
        assert_eq!(apart("base-0123"), None);
    }
}
