//! Sizes and durations as people write them.

use std::time::Duration;

/// `512MiB`, `20G`, `1048576`: K, M, G, T and KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB,
/// TB powers of 1000.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size like 512MiB, 20G or 1048576");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let factor: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(wrong()),
    };
    let bytes = number * factor;
    // 2^53: beyond it a float cannot count bytes.
    if bytes.is_finite() && bytes < 9e15 {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

/// `500ms`, `30s`, `5m`, `2h`, `1d`, `0`, `forever`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration like 500ms, 30s, 5m, 0 or forever");
    if matches!(text, "forever" | "infinite") {
        return Ok(Duration::MAX);
    }
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let factor = match unit {
        "" if number == 0.0 => 0.0,
        "ms" => 0.001,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * factor).map_err(|_| wrong())
}

fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text
        .find(|it: char| !it.is_ascii_digit() && it != '.')
        .unwrap_or(text.len());
    let number = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size(" 512 MiB"), Ok(512 << 20));
        assert_eq!(parse_size("20G"), Ok(20 << 30));
        assert_eq!(parse_size("1.5k"), Ok(1536));
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("42"), Ok(42));
        for bad in ["", "x", "5 apples", "-1", "1e3", "99999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_read_as_people_write_them() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert_eq!(parse_duration("forever"), Ok(Duration::MAX));
        for bad in ["", "5", "s", "-1s", "1y"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
