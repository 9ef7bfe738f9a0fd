//! Command lines as `qemu-img` takes them: short options alone, joined or with values, long options,
//! mixed with file names.

use image_formats::luks::Secret;

use super::Failure;

/// An option that a verb takes.
#[derive(Clone, Copy)]
pub(crate) struct Spec {
    /// The letter, or the number under which a long-only option is known.
    pub(crate) short: char,
    /// The long name, or "".
    pub(crate) long: &'static str,
    /// Whether a value follows.
    pub(crate) value: bool,
}

/// A flag.
pub(crate) const fn flag(short: char, long: &'static str) -> Spec {
    Spec {
        short,
        long,
        value: false,
    }
}

/// An option with a value.
pub(crate) const fn value(short: char, long: &'static str) -> Spec {
    Spec {
        short,
        long,
        value: true,
    }
}

/// A command line taken apart.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    options: Vec<(char, String)>,
    /// What is no option: file names and sizes.
    pub(crate) names: Vec<String>,
    /// Passwords, by their ids.
    pub(crate) secrets: Vec<(String, Secret)>,
    /// The password that `--image-opts` names.
    pub(crate) key: Option<Secret>,
}

/// Takes a command line apart.
pub(crate) fn parse(arguments: &[String], specs: &[Spec]) -> Result<Parsed, Failure> {
    let mut parsed = Parsed::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            parsed.names.extend(arguments.by_ref().cloned());
        } else if let Some(long) = argument.strip_prefix("--") {
            let (name, joined) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let spec = specs
                .iter()
                .find(|s| !s.long.is_empty() && s.long == name)
                .ok_or_else(|| Failure::usage(format!("unrecognized option '--{name}'")))?;
            let value = match (spec.value, joined) {
                (true, Some(value)) => value,
                (true, None) => arguments.next().cloned().ok_or_else(|| {
                    Failure::usage(format!("option '--{name}' requires an argument"))
                })?,
                (false, None) => String::new(),
                (false, Some(_)) => {
                    let message = format!("option '--{name}' doesn't allow an argument");
                    return Err(Failure::usage(message));
                }
            };
            parsed.options.push((spec.short, value));
        } else if argument.len() > 1
            && let Some(letters) = argument.strip_prefix('-')
        {
            // `-1G` to resize is a size, not an option.
            if letters.starts_with(|c: char| c.is_ascii_digit()) {
                parsed.names.push(argument.clone());
                continue;
            }
            parse_letters(letters, specs, &mut arguments, &mut parsed)?;
        } else {
            parsed.names.push(argument.clone());
        }
    }
    Ok(parsed)
}

fn parse_letters(
    letters: &str,
    specs: &[Spec],
    arguments: &mut std::slice::Iter<'_, String>,
    parsed: &mut Parsed,
) -> Result<(), Failure> {
    for (at, letter) in letters.char_indices() {
        let spec = specs
            .iter()
            .find(|s| s.short == letter)
            .ok_or_else(|| Failure::usage(format!("invalid option -- '{letter}'")))?;
        if !spec.value {
            parsed.options.push((letter, String::new()));
            continue;
        }
        let rest = &letters[at + letter.len_utf8()..];
        let value = if rest.is_empty() {
            arguments.next().cloned().ok_or_else(|| {
                Failure::usage(format!("option requires an argument -- '{letter}'"))
            })?
        } else {
            rest.to_owned()
        };
        parsed.options.push((letter, value));
        return Ok(());
    }
    Ok(())
}

impl Parsed {
    /// Takes an option as given.
    pub(crate) fn add(&mut self, short: char, value: &str) {
        self.options.push((short, value.to_owned()));
    }

    /// Whether a flag was given.
    pub(crate) fn has(&self, short: char) -> bool {
        self.options.iter().any(|(s, _)| *s == short)
    }

    /// The last value of an option.
    pub(crate) fn get(&self, short: char) -> Option<&str> {
        self.options
            .iter()
            .rev()
            .find(|(s, _)| *s == short)
            .map(|(_, v)| v.as_str())
    }

    /// All values of an option, and the order among several options.
    pub(crate) fn all(&self, shorts: &[char]) -> Vec<(char, &str)> {
        self.options
            .iter()
            .filter(|(s, _)| shorts.contains(s))
            .map(|(s, v)| (*s, v.as_str()))
            .collect()
    }

    /// The one file name that there must be.
    pub(crate) fn one_name(&self) -> Result<&str, Failure> {
        match &self.names[..] {
            [name] => Ok(name),
            [] => Err(Failure::usage("Expecting one image file name")),
            _ => Err(Failure::usage("Expecting one image file name")),
        }
    }

    /// Whether output is to be JSON.
    pub(crate) fn json(&self) -> Result<bool, Failure> {
        match self.get('J') {
            None | Some("human") => Ok(false),
            Some("json") => Ok(true),
            Some(_) => Err(Failure::plain(
                "--output must be used with human or json as argument.",
            )),
        }
    }
}

/// A number of bytes with an optional suffix (b, k, M, G, T, P, E) and an optional fraction.
pub(crate) fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ if number.starts_with("0") && suffix.starts_with('x') => {
            return u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        }
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(1 << shift)
            .filter(|n| i64::try_from(*n).is_ok());
    }
    let fraction: f64 = number.parse().ok().filter(|_| shift > 0)?;
    let bytes = fraction * (1u64 << shift) as f64;
    (bytes < i64::MAX as f64).then_some(bytes as u64)
}

/// Options in the form `key=value,key=value`; a comma in a value is written twice.
pub(crate) fn key_values(texts: &[(char, &str)]) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for (_, text) in texts {
        let text = text.replace(",,", "\0");
        for item in text.split(',').filter(|i| !i.is_empty()) {
            let item = item.replace('\0', ",");
            let (key, value) = item.split_once('=').unwrap_or((&item, "on"));
            pairs.push((key.to_owned(), value.to_owned()));
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_and_names_mix() {
        let specs = [
            flag('q', "quiet"),
            value('f', "format"),
            value('J', "output"),
        ];
        let p = parse(&words("-qf raw a --output=json b -- -c"), &specs).unwrap();
        assert!(p.has('q') && p.json().unwrap());
        assert_eq!(p.get('f'), Some("raw"));
        assert_eq!(p.names, ["a", "b", "-c"]);
        assert_eq!(
            parse(&words("-fqcow2"), &specs).unwrap().get('f'),
            Some("qcow2")
        );
        assert!(parse(&words("-z"), &specs).is_err());
        assert!(parse(&words("-f"), &specs).is_err());
        assert_eq!(parse(&words("x -1G"), &specs).unwrap().names, ["x", "-1G"]);
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size("512"), Some(512));
        assert_eq!(size("1k"), Some(1024));
        assert_eq!(size("1.5G"), Some(3 << 29));
        assert_eq!(size("8E"), None);
        assert_eq!(size("0x200"), Some(512));
        for bad in ["", "x", "-1", "1.5", "1kk", "99999999999E"] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }

    #[test]
    fn commas_are_doubled() {
        let pairs = key_values(&[('o', "a=1,b=x,,y"), ('o', "c")]);
        let expected = [("a", "1"), ("b", "x,y"), ("c", "on")];
        assert!(
            pairs
                .iter()
                .map(|(k, v)| (k.as_str(), v.as_str()))
                .eq(expected)
        );
    }
}
