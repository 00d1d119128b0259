//! Takes secrets out of log lines, whoever wrote them.
//!
//! mlfs itself never logs a secret; this is for libraries that print requests at their finer
//! levels, and for URLs inside error messages.
//!
//! The rule: a *name* (a run of letters, digits, `-` and `_`) that is known to hold a secret,
//! followed by a separator, hides the value behind it. How far a value reaches:
//!
//! - in quotes, or in a wrapper such as `Some("…")`: to the quote that closes it;
//! - `<Name>…`: to the next `<`;
//! - headers whose values have spaces in them (`authorization`, `cookie`): to the end of the line;
//! - anything else: to the next space, which takes the rest of a presigned query string along.
//!
//! In doubt more is hidden, never less.

/// What is put in a secret's place.
const HIDDEN: &str = "[hidden]";
/// Ends of names whose value is hidden, in small letters without `-` and `_`: `x-amz-signature`,
/// `aws_secret_access_key`, `SessionToken` and so on.
const SECRET: [&str; 15] = [
    "accesskey",
    "accesskeyid",
    "apikey",
    "authorization",
    "bearer",
    "cookie",
    "credential",
    "passphrase",
    "passwd",
    "password",
    "privatekey",
    "secret",
    "secretkey",
    "signature",
    "token",
];
/// Whole names whose value is hidden: Azure's signature.
const SECRET_WHOLE: [&str; 1] = ["sig"];
/// Beginnings of names that are error codes (`InvalidToken: …`) and have no value.
const ERROR_CODES: [&str; 3] = ["invalid", "expired", "missing"];
/// Ends of names whose unquoted value has spaces in it.
const WHOLE_LINE: [&str; 2] = ["authorization", "cookie"];

/// The text without its secrets.
pub(super) fn redact(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut clean = String::with_capacity(text.len());
    let mut shown = 0;
    let mut at = 0;
    while at < bytes.len() {
        let hidden = if is_name(bytes[at]) {
            let end = skip(bytes, at, is_name);
            // `%26token`: the first digits belong to the escape.
            let escape = at.checked_sub(1).filter(|before| bytes[*before] == b'%');
            let escaped = escape.and_then(|before| unescape(bytes, before));
            let start = escaped.map_or(at, |(_, next)| next.min(end));
            at = end;
            value_of(text, start, end)
        } else {
            let hidden = credentials_in_url(text, at);
            at += 1;
            hidden
        };
        // Both ends are next to ASCII characters, so they are between characters.
        if let Some((start, end)) = hidden {
            clean.push_str(&text[shown..start]);
            clean.push_str(HIDDEN);
            shown = end;
            at = end;
        }
    }
    clean.push_str(&text[shown..]);
    clean
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

fn skip(bytes: &[u8], from: usize, what: impl Fn(u8) -> bool) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    let length = rest.iter().position(|byte| !what(*byte));
    from + length.unwrap_or(rest.len())
}

/// The secret that the name at `start..end` stands for.
fn value_of(text: &str, start: usize, end: usize) -> Option<(usize, usize)> {
    let name: String = text[start..end]
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|letter| letter.to_ascii_lowercase())
        .collect();
    let ends = |ends: &[&str]| ends.iter().any(|it| name.ends_with(it));
    let secret = ends(&SECRET) || SECRET_WHOLE.contains(&name.as_str());
    if !secret || ERROR_CODES.iter().any(|it| name.starts_with(it)) {
        return None;
    }
    let bytes = text.as_bytes();
    let (separator, from) = separator(bytes, end, name == "bearer")?;
    let from = skip(bytes, from, |byte| byte == b' ' || byte == b'\t');
    let upto = |stop: &dyn Fn(u8) -> bool| skip(bytes, from, |byte| !stop(byte));
    let until = if separator == b'>' {
        upto(&|byte| byte == b'<')
    } else if let Some(quote) = opening_quote(bytes, from, separator == b',') {
        // The opening quote stays where nothing but it is before the value.
        let only = skip(bytes, from, |byte| byte == b'\\') == quote;
        let start = if only { quote + 1 } else { from };
        let end = closing_quote(bytes, quote);
        return (start < end).then_some((start, end));
    } else if ends(&WHOLE_LINE) {
        upto(&|byte| byte == b'\n')
    } else {
        upto(&|byte| byte.is_ascii_whitespace())
    };
    (from < until).then_some((from, until))
}

/// What stands between a name and its value, and where that ends: `=` and `:`, also
/// percent-encoded (twice); `>`; after a name in quotes `,`; after some names a space.
fn separator(bytes: &[u8], from: usize, space: bool) -> Option<(u8, usize)> {
    let mut at = from;
    let mut quoted = false;
    loop {
        let (byte, next) = unescape(bytes, at)?;
        match byte {
            b'=' | b':' | b'>' => return Some((byte, next)),
            b',' if quoted => return Some((byte, next)),
            b'"' | b'\'' => quoted = true,
            b' ' if space => return Some((byte, next)),
            b' ' | b'\\' => {}
            _ => return None,
        }
        at = next;
    }
}

/// The character at `at`, and where the next one is: `%3D` is `=`, and `%253D` is as well.
fn unescape(bytes: &[u8], at: usize) -> Option<(u8, usize)> {
    let mut digits = at + 1;
    if *bytes.get(at)? != b'%' {
        return Some((bytes[at], digits));
    }
    while bytes.get(digits..digits + 2) == Some(b"25") {
        digits += 2;
    }
    let code = std::str::from_utf8(bytes.get(digits..digits + 2)?).ok()?;
    let byte = u8::from_str_radix(code, 16).ok()?;
    Some((byte, digits + 2))
}

/// The quote a value begins with, at once or inside a wrapper: `Some("`, `H0("`, `["`, `b"`.
fn opening_quote(bytes: &[u8], from: usize, mut wrapped: bool) -> Option<usize> {
    for (at, byte) in bytes.iter().enumerate().skip(from) {
        match byte {
            b'"' | b'\'' => {
                let before = &bytes[from..at];
                let bare = before.iter().all(|byte| matches!(byte, b'\\' | b'b'));
                return (wrapped || bare).then_some(at);
            }
            b'(' | b'{' | b'[' => wrapped = true,
            b' ' | b':' | b'\\' | b'_' => {}
            byte if byte.is_ascii_alphanumeric() => {}
            _ => return None,
        }
    }
    None
}

/// Where the quote opened at `quote` is closed: by one like it that is escaped no deeper. One that
/// is never closed reaches to the end.
fn closing_quote(bytes: &[u8], quote: usize) -> usize {
    let depth = |at: usize| {
        let before = bytes[..at].iter().rev();
        before.take_while(|byte| **byte == b'\\').count()
    };
    let opened = depth(quote);
    let closed = (quote + 1..bytes.len())
        .find(|at| bytes[*at] == bytes[quote] && depth(*at) <= opened)
        .map(|at| at - depth(at).min(at - quote - 1));
    closed.unwrap_or(bytes.len())
}

/// `user:password` in `://user:password@host`, where `at` is the colon.
fn credentials_in_url(text: &str, at: usize) -> Option<(usize, usize)> {
    let start = at + 3;
    if !text.as_bytes()[at..].starts_with(b"://") {
        return None;
    }
    let rest = &text[start..];
    let ends = |it: char| matches!(it, '/' | '?' | '#' | '"') || it.is_whitespace();
    let authority = &rest[..rest.find(ends).unwrap_or(rest.len())];
    authority.rfind('@').map(|end| (start, start + end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lines with a secret in each place where `§` stands.
    const LINES: &[&str] = &[
        "GET https://b.example/k?X-Amz-Signature=§&X-Amz-Expires=60",
        "GET https://b.example/k?X-Amz-Credential=§%2Fus-east-1&x=1",
        "GET /k?x-amz-security-token=§&X-AMZ-SIGNATURE=§",
        "next=https%3A%2F%2Fb%2Fk%3FX-Amz-Expires%3D9%26X-Amz-Signature%3D§%26x%3D1",
        "next=%2526sig%253D§",
        "https://b/k?AWSAccessKeyId=§&Expires=1&Signature=§",
        "?sv=2024&sig=§&se=2",
        "https://user:§@host:5000/path",
        "headers: {\"authorization\": \"Bearer §\", \"host\": \"h\"}",
        "headers: {\"Authorization\": HeaderValue { _private: H0(\"Basic §\") }}",
        "Header { name: \"authorization\", value: \"Basic §\" }",
        "[(\"Proxy-Authorization\", \"Basic §\"), (\"host\", \"h\")]",
        "authorization: Basic §",
        "Authorization: AWS4-HMAC-SHA256 Credential=§/20260101/us-east-1/s3/aws4_request, \
         SignedHeaders=host;x-amz-date, Signature=§\nhost: h",
        "AWS4-HMAC-SHA256 Credential=§/x, SignedHeaders=host, Signature=§",
        "bearer § is not known",
        "Cookie: session=§; csrf=§\r\n",
        "set-cookie: session=§; Path=/",
        "\"set-cookie\": [\"session=§; Path=/\"]",
        "AWS_SECRET_ACCESS_KEY=§",
        "aws_session_token = §",
        "session_token: Some(\"§\")",
        "password: b\"§\"",
        "password='a b §'",
        "password=a,b&c;d'e\"§\n",
        "{\"AccessKeyId\": \"§\", \"SecretAccessKey\": \"§\", \"Token\": \"§\"}",
        "{\"secretAccessKey\":\"§\",\"sessionToken\":\"§\"}",
        "{\"password\":\"quoted \\\" §\"}",
        "body=\"{\\\"SecretAccessKey\\\":\\\"§\\\",\\\"x\\\":1}\"",
        "body=%7B%22SecretAccessKey%22%3A%22§%22%7D",
        "<Credentials><AccessKeyId>§</AccessKeyId><SecretAccessKey>§</SecretAccessKey>\
         <SessionToken>§</SessionToken></Credentials>",
    ];

    #[test]
    fn no_secret_passes() {
        for line in LINES {
            let clean = redact(&line.replace('§', "hunter2"));
            assert!(!clean.contains("hunter2"), "{clean}");
            assert!(clean.contains(HIDDEN), "{clean}");
        }
    }

    #[test]
    fn what_is_around_a_secret_stays() {
        for (line, expected) in [
            (
                "GET https://b/k?X-Amz-Signature=hunter2 took 3 ms",
                "GET https://b/k?X-Amz-Signature=[hidden] took 3 ms",
            ),
            (
                "{\"token\":\"hunter2\",\"user\":\"anna\"}",
                "{\"token\":\"[hidden]\",\"user\":\"anna\"}",
            ),
            (
                "{\\\"token\\\":\\\"hunter2\\\",\\\"user\\\":1}",
                "{\\\"token\\\":\\\"[hidden]\\\",\\\"user\\\":1}",
            ),
            (
                "<SessionToken>hunter2</SessionToken>",
                "<SessionToken>[hidden]</SessionToken>",
            ),
            ("http://anna:hunter2@h/p", "http://[hidden]@h/p"),
        ] {
            assert_eq!(redact(line), expected);
        }
    }

    #[test]
    fn other_lines_stay_as_they_are() {
        for line in [
            "INFO mounted mountpoint=/mnt/runs",
            "WARN object=s3://bucket/tokenizer.json error=not found",
            "WARN object=s3://bucket/secrets/password.txt tokens=3 signed=true",
            "https://host/path@alias?versionId=3",
            "error=InvalidAccessKeyId: The key does not exist; ExpiredToken: the token has expired",
            "x => y, path=/models/token, é%, 100%",
            "the credentials are missing or wrong: HTTP 401",
        ] {
            assert_eq!(redact(line), line);
        }
    }

    proptest! {
        #[test]
        fn no_secret_passes_whatever_it_looks_like(
            secret in "[0-9A-Za-z+/=%.:,;&@_-]{1,12}Q7Q7",
            before in "[ a-z=:,\"'{(<>%é\\n-]{0,20}",
            line in proptest::sample::select(LINES),
        ) {
            // A raw `@`, `/` or such ends the user of a URL, and no URL has them there.
            prop_assume!(!line.contains("://user:"));
            let clean = redact(&format!("{before} {}", line.replace('§', &secret)));
            prop_assert!(!clean.contains("Q7Q7"), "{}", clean);
        }

        #[test]
        fn any_text_can_be_looked_through(text in "\\PC*", odd in "[-%\"'\\\\=:<>,(a-f0-9é \\n]*") {
            let _ = redact(&text);
            let _ = redact(&odd);
            let _ = redact(&format!("token{odd}"));
            let _ = redact(&format!("x://{odd}@{text}"));
        }
    }
}
