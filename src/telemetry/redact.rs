//! Takes secrets out of log lines, whoever wrote them.
//!
//! mlfs itself never logs a secret; this is for libraries that print requests at their finer
//! levels, and for URLs inside error messages.

use std::io::{self, Write};

/// What is put in a secret's place.
const HIDDEN: &str = "[hidden]";
/// Names whose value is hidden: query parameters of presigned URLs, headers, fields.
const NAMES: [&str; 11] = [
    "x-amz-signature",
    "x-amz-credential",
    "x-amz-security-token",
    "awsaccesskeyid",
    "signature",
    "sig",
    "authorization",
    "secret_access_key",
    "session_token",
    "password",
    "token",
];

/// Passes lines on without their secrets.
pub(super) struct Redacting<W> {
    inner: W,
}

impl<W> Redacting<W> {
    pub fn new(inner: W) -> Self {
        Self { inner }
    }
}

impl<W: Write> Write for Redacting<W> {
    // The formatter hands over one whole event a call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        self.inner.write_all(redact(&text).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn redact(line: &str) -> String {
    let lower = line.to_ascii_lowercase();
    let mut hidden: Vec<(usize, usize)> = Vec::new();
    for name in NAMES {
        let mut from = 0;
        while let Some(found) = lower[from..].find(name) {
            let start = from + found;
            from = start + name.len();
            let whole = !lower[..start].ends_with(|before: char| before.is_ascii_alphanumeric());
            if whole && let Some(range) = value_after(&lower, from) {
                hidden.push(range);
            }
        }
    }
    hidden.extend(credentials_in_urls(&lower));
    hidden.sort_unstable();
    let mut clean = String::with_capacity(line.len());
    let mut position = 0;
    for (start, end) in hidden {
        if start >= position {
            clean.push_str(&line[position..start]);
            clean.push_str(HIDDEN);
            position = end;
        }
    }
    clean.push_str(&line[position..]);
    clean
}

/// The value that follows a name: after `=`, `:` and quotes, up to what ends it.
fn value_after(line: &str, from: usize) -> Option<(usize, usize)> {
    let rest = &line[from..];
    let separator = rest.trim_start_matches(['"', '\'', '\\', ' ']);
    let value = separator.strip_prefix(['=', ':'])?;
    let value = value.trim_start_matches(['"', '\'', '\\', ' ']);
    // "Basic xyz" and "Bearer xyz" are two words.
    let scheme = ["basic ", "bearer ", "some(\""]
        .iter()
        .find(|it| value.starts_with(**it));
    let skipped = scheme.map_or(0, |scheme| scheme.len());
    let start = line.len() - value.len();
    let length = value[skipped..]
        .find(['&', '"', '\'', ' ', '\n', ',', ')', '}', '\\'])
        .unwrap_or(value.len() - skipped);
    (length > 0).then_some((start, start + skipped + length))
}

/// `user:password` in `scheme://user:password@host`.
fn credentials_in_urls(line: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = line[from..].find("://") {
        let start = from + at + 3;
        let authority = line[start..]
            .find(['/', '?', ' ', '"', '\n'])
            .unwrap_or(line.len() - start);
        if let Some(end) = line[start..start + authority].rfind('@') {
            found.push((start, start + end));
        }
        from = start;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_passes() {
        for line in [
            "GET https://b.example/k?X-Amz-Signature=hunter2&X-Amz-Expires=60",
            "GET https://b.example/k?X-Amz-Credential=hunter2%2Fus-east-1&x=1",
            "headers: {\"authorization\": \"Bearer hunter2\", \"host\": \"h\"}",
            "authorization: Basic hunter2",
            "https://user:hunter2@host:5000/path",
            "?sv=2024&sig=hunter2&se=2",
            "AWS_SECRET_ACCESS_KEY=hunter2",
            "session_token: Some(\"hunter2\")",
            "password=hunter2\n",
        ] {
            let clean = redact(line);
            assert!(!clean.contains("hunter2"), "{clean}");
            assert!(clean.contains(HIDDEN), "{clean}");
        }
    }

    #[test]
    fn other_lines_stay_as_they_are() {
        for line in [
            "INFO mounted mountpoint=/mnt/runs",
            "WARN object=s3://bucket/tokenizer.json error=not found",
            "https://host/path?versionId=3",
        ] {
            assert_eq!(redact(line), line);
        }
    }
}
