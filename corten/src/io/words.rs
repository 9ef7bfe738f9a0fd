//! Command lines, numbers and times as `qemu-io` reads and writes them.

use std::time::Duration;

/// A command's options and its other words.
pub(super) struct Words {
    options: Vec<(char, String)>,
    /// What is no option.
    pub(super) rest: Vec<String>,
}

/// An option that the command does not have, or that lacks its value; the message has been printed.
pub(super) struct BadOption;

impl Words {
    /// Takes the words of a command apart: `letters` are its options, a colon after one that takes a value.
    pub(super) fn parse(words: &[&str], letters: &str) -> Result<Self, BadOption> {
        let (name, arguments) = words.split_first().unwrap_or((&"", &[]));
        let mut parsed = Self {
            options: Vec::new(),
            rest: Vec::new(),
        };
        let mut arguments = arguments.iter();
        while let Some(word) = arguments.next() {
            if *word == "--" {
                parsed
                    .rest
                    .extend(arguments.by_ref().map(|w| (*w).to_owned()));
                break;
            }
            let Some(group) = word.strip_prefix('-').filter(|group| !group.is_empty()) else {
                parsed.rest.push((*word).to_owned());
                continue;
            };
            for (at, letter) in group.char_indices() {
                let known = letters.find(letter).filter(|_| letter != ':');
                let Some(place) = known else {
                    eprintln!("{name}: invalid option -- '{letter}'");
                    return Err(BadOption);
                };
                if !letters[place + 1..].starts_with(':') {
                    parsed.options.push((letter, String::new()));
                    continue;
                }
                let joined = &group[at + letter.len_utf8()..];
                let value = if joined.is_empty() {
                    arguments.next().copied()
                } else {
                    Some(joined)
                };
                let Some(value) = value else {
                    eprintln!("{name}: option requires an argument -- '{letter}'");
                    return Err(BadOption);
                };
                parsed.options.push((letter, value.to_owned()));
                break;
            }
        }
        Ok(parsed)
    }

    pub(super) fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(l, _)| *l == letter)
    }

    /// The last value of an option.
    pub(super) fn get(&self, letter: char) -> Option<&str> {
        let found = self.options.iter().rev().find(|(l, _)| *l == letter);
        found.map(|(_, value)| value.as_str())
    }

    /// All values of an option.
    pub(super) fn all(&self, letter: char) -> Vec<(char, &str)> {
        let these = self.options.iter().filter(|(l, _)| *l == letter);
        these.map(|(l, value)| (*l, value.as_str())).collect()
    }
}

/// Reads a number of bytes.
///
/// # Errors
///
/// What to print when it is none.
pub(super) fn number(text: &str) -> Result<u64, String> {
    if let Some(number) = crate::img::args::size(text) {
        return Ok(number);
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let suffix = &text[digits..];
    let is_number = digits > 0 && suffix.len() <= 1 && "bBkKmMgGtTpPeE".contains(suffix);
    let why = if is_number && text[..digits].parse::<f64>().is_ok_and(|n| n >= 1.0) {
        "argument too large"
    } else {
        "non-numeric argument, or extraneous/unrecognized suffix"
    };
    Err(format!("Parsing error: {why} -- {text}"))
}

/// Reads a byte in any of C's notations.
pub(super) fn pattern(text: &str) -> Result<u8, String> {
    let number = if let Some(hex) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        u8::from_str_radix(hex, 16)
    } else if text.len() > 1 && text.starts_with('0') {
        u8::from_str_radix(text, 8)
    } else {
        text.parse()
    };
    number.map_err(|_| format!("{text} is not a valid pattern byte"))
}

/// A number of bytes for people.
pub(super) fn bytes(value: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    for (n, unit) in UNITS.iter().enumerate() {
        let size = 1024f64.powi(6 - n as i32);
        if value >= size {
            let text = format!("{:.3}", value / size);
            return format!("{} {unit}", text.trim_end_matches(".000"));
        }
    }
    if value.fract() == 0.0 {
        format!("{value:.0} bytes")
    } else {
        format!("{value:.6} bytes")
    }
}

/// A number of bytes for people, of a whole number.
pub(super) fn size(value: u64) -> String {
    bytes(value as f64)
}

/// A time for people, or, if `fixed`, always in the one form that programs read.
fn time(elapsed: Duration, fixed: bool) -> String {
    let hundredths = elapsed.subsec_millis() / 10;
    let seconds = elapsed.as_secs();
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if fixed || hours > 0 {
        format!("{hours}:{minutes:02}:{rest:02}.{hundredths:02}")
    } else if minutes > 0 {
        format!("{minutes:02}:{rest:02}.{hundredths:02}")
    } else {
        format!("{rest:02}.{hundredths:02} sec")
    }
}

/// What a transfer has done: `did` is the verb.
pub(super) fn report(
    did: &str,
    offset: u64,
    (done, total): (u64, u64),
    elapsed: Duration,
    for_programs: bool,
) -> String {
    let seconds = elapsed.as_secs_f64().max(1e-9);
    let rate = total as f64 / seconds;
    let operations = 1.0 / seconds;
    if for_programs {
        return format!(
            "{total},1,{},{rate:.3},{operations:.3}",
            time(elapsed, true)
        );
    }
    format!(
        "{did} {done}/{total} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and {operations:.4} ops/sec)",
        size(total),
        time(elapsed, false),
        bytes(rate)
    )
}

/// A dump of `data`, which was read from `offset`.
pub(super) fn dump(offset: u64, data: &[u8]) -> String {
    let mut text = String::new();
    for (n, line) in data.chunks(16).enumerate() {
        text += &format!("{:08x}:  ", offset + n as u64 * 16);
        line.iter().for_each(|b| text += &format!("{b:02x} "));
        text.push(' ');
        let shown = line.iter().map(|b| char::from(*b));
        text.extend(shown.map(|c| if c.is_ascii_alphanumeric() { c } else { '.' }));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes() {
        assert_eq!(number("64k"), Ok(65536));
        assert!(number("x").unwrap_err().ends_with("suffix -- x"));
        assert_eq!(
            number("9E").unwrap_err(),
            "Parsing error: argument too large -- 9E"
        );
        for (text, value) in [("0x11", 17), ("017", 15), ("255", 255), ("0", 0)] {
            assert_eq!(pattern(text), Ok(value));
        }
        assert!(pattern("300").is_err() && pattern("zz").is_err());
        assert_eq!(size(65536), "64 KiB");
        assert_eq!(size(0x9c0000), "9.750 MiB");
        assert_eq!(size(200), "200 bytes");
        assert_eq!(bytes(4.433221), "4.433221 bytes");
    }

    #[test]
    fn times_and_reports() {
        let report = report("read", 0, (1024, 1024), Duration::from_millis(250), true);
        assert_eq!(report, "1024,1,0:00:00.25,4096.000,4.000");
        assert_eq!(time(Duration::from_secs(14782), false), "4:06:22.00");
    }

    #[test]
    fn options_and_words_mix() {
        let words = ["read", "0", "-qP", "5", "1k"];
        let parsed = Words::parse(&words, "qvP:").ok().unwrap();
        assert!(parsed.has('q') && !parsed.has('v'));
        assert_eq!(parsed.get('P'), Some("5"));
        assert_eq!(parsed.rest, ["0", "1k"]);
        assert!(Words::parse(&["read", "-1"], "qvP:").is_err());
    }
}
