//! Sizes with suffixes.

const SUFFIXES: [(char, u32); 6] = [
    ('K', 10),
    ('M', 20),
    ('G', 30),
    ('T', 40),
    ('P', 50),
    ('E', 60),
];

/// Reads a size in bytes: a whole number with an optional binary suffix (`K`, `M`, `G`, `T`, `P`, `E`, each also
/// as `KiB` and so on). A number without a suffix counts in units of `1 << unit` bytes.
pub fn parse_size(text: &str, unit: u32) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" => unit,
        "B" | "b" => 0,
        _ => {
            let mut rest = suffix.chars();
            let first = rest.next()?.to_ascii_uppercase();
            if !matches!(rest.as_str(), "" | "iB" | "ib" | "B" | "b") {
                return None;
            }
            SUFFIXES.iter().find(|(letter, _)| *letter == first)?.1
        }
    };
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(1 << shift),
        Some((whole, part)) => {
            // Parts of a unit, such as 1.5G: exact, in integers.
            let scale = 10u128.checked_pow(u32::try_from(part.len()).ok()?)?;
            let whole: u128 = whole.parse().ok()?;
            let part: u128 = part.parse().ok()?;
            let total = whole
                .checked_mul(scale)?
                .checked_add(part)?
                .checked_mul(1 << shift)?;
            u64::try_from(total / scale).ok()
        }
    }
}

/// Writes a size in the largest unit that gives a whole number: `512 MiB`.
pub fn format_size(bytes: u64) -> String {
    let fits = |(_, shift): &&(char, u32)| bytes != 0 && bytes.is_multiple_of(1 << shift);
    match SUFFIXES.iter().rev().find(fits) {
        Some((letter, shift)) => format!("{} {letter}iB", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, size) in [
            ("512", Some(512 << 20)),
            ("512M", Some(512 << 20)),
            ("2g", Some(2 << 30)),
            ("2GiB", Some(2 << 30)),
            ("1.5G", Some(3 << 29)),
            ("100B", Some(100)),
            ("16E", None),
            ("", None),
            ("G", None),
            ("-1", None),
            ("1X", None),
            ("1.G", None),
            ("1é", None),
        ] {
            assert_eq!(parse_size(text, 20), size, "{text}");
        }
        assert_eq!(format_size(3 << 29), "1536 MiB");
        assert_eq!(format_size(1), "1 bytes");
    }
}
