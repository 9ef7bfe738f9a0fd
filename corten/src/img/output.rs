//! Output as `qemu-img` prints it.

use std::cell::Cell;
use std::io::Write;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A number of bytes for people: three digits and a binary unit.
pub(crate) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut scaled = bytes as f64;
    let mut unit = 0;
    // Four digits never appear: 1000 KiB is 0.977 MiB.
    while scaled >= 1000.0 && unit < UNITS.len() - 1 {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(scaled), UNITS[unit])
}

/// Three significant digits, without zeroes at the end.
fn three_digits(value: f64) -> String {
    let whole_digits = if value >= 100.0 {
        3
    } else if value >= 10.0 {
        2
    } else if value >= 1.0 || value == 0.0 {
        1
    } else {
        0
    };
    let text = format!("{value:.*}", 3 - whole_digits);
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// JSON in QEMU's layout: four spaces, and a line break in empty lists too.
pub(crate) fn json(value: &Value) -> String {
    let mut text = String::new();
    write_json(value, 0, &mut text);
    text
}

fn write_json(value: &Value, depth: usize, text: &mut String) {
    let indent = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"    ".repeat(depth));
    };
    match value {
        Value::Array(items) => {
            text.push('[');
            for (n, item) in items.iter().enumerate() {
                if n > 0 {
                    text.push(',');
                }
                indent(text, depth + 1);
                write_json(item, depth + 1, text);
            }
            indent(text, depth);
            text.push(']');
        }
        Value::Object(members) => {
            text.push('{');
            for (n, (key, member)) in members.iter().enumerate() {
                if n > 0 {
                    text.push(',');
                }
                indent(text, depth + 1);
                text.push_str(&Value::String(key.clone()).to_string());
                text.push_str(": ");
                write_json(member, depth + 1, text);
            }
            indent(text, depth);
            text.push('}');
        }
        plain => text.push_str(&plain.to_string()),
    }
}

/// Prints text as it is; ends the program when nobody reads any more.
pub(crate) fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    if out
        .write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .is_err()
    {
        // The reader has gone (`| head`): as if killed by SIGPIPE.
        std::process::exit(141);
    }
}

/// Prints a line, quietly ending when nobody reads any more.
pub(crate) fn say(text: impl AsRef<str>) {
    put(&format!("{}\n", text.as_ref()));
}

/// A progress display on standard output: `    (12.34/100%)`.
pub(crate) struct Progress {
    enabled: bool,
    total: u64,
    done: Cell<u64>,
    shown: Cell<Option<Instant>>,
}

impl Progress {
    pub(crate) fn new(enabled: bool, total: u64) -> Rc<Self> {
        let progress = Rc::new(Self {
            enabled,
            total,
            done: Cell::new(0),
            shown: Cell::new(None),
        });
        progress.show(true);
        progress
    }

    /// Adds to what is done.
    pub(crate) fn add(&self, bytes: u64) {
        self.done.set(self.done.get().saturating_add(bytes));
        self.show(false);
    }

    fn show(&self, always: bool) {
        let recent = self
            .shown
            .get()
            .is_some_and(|at| at.elapsed() < Duration::from_millis(200));
        if !self.enabled || (recent && !always) {
            return;
        }
        self.shown.set(Some(Instant::now()));
        let share = 100.0 * self.done.get().min(self.total) as f64 / self.total.max(1) as f64;
        put(&format!("    ({share:.2}/100%)\r"));
    }

    /// The last line.
    pub(crate) fn finish(&self) {
        if self.enabled {
            self.done.set(self.total);
            self.show(true);
            say("");
        }
    }

    /// As a callback.
    pub(crate) fn callback(self: &Rc<Self>) -> Rc<dyn Fn(u64)> {
        let progress = self.clone();
        Rc::new(move |bytes| progress.add(bytes))
    }
}

/// Seconds since 1970 in local time, as `2026-11-22 14:17:51`.
pub(crate) fn local_time(seconds: u32) -> String {
    let (offset, days_and_seconds) = (utc_offset(i64::from(seconds)), i64::from(seconds));
    let shifted = days_and_seconds + offset;
    let (days, rest) = (shifted.div_euclid(86_400), shifted.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// Days since 1970 as year, month and day (H. Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Seconds east of Greenwich at that time, from the zone file of TZ or the system; 0 if unknown.
fn utc_offset(time: i64) -> i64 {
    let path = match std::env::var("TZ") {
        Ok(zone) if zone.is_empty() => return 0,
        Ok(zone) => {
            let zone = zone.trim_start_matches(':').to_owned();
            if zone.starts_with('/') {
                zone
            } else {
                format!("/usr/share/zoneinfo/{zone}")
            }
        }
        Err(_) => "/etc/localtime".to_owned(),
    };
    std::fs::read(path)
        .ok()
        .and_then(|bytes| zone_offset(&bytes, time))
        .unwrap_or(0)
}

/// Looks a time up in a zone file (RFC 9636), by its 64-bit part.
fn zone_offset(bytes: &[u8], time: i64) -> Option<i64> {
    let header = |at: usize| -> Option<[usize; 6]> {
        let fields = bytes.get(at..at + 44)?;
        fields.starts_with(b"TZif").then_some(())?;
        let field = |n: usize| {
            fields[20 + 4 * n..24 + 4 * n]
                .iter()
                .fold(0usize, |v, b| v << 8 | usize::from(*b))
        };
        Some([field(0), field(1), field(2), field(3), field(4), field(5)])
    };
    let [utc, standard, leaps, times, types, names] = header(0)?;
    let second = 44 + times * 5 + types * 6 + names + leaps * 8 + standard + utc;
    let [_, _, _, times, types, _] = header(second)?;
    let data = bytes.get(second + 44..)?;
    let transition = |n: usize| {
        Some(i64::from_be_bytes(
            data.get(n * 8..n * 8 + 8)?.try_into().ok()?,
        ))
    };
    let mut kind = 0;
    for n in 0..times {
        if transition(n)? > time {
            break;
        }
        kind = usize::from(*data.get(times * 8 + n)?);
    }
    let place = times * 9 + kind.min(types.saturating_sub(1)) * 6;
    Some(i64::from(i32::from_be_bytes(
        data.get(place..place + 4)?.try_into().ok()?,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (196_608, "192 KiB"),
            (197_120, "192 KiB"),
            (10 << 20, "10 MiB"),
            (3 << 29, "1.5 GiB"),
            (1 << 60, "1 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_779), (2026, 11, 22));
    }

    #[test]
    fn empty_lists_have_a_line() {
        assert_eq!(
            json(&serde_json::json!({"a": [], "b": 1})),
            "{\n    \"a\": [\n    ],\n    \"b\": 1\n}"
        );
    }
}
